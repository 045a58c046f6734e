"""The run's configuration: options as timm's flat flags, a flat YAML of the same names, and their checks.

`--config FILE` is expanded into flags placed *before* the user's own, so that one parser and one set of checks serve
both and the command line wins.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional, arg

from data_prep.errors import UserError
from lowrank_vit.config_yaml import expand_config_files
from lowrank_vit.options import Config, Range
from lowrank_vit.timm_flags import SHORT, check_flags


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
        """The options alone; `own` are the user's tokens. Raises `UserError` for two data directories."""
        groups = {group.name: getattr(self, group.name) for group in dataclasses.fields(Config)}
        if self.dir is not None:
            flags = {token.partition("=")[0].replace("_", "-") for token in own}
            if flags & {"--data", "--data-dir"}:
                raise UserError(f"{self.dir} and --data-dir {self.data.data_dir}: give the data directory once.")
            groups["data"] = dataclasses.replace(self.data, data_dir=self.dir)
        return Config(**groups)


def parse(argv: list[str], prog: str = "python -m lowrank_vit.train") -> Config:
    """Turn a command line (with any `--config FILE` in it) into a checked `Config`.

    Raises `UserError` for a bad YAML file or a value out of range; exits with code 2 and tyro's message, which names
    the nearest flag, for a misspelt flag or a wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print("--config FILE   flat YAML whose keys are the flags below; flags given beside it win\n", flush=True)
    check_flags(argv)
    argv = [SHORT.get(token, token) for token in argv]
    from_files, own = expand_config_files(argv, {name: hint for name, hint, _ in leaves()})
    line = tyro.cli(OmitArgPrefixes[_CommandLine], args=from_files + own, prog=prog, description=Config.__doc__)
    config = line.config(own)
    config = _fit_defaults(config, from_files, own)
    check(config)
    return config


def _fit_defaults(config: Config, from_files: list[str], own: list[str]) -> Config:
    """Let values that the user did not give follow from those given: `--device cpu`, and a small `--epochs`."""
    optim, step = config.optim, config.step
    if step.device == "cpu":  # the defaults of these two look for a GPU, which --device cpu does not use
        given = {token.replace("_", "-") for token in from_files + own}
        for name in ("amp", "compile"):
            if not given & {f"--{name}", f"--no-{name}"}:
                step = dataclasses.replace(step, **{name: False})
    is_warmup_asked = any(token.replace("_", "-").startswith("--warmup-epochs") for token in own)
    if optim.warmup_epochs >= optim.epochs and not is_warmup_asked:
        optim = dataclasses.replace(optim, warmup_epochs=optim.epochs - 1)
        if os.environ.get("RANK", "0") in ("", "0"):  # of several processes one speaks
            print(
                f"note: --warmup-epochs shortened to {optim.warmup_epochs}, since --epochs is {optim.epochs}",
                flush=True,
            )
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
    augment, model = config.augment, config.model
    mixes = augment.mixup > 0 or augment.cutmix > 0 or augment.cutmix_minmax is not None
    if mixes and config.data.batch_size == 1:
        raise UserError(
            "--batch-size 1 cannot be mixed: --mixup and --cutmix mix an image with another one of its batch. Use a "
            "batch of 2 or more, with --grad-accum-steps for a larger update."
        )
    if not augment.bce_loss and (augment.bce_sum or augment.bce_target_thresh is not None):
        raise UserError("--bce-sum and --bce-target-thresh change --bce-loss. Add that, or leave them out.")
    if model.initial_checkpoint and (model.pretrained or model.pretrained_path):
        raise UserError("--initial-checkpoint and --pretrained both say which weights to start from. Give one of them.")
    parse_interval(config.run.checkpoint_interval)
    name = config.run.experiment
    if name and (Path(name).name != name or name == ".."):
        raise UserError(f"--experiment {name} must be a plain name; set its parent with --output.")


def parse_interval(text: str) -> tuple[int | None, float | None]:
    """--checkpoint-interval as (updates, seconds): "500" is 500 updates, "10m" ten minutes, "" neither."""
    number, is_minutes = text.removesuffix("m"), text.endswith("m")
    try:
        if not text:
            return None, None
        if is_minutes and 0 < float(number) < float("inf"):
            return None, 60 * float(number)
        if not is_minutes and int(number) > 0:
            return int(number), None
    except ValueError:
        pass
    raise UserError(f"--checkpoint-interval {text}: give updates, e.g. 500, or minutes, e.g. 10m.")


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
