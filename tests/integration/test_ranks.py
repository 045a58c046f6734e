"""Several processes under torchrun: the losses of one, and how they end together. Gloo, on the CPU."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit import train as train_command
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.ranks.joining import ALONE
from tests import forked as forks
from tests.photos import write_sets
from tests.runs import losses, records, same_weights
from tests.waiting import LONG_S

ROOT = Path(__file__).parents[2]
RECIPE = """
--epochs 2 --log-interval 4 --mixup 0.8 --cutmix 1 --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --spec-every 11
--spec-updates --spec-flows --spec-flow-images 48
--reg-nuclear 0.02 --reg-stable-rank 1e-4 --spectral-clip 1.5 --reg-every 4
""".split()
UPDATES = 11
Process = subprocess.Popen[str] | forks.Forked


def torchrun(processes: int, argv: list[str]) -> Process:
    """That many ranks of the training command, each with its own Python."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return start([*launcher, "-m", "lowrank_vit.train", *argv])


def forked(processes: int, argv: list[str], *options: str, program: Path | None = None) -> Process:
    """The same, or a program that calls the training command, all forked from a process that has imported it."""
    where = str(program or ROOT / "lowrank_vit" / "train.py")
    return forks.Forked(forks.torchrun, f"--nproc-per-node={processes}", *options, "--run-path", where, *argv)


def altered(folder: Path, change: str) -> Path:
    """A program that trains like the command, but for a change to the trainer `t` of each rank.

    What is to befall a rank it does to itself: whoever watched it from here might come too late.
    """
    path = folder / "altered.py"
    path.write_text(f"""
import os, signal, threading, time
from lowrank_vit.common.errors import exit_cleanly
from lowrank_vit import train
from lowrank_vit.training.trainer import Trainer
from lowrank_vit.model.weights import read_checkpoint
made, rank = Trainer.__init__, int(os.environ["RANK"])
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
def after_updates(t, do):
    # `do` is told of each
    step_update = t.setup.scheduler.step_update
    def and_do(n, metric=None):
        step_update(n, metric)
        do(n)
    t.setup.scheduler.step_update = and_do
def wait_until_saved(t, update=1):
    last = t.run_dir.path / "last.pth.tar"
    while not last.exists() or read_checkpoint(last).content["step"]["num_updates"] < update:
        time.sleep(0.02)
def make(t, *args):
    made(t, *args)
{textwrap.indent(textwrap.dedent(change), "    ")}
Trainer.__init__ = make
exit_cleanly(train.main)
""")
    return path


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LOGLEVEL": "ERROR", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: Process) -> tuple[int | None, str, str]:
    out, err = process.communicate(timeout=LONG_S)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def one(digits_dir, tmp_path_factory) -> Path:
    """The run of one process."""
    from tests.integration.conftest import SMALL

    output = tmp_path_factory.mktemp("one")
    train_command.main([*SMALL, *RECIPE, "--data-dir", str(digits_dir), "--output", str(output), "--experiment", "one"])
    return output / "one"


