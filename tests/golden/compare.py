"""Losses, spectra, scores and checkpoints of two commits, compared bit for bit.

`make compare A=main B=.` trains the same few tiny runs on the CPU by the command lines of both, on one core each. A and
B are commits, or folders that hold a checkout as it stands. What differs is said with its first value, and the exit
code is then 1. A commit's files are kept in data/compare/, with the code that numba compiled for them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
HOME = ROOT / "data" / "compare"
LIMIT_S = 3600.0
"""No case takes so long unless it hangs."""
PROGRAM = Path(__file__).with_name("train_and_wait.py")

TRAIN = """
PROGRAM --device cpu --no-amp --no-compile --workers 2 --model vit_tiny_patch16_224 --img-size 16
--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg --epochs 2
--warmup-epochs 1 --log-interval 1 --checkpoint-hist 2 --seed 7
"""
DIGITS = f"{TRAIN} --data-dir data/digits --dataset digits --batch-size 96 --spec-every 14"
PHOTOS = f"{TRAIN} --data-dir data/photos --batch-size 16 --spec-every 10"
RECIPE = """
--opt adamw --lr 2e-3 --weight-decay 0.05 --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --mixup 0.2 --cutmix 1 --drop-path 0.1
--clip-grad 1 --layer-decay 0.75 --model-ema-decay 0.9 --spec-monitor --spec-topk 4
"""
# Each writes output/NAME. Together they reach every backend, way of mixing and erasing, solver and shape of an update.
CASES = {
    "plain": f"{DIGITS} --no-model-ema --lr 0.1",
    "recipe": f"{DIGITS} {RECIPE}",
    "ffcv": f"{PHOTOS} {RECIPE} --loader ffcv --grad-accum-steps 2 --spec-every 5 --bce-loss --remode rand --recount 2"
    " --spec-split-qkv --spec-interval 2 --train-interpolation bicubic",
    "dali": f"{PHOTOS} --loader dali --aa 3a --mixup 0.8 --mixup-mode elem --erase-first --reprob 0.5 --remode const"
    " --spec-monitor --spec-solver svd --sched step --decay-epochs 1",
    "resident": f"{PHOTOS} {RECIPE} --loader resident --aa original --amp --opt lookahead_adamw --mixup-mode pair"
    " --tta 2 --spec-targets mlp.fc1",
    "two ranks": f"-m torch.distributed.run --standalone --nproc-per-node 2 {DIGITS} {RECIPE} --batch-size 48",
    # Both go on from A's file: what was written by the older code is still read.
    "resumed": f"{DIGITS} {RECIPE} --resume output/resumed/checkpoint-0.pth.tar",
    "validate": "-m lowrank_vit.validate --checkpoint of_a/recipe/last.pth.tar --use-ema --device cpu"
    " --json output/validate/scores.json --per-class output/validate/classes.csv",
    "inference": "-m lowrank_vit.inference data/photos/val --checkpoint of_a/ffcv/last.pth.tar --device cpu"
    " --output output/inference/predictions.csv",
    "analyze": "-m lowrank_vit.analyze_spectrum --checkpoint of_a/recipe/last.pth.tar --full --save-vectors --topk 4"
    " --save-dir output/analyze",
}

OF_THE_MACHINE = """
img_per_s data_wait mfu memory_gb seconds queue_depth decode_ms source resume_key manifest_sha256
""".split()
"""Parts of the names of what says how fast a run was, or follows from the folder that it was in."""
READ = (".jsonl", ".json", ".csv", ".npz", ".pth", ".tar", ".beton")
"""Files whose contents are compared; of others only the names are."""
UNREAD = ("environment.json", ".lock", ".launch")


def tree_of(ref: str) -> Path:
    """The folder with the files of a commit, written once; a folder is its own."""
    if Path(ref).is_dir():
        return Path(ref).resolve()
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*git, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        sys.exit(f"{ref} is neither a folder nor a commit of {ROOT}.")
    tree = HOME / found.stdout.strip()[:12]
    if not tree.exists():
        part = tree.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        archive = subprocess.run([*git, "archive", found.stdout.strip()], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(part)], input=archive.stdout, check=True)
        part.rename(tree)
    return tree


class Side:
    """One of the two: where its code is, and where its runs go."""

    def __init__(self, tree: Path, runs: Path) -> None:
        self.runs, self._log = runs, runs / "all.log"
        self._environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        for folder in ("output", "data"):
            (runs / folder).mkdir(parents=True)
        where = "import lowrank_vit; print(lowrank_vit.__file__)"
        imported = self._run(["-c", where]).strip()
        if not Path(imported).is_relative_to(tree):
            sys.exit(f"Python imports {imported} instead of the code in {tree}.")

    def run(self, name: str) -> Path:
        """Run a case; the folder it wrote."""
        out = self.runs / "output" / name
        if name == "resumed":
            shutil.copytree(self.runs / "of_a" / "recipe", out)
        else:
            out.mkdir()
        line = [str(PROGRAM) if word == "PROGRAM" else word for word in CASES[name].split()]
        self._run([*line, "--output", "output", "--experiment", name] if "--epochs" in line else line)
        return out

    def _run(self, arguments: list[str]) -> str:
        with self._log.open("a") as log:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=self.runs, env=self._environment, stdout=subprocess.PIPE, stderr=log,
                text=True, timeout=LIMIT_S,
            )  # fmt: skip
            log.write(done.stdout)
        if done.returncode:
            sys.exit(
                f"`python {' '.join(arguments)}` of {self.runs.name} ended with {done.returncode}; see {self._log}"
            )
        return done.stdout


def make_photos(folder: Path) -> None:
    """Write train/ and val/ with four classes of small JPEGs, the same each time, of smooth random colours."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 8)):
        for label in range(4):
            (folder / split / f"class{label}").mkdir(parents=True)
            for n in range(count):
                small = Image.fromarray(rng.integers(0, 256, (5, 5 + label, 3)).astype(np.uint8))
                image = small.resize((48 + 4 * label, 40), Image.Resampling.BICUBIC)
                image.save(folder / split / f"class{label}" / f"{n}.jpg", quality=90)


