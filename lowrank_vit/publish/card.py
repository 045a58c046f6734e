"""The model card, README.md: the model, its scores and its training, in Markdown with the hub's header.

Of the machine it shows only versions and hardware: only the last names of paths, no trackers, no tokens.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import in_flags, is_per_rank, kind_of, leaves
from lowrank_vit.config.options import Config
from lowrank_vit.config.tracking_options import Tracking
from lowrank_vit.model.hub import LOCAL
from lowrank_vit.model.weight_files import COMPRESSION
from lowrank_vit.publish.subject import Subject
from lowrank_vit.score.results import CONFIDENCE

PICTURE = "spectra.png"
_FILL_IN = "# license: FILL IN, such as apache-2.0 (https://huggingface.co/docs/hub/repositories-licenses)"
_NOT_SHOWN = (
    *("output", "experiment", "resume", "seeds", "beton-dir", "stage-dir", "compile-cache"),
    *(name for name, _, _ in leaves(Tracking())),
)
"""Options that tell of the user's machine and accounts, not of the model."""
_SURROUNDINGS = (
    *("lowrank_vit", "commit", "python", "torch", "timm", "numpy", "platform", "cpu", "cpu_cores"),
    *("gpu", "gpu_memory_gib", "cuda", "driver", "device"),
)
"""Entries of environment.json that are shown, in this order."""
_ROUNDING = (
    "Images were resized along columns first, while Pillow resizes along rows first; both round and clip in between. "
    "So timm may score a few images differently, mostly small ones with hard edges that are enlarged."
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~$>])")
_PATH = re.compile(r"(?<![\w./])(?:~|/(?!/))[^\s,;'\"]*/")
"""A path up to its last name, but not an address."""
_SWITCH = r"['\"]?(?:true|false|none|-?\d{1,2}(?:\.\d*)?)(?![\w.+/=-])"
"""A value that is not a secret: a model's `class_token=False` is an argument."""
_SECRETS = (
    (re.compile(r"\b(?:hf|sk|ghp|gho|glpat)[_-][A-Za-z0-9_-]{12,}"), "***"),
    (re.compile(r"://[^\s/@]+@"), "://***@"),
    (re.compile(r"(?i)\b((?:\w*[_-])?(?:secret|passwd|password))=\S+"), r"\1=***"),
    (re.compile(rf"(?i)\b((?:\w*[_-])?(?:token|key))=(?!{_SWITCH})\S+"), r"\1=***"),
)
"""Patterns of tokens and passwords, and the text that replaces them."""


def card(subject: Subject, name: str, reference: str, license_id: str = "") -> str:
    """README.md of the export.

    Args:
        subject: the exported model.
        name: the model's name, for the title.
        reference: the name by which timm loads it, such as hf-hub:OWNER/NAME.
        license_id: license of the weights; if empty, a line says to fill it in.
    """
    lines = [*_header(license_id), f"# {plain(name)}", "", *_description(subject), *_scores(subject)]
    lines += ["## Use", "", *fenced(_usage(subject, reference), "python"), ""]
    lines += _training(subject)
    if subject.picture:
        lines += ["## Spectra", "", f"![Singular values of the weights over the updates]({PICTURE})", ""]
    lines += _environment(subject)
    what = f"{plain(license_id)}." if license_id else "Not stated yet: fill in `license` at the head of this file."
    return "\n".join([*lines, "## License", "", what, ""])


def _header(license_id: str) -> list[str]:
    tags = [f"- {tag}" for tag in ("image-classification", "timm", "lowrank-vit")]
    license_line = f'license: "{license_id}"' if license_id else _FILL_IN
    return ["---", license_line, "library_name: timm", "pipeline_tag: image-classification", "tags:", *tags, "---", ""]


def _description(subject: Subject) -> list[str]:
    size = sum(parameter.numel() for parameter in subject.model.parameters())
    spec, outputs = subject.spec, int(getattr(subject.model, "num_classes", 0))
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    facts = {
        "Architecture": f"`{subject.name}` of timm" + _arguments(subject),
        "Parameters": f"{size:,}",
        "Classes": f"{outputs:,}" + (", named in `config.json`" if subject.class_names else ", without names"),
        "Images": f"{spec.img_size} x {spec.img_size} pixels, {subject.interpolation}, crop {spec.crop_pct:.4g}, "
        f"mean {mean}, standard deviation {std}",
        "Weights": "an exponential moving average (EMA)" if subject.is_ema else "the model's own",
    }
    lines = ["A model for classifying images, trained and exported with lowrank-vit.", ""]
    lines += [f"- {what}: {told}" for what, told in facts.items()]
    return [*lines, *([f"- Merged: {subject.merged}"] if subject.merged else []), ""]


