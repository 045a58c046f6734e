"""The bench `spectral`: the solver's accuracy, and its speed beside a plain SVD in the training loop.

"Inline" is what existing code does: float32 `torch.linalg.svd(weight, full_matrices=False)`, layer after layer, for
model
and EMA. Ours computes all values, the first and last 8 vectors of both sides, and their certificates, in float64.
Complete refreshes are compared with an earlier version.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from benchmarks.harness.limits import products_case
from benchmarks.harness.measure import DEFAULT_REPEATS, Case, Result, Samples, environment, measure, nothing
from benchmarks.spectra import refreshes
from benchmarks.spectra.accuracy import TOPK, accuracy_cases, measure_accuracy
from benchmarks.training.monitored import step_cases
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.resources import available_cores
from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets
from lowrank_vit.spectral.solving.solve import stack_by_shape
from lowrank_vit.spectral.watching.refresh import EMA, MODEL, SpectralSettings, Stacks, solve_all

MODELS = {"small": "vit_small_patch16_224", "base": "vit_base_patch16_224"}
LOW_RANK = 8


@dataclass(frozen=True)
class Options:
    """Options of the bench."""

    models: Annotated[tuple[Literal["small", "base"], ...], tyro.conf.arg(metavar="NAME ...")] = ("small", "base")
    """Which ViTs' matrices."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where our code and the other run."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: one for each core)")] = None
    """CPU threads of each."""
    inline_layers: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Time the inline SVD on only so many layers of the model and the EMA: it takes most of the time, and each layer
    takes the same."""
    step: bool = False
    """Also time training steps with and without the monitor. On cuda they are always timed."""
    step_model: str = MODELS["base"]
    """The model of those steps."""
    step_batches: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (64, 256)
    """The batch sizes of those steps."""
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = 100
    """Steps in a block; the monitor refreshes every 10."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = DEFAULT_REPEATS
    """Measured rounds, after one that warms up. Fewer than 5 are a smoke test."""


def run(options: Options, note: Callable[[str], object] = nothing) -> Result:
    """Measure everything; the extra section `accuracy` of the result has an `Accuracy` per case. Raises `UserError`."""
    if not options.models:
        raise UserError("--models names no model; expected small, base or both.")
    given = {
        "threads": (options.threads,),
        "inline-layers": (options.inline_layers,),
        "steps": (options.steps,),
        "step-batches": options.step_batches,
    }
    for flag, values in given.items():
        if any(value is not None and value < 1 for value in values):
            raise UserError(f"--{flag} is {' '.join(map(str, values))}, expected 1 or more.")
    from lowrank_vit.common.devices import pick_device

    device = pick_device(options.device)
    threads = available_cores() if options.threads is None else options.threads
    torch.set_num_threads(threads)
    note("accuracy")
    accuracy = {name: measure_accuracy(name, matrix, threads, device) for name, matrix in accuracy_cases().items()}
    surroundings = environment(device.type)
    cases: dict[str, Case] = {}
    ratios: dict[str, tuple[str, str]] = {}
    of_steps: dict[str, dict[str, list[float]]] = {}
    for name in dict.fromkeys(options.models):
        cases |= _solver_cases(name, threads, device, options.inline_layers)
        ratios[f"gram64_vs_inline_svd_{name}"] = (f"gram64_{name}", f"inline_svd_{name}")
        ratios[f"gram64_share_of_limit_{name}"] = (f"gram64_{name}", f"product_limit_{name}")
    if options.step or device.type == "cuda":
        for batch in options.step_batches:
            without, watched = f"step_{batch}", f"step_{batch}_with_monitor"
            names = without, watched, f"{watched}_but_norms"
            of_batch, figures = step_cases(options.step_model, batch, options.steps, device, names)
            cases |= of_batch
            of_steps[f"batch_{batch}"] = figures
            ratios[f"with_monitor_vs_without_{batch}"] = (watched, without)
            ratios[f"with_monitor_but_norms_vs_without_{batch}"] = (names[2], without)
    of_refreshes = refreshes.cases(threads, device)
    cases |= of_refreshes.cases | _rank_cases(threads, device)
    ratios |= of_refreshes.ratios | {"lowrank_vs_fullrank": ("lowrank", "fullrank")}
    result = measure(
        "spectral", cases, ratios, environment=surroundings, repeats=options.repeats, limits=_LIMITS, note=note
    )
    extra = {"accuracy": {name: asdict(one) | {"passes": one.passes} for name, one in accuracy.items()}}
    extra |= {
        "threads": threads,
        "refreshes": of_steps,
        "fallbacks": of_refreshes.fallbacks,
        "operations": {name: operations(name) for name in options.models},
    }
    return replace(result, ratios=_with_lowest(result.ratios), extra=extra)


