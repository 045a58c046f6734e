"""Ranks on CUDA: one that joins alone over NCCL, with gradients averaged as among many, and two GPUs where they are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.common.devices import in_turn
from lowrank_vit.config.flags import parse
from lowrank_vit.ranks.joining import joined
from lowrank_vit.ranks.world import World
from lowrank_vit.training.trainer import Trainer
from tests.runs import losses, records
from tests.unit.training.test_averaging import WAYS, check_collectives, check_views, train

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def argv(digits_dir, tmp_path):
    model = "--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg"
    more = "--device cuda --epochs 1 --warmup-epochs 0 --log-interval 1 --mixup 0.8 --cutmix 1 --reprob 0.25"
    config = f"--config {ROOT / 'configs' / 'quickstart.yaml'} --data-dir {digits_dir} --output {tmp_path}"
    return f"{config} {model} {more} --spec-every 10".split()


@pytest.fixture
def alone() -> Generator[World]:
    with joined(World(joins_alone=True), torch.device("cuda", 0)) as world:
        assert "nccl" in torch.distributed.get_backend_config()
        yield world


def test_collectives_of_one_rank_are_what_it_gives(alone):
    on_device, on_host = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    for values in (on_device, on_host):
        alone.sum(values)
        assert values.tolist() == [0, 1, 2]
        assert alone.least(values).tolist() == [0, 1, 2]
    assert alone.greatest(2.5, -1) == [2.5, -1]
    assert alone.from_first({"a": 1}) == {"a": 1}
    assert alone.gather("x") == ["x"]
    alone.wait_for_all()
    channel = alone.channel(alone.start_limit, agrees=True)
    assert channel.agree(7)() == 7
    assert channel.gather([1]) == [[1]]


@pytest.mark.parametrize("compile", ["--no-compile", "--compile", "--compile --compile-mode reduce-overhead"])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_one_rank_that_joins_alone_trains_as_one_that_does_not(argv, alone, compile, accum_steps):
    """Gradients kept for CUDA graphs are views of the buckets, too."""
    batch = f"--batch-size {128 // accum_steps} --grad-accum-steps {accum_steps} --clip-grad 1 --no-amp --no-tf32"
    made = [*argv, *batch.split(), *compile.split()]
    with_others = losses(Trainer(parse(made), "a", alone).run().run_dir)
    without = losses(Trainer(parse([*argv, *batch.split(), "--no-compile"]), "b").run().run_dir)
    assert list(with_others) == list(without)
    np.testing.assert_allclose(list(with_others.values()), list(without.values()), rtol=5e-3)


@pytest.mark.parametrize("keeps_grads", [False, True])
@pytest.mark.parametrize("argv", WAYS)
def test_weights_of_one_that_joins_alone_are_those_of_one_that_does_not(alone, argv, keeps_grads):
    """As on a CPU, but for roundings: kernels may add up in another order each time."""
    expected, _ = train(argv, World(), device=CUDA)
    found, _ = train(argv, alone, device=CUDA, keeps_grads=keeps_grads)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_over_nccl_ranks_talk_once_for_a_bucket_and_in_the_last_batch_of_an_update(alone):
    check_collectives(alone, CUDA)


def test_gradients_are_views_of_the_buckets_that_travel_over_nccl(alone):
    check_views(alone, CUDA)


@pytest.mark.parametrize(
    "way",
    [
        "--no-compile --no-spec-monitor",
        "--compile --no-spec-monitor",
        "--compile --spec-monitor --spec-every 1000",
        "--compile --compile-mode reduce-overhead --spec-monitor --spec-every 1000",
    ],
)
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_warm_step_that_averages_never_waits(argv, alone, way, accum_steps):
    """On the loop's own stream, where spectra come behind it, too."""
    batch = f"--batch-size 32 --grad-accum-steps {accum_steps} --epochs 2"
    trainer = Trainer(parse([*argv, *way.split(), *batch.split()]), "warm", alone)
    assert (trainer.stream is not None) == ("--spec-monitor" in way)
    with closing(trainer.run_dir), closing(trainer.setup.train_loader), in_turn(trainer.stream):
        trainer.setup.model.train()
        batches = trainer.setup.train_loader.batches(0)
        for batch in islice(batches, 12):
            trainer.setup.step(batch)
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            for batch in islice(batches, 12):
                trainer.setup.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.two_gpus
@pytest.mark.parametrize(
    "more",
    [
        "-b 64",
        "-b 32 --grad-accum-steps 2 --compile",
        "-b 32 --grad-accum-steps 2 --compile --compile-mode reduce-overhead",
        "-b 64 --compile --clip-grad 1",
    ],
)
def test_two_gpus_train_as_one(argv, tmp_path, more):
    exact = [*argv, "--no-amp", "--no-tf32"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "lowrank_vit.train", *exact, *more.split(), "--experiment", "two"]
    subprocess.run(command, check=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)})
    clip = ["--clip-grad", "1"] if "clip" in more else []
    one = Trainer(parse([*exact, "-b", "128", "--no-compile", *clip]), "one").run().run_dir
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("eval_loss",))):
        for name in names:
            values = [[record[name] for record in records(run, kind)] for run in (tmp_path / "two", one)]
            np.testing.assert_allclose(*values, rtol=5e-3)
