"""The published training lines of `published_lines.toml`, and the tables of `docs/from_timm.md` that a program writes.

`python -m tests.published_lines` writes them anew.
"""

from __future__ import annotations

import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import timm

from lowrank_vit.config.other_flags import OTHERS, Elsewhere

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "from_timm.md"
BEGIN, END = "<!-- {}: python -m tests.published_lines -->\n", "<!-- end -->\n"
UPDATES = 2
"""Of a line that is trained."""
IMAGES = 24
"""Of `sources.write_splits`."""


@dataclass(frozen=True)
class PublishedLine:
    """A line that somebody has published."""

    source: str
    trains: str
    line: str
    refused: str = ""
    data: str = ""
    small: str = ""

    @property
    def words(self) -> list[str]:
        """As a shell takes the line apart."""
        return shlex.split(self.line)

    @property
    def url(self) -> str:
        """Where it was read."""
        return self.source.replace("GITHUB/", "https://github.com/")

    @property
    def model(self) -> str:
        """Value of --model; empty without it."""
        words = self.line.replace("--model=", "--model ").split()
        return words[words.index("--model") + 1] if "--model" in words else ""

    def made_small(self, data_dir: Path) -> list[str]:
        """The line for two updates on a CPU with other data; all that is not overruled at its end stays as it is."""
        words = self.words if self.words[0].startswith("-") else self.words[1:]  # without DIR
        steps = 2 if "--grad-accum-steps" in words else 1
        batch = IMAGES // UPDATES // steps
        end = f"""--data-dir {data_dir} --dataset folder --train-split train --val-split val --num-classes 2 --epochs 1
            --warmup-epochs 0 --cooldown-epochs 0 -b {batch} -vb {IMAGES} --grad-accum-steps {steps} --log-interval 1
            --device cpu --no-amp --no-compile --loader resident --spec-monitor --spec-every 1 --output output
            --experiment run"""
        return [*words, *shlex.split(f"{end} {self.small}")]

    def here(self) -> str:
        """What becomes of it, in words."""
        if self.refused:
            return f"refused: {self.refused}"
        said = "trains" if self.small else "parses"
        if self.data:
            return f"{said}; {self.data}"
        return said if timm.is_model(self.model.split(".")[0]) else f"{said}; the model is not timm's"


def published_lines() -> list[PublishedLine]:
    """All of them, in the file's order."""
    with (Path(__file__).parent / "published_lines.toml").open("rb") as file:
        return [PublishedLine(**one) for one in tomllib.load(file)["lines"]]


def tables() -> dict[str, str]:
    """The tables by their names in the document."""
    lines = [
        f"| [{line.trains}]({line.url}) | {f'`{line.model}`' if line.model else ''} | {line.here()} |"
        for line in published_lines()
    ]
    named: dict[Elsewhere, list[str]] = {}
    for name, other in OTHERS.items():
        named.setdefault(other, []).append(f"`--{name}`")
    flags = [f"| {' '.join(names)} | {other.whose} | {other.instead} |" for other, names in named.items()]
    return {
        "flags": "\n".join(["| flag | whose | here |", "|---|---|---|", *flags]),
        "lines": "\n".join(["| line | `--model` | here |", "|---|---|---|", *lines]),
    }


def written(document: str) -> str:
    """The document with the tables of now."""
    for name, table in tables().items():
        before, begin, rest = document.partition(BEGIN.format(name))
        document = f"{before}{begin}\n{table}\n\n{END}{rest.partition(END)[2]}"
    return document


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
