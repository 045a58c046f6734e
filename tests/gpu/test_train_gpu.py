"""What only a GPU can show: no host wait and no recompilation in a warm step, and the CPU's own images and losses."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_vit.common.devices import in_turn
from lowrank_vit.config.flags import parse
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from lowrank_vit.run.checkpoints import CheckpointWriter
from lowrank_vit.training.trainer import Trainer
from tests.runs import stop_after
from tests.unit.augment.test_compiled import check_that_patches_are_written_once
from tests.unit.model.test_patches import check_low_precision

pytestmark = pytest.mark.gpu
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@pytest.fixture
def argv(digits_dir, tmp_path):
    more = "--device cuda --epochs 2 --warmup-epochs 1 --batch-size 64 --mixup 0.8 --cutmix 1.0 "
    more += "--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --no-spec-monitor"
    return [*f"--config {CONFIG} --data-dir {digits_dir} --output {tmp_path}".split(), *more.split()]


def losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("loader", ["resident", "ffcv", "dali"])
@pytest.mark.parametrize(
    "way",
    [
        "--no-compile --amp",
        "--no-compile --amp --amp-dtype float16",
        "--compile --amp --clip-grad 1",
        "--compile --amp --amp-dtype float16 --clip-grad 1",
        "--compile --amp --compile-mode reduce-overhead",
        "--compile --amp --compile-mode max-autotune",
        "--compile --amp --spec-monitor --spec-every 1000",
        "--compile --amp --reg-nuclear 0.01 --reg-stable-rank 1e-3 --spectral-clip 1 --reg-every 4",
        "--no-compile --amp --amp-dtype float16 --reg-nuclear 0.01 --reg-coupled --reg-every 4",
    ],
)
def test_a_warm_step_never_waits_and_never_recompiles(argv, loader, way):
    """But for the event of a step long done, which `Pace` waits for and torch does not count.

    What is compiled is one graph: no part of the step is left to the host in between.
    """
    breaks = torch._dynamo.utils.counters["graph_break"].total()
    trainer = Trainer(parse([*argv, "--batch-size", "32", "--loader", loader, *way.split()]), "warm")
    with closing(trainer.run_dir), closing(trainer.setup.train_loader), in_turn(trainer.stream):
        trainer.setup.model.train()
        batches = trainer.setup.train_loader.batches(0)
        for n, batch in enumerate(islice(batches, 20)):
            trainer.setup.step(batch, measure_norm=n % 2 == 0)
        torch.cuda.synchronize()
        compilations = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        try:
            torch.cuda.set_sync_debug_mode("error")
            for n, batch in enumerate(islice(batches, 20)):
                trainer.setup.step(batch, measure_norm=n % 2 == 0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compilations
    found = torch._dynamo.utils.counters["graph_break"]
    assert found.total() == breaks, found


@pytest.mark.parametrize("loader", ["resident", "ffcv"])
def test_images_are_the_cpus(digits_dir, loader):
    beton = Beton(digits_dir / "train.beton")
    plan = TrainPlan(beton.heights, beton.widths, TrainRules(), seed=5, img_size=32, batch_size=64)
    on_gpu, _ = open_loader(beton, plan, torch.device("cuda"), LoaderOptions(loader, 2))
    on_cpu, _ = open_loader(beton, plan, torch.device("cpu"), LoaderOptions(loader, 2))
    for a, b in islice(zip(on_gpu.batches(1), on_cpu.batches(1), strict=True), 5):
        assert a.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(a.targets.cpu(), b.targets)
        assert (a.images.cpu().int() - b.images.int()).abs().max() <= 1  # float32 sums in another order


def test_the_patch_embedding_as_a_product_has_the_convolutions_loss_and_gradients():
    """Compiled in bf16, as it trains: it is no further from the exact numbers."""
    check_low_precision(torch.device("cuda"))


def test_the_input_of_the_patch_embedding_is_written_once():
    check_that_patches_are_written_once(torch.device("cuda"))


def test_losses_are_the_cpus(argv):
    exact = [*argv, "--no-amp", "--no-compile", "--log-interval", "1", "--epochs", "1", "--warmup-epochs", "0"]
    gpu = losses(Trainer(parse(exact), "gpu").run().run_dir)
    cpu = losses(Trainer(parse([*exact, "--device", "cpu"]), "cpu").run().run_dir)
    np.testing.assert_allclose(gpu, cpu, rtol=5e-3)


def test_quickstart_learns_in_bf16_compiled_with_the_monitor(argv):
    result = Trainer(
        parse(
            [*argv, "--epochs", "8", "--mixup", "0", "--cutmix", "0", "--aa", "none", "--reprob", "0", "--spec-monitor"]
        ),
        "q",
    ).run()
    assert result.best is not None
    assert result.best > 50
    assert list((result.run_dir / "spectra").glob("*.npz"))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("accum_steps", [1, 2])
def test_compile_modes_and_accumulation_train_as_eager(argv, mode, accum_steps):
    """Gradients of several runs of a CUDA graph must add up although its outputs are overwritten."""
    batch = ["--batch-size", str(64 // accum_steps), "--grad-accum-steps", str(accum_steps)]
    common = [*argv, *batch, "--no-amp", "--no-tf32", "--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1"]
    compiled = losses(Trainer(parse([*common, "--compile", "--compile-mode", mode]), "c").run().run_dir)
    eager = losses(Trainer(parse([*common, "--no-compile"]), "e").run().run_dir)
    np.testing.assert_allclose(compiled, eager, rtol=5e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_as_float32(argv, dtype):
    common = [*argv, "--epochs", "1", "--warmup-epochs", "0", "--log-interval", "1", "--no-compile"]
    mixed = losses(Trainer(parse([*common, "--amp", "--amp-dtype", dtype]), "m").run().run_dir)
    exact = losses(Trainer(parse([*common, "--no-amp", "--no-tf32"]), "x").run().run_dir)
    np.testing.assert_allclose(mixed, exact, rtol=0.02)


def test_a_checkpoint_is_the_state_when_it_was_saved(tmp_path):
    """The copy is taken on the step's stream, and fetched while the weights already change."""
    weights = torch.zeros(50_000_000, device="cuda")
    writer = CheckpointWriter(tmp_path, weights.device, print)
    for value in range(3):
        weights.fill_(value)
        writer.save({"state_dict": {"w": weights}}, (f"{value}.pth.tar",))
        weights.fill_(-1)
    writer.close()
    for value in range(3):
        saved = torch.load(tmp_path / f"{value}.pth.tar", weights_only=True)["state_dict"]["w"]
        assert saved.device.type == "cpu"
        assert bool((saved == value).all())


