"""The bench `loader`: decoded training crops, beside stock FFCV, a plain DALI pipeline and timm's own loader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from data_prep.convert import convert_image_folder
from data_prep.errors import UserError
from data_prep.jpeg import ImageOptions
from lowrank_vit.augment.policy import parse_policy
from lowrank_vit.bench import loader_peers
from lowrank_vit.bench.environment import environment
from lowrank_vit.bench.limits import decode_case
from lowrank_vit.bench.measure import DEFAULT_REPEATS, Case, Result, Samples, measure, nothing
from lowrank_vit.bench.photos import ensure_photos
from lowrank_vit.bench.prep import CACHE
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.choose import LoaderOptions, open_loader
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.plan import TrainPlan, TrainRules
from lowrank_vit.data.plan_mix import MixRules

SMALL_SIDE = 32
LIMITED = ("ffcv", "dali_cpu", "stock_ffcv", "stock_dali", "timm", "torchvision")
"""What decodes JPEGs, and is held against decoding alone."""
LIMITS = (
    "All files are in memory after the warm-up, so a slow disk or network in front of them does not show.",
    "Ours resize with PIL's bilinear and bicubic filters in turn, as timm does; stock FFCV with OpenCV's area filter, "
    "the plain DALI pipeline with its linear one.",
    "decode_limit decodes whole images; DALI's decoder leaves out what lies far outside of the crop.",
    "A round of ours is an epoch, begun with nothing decoded; the plain DALI pipeline and timm's processes go on "
    "from the round before.",
)


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    count: Annotated[int, tyro.conf.arg(metavar="N")] = 2000
    """Photographs of 500 x 375 pixels, made once and kept in data/bench."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"], metavar="N")] = 64
    """Images a batch."""
    img_size: Annotated[int, tyro.conf.arg(metavar="N")] = 224
    """Side of the crops, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the images have to be; on cuda DALI's GPU decoder and a resident set are timed as well."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Decoding threads of ours, FFCV's and DALI's, processes of timm's."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Rounds that count, after one that does not. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted sets are kept."""


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure all cases. Beside cases and ratios the result holds batch size, image size and workers.

    Raises `UserError`.
    """
    for name in ("count", "batch_size", "img_size", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
    if options.batch_size > options.count:
        raise UserError(f"--batch-size {options.batch_size} is more than the --count of {options.count} photographs.")
    from lowrank_vit.engine.setup import pick_device

    device = pick_device(options.device)
    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    folder = ensure_photos(options.scratch / f"photos_{options.count}", options.count, note=note)
    note("converting")
    beton = converted(folder, "", ImageOptions())
    small = converted(folder, f"_{SMALL_SIDE}", ImageOptions(raw=SMALL_SIDE))
    surroundings = environment(device.type)
    with ExitStack() as stack:
        cases = {
            **_our_cases(options, beton, small, device, workers, stack),
            **_peer_cases(options, folder, beton, workers, stack),
            **_plan_cases(options),
            "decode_limit": decode_case(sorted(folder.glob("*/*.jpg")), workers),
        }
        ratios = {"ffcv_vs_stock_ffcv": ("ffcv", "stock_ffcv"), "dali_cpu_vs_stock_dali": ("dali_cpu", "stock_dali")}
        ratios |= {f"{kind}_vs_timm": (kind, "timm") for kind in ("ffcv", "dali_cpu")}
        ratios |= {f"{kind}_vs_torchvision": (kind, "torchvision") for kind in ("ffcv", "dali_cpu")}
        ratios |= {f"{kind}_share_of_limit": (kind, "decode_limit") for kind in LIMITED}
        repeats = options.repeats
        result = measure("loader", cases, ratios, environment=surroundings, repeats=repeats, limits=LIMITS, note=note)
    best = max(("ffcv", "dali_cpu"), key=lambda kind: result.cases[kind].median)
    named = {**result.ratios, "best_vs_timm": Samples(result.ratios[f"{best}_vs_timm"].samples)}
    extra = {"best": best, "batch_size": options.batch_size, "img_size": options.img_size, "workers": workers}
    return replace(result, ratios=named, extra=extra)


def converted(folder: Path, suffix: str, image: ImageOptions) -> Beton:
    """The photographs of `folder` as FOLDER`suffix`.beton beside it, made once."""
    out = folder.with_name(f"{folder.name}{suffix}.beton")
    convert_image_folder(folder, out, image=image)  # finds itself done where it was
    return Beton(out)


def _our_cases(
    options: Options, beton: Beton, small: Beton, device: torch.device, workers: int, stack: ExitStack
) -> dict[str, Case]:
    def case(kind: str, beton: Beton, device: torch.device, setting: str) -> Case:
        plan = plan_of(beton.heights, beton.widths, options, TrainRules())
        loader, _ = open_loader(beton, plan, device, LoaderOptions(kind, workers))
        stack.callback(loader.close)
        epochs = iter(range(2**31))
        return Case(
            partial(read_epoch, loader, epochs, device),
            plan.steps_per_epoch * options.batch_size,
            setting=f"{setting}; uint8 on {device}",
        )

    cpu = torch.device("cpu")
    cases = {
        "ffcv": case("ffcv", beton, cpu, f"--loader ffcv, {workers} threads"),
        "dali_cpu": case("dali", beton, cpu, f"--loader dali, {workers} threads"),
        "resident": case("resident", beton, device, "--loader resident, decoded before"),
        "resident_32px": case("resident", small, device, f"--loader resident, raw {SMALL_SIDE} px enlarged"),
    }
    if device.type == "cuda":
        cases["dali_gpu"] = case("dali", beton, device, f"--loader dali, {workers} threads beside the GPU")
    return cases


def read_epoch(loader: Loader, epochs: Iterator[int], device: torch.device) -> None:
    """Read the next epoch to its end."""
    for _ in loader.batches(next(epochs)):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peer_cases(options: Options, folder: Path, beton: Beton, workers: int, stack: ExitStack) -> dict[str, Case]:
    steps = options.count // options.batch_size
    wanted = {"batch_size": options.batch_size, "img_size": options.img_size, "workers": workers}
    peers = {
        "stock_ffcv": (
            loader_peers.stock_ffcv(beton.path, **wanted),
            f"Loader(os_cache=True): RandomResizedCropRGBImageDecoder, RandomHorizontalFlip; {workers} threads",
        ),
        "stock_dali": (
            loader_peers.stock_dali(folder, steps=steps, **wanted),
            f"readers.file, decoders.image_random_crop, resize, flip on the CPU; {workers} threads",
        ),
        "timm": (
            stack.enter_context(loader_peers.timm_loader(folder, **wanted)),
            f"create_loader of an ImageFolder, crop and flip only, not yet normalised; {workers} processes",
        ),
        "torchvision": (
            stack.enter_context(loader_peers.torch_loader(folder, **wanted)),
            f"DataLoader, ImageFolder with decode_image, v2.RandomResizedCrop and flip of uint8; {workers} processes",
        ),
    }
    count = steps * options.batch_size
    return {name: Case(run, count, setting=f"{setting}; uint8") for name, (run, setting) in peers.items()}


def _plan_cases(options: Options) -> dict[str, Case]:
    """An epoch of ImageNet's size is drawn in full."""
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(300, 501, (2, 2**17))
    recipe = TrainRules(
        policy=parse_policy("rand-m9-mstd0.5-inc1"), reprob=0.25, mixing=MixRules(mixup=0.8, cutmix=1.0)
    )
    uses = {
        "plan": (TrainRules(), "order, crops, flips and filters drawn on one thread"),
        "plan_full_recipe": (recipe, "with RandAugment, erasing and mixing, on one thread"),
    }
    big = replace(options, batch_size=256)
    cases = {}
    for name, (rules, setting) in uses.items():
        plan = plan_of(heights, widths, big, rules)
        count = plan.steps_per_epoch * plan.batch_size
        cases[name] = Case(partial(_draw_epoch, plan), count, unit="samples/s", setting=setting)
    return cases


def _draw_epoch(plan: TrainPlan) -> None:
    for step, ids in enumerate(plan.ids(0)):
        plan.batch(0, step, ids)


def plan_of(heights: np.ndarray, widths: np.ndarray, options: Options, rules: TrainRules) -> TrainPlan:
    """Of images of these sides, with the bench's batch and crops."""
    return TrainPlan(heights, widths, rules, seed=0, img_size=options.img_size, batch_size=options.batch_size)
