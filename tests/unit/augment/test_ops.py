"""Every image operation, at every sign and over a grid of magnitudes, against PIL as timm calls it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timms

from lowrank_vit.augment import ops, ops_cpu
from lowrank_vit.common.filters import BICUBIC, BILINEAR, NEAREST
from lowrank_vit.plan.operations import GEOMETRIC, ImageOps, Kind

FILL = (124, 116, 104)
PIL_FILTERS = {
    NEAREST: Image.Resampling.NEAREST,
    BILINEAR: Image.Resampling.BILINEAR,
    BICUBIC: Image.Resampling.BICUBIC,
}
TIMMS = {
    Kind.AUTOCONTRAST: timms.auto_contrast,
    Kind.EQUALIZE: timms.equalize,
    Kind.INVERT: timms.invert,
    Kind.POSTERIZE: timms.posterize,
    Kind.SOLARIZE: timms.solarize,
    Kind.SOLARIZE_ADD: timms.solarize_add,
    Kind.BRIGHTNESS: timms.brightness,
    Kind.CONTRAST: timms.contrast,
    Kind.COLOR: timms.color,
    Kind.SHARPNESS: timms.sharpness,
    Kind.ROTATE: timms.rotate,
    Kind.SHEAR_X: timms.shear_x,
    Kind.SHEAR_Y: timms.shear_y,
    Kind.TRANSLATE_X: timms.translate_x_abs,
    Kind.TRANSLATE_Y: timms.translate_y_abs,
    Kind.BLUR: timms.gaussian_blur,
}
FACTORS = (0.0, 0.1, 0.37, 0.82, 1.0, 1.18, 1.63, 1.9)
ARGUMENTS = {
    Kind.POSTERIZE: (0, 1, 2, 3, 4, 5, 7, 8),
    Kind.SOLARIZE: (0, 1, 26, 128, 230, 255, 256),
    Kind.SOLARIZE_ADD: (0, 1, 49, 99, 110, 128),
    Kind.BRIGHTNESS: FACTORS,
    Kind.CONTRAST: FACTORS,
    Kind.COLOR: FACTORS,
    Kind.SHARPNESS: FACTORS,
    Kind.ROTATE: (-30, -27.3, -9, -0.5, 0, 0.1, 4.4, 15, 29.99, 30),
    Kind.SHEAR_X: (-0.3, -0.27, -0.1, -0.001, 0, 0.05, 0.27, 0.3),
    Kind.SHEAR_Y: (-0.3, -0.27, -0.1, -0.001, 0, 0.05, 0.27, 0.3),
    Kind.TRANSLATE_X: (-100.8, -24.5, -1, -0.3, 0, 0.5, 7.25, 90.72),
    Kind.TRANSLATE_Y: (-100.8, -24.5, -1, -0.3, 0, 0.5, 7.25, 90.72),
    Kind.BLUR: (0.1, 0.3, 0.75, 1.0, 1.31, 2.0),
}
# Bilinear and bicubic sums, cut off to 8 bits: ours in float32, PIL's in float64. Where sums are whole numbers (a shift
# by 0.3: every tenth pixel) they may fall on either side, by one level; the worst case is a mean error of 0.05.
LARGEST_ERROR, LARGEST_MEAN_ERROR = 1, 0.05


def on_cpu(images: np.ndarray, planned: ImageOps) -> np.ndarray:
    changed = images.copy()
    ops_cpu.apply_ops(changed, planned.kinds, planned.args, planned.interpolations, np.array(FILL, np.uint8))
    return changed


def as_tensors(images: np.ndarray, planned: ImageOps) -> np.ndarray:
    changed = torch.from_numpy(images.copy())
    ops.apply_ops(changed, planned, torch.tensor(FILL, dtype=torch.uint8))
    return changed.numpy()


def in_pil(image: np.ndarray, kind: Kind, arg: float, interpolation: int) -> np.ndarray:
    """What timm makes of one image; its posterize with 0 bits is refused by Pillow 13, and means black."""
    if kind == Kind.POSTERIZE and arg == 0:
        return np.zeros_like(image)
    args = () if kind not in ARGUMENTS else (int(arg),) if kind in (Kind.POSTERIZE, Kind.SOLARIZE_ADD) else (arg,)
    more = {"resample": PIL_FILTERS[interpolation], "fillcolor": FILL} if kind in GEOMETRIC else {}
    return np.asarray(TIMMS[kind](Image.fromarray(image), *args, **more))


def plan_of(rows: list[tuple[Kind, float, int]]) -> ImageOps:
    kinds, args, interpolations = zip(*rows, strict=True)
    return ImageOps(
        np.array(kinds, np.int8)[:, None],
        np.array(args, np.float64)[:, None],
        np.array(interpolations, np.int8)[:, None],
    )


def grid(kind: Kind) -> list[tuple[Kind, float, int]]:
    interpolations = PIL_FILTERS if kind in GEOMETRIC else (BILINEAR,)
    return [(kind, arg, interpolation) for arg in ARGUMENTS.get(kind, (0.0,)) for interpolation in interpolations]


def pictures() -> dict[str, np.ndarray]:
    temple, flower = load_sample_images().images
    random = np.random.default_rng(0).integers(0, 256, (4, 64, 48, 3), dtype=np.uint8)
    two_levels = np.where(random[0, :40, :40] > 100, 255, 254).astype(np.uint8)
    return {
        "temple": temple[100:324, 200:424],
        "flower, wide": flower[50:147, 60:220],
        "astronaut, tall": skimage_data.astronaut()[:151, 180:240],
        "cat, 32 px": skimage_data.chelsea()[100:132, 140:172],
        "random": random[0],
        "black": np.zeros((32, 32, 3), np.uint8),
        "white": np.full((17, 32, 3), 255, np.uint8),
        "constant": np.full((33, 31, 3), (7, 128, 250), np.uint8),
        "two levels": two_levels,
        "one pixel": random[1, :1, :1],
        "one row": random[2, :1],
        "one column": random[3, :, :1],
    }


PICTURES = pictures()
VERSIONS = {"numba": on_cpu, "torch": as_tensors}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("kind", [kind for kind in Kind if kind], ids=lambda kind: kind.name.lower())
def test_as_pil(kind, picture, version):
    image = np.ascontiguousarray(PICTURES[picture])
    rows = grid(kind)
    ours = VERSIONS[version](np.repeat(image[None], len(rows), axis=0), plan_of(rows))
    for (_, arg, interpolation), mine in zip(rows, ours, strict=True):
        error = np.abs(mine.astype(int) - in_pil(image, kind, arg, interpolation))
        if (kind in GEOMETRIC and interpolation != NEAREST) or kind == Kind.BLUR:
            assert error.max() <= LARGEST_ERROR, (arg, interpolation)
            assert error.sum() <= max(10, LARGEST_MEAN_ERROR * error.size), (arg, interpolation)
        else:
            assert error.max() == 0, (arg, interpolation)


@settings(max_examples=60)
@given(st.data())
def test_batches_of_many_operations_are_each_images_own(data):
    """Odd sizes, any mixture, several layers: the same as one image and one operation at a time; and both versions."""
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    count, layers = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    choices = [(Kind.NONE, 0.0, BILINEAR), *(row for kind in Kind if kind for row in grid(kind))]
    rows = [choices[i] for i in random.integers(0, len(choices), count * layers)]
    flat = plan_of(rows)
    planned = ImageOps(*(x.reshape(count, layers) for x in (flat.kinds, flat.args, flat.interpolations)))
    for apply in VERSIONS.values():
        together = apply(images, planned)
        for n in range(count):
            alone = images[n : n + 1]
            for layer in range(layers):
                alone = apply(alone, plan_of([rows[n * layers + layer]]))
            assert np.array_equal(together[n], alone[0])


def test_images_without_operations_keep_every_bit():
    images = np.random.default_rng(1).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    nothing = plan_of([(Kind.NONE, 0.0, BILINEAR)] * 3)
    for apply in VERSIONS.values():
        assert np.array_equal(apply(images, nothing), images)
