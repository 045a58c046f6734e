"""The one reader of files with weights: of this program, of timm, DeiT and MAE, bare state dicts and safetensors.

No code of a file is ever run: `torch.load` reads with `weights_only=True`, and numpy's numbers become Python's.
Archives of torch's are read twice, since torch itself does not compare their checksums.
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
"""Key of a checkpoint's content: "model" or "ema", whichever scored higher in the newest epoch; "" before the first."""
LOWRANK_RANKS = "lowrank_ranks"
"""Key of a checkpoint's content: the rank of each layer that is in factors, by its name; absent where none is."""
_OWN, _EMA = ("state_dict", "model"), ("state_dict_ema", "model_ema")
"""Where files have the model's weights and the EMA's, by timm, and by DeiT and MAE; timm looks in this order."""
_OF_A_RUN = ("state_dict", "optimizer", "progress", "step", "data", "args")
"""What a run is continued from."""
_OF_THE_MONITOR = {"update", "weights", "before"}


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds, under timm's keys; tensors are on the CPU."""

    path: Path
    content: dict[str, Any]
    """state_dict, state_dict_ema, and what else there is: arch, epoch, args, class_names, optimizer, metric, ...

    The names of tensors are the model's own: without what DDP and torch.compile put before them.
    """
    is_npz: bool = False
    """Whether these are Google's arrays, which each model of timm reads in a way of its own."""
    no_tensors: tuple[str, ...] = ()
    """Names among the weights that hold something else, such as a counter; they are left out."""
    source: str = ""
    """The model of the hub, or the folder, that it is of, as in `hub.py`; empty for a file by itself."""

    @property
    def arch(self) -> str:
        """Timm model name, empty where the file does not tell; DeiT and MAE have it among their arguments."""
        arch = self.content.get("arch")
        name = arch if isinstance(arch, str) else ""
        if not name and isinstance(args := self.content.get("args"), argparse.Namespace):
            told = str(getattr(args, "model", ""))
            name = told if timm.is_model(told) else ""
        return name

    @property
    def epoch(self) -> int:
        """Last finished epoch, 0-based; -1 where the file does not tell."""
        epoch = self.content.get("epoch")
        return int(epoch) if isinstance(epoch, int | float) and math.isfinite(epoch) else -1

    @property
    def args(self) -> dict[str, Any]:
        """The run's flags by name; empty for files of other programs."""
        args = self.content.get("args")
        return args if isinstance(args, dict) else {}

    @property
    def class_names(self) -> list[str] | None:
        """Names of the first outputs, in their order; None where the file does not tell."""
        names: Any = self.content.get("class_names")
        is_list = isinstance(names, list | tuple) and len(names) > 0 and all(isinstance(name, str) for name in names)
        return list(names) if is_list else None

    @property
    def lowrank_ranks(self) -> dict[str, int]:
        """The rank of each layer in factors, as far as the file tells. Raises `UserError` for what are no ranks."""
        ranks: Any = self.content.get(LOWRANK_RANKS)
        if ranks is None:
            return {}
        if not isinstance(ranks, dict) or not all(isinstance(n, str) and type(r) is int for n, r in ranks.items()):
            raise UserError(
                f"{self.path} is damaged: its `{LOWRANK_RANKS}` is {in_words(ranks)}, where names of layers and their "
                "ranks belong. Give another checkpoint."
            )
        return dict(ranks)

    @property
    def meaning(self) -> int:
        """The number of what its seeds and flags mean. Raises `UserError` for one of a newer program."""
        return meaning.number_in(self.content, str(self.path)) or meaning.FIRST

    @property
    def has_ema(self) -> bool:
        """True where there are EMA weights."""
        return "state_dict_ema" in self.content

    @property
    def lora(self) -> Lora | None:
        """The adapters of the weights; None without. Raises `UserError` for what does not tell of any."""
        told: Any = self.content.get(LORA)
        return None if told is None else Lora.of_content(told, str(self.path))

    def weights(self, use_ema: bool, *, with_adapters: bool = False) -> dict[str, Tensor]:
        """The state dict of the model or of its EMA, half precision as float32. Raises `UserError` if it is absent.

        Adapters are merged into the weights, unless they are to be loaded `with_adapters`.
        """
        if self.is_npz:
            raise UserError(
                f"{self.path} has Google's arrays, which timm fits to a model as it makes it. Give the file with "
                "--pretrained-path (train, validate, inference) and --model NAME."
            )
        if use_ema and not self.has_ema:
            raise UserError(f"{self.path} holds no EMA weights. Leave out --use-ema to read the model's own.")
        if not use_ema and "state_dict" not in self.content:
            raise UserError(f"{self.path} holds EMA weights alone. Add --use-ema to read them.")
        found: dict[str, Tensor] = self.content["state_dict_ema" if use_ema else "state_dict"]
        weights = {name: _at_least_float32(tensor) for name, tensor in found.items()}
        return weights if with_adapters and self.lora else merged(weights, self.lora, str(self.path))

    @property
    def starts_from_ema(self) -> bool:
        """Whether a start is made from the EMA's weights, see `weights_to_start_from`."""
        return self.has_ema and ("state_dict" not in self.content or self.content.get(BETTER) != "model")

    def weights_to_start_from(self) -> tuple[dict[str, Tensor], bool]:
        """A state dict, and whether it is the EMA's.

        The EMA's where there is one, as timm chooses, unless the file says that the model itself scored higher.
        """
        return self.weights(self.starts_from_ema), self.starts_from_ema

    def num_outputs(self, heads: tuple[str, ...]) -> int | None:
        """How many classes the first layer of `heads` that is there tells apart; None without one."""
        if self.is_npz:
            return self.content.get("num_classes")
        weights = self.content.get("state_dict") or self.content["state_dict_ema"]
        of_heads = (f"{head}.{kind}" for head in heads for kind in ("weight", "up"))  # up: of a head in factors
        found = (weights[name] for name in of_heads if name in weights)
        return next((len(weight) for weight in found if weight.ndim), None)

    def training_state(self, key: str) -> Any:
        """A part needed to continue a run. Raises `UserError` where the file is not of a run, or holds weights only."""
        if lacking := [one for one in _OF_A_RUN if not isinstance(self.content.get(one), dict)]:
            start = f"--pretrained-path {self.path}, which fits them to the model"
            if not self.is_npz:
                start = f"--initial-checkpoint {self.path}, or with {start}"
            raise UserError(
                f"{self.path} cannot be resumed: it lacks `{lacking[0]}`, since it is {self._in_words()}. Start anew "
                f"from its weights with {start}; --resume takes a last.pth.tar of a run."
            )
        return self.content[key]

    def _in_words(self) -> str:
        """What kind of file it is."""
        if self.is_npz:
            return "Google's arrays"
        if COMPRESSION in self.content:
            return "the weights of a compressed model, without a run's state"
        its = [name for name in ("optimizer", "progress", "step", "data", "args", "epoch") if name in self.content]
        if not its:
            return "a file of weights alone"
        if "progress" in its or meaning.KEY in self.content:
            return "a run's checkpoint of which a part is gone, or was written over"
        return f"a checkpoint of another program (its {', '.join(its)} are not a run's of this one)"

    def checked_args(self, *names: str) -> dict[str, Any]:
        """`args`, where those options have values that they take; without names those that a run keeps to its end.

        Raises `UserError`.
        """
        for name, hint, _ in leaves(Config()):
            is_wanted = name in names if names else not may_change(hint)
            if is_wanted and name in self.args and not _is_of(hint, self.args[name]):
                raise UserError(
                    f"{self.path} is damaged or was written over: its `args` has {in_words(self.args[name])} for "
                    f"--{name}, which takes no such value. Give another checkpoint of the run."
                )
        return self.args


