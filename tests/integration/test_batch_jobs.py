"""The batch scripts of `scripts/slurm/`, with stand-ins for Slurm's commands; the guide's recipes for other systems."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from data_prep import __main__ as data_prep_command
from data_prep.formats.beton import file_or_parts
from lowrank_vit.config.flags import parse
from tests.documents import ROOT, SBATCH, SLURM, blocks, calls_of, calls_of_job, header_commands, tool, write_recorders
from tests.runs import losses
from tests.sources import write_splits
from tests.waiting import LONG_S, wait_until

SCRIPTS = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
NAMES = [path.name for path in SCRIPTS]
TRAIN = "scripts/slurm/train.sbatch"
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@pytest.mark.parametrize("path", [*SCRIPTS, ROOT / "scripts" / "slurm" / "requeue.sh"], ids=lambda path: path.name)
def test_bash_can_read_it(path):
    done = subprocess.run([tool("bash"), "-n", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_its_options_are_slurms_and_stand_before_its_first_command(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert options == [line.removeprefix("#SBATCH ") for line in lines[:first] if line.startswith("#SBATCH")]
    assert {option.split("=")[0] for option in options} <= SBATCH
    assert {"--signal=B:USR1@120", "--requeue", "--open-mode=append"} <= set(options)


def test_a_job_trains_on_all_its_gpus_and_goes_on_where_a_checkpoint_is(tmp_path):
    write_recorders(tmp_path)
    config = ROOT / "configs" / "imagenet1k_vit_small.yaml"
    arguments = ["--nodes=2", TRAIN, "--config", str(config), "-b", "64"]
    for told, run in (({}, "output/slurm_123456"), ({"RUN": "vit", "OUTPUT": "runs"}, "runs/vit")):
        for last in (None, tmp_path / run / "last.pth.tar"):
            if last:
                last.parent.mkdir(parents=True)
                last.touch()
            ((name, words, _),) = calls_of_job(arguments, told, tmp_path)
            launch = torchrun_parser().parse_args(words)
            assert (name, launch.nnodes, launch.nproc_per_node, launch.max_restarts) == ("torchrun", "2", "8", 3)
            assert (launch.rdzv_backend, launch.rdzv_id, launch.rdzv_endpoint) == ("c10d", "123456", "node1:13456")
            assert (launch.signals_to_handle, launch.training_script) == (SIGNALS, "lowrank_vit.train")
            parsed = parse(launch.training_script_args)
            assert (parsed.run.output / parsed.run.experiment, parsed.data.batch_size) == (Path(run), 64)
            assert parsed.run.resume == (last and last.relative_to(tmp_path))


def test_an_array_converts_a_set_in_parts_that_open_as_one(tmp_path):
    write_recorders(tmp_path)
    photos = write_splits(tmp_path / "photos")
    script = "scripts/slurm/convert.sbatch"
    ((name, words, _),) = calls_of_job(["--array=1-16", script, "--src", "a", "--out", "b"], {}, tmp_path)
    assert (name, words) == ("python", "-m data_prep imagefolder --src a --out b --shard 3/16".split())
    arguments = ["--array=3", script, "--src", str(photos), "--out", str(tmp_path / "set")]
    ((_, words, _),) = calls_of_job(arguments, {"PARTS": "3"}, tmp_path)
    for n in (1, 2, 3):
        data_prep_command.main([*words[2:-1], words[-1].replace("3/3", f"{n}/3")])
    parts = file_or_parts(tmp_path / "set" / "train.beton")
    assert [part.name for part in parts] == [f"train-{n}-of-3.beton" for n in (1, 2, 3)]


@pytest.mark.parametrize("words", [["hfds", "user/set:train"], ["wds", "a b-{00..11}.tar"], ["imagefolder"], []])
def test_an_array_converts_what_data_prep_can(words, tmp_path):
    write_recorders(tmp_path)
    line = ["scripts/slurm/convert.sbatch", *words, "--out", "b"]
    ((_, called, _),) = calls_of_job(line, {}, tmp_path)
    assert called == ["-m", "data_prep", *(words or ["imagefolder"]), "--out", "b", "--shard", "3/16"]


@pytest.mark.parametrize(
    ("told", "is_right"),
    [
        ({"ID": "0", "MIN": "0", "MAX": "15", "COUNT": "16"}, False),
        ({"ID": "3", "MIN": "0", "MAX": "15", "COUNT": "16"}, False),
        ({"ID": "2", "MIN": "2", "MAX": "17", "COUNT": "16"}, False),
        ({"ID": "3", "MIN": "1", "MAX": "15", "COUNT": "8"}, False),
        ({"ID": "7", "MIN": "7", "MAX": "7", "COUNT": "1"}, False),
        ({"ID": "1", "MIN": "1", "MAX": "16", "COUNT": "16"}, True),
        ({"ID": "7", "MIN": "7", "MAX": "9", "COUNT": "2", "PARTS": "16"}, True),
        ({"ID": "0", "MIN": "0", "MAX": "0", "COUNT": "1", "PARTS": "16"}, False),
        ({"ID": "17", "MIN": "17", "MAX": "17", "COUNT": "1", "PARTS": "16"}, False),
    ],
)
def test_an_array_that_is_not_of_all_parts_is_refused(told, is_right, tmp_path):
    """By each of its elements, before one of them has converted a part under a wrong name."""
    write_recorders(tmp_path)
    record = tmp_path / "record.jsonl"
    environment = {key if key == "PARTS" else f"SLURM_ARRAY_TASK_{key}": value for key, value in told.items()}
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "RECORD": str(record), "PATH": str(tmp_path / "bin")}
    command = [tool("bash"), "scripts/slurm/convert.sbatch", "--src", "a", "--out", "b"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, record.exists()) == ((0, True) if is_right else (2, False)), done.stderr
    assert is_right or "count from 1, as in --array=1-" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=NAMES)
def test_what_its_comment_says_can_be_typed(path, tmp_path):
    write_recorders(tmp_path)
    calls = calls_of(header_commands(path), tmp_path)
    assert len(calls) >= 2
    for name, words, told in calls:
        if name == "python":  # what the jobs need
            assert words[:3] == ["-m", "data_prep", "list"]
            continue
        assert name == "sbatch"
        assert calls_of_job(words, told, tmp_path)


WAITS = "while :; do read -rt 0.02 <>/dev/zero || true; done"
STEP = "trap 'echo saved >>log; exit {code}' {signal}; echo begun >>log; " + WAITS


def start(script: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """A batch shell with stand-ins for Slurm's commands."""
    (folder / "bin").mkdir(exist_ok=True)
    for name in ("srun", "scontrol"):
        (folder / "bin" / name).write_text(f"#!{tool('bash')}\n{SLURM[name].replace('node1', 'localhost')}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    of_job = {"PATH": path, "SLURM_JOB_ID": "77", "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_NODELIST": "n"}
    with (folder / "job.log").open("ab") as log:
        return subprocess.Popen(
            [tool("bash"), "-c", script], cwd=folder, env=os.environ | of_job | environment, stdout=log, stderr=log
        )


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("signal_name", "stopped", "code", "progress", "is_queued"),
    [
        ("USR1", 1, 1, "", True),
        ("TERM", 143, 143, "", True),
        ("USR1", 0, 0, "true", True),
        ("USR1", 1, 1, "false", False),
        ("USR1", 1, 0, "", False),  # it was finished
        ("USR1", 1, 139, "", False),
        ("TERM", 143, 1, "true", False),
    ],
)
def test_the_job_of_a_step_that_was_stopped_is_queued_again(signal_name, stopped, code, progress, is_queued, tmp_path):
    step = STEP.format(signal=signal_name, code=code).replace("'", "'\\''")
    script = f"step_with_requeue {signal_name} {stopped} srun --x=1 bash -c '{step}'"
    defined = f"has_progress() {{ {progress}; }};" if progress else ""
    job = start(f"set -eu; . {ROOT}/scripts/slurm/requeue.sh; {defined} {script}", tmp_path, {})
    wait_until(lambda: lines_of(tmp_path / "log") == ["begun"], "the step", while_runs=job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(LONG_S) == (0 if is_queued else code)
    assert lines_of(tmp_path / "log") == ["begun", "saved"]
    assert lines_of(tmp_path / "requeued.txt") == ["requeue 77"] * is_queued
    said, *_ = lines_of(tmp_path / "job.log")
    assert said.endswith(f": job 77 is {'' if is_queued else 'not '}queued again")


@pytest.mark.parametrize(
    ("has_checkpoint", "saves", "is_queued"), [(True, True, True), (False, True, True), (True, False, False)]
)
def test_a_training_that_has_saved_nothing_new_is_not_queued_again(has_checkpoint, saves, is_queued, tmp_path):
    """The 1 of torchrun says that it was stopped or that a rank has failed: so the checkpoint tells."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "bin").mkdir()
    last = tmp_path / "output" / "slurm_77" / "last.pth.tar"
    last.parent.mkdir(parents=True)
    if has_checkpoint:
        last.touch()
    save = f"echo new >{last}.new; mv {last}.new {last}" if saves else "true"
    torchrun = STEP.format(signal="USR1", code=1).replace("echo saved >>log", save)
    (tmp_path / "bin" / "torchrun").write_text(f"#!{tool('bash')}\n{torchrun}\n")
    (tmp_path / "bin" / "torchrun").chmod(0o755)
    job = start(f"exec bash {TRAIN}", tmp_path, {"SLURM_JOB_NUM_NODES": "1"})
    wait_until(lambda: lines_of(tmp_path / "log") == ["begun"], "the step", while_runs=job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(LONG_S) == (0 if is_queued else 1), lines_of(tmp_path / "job.log")
    assert lines_of(tmp_path / "requeued.txt") == ["requeue 77"] * is_queued


@pytest.mark.parametrize("code", [0, 3])
def test_a_step_that_ends_by_itself_is_not_queued_again(code, tmp_path):
    script = f". {ROOT}/scripts/slurm/requeue.sh; step_with_requeue USR1 1 srun bash -c 'exit {code}'; echo after >log"
    job = start(f"set -eu; {script}", tmp_path, {})
    assert job.wait(LONG_S) == code
    assert lines_of(tmp_path / "log") == ["after"] * (code == 0)
    assert not (tmp_path / "requeued.txt").exists()


@pytest.mark.slow
def test_a_training_is_saved_before_the_limit_and_goes_on(tmp_path):
    """Twice, with torchrun itself; no update is made twice or left out."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    small = """--device cpu --epochs 2000 --batch-size 128 --loader resident --no-spec-monitor --log-interval 1
        --model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg"""
    script = f"exec bash {TRAIN} --config {ROOT}/configs/quickstart.yaml {' '.join(small.split())}"
    environment = {
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "1",
        "RUN": "run",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    run, done = tmp_path / "output" / "run", 0
    for times in (1, 2):
        job = start(script, tmp_path, environment)

        def has_gone_on(done: int = done) -> bool:
            return (run / "last.pth.tar").exists() and max(losses(run), default=0) > done

        wait_until(has_gone_on, "a checkpoint and an update after it", while_runs=job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(LONG_S) == 0, lines_of(tmp_path / "job.log")[-20:]
        assert lines_of(tmp_path / "requeued.txt") == ["requeue 77"] * times
        updates = sorted(losses(run))  # each once
        assert updates == list(range(1, len(updates) + 1))
        assert len(updates) > done
        done = len(updates)


def recipe(package: str, photos: Path, out: Path) -> str:
    """The guide's Python block that imports a package, with other folders and two parts."""
    (text,) = (b.text for b in blocks("docs/guide.md") if b.language == "python" and f"import {package}" in b.text)
    small = {'"/data/imagenet"': f'"{photos}"', '"data/imagenet1k_parts"': f'"{out}"', ", 32\n": ", 2\n"}
    for old, new in small.items():
        assert old in text
        text = text.replace(old, new)
    return text.replace("num_cpus=16", "num_cpus=1").replace("cpus_per_task=16", "cpus_per_task=1")


@pytest.mark.slow
@pytest.mark.parametrize("package", ["submitit", "ray"])
def test_the_recipe_converts_in_parts(package, tmp_path, monkeypatch):
    found: Any = pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    photos = write_splits(tmp_path / "photos")
    leave: Callable[[], object] = getattr(found, "shutdown", lambda: None)
    try:
        exec(compile(recipe(package, photos, tmp_path / "set"), "guide.md", "exec"), {})
    finally:
        leave()
    assert len(file_or_parts(tmp_path / "set" / "train.beton")) == 2
    assert len(file_or_parts(tmp_path / "set" / "val.beton")) == 2
