"""The bench `augment`: timm's published recipe on decoded crops, beside timm's own transforms on the same crops.

The recipe is `--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel`: two operations, normalising, erasing.
"""

from __future__ import annotations

import io
import random
import warnings
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image, ImageOps
from torch import Tensor

from benchmarks.harness.limits import normalizing_case
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, environment, measure, nothing
from benchmarks.harness.sets import chosen, make_photos, open_given
from benchmarks.loader_peers import PREFETCH, in_whole_rounds
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.data.decode.pil import decode
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.plans import BatchPlan, TrainPlan, TrainRules

OPERATIONS, MAGNITUDE = 2, 9
SETTING = (
    f"nvidia.dali.auto_aug rand_augment(n={OPERATIONS}, m={MAGNITUDE}), crop_mirror_normalize to float32; every image "
    "gets both operations at one magnitude, and nothing is erased"
)


def dali_rand_augment(
    crops_BHWC: np.ndarray,
    batches: int,
    device: torch.device,
    workers: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Callable[[], Any]:
    """A function that runs the uint8 crops through DALI's pipeline `batches` times and returns the last float32 batch.

    The crops are on the device, as ours are; `mean` and `std` are RGB values in 0-1.
    """
    from nvidia import dali
    from nvidia.dali.auto_aug import rand_augment

    fn, types, pipeline_def = (getattr(dali, name) for name in ("fn", "types", "pipeline_def"))  # not typed
    on_gpu = device.type == "cuda"
    crops: Any = torch.from_numpy(crops_BHWC).to(device) if on_gpu else crops_BHWC
    scale = {"mean": [255 * value for value in mean], "std": [255 * value for value in std]}

    @pipeline_def(
        batch_size=len(crops),
        num_threads=workers,
        device_id=(device.index or 0) if on_gpu else None,
        seed=0,
        enable_conditionals=True,
        prefetch_queue_depth=PREFETCH,
    )
    def graph() -> Any:
        images = fn.external_source(
            source=lambda: crops, batch=True, layout="HWC", device="gpu" if on_gpu else "cpu", no_copy=True
        )
        images = rand_augment.rand_augment(images, n=OPERATIONS, m=MAGNITUDE, fill_value=128)
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **scale)

    # DALI's RandAugment uses deprecated names of DALI; the warnings ignore all filters, so they are recorded.
    with warnings.catch_warnings(record=True):
        pipeline: Any = graph()
        pipeline.build()
    make = in_whole_rounds(pipeline)

    def run() -> Any:
        (out,) = make(batches)
        return out.as_tensor()

    return run


POLICY, REPROB = "rand-m9-mstd0.5-inc1", 0.25
RECIPE = f"--aa {POLICY} --reprob {REPROB} --remode pixel"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STEP_MODEL = "vit_small_patch16_224"
SIZES = {"cuda": (1024, 60), "cpu": (256, 8)}
"""By device: images per batch, and batches per round. On a GPU fewer would be too fast to measure."""
MAX_PHOTOS = 256
"""Different crops; a larger batch repeats them."""
ROWS_A_TASK = 16
"""Images that a timm process takes at a time: few, so that all processes end together."""
_BY_DEVICE = "(default: by the device)"


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: photographs)")] = None
    """Take the crops from images of this .beton instead of the bench's photographs."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"], metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Images a batch; by default 1024 on cuda and 256 on a CPU."""
    batches: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Batches a round; by default 60 on cuda and 8 on a CPU."""
    img_size: Annotated[int, tyro.conf.arg(metavar="N")] = 224
    """Side of the crops, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where ours runs; on cuda a training step of ViT-Small is timed as well."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Threads of our augmentation on a CPU, and processes of timm's."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""


