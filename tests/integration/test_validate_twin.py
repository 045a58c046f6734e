"""Validation against its slow twin: plain timm, torchvision's transform and Pillow, on photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data.transforms_factory import create_transform

from lowrank_vit.score.options import ValidateOptions
from lowrank_vit.score.validation import validate
from tests.photos import BACKENDS, write_folder

SIZE, CROP_PCT = 64, 0.875
MODEL = "vit_tiny_patch16_224"
KWARGS: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A bare state dict of a model whose logits follow from single grey levels."""
    torch.manual_seed(3)
    model: Any = timm.create_model(MODEL, num_classes=2, img_size=SIZE, **KWARGS)
    with torch.no_grad():
        model.head.weight *= 50
    path = tmp_path_factory.mktemp("twin") / "weights.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "val")


def plain_loss(folder: Path, checkpoint: Path, **more: Any) -> float:
    """As timm's validate.py computes it."""
    model: Any = timm.create_model(MODEL, num_classes=2, img_size=SIZE, **KWARGS).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    own = model.pretrained_cfg
    look = {"mean": own["mean"], "std": own["std"], "crop_pct": CROP_PCT, "interpolation": "bicubic", **more}
    transform: Any = create_transform((3, SIZE, SIZE), **look)
    losses = []
    for label, name in enumerate(sorted(path.name for path in folder.iterdir() if path.is_dir())):
        for path in sorted((folder / name).iterdir()):
            image = transform(Image.open(path).convert("RGB"))
            with torch.no_grad():
                logits = model(image[None])
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor([label]))))
    return float(np.mean(losses))


def our_loss(folder: Path, checkpoint: Path, loader: str = "resident", **more: Any) -> float:
    kwargs = tuple(f"{name}={value}" for name, value in KWARGS.items())
    look = {"model": MODEL, "model_kwargs": kwargs, "img_size": SIZE, "crop_pct": CROP_PCT}
    decoding = {"loader": loader, "device": "cpu", "batch_size": 7, "workers": 2}
    return validate(ValidateOptions(checkpoint, data=folder, **look, **decoding, **more)).loss  # type: ignore[arg-type]


@pytest.mark.parametrize("loader", BACKENDS)
def test_the_loss_is_plain_timms_whatever_decodes(photos, checkpoint, loader):
    assert our_loss(photos, checkpoint, loader) == pytest.approx(plain_loss(photos, checkpoint), abs=1e-3)


@pytest.mark.parametrize("loader", BACKENDS)
def test_larger_images_and_other_formats_are_scored_as_they_are(checkpoint, tmp_path, loader):
    folder = tmp_path / "val"
    for label, name in enumerate(("a", "b")):
        (folder / name).mkdir(parents=True)
        photo = Image.fromarray(load_sample_images().images[label])
        for n in range(4):
            larger = photo.crop((40 * n, 0, 40 * n + 400, 300)).resize((700 + 60 * n, 600))
            larger.save(folder / name / f"{n}.jpg", quality=95)
            larger.crop((0, 0, 300 + n, 200)).save(folder / name / f"{n}.png")
        photo.convert("L").save(folder / name / "grey.jpg", quality=95)
    assert our_loss(folder, checkpoint, loader) == pytest.approx(plain_loss(folder, checkpoint), abs=1e-3)


def test_another_normalisation(photos, checkpoint):
    more: dict[str, Any] = {"mean": (0.4, 0.45, 0.5), "std": (0.2, 0.25, 0.3)}
    expected = plain_loss(photos, checkpoint, **more)
    assert abs(expected - plain_loss(photos, checkpoint)) > 0.01
    assert our_loss(photos, checkpoint, **more) == pytest.approx(expected, abs=1e-3)
