"""Processes that measure what one rank pays: `python -m benchmarks.scale.probes NAME JSON` prints its costs as JSON.

A cost is {"unit", "samples"}. Times are CPU seconds of the whole process, with "wall" seconds beside them, but for the
few milliseconds in which one thread waits for another: there they are wall seconds.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import SECONDS
from benchmarks.harness.peak_memory import peak_resident_bytes

CPU_SECONDS, MB, DESCRIPTORS = "CPU s", "MB", "descriptors"
ROUNDS, WAITS = 3, 15
"""Repetitions in one process, of work and of waits."""
IMG_SIZE = 32
_BATCHES = 30


class Costs:
    """What was found so far."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def spent(self, name: str) -> Generator[None]:
        """CPU and wall seconds of the block."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        cost = self.found.setdefault(name, {"unit": CPU_SECONDS, "samples": [], "wall": []})
        cost["samples"].append(time.process_time() - cpu)
        cost["wall"].append(time.perf_counter() - wall)

    @contextmanager
    def waited(self, name: str) -> Generator[None]:
        """Wall seconds of a short block. Linux adds another thread's CPU time by the tick, of 1 to 4 ms."""
        begun = time.perf_counter()
        yield
        self.value(name, time.perf_counter() - begun, SECONDS)

    def value(self, name: str, value: float, unit: str) -> None:
        """A number."""
        self.found.setdefault(name, {"unit": unit, "samples": []})["samples"].append(value)

    def private(self, name: str) -> None:
        """What this process keeps in memory for itself now: pages of mapped files, which it may share, do not count."""
        gc.collect()
        self.value(name, private_bytes() / 1e6, MB)


def private_bytes() -> int:
    """The process's private memory: `Anonymous` and `Swap` of /proc/self/smaps_rollup (Linux).

    `Private_*` there also counts pages of files for as long as no other process has mapped them.
    """
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Anonymous:", "Swap:")))


def opening(path: str) -> dict[str, Any]:
    """Open a set and do no more: the first process on a node."""
    from lowrank_vit.data.sets.beton import Beton

    costs = Costs()
    with costs.spent("first_open"):
        Beton(path)
    return costs.found


def rank(path: str, world_size: int, batch_size: int) -> dict[str, Any]:
    """One rank of a training run: open, plan, read, resume, name a sample."""
    from lowrank_vit.data.choose import open_loader
    from lowrank_vit.data.decode.backend import LoaderOptions
    from lowrank_vit.data.sets.beton import Beton
    from lowrank_vit.plan.plans import TrainPlan

    costs = Costs()
    before = peak_resident_bytes()
    with costs.spent("open"):
        beton = Beton(path)
    costs.value("open_peak", (peak_resident_bytes() - before) / 1e6, MB)
    with costs.spent("plan"):
        plan = TrainPlan.of(beton, img_size=IMG_SIZE, batch_size=batch_size, world_size=world_size)
    plan.ids(0)  # compiles
    for epoch in range(1, 1 + ROUNDS):
        with costs.spent("order"):
            plan.ids(epoch)
    costs.private("private_memory")
    loader, _ = open_loader(beton, plan, "cpu", LoaderOptions("ffcv", 1), say=lambda _text: None)
    for name, step in (("first_batch", 0), ("resume", plan.steps_per_epoch // 2)):
        for epoch in range(1 + WAITS):
            costs_of = costs if epoch else Costs()  # the first one compiles
            with costs_of.waited(name):
                batches = loader.batches(epoch, step)
                next(batches)
            _close(batches)
    batches = loader.batches(0)
    next(batches)
    with costs.spent("batches"):
        for _ in zip(range(min(_BATCHES, plan.steps_per_epoch - 1)), batches, strict=False):
            pass
    costs.private("ffcv_memory")
    costs.value("descriptors", len(list(Path("/proc/self/fd").iterdir())) - 1, DESCRIPTORS)
    _close(batches)
    loader.close()
    with costs.spent("naming"):
        beton.describe(beton.num_samples // 2)
    return costs.found


def _close(batches: object) -> None:
    """End an epoch's threads, so that they do not weigh on what is measured next."""
    close: Callable[[], object] | None = getattr(batches, "close", None)
    if close is not None:
        close()


def plans(path: str, worlds: list[int], batch_size: int) -> dict[str, dict[str, Any]]:
    """Plans of a rank of each world, by world: nothing is read and no other process takes part."""
    from lowrank_vit.data.sets.beton import Beton
    from lowrank_vit.plan.plans import EvalPlan, TrainPlan

    beton, found = Beton(path), dict[str, dict[str, Any]]()
    share: dict[str, Any] = {"img_size": IMG_SIZE, "batch_size": batch_size}
    TrainPlan.of(beton, **share).ids(0)
    EvalPlan.of(beton, **share).ids(0)
    for size in worlds:
        costs, of_rank = Costs(), dict[str, Any]({**share, "rank": size - 1, "world_size": size})
        for epoch in range(1, 1 + ROUNDS):
            with costs.spent("plan"):
                plan = TrainPlan.of(beton, **of_rank)
            with costs.spent("order"):
                plan.ids(epoch)
            with costs.spent("eval_plan"):
                EvalPlan.of(beton, **of_rank).ids(0)
        found[str(size)] = costs.found
    return found


def per_class(path: str, num_classes: int, folder: str) -> dict[str, Any]:
    """Validate with --per-class a model with random weights."""
    import timm
    import torch

    model = timm.create_model("test_vit", num_classes=num_classes, img_size=IMG_SIZE)
    weights = Path(folder) / f"weights_{num_classes}.pth"
    torch.save(model.state_dict(), weights)
    words = ["--data", path, "--checkpoint", str(weights), "--model", "test_vit", "--num-classes", str(num_classes)]
    words += ["--img-size", str(IMG_SIZE), "--model-kwargs", f"img_size={IMG_SIZE}", "--loader", "ffcv", "-j", "1"]
    words += ["--device", "cpu", "--trust-labels", "--per-class", str(weights.with_suffix(".csv"))]
    validate = importlib.import_module("lowrank_vit.validate")
    costs, before = Costs(), peak_resident_bytes()
    with costs.spent("per_class"):
        validate.main(words)
    costs.value("per_class_peak", (peak_resident_bytes() - before) / 1e6, MB)
    return costs.found


def command(words: list[str], name: str) -> dict[str, Any]:
    """A command of `data_prep`."""
    main = importlib.import_module("data_prep.__main__").main
    costs = Costs()
    with costs.spent(name):
        main(words)
    return costs.found


PROBES: dict[str, Callable[..., dict[str, Any]]] = {
    "opening": opening,
    "rank": rank,
    "plans": plans,
    "per_class": per_class,
    "command": command,
}


if __name__ == "__main__":
    found = PROBES[sys.argv[1]](**json.loads(sys.argv[2]))
    print("\n" + json.dumps(found))
