"""The run's configuration: options as timm's flat flags, a flat YAML of the same names, and their checks.

The command line overrides `--config FILE`; both are checked with the same messages.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from tyro.conf import Positional, arg

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import HELP_FLAGS, say
from lowrank_vit.config import meaning
from lowrank_vit.config.check import check
from lowrank_vit.config.command_line import asks_for_help, read, show_help
from lowrank_vit.config.option_types import (
    UNSET,
    Hints,
    hints_of,
    in_flags,
    is_number,
    leaves,
    square_side,
    take_keyword,
    with_options,
    without_dashes,
)
from lowrank_vit.config.options import Config, Model, Spectra, Step, has_cuda
from lowrank_vit.config.timm_flags import HIDDEN, with_long_names
from lowrank_vit.config.timm_line import in_words, translate
from lowrank_vit.config.yaml_files import FromFile, config_files, read_config

_NO_GPU_ASKED_FOR = Step(amp=False, compile=False)
"""Defaults that do not look for a GPU, since that loads torch and takes seconds."""


@dataclasses.dataclass(frozen=True)
class _Shown(Config):
    """The options, and timm's old form `train.py DIR --model ...`, for `--help`."""

    dir: Positional[Annotated[Path | None, arg(metavar="[DIR]")]] = None
    """The same as --data-dir DIR."""
    step: Step = _NO_GPU_ASKED_FOR


def parse(argv: Sequence[str], prog: str = "") -> Config:
    """Turn a command line (with any `--config FILE` in it) into a checked `Config`; usage lines call it `prog`.

    Raises `UserError` for whatever is wrong with it or with a file.
    """
    if asks_for_help(argv):
        if HELP_FLAGS & set(argv):
            print("--config FILE   YAML file of the flags below, or a bundled name (quickstart);")
            print("                flags on the command line win\n", flush=True)
        show_help(_Shown, argv, prog or usage_name("lowrank_vit.train"), Config.__doc__)
    hints: Hints = hints_of(Config) | HIDDEN
    paths, own = config_files(with_long_names(argv))
    line = translate(own)
    typed = _with_img_size(read(line.tokens, hints, ["data-dir"], line.refused))
    files = {path: read_config(path, hints) for path in paths}
    try:
        recipe = _with_img_size(_merged(files))
        config = _config(recipe, typed)
        check(config)
    except UserError as error:
        raise UserError(f"{error}{_origin(str(error), files, typed)}") from None
    config = _with_defaults_of_device(config, {*recipe, *typed})
    _tell_what_resuming_overrides(config)
    _tell_of_odd_batches(config)
    _tell_of_idle_spectra(config, set(recipe), set(typed))
    _tell_of_timms(files, line.held, typed)
    return config


def _config(recipe: Mapping[str, Any], typed: Mapping[str, Any]) -> Config:
    """The options from files and command line, by flag name; the command line wins.

    Raises `UserError` for data that are given beside --synthetic, and for two different poolings.
    """
    config = with_options(Config(step=_NO_GPU_ASKED_FOR), _one_of_seeds({**recipe, **typed}, recipe, typed))
    # A recipe's file names its data; measuring the recipe with --synthetic is no contradiction.
    unread = next((name for name in ("data-dir", "dataset") if typed.get(name)), "")
    if config.data.synthetic and unread:
        raise UserError(f"--synthetic reads no data, so --{unread} would go unused. Leave one of the two out.")
    if pooling := typed.get("gp", recipe.get("gp")):
        model = _with_pooling(config.model, pooling, set(typed), set(recipe))
        config = dataclasses.replace(config, model=model)
    if typed.get("no-aug", recipe.get("no-aug")):
        config = _without_augmentation(config)
    return _fit_defaults(config, set(typed))


