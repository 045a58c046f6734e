"""Mutated `.beton` files through every backend, training and evaluation: a clean error or the right pixels, always.

    python -m tests.fuzz_beton --count 5000 --state FILE        takes up where it stopped, and keeps count
    python -m tests.fuzz_beton --only 17                        one mutation, told in full

Each file is read in a child that is forked after the imports and after compiling, but before any thread has worked, so
that a crash, a hang or a growing heap costs that child only. Untouched samples must have the very pixels that they have
in the intact file. Others must have those that Pillow or libjpeg makes of their bytes, twice, with fresh memory filled
with another pattern each time; a sample that no decoder can read must not come at all.
"""

# ruff: noqa: E402  numba's threads are chosen before ffcv is imported, which starts them
from __future__ import annotations

import argparse
import ctypes
import json
import os
import pickle
import resource
import select
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numba
import numpy as np

numba.config.THREADING_LAYER = "forksafe"  # type: ignore[attr-defined]  # before ffcv is imported, which starts it

import torch
from ffcv.libffcv import imdecode
from PIL import Image
from sklearn.datasets import load_sample_images

from data_prep.convert import _convert
from data_prep.formats import turbojpeg
from data_prep.formats.beton import MIN_PAGE_SIZE, MODE_RAW
from data_prep.formats.jpeg import LOSSLESS, encode_file
from data_prep.formats.sidecars import manifest_path
from data_prep.sources.image_folder import image_folder
from lowrank_vit.common.errors import BetonError, UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode import pil as pil_decode
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.decode.ffcv import decode_batch
from lowrank_vit.data.decode.resize_cpu import resize_batch
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import BatchPlan, EvalPlan, TrainPlan, TrainRules
from tests.mutations import KINDS, Mutated, header_of, mutate, rows_of, table_of
from tests.photos import BACKENDS, psnr

MODES = ("training", "evaluation")
SETS = ("mixed", "jpeg", "raw")
IMG_SIZE, BATCH, CPU = 16, 4, torch.device("cpu")
LIMIT_S, LIMIT_BYTES = 60.0, 10**9
"""Of a child: wall-clock time, and peak memory above that of reading the intact file."""
LIKE_DB = 18.0
"""PSNR of one decoder's picture against another's of the same damaged bytes; memory never written has about 8."""
GOOD = ("refused", "damaged", "intact", "as decoded")
"""An error at opening; an error or a line that names the sample; the intact file's pixels; those of the new bytes."""
BAD = ("traceback", "garbage", "uninitialised", "crash", "hang", "memory")
_M_PERTURB = -6  # of mallopt(3)


def write_set(root: Path, kind: str) -> Path:
    """A dozen small images: JPEGs of several sizes (baseline and progressive), raw pixels of one size, or both."""
    src = root / kind
    for label, name in enumerate(("flower", "temple")):
        (src / name).mkdir(parents=True)
        photo = load_sample_images().images[label]
        for n in range(6):
            height, width = (48, 64) if kind != "mixed" else (40 + 9 * n, 96 - 8 * n)
            image = Image.fromarray(photo[90 * label + 20 * n :][:height, 40 * n :][:, :width])
            if kind == "raw" or (kind == "mixed" and n > 3):
                image.save(src / name / f"{n}.png")
            else:
                image.save(src / name / f"{n}.jpg", quality=85, progressive=n == 3)
    source = image_folder(src)
    out = root / f"{kind}.beton"
    _convert(source, out, lambda s: encode_file(s, src, LOSSLESS), {}, page_size=MIN_PAGE_SIZE, source_stat=None)
    return out


@dataclass
class Seen:
    """What came out of one reading of a file."""

    verdict: str
    words: str
    pixels: dict[int, np.ndarray]
    plans: dict[int, tuple[BatchPlan, int]]


