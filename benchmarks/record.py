"""A machine's record: the tests that ran on it and its benches, as one JSON file and one page of Markdown."""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.record_page import to_markdown
from lowrank_vit.common.errors import UserError


@dataclass(frozen=True)
class Options:
    """Where the parts are, and where the record goes."""

    tests: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `pytest --gpu-record=FILE` wrote."""
    benches: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """What `bench all --json FILE` wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("docs/benchmarks")
    """Folder for DATE_DEVICE.json and DATE_DEVICE.md; a second record of a day has its commit in the name as well."""


def write(options: Options) -> Path:
    """Join the two; returns the page. A part that is missing is said in it. Raises `UserError` if there is neither."""
    tests, benches = _read(options.tests), _read(options.benches)
    if tests is None and benches is None:
        raise UserError(f"Neither {options.tests} nor {options.benches} is there. Run make gpu-check.")
    known = next((part["environment"] for part in (benches, tests) if part and part.get("environment")), {})
    page = _unused(options.out, known)
    record = {"environment": known, "tests": tests, "benches": benches}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        page.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        page.write_text(to_markdown(known, tests, benches), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{page} cannot be written: {error.strerror}. Choose --out.") from error
    return page


def _unused(out: Path, known: dict[str, Any]) -> Path:
    """A page that is not there yet: an earlier figure is what a later one is held against."""
    stem = f"{time.strftime('%Y-%m-%d')}_{_plain(known.get('gpu') or known.get('cpu') or 'cpu')}"
    later = f"{stem}_{_plain(known['commit'])}" if known.get("commit") else stem
    for name in chain([stem, later], (f"{later}_{n}" for n in count(2))):
        if not any((out / f"{name}{suffix}").exists() for suffix in (".md", ".json")):
            return out / f"{name}.md"
    raise AssertionError("counting has no end")


def _plain(text: object) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", str(text)).strip("-").lower()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a record ({error}). Run make gpu-check again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a record: it holds no JSON object. Run make gpu-check again.")
    return content
