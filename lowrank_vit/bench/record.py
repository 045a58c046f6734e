"""A machine's record: the tests that ran on it and its benches, as one JSON file and one page of Markdown."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from data_prep.errors import UserError
from lowrank_vit.bench.aims import AIMS, judge


@dataclass(frozen=True)
class Options:
    """Where the parts are, and where the record goes."""

    tests: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `pytest --gpu-record=FILE` wrote."""
    benches: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `bench all --json FILE` wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("docs/benchmarks")
    """Folder for DATE_DEVICE.json and DATE_DEVICE.md."""


def write(options: Options) -> Path:
    """Join the two; returns the page. A part that is missing is said in it. Raises `UserError` if there is neither."""
    tests, benches = _read(options.tests), _read(options.benches)
    known = (benches or tests or {}).get("environment")
    if known is None:
        raise UserError(f"Neither {options.tests} nor {options.benches} is there. Run make gpu-check.")
    device = re.sub(r"[^A-Za-z0-9]+", "-", str(known.get("gpu") or known.get("cpu") or "cpu")).strip("-").lower()
    name = f"{time.strftime('%Y-%m-%d')}_{device}"
    options.out.mkdir(parents=True, exist_ok=True)
    record = {"environment": known, "tests": tests, "benches": benches}
    (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = options.out / f"{name}.md"
    page.write_text(to_markdown(known, tests, benches), encoding="utf-8")
    return page


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a record ({error}). Run make gpu-check again.") from error


def to_markdown(known: dict[str, Any], tests: dict[str, Any] | None, benches: dict[str, Any] | None) -> str:
    """The page: device and versions, tests, aims and what was found, every ratio, and what was not measured."""
    lines = [f"# {known.get('gpu') or known.get('cpu')}", ""]
    shown = (
        "gpu",
        "driver",
        "cuda",
        "cpu",
        "cpu_cores",
        "python",
        "torch",
        "timm",
        "ffcv",
        "nvidia-dali-cuda130",
        "commit",
    )
    lines += ["| | |", "|---|---|", *(f"| {name} | {known[name]} |" for name in shown if known.get(name)), ""]
    lines += ["Made by `make gpu-check`; the samples are in the JSON file beside this page.", "", "## Tests", ""]
    lines += _tests(tests)
    if benches is None:
        return "\n".join([*lines, "", "## Benches", "", "Not measured.", ""])
    verdicts = judge(benches["benches"])
    lines += ["", "## What is to be reached", "", "| bench | what | median | lowest .. highest | aim | reached |"]
    lines += ["|---|---|---|---|---|---|"]
    for verdict in verdicts:
        aim, samples = verdict.aim, verdict.samples
        spread = f"{min(samples):.4g} .. {max(samples):.4g}" if samples else ""
        median = "" if verdict.median is None else f"{verdict.median:.4g}"
        reached = {True: "yes", False: "**no**", None: "not measured"}[verdict.is_reached]
        lines.append(f"| {aim.bench} | {aim.what} | {median} | {spread} | {aim.least:g} | {reached} |")
    for section in ("ratios", "cases"):
        lines += ["", f"## All {section}", "", "| name | median | lowest .. highest | |", "|---|---|---|---|"]
        for name, one in benches[section].items():
            samples = one["samples"]
            row = f"{one['median']:.4g} | {min(samples):.4g} .. {max(samples):.4g} | {one.get('unit', '')}"
            lines.append(f"| `{name}` | {row} |")
    missing = [aim.what for aim in AIMS if aim not in [verdict.aim for verdict in verdicts]]
    missing += [f"{name}: {reason}" for name, reason in benches.get("failed", {}).items()]
    lines += ["", "## Not measured", "", *(f"- {what}" for what in missing or ["nothing was left out"]), ""]
    return "\n".join(lines)


def _tests(tests: dict[str, Any] | None) -> list[str]:
    if tests is None:
        return ["Not run."]
    counts = Counter(str(one["outcome"]) for one in tests["tests"].values())
    lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "."]
    failed = [name for name, one in tests["tests"].items() if one["outcome"] not in ("passed", "skipped")]
    return lines + ([""] + [f"- failed: `{name}`" for name in failed] if failed else [])
