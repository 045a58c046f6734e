"""The bench `loader`: decoded training crops, beside stock FFCV, a plain DALI pipeline and timm's own loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from benchmarks import loader_peers
from benchmarks.harness.limits import batch_copy_case, decode_case
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, environment, measure, nothing
from benchmarks.harness.sets import AS_STORED, converted, files_of, open_given, photographs
from benchmarks.prep import CACHE
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions, usual_workers
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.mixing import MixRules
from lowrank_vit.plan.operations import parse_policy
from lowrank_vit.plan.plans import TrainPlan, TrainRules

SMALL_SIDE, RAW_SIDE, MAX_SIDE = 32, 256, 400
"""Pixels of further sets of the photographs: raw and enlarged, raw in ImageNet's usual size, and JPEG."""
SIZES = {"cuda": (4096, 256), "cpu": (2000, 64)}
"""By device: images in the set and per batch. On a GPU fewer would be too fast to measure."""
LIMITED = {
    **dict.fromkeys(("ffcv", "dali_cpu", "stock_ffcv", "stock_dali", "timm", "torchvision", "spdl"), "decode_limit"),
    **dict.fromkeys(("dali_gpu", "stock_dali_gpu"), "gpu_decode_limit"),
    **dict.fromkeys(("resident", "resident_32px", "resident_256px"), "copy_limit"),
}
"""The limit with which a case is compared, if both were run."""
LIMITS = (
    "All files are in memory after the warm-up, so a slow disk or network in front of them does not show.",
    "Ours resize with PIL's bilinear and bicubic filters in turn, as timm does; stock FFCV with OpenCV's area filter, "
    "the plain DALI pipeline with its linear one.",
    "decode_limit decodes whole images; DALI's decoder leaves out what lies far outside of the crop.",
    "A round of each case begins with nothing decoded and ends with nothing under way, but for the reader of the plain "
    "DALI pipelines, which has one batch of files in memory. Ours and FFCV's are an epoch.",
)