class _Ours:
    """Plan, operations, normalising and erasing, batch after batch."""

    def __init__(self, crops_BHWC: np.ndarray, batches: int, device: torch.device) -> None:
        count, size = crops_BHWC.shape[:2]
        sides = np.full(count * batches, size)
        rules = TrainRules(policy=parse_policy(POLICY), reprob=REPROB)
        self._plan = TrainPlan(sides, sides, rules, seed=0, img_size=size, batch_size=count)
        self._rows = self._plan.ids(0)
        self._augment = Augment(MEAN, STD, 10, 0.1, "pixel").to(device)
        self._finish = torch.compile(self._augment) if device.type == "cuda" else self._augment
        self._targets = torch.zeros(count, dtype=torch.long, device=device)
        self._inputs: Tensor | None = None
        self._crops = torch.from_numpy(crops_BHWC).to(device).permute(0, 3, 1, 2)
        self._images = torch.empty_like(self._crops)

    def draw(self) -> None:
        """Draw the plan only."""
        for step, ids in enumerate(self._rows):
            self._plan.batch(0, step, ids)

    def run(self) -> None:
        """Run everything; the crops are copied first, as each batch of a loader has its own pixels."""
        for step, ids in enumerate(self._rows):
            self._images.copy_(self._crops)
            self.augmented(self._plan.batch(0, step, ids))
        if self._crops.is_cuda:
            torch.cuda.synchronize()

    def augmented(self, plan: BatchPlan) -> Tensor:
        """The model's input from the current images, which are changed; valid until the next call."""
        images, *drawn = self._augment.begin(self._augment.prepare(self._images, plan), plan, self._inputs)
        inputs, _ = self._finish(images, self._targets, *drawn)
        self._inputs = inputs if drawn[1] is None else None
        return inputs


_crops: np.ndarray
_output: Tensor
_transform: Callable[[Any], Any]
"""State of a worker process."""


def _start_worker(crops_BHWC: np.ndarray, output: Tensor) -> None:
    """Make timm's transform, with `_posterize` patched, since Pillow 13 refuses to keep 0 bits (black)."""
    from timm.data import auto_augment
    from timm.data.transforms_factory import transforms_imagenet_train
    from torchvision.transforms import Compose

    global _crops, _output, _transform
    torch.set_num_threads(1)
    posterize = auto_augment.posterize

    def mended(image: Image.Image, bits: int, **more: Any) -> Image.Image:
        return posterize(image, bits, **more) if bits else Image.new("RGB", image.size)

    names = ("Posterize", "PosterizeIncreasing", "PosterizeOriginal")
    operations: dict[str, Any] = auto_augment.NAME_TO_OP
    operations.update(dict.fromkeys(names, mended))
    stages: Any = transforms_imagenet_train(
        crops_BHWC.shape[1], auto_augment=POLICY, mean=MEAN, std=STD, re_prob=REPROB, re_mode="pixel", separate=True
    )
    _, augment, to_normalized = stages  # the first stage, the crop, is already done
    _crops, _output = crops_BHWC, output
    _transform = Compose([augment, to_normalized])


