"""The run's configuration: options as timm's flat flags, a flat YAML of the same names, and their checks.

`--config FILE` is expanded into flags placed *before* the user's own, so that one parser and one set of checks serve
both and the command line wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import usage_name
from lowrank_vit.common.terminal import fitted_help, say
from lowrank_vit.config import meaning
from lowrank_vit.config.check import check
from lowrank_vit.config.option_types import Hints, kind_of, leaves, square_side, take_keyword
from lowrank_vit.config.options import Config, Model
from lowrank_vit.config.timm_flags import HIDDEN, with_long_names
from lowrank_vit.config.timm_line import in_words, translate
from lowrank_vit.config.yaml_files import FromFile, config_files, read_config


@dataclasses.dataclass(frozen=True)
class _CommandLine(Config):
    """The options; timm's old form `train.py DIR --model ...`; and timm's flags that stand for several options."""

    gp: Suppress[str] = ""
    no_aug: Suppress[bool] = False
    dir: Positional[Annotated[Path | None, arg(metavar="[DIR]")]] = None
    """The same as --data-dir DIR."""

    def config(self, own: set[str], in_files: set[str]) -> Config:
        """The options alone; `own` are the flags that the user typed, `in_files` those of files.

        Raises `UserError` for data given twice, or for nothing, and for two poolings.
        """
        groups = {group.name: getattr(self, group.name) for group in dataclasses.fields(Config)}
        given = own & {"--data", "--data-dir"}
        if self.dir is not None:
            if given and self.data.data_dir not in (None, self.dir):
                raise UserError(f"{self.dir} and --data-dir {self.data.data_dir}: give the data directory once.")
            groups["data"] = dataclasses.replace(self.data, data_dir=self.dir)
        # A recipe's file names its data; to measure it with --synthetic beside it is no contradiction.
        unread = "--data-dir" if self.dir or given else min(own & {"--dataset"}, default="")
        if self.data.synthetic and unread:
            raise UserError(f"--synthetic reads no data, so {unread} would go unused. Leave one of the two out.")
        if self.gp:
            groups["model"] = _with_pooling(self.model, self.gp, own, in_files)
        config = Config(**groups)
        return _without_augmentation(config) if self.no_aug else config


def _with_pooling(model: Model, pooling: str, own: set[str], in_files: set[str]) -> Model:
    """The model options with `--gp`; of it and `global_pool` in --model-kwargs the one typed wins over a file's."""
    rest, other = take_keyword(model.model_kwargs, "global_pool")
    if other not in (None, pooling):
        origins = [("--gp" in flags, "--model-kwargs" in flags) for flags in (own, in_files)]
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


def _flags_in(tokens: Iterable[str]) -> set[str]:
    """The flags among command-line tokens, without their values and with dashes inside."""
    return {token.partition("=")[0].replace("_", "-") for token in tokens if token.startswith("--")}


def parse(argv: list[str], prog: str = "") -> Config:
    """Turn a command line (with any `--config FILE` in it) into a checked `Config`; usage lines call it `prog`.

    Raises `UserError` for a bad YAML file or a value out of range; exits with code 2 and tyro's message, which names
    the nearest flag, for a misspelt flag or a wrong type.
    """
    if "--help" in argv or "-h" in argv:
        print("--config FILE   flat YAML whose keys are the flags below; flags given beside it win\n", flush=True)
    hints: Hints = {name: hint for name, hint, _ in leaves(Config())} | HIDDEN
    paths, own = config_files(with_long_names(argv))
    line = translate(own, hints)
    files = {path: read_config(path, hints) for path in paths}
    from_files = [token for tokens in _merged(files.values()).values() for token in tokens]
    try:
        recipe = _with_img_size(_tyro(from_files), _flags_in(from_files)) if from_files else None
    except SystemExit as stop:
        _name_wrong_file(stop, files)
        raise
    typed = _flags_in(line.tokens)
    parsed = _with_img_size(_tyro(line.tokens, prog or usage_name("lowrank_vit.train"), recipe), typed)
    config = parsed.config(typed, _flags_in(from_files))
    config = _fit_defaults(config, typed, _flags_in(from_files))
    check(config)
    _tell_what_resuming_overrides(config)
    _tell_of_odd_batches(config)
    _tell_of_timms(files, line.held, typed)
    return config


_SWITCHES = {
    f"--{no}{name}": f"--{name}={not no}"
    for name, hint, _ in leaves(Config())
    if kind_of(hint).element is bool and kind_of(hint).may_be_none
    for no in ("", "no-")
}


def _merged(files: Iterable[FromFile]) -> dict[str, list[str]]:
    """The tokens by option; of several files the last that names an option counts."""
    return {name: tokens for file in files for name, tokens in file.tokens.items()}


def _tyro(tokens: list[str], prog: str = "", default: _CommandLine | None = None) -> _CommandLine:
    known: dict[str, Any] = {} if default is None else {"default": default}
    shown, hidden = _take_hidden(tokens)
    with fitted_help(shown):
        line = tyro.cli(OmitArgPrefixes[_CommandLine], args=shown, prog=prog, description=Config.__doc__, **known)
    return dataclasses.replace(line, **hidden)


