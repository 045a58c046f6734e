"""Small sets of real photographs, as JPEG, raw and mixed `.beton` files, that the loaders' tests share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.convert import convert_image_folder
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.config.data_options import LoaderName

BACKENDS = [name for name in get_args(LoaderName) if name != "auto"]
"""Every decode backend: the tests that take these hold for a new one, too."""
NUM_PHOTOS = 24


def write_folder(root: Path) -> Path:
    """`root`/temple and flower with 12 JPEGs each, crops of photographs, sizes all different."""
    for label, name in enumerate(("temple", "flower")):
        (root / name).mkdir(parents=True)
        photo = load_sample_images().images[label]
        for n in range(NUM_PHOTOS // 2):
            crop = photo[n * 5 : n * 5 + 150 + 3 * n, n * 7 : n * 7 + 200 - 4 * n]
            Image.fromarray(crop).save(root / name / f"{n:02d}.jpg", quality=95)
    return root


def write_sets(root: Path) -> dict[str, Path]:
    """The same photographs as `jpeg`, as `raw` (56 pixels) and as both in one set, `mixed`."""
    src = write_folder(root / "src")
    paths = {kind: root / f"{kind}.beton" for kind in ("jpeg", "raw")}
    convert_image_folder(src, paths["jpeg"], workers=1)
    convert_image_folder(src, paths["raw"], workers=1, image=ImageOptions(raw=56))
    for n, kind in enumerate(("jpeg", "raw")):
        shutil.copy(paths[kind], root / f"mixed-{n + 1}-of-2.beton")  # parts without sidecars: any two sets
    return {**paths, "mixed": root / "mixed.beton"}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels; 99 where both are the same."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))