def require_file(path: Path, what: str = "Checkpoint") -> None:
    """Raise `UserError` where there is no file of weights, naming those of a folder."""
    if not path.is_file():
        found = sorted(str(p) for p in path.glob("*") if p.suffix in SUFFIXES) if path.is_dir() else []
        hint = f" That folder has: {', '.join(found)}." if found else ""
        raise UserError(f"{what} {path} does not exist or is no file.{hint}")


def read_checkpoint(path: Path, what: str = "Checkpoint") -> Checkpoint:
    """Read a file of weights in any form, running no code in it. Raises `UserError`, which begins with `what` and path.

    Forms: {"state_dict", "state_dict_ema"} of this program and timm, {"model", "model_ema"} of DeiT and MAE, both with
    whatever else; a state dict alone; .safetensors; .npz, whose arrays are left to timm.
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
        held = ", ".join(map(str, list(content)[:8])) or "nothing with names"
        if content.keys() == _OF_THE_MONITOR:
            raise UserError(
                f"{what} {path} is what the spectral monitor keeps beside a checkpoint, and finds by itself. Give the "
                "run's last.pth.tar."
            )
        raise UserError(
            f"{what} {path} holds no `state_dict`, no `model` and no tensors alone, but {held}. Give a checkpoint of "
            "this program or of timm."
        )
    no_tensors: list[str] = []
    for keys, key in found.items():
        weights = content.pop(key) if key else {}
        content.pop(keys[0], None)  # what is there and no state dict is of no use to anybody
        no_tensors += [name for name, value in weights.items() if not isinstance(value, Tensor)]
        if key:
            tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
            content[keys[0]] = _with_plain_names(tensors, f"{what} {path}")
    return Checkpoint(path, content, no_tensors=tuple(dict.fromkeys(no_tensors)))


def _with_plain_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same tensors under the model's own names. Raises `UserError` for two of one name, and for no plain array."""
    names = {name: plain_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if odd := oddity(tensor):
            raise UserError(f"{source}: `{name}` is {odd}, and weights are plain arrays here. Save it as one.")
    twice = next((name for name, count in Counter(names.values()).items() if count > 1), None)
    if twice is not None:
        found = " and ".join(f"`{name}`" for name, plain in names.items() if plain == twice)
        raise UserError(f"{source} holds {found}, which are one tensor of the model. Save the weights of one model.")
    return {names[name]: tensor for name, tensor in tensors.items()}


def in_words(value: Any) -> str:
    """A value of a file for a message: short, of a tensor its type and shape."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}, {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_of(hint: Any, value: Any) -> bool:
    """Whether a plain value may be an option's, as far as types and ranges tell; choices may be an older program's."""
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
    """True for a mapping of names to tensors, but for a few plain values among them, such as a counter."""
    if not isinstance(value, dict) or not all(isinstance(one, Tensor | int | float | None) for one in value.values()):
        return False
    return 2 * sum(isinstance(one, Tensor) for one in value.values()) > len(value)


def _first_of(content: dict[str, Any], keys: tuple[str, ...]) -> str:
    """The first of `keys` that holds a state dict; an empty string without one."""
    return next((key for key in keys if is_state_dict(content.get(key))), "")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize < 4 else tensor
