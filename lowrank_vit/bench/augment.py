"""The bench `augment`: timm's published recipe on decoded crops, beside timm's own transforms on the same crops.

The recipe is `--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel`: two operations, normalising, erasing.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from data_prep.errors import UserError
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.augment.policy import parse_policy
from lowrank_vit.bench.augment_peers import SETTING, dali_rand_augment
from lowrank_vit.bench.environment import environment
from lowrank_vit.bench.limits import normalizing_case
from lowrank_vit.bench.measure import DEFAULT_REPEATS, Case, Result, measure, nothing
from lowrank_vit.bench.photos import make_photos
from lowrank_vit.data.plan import TrainPlan, TrainRules

POLICY, REPROB = "rand-m9-mstd0.5-inc1", 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEP_MODEL = "vit_small_patch16_224"
MAX_PHOTOS = 256
"""Different crops; a larger batch repeats them."""


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"], metavar="N")] = 256
    """Images a batch."""
    batches: Annotated[int, tyro.conf.arg(metavar="N")] = 8
    """Batches a round."""
    img_size: Annotated[int, tyro.conf.arg(metavar="N")] = 224
    """Side of the crops, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ours runs; on cuda a training step of ViT-Small is timed as well."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Threads of ours on a CPU, processes of timm's."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Rounds that count, after one that does not. Fewer than 5 are a smoke test."""


class _Ours:
    """Plan, operations, normalising and erasing of one batch after the other."""

    def __init__(self, crops_BHWC: np.ndarray, batches: int, device: torch.device) -> None:
        count, size = crops_BHWC.shape[:2]
        sides = np.full(count * batches, size)
        rules = TrainRules(policy=parse_policy(POLICY), reprob=REPROB)
        self._plan = TrainPlan(sides, sides, rules, seed=0, img_size=size, batch_size=count)
        self._rows = self._plan.ids(0)
        self._augment = Augment(MEAN, STD, 1000, 0.1, "pixel", compile=device.type == "cuda").to(device)
        self._crops = torch.from_numpy(crops_BHWC).to(device).permute(0, 3, 1, 2)
        self._images = torch.empty_like(self._crops)

    def draw(self) -> None:
        """The plan alone."""
        for step, ids in enumerate(self._rows):
            self._plan.batch(0, step, ids)

    def run(self) -> None:
        """All of it; the crops are copied first, as each batch of a loader has pixels of its own."""
        for step, ids in enumerate(self._rows):
            self._images.copy_(self._crops)
            self._augment.normalize(self._augment.prepare(self._images, self._plan.batch(0, step, ids)))
        if self._crops.is_cuda:
            torch.cuda.synchronize()


_crops: np.ndarray
_output: Tensor
_transform: Callable[[Any], Any]
"""A worker process's own."""


def _start_worker(crops_BHWC: np.ndarray, output: Tensor) -> None:
    """Make timm's transform; its `_posterize` is mended, since Pillow 13 refuses to keep 0 bits (which means black)."""
    from timm.data import auto_augment
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision.transforms import Compose

    global _crops, _output, _transform
    torch.set_num_threads(1)
    posterize = auto_augment.posterize

    def mended(image: Image.Image, bits: int, **more: Any) -> Image.Image:
        return posterize(image, bits, **more) if bits else Image.new("RGB", image.size)

    names = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
    auto_augment.NAME_TO_OP.update(dict.fromkeys(names, mended))
    stages: Any = transforms_imagenet_train(
        crops_BHWC.shape[1], auto_augment=POLICY, mean=MEAN, std=STD, re_prob=REPROB, re_mode="pixel", separate=True
    )
    _, augment, to_normalized = stages  # the first stage is the crop, which is made already
    _crops, _output = crops_BHWC, output
    _transform = Compose([augment, to_normalized])