def read(path: Path, backend: str, mode: str, *, skip: bool) -> Seen:
    """Read all of a file: its pixels by sample, or how it failed."""
    seen = Seen("read", "", {}, {})
    said: list[str] = []
    try:
        beton = Beton(path)
        plan: Any = EvalPlan(beton.heights, beton.widths, img_size=IMG_SIZE, crop_pct=0.9, batch_size=BATCH)
        if mode == "training":
            rules, batch = TrainRules(scale=(0.3, 1.0)), min(BATCH, beton.num_samples)
            plan = TrainPlan(beton.heights, beton.widths, rules, seed=5, img_size=IMG_SIZE, batch_size=batch)
        options = LoaderOptions(backend, 2, on_bad_sample="skip" if skip else "error")
        seen.verdict = "opened"
        loader, _ = open_loader(beton, plan, CPU, options, say=said.append)
        for batch in loader.batches(0):
            if batch.targets.min() < 0 or batch.targets.max() >= beton.num_classes:
                raise AssertionError("a label beyond the classes came through")
            for n, sample_id in enumerate(batch.plan.ids.tolist()):
                seen.pixels[sample_id] = batch.images[n].permute(1, 2, 0).numpy().copy()
                seen.plans[sample_id] = batch.plan, n
        loader.close()
        seen.verdict = "read"
    except UserError as error:
        seen.verdict, seen.words = "refused" if seen.verdict == "read" else "damaged", str(error)
        if isinstance(error, BetonError) and "though Pillow decodes" in seen.words:
            seen.words = f"DALI alone failed: {seen.words}"
    except Exception as error:
        seen.verdict, seen.words = "traceback", f"{type(error).__name__}: {error}"
    if seen.verdict == "read" and any("left out as damaged" in line for line in said):
        seen.verdict, seen.words = "damaged", "; ".join(said)
    return seen


def judge(
    path: Path, backend: str, mode: str, touched: set[int], expected: dict[int, np.ndarray], *, skip: bool
) -> tuple[str, str]:
    """The verdict on reading a mutated file, with a reason."""
    perturb(0x5A)
    seen = read(path, backend, mode, skip=skip)
    changed = []
    for sample_id, pixels in seen.pixels.items():
        if sample_id in expected and np.array_equal(pixels, expected[sample_id]):
            continue
        if sample_id not in touched:
            return "garbage", f"sample {sample_id} was not touched, but has other pixels"
        changed.append(sample_id)
    if changed and seen.verdict != "traceback":
        beton = Beton(path)
        for sample_id in changed:
            if why := _differs(beton, sample_id, *seen.plans[sample_id], seen.pixels[sample_id]):
                return "garbage", f"sample {sample_id}: {why}"
        perturb(0xC3)
        again = read(path, backend, mode, skip=skip).pixels
        for sample_id in changed:
            if sample_id not in again or not np.array_equal(again[sample_id], seen.pixels[sample_id]):
                return "uninitialised", f"sample {sample_id} has other pixels when it is read again"
    if seen.verdict == "read":
        return ("as decoded" if changed else "intact"), seen.words
    return seen.verdict, seen.words


def _differs(beton: Beton, sample_id: int, plan: BatchPlan, n: int, pixels: np.ndarray) -> str:
    """Why these cannot be the pixels of the sample's bytes, or an empty string."""
    stored, (height, width) = beton.sample(sample_id), (int(beton.heights[sample_id]), int(beton.widths[sample_id]))
    references = []
    try:
        references.append(pil_decode.decode(beton, sample_id))
    except ValueError as error:
        reason = str(error)
        if turbojpeg.size_at(stored.ctypes.data, len(stored)) != (height, width):
            return f"it came though no decoder can read it ({reason})"
    else:
        reason = ""
    if beton.modes[sample_id] != MODE_RAW:
        try:  # a decoder that goes on where Pillow gives up
            references.append(turbojpeg.decode(stored.tobytes(), width, height, stop_on_warning=False))
        except turbojpeg.JpegDataError as error:
            reason = reason or str(error)
        # The fast DCT, with which ffcv trains, overflows where damage has made coefficients that no encoder writes.
        fast = np.zeros((height, width, 3), np.uint8)
        if imdecode(np.array(stored), fast, height, width, height, width) == 0:
            references.append(fast)
    if not references:
        return f"it came though no decoder can read it ({reason})"
    best = max(psnr(pixels, pil_decode.crop_and_resize(reference, plan, n, IMG_SIZE)) for reference in references)
    return "" if best >= LIKE_DB else f"its pixels are far from those of its bytes (PSNR {best:.1f} dB)"


def perturb(pattern: int) -> None:
    """Have glibc fill memory that it hands out with the complement of `pattern`, and memory given back with it."""
    ctypes.CDLL(None).mallopt(_M_PERTURB, pattern)


@dataclass
class Child:
    """How a forked child ended."""

    verdict: str
    """"", or crash, hang, memory."""
    words: str
    answer: Any
    peak_bytes: int


