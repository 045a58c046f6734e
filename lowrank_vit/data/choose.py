"""Choose the decode backend for a set and a device, by a kept measurement if two are possible; open the loader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module, metadata

import numpy as np
import torch
from rich.filesize import decimal as size_in_words

from data_prep.formats import turbojpeg
from lowrank_vit.common import resources, terminal
from lowrank_vit.common.arguments import check_function, check_type, check_whole
from lowrank_vit.common.devices import cuda_path, pick_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.decode import resident_set
from lowrank_vit.data.decode.backend import Backend, LoaderOptions
from lowrank_vit.data.decode.dali import why_no_dali
from lowrank_vit.data.decode.resident import ResidentBackend
from lowrank_vit.data.decode.resident_set import NoRoom
from lowrank_vit.data.jpeg_engine import EngineShare, choose_share, measure_shares
from lowrank_vit.data.loader import Loader, Prepare
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.speeds import dali_version, kept_or_measured, key_of, measure
from lowrank_vit.plan.plans import EvalPlan, TrainPlan

RESIDENT_SHARE = 0.25
"""A set may take at most this share of the device's memory to be made resident by `auto`."""
_AS_BEFORE = "as the run has decoded so far"


def open_loader(
    beton: Beton,
    plan: TrainPlan | EvalPlan,
    device: torch.device | str = "auto",
    options: LoaderOptions | None = None,
    *,
    workers: int = 4,
    prepare: Prepare | None = None,
    say: Callable[[str], object] = terminal.say,
) -> tuple[Loader, str]:
    """Open a loader; returns it and one line that says which backend it has and why. Raises `UserError`.

    Its `batches(epoch)` yields a `Batch` for each step: uint8 `images` (B, 3, S, S), RGB, channels_last, and int64
    `targets` (B,), on the device, and the `plan` of the augmentation still to be done, see `Augment`.

    Args:
        beton: the images.
        plan: which of them to load, and how to crop them.
        device: the device of the batches: a `torch.device`, or auto, cpu, cuda or cuda:N.
        options: how to decode; default: the backend that suits set and device, with `workers` threads.
        workers: threads that decode, if there are no `options`.
        prepare: applied to the images of each batch during the previous step, see `Augment.prepare`.
        say: called with lines on samples left out.

    Example:
        >>> beton = Beton("val.beton")
        >>> loader, line = open_loader(beton, EvalPlan.of(beton, img_size=32, batch_size=8), "cpu", workers=1)
        >>> print(*(tuple(batch.images.shape) for batch in loader.batches(epoch=0)))
        (8, 3, 32, 32) (4, 3, 32, 32)
        >>> loader.close()
    """
    check_type(Beton, "an open Beton, as Beton(path) gives", beton=beton)
    check_type((TrainPlan, EvalPlan), "a TrainPlan or an EvalPlan", plan=plan)
    check_type((str, torch.device), "auto, cpu, cuda, cuda:N or a torch.device", device=device)
    check_type((LoaderOptions, type(None)), "LoaderOptions or None", options=options)
    check_function("a function or None", type(None), prepare=prepare)
    check_function("a function", say=say)
    check_whole(workers=workers)
    _check_plan(beton, plan)
    options = options or LoaderOptions(workers=workers)
    device = pick_device(device, shown="device=")
    options = replace(options, say=say if plan.rank == 0 else None)
    if beton.num_jpeg:
        turbojpeg.load()
    backend, reason, share = _open_backend(beton, plan, device, options)
    if options.before and options.before != backend.name:
        reason += f"; the run has decoded with {options.before} so far, and pixels may differ a little from here on"
    for line in filter(None, (beton.unverified, beton.unshared)):
        if plan.rank == 0:
            say(line)
    loader = Loader(backend, beton, plan, device, on_bad_sample=options.on_bad_sample, prepare=prepare, say=say)
    loader.engine_share = share
    return loader, f"{beton.path.name}: {beton.num_samples:,} samples, {backend.name} loader ({reason})"


def _check_plan(beton: Beton, plan: TrainPlan | EvalPlan) -> None:
    """Raise `UserError` for a plan of other images, with samples or pixels that this set does not have."""
    if len(plan.heights) != beton.num_samples:
        other = f"{len(plan.heights):,} samples, and this set has {beton.num_samples:,}"
    elif not all(  # most are of the very arrays, which need not be walked through
        one is other or np.array_equal(one, getattr(beton, name))
        for name, one, other in zip(("heights", "widths"), (plan.heights, plan.widths), beton.sides, strict=True)
    ):
        other = "as many samples, but some of other sizes in pixels"
    else:
        return
    raise UserError(
        f"the plan is of another set than {beton.path}: of {other}. Make the plan of the same Beton that is loaded."
    )


