"""`train --seeds`: which runs are begun, gone on with and left out, and what ends a series."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import lock_folder
from lowrank_vit.config.flags import parse, without_seeds
from lowrank_vit.report.compare.scores import read_scores, scores_of, spread_of, table_of_seeds
from lowrank_vit.train import main
from lowrank_vit.training.series import Series, own_command, run_series, unused_name
from tests.waiting import wait_until

TRAINER = """
import json, os, pathlib, signal, sys
words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
run = pathlib.Path(given["--output"], given["--experiment"])
run.mkdir(parents=True, exist_ok=True)
seed = int(given["--seed"])
with (run.parent / "calls").open("a") as file:
    file.write(json.dumps([seed, given.get("--resume", "")]) + "\\n")
code = json.loads(os.environ["CODES"]).get(str(seed), 0)
if code == "wait":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (run / "ready").touch()
    signal.pause()
if code:
    sys.exit(code)
(run / "last.pth.tar").touch()
(run / "args.yaml").write_text("epochs: 1")
(run / "summary.csv").write_text(f"epoch,update,eval_top1,eval_loss\\n0,5,{50 + seed},0.5\\n")
"""
"""Stands for a training: notes that it was called, and leaves a run, or ends as $CODES has it for the seed."""

Train = Callable[..., Series]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    def train(line: str = "--seeds 0 1 2", series: str = "s", **codes: int | str) -> Series:
        monkeypatch.setenv("CODES", json.dumps({name.lstrip("_"): code for name, code in codes.items()}))
        (tmp_path / "calls").unlink(missing_ok=True)
        config = parse([*line.split(), "--output", str(tmp_path), "--device", "cpu", "--dataset", "digits"])
        command = [sys.executable, "-c", TRAINER, "--output", str(tmp_path)]
        return run_series(config, command, series, lambda run: bool((s := read_scores(run).status) and s.is_finished))

    return train


def calls(folder: Path) -> list[list[object]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def test_each_seed_is_a_run_of_its_own_and_the_same_again_goes_on(train: Train, tmp_path: Path) -> None:
    done = train()
    assert [(run.seed, run.path.name, run.exit_code) for run in done.runs] == [(n, f"s-seed{n}", 0) for n in range(3)]
    assert calls(tmp_path) == [[0, ""], [1, ""], [2, ""]]
    (tmp_path / "s-seed2" / "last.pth.tar").unlink()
    (tmp_path / "s-seed2" / "summary.csv").unlink()
    train()
    assert calls(tmp_path) == [[n, str(tmp_path / f"s-seed{n}" / "last.pth.tar")] for n in (0, 1)] + [[2, ""]]


def test_a_run_that_fails_leaves_the_others_to_go_on(train: Train, capfd: pytest.CaptureFixture[str]) -> None:
    done = train(_1=7)
    assert [run.exit_code for run in done.runs] == [0, 7, 0]
    assert [run.seed for run in done.failed] == [1]
    assert "with seed 1 has failed (exit code 7); the next one begins" in capfd.readouterr().out


def test_what_the_user_has_to_mend_ends_the_series(train: Train) -> None:
    assert [run.exit_code for run in train(_0=2).runs] == [2]


def test_a_run_that_was_stopped_by_itself_ends_the_series(train: Train, tmp_path: Path) -> None:
    (tmp_path / "s-seed1").mkdir()
    stopped = tmp_path / "stopped"
    done = train(_1="wait") if _later(lambda: _stop_child(tmp_path / "s-seed1" / "ready", stopped)) else None
    assert done
    assert ([run.seed for run in done.runs], done.stopped_by) == ([0, 1], "a signal")


def test_a_signal_reaches_the_run_and_ends_the_series(train: Train, tmp_path: Path) -> None:
    _later(lambda: _when(tmp_path / "s-seed0" / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    done = train(_0="wait")
    assert ([run.seed for run in done.runs], done.stopped_by) == ([0], "SIGTERM")
    assert signal.getsignal(signal.SIGTERM) is before


def _later(do: Callable[[], object]) -> bool:
    threading.Thread(target=do, daemon=True).start()
    return True


def _when(path: Path, do: Callable[[], object]) -> None:
    while not path.exists():
        threading.Event().wait(0.01)
    do()


def _stop_child(ready: Path, _: Path) -> None:
    import psutil

    _when(ready, lambda: [child.terminate() for child in psutil.Process().children() if "-c" in child.cmdline()])


def test_what_a_later_run_cannot_have_is_said_before_the_first_begins(train: Train, tmp_path: Path) -> None:
    (tmp_path / "s-seed2").mkdir()
    (tmp_path / "s-seed2" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"s-seed2 is in use: thesis.tex is not a run's file"):
        train()
    (tmp_path / "s-seed2" / "thesis.tex").unlink()
    held = lock_folder(tmp_path / "s-seed2")
    assert held
    with pytest.raises(UserError, match="s-seed2 is in use by another process"):
        train()
    held.release()
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--seeds 0", "write --seed 0, or give two"),
        ("--seeds 3 1 3", "3 is given twice"),
        ("--seeds 0 0", "0 is given twice"),
        ("--seeds 0 1 --seed 3", "--seed 3 and --seeds both say"),
        ("--seed=3 --seeds=0", "--seed 3 and --seeds both say"),
        ("--seeds", "none is given"),
        ("--seeds 0 -1", "not `-1`"),
        ("--seeds 0 1.5", "not `1.5`"),
        ("--seeds 0 1 --resume x", "leave --resume out"),
        ("--seeds 0 1 --wandb-resume-id x", "Leave it out"),
        ("--seeds 0 1 --experiment a/b", "plain name"),
    ],
)
def test_what_is_no_series(line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse(["--dataset", "digits", "--device", "cpu", *line.split()])


def test_what_is_typed_wins_over_a_file(tmp_path: Path) -> None:
    """So a run of a series, whose file says --seeds, is no series."""
    (tmp_path / "seed.yaml").write_text("dataset: digits\ndevice: cpu\nseed: 5\n")
    (tmp_path / "seeds.yaml").write_text("dataset: digits\ndevice: cpu\nseeds: [1, 2]\n")
    (tmp_path / "both.yaml").write_text("seed: 5\nseeds: [1, 2]\n")
    files = {name: str(tmp_path / f"{name}.yaml") for name in ("seed", "seeds", "both")}
    assert parse(["--config", files["seed"], "--seeds", "0", "1"]).run.seeds == (0, 1)
    assert parse(["--config", files["seeds"]]).run.seeds == (1, 2)
    run = parse(["--config", files["seeds"], "--seed", "2"]).run
    assert (run.seed, run.seeds) == (2, None)
    with pytest.raises(UserError, match="both say which seeds"):
        parse(["--config", files["both"]])


def test_torchrun_makes_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="Start torchrun once for each"):
        main(["--dataset", "digits", "--device", "cpu", "--seeds", "0", "1"])


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("--seeds 0 1 2 --lr 1", "--lr 1"),
        ("--lr 1 --seeds=0 --seeds 3 4", "--lr 1"),
        ("--seeds 0 1 data", "data"),
        ("data --model x -b 3", "data --model x -b 3"),
        ("--wandb-tags seeds 1 --seeds 1 2 --scale 0.5 1", "--wandb-tags seeds 1 --scale 0.5 1"),
    ],
)
def test_a_runs_command_line_has_no_seeds(line: str, kept: str) -> None:
    assert without_seeds(line.split()) == kept.split()


def test_a_run_is_started_as_the_series_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["python", "-u", "-m", "lowrank_vit.train"], ["python", "/bin/lowrank-vit", "train"]):
        monkeypatch.setattr("sys.orig_argv", [*words, "--seeds", "0", "1"])
        assert own_command(["--seeds", "0", "1"], "m") == [sys.executable, *words[1:]]
    assert own_command(["--seeds", "7"], "m") == [sys.executable, "-m", "m"]


def test_a_name_by_the_time_is_of_no_run(tmp_path: Path) -> None:
    first = unused_name(tmp_path, "vit", (0, 1))
    for name in (f"{first}-seed1", f"{first[:-1]}{(int(first[-1]) + 1) % 10}-seed0"):
        (tmp_path / name).mkdir()
    assert not any((tmp_path / f"{unused_name(tmp_path, 'vit', (0, 1))}-seed{n}").exists() for n in (0, 1))


def test_the_table_has_means_and_sample_deviations(train: Train, tmp_path: Path) -> None:
    runs = train("--seeds 1 3").runs
    header, last, *_ = table_of_seeds([run.seed for run in runs], [run.path for run in runs])
    assert header.split() == ["seed", "1", "seed", "3", "mean", "±", "sd"]
    assert last.split() == "top-1 accuracy (%) last epoch 51.00 53.00 52.00 ± 1.41".split()
    assert table_of_seeds([0], [tmp_path / "none"]) == []


def test_scores_that_some_runs_lack() -> None:
    import numpy as np

    nan = float("nan")
    both = scores_of([{"eval_top1": np.array([3.0, nan])}, {"eval_top1": np.array([5.0, 4.0])}, {}])
    assert [(one.when, one.spread()) for one in both] == [
        ("last epoch", "4.00 (of 1)"),
        ("best epoch", "4.00 ± 1.41 (of 2)"),
    ]
    assert spread_of([nan, nan], str) == "not measured"


def test_a_run_ends_with_a_series_that_is_killed(tmp_path: Path) -> None:
    """The stand-in of a training ends by SIGTERM, as one does that saves first."""
    waiting = "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); print(1, flush=True); signal.pause()"
    series = f"""
import os, signal, subprocess, sys
from lowrank_vit.common.aside import signalled_with_parent
child = subprocess.Popen([sys.executable, "-c", {waiting!r}], stdout=subprocess.PIPE,
                         preexec_fn=signalled_with_parent(signal.SIGTERM))
child.stdout.readline()
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", series], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not _is_there(int(done.stdout)), "the end of the run")


def _is_there(process: int) -> bool:
    import psutil

    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE
