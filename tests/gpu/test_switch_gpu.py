"""A switch to factors on a GPU: CUDA graphs and kept gradients go on, a warm step waits for nothing."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from lowrank_vit.common.devices import in_turn
from lowrank_vit.config.flags import parse
from lowrank_vit.lowrank.switching.factors import make_factors
from lowrank_vit.training.trainer import Trainer
from tests.unit.lowrank.switching.trained import switch

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
NAMES = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "mlp.fc1", "mlp.fc2")]


@pytest.mark.parametrize("moments", ["carry", "restart"])
@pytest.mark.parametrize(
    "way",
    [
        "--no-compile",
        "--compile --spec-monitor",
        "--compile --compile-mode reduce-overhead",
        "--compile --compile-mode reduce-overhead --grad-accum-steps 2",
        "--no-compile --amp-dtype float16",
    ],
)
def test_a_warm_step_of_factors_never_waits_and_was_compiled_once(digits_dir, tmp_path, way, moments):
    model = "--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg"
    config = f"--config {ROOT / 'configs' / 'quickstart.yaml'} --data-dir {digits_dir} --output {tmp_path}"
    more = "--device cuda --epochs 4 --warmup-epochs 0 --sched-on-updates"
    trainer = Trainer(parse(f"{config} {model} {more} --no-spec-monitor {way}".split()), "switched")
    setup = trainer.setup
    assert setup.ema is not None
    with closing(trainer.run_dir), closing(setup.train_loader), in_turn(trainer.stream):
        setup.model.train()
        batches = setup.train_loader.batches(0)
        for batch in islice(batches, 8):
            setup.step(batch)
        factors = make_factors(setup.model, dict.fromkeys(NAMES, 6))
        switch(
            setup.model,
            setup.ema.module,
            setup.optimizer,
            setup.scheduler,
            factors,
            moments=moments,
            decay="product",
            num_updates=setup.step.position.num_updates,
        )
        setup.step.rebuild()
        for batch in islice(batches, 12):
            setup.step(batch)
        torch.cuda.synchronize()
        compiled = counters["stats"]["unique_graphs"]
        try:
            if "float16" not in way:  # whose scaler reads whether to skip, on every way but a fused one
                torch.cuda.set_sync_debug_mode("error")
            for batch in islice(batches, 10):
                setup.step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert counters["stats"]["unique_graphs"] == compiled
        assert all(bool(one.isfinite().all()) for one in setup.model.parameters())
