"""A run that begins with a model in timm's hub layout: it goes on, and is scored, when the folder is gone."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

from lowrank_vit import analyze_spectrum, export, validate
from lowrank_vit.config.flags import parse
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.run.directory import LAST
from lowrank_vit.training.trainer import Trainer
from tests.runs import stop_after

ARGS: dict[str, Any] = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
LOOK = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "crop_pct": 0.95}


@pytest.fixture
def folder(tmp_path):
    """A model for the digits, whose classes are named in another order."""
    made: Any = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=10, **ARGS)
    torch.nn.init.normal_(made.head.bias)
    names = {"label_names": [str(number) for number in reversed(range(10))]}
    save_for_hf(made, str(tmp_path / "model"), names, safe_serialization=True, data_config=LOOK)
    return tmp_path / "model"


def test_a_run_needs_its_first_folder_no_more(folder, digits_dir, tmp_path, capsys):
    line = f"--model local-dir:{folder} --pretrained --data-dir {digits_dir} --output {tmp_path} --experiment run"
    line += " --epochs 2 --warmup-epochs 1 -b 128 --no-compile --no-amp --device cpu"
    trainer = Trainer(parse(line.split()), "model")
    first: Any = timm.create_model(f"local-dir:{folder}", pretrained=True)
    begun = trainer.setup.model.state_dict()
    assert torch.equal(begun["blocks.1.attn.qkv.weight"], first.blocks[1].attn.qkv.weight)
    assert torch.equal(begun["head.bias"], first.head.bias.flip(0))  # by the names of the classes
    stop_after(trainer, 4)
    trainer.run()
    run = tmp_path / "run"
    saved = read_checkpoint(run / LAST)
    assert (saved.arch, saved.args["model-from"]) == ("vit_tiny_patch16_224", f"local-dir:{folder}")
    assert saved.content["input"] == {"img_size": 16, **{k: list(v) if k != "crop_pct" else v for k, v in LOOK.items()}}

    folder.rename(tmp_path / "moved")
    result = Trainer(parse([*line.split(), "--resume", str(run / LAST)]), "model").run()
    assert (result.num_updates, result.run_dir) == (22, run)
    scores = []
    for more in ((), ("--model", f"local-dir:{folder}")):
        path = tmp_path / f"{len(more)}.json"
        validate.main(["--checkpoint", str(run / LAST), "--device", "cpu", "--json", str(path), *more])
        scores.append(json.loads(path.read_text()))
    assert scores[0] == scores[1]
    capsys.readouterr()
    analyze_spectrum.main(["--checkpoint", str(run / LAST), "--model", f"local-dir:{folder}", "--circuits", "raw"])
    analyze_spectrum.main(["--model", f"local-dir:{tmp_path / 'moved'}", "--pretrained", "--circuits", "raw"])
    assert capsys.readouterr().out.count("raw weights\n") == 2


def test_an_exported_run_scores_as_the_run(train, digits_dir, tmp_path):
    run = train("--experiment", "run", "--epochs", "1", "--warmup-epochs", "0").run_dir
    out = tmp_path / "out"
    export.main([str(run), "--local-dir", str(out), "--weights", "ema"])
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "spectra.png"}
    scores: list[dict[str, Any]] = []
    for more in (["--checkpoint", str(run / "model_best.pth.tar"), "--use-ema"], ["--model", f"local-dir:{out}"]):
        path = tmp_path / f"{len(more)}.json"
        validate.main(["--data", str(digits_dir), "--device", "cpu", "--json", str(path), *more])
        scores.append(json.loads(path.read_text()))
    same = ("num_samples", "top1", "top1_interval", "top5", "loss", "img_size", "crop_pct", "interpolation")
    assert [scores[0][name] for name in same] == [scores[1][name] for name in same]
    card = (out / "README.md").read_text()
    low, high = scores[0]["top1_interval"]
    assert f"| top-1 | {scores[0]['top1']:.2f} | {low:.2f} to {high:.2f} |" in card
    assert str(tmp_path) not in card
