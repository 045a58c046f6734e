"""A small run as its directory tells of it, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import leaves
from lowrank_vit.model.create import create_model

NAME, PAIRS = "vit_tiny_patch16_224", ("patch_size=4", "embed_dim=32", "depth=2", "num_heads=2")
LINE = f"--data-dir /home/ann/digits --model {NAME} --model-kwargs {' '.join(PAIRS)} --img-size 16 --epochs 2"


def content_of(seed: int = 1, **more: Any) -> dict[str, Any]:
    """A checkpoint's content; the weights of the EMA are others, and scored higher."""
    torch.manual_seed(seed)
    own, ema = (create_model(NAME, 3, img_size=16, model_kwargs=PAIRS).state_dict() for _ in range(2))
    config = parse([*LINE.split(), "--warmup-epochs", "0", "--lr", "1e-3", "--experiment", "secret"])
    args = {name: str(v) if isinstance(v, Path) else v for name, _, v in leaves(config)}
    args = {name: list(v) if isinstance(v, tuple) else v for name, v in args.items()}
    told = {"arch": NAME, "epoch": 1, "args": args, "class_names": ["cat", "dog", "<b>owl</b>"], "num_classes": 3}
    weights = {"state_dict": own, "state_dict_ema": ema, "better": "ema"}
    return {**told, **weights, "step": {"num_updates": 22}, "val_samples": 360, **more}


def write_run(run: Path, content: dict[str, Any]) -> Path:
    """The directory of a run that has ended after two epochs."""
    run.mkdir()
    torch.save(content, run / "model_best.pth.tar")
    torch.save(content, run / "last.pth.tar")
    (run / "args.yaml").write_text(yaml.safe_dump(content["args"]))
    rows = "0,11,2,30,90,40,91\n1,22,1,50,95,60,96"
    (run / "summary.csv").write_text(
        f"epoch,update,train_loss,eval_top1,eval_top5,eval_ema_top1,eval_ema_top5\n{rows}\n"
    )
    told = {"lowrank_vit": "0.1.0", "torch": "2.0", "gpu": "NVIDIA <H100>", "command": "train.py --data /home/ann/x"}
    (run / "environment.json").write_text(json.dumps(told))
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", content_of())
