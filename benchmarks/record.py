"""A machine's record: its tests and benches, as one JSON file and one page of Markdown.

The page tells what was measured, how, and what was not.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import tyro

from benchmarks.all_benches import settings_of_peers
from benchmarks.harness.aims import AIMS, judge
from benchmarks.training.budget import rows_of
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.files import write_whole

VERSIONS = ("torch", "torchvision", "timm", "ffcv", "nvidia-dali-cuda130", "spdl", "opencv-python", "pillow", "numpy")
MAX_NAME = 110
"""Characters of a kernel's name on the page; the JSON has the full name."""
MACHINE = (
    *("gpu", "gpu_memory_gib", "power_limit_w", "driver", "cuda", "cudnn"),
    *("cpu", "cpu_cores", "threads", "memory_gib", "load_average_1min", "python"),
)
NOT_RUN = "not run"
"""The outcome of a test that the tests' time did not reach."""
PEAKS = ("peak_memory_gib", "peak_gpu_memory_gib")


def to_markdown(known: Mapping[str, Any], tests: dict[str, Any] | None, benches: dict[str, Any] | None) -> str:
    """Machine and versions, tests, aims and what was found, each bench's work, every figure, and what is missing.

    `known` is the environment; each of the other two may be absent, or lack any of its sections.
    """
    shown = (*MACHINE, *VERSIONS, "commit")
    rows = [[name, known[name]] for name in shown if known.get(name)]
    lines = [f"# {known.get('gpu') or known.get('cpu') or 'An unknown machine'}", "", *_table(["", ""], rows)]
    lines += ["", "Made by `make gpu-check`; the samples are in the JSON file beside this page."]
    if benches and benches.get("form") == "tiny":
        lines += ["", "**A rehearsal in tiny sizes: its figures mean nothing.**"]
    lines += ["", "## Tests", "", *_tests(tests)]
    if benches is None:
        lines += ["", "## Benches", "", "Not measured."]
    else:
        lines += _benches(benches, tests)
    lines += ["", "## Not measured", ""]
    missing = not_measured(known, tests, benches)
    return "\n".join([*lines, *(f"- {what}" for what in missing or ["nothing was left out"]), ""])


def not_measured(
    known: Mapping[str, Any], tests: Mapping[str, Any] | None, benches: Mapping[str, Any] | None
) -> list[str]:
    """Aims without a figure, failed benches and cases, and skipped tests, each with the reason if known."""
    content = benches or {}
    device = _device(known, content)
    results, failed = content.get("benches", {}), content.get("failed", {})
    found = []
    for aim in AIMS:
        if not aim.is_for(device):
            if device == "cpu":
                found.append(f"{aim.bench}: {aim.what} (aim {aim.goal:g}): needs a GPU")
            continue
        (verdict,) = judge({aim.bench: results.get(aim.bench, {})}, device, [aim])
        if verdict.median is None:
            reason = "its bench failed, see below" if aim.bench in failed else "" if aim.bench in results else "not run"
            found.append(f"{aim.bench}: {aim.what} (aim {aim.goal:g}){': ' if reason else ''}{reason}")
    found += [f"{name}: {_plain(reason)}" for name, reason in failed.items()]
    for name, one in _outcomes(tests).items():
        if one.get("outcome") == "skipped":
            found.append(f"test `{name}`: {_plain(one.get('message') or 'skipped without a reason')}")
        elif one.get("outcome") == NOT_RUN:
            found.append(f"test `{name}`: not run, since the tests ended before")
    return found


def _device(known: Mapping[str, Any], benches: Mapping[str, Any]) -> str:
    said = benches.get("device") or known.get("device") or ""
    return "cuda" if str(said).startswith("cuda") else "cpu"


def _outcomes(tests: Mapping[str, Any] | None) -> Mapping[str, Mapping[str, Any]]:
    return (tests or {}).get("tests") or {}


