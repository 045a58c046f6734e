"""A picture of what the augmentation flags do to images: each operation at every level, and a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from data_prep.formats.beton import find_parts
from lowrank_vit.augment import ops_cpu
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.augment.recipe import train_rules
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import BICUBIC
from lowrank_vit.common.numba_code import NOTE, must_compile, use_threads
from lowrank_vit.common.packages import needs
from lowrank_vit.config.options import Config
from lowrank_vit.data.decode.pil import crop_and_resize, decode
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.operations import NAMES, Policy, argument_of, parse_policy
from lowrank_vit.plan.plans import BatchPlan, TrainPlan
from lowrank_vit.report.style import INK, MUTED, heading, new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TILE_IN, _SAMPLE_IN, _SAMPLES_A_ROW = 0.95, 1.55, 6


IMG_SIZE = 224
SHOWN = 24
DEFAULT_POLICY = "rand-m9-mstd0.5-inc1"

Images = tuple[list[np.ndarray], np.ndarray, list[str], str]
"""Images, uint8 (H, W, 3) each; labels; class names; and where the images come from."""


def preview_plot(
    grid: Mapping[str, np.ndarray],
    levels: Sequence[int],
    samples: np.ndarray,
    captions: Sequence[str],
    recipe: str,
    origin: str,
) -> bytes:
    """A PNG: a row of `grid` for each operation, uint8 (levels, H, W, 3), and below it `samples`, uint8 (B, S, S, 3).

    `captions` has a line for each sample; `recipe` names the flags, `origin` the source of the images.
    """
    rows = -(-len(samples) // _SAMPLES_A_ROW)
    heights = [_TILE_IN * len(grid) + 0.3, (_SAMPLE_IN + 0.32) * rows + 0.3]
    figure = new_figure(_SAMPLE_IN * _SAMPLES_A_ROW, sum(heights) + 0.7)
    heading(figure, "Augmentation", f"{recipe or 'no operations'}; {origin}")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
    panels = upper.subplots(len(grid), len(levels), squeeze=False)
    for row, (name, images) in zip(panels, grid.items(), strict=True):
        for axes, image, level in zip(row, images, levels, strict=True):
            _show(axes, image)
            if axes in panels[0]:
                axes.set_title(f"level {level}", fontsize=9, color=MUTED)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    panels = lower.subplots(rows, _SAMPLES_A_ROW, squeeze=False)
    for n, axes in enumerate(panels.flat):
        if n < len(samples):
            _show(axes, samples[n])
            axes.set_title(captions[n].replace(" + ", "\n+ "), fontsize=7.5, color=INK, parse_math=False)
        else:
            axes.set_axis_off()
    return png(figure, dpi=100)


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest" if len(image) < 96 else "antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def preview(config: Config) -> bytes:
    """The picture of a training configuration, a PNG. Raises `UserError` for a wrong policy or damaged data."""
    if must_compile(ops_cpu.apply_ops):
        print(NOTE, flush=True)
    size, smoothing = config.data.img_size or IMG_SIZE, config.augment.smoothing
    rules = train_rules(config)
    (heights, widths), read = _open_images(config.data.data_dir or Path("data"))
    count = min(SHOWN, config.data.batch_size, len(heights))
    plan = TrainPlan(heights, widths, rules, seed=config.run.seed, img_size=size, batch_size=count)
    batch = plan.batch(0, 0, plan.ids(0)[0])
    images, labels, classes, origin = read(batch.ids)
    crops = np.stack([crop_and_resize(image, batch, n, size) for n, image in enumerate(images)])
    remode, erase_first = config.augment.remode, config.augment.erase_first
    colours = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    augment = Augment(*colours, len(classes), smoothing, remode, erase_first=erase_first)
    shown, soft = as_the_model_sees_them(crops, labels, batch, augment)
    policy = rules.policy or _must_parse(DEFAULT_POLICY)
    grid = by_level(_whole(images[0], size), replace(policy, level_std=0.0), augment.fill.numpy())
    captions = [caption(row, smoothing, classes) for row in soft]
    return preview_plot(grid, LEVELS, shown, captions, _describe(config), origin)


def _must_parse(text: str) -> Policy:
    policy = parse_policy(text)
    assert policy is not None
    return policy


def _whole(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The centre of an image, uint8 (size, size, 3)."""
    from PIL import Image, ImageOps

    return np.asarray(ImageOps.fit(Image.fromarray(image_HWC), (size, size)))