def test_a_copy_does_not_stay_on_the_device_while_the_disk_is_at_work(tmp_path, monkeypatch):
    taken = []
    weights = torch.zeros(50_000_000, device="cuda")
    before = torch.cuda.memory_allocated()
    monkeypatch.setattr(
        "lowrank_vit.run.checkpoints.write_checkpoint",
        lambda *_: taken.append(torch.cuda.memory_allocated() - before),
    )
    writer = CheckpointWriter(tmp_path, weights.device, print)
    writer.save({"state_dict": {"w": weights}})
    writer.close()
    assert taken == [0]


@pytest.mark.filterwarnings("ignore:.*deterministic:UserWarning")  # torch's, of each operation that is not
def test_resumed_is_uninterrupted(argv):
    """In float32 without compilation; nothing of torch's generators is saved."""
    exact = [*argv, "--no-amp", "--no-compile", "--drop-path", "0.1", "--log-interval", "4"]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        whole = Trainer(parse([*exact, "--experiment", "whole"]), "x").run().run_dir
        part = Trainer(parse([*exact, "--experiment", "part"]), "x")
        stop_after(part, 7)
        run = part.run().run_dir
        Trainer(parse([*exact, "--resume", str(run / "last.pth.tar")]), "x").run()
    finally:
        torch.use_deterministic_algorithms(False)
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-5)  # atomics of some kernels differ in the last bits