def assert_same_run(run: Path, one: Path) -> None:
    """Up to rounding: losses, accuracy, gradient norms, validation, weights and spectra."""
    for kind, names in (("train", ("loss", "top1", "grad_norm", "lr")), ("eval", ("eval_loss", "eval_ema_top1"))):
        ours, expected = records(run, kind), records(one, kind)
        assert [record["update"] for record in ours] == [record["update"] for record in expected]
        for name in names:
            values = [[record[name] for record in found] for found in (ours, expected)]
            np.testing.assert_allclose(*values, rtol=2e-4, atol=1e-9)
    for ours, expected in zip(records(run, "flow"), records(one, "flow"), strict=True):
        assert ours.keys() == expected.keys()
        names = [name for name in expected if "flow/" in name and not name.endswith("seconds")]
        np.testing.assert_allclose([ours[n] for n in names], [expected[n] for n in names], rtol=1e-2)
    first, second = (torch.load(path / "last.pth.tar", weights_only=True) for path in (run, one))
    for key in ("state_dict", "state_dict_ema"):
        for name, weight in second[key].items():
            torch.testing.assert_close(first[key][name], weight, rtol=1e-3, atol=1e-4)
    stored = [np.load(path / "spectra" / "update_00000022.npz") for path in (run, one)]
    assert list(stored[0]) == list(stored[1])
    for name in stored[1]:
        np.testing.assert_allclose(stored[0][name], stored[1][name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("launched", "processes", "more"),
    [
        pytest.param(torchrun, 2, ("-b", "64"), marks=pytest.mark.slow),
        (forked, 4, ("-b", "16", "--grad-accum-steps", "2", "--validation-batch-size", "50")),
        pytest.param(forked, 2, ("-b", "32", "--grad-accum-steps", "2", "--compile"), marks=pytest.mark.slow),
    ],
)
def test_ranks_train_as_one(small, one, tmp_path, launched, processes, more):
    code, out, err = finish(launched(processes, small(*RECIPE, *more, "--experiment", "n")))
    assert code == 0, err
    assert f"batch 128 ({more[1]} x {processes} ranks" in out
    assert out.count("top-1") == 3  # two epochs and the end, said by one rank
    assert_same_run(tmp_path / "n", one)


def test_one_rank_that_joins_alone_has_the_bits_of_one_that_does_not(small, one, tmp_path, monkeypatch):
    """Its collectives, and gradients averaged with nobody's, as NCCL is tested on one GPU."""
    monkeypatch.setenv(ALONE, "1")
    train_command.main(small(*RECIPE, "--experiment", "alone"))
    assert not torch.distributed.is_initialized()
    assert losses(tmp_path / "alone") == losses(one)
    assert same_weights(tmp_path / "alone" / "last.pth.tar", one / "last.pth.tar")


def test_a_signal_stops_all_ranks_and_one_process_goes_on(small, one, tmp_path):
    program = altered(
        tmp_path,
        """
        def to_be_stopped(n):
            if n == 5 and rank == 1:
                wait_until_saved(t)
                os.kill(os.getpid(), signal.SIGUSR1)  # one of the ranks, as a batch system may do
            if n >= 5:
                time.sleep(0.2)
        after_updates(t, to_be_stopped)
        """,
    )
    argv = small(*RECIPE, "--epochs", "2", "--experiment", "s")
    last = tmp_path / "s" / "last.pth.tar"
    code, out, err = finish(forked(2, [*argv, "-b", "64", "--checkpoint-interval", "1"], program=program))
    assert code == 0, err
    if "stopped by SIGUSR1" in out:  # else it was through before all ranks knew of it
        said = int(out.partition("after update ")[2].partition(";")[0])
        assert read_checkpoint(last).content["step"]["num_updates"] == said
        train_command.main([*argv, "--resume", str(last)])
    assert_same_run(tmp_path / "s", one)


def test_a_rank_that_fails_ends_all_with_its_own_error_first(small, tmp_path):
    """A damaged image in one rank's share."""
    from lowrank_vit.data.sets.beton import Beton

    photos = write_sets(tmp_path)["jpeg"]
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "val"):
        for path in photos.parent.glob(photos.name + "*"):
            (data / path.name.replace(photos.stem, name, 1)).write_bytes(path.read_bytes())
    with (data / "train.beton").open("r+b") as file:
        start_of = int(Beton(data / "train.beton").pointers[7])
        file.seek(start_of)
        file.write(bytes(200))
    argv = small(*RECIPE, "--dataset", "", "--data-dir", str(data), "-b", "2", "--loader", "ffcv", "--img-size", "16")
    code, _, err = finish(forked(2, argv))
    assert code != 0
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    assert "rank " in errors[0]
    assert "sample 7" in errors[0]
    assert "does not decode" in errors[0]
    assert "Traceback" not in err.partition("error: ")[0]
    rank = errors[0].partition("rank ")[2][0]
    assert re.search(rf"Root Cause .*?rank +: {rank} ", err, re.DOTALL), err


def test_a_mistake_on_the_command_line_is_told_once(small):
    """By the rank itself, and at the end by torchrun, without a traceback of ours."""
    code, _, err = finish(forked(2, small("--epochs", "0")))
    assert code != 0
    ours, _, of_torchrun = err.partition("Root Cause")
    told = "error: --epochs takes a whole number of at least 1, not `0`"
    assert ours.count(told) == 1
    assert of_torchrun.count(f"traceback : {told}") == 1
    assert of_torchrun.count("\n") < 12
    assert "lowrank_vit/" not in of_torchrun


