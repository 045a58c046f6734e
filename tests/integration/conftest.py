"""A small, quick training command that the integration tests vary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lowrank_vit.config.flags import parse
from lowrank_vit.training.trainer import Result, Trainer

ROOT = Path(__file__).parents[2]
SMALL = [
    f"--config={ROOT / 'configs' / 'quickstart.yaml'}",
    *"--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg".split(),
    *"--epochs 2 --warmup-epochs 1 --batch-size 128 --device cpu --log-interval 5 --spec-every 10".split(),
]

RECIPE = """
--no-spec-monitor --epochs 3 --log-interval 4 --drop 0.1 --drop-path 0.1 --mixup 0.8 --cutmix 1 --reprob 0.25
--aa rand-m9-mstd0.5-inc1 --vflip 0.2 --model-ema-warmup
--reg-nuclear 0.02 --reg-stable-rank 1e-4 --spectral-clip 1.5 --reg-every 4
""".split()
UPDATES = 11
"""Of an epoch of the digits in batches of 128."""


@pytest.fixture
def small(digits_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The small command's arguments, with others after them; output goes to tmp_path."""

    def arguments(*more: str) -> list[str]:
        return [*SMALL, "--data-dir", str(digits_dir), "--output", str(tmp_path), *more]

    return arguments


@pytest.fixture
def train(small: Callable[..., list[str]]) -> Callable[..., Result]:
    """Train the small command with other arguments after it."""
    return lambda *more: Trainer(parse(small(*more)), "small").run()