def _tests(tests: Mapping[str, Any] | None) -> list[str]:
    if tests is None:
        return ["Not run."]
    outcomes = _outcomes(tests)
    if not outcomes:
        return ["None ran: pytest found no test, or ended before the first."]
    counts = Counter(str(one.get("outcome")) for one in outcomes.values())
    lines = [", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items())) + "."]
    fine = ("passed", "skipped", NOT_RUN)
    failed = {name: one for name, one in outcomes.items() if one.get("outcome") not in fine}
    for name, one in outcomes.items():
        if figures := one.get("figures"):
            lines += ["", f"`{name}`: {_plain(', '.join(f'{what} {value}' for what, value in figures.items()))}."]
    return lines + ([""] + [f"- failed: `{name}`{_last_line(one)}" for name, one in failed.items()] if failed else [])


def _last_line(outcome: Mapping[str, Any]) -> str:
    """A failure's error from pytest's message, otherwise its last line."""
    lines = [line for line in str(outcome.get("message") or "").splitlines() if line.strip()]
    errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
    told = (errors or lines[-1:] or [""])[0]
    return f": {_plain(told[:300])}" if told else ""


def _benches(benches: Mapping[str, Any], tests: Mapping[str, Any] | None) -> list[str]:
    results, seconds = benches.get("benches", {}), benches.get("seconds", {})
    rows = []
    wanted = {name: results.get(name, {}) for name in benches.get("wanted", results)}
    for verdict in judge(wanted, _device({}, benches)):
        aim = verdict.aim
        median = "" if verdict.median is None else f"{verdict.median:.4g}"
        reached = {True: "yes", False: "**no**", None: "not measured"}[verdict.is_reached]
        rows.append([aim.bench, aim.what, median, _spread(verdict.samples), f"{aim.goal:g}", reached])
    lines = ["", "## What is to be reached", ""]
    lines += _table(["bench", "what", "median", "lowest .. highest", "aim", "reached"], rows)
    rows = [
        [name, f"{taken:.0f}", _workload(one := results.get(name, {})), one.get("attention", ""), _decoding(one),
         one.get("bottleneck", ""), *(one.get(peak, "") for peak in PEAKS)]
        for name, taken in seconds.items()
    ]  # fmt: skip
    lines += ["", "## The benches", ""]
    headings = ["bench", "seconds", "work", "attention", "decoding", "bottleneck"]
    lines += _table([*headings, "peak memory, GiB", "of the GPU, GiB"], rows)
    lines += _runs(results)
    lines += _surroundings({**({"the tests": tests} if tests else {}), **results})
    lines += _kernels(results)
    lines += ["", "## How the peers were set", ""]
    lines += _table(["case", "setting"], [[f"`{name}`", text] for name, text in settings_of_peers(results).items()])
    for section in ("ratios", "cases"):
        rows = [
            [f"`{name}`", f"{one['median']:.4g}", _spread(one["samples"]), one.get("unit", ""), _cpu(one)]
            for name, one in benches.get(section, {}).items()
        ]
        cpu = "by CPU time" if section == "ratios" else "CPU ms an item"
        lines += ["", f"## All {section}", "", *_table(["name", "median", "lowest .. highest", "", cpu], rows)]
    return lines


def _surroundings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The surroundings of tests and benches, if they are not all of one commit and machine."""
    found = {
        name: ", ".join(f"{key} {known[key]}" for key in ("commit", "gpu", "torch") if known.get(key))
        for name, result in results.items()
        if (known := result.get("environment"))
    }
    if len(set(found.values())) < 2:
        return []
    return ["", "These are not of one commit and machine:", "", *(f"- {name}: {what}" for name, what in found.items())]


_PROFILED = {
    "step": "a step on a batch that stays",
    "timm_step": "timm's step",
    "end_to_end": "a step of a run with data",
}
"""Titles of the tables of kernels."""
_OF_BUDGET = {"timm": "timm_step", "ours": "step"}
"""The profiled columns of the budget, and their profiles."""


def _kernels(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of kernels for each profile."""
    lines = []
    for result in results.values():
        load = result.get("workload") or {}
        model = load.get("model", "")
        for what, table in (result.get("kernels") or {}).items():
            title = _PROFILED.get(what, what)
            is_cuda = str(result.get("environment", {}).get("device", "")).startswith("cuda")
            of = "kernels of the device" if is_cuda else "torch's operators on the host"
            lines += ["", f"## Where the time goes: {model}, {title}", ""]
            took = f"A step takes {table['step_ms']:.4g} ms by the clock, and has {table['ms']:.4g} ms of {of}"
            runs = f" in {table['runs']:,.0f} runs" if "runs" in table else ""
            lines += [f"{took}{runs} (a profile of {table['steps']} steps).", ""]
            rows = [
                [f"`{row['name'][:MAX_NAME]}`", f"{row['ms']:.3f}", f"{row['runs']:.4g}", f"{row['share']:.1%}"]
                for row in table["rows"]
            ]
            lines += _table(["name", "ms a step", "runs a step", "share of the step"], rows)
            if table.get("others"):
                lines += ["", f"{table['others']} others took less."]
        if columns := result.get("budget"):
            lines += ["", f"## The budget of a step: {model}, batch {load['batch_size']}, ms", ""]
            found = result.get("kernels") or {}
            clock = {name: found[what]["step_ms"] for name, what in _OF_BUDGET.items() if what in found}
            lines += _table(["", *columns], rows_of(columns, load["batch_size"], clock))
    return lines


def _workload(result: Mapping[str, Any]) -> str:
    """The workload of a training bench; for other benches, their batch and image sizes."""
    given = result.get("workload")
    if not isinstance(given, dict):
        names = ("recipe", "batch_size", "img_size", "times", "workers", "threads")
        given = {name: result[name] for name in names if name in result}
        if "source" in result:
            given = {"images": result["source"].get("images"), **given}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def _decoding(result: Mapping[str, Any]) -> str:
    """The backend, its share of the GPU's decoder, and the number of threads."""
    of_run = result.get("loader")
    if isinstance(of_run, dict):
        return (
            f"{of_run.get('backend')}, hw_decoder_load {of_run.get('hw_decoder_load')}, workers {of_run.get('workers')}"
        )
    return f"hw_decoder_load {result['hw_decoder_load']}" if "hw_decoder_load" in result else ""


def _runs(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The runs' own descriptions, one for each model."""
    found = dict.fromkeys(tuple(result["description"]) for result in results.values() if result.get("description"))
    return ["", "The runs:", "", *(f"- {_plain('; '.join(lines))}" for lines in found)] if found else []


def _cpu(one: Mapping[str, Any]) -> str:
    """The median by CPU time; empty for a record without it."""
    return f"{median(one['cpu']) * (1e3 if 'unit' in one else 1):.4g}" if one.get("cpu") else ""


def _spread(samples: Sequence[float]) -> str:
    return f"{min(samples):.4g} .. {max(samples):.4g}" if samples else ""


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    if not rows:
        return ["Nothing."]
    return [f"| {' | '.join(_plain(cell) for cell in row)} |" for row in (headings, ["---"] * len(headings), *rows)]


def _plain(text: object) -> str:
    """The text in one line, with escaped `|`."""
    return " ".join(str(text).split()).replace("|", "\\|")


@dataclass(frozen=True)
class Options:
    """The parts of a record, and where it goes."""

    tests: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `pytest --gpu-record=FILE` wrote."""
    benches: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `bench all --json FILE` wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("docs/benchmarks")
    """Folder for DATE_DEVICE.json and DATE_DEVICE.md; a second record of a day has its commit in the name as well."""


def write(options: Options, page: Path | None = None) -> Path:
    """Join both parts; returns the page, which names a missing part. Raises `UserError` if both are missing.

    `page`: the same record's page, which is rewritten (default: a new page).
    """
    tests, benches = read_part(options.tests), read_part(options.benches)
    if tests is None and benches is None:
        raise UserError(f"Neither {options.tests} nor {options.benches} exists. Run make gpu-check.")
    known = next((part["environment"] for part in (benches, tests) if part and part.get("environment")), {})
    page = page or _unused(options.out, known)
    record = {"environment": known, "tests": tests, "benches": benches}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        write_whole(page.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        write_whole(page, to_markdown(known, tests, benches))
    except OSError as error:
        raise UserError(f"{page} cannot be written: {error.strerror}. Choose --out.") from error
    return page


def _unused(out: Path, known: dict[str, Any]) -> Path:
    """A new page's path: earlier figures are kept for comparison."""
    stem = f"{time.strftime('%Y-%m-%d')}_{_file_word(known.get('gpu') or known.get('cpu') or 'cpu')}"
    later = f"{stem}_{_file_word(known['commit'])}" if known.get("commit") else stem
    for name in chain([stem, later], (f"{later}_{n}" for n in count(2))):
        if not any((out / f"{name}{suffix}").exists() for suffix in (".md", ".json")):
            return out / f"{name}.md"
    raise AssertionError("counting has no end")


def _file_word(text: object) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", str(text)).strip("-").lower()


def read_part(path: Path) -> dict[str, Any] | None:
    """The JSON of `pytest --gpu-record` or of `all`; None if there is no file. Raises `UserError`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a record ({error}). Run make gpu-check again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a record: it holds no JSON object. Run make gpu-check again.")
    return content