def _take_hidden(tokens: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Tokens without the flags of `HIDDEN`, and the fields of `_CommandLine` that those set: tyro shows or drops.

    Switches that may be left open get a value, which tyro asks of them.
    """
    hidden = {"--gp": ("gp", None), "--no-aug": ("no_aug", True), "--no-no-aug": ("no_aug", False)}
    rest, fields = list[str](), dict[str, Any]()
    for token in tokens:
        flag, _, value = token.partition("=")
        if switch := _SWITCHES.get(token.replace("_", "-")):
            rest.append(switch)
        elif flag in hidden:
            name, switch = hidden[flag]
            fields[name] = value if switch is None else switch
        else:
            rest.append(token)
    return rest, fields


def _with_img_size(line: _CommandLine, given: set[str]) -> _CommandLine:
    """`img_size` of --model-kwargs as --img-size, which timm wants beside it. Raises `UserError` if they differ."""
    rest, text = take_keyword(line.model.model_kwargs, "img_size")
    if text is None:
        return line
    side, own = square_side(text), line.data.img_size
    if "--img-size" in given and own is not None and own != side:
        raise UserError(f"--img-size {own} and --model-kwargs img_size={text} differ. Give one of them, or one size.")
    model, data = dataclasses.replace(line.model, model_kwargs=rest), dataclasses.replace(line.data, img_size=side)
    return dataclasses.replace(line, model=model, data=data)


def _name_wrong_file(stop: SystemExit, files: dict[Path, FromFile]) -> None:
    """Add the YAML file to tyro's message, which names the flag alone."""
    for path, file in files.items():
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                _tyro([token for tokens in file.tokens.values() for token in tokens])
        except SystemExit:
            stop.add_note(f"error: the wrong value stands in --config {path}")


def _say(line: str) -> None:
    """Of the processes of one run the first speaks."""
    if os.environ.get("RANK", "") in ("", "0"):
        say(f"note: {line}")


def _tell_of_timms(files: dict[Path, FromFile], held: list[str], typed: set[str]) -> None:
    """Say what files are taken to mean, and which of timm's options change nothing here: one line a file, and one for
    what was asked for. What the `typed` flags or a later file overrule is not said.
    """
    merged = _merged(files.values())
    for path, file in files.items():
        for words, as_then in file.notes:
            counts = [
                " ".join(tokens)
                for name, tokens in as_then.items()
                if merged[name] is tokens and not typed & {f"--{name}", f"--no-{name}"}
            ]
            if counts or not as_then:
                _say(" ".join([words, *counts]))
        if file.num_skipped:
            _say(f"{file.num_skipped} options of timm's that are not here stand at neutral values in {path}: skipped")
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
    """They are refused by timm; here they are only less even."""
    augment, batch_size = config.augment, config.data.batch_size
    is_given = config.optim.global_batch_size is None  # else --batch-size is an upper limit
    if is_given and batch_size % 2 and (augment.mixup or augment.cutmix or augment.cutmix_minmax):
        _say(
            f"--batch-size {batch_size} is odd: mixing pairs images within a batch, so one of them stays as it is, and "
            "who is mixed with whom depends on ranks and accumulation"
        )


def _fit_defaults(config: Config, own: set[str], in_files: set[str]) -> Config:
    """Let values that the user did not give follow from those given: `--device cpu`, and a small `--epochs`."""
    optim, step = config.optim, config.step
    if step.device == "cpu":  # the defaults of these two look for a GPU, which --device cpu does not use
        given = in_files | own
        for name in ("amp", "compile"):
            if not given & {f"--{name}", f"--no-{name}"}:
                step = dataclasses.replace(step, **{name: False})
    if optim.warmup_epochs >= optim.epochs and not optim.warmup_prefix and "--warmup-epochs" not in own:
        optim = dataclasses.replace(optim, warmup_epochs=optim.epochs - 1)
        _say(f"--warmup-epochs shortened to {optim.warmup_epochs}, since --epochs is {optim.epochs}")
    data = config.data
    if data.workers == 0:
        data = dataclasses.replace(data, workers=1)
        _say("--workers 0 is --workers 1: images are decoded by a thread of this process")
    return dataclasses.replace(config, data=data, optim=optim, step=step)


def to_yaml(config: Config) -> str:
    """A flat YAML of every option, defaults included, and of what they mean; `--config` on it repeats the run.

    Left out are the run's own name and what it was resumed from: a repetition is a run of its own.
    """
    flat: dict[str, Any] = {meaning.KEY: meaning.now()}
    for name, _, value in leaves(config):
        if name in ("experiment", "resume"):
            continue
        if isinstance(value, tuple):
            value = list(value)
        flat[name] = str(value) if isinstance(value, Path) else value
    return yaml.safe_dump(flat, sort_keys=False)