def _arguments(subject: Subject) -> str:
    pairs = subject.args.get("model-kwargs") or ()
    return f", with {' '.join(code(private(str(pair))) for pair in pairs)}" if pairs else ""


def _scores(subject: Subject) -> list[str]:
    lines = ["## Scores", ""]
    if not subject.scores:
        return [*lines, "These weights were not scored on validation data.", ""]
    of = f"{subject.num_images:,} images" if subject.num_images else "an unknown number of images"
    lines += [f"| on {of} | % | {CONFIDENCE:.0%} interval |", "|---|---|---|"]
    for score in subject.scores:
        known = f"{score.interval[0]:.2f} to {score.interval[1]:.2f}" if score.interval else "not known"
        lines.append(f"| {score.name} | {score.percent:.2f} | {known} |")
    lines += [""]
    if subject.scores[0].interval:
        lines += ["The interval (Wilson's) is for other images of the same kind, not for another training run.", ""]
    lines += [_ROUNDING, ""]
    if subject.scored_at is not None and subject.updates not in (None, subject.scored_at):
        behind = (subject.updates or 0) - subject.scored_at
        lines += [f"The scores are from the latest validation, {behind:,} updates before these weights.", ""]
    return lines


def _usage(subject: Subject, reference: str) -> str:
    where = ["# run this in the parent of this folder; elsewhere, give the path to the folder"]
    return "\n".join(
        (
            "import timm",
            "",
            *(where if reference.startswith(LOCAL) else ()),
            f"model = timm.create_model({reference!r}, pretrained=True).eval()",
            "transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))",
        )
    )


def _training(subject: Subject) -> list[str]:
    lines, args, run = ["## Training", ""], subject.args, subject.run
    about: Any = subject.checkpoint.content.get(COMPRESSION)
    if isinstance(about, dict):
        told = (f"{name} {about[name]}" for name in ("method", "budget") if name in about)
        lines += [f"Its layers were compressed after training: {plain(', '.join(told)) or 'method unknown'}.", ""]
    if subject.updates is None and meaning.KEY not in subject.checkpoint.content:
        return [*lines, "The checkpoint does not tell how it was trained.", ""]
    data = private(str(args.get("dataset") or "")), Path(str(args.get("data-dir") or "")).name
    lines.append(f"- Data: {' in '.join(code(one) for one in data if one) or 'not named'}")
    epochs = subject.checkpoint.epoch + 1
    after = f"{epochs:,} epoch{'s' if epochs != 1 else ''}, " if epochs > 0 else ""
    lines += [f"- These weights: after {after}{subject.updates:,} updates"] if subject.updates is not None else []
    if run and run.status and run.status.in_words:
        lines.append(f"- The run: {plain(run.status.in_words)}")
    return [*lines, "", *fenced(command(args), "bash"), ""]


def command(args: dict[str, Any]) -> str:
    """The command line that repeats the training: options that are not at their defaults, paths as their last names."""
    words = ["lowrank-vit train"]
    for name, hint, usual in leaves(Config()):
        value = args.get(name, usual)
        value = tuple(value) if isinstance(value, list) else value
        is_path = kind_of(hint).element is Path
        if value in (usual, str(usual)) or value is None or name in _NOT_SHOWN or (is_per_rank(hint) and not is_path):
            continue
        if is_path:
            value = Path(str(value)).name
        texts = in_flags(name, value).split(" ") if isinstance(value, bool) else [f"--{name}", *_texts(value)]
        words.append(" ".join([texts[0], *(shlex.quote(private(text)) for text in texts[1:])]))
    return " \\\n    ".join(words)


def _texts(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, tuple) else [str(value)]


def _environment(subject: Subject) -> list[str]:
    found = subject.run.environment if subject.run else {}
    lines = [f"- {plain(name)}: {plain(private(str(found[name])))}" for name in _SURROUNDINGS if name in found]
    return ["## Environment", "", *lines, ""] if lines else []


def private(text: str) -> str:
    """A text without private parts: paths become their last names, tokens and passwords become `***`."""
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return _PATH.sub("", text)


def plain(text: str) -> str:
    """A text that Markdown and HTML show as it is, on one line."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\1", escaped)


def code(text: str) -> str:
    """A text as code within a line."""
    text = " ".join(text.split()).replace("|", "&#124;") if "|" in text else " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def fenced(text: str, language: str) -> list[str]:
    """Lines of code; the fence is longer than any in them."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return [f"{ticks}{language}", *text.splitlines(), ticks]