def in_child(
    work: Callable[[], Any], errors: Path, *, limit_s: float = LIMIT_S, limit_bytes: float = float("inf")
) -> Child:
    """Do `work` in a fork of this process, with `errors` for stderr, and bring its answer back."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of threads that a fork leaves behind
        child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent ends it, or lets it finish
            with errors.open("wb") as file:  # decoders talk a lot
                os.dup2(file.fileno(), 2)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            answer = pickle.dumps(work())
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(70)
    os.close(writing)
    end, chunks, verdict = time.monotonic() + limit_s, [], ""
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while not verdict:
            if select.select([pipe], [], [], 0.1)[0]:
                if not (chunk := pipe.read(1 << 20)):
                    break
                chunks.append(chunk)
            elif time.monotonic() > end:
                verdict = "hang"
            elif _resident_bytes(child) > limit_bytes + LIMIT_BYTES:  # it may take the whole machine with it
                verdict = "memory"
        if verdict:
            os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    peak = usage.ru_maxrss * 1024
    if verdict:
        return Child(verdict, f"after {limit_s} s" if verdict == "hang" else "", None, peak)
    if status != 0:
        last = errors.read_text(errors="replace")[-200:]
        return Child("crash", f"status {os.waitstatus_to_exitcode(status)}: {last}", None, peak)
    if peak > limit_bytes:
        return Child("memory", f"peak {peak / 1e6:,.0f} MB, allowed {limit_bytes / 1e6:,.0f}", None, peak)
    return Child("", "", pickle.loads(b"".join(chunks)), peak)


def _resident_bytes(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


class Fuzz:
    """The intact sets with the pixels that every backend makes of them, and the mutations of a seed."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.errors = root, seed, root / "stderr"
        torch.set_num_threads(1)
        self.paths = {kind: write_set(root, kind) for kind in SETS}
        self.intact = {kind: path.read_bytes() for kind, path in self.paths.items()}
        self.manifests = {kind: manifest_path(path).read_bytes() for kind, path in self.paths.items()}
        _compile(self.paths["mixed"])
        keys = [(backend, mode) for backend in BACKENDS for mode in MODES]
        self.expected: dict[str, dict[tuple[str, str], dict[int, np.ndarray]]] = {}
        self.peak: dict[str, int] = {}
        for kind, path in self.paths.items():
            child = in_child(lambda path=path: {key: read(path, *key, skip=False) for key in keys}, self.errors)
            assert child.answer, f"{kind}: the intact file cannot be read: {child}"
            for key, seen in child.answer.items():
                assert seen.verdict == "read", f"{kind}, {key}: the intact file cannot be read: {seen.words}"
            self.expected[kind] = {key: seen.pixels for key, seen in child.answer.items()}
            self.peak[kind] = child.peak_bytes

    def run(self, number: int) -> tuple[Mutated, dict[str, tuple[str, str]]]:
        """The verdict of each reading of the mutation, or of the whole child, and a reason."""
        kind = SETS[number // len(KINDS) % len(SETS)]
        file = mutate(self.intact[kind], self.manifests[kind], self.seed, number)
        path = self.root / "mutated.beton"
        path.write_bytes(file.content)
        manifest_path(path).unlink(missing_ok=True)
        if file.manifest is not None:
            manifest_path(path).write_bytes(file.manifest)
        touched, skip = _touched(self.intact[kind], file.content), bool(number % 2)

        def work() -> dict[str, tuple[str, str]]:
            return {
                f"{backend}, {mode}": judge(path, backend, mode, touched, self.expected[kind][backend, mode], skip=skip)
                for mode in MODES
                for backend in BACKENDS
            }

        child = in_child(work, self.errors, limit_bytes=self.peak[kind] + LIMIT_BYTES)
        return file, child.answer or {"child": (child.verdict, child.words)}


def _compile(path: Path) -> None:
    """Compile what every child would have to, without running it: a thread that has worked does not survive a fork."""
    beton = Beton(path)
    for plan in (
        EvalPlan(beton.heights, beton.widths, img_size=IMG_SIZE, crop_pct=0.9, batch_size=BATCH),
        TrainPlan(beton.heights, beton.widths, TrainRules(), seed=5, img_size=IMG_SIZE, batch_size=BATCH),
    ):
        plan.batch(0, 0, plan.ids(0)[0])
    import_module("nvidia.dali.fn")  # once here, else by every child
    ids, images = np.zeros(1, np.int64), np.zeros((1, IMG_SIZE, IMG_SIZE, 3), np.uint8)
    planned = np.zeros((1, 2, 4)), np.zeros(1, np.int8), np.zeros(1, bool)
    arguments = beton.bytes, ids, ids, beton.modes, ids, ids, *planned, 0, 2, images
    decode_batch.compile(tuple(map(numba.typeof, arguments)))
    resize_batch.compile(tuple(map(numba.typeof, (ids, ids, ids, *planned, images))))


def _touched(intact: bytes, mutated: bytearray) -> set[int]:
    """The samples whose row (but for the address and the label) or stored bytes are not those of the intact file."""
    touched = set(range(10**4))
    try:
        rows, table = rows_of(mutated), table_of(mutated)
    except (ValueError, OverflowError):  # the header does not lead to them
        return touched
    old_rows, old_table = rows_of(intact), table_of(intact)
    assert int(header_of(intact)["num_samples"][0]) == len(old_rows)
    where = {int(entry["sample_id"]): entry for entry in table}
    for i in range(min(len(rows), len(old_rows))):
        if i not in where:
            continue
        new, old = where[i], old_table[i]
        stored = bytes(mutated[int(new["ptr"]) : int(new["ptr"]) + int(new["size"])])
        is_same = stored == intact[int(old["ptr"]) : int(old["ptr"]) + int(old["size"])]
        of_row = ("mode", "height", "width")
        if is_same and all(rows["image"][name][i] == old_rows["image"][name][i] for name in of_row):
            touched.discard(i)
    return touched


def main() -> None:
    """Run mutations up to `--count`, or `--only` one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="mutations in all, those of earlier runs included")
    parser.add_argument("--state", type=Path, help="where the count and all findings are kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this mutation alone and tell all about it")
    options = parser.parse_args()
    state: dict[str, Any] = {
        "seed": options.seed,
        "done": 0,
        "valid_checksum": 0,
        "readings": {},
        "kinds": {},
        "bad": [],
    }
    if options.state and options.state.exists():
        state = json.loads(options.state.read_text())
        assert state["seed"] == options.seed, f"{options.state} is of seed {state['seed']}"
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as scratch:
        fuzz = Fuzz(Path(scratch), options.seed)
        if options.only is not None:
            file, verdicts = fuzz.run(options.only)
            print(file.kinds, "valid checksum" if file.has_valid_checksum else "", *verdicts.items(), sep="\n")
            return
        while state["done"] < options.count and not stopped:
            _count(state, state["done"], *fuzz.run(state["done"]))
            if state["done"] % 20 == 0 or state["done"] == options.count or stopped:
                _keep(options.state, state)
            if state["done"] % 100 == 0:
                print(f"{state['done']:,} of {options.count:,}, bad: {len(state['bad'])}", flush=True)
    print(f"{state['done']:,} mutations, {state['valid_checksum']:,} of them with a valid checksum of the index")
    print("readings:", ", ".join(f"{n:,} {verdict}" for verdict, n in sorted(state["readings"].items())))
    for bad in state["bad"]:
        print(f"mutation {bad['number']} ({', '.join(bad['kinds'])}): {bad['where']}: {bad['verdict']}: {bad['words']}")
    sys.exit(bool(state["bad"]))


def _count(state: dict[str, Any], number: int, file: Mutated, verdicts: dict[str, tuple[str, str]]) -> None:
    state["done"] = number + 1
    state["valid_checksum"] += file.has_valid_checksum
    state["readings"] = dict(Counter(state["readings"]) + Counter(verdict for verdict, _ in verdicts.values()))
    state["kinds"] = dict(Counter(state["kinds"]) + Counter(file.kinds))
    for where, (verdict, words) in verdicts.items():
        if verdict not in GOOD:
            found = {"number": number, "kinds": file.kinds, "where": where, "verdict": verdict, "words": words[:300]}
            state["bad"].append(found)
            print(f"mutation {number} ({', '.join(file.kinds)}): {where}: {verdict}: {words[:300]}", flush=True)


def _keep(path: Path | None, state: dict[str, Any]) -> None:
    if path is not None:
        new = path.with_name(f".{path.name}.new")
        new.write_text(json.dumps(state, indent=1))
        new.replace(path)


if __name__ == "__main__":
    main()