def _one_of_seeds(values: dict[str, Any], recipe: Mapping[str, Any], typed: Mapping[str, Any]) -> dict[str, Any]:
    """The options, without a file's --seeds if --seed is typed. Raises `UserError` for both in one place."""
    place = typed if {"seed", "seeds"} & typed.keys() else recipe
    if place.get("seeds") and "seed" in place:
        raise UserError(f"--seed {place['seed']} and --seeds both say which seeds. Give one of them.")
    return values | {"seeds": None} if "seed" in typed else values


def _with_pooling(model: Model, pooling: str, own: set[str], in_files: set[str]) -> Model:
    """The model options with `--gp`; if --model-kwargs has `global_pool` too, the typed one wins over a file's."""
    rest, other = take_keyword(model.model_kwargs, "global_pool")
    if other not in (None, pooling):
        origins = [("gp" in names, "model-kwargs" in names) for names in (own, in_files)]
        if origins[0] == (False, True):
            return model
        if origins[0] != (True, False):
            raise UserError(f"--gp {pooling} and --model-kwargs global_pool={other} differ. Give one of them.")
    return dataclasses.replace(model, model_kwargs=(*rest, f"global_pool={pooling}"))


def _without_augmentation(config: Config) -> Config:
    """Timm's --no-aug: the whole image, resized to a square; mixing is not a part of it."""
    data = dataclasses.replace(config.data, train_crop_mode="whole", hflip=0.0, vflip=0.0, train_interpolation="model")
    augment = dataclasses.replace(config.augment, aa="none", color_jitter=(0.0,), reprob=0.0)
    return dataclasses.replace(config, data=data, augment=augment)


def _origin(message: str, files: Mapping[Path, FromFile], typed: Mapping[str, Any]) -> str:
    """A sentence that names the file whose option an error is about; empty if the option was typed."""
    names = [name for name in re.findall(r"--([a-z][a-z0-9-]*)", message) if name not in typed]
    for path, file in reversed(list(files.items())):
        if named := next((name for name in names if file.values.get(name, UNSET) is not UNSET), ""):
            return f" `{named}` is set in --config {path}."
    return ""


def _merged(files: Mapping[Path, FromFile]) -> dict[str, Any]:
    """The values by option; the last file that names an option counts."""
    merged = {name: value for file in files.values() for name, value in file.values.items()}
    return {name: value for name, value in merged.items() if value is not UNSET}


def _with_img_size(values: dict[str, Any]) -> dict[str, Any]:
    """`img_size` of --model-kwargs as --img-size, which timm wants beside it. Raises `UserError` if they differ."""
    rest, text = take_keyword(values.get("model-kwargs", ()), "img_size")
    if text is None:
        return values
    side, own = square_side(text), values.get("img-size")
    if own not in (None, side):
        raise UserError(f"--img-size {own} and --model-kwargs img_size={text} differ. Give one of them, or one size.")
    return values | {"model-kwargs": rest, "img-size": side}


def _say(line: str) -> None:
    """Print a note, in the first process of a run only."""
    if os.environ.get("RANK", "") in ("", "0"):
        say(f"note: {line}")


def _tell_of_timms(files: Mapping[Path, FromFile], held: list[str], typed: Mapping[str, Any]) -> None:
    """Say how older runs' files are read, and which of timm's options change nothing here.

    Options that the `typed` flags or a later file override are not mentioned.
    """
    for n, (path, file) in enumerate(files.items(), 1):
        overruled = {*typed, *(name for later in list(files.values())[n:] for name in later.values)}
        for words, as_then in file.notes:
            counts = [in_flags(name, value) for name, value in as_then.items() if name not in overruled]
            if counts or not as_then:
                _say(" ".join([words, *counts]))
        if file.num_skipped:
            _say(f"{path}: ignored {file.num_skipped} timm options that do not exist here and are set to no-op values")
    held = [*(one for file in files.values() for one in file.held), *held]
    if held:
        _say(in_words(held))


