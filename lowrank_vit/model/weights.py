"""The reader of all weight files: of this program, timm, DeiT and MAE, bare state dicts, safetensors and .npz.

No code from a file is ever run: `torch.load` reads with `weights_only=True`, and numpy's numbers become Python's.
torch's archives are read twice, since torch itself does not verify their checksums.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import timm
from torch import Tensor

from lowrank_vit.common.arguments import Range
from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import kind_of, leaves, may_change
from lowrank_vit.config.options import Config
from lowrank_vit.model.foreign import oddity, plain_name
from lowrank_vit.model.lora import KEY as LORA
from lowrank_vit.model.lora import Lora, merged
from lowrank_vit.model.weight_files import COMPRESSION, SUFFIXES, about_npz, read_safetensors, reason_of, unpickled

BETTER = "better"
"""Key in a checkpoint: "model" or "ema", whichever scored higher in the latest epoch; "" before the first."""
LOWRANK_RANKS = "lowrank_ranks"
"""Key in a checkpoint: the rank of each factorised layer, by name; absent if there is none."""
_OWN, _EMA = ("state_dict", "model"), ("state_dict_ema", "model_ema")
"""Keys of the model's weights and the EMA's in files of timm, and of DeiT and MAE; timm searches in this order."""
_OF_A_RUN = ("state_dict", "optimizer", "progress", "step", "data", "args")
"""Keys that a run needs to continue."""
_OF_THE_MONITOR = {"update", "weights", "before"}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weight file, under timm's keys; tensors are on the CPU."""

    path: Path
    content: dict[str, Any]
    """state_dict, state_dict_ema, and other entries: arch, epoch, args, class_names, optimizer, metric, ...

    Tensors have the model's own names, without the prefixes of DDP and torch.compile.
    """
    is_npz: bool = False
    """Whether these are Google's arrays, which each timm model reads in its own way."""
    no_tensors: tuple[str, ...] = ()
    """Names among the weights of values that are not tensors, such as a counter; they are left out."""
    source: str = ""
    """The hub model or folder that it belongs to, as in `hub.py`; empty for a single file."""

    @property
    def arch(self) -> str:
        """Timm model name; empty if the file has none. DeiT and MAE store it among their arguments."""
        arch = self.content.get("arch")
        name = arch if isinstance(arch, str) else ""
        if not name and isinstance(args := self.content.get("args"), argparse.Namespace):
            told = str(getattr(args, "model", ""))
            name = told if timm.is_model(told) else ""
        return name

    @property
    def epoch(self) -> int:
        """Last finished epoch, 0-based; -1 if the file does not say."""
        epoch = self.content.get("epoch")
        return int(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else -1

    @property
    def args(self) -> dict[str, Any]:
        """The run's flags by name; empty for files of other programs."""
        args = self.content.get("args")
        return args if isinstance(args, dict) else {}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the first outputs, in order; None if the file has none."""
        names: Any = self.content.get("class_names")
        is_list = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
        return list(names) if is_list else None

    @property
    def lowrank_ranks(self) -> dict[str, int]:
        """The rank of each factorised layer, if the file has ranks. Raises `UserError` for an invalid entry."""
        ranks: Any = self.content.get(LOWRANK_RANKS)
        if ranks is None:
            return {}
        if not isinstance(ranks, dict) or not all(isinstance(n, str) and type(r) is int for n, r in ranks.items()):
            raise UserError(
                f"{self.path} is damaged: its `{LOWRANK_RANKS}` is {in_words(ranks)}, not a rank for each "
                "layer name. Give another checkpoint."
            )
        return dict(ranks)

    @property
    def meaning(self) -> int:
        """The version number of what its seeds and flags mean. Raises `UserError` for a newer program's."""
        return meaning.number_in(self.content, str(self.path)) or meaning.FIRST

    @property
    def has_ema(self) -> bool:
        """True if there are EMA weights."""
        return "state_dict_ema" in self.content

    @property
    def lora(self) -> Lora | None:
        """The LoRA adapters of the weights; None without. Raises `UserError` for an invalid entry."""
        told: Any = self.content.get(LORA)
        return None if told is None else Lora.of_content(told, str(self.path))

    def weights(self, use_ema: bool, *, with_adapters: bool = False) -> dict[str, Tensor]:
        """The state dict of the model or of its EMA, with half precision converted to float32.

        Adapters are merged into the weights unless `with_adapters`. Raises `UserError` if the file has no such weights.
        """
        if self.is_npz:
            raise UserError(
                f"{self.path} has Google's arrays, which timm can only load while it makes a model. Give the file with "
                "--pretrained-path (train, validate, inference) and --model NAME."
            )
        if use_ema and not self.has_ema:
            raise UserError(f"{self.path} has no EMA weights. Leave out --use-ema to read the model's own.")
        if not use_ema and "state_dict" not in self.content:
            raise UserError(f"{self.path} has only EMA weights. Add --use-ema to read them.")
        found: dict[str, Tensor] = self.content["state_dict_ema" if use_ema else "state_dict"]
        weights = {name: _at_least_float32(tensor) for name, tensor in found.items()}
        return weights if with_adapters and self.lora else merged(weights, self.lora, str(self.path))

    @property
    def starts_from_ema(self) -> bool:
        """Whether `weights_to_start_from` returns the EMA's weights."""
        return self.has_ema and ("state_dict" not in self.content or self.content.get(BETTER) != "model")

    def weights_to_start_from(self) -> tuple[dict[str, Tensor], bool]:
        """The state dict to start from, and whether it is the EMA's.

        As in timm, the EMA's weights are chosen if there are any, unless the file says that the model scored higher.
        """
        return self.weights(self.starts_from_ema), self.starts_from_ema

    def num_outputs(self, heads: tuple[str, ...]) -> int | None:
        """The number of outputs of the first of the layers `heads` in the file; None if it has none of them."""
        if self.is_npz:
            return self.content.get("num_classes")
        weights = self.content.get("state_dict") or self.content["state_dict_ema"]
        of_heads = (f"{head}.{kind}" for head in heads for kind in ("weight", "up"))  # up: of a head in factors
        found = (weights[name] for name in of_heads if name in weights)
        return next((len(weight) for weight in found if weight.ndim), None)

    def training_state(self, key: str) -> Any:
        """An entry that a run needs to continue. Raises `UserError` if the file lacks one of these."""
        if lacking := [one for one in _OF_A_RUN if not isinstance(self.content.get(one), dict)]:
            start = f"--pretrained-path {self.path}, which fits them to the model"
            if not self.is_npz:
                start = f"--initial-checkpoint {self.path}, or with {start}"
            raise UserError(
                f"{self.path} cannot be resumed: it lacks `{lacking[0]}`, since it is {self._in_words()}. Give "
                f"--resume the last.pth.tar of a run, or start a new run from these weights with {start}."
            )
        return self.content[key]

    def _in_words(self) -> str:
        """The kind of file, as a phrase."""
        if self.is_npz:
            return "Google's arrays"
        if COMPRESSION in self.content:
            return "the weights of a compressed model, without a run's state"
        its = [name for name in ("optimizer", "progress", "step", "data", "args", "epoch") if name in self.content]
        if not its:
            return "a file with weights only"
        if "progress" in its or meaning.KEY in self.content:
            return "a run's checkpoint with a part missing or overwritten"
        return f"a checkpoint of another program (its {', '.join(its)} are not from a run of this one)"

    def checked_args(self, *names: str) -> dict[str, Any]:
        """`args`, after checking the values of these options; without names, of those that a run may not change.

        Raises `UserError` for a value that an option does not take.
        """
        for name, hint, _ in leaves(Config()):
            is_wanted = name in names if names else not may_change(hint)
            if is_wanted and name in self.args and not _is_of(hint, self.args[name]):
                raise UserError(
                    f"{self.path} is damaged or was overwritten: its `args` has {in_words(self.args[name])} for "
                    f"--{name}, which does not take this value. Give another checkpoint of the run."
                )
        return self.args


def require_file(path: Path, what: str = "Checkpoint") -> None:
    """Raise `UserError` if `path` is not a file; for a folder it lists the weight files inside."""
    if not path.is_file():
        found = sorted(str(p) for p in path.glob("*") if p.suffix in SUFFIXES) if path.is_dir() else []
        hint = f" That folder has: {', '.join(found)}." if found else ""
        raise UserError(f"{what} {path} does not exist or is not a file.{hint}")


def read_checkpoint(path: Path, what: str = "Checkpoint") -> Checkpoint:
    """Read a weight file of any format without running code from it. Raises `UserError` beginning with `what` and path.

    Formats: {"state_dict", "state_dict_ema"} of this program and timm, {"model", "model_ema"} of DeiT and MAE, both
    with other entries; a bare state dict; .safetensors; .npz, whose arrays timm reads.
    """
    path = Path(path)
    require_file(path, what)
    try:
        if path.suffix == ".npz":
            return Checkpoint(path, about_npz(path), is_npz=True)
        content: Any = read_safetensors(path) if path.suffix == ".safetensors" else unpickled(path)
    except Exception as error:  # a damaged or foreign file fails in many ways
        raise UserError(f"{what} {path} cannot be read: {reason_of(path, error)}") from error
    if is_state_dict(content):
        content = {"state_dict": content}
    content = dict(content) if isinstance(content, dict) else {}
    found = {_OWN: _first_of(content, _OWN), _EMA: _first_of(content, _EMA)}
    if not any(found.values()):
        held = ", ".join(map(str, list(content)[:8])) or "nothing named"
        if content.keys() == _OF_THE_MONITOR:
            raise UserError(
                f"{what} {path} is the spectral monitor's own file beside a checkpoint, which it finds by itself. Give "
                "the run's last.pth.tar."
            )
        raise UserError(
            f"{what} {path} has no `state_dict` or `model` and is not a bare state dict. It has {held}. Give a "
            "checkpoint of this program or of timm."
        )
    no_tensors: list[str] = []
    for keys, key in found.items():
        weights = content.pop(key) if key else {}
        content.pop(keys[0], None)  # an entry that is not a state dict is useless
        no_tensors += [name for name, value in weights.items() if not isinstance(value, Tensor)]
        if key:
            tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
            content[keys[0]] = _with_plain_names(tensors, f"{what} {path}")
    return Checkpoint(path, content, no_tensors=tuple(dict.fromkeys(no_tensors)))


def _with_plain_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The tensors under the model's own names. Raises `UserError` for duplicates and for tensors of other kinds."""
    names = {name: plain_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if odd := oddity(tensor):
            raise UserError(f"{source}: `{name}` is {odd}, but weights must be plain arrays. Save it as one.")
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        found = " and ".join(f"`{name}`" for name, plain in names.items() if plain == twice)
        raise UserError(f"{source} has {found}, which are the same tensor of the model. Save the weights of one model.")
    return {names[name]: tensor for name, tensor in tensors.items()}


def in_words(value: Any) -> str:
    """A value from a file for a message, shortened; for a tensor, its dtype and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a value fits an option's type and range; choices are not checked, as they differ between versions."""
    kind = kind_of(hint)
    if value is None:
        return kind.may_be_none
    if not kind.is_tuple:
        return _is_one_of(hint, value)
    is_list = isinstance(value, list | tuple) and kind.count in (None, len(value))
    return is_list and all(_is_one_of(hint, one) for one in value)


def _is_one_of(hint: Any, value: Any) -> bool:
    element = kind_of(hint).element
    if element is bool or isinstance(value, bool):
        return element is bool and isinstance(value, bool)
    if element in (int, float):
        ranges = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Range)]
        is_number = isinstance(value, int if element is int else int | float)
        return is_number and all(value in one for one in ranges)
    return isinstance(value, str) or (isinstance(value, int) and value in get_args(element))


def is_state_dict(value: Any) -> bool:
    """True for a mapping of names to tensors, apart from a few plain values such as a counter."""
    if not isinstance(value, dict) or not all(isinstance(one, Tensor | int | float | None) for one in value.values()):
        return False
    return 2 * sum(isinstance(one, Tensor) for one in value.values()) > len(value)


def _first_of(content: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of `keys` with a state dict; empty if there is none."""
    return next((key for key in keys if is_state_dict(content.get(key))), "")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