def test_a_rank_with_other_options_is_named_before_it_trains(small, tmp_path):
    program = tmp_path / "other_options.py"
    program.write_text("""
import os, sys
from lowrank_vit import train
from lowrank_vit.common.errors import exit_cleanly
sys.argv += ["--lr", "0.3", "--workers", "3"] if os.environ["RANK"] == "1" else []
exit_cleanly(train.main)
""")
    code, _, err = finish(forked(2, small(*RECIPE, "-b", "64", "--experiment", "n", "--lr", "0.1"), program=program))
    assert code != 0
    (error,) = (line for line in err.splitlines() if line.startswith("error: "))
    assert re.search(
        r"error: rank 1: on \S+ it would start another run than rank 0 on \S+: --lr is 0.3, there 0.1\.", error
    )
    assert re.search(r"Root Cause .*?rank +: 1 ", err, re.DOTALL), err
    assert not (tmp_path / "n").exists()


def test_a_killed_rank_ends_the_others(small, tmp_path):
    """Even if the main thread of another waits for what will never come, as for a GPU that waits for the lost one."""
    program = altered(
        tmp_path,
        """
        def die(n):
            if n == 14 and rank == 1:
                wait_until_saved(t)
                os.kill(os.getpid(), signal.SIGKILL)
            elif n == 14:
                threading.Event().wait()
        after_updates(t, die)
        """,
    )
    code, _, err = finish(forked(2, small(*RECIPE, "-b", "64", "--experiment", "k"), program=program))
    assert code != 0
    assert "error: rank 0: rank 1 is gone without a word" in err
    assert read_checkpoint(tmp_path / "k" / "last.pth.tar").content["step"]["num_updates"] == UPDATES


def test_a_signal_in_validation_stops_all_ranks_and_nothing_is_lost(small, one, tmp_path):
    """The second rank waits long for its data and both have left out samples, which the log says of all ranks."""
    program = altered(
        tmp_path,
        """
        from types import SimpleNamespace
        from lowrank_vit.run import speed
        late_s = 0
        speed.time = SimpleNamespace(perf_counter=lambda: time.perf_counter() + late_s)
        loader = t.setup.train_loader
        train_batches = loader.batches
        def late(epoch):
            nonlocal late_s
            for batch in train_batches(epoch):
                late_s += 1000 * rank  # by the clock of the figures
                yield batch
        loader.batches = late
        type(loader).bad = property(lambda self: {5, 7} if rank else {5, 8} if self is loader else set())
        if rank:
            t.world.say("is late")
        batches = t.setup.val_loader.batches
        def slow(epoch):
            for n, batch in enumerate(batches(epoch)):
                if t.setup.step.position.num_updates == 22:
                    if n == 1 and rank:
                        wait_until_saved(t, 22)  # before, if the run should be killed now
                        os.kill(os.getpid(), signal.SIGUSR1)
                    time.sleep(1)
                yield batch
        t.setup.val_loader.batches = slow
        """,
    )
    argv = small(*RECIPE, "-b", "64", "--experiment", "v")
    code, said, err = finish(forked(2, [*argv, "-vb", "10"], program=program))
    assert code == 0, err
    assert "stopped by SIGUSR1 after update 22" in said
    assert [record["update"] for record in records(tmp_path / "v", "eval")] == [11]
    assert "\nrank 1: is late\n" in f"\n{said}"
    logged = records(tmp_path / "v", "train")
    assert {(record["data_wait_rank"], record["bad_samples"]) for record in logged} == {(1, 3)}
    assert min(record["data_wait"] for record in logged) > 0
    assert "% (rank 1)  " in said  # the line of an epoch
    train_command.main([*argv, "-b", "128", "--resume", str(tmp_path / "v" / "last.pth.tar")])
    assert_same_run(tmp_path / "v", one)


DIES_ONCE = """
def die(n):
    if n == 14 and rank == 1 and attempt == 0:
        wait_until_saved(t)
        os.kill(os.getpid(), signal.SIGKILL)
after_updates(t, die)
"""