def _run_worker(rows: range, seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for n in rows:
        _output[n] = _transform(Image.fromarray(_crops[n]))


@contextmanager
def _timms(crops_BHWC: np.ndarray, batches: int, workers: int) -> Iterator[Callable[[], None]]:
    """A function that puts all batches through timm's transforms, in processes that share crops and output."""
    count, size = crops_BHWC.shape[:2]
    output = torch.empty(count, 3, size, size).share_memory_()
    shares = [range(worker, count, workers) for worker in range(workers)]
    with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (crops_BHWC, output)) as pool:

        def run() -> None:
            for batch in range(batches):
                seeds = range(batch * workers, (batch + 1) * workers)
                list(pool.map(_run_worker, shares, seeds))
            if not output.isfinite().all():
                raise UserError("timm's transforms gave numbers that are not finite.")

        yield run


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all cases. Beside cases and ratios the result holds the section `recipe`. Raises `UserError`."""
    for name in ("batch_size", "batches", "img_size", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
    from lowrank_vit.engine.setup import pick_device

    device = pick_device(options.device)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    note("decoding crops")
    crops = _make_crops(options.batch_size, options.img_size)
    # timm's processes are forked before a device is touched.
    with _timms(crops, options.batches, workers) as run_timm:
        run_timm()
        torch.set_num_threads(workers)
        surroundings = environment(device.type)
        ours = _Ours(crops, options.batches, device)
        count = options.batch_size * options.batches
        where = f"{workers} threads" if device.type == "cpu" else "the GPU"
        recipe = f"--aa {POLICY} --reprob {REPROB} --remode pixel"
        cases = {
            "full_recipe": Case(ours.run, count, setting=f"{recipe}, drawing the plan included, on {where}"),
            "plan": Case(ours.draw, count, setting="drawing alone, on one thread"),
            "timm": Case(
                run_timm,
                count,
                setting=f"transforms_imagenet_train of the same recipe without its crop, {workers} processes that "
                "write into shared memory; no collating",
            ),
        }
        run_dali = dali_rand_augment(crops, options.batches, device, workers, MEAN, STD)
        cases["dali"] = Case(run_dali, count, setting=f"{SETTING}; on {where}")
        cases["copy_limit"] = normalizing_case(torch.from_numpy(crops).to(device).permute(0, 3, 1, 2), options.batches)
        ratios = {
            "full_recipe_vs_timm": ("full_recipe", "timm"),
            "full_recipe_vs_dali": ("full_recipe", "dali"),
            "full_recipe_share_of_limit": ("full_recipe", "copy_limit"),
        }
        if device.type == "cuda":
            cases["vit_small_step"] = _step_case(options, count, device)
            ratios["full_recipe_share_of_step"] = ("vit_small_step", "full_recipe")
        result = measure(
            "augment", cases, ratios, environment=surroundings, repeats=options.repeats, limits=_LIMITS, note=note
        )
    extra = {"recipe": recipe, "workers": workers, "batch_size": options.batch_size, "img_size": options.img_size}
    return Result(result.bench, result.environment, result.cases, result.ratios, result.limits, extra)


_LIMITS = (
    "The crops are decoded and in memory before. Mixing is in none of the cases: both do it on the batch afterwards.",
)


def _make_crops(count: int, size: int) -> np.ndarray:
    """uint8 (count, size, size, 3): crops of the bench's photographs."""
    photos = make_photos(min(count, MAX_PHOTOS))
    crops = [np.asarray(ImageOps.fit(Image.open(io.BytesIO(photo)), (size, size))) for photo in photos]
    return np.stack([crops[n % len(crops)] for n in range(count)])


def _step_case(options: Options, count: int, device: torch.device) -> Case:
    """Training steps of a compiled ViT-Small in bfloat16, what the augmentation has to hide behind."""
    import timm

    model = timm.create_model(STEP_MODEL, img_size=options.img_size).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(options.batch_size, 3, options.img_size, options.img_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(options.batch_size, dtype=torch.long, device=device)

    @partial(torch.compile, dynamic=False)
    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return torch.nn.functional.cross_entropy(model(images).float(), targets)

    def steps() -> None:
        for _ in range(options.batches):
            loss_of(images, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()

    return Case(steps, count, setting=f"{STEP_MODEL}, forward, backward, AdamW, bfloat16, torch.compile")
