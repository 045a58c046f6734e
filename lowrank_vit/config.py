"""The run's configuration: options as timm's flat flags, a flat YAML of the same names, and their checks.

`--config FILE` is expanded into flags placed *before* the user's own, so that one parser and one set of checks serve
both and the command line wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional, arg

from data_prep.errors import UserError
from lowrank_vit.config_yaml import config_files, yaml_tokens
from lowrank_vit.options import Config, Range
from lowrank_vit.timm_flags import check_flags, with_long_names


def leaves(config: Config | None = None) -> Iterator[tuple[str, Any, Any]]:
    """Yield `(flag name without dashes, type hint with its Range, value)` of every option; values of `config`."""
    config = config or Config()
    for group in dataclasses.fields(config):
        yield from _flags(getattr(config, group.name))


def _flags(options: Any) -> Iterator[tuple[str, Any, Any]]:
    hints = get_type_hints(type(options), include_extras=True)
    for option in dataclasses.fields(options):
        yield option.name.replace("_", "-"), hints[option.name], getattr(options, option.name)


@dataclasses.dataclass(frozen=True)
class _CommandLine(Config):
    """The options, and timm's old form `train.py DIR --model ...`."""

    dir: Positional[Annotated[Path | None, arg(metavar="[DIR]")]] = None
    """The same as --data-dir DIR."""

    def config(self, own: list[str]) -> Config:
        """The options alone; `own` are the user's tokens. Raises `UserError` for data given twice, or for nothing."""
        groups = {group.name: getattr(self, group.name) for group in dataclasses.fields(Config)}
        flags = _flags_in(own)
        if self.dir is not None:
            if flags & {"--data", "--data-dir"}:
                raise UserError(f"{self.dir} and --data-dir {self.data.data_dir}: give the data directory once.")
            groups["data"] = dataclasses.replace(self.data, data_dir=self.dir)
        # A recipe's file names its data; to measure it with --synthetic beside it is no contradiction.
        unread = "--data-dir" if self.dir or "--data" in flags else min(flags & {"--data-dir", "--dataset"}, default="")
        if self.data.synthetic and unread:
            raise UserError(f"--synthetic reads no data, so {unread} would go unused. Leave one of the two out.")
        return Config(**groups)


def _flags_in(tokens: list[str]) -> set[str]:
    """The flags among command-line tokens, without their values and with dashes inside."""
    return {token.partition("=")[0].replace("_", "-") for token in tokens if token.startswith("--")}