def _with_lowest(ratios: Mapping[str, Samples]) -> dict[str, Samples]:
    """The ratios, preceded for each kind by the lowest of its models or batch sizes in each round."""
    lowest = {}
    for kind in ("gram64_vs_inline_svd", "with_monitor_vs_without"):
        of_kind = [ratio.samples for name, ratio in ratios.items() if name.startswith(f"{kind}_")]
        if of_kind:
            lowest[kind] = Samples(tuple(min(samples) for samples in zip(*of_kind, strict=True)))
    return {**lowest, **ratios}


_LIMITS = (
    "gram64_vs_inline_svd and with_monitor_vs_without are the lowest of the models and batch sizes in each round.",
    "The weights are timm's initial ones, of full rank. lowrank_vs_fullrank compares ranks on ViT-B's four shapes; "
    "a matrix whose rank is at least an eighth of the full one takes 1.8 to 2.5 times as long as one of full rank.",
)


def operations(model: str) -> dict[str, float]:
    """Multiplications and additions of one solve of model and EMA, by stage, in 10^9; see `spectral.solving.gram`."""
    width = {"small": 384, "base": 768}[model]
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    count, m = 2 * 12, 2 * TOPK
    long = sum(max(shape) for shape in shapes)
    stages = {
        "gram": long * width**2,
        "tridiagonal": 4 * 4 / 3 * width**3,
        "values": 4 * 30 * width**2,
        "vectors": 4 * 4 * width**2 * m,
        "refinement": 4 * long * width * m,
    }
    return {stage: count * flops / 1e9 for stage, flops in stages.items()}


def _solver_cases(name: str, threads: int, device: torch.device, inline_layers: int) -> dict[str, Case]:
    stacks = stacks_of(MODELS[name], device)
    # A stack has one kind of matrix from all layers, so a part of each stack keeps the mixture of shapes.
    inline_weights = [w for of_kind in stacks.values() for stack in of_kind for w in stack.matrices_NRC[:inline_layers]]
    settings = SpectralSettings(TOPK, cpu_threads=threads)
    count, unit = sum(len(stack.names) for of_kind in stacks.values() for stack in of_kind), "matrices/s"

    def inline() -> None:
        for weight in inline_weights:
            torch.linalg.svd(weight, full_matrices=False)
        _wait(device)

    def gram64() -> None:
        for of_kind in stacks.values():
            solve_all(of_kind, settings)
        _wait(device)

    where = f"{threads} threads" if device.type == "cpu" else "the GPU"
    flops = 1e9 * sum(operations(name).values()) / count
    return {
        f"inline_svd_{name}": Case(
            inline, len(inline_weights), unit, f"float32 torch.linalg.svd of {len(inline_weights)} of {MODELS[name]}'s "
            f"{count} matrices (model and EMA) one by one, full_matrices=False, on {where}", peer=True,
        ),
        f"gram64_{name}": Case(
            gram64, count, unit, f"all of them in float64: all values, {TOPK} vectors of each end, certificates"
        ),
        f"product_limit_{name}": products_case(flops, count, unit, device, torch.float64),
    }  # fmt: skip


def _rank_cases(threads: int, device: torch.device) -> dict[str, Case]:
    """One matrix of each of ViT-B's shapes: with normal entries, and as a float32 product of rank 8."""
    generator = torch.Generator().manual_seed(0)
    settings = SpectralSettings(TOPK, cpu_threads=threads)

    def drawn(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator)

    def case(of: Callable[[int, int], Tensor], what: str) -> Case:
        stacks = stack_by_shape({str(shape): of(*shape).to(device) for shape in refreshes.SHAPES.values()})

        def run() -> None:
            solve_all(stacks, settings)
            _wait(device)

        return Case(run, len(refreshes.SHAPES), "matrices/s", f"one matrix of each of ViT-B's shapes, {what}")

    return {
        "fullrank": case(drawn, "normal entries"),
        "lowrank": case(lambda rows, cols: drawn(rows, LOW_RANK) @ drawn(LOW_RANK, cols), f"of rank {LOW_RANK}"),
    }


def stacks_of(model: str, device: torch.device) -> Stacks:
    """Initial weights of the model, and of a second draw as its EMA, selected and stacked as by the monitor."""
    import timm

    # The global generator is restored for the caller.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds: dict[str, nn.Module] = {kind: timm.create_model(model).to(device) for kind in (MODEL, EMA)}
    chosen = {kind: select_targets(dict(one.named_parameters()), DEFAULT_TARGETS) for kind, one in kinds.items()}
    return {kind: stack_by_shape(weights) for kind, weights in chosen.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