def test_elastic_restarts_go_on_from_the_last_checkpoint(small, one, tmp_path):
    program = altered(tmp_path, DIES_ONCE)
    argv = [*small(*RECIPE), "-b", "64", "--checkpoint-interval", "3"]  # without --experiment: the run has to be found
    code, out, err = finish(forked(2, argv, "--max-restarts=1", program=program))
    assert code == 0, err
    assert "resumed in epoch" in out
    (run,) = {path.parent for path in tmp_path.glob("*/args.yaml")} - {tmp_path / "latest"}
    assert_same_run(run, one)


def test_ranks_whose_launcher_is_killed_save_and_end(small, tmp_path):
    program = altered(
        tmp_path,
        """
        def then_kill_the_agent(n):
            if n == 14 and rank == 1:
                os.kill(os.getppid(), signal.SIGKILL)
            elif n > 14:
                time.sleep(0.5)
        after_updates(t, then_kill_the_agent)
        """,
    )
    argv = small(*RECIPE, "--epochs", "40", "-b", "64", "--experiment", "a")
    code, out, err = finish(forked(2, argv, program=program))  # whose output ends with the last rank's
    assert code == -signal.SIGKILL
    assert "The run saves and ends" in err
    # The agent's own processes are sent SIGINT when it ends, where they are forked.
    (said,) = map(int, re.findall(r"stopped by (?:the loss of its launcher|SIGINT) after update (\d+)", out))
    assert read_checkpoint(tmp_path / "a" / "last.pth.tar").content["step"]["num_updates"] == said >= 14


HANGS = {"stop": "os.kill(os.getpid(), signal.SIGSTOP)", "hold": "ctypes.PyDLL(None).sleep(1000)"}


@pytest.mark.slow
@pytest.mark.parametrize("hang", ["sleep", *HANGS])
def test_a_rank_that_hangs_is_named(small, tmp_path, hang):
    program = altered(
        tmp_path,
        f"""
        import ctypes
        def hang(n):
            if n == 14 and rank == 1:
                {HANGS.get(hang, "time.sleep(1000)")}
        after_updates(t, hang)
        """,
    )
    argv = small(*RECIPE, "-b", "64", "--rank-timeout", "20", "--experiment", "h")
    code, _, err = finish(forked(2, argv, program=program))
    assert code != 0
    if hang == "sleep":
        assert "error: rank 1: stuck on" in err
    else:
        assert re.search(r"error: rank 0: rank 1 on \S+ \(in .*\) gives no sign of life since \d\d:\d\d:\d\d", err), err
    assert ("in hang" in err) == (hang != "stop")


@pytest.mark.slow
def test_a_restart_behind_a_launcher_that_does_not_exec_goes_on(small, tmp_path):
    wrapper = tmp_path / "run.sh"
    program = altered(tmp_path, DIES_ONCE)
    wrapper.write_text(f'#!/bin/sh\n{sys.executable} {program} "$@"\ncode=$?\nexit $code\n')
    wrapper.chmod(0o755)
    options = "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--no-python"
    argv = small(*RECIPE, "-b", "64", "--checkpoint-interval", "1", "--experiment", "w")
    code, out, err = finish(start([sys.executable, "-m", "torch.distributed.run", *options, str(wrapper), *argv]))
    assert code == 0, err
    assert "resumed in epoch" in out


def test_a_rank_killed_when_all_is_saved_costs_nothing(small, tmp_path):
    """In each attempt, so that the restart that finds nothing to do must not come to the same place."""
    program = altered(
        tmp_path,
        """
        from lowrank_vit.run.checkpoints import Checkpoints
        finish = Checkpoints.finish
        def and_die(self):
            finish(self)
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        Checkpoints.finish = and_die
        """,
    )
    argv = small(*RECIPE, "--epochs", "1", "--warmup-epochs", "0", "-b", "64")
    code, out, err = finish(forked(2, argv, "--max-restarts=1", program=program))
    assert code == 0, err
    assert "already finished: all 1 epochs are done" in out
    assert out.rindex("next:") > out.index("already finished")