def _describe(config: Config) -> str:
    augment = config.augment
    flags = {
        "aa": augment.aa,
        "reprob": augment.reprob,
        "remode": augment.remode if augment.reprob else None,
        "mixup": augment.mixup,
        "cutmix": augment.cutmix,
        "vflip": config.data.vflip,
    }
    return " ".join(f"--{name} {value}" for name, value in flags.items() if value not in (None, 0.0, ""))


def _open_images(data_dir: Path) -> tuple[tuple[np.ndarray, np.ndarray], Callable[[np.ndarray], Images]]:
    """Heights and widths of all images, and a function that reads the images of some ids."""
    path = data_dir / "train.beton"
    if path.exists() or find_parts(path):
        beton = Beton(path)
        return beton.sides, lambda ids: _of_beton(beton, ids)
    lacking = f"--data-dir {data_dir} has no train.beton. Showing photographs instead"
    photographs = needs("skimage.data", extra="", to=lacking, instead="give --data-dir")
    sources = {"astronaut": photographs.astronaut(), "cat": photographs.chelsea()}
    sources |= {"coffee": photographs.coffee(), "rocket": photographs.rocket()}
    sizes = np.array([image.shape[:2] for image in sources.values()])[np.arange(4096) % len(sources)]

    def read(ids: np.ndarray) -> Images:
        which = ids % len(sources)
        return [list(sources.values())[n] for n in which], which, list(sources), "photographs of scikit-image"

    return (sizes[:, 0], sizes[:, 1]), read


def _of_beton(beton: Beton, ids: np.ndarray) -> Images:
    images = []
    for i in ids:
        try:
            images.append(decode(beton, int(i)))
        except ValueError as error:
            raise UserError(
                f"{beton.describe(int(i))} does not decode ({error}). Try `python -m data_prep verify`."
            ) from error
    classes = beton.classes or [str(n) for n in range(beton.num_classes)]
    return images, beton.labels_of(ids), classes, str(beton.path)


LEVELS = (0, 2, 4, 6, 8, 10)
"""Levels of the grid's columns, on timm's scale."""


def by_level(image_HWC: np.ndarray, policy: Policy, fill: np.ndarray) -> dict[str, np.ndarray]:
    """For each operation of the policy: its name -> the image at every level of `LEVELS`, uint8 (6, H, W, 3).

    Directions are positive, geometric operations bicubic, and other random parameters are at the middle of their range.
    `fill`: the colour outside the image, uint8 (3,).
    """
    names = dict.fromkeys(op.name for row in policy.rows for op in row)
    shape = (len(LEVELS), 1)
    grid = {}
    for name in names:
        _, formula, factor = NAMES[name]
        translate = policy.translate * image_HWC.shape[1]
        args = np.array([argument_of(formula, factor, float(level), 1.0, 0.5, translate) for level in LEVELS])
        images = np.repeat(image_HWC[None], len(LEVELS), axis=0)
        kinds, interpolations = np.full(shape, NAMES[name][0], np.int8), np.full(shape, BICUBIC, np.int8)
        use_threads(torch.get_num_threads())
        ops_cpu.apply_ops(images, kinds, args.reshape(shape), interpolations, fill)
        grid[name] = images
    return grid


def as_the_model_sees_them(
    crops_BHWC: np.ndarray, labels: np.ndarray, plan: BatchPlan, augment: Augment
) -> tuple[np.ndarray, np.ndarray]:
    """Augment decoded uint8 crops (B, S, S, 3) and int labels (B,) by the plan.

    Returns the images that the model gets as pixels again, clipped, uint8 (B, S, S, 3), and the soft targets, float32
    (B, classes).
    """
    images = augment.prepare(torch.from_numpy(crops_BHWC.copy()).permute(0, 3, 1, 2), plan)
    images, *drawn = augment.begin(images, plan)
    images, soft = augment(images, torch.from_numpy(labels), *drawn)
    pixels: Tensor = (images * augment.std + augment.mean).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).numpy(), soft.numpy()


def caption(soft_target: np.ndarray, smoothing: float, classes: list[str]) -> str:
    """The mixed labels and their shares, without label smoothing: `cat 0.63 + dog 0.37`."""
    shares = (soft_target - smoothing / len(soft_target)) / (1 - smoothing)
    order = [n for n in np.argsort(-shares, kind="stable") if shares[n] > 0.005]
    return " + ".join(
        f"{classes[n]} {shares[n]:.2f}" if not math.isclose(shares[n], 1, abs_tol=0.005) else classes[n] for n in order
    )