def parse(argv: list[str], prog: str = "python -m lowrank_vit.train") -> Config:
    """Turn a command line (with any `--config FILE` in it) into a checked `Config`.

    Raises `UserError` for a bad YAML file or a value out of range; exits with code 2 and tyro's message, which names
    the nearest flag, for a misspelt flag or a wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print("--config FILE   flat YAML whose keys are the flags below; flags given beside it win\n", flush=True)
    check_flags(argv)
    paths, own = config_files(with_long_names(argv))
    hints = {name: hint for name, hint, _ in leaves()}
    from_files = [token for path in paths for token in yaml_tokens(path, hints)]
    try:
        line = _tyro(from_files + own, prog)
    except SystemExit as stop:
        if stop.code:
            _name_wrong_file(stop, paths, hints)
        raise
    config = line.config(own)
    config = _fit_defaults(config, from_files, own)
    check(config)
    _tell_what_resuming_overrides(config)
    return config


def _tyro(tokens: list[str], prog: str = "") -> _CommandLine:
    return tyro.cli(OmitArgPrefixes[_CommandLine], args=tokens, prog=prog, description=Config.__doc__)


def _name_wrong_file(stop: SystemExit, paths: list[Path], hints: dict[str, Any]) -> None:
    """Add the YAML file to tyro's message, which names the flag alone, where the wrong value is the file's."""
    for path in paths:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                _tyro(yaml_tokens(path, hints))
        except SystemExit:
            stop.add_note(f"error: the wrong value stands in --config {path}")


def _say(line: str) -> None:
    """Of the processes of one run the first speaks."""
    if os.environ.get("RANK", "") in ("", "0"):
        print(f"note: {line}", flush=True)


def _tell_what_resuming_overrides(config: Config) -> None:
    """A run is resumed with its own args.yaml, which may name other weights: those of --resume win."""
    model = config.model
    flags = {"initial-checkpoint": model.initial_checkpoint, "pretrained": model.pretrained or model.pretrained_path}
    unused = [f"--{flag}" for flag, is_given in flags.items() if is_given]
    if config.run.resume and unused:
        _say(f"the weights are those of --resume {config.run.resume}; {unused[0]} is not read again")


def _fit_defaults(config: Config, from_files: list[str], own: list[str]) -> Config:
    """Let values that the user did not give follow from those given: `--device cpu`, and a small `--epochs`."""
    optim, step = config.optim, config.step
    if step.device == "cpu":  # the defaults of these two look for a GPU, which --device cpu does not use
        given = _flags_in(from_files + own)
        for name in ("amp", "compile"):
            if not given & {f"--{name}", f"--no-{name}"}:
                step = dataclasses.replace(step, **{name: False})
    if optim.warmup_epochs >= optim.epochs and "--warmup-epochs" not in _flags_in(own):
        optim = dataclasses.replace(optim, warmup_epochs=optim.epochs - 1)
        _say(f"--warmup-epochs shortened to {optim.warmup_epochs}, since --epochs is {optim.epochs}")
    return dataclasses.replace(config, optim=optim, step=step)


def check(config: Config) -> None:
    """Raise `UserError` for the first option outside its range, or for options that exclude one another."""
    for group in dataclasses.fields(config):
        check_ranges(getattr(config, group.name))
    pairs = {"scale": config.data.scale, "ratio": config.data.ratio, "cutmix-minmax": config.augment.cutmix_minmax}
    for name, pair in pairs.items():
        if pair is not None and pair[0] > pair[1]:
            raise UserError(f"--{name} {pair[0]:g} {pair[1]:g}: the smaller number comes first.")
    optim = config.optim
    if optim.warmup_epochs >= optim.epochs:
        raise UserError(
            f"--warmup-epochs {optim.warmup_epochs} leaves nothing of --epochs {optim.epochs}: "
            f"the warm-up must be shorter, at most {optim.epochs - 1}."
        )
    if len(config.augment.color_jitter) not in (1, 3):
        raise UserError(
            "--color-jitter takes one number, or three: brightness, contrast, saturation. Hue is not there."
        )
    _check_mixing_and_loss(config)
    if config.model.initial_checkpoint and (config.model.pretrained or config.model.pretrained_path):
        raise UserError("--initial-checkpoint and --pretrained both say which weights to start from. Give one of them.")
    parse_interval(config.run.checkpoint_interval)
    name = config.run.experiment
    if name and (Path(name).name != name or name == ".."):
        raise UserError(f"--experiment {name} must be a plain name; set its parent with --output.")


def _check_mixing_and_loss(config: Config) -> None:
    augment = config.augment
    mixing = {"mixup": augment.mixup, "cutmix": augment.cutmix, "cutmix-minmax": augment.cutmix_minmax}
    mixed_by = next((name for name, value in mixing.items() if value), None)
    if mixed_by and config.data.batch_size == 1:
        raise UserError(
            f"--{mixed_by} mixes each image with another one of its batch, and --batch-size 1 has no other. Use at "
            "least 2; --grad-accum-steps makes an update of more."
        )
    changes = {"bce-sum": augment.bce_sum, "bce-target-thresh": augment.bce_target_thresh is not None}
    for name, is_given in changes.items():
        if is_given and not augment.bce_loss:
            raise UserError(f"--{name} is about --bce-loss, which is not there. Add --bce-loss, or leave it out.")


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """--checkpoint-interval as (updates, seconds): "500" is 500 updates, "10m" ten minutes, "" neither.

    Raises `UserError` for anything else.
    """
    if not text:
        return None, None
    match = re.fullmatch(r"(?P<updates>[0-9]+)|(?P<minutes>[0-9]+(\.[0-9]+)?)m", text)
    if not match or float(text.removesuffix("m")) == 0:
        raise UserError(f"--checkpoint-interval {text} must be updates, e.g. 500, or minutes, e.g. 10m; both above 0.")
    if match["updates"]:
        return int(match["updates"]), None
    return None, 60 * float(match["minutes"])


def check_ranges(options: Any) -> None:
    """Raise `UserError` for the first field of a dataclass whose number lies outside its annotated `Range`."""
    for name, hint, value in _flags(options):
        for allowed in getattr(hint, "__metadata__", ()):
            if not isinstance(allowed, Range):
                continue
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None and number not in allowed:
                    raise UserError(f"--{name} {number:g} is out of range: it must be {allowed}.")


def to_yaml(config: Config) -> str:
    """A flat YAML of every option, defaults included; `--config` on it repeats the run.

    Left out are the run's own name and what it was resumed from: a repetition is a run of its own.
    """
    flat: dict[str, Any] = {}
    for name, _, value in leaves(config):
        if name in ("experiment", "resume"):
            continue
        if isinstance(value, tuple):
            value = list(value)
        flat[name] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(flat, sort_keys=False)
