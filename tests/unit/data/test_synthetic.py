"""The loader without data, and the run on it."""

from __future__ import annotations

import torch

from lowrank_vit.config.flags import parse
from lowrank_vit.data.synthetic import UPDATES_PER_EPOCH, SyntheticLoader, synthetic_plan
from lowrank_vit.training.trainer import Trainer
from tests.runs import losses, records, stop_after

CPU = torch.device("cpu")
MODEL = "--img-size 16 --model-kwargs patch_size=8 embed_dim=24 depth=1 num_heads=2".split()
RECIPE = "--synthetic --num-classes 7 -b 4 --epochs 2 --warmup-epochs 1 --opt adamw --lr 1e-3 --device cpu".split()


def test_every_batch_is_the_same_memory():
    plan = synthetic_plan(img_size=16, batch_size=6, accum_steps=2)
    loader = SyntheticLoader(plan, 4, CPU)
    batches = list(loader.batches(0))
    assert len(batches) == plan.steps_per_epoch == 2 * UPDATES_PER_EPOCH
    assert len({batch.images.data_ptr() for batch in batches}) == 1
    first = batches[0]
    assert first.images.shape == (6, 3, 16, 16)
    assert first.images.dtype == torch.uint8
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    assert first.targets.tolist() == [0, 1, 2, 3, 0, 1]
    assert (first.images.float().std() > 60) & (0 < first.images.float().mean() < 255)
    assert not any(torch.equal(first.images[0], other) for other in first.images[1:])


def test_a_run_without_data_measures_and_resumes(tmp_path):
    argv = [*RECIPE, *MODEL, "--model", "vit_tiny_patch16_224", "--output", str(tmp_path), "--log-interval", "30"]
    whole = Trainer(parse([*argv, "--experiment", "whole"]), "x").run()
    assert whole.best is None
    lines = records(whole.run_dir, "train")
    assert [line["update"] for line in lines] == [30, 60, 90, 100, 130, 160, 190, 200]
    assert all(line["img_per_s"] > 0 and 0 < line["mfu"] < 1 and line["memory_gb"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]  # the same batch again and again
    assert not (whole.run_dir / "model_best.pth.tar").exists()
    part = Trainer(parse([*argv, "--experiment", "part"]), "x")
    stop_after(part, 133)
    part.run()
    last = tmp_path / "part" / "last.pth.tar"
    assert losses(Trainer(parse([*argv, "--resume", str(last)]), "x").run().run_dir) == losses(whole.run_dir)
