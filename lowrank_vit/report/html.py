"""The report as one HTML file: pictures inside, no script, no network, light and dark."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

from lowrank_vit.report.next_steps import next_steps
from lowrank_vit.report.numbers import Table, final_numbers, headline, spectral_numbers
from lowrank_vit.report.read_run import Run

_STYLE = """
:root { color-scheme: light dark; --page: #f6f8fa; --card: #ffffff; --ink: #22303c; --muted: #5c6b78; --line: #dfe5ea;
        --note: #fff6e0; }
@media (prefers-color-scheme: dark) {
  :root { --page: #12181e; --card: #1b242c; --ink: #e4eaef; --muted: #9fb0bd; --line: #31404c; --note: #3a3118; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
.sub { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.5rem 0 0; }
.figures div, .card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.figures div { padding: .7rem .9rem; }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.notes { background: var(--note); border-radius: .6rem; padding: .7rem .9rem .7rem 2rem; margin: 1.5rem 0 0; }
figure { overflow-x: auto; margin: 1.5rem 0 0; padding: .5rem; background: #ffffff; border: 1px solid var(--line);
         border-radius: .6rem; }
img { display: block; width: 100%; min-width: 640px; height: auto; }
.card { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .9rem; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border-top: 0; color: var(--muted); font-weight: 500; }
th:first-child, td:first-child { text-align: left; font-weight: 500; }
.pairs td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.pairs td:first-child { color: var(--muted); width: 1%; white-space: nowrap; }
.next { padding: .2rem .9rem .7rem; }
.next p { margin: .7rem 0 .1rem; color: var(--muted); }
.next pre { margin: 0; font-size: .88rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem 1.5rem;
           align-items: start; }
.columns > * { min-width: 0; }
"""


def report_html(run: Run, pictures: Mapping[str, bytes]) -> str:
    """The whole page.

    Args:
        run: what `read_run` found; its notes are shown.
        pictures: what a picture shows (its alternative text) to its PNG bytes, in the order they are shown.
    """
    title = run.path.resolve().name
    model = str(run.args.get("model") or "")
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="sub">{escape(model)}</p>' if model else "", _headline(run)]
    status = run.how_far.in_words if run.how_far else ""
    notes = [note for note in (status, *run.notes) if note]
    if notes:
        parts.append('<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    for caption, png in pictures.items():
        data = base64.b64encode(png).decode("ascii")
        parts.append(f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>')
    parts += [_table(final_numbers(run)), _table(spectral_numbers(run)), _what_next(run)]
    pairs = _pairs("Arguments", run.args) + _pairs("Environment", run.environment)
    parts.append(f'<div class="columns">{pairs}</div>')
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _headline(run: Run) -> str:
    figures = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in headline(run))
    return f'<dl class="figures">{figures}</dl>' if figures else ""


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    content = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(table.title)}</h2><div class="card">{content}</div>'


def _what_next(run: Run) -> str:
    """Commands with this run's paths, as they are typed where the report was made."""
    if run.how_far is None:
        return ""
    goes_on, is_over = run.how_far.is_running, run.how_far.is_finished
    steps = next_steps(run.path, run.args, is_finished=is_over or goes_on, is_drawn=is_over and not goes_on)
    rows = "".join(f"<p>{escape(step.what)}</p><pre>{escape(step.command())}</pre>" for step in steps)
    return f'<h2>What next</h2><div class="card next">{rows}</div>'


def _pairs(title: str, values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(_plain(v))}</td></tr>" for k, v in values.items())
    return f'<section><h2>{escape(title)}</h2><div class="card"><table class="pairs">{rows}</table></div></section>'


def _plain(value: Any) -> str:
    """As it would stand on the command line: lists with spaces, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(_plain(item) for item in value)
    return str(value)