def differences(a: Path, b: Path) -> Iterator[str]:
    """What two folders of results do not have in common; figures of the machine may be anything."""
    files = [{str(path.relative_to(root)): path for path in _files(root)} for root in (a, b)]
    for name in sorted(files[0].keys() | files[1].keys()):
        if name not in files[0] or name not in files[1]:
            yield f"{name}: only in {'A' if name in files[0] else 'B'}"
        elif Path(name).suffix in READ:
            yield from map(f"{name}: ".__add__, _first(_content(files[0][name]), _content(files[1][name])))


def _files(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(UNREAD)]


def _content(path: Path) -> Any:
    """A file as dictionaries, lists, arrays and plain values; of records and rows only what is not of the machine."""
    match path.suffix:
        case (
            ".jsonl"
        ):  # lines of one kind are in order; of two kinds written by two threads, which comes first may vary
            records: dict[str, dict[str, Any]] = {kind: {} for kind in ("train", "eval", "spec")}
            for record in map(json.loads, path.read_text().splitlines()):
                of_kind, name = records.setdefault(record["kind"], {}), f"update {record['update']}"
                of_kind[f"{name}, again" if name in of_kind else name] = _of_the_run(record)
            return records
        case ".json":
            return _of_the_run(json.loads(path.read_text()))
        case ".csv":
            with path.open(newline="") as file:
                return [_of_the_run(row) for row in csv.DictReader(file)]
        case ".npz":
            with np.load(path) as arrays:
                return dict(arrays)
        case ".pth" | ".tar":
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return {name: value for name, value in content.items() if name != "args"}
        case _:
            return np.frombuffer(path.read_bytes(), np.uint8)


def _of_the_run(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not any(part in name for part in OF_THE_MACHINE)}


def _first(a: Any, b: Any) -> Iterator[str]:
    """The first difference, where it is and what is there; nothing if all bits are the same."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in a or name not in b:
                yield f"{name}: only in {'A' if name in a else 'B'}"
                return
            for found in _first(a[name], b[name]):
                yield f"{name}: {found}"
                return
        return
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        yield from _first(dict(enumerate(a)), dict(enumerate(b)))
    elif isinstance(a, (np.ndarray, torch.Tensor)) and isinstance(b, (np.ndarray, torch.Tensor)):
        yield from _first_of_arrays(_array(a), _array(b))
    elif type(a) is not type(b) or not (a == b or (a != a and b != b)):
        yield f"{a!r} and {b!r}{_distance(a, b)}"


def _array(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = (values.float() if values.dtype == torch.bfloat16 else values).numpy(force=True)
    return np.ascontiguousarray(values)


def _first_of_arrays(a: np.ndarray, b: np.ndarray) -> Iterator[str]:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        yield f"{a.dtype}{list(a.shape)} and {b.dtype}{list(b.shape)}"
    elif a.tobytes() != b.tobytes():
        bits = [np.atleast_1d(values).reshape(-1).view(np.uint8).reshape(a.size, -1) for values in (a, b)]
        unequal = np.flatnonzero((bits[0] != bits[1]).any(axis=1))
        n = int(unequal[0])
        x, y = a.reshape(-1)[n].item(), b.reshape(-1)[n].item()
        where = tuple(map(int, np.unravel_index(n, a.shape)))
        yield f"{list(where)}: {x!r} and {y!r}{_distance(x, y)}; {len(unequal):,} of {a.size:,} differ"


def _distance(a: Any, b: Any) -> str:
    if not isinstance(a, (int, float)) or not isinstance(b, (int, float)) or not a:
        return ""
    return f" ({abs(b - a) / abs(a):.1e} of the first)"


def main() -> None:
    """Run all cases on both sides at once, and print what differs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("a", metavar="A", help="a commit or a folder")
    parser.add_argument("b", metavar="B", help="another")
    parser.add_argument("--only", nargs="+", choices=CASES, help="some of the cases")
    options = parser.parse_args()
    trees = {"A": tree_of(options.a), "B": tree_of(options.b)}
    runs = HOME / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    sides = [Side(tree, runs / name) for name, tree in trees.items()]
    for side in sides:
        make_photos(side.runs / "data" / "photos")
        (side.runs / "of_a").symlink_to(sides[0].runs / "output")
    began, is_same = time.monotonic(), True
    print(f"A is {trees['A']}, B is {trees['B']}", flush=True)
    with ThreadPoolExecutor(len(sides)) as pool:
        for name in options.only or CASES:
            a, b = pool.map(lambda side: side.run(name), sides)  # noqa: B023
            is_same = _say(name, a, b) and is_same
    is_same = _say("data", *(side.runs / "data" for side in sides)) and is_same
    print(f"{'identical' if is_same else 'not identical'}, after {time.monotonic() - began:.0f} s; all is in {runs}")
    sys.exit(not is_same)


def _say(name: str, a: Path, b: Path) -> bool:
    found = list(differences(a, b))
    same = f" {len(_files(a))} files identical"
    print(f"{name}:" + ("".join(f"\n  {text}" for text in found) or same), flush=True)
    return not found


if __name__ == "__main__":
    main()