def _tell_what_resuming_overrides(config: Config) -> None:
    """A run is resumed with its own args.yaml, which may name other weights: those of --resume win."""
    model = config.model
    flags = {"initial-checkpoint": model.initial_checkpoint, "pretrained": model.pretrained or model.pretrained_path}
    unused = [f"--{flag}" for flag, is_given in flags.items() if is_given]
    if config.run.resume and unused:
        _say(f"the weights are those of --resume {config.run.resume}; {unused[0]} is not read again")


def _tell_of_odd_batches(config: Config) -> None:
    """Note an odd batch size, which timm refuses to mix."""
    augment, batch_size = config.augment, config.data.batch_size
    is_given = config.optim.global_batch_size is None  # else --batch-size is an upper limit
    if is_given and batch_size % 2 and (augment.mixup or augment.cutmix or augment.cutmix_minmax):
        _say(
            f"--batch-size {batch_size} is odd: mixing pairs images within a batch, so one of them stays unmixed, and "
            "the pairs depend on ranks and accumulation"
        )


def _tell_of_idle_spectra(config: Config, in_files: set[str], own: set[str]) -> None:
    """Say which options of spectra change nothing, since their switch is off.

    Nothing is said if the switch was turned off on purpose: --no-spec-monitor leaves a recipe's options as they are,
    and a file that turns the monitor off may keep its options.
    """
    changed = [
        name
        for (name, _, value), (_, _, usual) in zip(leaves(config.spectra), leaves(Spectra()), strict=True)
        if value != usual
    ]
    of_flows = [name for name in changed if name == "spec-flow-images"]
    of_monitor = [name for name in changed if name not in ("spec-monitor", "spec-flows", *of_flows)]
    for switch, options in (("spec-monitor", of_monitor), ("spec-flows", of_flows)):
        given = own if switch in in_files else own | in_files
        idle = [f"--{name}" for name in options if name in given]
        if idle and switch not in [*own, *changed]:
            _say(f"{', '.join(idle)} change{'s' * (len(idle) == 1)} nothing without --{switch}")


def _fit_defaults(config: Config, own: set[str]) -> Config:
    """Fit values to those that the user typed: a default warm-up to a small `--epochs`, 0 workers to 1."""
    data, optim = config.data, config.optim
    if optim.warmup_epochs >= optim.epochs and not optim.warmup_prefix and "warmup-epochs" not in own:
        optim = dataclasses.replace(optim, warmup_epochs=optim.epochs - 1)
        _say(f"--warmup-epochs shortened to {optim.warmup_epochs}, since --epochs is {optim.epochs}")
    if data.workers == 0:
        data = dataclasses.replace(data, workers=1)
        _say("--workers 0 is --workers 1: images are decoded by a thread of this process")
    return dataclasses.replace(config, data=data, optim=optim)


def _with_defaults_of_device(config: Config, given: set[str]) -> Config:
    """Set --amp and --compile, each unless it is given, by the device: on with CUDA."""
    open_ones = {"amp", "compile"} - given
    is_on = bool(open_ones) and config.step.device != "cpu" and has_cuda()
    return dataclasses.replace(config, step=dataclasses.replace(config.step, **dict.fromkeys(open_ones, is_on)))


def without_seeds(argv: Sequence[str]) -> list[str]:
    """A command line that was parsed, without --seeds and its values."""
    kept: list[str] = []
    is_of_seeds = False
    for token in argv:
        if token.startswith("-") and not is_number(token):
            is_of_seeds = without_dashes(token.partition("=")[0]) == "seeds"
            kept += [] if is_of_seeds else [token]
        elif not (is_of_seeds and is_number(token)):
            is_of_seeds = False
            kept.append(token)
    return kept


def to_yaml(config: Config) -> str:
    """A flat YAML of every option, defaults included, and of their meaning; `--config` on it repeats the run.

    The run's name and --resume are left out: a repetition is a run of its own.
    """
    flat: dict[str, Any] = {meaning.KEY: meaning.now()}
    for name, _, value in leaves(config):
        if name in ("experiment", "resume"):
            continue
        if isinstance(value, tuple):
            value = list(value)
        flat[name] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(flat, sort_keys=False)
