"""--initial-checkpoint reads what timm's own loading reads, and says whose weights it took."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import UserError
from lowrank_vit.engine.initial import load_initial

NAME = "vit_tiny_patch16_224"


def made(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(NAME, num_classes=7, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)


OWN, EMA = made(1).state_dict(), made(2).state_dict()


@pytest.mark.parametrize(
    ("content", "is_ema"),
    [
        ({"arch": NAME, "state_dict": OWN, "state_dict_ema": EMA, "epoch": 3}, True),
        ({"state_dict": OWN, "state_dict_ema": None}, False),
        ({"state_dict": OWN}, False),
        ({"model": OWN}, False),
        ({"model": OWN, "model_ema": EMA}, True),
        (OWN, False),
        ({"state_dict": {f"module.{key}": value for key, value in OWN.items()}}, False),
        ({"model": {f"_orig_mod.{key}": value for key, value in OWN.items()}}, False),
        ({"state_dict": {f"module._orig_mod.{key}": value for key, value in OWN.items()}}, False),
    ],
)
def test_the_weights_are_those_that_timm_takes(content, is_ema, tmp_path):
    path, said, model = tmp_path / "x.pth.tar", list[str](), made(3)
    torch.save(content, path)
    load_initial(model, path, NAME, said.append)
    twin = timm.create_model(
        NAME, num_classes=7, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, checkpoint_path=str(path)
    )
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.state_dict()["head.weight"], (EMA if is_ema else OWN)["head.weight"])
    assert said == [f"initial weights: {'the EMA of' if is_ema else 'those of'} {path}"]


def test_safetensors(tmp_path):
    model, path = made(3), tmp_path / "x.safetensors"
    save_file(OWN, path)
    load_initial(model, path, NAME, list[str]().append)
    assert torch.equal(model.state_dict()["head.weight"], OWN["head.weight"])


def test_what_cannot_be_taken_is_named(tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_initial(made(3), path, NAME, list[str]().append)
        return str(caught.value)

    path = tmp_path / "x.pth"
    assert "does not exist" in refused(path)
    path.write_text("no checkpoint")
    assert "--initial-checkpoint" in refused(path)
    assert "cannot be read" in refused(path)
    torch.save({"epoch": 3}, path)
    assert "holds no `state_dict`" in refused(path)
    torch.save({"model": {**OWN, "more": torch.zeros(1)}}, path)
    assert "1 are unknown here (more)" in refused(path)
