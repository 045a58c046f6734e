"""The report as one HTML file, which `page.html` lays out."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from lowrank_vit.report.next_steps import Step, next_steps
from lowrank_vit.report.numbers import final_numbers, headline, spectral_numbers
from lowrank_vit.report.read_run import Run


def report_html(run: Run, pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        run: what `read_run` found; its notes are shown.
        pictures: what a picture shows (its alternative text) to its PNG bytes, in the order they are shown.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["as_typed"] = _as_typed
    status = run.how_far.in_words if run.how_far else ""
    return templates.get_template("page.html").render(
        title=run.path.resolve().name,
        model=str(run.args.get("model") or ""),
        headline=headline(run),
        notes=[note for note in (status, *run.notes) if note],
        pictures={caption: base64.b64encode(png).decode("ascii") for caption, png in pictures.items()},
        tables=[final_numbers(run), spectral_numbers(run)],
        steps=_what_next(run),
        arguments=run.args,
        environment=run.environment,
    )


def _what_next(run: Run) -> list[Step] | None:
    """Commands with this run's paths, as they are typed where the report was made; None where too little is known."""
    if run.how_far is None:
        return None
    goes_on, is_over = run.how_far.is_running, run.how_far.is_finished
    return next_steps(run.path, run.args, is_finished=is_over or goes_on, is_drawn=is_over and not goes_on)


def _as_typed(value: Any) -> str:
    """As it would stand on the command line: lists with spaces, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(_as_typed(item) for item in value)
    return str(value)