def _run_worker(rows: range, seed: int) -> None:
    """Transform images `rows` of the round; all batches use the same batch of crops and of output."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for n in rows:
        row = n % len(_crops)
        _output[row] = _transform(Image.fromarray(_crops[row]))


@contextmanager
def _timms(crops_BHWC: np.ndarray, batches: int, workers: int) -> Generator[Callable[[], None], None, None]:
    """A function that runs all batches through timm's transforms, in processes that share crops and output.

    Each process takes the next images as soon as it is free: as in a loader, none waits at the end of a batch.
    """
    count, size = crops_BHWC.shape[:2]
    output = torch.empty(count, 3, size, size).share_memory_()
    tasks = tasks_of(count * batches, workers)
    with ProcessPoolExecutor(workers, get_context("fork"), _start_worker, (crops_BHWC, output)) as pool:

        def run() -> None:
            list(pool.map(_run_worker, tasks, range(len(tasks))))
            if not output.isfinite().all():
                raise UserError("timm's transforms returned values that are not finite.")

        yield run


def tasks_of(count: int, workers: int) -> list[range]:
    """Split a round of `count` images into small tasks, at least four per process if there are enough images."""
    rows = max(1, min(ROWS_A_TASK, count // (4 * workers)))
    return [range(start, min(start + rows, count)) for start in range(0, count, rows)]


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all cases. The result also has the section `recipe`. Raises `UserError`."""
    for name in ("batch_size", "batches", "img_size", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device)
    of_batch, batches = SIZES[device.type]
    batch_size, batches = options.batch_size or of_batch, options.batches or batches
    workers = available_cores() if options.workers is None else options.workers
    note("decoding crops")
    crops = _make_crops(batch_size, options.img_size, options.data)
    # timm's processes are forked before a device is touched.
    with _timms(crops, batches, workers) as run_timm:
        run_timm()
        torch.set_num_threads(workers)
        surroundings = environment(device.type)
        ours = _Ours(crops, batches, device)
        count = batch_size * batches
        where = f"{workers} threads" if device.type == "cpu" else "the GPU"
        cases = {
            "full_recipe": Case(ours.run, count, setting=f"{RECIPE}, drawing the plan included, on {where}"),
            "plan": Case(ours.draw, count, "samples/s", "drawing alone, on one thread"),
            "timm": Case(
                run_timm,
                count,
                setting=f"transforms_imagenet_train of the same recipe without its crop, {workers} processes that "
                "take images as they are free and write into shared memory; left out: collating into batches and the "
                "hand-over to the training process",
            ),
        }
        run_dali = dali_rand_augment(crops, batches, device, workers, MEAN, STD)
        cases["dali"] = Case(run_dali, count, setting=f"{SETTING}; on {where}")
        cases["copy_limit"] = normalizing_case(torch.from_numpy(crops).to(device).permute(0, 3, 1, 2), batches)
        ratios = {
            "full_recipe_vs_timm": ("full_recipe", "timm"),
            "full_recipe_vs_dali": ("full_recipe", "dali"),
            "full_recipe_share_of_limit": ("full_recipe", "copy_limit"),
        }
        if device.type == "cuda":
            cases["vit_small_step"] = _step_case(batch_size, options.img_size, batches, device)
            ratios["full_recipe_share_of_step"] = ("vit_small_step", "full_recipe")
        result = measure(
            "augment", cases, ratios, environment=surroundings, repeats=options.repeats, limits=_LIMITS, note=note
        )
    extra = {"recipe": RECIPE, "workers": workers, "batch_size": batch_size, "batches": batches}
    return replace(result, extra={**extra, "img_size": options.img_size})


def our_cases(batch_size: int, batches: int, img_size: int, device: torch.device) -> dict[str, Case]:
    """Our case beside its limit, with `batches` batches per round."""
    crops = _make_crops(batch_size, img_size)
    ours, images = _Ours(crops, batches, device), torch.from_numpy(crops).to(device).permute(0, 3, 1, 2)
    setting = f"{RECIPE}, drawing the plan included, batch {batch_size}, on {device.type}"
    return {
        "full_recipe": Case(ours.run, batch_size * batches, setting=setting),
        "copy_limit": normalizing_case(images, batches),
    }


_LIMITS = (
    "The crops are decoded and in memory before. Mixing is in none of the cases: both do it on the batch afterwards.",
)


def _make_crops(count: int, size: int, data: Path | None = None) -> np.ndarray:
    """uint8 (count, size, size, 3): crops of the bench's photographs, or of images of the .beton `data`."""
    different = min(count, MAX_PHOTOS)
    if data is None:
        files = map(io.BytesIO, make_photos(different))
        images: Iterator[Image.Image] = (Image.open(file, formats=("JPEG",)) for file in files)
    else:
        beton = open_given(data)
        images = (Image.fromarray(decode(beton, sample_id)) for sample_id in chosen(beton, different).tolist())
    crops = [np.asarray(ImageOps.fit(image, (size, size))) for image in images]
    return np.stack([crops[n % len(crops)] for n in range(count)])


def _step_case(batch_size: int, img_size: int, batches: int, device: torch.device) -> Case:
    """Training steps of a compiled ViT-Small in bfloat16, during which the augmentation should be done."""
    import timm

    model = timm.create_model(STEP_MODEL, img_size=img_size).to(device)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images = torch.randn(batch_size, 3, img_size, img_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(batch_size, dtype=torch.long, device=device)

    @partial(torch.compile, dynamic=False)
    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            return torch.nn.functional.cross_entropy(model(images).float(), targets)

    def steps() -> None:
        for _ in range(batches):
            loss_of(images, targets).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.cuda.synchronize()

    return Case(steps, batch_size * batches, setting=f"{STEP_MODEL}, forward, backward, AdamW, bfloat16, torch.compile")
