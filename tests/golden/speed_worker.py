"""Rounds of one bench with the code of one tree, on demand: see `compare_speed`.

Started with PYTHONPATH=TREE in a process of its own. It reads a line from its standard input for each round and answers
with a figure, the higher the faster. What it drives has the same name in every tree: command lines, the public loader
and monitor, and what stands beside them in their modules.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Round = Callable[[], float]
CORES = str(len(os.sched_getaffinity(0)))
RECIPE = "--aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.8 --cutmix 1.0 --opt adamw --lr 5e-4 --clip-grad 1"
SMALL = "--img-size 16 --model-kwargs patch_size=4 embed_dim=96 depth=4 num_heads=3"
TRAIN = f"--device cpu --no-amp --no-compile --model vit_tiny_patch16_224 --log-interval 5 --warmup-epochs 0 -j {CORES}"


def of(module: str, name: str) -> Any:
    """What a module calls so; from text, since each tree has modules of its own."""
    return getattr(importlib.import_module(module), name)


def prep(*flags: str) -> Round:
    """Images a second of a conversion with its checksums and manifest on the disk."""
    main, out = of("data_prep.__main__", "main"), Path("converted")
    count = sum(1 for _ in Path("photos/train").rglob("*.jpg"))
    argv = ["imagefolder", "--src", "photos/train", "--out", str(out / "set.beton"), "--workers", CORES, *flags]

    def one_round() -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        return _per_second(count, lambda: main(argv))

    return one_round


def loader(kind: str) -> Round:
    """Crops of 224 pixels a second, an epoch a round."""
    choose = importlib.import_module("lowrank_vit.data.choose")
    beton = choose.Beton(Path("jpeg/train.beton"))
    rules = of(choose.TrainPlan.__module__, "TrainRules")()
    plan = choose.TrainPlan(beton.heights, beton.widths, rules, seed=0, img_size=224, batch_size=64)
    device = of("torch", "device")("cpu")
    opened, _ = choose.open_loader(beton, plan, device, choose.LoaderOptions(kind, int(CORES)))
    epochs = itertools.count()

    def drain() -> None:
        for _ in opened.batches(next(epochs)):
            pass

    return lambda: _per_second(plan.steps_per_epoch * plan.batch_size, drain)


def spectral(model: str) -> Round:
    """Refreshes of model and EMA a second: the monitor's, with its files."""
    create_model = of("timm", "create_model")
    home = "lowrank_vit.spectral.watching"
    if importlib.util.find_spec(home) is None:  # so in earlier trees
        home = "lowrank_vit.spectral"
    refreshing = importlib.import_module(f"{home}.refresh")
    name = "SpectralSettings" if hasattr(refreshing, "SpectralSettings") else "Settings"  # so in earlier trees
    settings = getattr(refreshing, name)(cpu_threads=int(CORES))
    make, updates = of(f"{home}.monitor", "SpectralMonitor"), itertools.count()
    of("torch", "manual_seed")(0)
    targets = of("lowrank_vit.spectral.select", "DEFAULT_TARGETS")
    models = create_model(model), create_model(model)
    monitor = make(*models, targets=targets, every=1, store_dir=Path("spectra"), settings=settings)

    def refresh() -> None:
        skipped = -1
        while skipped != monitor.skipped:  # what is recorded may still be being put away, so that the next is skipped
            skipped = monitor.skipped
            monitor.observe(next(updates))
        while not monitor.records():
            time.sleep(0.001)
        assert not monitor.failed

    return lambda: _per_second(1, refresh)


def training(flags: str) -> Round:
    """Images a second by a run's own records, without its start, its first interval and its validation."""
    main, numbers = of("lowrank_vit.train", "main"), itertools.count()
    argv = [*TRAIN.split(), *flags.split(), "--output", "runs"]

    def one_round() -> float:
        name = f"run{next(numbers)}"
        main([*argv, "--experiment", name])
        records = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
        shutil.rmtree(Path("runs", name))
        speeds = [record["img_per_s"] for record in records if record["kind"] == "train"][1:]
        return len(speeds) / sum(1 / speed for speed in speeds)

    return one_round


TINY = "--img-size 128 --model-kwargs patch_size=64 embed_dim=16 depth=1 num_heads=1"
CASES: dict[str, Callable[[], Round]] = {
    "prep": prep,
    "prep-reencode": lambda: prep("--max-side", "400"),
    "loader-ffcv": lambda: loader("ffcv"),
    "loader-dali": lambda: loader("dali"),
    "loader-resident": lambda: loader("resident"),
    # On a CPU the trainer's thread augments; next to no model is behind it, and no resizing before it.
    "augment": lambda: training(f"--data-dir raw --train-crop-mode whole --epochs 2 -b 64 {RECIPE} {TINY}"),
    "step": lambda: training(f"--synthetic --epochs 1 -b 32 --opt adamw --lr 5e-4 --clip-grad 1 {SMALL}"),
    "spectral": lambda: spectral("vit_small_patch16_224"),
    "end-to-end": lambda: training(
        f"--data-dir jpeg --loader dali --epochs 1 -b 32 {RECIPE} --img-size 64 --spec-monitor --spec-every 10"
        " --model-kwargs embed_dim=96 depth=4 num_heads=3"
    ),
}
"""By name, what makes the case."""


def _per_second(count: int, work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return count / (time.perf_counter() - begin)


def main() -> None:
    """Serve rounds until the standard input ends; what the code says on its way goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    one_round = CASES[sys.argv[1]]()
    while sys.stdin.readline():
        print(json.dumps(one_round()), file=answers, flush=True)


if __name__ == "__main__":
    main()
