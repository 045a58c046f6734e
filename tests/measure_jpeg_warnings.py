"""How far pictures are off when libjpeg warns: mutated photographs beside the intact ones.

    python -m tests.measure_jpeg_warnings [ROUNDS]

Prints the table of docs/data_format.md: for each warning that libturbojpeg gives first, how many mutated files have it,
how many of their pictures are unharmed, how far the others are off (mean absolute difference in grey levels: median and
largest), how many the converter mends and how many of those are off. Then by mutation what is taken though the picture
is off, and what is refused though it is not.
"""

from __future__ import annotations

import random
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.formats import jpeg_segments, turbojpeg
from data_prep.formats.jpeg import BadImageError, ImageOptions, encode_image
from tests.jpeg_damage import KINDS, PRECISE, RUNS, encode, photos, run


@dataclass
class Case:
    """One mutated file."""

    what: str
    kind: str
    warning: str
    off: float
    """Mean absolute difference in grey levels; infinite where there is no picture."""
    verdict: str
    """taken, repaired or damage."""


def warning_of(data: bytes) -> str:
    """The first warning or error, without its numbers; of extraneous bytes whether they are more than two."""
    header = jpeg_segments.read_header(data)
    try:
        if header is None:
            return "no frame header"
        turbojpeg.check(data, header.width, header.height)
    except turbojpeg.JpegDataError as error:
        if found := re.search(r"(\d+) extraneous", str(error)):
            return f"{'1 or 2' if int(found[1]) <= 2 else '3 or more'} extraneous bytes before a marker"
        message = re.sub(r"0x[0-9a-f]{2}|\d[\d.]*", "N", str(error))
        return message.removeprefix("Corrupt JPEG data: ") if error.is_warning else "(an error)"
    return "(none)"


def pixels(data: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    """int64 (height, width, 3), whatever libjpeg warns of; None where it gives up."""
    try:
        return turbojpeg.decode(data, shape[1], shape[0], stop_on_warning=False).astype(np.int64)
    except turbojpeg.JpegDataError:
        return None


def measure(rounds: int, folder: Path) -> list[Case]:
    """Mutate each photograph in every way, `rounds` times."""
    rng, cases = random.Random(0), []
    for photo in photos():
        for kind in KINDS:
            intact = encode(photo, kind)
            right = pixels(intact, (photo.height, photo.width, 3))
            assert right is not None
            mutated = []
            for _ in range(rounds):
                for what in RUNS:
                    mutated.append((what, run(intact, rng, what, int(2 ** rng.uniform(0, 12)))))
                mutated += [(what, change(intact, rng)) for what, (kinds, change) in PRECISE.items() if kind in kinds]
            for what, data in mutated:
                cases.append(_case(what, kind, data, right, folder))
    return cases


def _case(what: str, kind: str, data: bytes, right: np.ndarray, folder: Path) -> Case:
    path = folder / "x.jpg"
    path.write_bytes(data)
    try:
        encoded = encode_image(path, ImageOptions())
        verdict = "repaired" if encoded.repairs else "taken"
    except BadImageError:
        verdict = "damage"
    shown = pixels(data, right.shape)
    off = float("inf") if shown is None else float(np.abs(shown - right).mean())
    return Case(what, kind, warning_of(data), off, verdict)


def main() -> None:
    """Print the tables."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    with tempfile.TemporaryDirectory() as folder:
        cases = measure(rounds, Path(folder))
    by_warning = defaultdict(list)
    for case in cases:
        by_warning[case.warning].append(case)
    titles = "libjpeg's first warning", "files", "unharmed", "the others are off by", "mended", "of these off"
    print(f"| {' | '.join(titles)} |\n" + len(titles) * "|---" + "|")
    for warning, group in sorted(by_warning.items(), key=lambda item: -len(item[1])):
        off = np.array([case.off for case in group if 0 < case.off < float("inf")])
        how_far = f"{np.median(off):.1f}, at most {off.max():.0f}" if len(off) else ""
        mended = [case for case in group if case.verdict == "repaired"]
        counts = len(group), sum(case.off == 0 for case in group), how_far, len(mended), sum(c.off > 0 for c in mended)
        print(f"| {warning} | {' | '.join(map(str, counts))} |")
    _count("Taken or repaired though the picture is off", [c for c in cases if c.verdict != "damage" and c.off])
    _count("Damage though the picture is unharmed", [c for c in cases if c.verdict == "damage" and not c.off])


def _count(title: str, cases: list[Case]) -> None:
    print(f"\n{title}: {len(cases):,}")
    for (warning, what), count in Counter((case.warning, case.what) for case in cases).most_common():
        print(f"  {count:5} {warning}: {what}")


if __name__ == "__main__":
    main()
