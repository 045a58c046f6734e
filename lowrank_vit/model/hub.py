"""Models in timm's hub layout, a folder with config.json and weights: `hf-hub:OWNER/NAME[@REVISION]`, `local-dir:DIR`.

A hub model is looked up once, at the start of a command. The settings in its config.json become the command's own
options: the architecture, its arguments, and the image settings. A run's args.yaml and checkpoints therefore have all
that is needed later, even if the folder has moved or there is no network.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import timm
from timm.models import PretrainedCfg, parse_model_name

from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.common.filters import FILTERS
from lowrank_vit.common.hub import hub_message, quick_without_network
from lowrank_vit.config.option_types import leaves, literal, parse_keywords, square_side, with_options
from lowrank_vit.model.weights import Checkpoint, read_checkpoint

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

HUB, LOCAL = "hf-hub", "local-dir"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
_FILES = (
    *(WEIGHTS, "pytorch_model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin"),
)
"""File names of weights, in timm's order."""
_SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".bin")
"""Suffixes of other weight files in a folder, in timm's order."""
_NOT_OF_THE_MODEL = ("num_classes", "in_chans", "img_size", "drop_rate", "drop_path_rate")
"""Arguments of the constructor that have their own flag, or always the same value here."""
_PAGE = re.compile(rb"<(!doctype|html|head|body|\?xml)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OF_IMAGES = ("model-kwargs", "img-size", "crop-pct", "mean", "std")
_LEFT_OPEN = {
    **dict.fromkeys(("img-size", "crop-pct", "mean", "std", "drop-path")),
    "train-interpolation": "model",
    "interpolation": "",
}
"""Options that a hub model sets if they have these values."""
D = TypeVar("D", bound="DataclassInstance")


@dataclass(frozen=True)
class HubModel:
    """A model as described by its config.json."""

    source: str
    """hf-hub:OWNER/NAME@COMMIT, or local-dir: with an absolute path."""
    architecture: str
    """timm's name of the architecture."""
    cfg: PretrainedCfg
    model_args: dict[str, Any]
    """Arguments of the constructor."""
    folder: Path
    """The folder of config.json; for a hub model, in its local cache."""
    class_names: list[str] | None = None
    """Names of the first outputs, in order."""

    def flags(self, *, for_tests: bool = False) -> dict[str, Any]:
        """The settings of config.json as options: the model, its arguments, image size, crop, mean, std, interpolation.

        `for_tests`: use its image size and crop for testing. Raises `UserError` for images that are not square or not
        RGB, and for values that are not valid numbers.
        """
        args, cfg, said = self.model_args, self.cfg, f"--model {self.source}: its {CONFIG} has"
        size: Any = args.get("img_size") or (for_tests and cfg.test_input_size) or cfg.input_size
        sides = [size, size] if isinstance(size, int) else list(size)[-2:]
        channels = [args.get("in_chans", 3), *(list(cfg.input_size)[:1])]
        if any(one != 3 for one in channels):
            raise UserError(f"{said} {max(channels)} input channels, but images are RGB here. Choose another model.")
        crop_pct = (for_tests and cfg.test_crop_pct) or cfg.crop_pct
        numbers: dict[str, Any] = {"crop_pct": [crop_pct], "mean": cfg.mean, "std": cfg.std}
        for name, values in numbers.items():
            lowest = -math.inf if name == "mean" else 0.0
            is_right = isinstance(values, list | tuple) and len(values) in (1, 3)
            if not is_right or not all(isinstance(v, int | float) and lowest < v < math.inf for v in values):
                raise UserError(f"{said} {name}={values}, which is invalid. Give another folder, or correct it.")
        found = {
            "model": self.architecture,
            "model-from": self.source,
            "model-kwargs": tuple(_pair(k, v) for k, v in args.items() if k not in _NOT_OF_THE_MODEL and v is not None),
            "img-size": square_side(str(tuple(sides)), f"{said} the image size"),
            "crop-pct": min(1.0, numbers["crop_pct"][0]),
            **{name: tuple(numbers[name]) * (3 // len(numbers[name])) for name in ("mean", "std")},
            "drop-path": args.get("drop_path_rate"),
        }
        if cfg.interpolation in FILTERS:
            found |= {"train-interpolation": cfg.interpolation, "interpolation": cfg.interpolation}
        return found

    def weights(self, flag: str = "--model") -> Checkpoint:
        """Read the model's weights, after fetching them if needed. Raises `UserError`."""
        said = f"{flag} {self.source}"
        checkpoint = read_checkpoint(self.weight_file(said), f"{said}:")
        flags = self.flags(for_tests=True)
        args = {name: list(v) if isinstance(v, tuple) else v for name in _OF_IMAGES if (v := flags[name]) is not None}
        content = checkpoint.content | {"arch": self.architecture, "args": args}
        if self.class_names:
            content["class_names"] = self.class_names
        if self.cfg.label_offset and not checkpoint.is_npz:  # old weights have extra outputs before the first class
            heads = self.cfg.classifier or ()
            ends = {f"{head}.{kind}" for head in ([heads] if isinstance(heads, str) else heads) for kind in _PARTS}
            own: Any = content["state_dict"]
            content["state_dict"] = {k: v[self.cfg.label_offset :] if k in ends else v for k, v in own.items()}
        return replace(checkpoint, content=content, source=self.source)

    def weight_file(self, said: str = "") -> Path:
        """The path of the weight file, fetched from the hub if needed. Raises `UserError` beginning with `said`."""
        said = said or f"--model {self.source}"
        own = self.cfg.hf_hub_filename
        if self.source.startswith(LOCAL):
            there = [path for name in filter(None, (own, *_FILES)) if (path := self.folder / name).is_file()]
            there += [path for suffix in _SUFFIXES for path in sorted(self.folder.glob(f"*{suffix}"))]
            if not there:
                raise UserError(
                    f"{said}: there are no weights beside its {CONFIG} (expected {WEIGHTS}). Give another folder, or "
                    "leave out --pretrained to start from random weights."
                )
            return there[0]
        unreached: UserError | None = None
        for name in [own] if own else _FILES:
            try:
                if path := _fetched(self.source.partition(":")[2], name, said):
                    return path
            except _OutOfReach as error:  # another name may be in the cache
                unreached = unreached or error
        raise unreached or UserError(f"{said}: it has no weight file ({WEIGHTS}). Choose another model.")


class _OutOfReach(UserError):
    """The hub cannot be reached."""


_PARTS = ("weight", "bias")


def source_of(name: str) -> str:
    """The prefix of a model name, hf-hub or local-dir; empty for a timm name.

    Raises `UserError` for another prefix, and for a path or a hub name without prefix.
    """
    try:
        return parse_model_name(name)[0] or ""
    except ValueError as error:
        raise UserError(
            f"--model {name} is not a model name. Give a timm name, {HUB}:OWNER/NAME for a model of the Hugging Face "
            f"hub, or {LOCAL}:DIR for a folder with {CONFIG} and weights."
        ) from error


def with_source(options: D, flags: Mapping[str, Any]) -> D:
    """A command's options with a hub model's settings (`HubModel.flags`) for those that were not given.

    Arguments of the constructor are joined; the command's override the model's.
    """
    now = {name: value for name, _, value in leaves(options)}
    own = parse_keywords(now["model-kwargs"], "--model-kwargs", "patch_size=2")
    told = tuple(pair for pair in flags["model-kwargs"] if pair.partition("=")[0] not in own)
    if now.get("img-size") is None and "img_size" in own:
        flags = {name: value for name, value in flags.items() if name != "img-size"}
    new = {"model": flags["model"], "model-from": flags["model-from"], "model-kwargs": (*told, *now["model-kwargs"])}
    new |= {name: flags[name] for name, usual in _LEFT_OPEN.items() if name in flags and now.get(name, ...) == usual}
    return with_options(options, new)


def is_of(name: str, source: str) -> bool:
    """Whether `name`, as typed, is the model of `source`; another commit is another model."""
    kind, given = parse_model_name(name)
    if kind == LOCAL or not kind:
        return kind == LOCAL and f"{LOCAL}:{_absolute(given)}" == source
    repository, _, revision = given.partition("@")
    found, _, commit = source.removeprefix(f"{HUB}:").partition("@")
    is_same = source.startswith(HUB) and repository == found
    return is_same and (revision == commit or not _COMMIT.fullmatch(revision))


def find_model(name: str, flag: str = "--model") -> HubModel:
    """Look up a model of the hub or of a folder; only config.json is read. Raises `UserError`."""
    kind, given = parse_model_name(name)
    said = f"{flag} {name}"
    if kind == HUB:
        repository, _, revision = given.partition("@")
        path = _fetched(given, CONFIG, said)
        if path is None:
            raise UserError(f"{said}: it has no {CONFIG}, so it is not a timm model. Choose another.")
        commit = path.parent.name if _COMMIT.fullmatch(path.parent.name) else revision
        return _described(path.parent, f"{HUB}:{repository}" + (f"@{commit}" if commit else ""), said)
    folder = _absolute(given)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"{said}: that folder {what}. Give a folder with {CONFIG} and {WEIGHTS}.")
    if not (folder / CONFIG).is_file():
        is_run = (folder / "args.yaml").exists()
        way = f"It is a run: `lowrank-vit export {given} --local-dir DIR` writes such a folder." if is_run else ""
        way = way or f"Give a folder with {CONFIG} and {WEIGHTS}."
        raise UserError(f"{said}: it has no {CONFIG}, so it is not a timm model. {way}")
    return _described(folder, f"{LOCAL}:{folder}", said)


def find_kept(source: str, name: str) -> HubModel:
    """Look up a run's --model-from. Raises `UserError`, also if it is another model than `name`."""
    way = "Remove model-from from the configuration to start from timm's published weights."
    try:
        found = find_model(source, "--model-from")
    except UserError as error:
        raise UserError(f"{error} {way}") from error
    if found.architecture != name.partition(".")[0]:
        raise UserError(f"--model-from {source} is a {found.architecture}, not --model {name}. {way}")
    return found


def _described(folder: Path, source: str, said: str) -> HubModel:
    try:
        content: Any = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{said}: its {CONFIG} cannot be read ({error}). Give another.") from error
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        of_transformers = isinstance(content, dict) and "model_type" in content
        why = "is for the library transformers" if of_transformers else "names no `architecture`"
        raise UserError(f"{said} is not a timm model: its {CONFIG} {why}. Choose another.")
    name = content["architecture"]
    if not timm.is_model(name):
        near = did_you_mean(name, timm.list_models())
        raise UserError(f"{said}: its {CONFIG} names {name}, which this version of timm does not know.{near}")
    told: Any = content.get("pretrained_cfg", content)  # old files have everything in one table
    args: Any = content.get("model_args") or {}
    if not isinstance(told, dict) or not isinstance(args, dict):
        raise UserError(f"{said}: its {CONFIG} is damaged: pretrained_cfg and model_args must be tables. Give another.")
    known = {one.name for one in fields(PretrainedCfg)} - {"url", "file", "state_dict", "hf_hub_id", "source"}
    cfg = PretrainedCfg(**{key: value for key, value in told.items() if key in known and value is not None})
    labels = content.get("label_names") or told.get("label_names") or told.get("labels")
    return HubModel(source, name, cfg, dict(args), folder, _names(labels))


def _names(labels: Any) -> list[str] | None:
    """Names of outputs 0, 1 and so on; None if the labels do not give them."""
    if isinstance(labels, dict):
        labels = [labels.get(str(number)) for number in range(len(labels))]
    is_list = isinstance(labels, list) and labels and all(isinstance(name, str) for name in labels)
    return list(labels) if is_list else None


def _pair(name: str, value: Any) -> str:
    is_plain = isinstance(value, str) and literal(value) == value
    return f"{name}={value if is_plain else repr(value)}"


def _absolute(given: str) -> Path:
    return Path(given).expanduser().absolute()


def _fetched(given: str, name: str, said: str) -> Path | None:
    """The cached path of a file of OWNER/NAME[@REVISION], fetched if needed; None if the repository lacks it.

    Raises `UserError`.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = given.partition("@")
    try:
        with quick_without_network():
            path = Path(hf_hub_download(repository, name, revision=revision or None))
    except LocalEntryNotFoundError as error:
        raise _OutOfReach(str(hub_error(error, repository, said))) from error
    except EntryNotFoundError:
        return None
    except Exception as error:  # errors of the library and its HTTP client have no common class
        raise hub_error(error, repository, said) from error
    with path.open("rb") as file:
        begin = file.read(64).lstrip()
    if _PAGE.match(begin):
        _forget(path)
        raise _OutOfReach(
            f"{said}: instead of its {name} a web page was received, such as a network's login page. It was deleted. "
            "Check the network and HF_ENDPOINT, and try again."
        )
    return path


def _forget(path: Path) -> None:
    """Remove a file from the hub's cache, with the file that its link points to."""
    with suppress(OSError):
        content = path.resolve()
        path.unlink()
        if content.parent.name == "blobs":
            content.unlink(missing_ok=True)


def hub_error(
    error: Exception, repository: str, said: str, instead: str = f"give a folder of it as {LOCAL}:DIR"
) -> UserError:
    """A hub error as a `UserError` that begins with `said` and tells what to do."""
    return UserError(f"{said}: {hub_message(repository, error, 'model', instead)}")