def _open_backend(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> tuple[Backend, str, EngineShare | None]:
    """The given backend, or with `auto` the chosen one, and the reason; and the JPEG engine's share if it was chosen.

    If one rank cannot get the memory for a resident set after all, all ranks take another backend.
    """
    kind, reason, share = options.loader, f"--loader {options.loader}", None
    if kind == "auto":
        kind, reason = choose_backend(beton, plan, device, options)
        if kind == "resident":
            backend, lacking = None, ""
            try:
                backend = ResidentBackend(beton, plan, device, options.workers, options.say)
            except NoRoom as error:
                lacking = str(error)
            lacking = _first(options.of_all_ranks(lacking))
            if backend and not lacking:
                return backend, reason, None
            if backend:
                backend.close()
            kind, reason = _choose_decoder(beton, plan, device, options, lacking)
    if kind == "dali" and cuda_path(device) and (share := _engine_share(beton, plan, device, options)):
        options = replace(options, hw_decoder_load=share.share)
        reason += f"; --hw-decoder-load {share.share:g}{share.why and f', {share.why}'}"
    return make_backend(kind, beton, plan, device, options), reason, share


def _engine_share(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> EngineShare | None:
    def open_with(share: float) -> Backend:
        return make_backend("dali", beton, plan, device, replace(options, hw_decoder_load=share))

    def measured() -> dict[str, float]:
        assert isinstance(plan, TrainPlan)
        if options.say:
            options.say(f"measuring shares for the GPU's JPEG engine with {beton.path.name}, which takes some seconds")
        return measure_shares(open_with, plan, device)

    return choose_share(beton, plan, device, options, measured)


def make_backend(
    kind: str, beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> Backend:
    """Open the backend of that name. Raises `UserError` if that is not possible."""
    try:
        open_backend = import_module(f"lowrank_vit.data.decode.{kind}").open_backend
    except (ModuleNotFoundError, AttributeError):
        raise UserError(f"options.loader takes auto, resident, dali or ffcv, not {kind!r}.") from None
    return open_backend(beton, plan, device, options)


def choose_backend(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions
) -> tuple[str, str]:
    """`("resident" | "dali" | "ffcv", the reason in words)` for `--loader auto`, the same on all ranks.

    Resident if the decoded set takes at most `RESIDENT_SHARE` of the device's memory, and at most half of the memory
    that is free now, so that training has room beside it; else DALI with a GPU or for evaluation, whose scores must not
    depend on a measurement of speed; else whichever of FFCV and DALI decodes this set faster on this CPU, with several
    ranks by the speed of the slowest. That measurement is kept beside the set. A backend must suit all ranks.

    A resumed run keeps the backend, on which its pixels depend: it stays resident while the set fits at all, and does
    not become resident because more memory is free; but with a GPU it does not stay with a backend of a CPU alone.
    """
    size, before = beton.decoded_bytes, options.before
    if before == "dali" or (before == "ffcv" and not cuda_path(device)):
        too_big = "not resident, as before"
    else:
        free = resident_set.free_bytes(device)
        too_big = why_not_resident(size, memory_bytes(device), free, device, is_kept=before == "resident")
    if too_big := _first(options.of_all_ranks(too_big)):
        return _choose_decoder(beton, plan, device, options, too_big)
    if before == "resident":
        return before, _AS_BEFORE
    return "resident", f"{size_in_words(size)} decoded fit {RESIDENT_SHARE:.0%} of {device} memory"


def why_not_resident(size: int, total: int, free: int, device: torch.device, *, is_kept: bool = False) -> str:
    """Why `auto` does not keep `size` bytes on a device with that much memory, in words; empty if it does.

    With `is_kept` the run had the set there before, and it may take all free memory.
    """
    in_words, left = f"{size_in_words(size)} decoded", f"{device} has {size_in_words(free)} free"
    if is_kept:
        return f"{in_words}, and {left}" if size > free else ""
    if size > RESIDENT_SHARE * total:
        in_words += f" exceed {RESIDENT_SHARE:.0%} of {device} memory"
        return f"{in_words} (--loader resident takes them: {left})" if 2 * size <= free else in_words
    if size > free:
        return f"{in_words}, and {left}"
    return f"{in_words}, and {left}, of which auto takes at most half" if 2 * size > free else ""


def _choose_decoder(
    beton: Beton, plan: TrainPlan | EvalPlan, device: torch.device, options: LoaderOptions, too_big: str
) -> tuple[str, str]:
    """`choose_backend` for a set that is not resident; `too_big` is the reason in words."""
    if missing := _first(options.of_all_ranks(why_no_dali(device))):
        return "ffcv", f"{too_big}; {missing}"
    if cuda_path(device):
        return "dali", f"{too_big}; decoding on the GPU"
    kinds = ("ffcv", "dali")
    if options.before in kinds:
        return options.before, _AS_BEFORE
    if isinstance(plan, EvalPlan):
        return "dali", f"{too_big}; evaluation"

    def measured_now() -> dict[str, float]:
        return measure({kind: make_backend(kind, beton, plan, device, options) for kind in kinds}, plan, device)

    key = key_of(beton, plan, options.workers, **_versions())
    measured = options.of_all_ranks(kept_or_measured(beton, key, kinds, measured_now))
    if failed := _first(["" if speeds else origin for speeds, origin in measured]):
        return "ffcv", f"{too_big}; {failed}"
    slowest = {kind: min(speeds[kind] for speeds, _ in measured) for kind in kinds}
    in_words = ", ".join(f"{kind} {speed:,.0f} img/s" for kind, speed in slowest.items())
    where = " on the slowest rank" if len(measured) > 1 else ""
    return max(slowest, key=lambda kind: slowest[kind]), f"{too_big}; {measured[0][1]}: {in_words}{where}"


def _versions() -> dict[str, str]:
    try:
        jpeg = turbojpeg.identity()
    except UserError:  # then all images are raw
        jpeg = "no libturbojpeg"
    return {
        "ffcv": f"numba {metadata.version('numba')}, {jpeg}",
        "dali": dali_version(),
    }


def _first(reasons: list[str]) -> str:
    """The first reason that a rank has, with its number; empty if none has one."""
    rank = next((rank for rank, reason in enumerate(reasons) if reason), None)
    if rank is None:
        return ""
    return f"{reasons[rank]} (on rank {rank})" if len(reasons) > 1 else reasons[rank]


def memory_bytes(device: torch.device) -> int:
    """Total memory of the device in bytes; for `cpu` the part of the host's that this process may use."""
    if cuda_path(device):
        return torch.cuda.get_device_properties(device).total_memory
    return resources.memory().total