_BY_DEVICE = "(default: by the device)"


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    data: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: photographs)")] = None
    """Read the JPEGs of this .beton instead. --count of them are copied to files, which the other loaders need."""
    count: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Photographs of 500 x 375 pixels, made once and kept in data/bench, or samples of --data; by default 4096 on cuda
    and 2000 on a CPU."""
    batch_size: Annotated[int | None, tyro.conf.arg(aliases=["-b"], metavar="N", help_behavior_hint=_BY_DEVICE)] = None
    """Images a batch; by default 256 on cuda and 64 on a CPU."""
    times: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """How often our loaders, and the cases that give DALI's limit, read the set in a round: a GPU needs little time
    for it."""
    cases: Annotated[
        tuple[str, ...] | None, tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: all of the device)")
    ] = None
    """Run only these cases."""
    img_size: Annotated[int, tyro.conf.arg(metavar="N")] = 224
    """Side of the crops, pixels."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the images have to be; on cuda DALI's GPU decoder and a resident set are timed as well."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """Decoding threads of our loaders, FFCV's and DALI's, and processes of timm's. By default on cuda: as many as in
    training."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""
    scratch: Annotated[Path, tyro.conf.arg(metavar="DIR")] = CACHE
    """Where photographs and converted sets are kept."""


def run(
    options: Options, note: Callable[[str], object] = nothing, keep: Callable[[Result], object] = nothing
) -> Result:
    """Measure the cases. The result also has batch size, image size and workers.

    Raises `UserError`.
    """
    for name in ("count", "batch_size", "img_size", "workers", "times"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}, expected 1 or more.")
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device)
    count, batch_size = SIZES[device.type]
    options = replace(options, count=options.count or count, batch_size=options.batch_size or batch_size)
    workers = options.workers or (usual_workers(device) if device.type == "cuda" else available_cores())
    folder, beton = _sets(options, note)
    surroundings = environment(device.type)
    files = sorted(folder.glob("*/*.jpg"))
    no_spdl = loader_peers.why_no_spdl(files[0])
    with ExitStack() as stack:
        makers = {
            **_our_cases(options, folder, beton, device, workers, stack),
            **_peer_cases(options, folder, beton, workers, stack),
            **({} if no_spdl else {"spdl": partial(_spdl_case, options, files, workers)}),
            **(_gpu_peer_cases(options, folder, beton, workers) if device.type == "cuda" else {}),
            **_plan_cases(options),
            "decode_limit": partial(decode_case, files, workers),
            "copy_limit": partial(batch_copy_case, options.times * len(beton.labels), *_batch(options), device),
        }
        cases = {name: makers[name]() for name in _wanted(options, makers)}
        limits = (*LIMITS, *([f"SPDL: not measured, because {no_spdl}."] if no_spdl and not options.cases else []))
        repeats, ratios = options.repeats, ratios_of(cases)
        result = measure(
            "loader", cases, ratios, environment=surroundings, repeats=repeats, limits=limits, note=note, keep=keep
        )
    extra: dict[str, Any] = {"batch_size": options.batch_size, "img_size": options.img_size, "times": options.times}
    extra |= {"workers": workers, "images": beton.num_samples, "data": str(options.data or "the bench's photographs")}
    extra |= {"spdl": no_spdl or "measured", "hw_decoder_load": LoaderOptions("dali").hw_decoder_load}
    named = dict(result.ratios)
    if compared := [kind for kind in ("ffcv", "dali_cpu") if f"{kind}_vs_timm" in named]:
        best = max(compared, key=lambda kind: result.cases[kind].median)
        named["best_vs_timm"], extra["best"] = named[f"{best}_vs_timm"], best
    return replace(result, ratios=named, extra=extra)


def _wanted(options: Options, there: Collection[str]) -> list[str]:
    """The cases to measure. Raises `UserError` for one that does not exist."""
    for name in options.cases or ():
        if name not in there:
            raise UserError(f"--cases {name} is not a case of this bench here. There are: {', '.join(there)}.")
    return [name for name in there if options.cases is None or name in options.cases]


def ratios_of(cases: Collection[str]) -> dict[str, tuple[str, str]]:
    """All ratios that these cases allow."""
    ratios = {f"{kind}_vs_stock_{kind}": (kind, f"stock_{kind}") for kind in ("ffcv", "dali_gpu")}
    ratios |= {"interpolated_vs_repeated_colours": ("dali_gpu", "dali_gpu_repeated_colours")}
    ratios |= {"dali_cpu_vs_stock_dali": ("dali_cpu", "stock_dali")}
    peers = ("timm", "torchvision", "spdl")
    ratios |= {f"{kind}_vs_{peer}": (kind, peer) for peer in peers for kind in ("ffcv", "dali_cpu")}
    ratios |= {f"{kind}_share_of_limit": (kind, limit) for kind, limit in LIMITED.items()}
    return {name: pair for name, pair in ratios.items() if set(pair) <= set(cases)}


def _sets(options: Options, note: Callable[[str], object]) -> tuple[Path, Beton]:
    """The same images as files, and as a .beton of their bytes. Raises `UserError`."""
    count, batch_size = _count(options), _batch(options)[0]
    if options.data is not None:
        folder, image, what = files_of(open_given(options.data), count, options.scratch, note), AS_STORED, "samples"
    else:
        folder, image, what = photographs(options.scratch, count, note), ImageOptions(), "photographs"
    note("converting")
    beton = converted(folder, "", image)
    if batch_size > beton.num_samples:
        raise UserError(
            f"--batch-size {batch_size} is more than the {beton.num_samples} {what}. Give a larger --count."
        )
    return folder, beton


def _count(options: Options) -> int:
    assert options.count is not None
    return options.count


def _batch(options: Options) -> tuple[int, int]:
    """Images per batch, and their side in pixels."""
    assert options.batch_size is not None
    return options.batch_size, options.img_size


_Makers = dict[str, Callable[[], Case]]
"""Functions that make cases, by name; making one may open and decode a set."""


def _our_cases(
    options: Options, folder: Path, beton: Beton, device: torch.device, workers: int, stack: ExitStack
) -> _Makers:
    def case(kind: str, image: ImageOptions | None, device: torch.device, setting: str, **more: Any) -> Case:
        of_case = beton if image is None else converted(folder, suffix_of(image), image)
        plan = plan_of(of_case.heights, of_case.widths, options, TrainRules())
        loader, _ = open_loader(of_case, plan, device, LoaderOptions(kind, workers, **more))
        stack.callback(loader.close)
        epochs = iter(range(2**31))
        return Case(
            partial(read_epoch, loader, epochs, device),
            plan.steps_per_epoch * plan.batch_size,
            setting=f"{setting}; uint8 on {device}",
        )

    cpu, threads = torch.device("cpu"), f"{workers} threads"
    small, raw = ImageOptions(raw=SMALL_SIDE), ImageOptions(raw=RAW_SIDE)
    cases: _Makers = {
        "ffcv": partial(case, "ffcv", None, cpu, f"--loader ffcv, {threads}"),
        "dali_cpu": partial(case, "dali", None, cpu, f"--loader dali, {threads}"),
        "resident": partial(case, "resident", None, device, "--loader resident, decoded before"),
        "resident_32px": partial(case, "resident", small, device, f"--loader resident, raw {SMALL_SIDE} px enlarged"),
    }
    if device.type == "cuda":
        on_gpu, smaller = f"--loader dali, {threads} beside the GPU", ImageOptions(max_side=MAX_SIDE)
        cases |= {
            "resident_256px": partial(case, "resident", raw, device, f"--loader resident, raw {RAW_SIDE} px"),
            "dali_gpu": partial(case, "dali", None, device, on_gpu),
            "dali_gpu_repeated_colours": partial(
                case, "dali", None, device, f"{on_gpu}, --no-jpeg-fancy-upsampling", jpeg_fancy_upsampling=False
            ),
            "dali_gpu_400px": partial(case, "dali", smaller, device, f"{on_gpu}, --max-side {MAX_SIDE}"),
        }
    return cases


def suffix_of(image: ImageOptions) -> str:
    """The suffix of a set's name after the photographs' folder."""
    return f"_{image.raw or image.max_side}" if image != ImageOptions() else ""


def read_epoch(loader: Loader, epochs: Iterator[int], device: torch.device) -> None:
    """Read the next epoch to its end."""
    for _ in loader.batches(next(epochs)):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize()


def _peer_cases(options: Options, folder: Path, beton: Beton, workers: int, stack: ExitStack) -> _Makers:
    batch_size, img_size = _batch(options)
    steps = beton.num_samples // batch_size
    fair = loader_peers.fair_steps(steps, workers)
    wanted: dict[str, Any] = {"batch_size": batch_size, "img_size": img_size, "workers": workers}
    processes = f"{workers} processes, {fair} batches a round, as many for each process"
    peers = {
        "stock_ffcv": (
            partial(loader_peers.stock_ffcv, beton.path, **wanted),
            steps,
            f"Loader(os_cache=True): RandomResizedCropRGBImageDecoder, RandomHorizontalFlip; {workers} threads",
        ),
        "stock_dali": (
            partial(loader_peers.stock_dali, folder, steps=steps, **wanted),
            steps,
            f"readers.file, decoders.image_random_crop, resize, flip on the CPU; {workers} threads",
        ),
        "timm": (
            partial(_opened, loader_peers.timm_loader, stack, folder, steps=fair, **wanted),
            fair,
            f"create_loader of an ImageFolder, crop and flip only, not yet normalised; {processes}",
        ),
        "torchvision": (
            partial(_opened, loader_peers.torch_loader, stack, folder, steps=fair, **wanted),
            fair,
            f"DataLoader, ImageFolder with decode_image, v2.RandomResizedCrop and flip of uint8; {processes}",
        ),
    }
    return {
        name: partial(_peer_case, make, steps * batch_size, setting) for name, (make, steps, setting) in peers.items()
    }


def _opened(make: Callable[..., AbstractContextManager[Callable[[], None]]], stack: ExitStack, *of: Any, **more: Any):
    return stack.enter_context(make(*of, **more))


def _peer_case(make: Callable[[], Callable[[], object]], images: int, setting: str) -> Case:
    return Case(make(), images, setting=f"{setting}; uint8")


def _spdl_case(options: Options, files: Sequence[Path], workers: int) -> Case:
    batch_size, img_size = _batch(options)
    steps = loader_peers.fair_steps(len(files) // batch_size, workers)
    batches = loader_peers.spdl_loader(files, steps=steps, batch_size=batch_size, img_size=img_size, workers=workers)

    def run() -> None:
        for _ in batches():
            pass

    setting = f"{loader_peers.SETTING.format(workers=workers)}; {steps} batches a round, as many for each thread; uint8"
    return Case(run, steps * batch_size, setting=setting)


def _gpu_peer_cases(options: Options, folder: Path, beton: Beton, workers: int) -> _Makers:
    batch_size, img_size = _batch(options)
    steps = options.times * beton.num_samples // batch_size
    wanted: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "workers": workers, "device": "gpu"}
    shared = f"hw_decoder_load={loader_peers.HW_DECODER_LOAD}, {workers} threads beside the GPU"
    peer = f'readers.file, decoders.image_random_crop(device="mixed"), resize and flip on the GPU; {shared}'
    limit = f'limit: decoders.image(device="mixed") of whole images, nothing else; {shared}'
    count = steps * batch_size
    return {
        "stock_dali_gpu": partial(
            _peer_case, partial(loader_peers.stock_dali, folder, img_size=img_size, **wanted), count, peer
        ),
        "gpu_decode_limit": partial(_peer_case, partial(loader_peers.decoder_alone, folder, **wanted), count, limit),
    }


def _plan_cases(options: Options) -> _Makers:
    """Cases that draw a whole epoch of ImageNet's size."""
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(300, 501, (2, 2**17))
    recipe = TrainRules(
        policy=parse_policy("rand-m9-mstd0.5-inc1"), reprob=0.25, mixing=MixRules(mixup=0.8, cutmix=1.0)
    )
    uses = {
        "plan": (TrainRules(), "order, crops, flips and filters drawn on one thread"),
        "plan_full_recipe": (recipe, "with RandAugment, erasing and mixing, on one thread"),
    }
    big = replace(options, batch_size=256, times=1)
    cases: _Makers = {}
    for name, (rules, setting) in uses.items():
        plan = plan_of(heights, widths, big, rules)
        count = plan.steps_per_epoch * plan.batch_size
        cases[name] = partial(Case, partial(_draw_epoch, plan), count, unit="samples/s", setting=setting)
    return cases


def _draw_epoch(plan: TrainPlan) -> None:
    for step in range(plan.steps_per_epoch):
        plan.batch(0, step, plan.step_ids(0, step))


class _RepeatedPlan(TrainPlan):
    """A plan that reads a set several times in an epoch; its ids are those of the set."""

    different: int
    """Samples in the set; the plan repeats their sides."""

    def step_ids(self, epoch: int, step: int, without: Collection[int] = ()) -> np.ndarray:
        return super().step_ids(epoch, step, without) % self.different

    def ids(self, epoch: int) -> np.ndarray:
        return super().ids(epoch) % self.different


def plan_of(heights: np.ndarray, widths: np.ndarray, options: Options, rules: TrainRules) -> TrainPlan:
    """A plan of images with these sides, repeated `options.times`, with the bench's batch size and crops."""
    batch_size, img_size = _batch(options)
    sides = np.tile(heights, options.times), np.tile(widths, options.times)
    plan = _RepeatedPlan(*sides, rules, seed=0, img_size=img_size, batch_size=batch_size)
    plan.heights, plan.widths, plan.different = heights, widths, len(heights)
    return plan
