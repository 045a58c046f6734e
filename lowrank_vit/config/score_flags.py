"""Flags of timm's validate.py and inference.py that are not here: those without a use are taken, others get an answer.

`docs/from_timm.md` tells the same as tables, which the tests compare with these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lowrank_vit.common.errors import UserError

_KEYS = "leave it out, the data are folders of images or .beton files"
_RGB = "leave it out, images are RGB"
_CROP = "leave it out, the crop is the centre; --crop-pct sets its size"
_NAFLEX = "leave it out, images are square and of one size"
_COLUMNS = "leave it out, the columns are file, class_1, probability_1, class_2, ..."

_BOTH = {
    "class-map": "leave it out, labels are timm's order of the class folders",
    "in-chans": _RGB,
    "use-train-size": "--img-size N",
    "crop-mode": _CROP,
    "test-pool": "leave it out, there is no test-time pooling",
    "model-dtype": "--amp and --amp-dtype",
    "device-modules": "leave it out, --device is cpu or cuda",
}
VALIDATE_INSTEAD = {
    **_BOTH,
    "num-samples": "leave it out, the data tell their number of images",
    "input-key": _KEYS,
    "target-key": _KEYS,
    "dataset-trust-remote-code": _KEYS,
    "input-img-mode": _RGB,
    "crop-border-pixels": _CROP,
    "gp": "--model-kwargs global_pool=avg",
    "tf-preprocessing": "leave it out, images are resized as Pillow does it",
    "reparam": "leave it out, the model is scored as it was trained",
    "real-labels": "leave it out, labels are those of the class folders; sort the images by the other labels",
    "valid-labels": "--per-class FILE.csv, which has the scores of each class",
    "metrics-avg": "--per-class FILE.csv, from which precision and recall follow",
    "retry": "a smaller --batch-size",
    "naflex-loader": _NAFLEX,
    "naflex-max-seq-len": _NAFLEX,
}
"""By flag, without its dashes."""
INFERENCE_INSTEAD = {
    **_BOTH,
    "dataset": "--input FOLDER, which is searched for images",
    "split": "--input FOLDER/SPLIT",
    "results-separate-col": "leave it out, it is always so",
    "filename-col": _COLUMNS,
    "index-col": _COLUMNS,
    "label-col": _COLUMNS,
    "output-col": _COLUMNS,
}
_BOTH_UNUSED = {
    "log-freq": True,
    "channels-last": False,
    "fuser": True,
    "torchscript": False,
    "torchcompile": None,
    "torchcompile-mode": True,
    "aot-autograd": False,
}
VALIDATE_UNUSED: dict[str, bool | None] = {
    **_BOTH_UNUSED,
    "no-prefetcher": False,
    "pin-mem": False,
    "fast-norm": False,
    "seed": True,
}
"""Flags that change no score: taken, and said once. True: with a value, None: with or without one."""
INFERENCE_UNUSED: dict[str, bool | None] = {**_BOTH_UNUSED, "fullname": False}
_BACKENDS = ("inductor", "eager", "aot_eager", "cudagraphs", "openxla", "tvm", "onnxrt")


def fit_flags(
    argv: Iterable[str], instead: dict[str, str], unused: dict[str, bool | None], say: Callable[[str], object]
) -> list[str]:
    """The command line in our own flags: without those of `unused`, and with --input-size 3 N N as --img-size N.

    Raises `UserError` for the first flag of `instead`, for an --input-size that is not square and RGB, and for
    --num-gpu above 1.
    """
    tokens, fitted, left_out = list(argv), list[str](), list[str]()
    while tokens:
        token = tokens.pop(0)
        shown, equals, value = token.partition("=")
        name = shown[2:].replace("_", "-") if token.startswith("--") else ""
        if name in instead:
            raise UserError(f"{shown} is timm's; here: {instead[name]}.")
        if name in unused:
            takes_value = unused[name] or (unused[name] is None and tokens[:1] and tokens[0] in _BACKENDS)
            if takes_value and not equals and tokens:
                tokens.pop(0)
            left_out.append(shown)
        elif name == "num-gpu":
            if (value or (tokens.pop(0) if tokens else "")) != "1":
                raise UserError(f"{shown}: one GPU scores; CUDA_VISIBLE_DEVICES chooses which. Leave it out.")
            left_out.append(shown)
        elif name == "input-size":
            sizes, tokens = tokens[:3], tokens[3:]
            if len(set(sizes[1:])) != 1 or sizes[0] != "3" or len(sizes) < 3:
                raise UserError(f"{shown} {' '.join(sizes)}: images are RGB and square. Give --img-size N.")
            fitted += ["--img-size", sizes[2]]
        else:
            fitted.append(token)
    if left_out:
        verb = "changes" if len(left_out) == 1 else "change"
        say(f"note: {', '.join(left_out)} {verb} nothing here")
    return fitted


def with_suffix_of(path: Path, results_format: str) -> Path:
    """A --results-file with the suffix of its --results-format where it has none of its own."""
    return path if path.suffix in (".csv", ".json") else path.with_name(f"{path.name}.{results_format}")


def with_images_first(argv: Iterable[str], options: type) -> list[str]:
    """The command line with words that belong to no flag behind --input: images may stand before flags or after them.

    `options` is the dataclass of the flags, which tells how many values each takes.
    """
    takes: dict[str, int | None] = {"-h": 0, "--help": 0, "--tyro-write-completion": 2}
    for name, hint in get_type_hints(options, include_extras=True).items():
        short = [alias for note in getattr(hint, "__metadata__", ()) for alias in getattr(note, "aliases", None) or ()]
        for flag in (f"--{name.replace('_', '-')}", f"--no-{name.replace('_', '-')}", *short):
            takes[flag] = _values_of(hint)
    images, flags = list[str](), list[str]()
    open_flag, left = "", 0  # a flag that takes any number of words; how many the last one still takes
    for token in argv:
        if token.startswith("-") and token != "-":
            name, equals, value = token.partition("=")
            name = name.replace("_", "-")
            count = takes.get(name, 1)
            open_flag, left = (name, 0) if count is None else ("", 0 if equals else count)
            if name not in _INPUT:
                flags.append(token)
            elif equals:
                images.append(value)
        elif (open_flag and open_flag not in _INPUT and not _is_foreign(open_flag, token)) or left:
            flags.append(token)
            left = max(0, left - 1)
        else:
            images.append(token)
    return flags + (["--input", *images] if images else [])


def _is_foreign(flag: str, token: str) -> bool:
    """Whether a word cannot be a value of a flag that takes any number of them."""
    return flag == "--model-kwargs" and "=" not in token


_INPUT = ("--input", "--data-dir")


def _values_of(hint: Any) -> int | None:
    """How many words a flag of this type takes; None: any number."""
    hint = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if hint is bool:
        return 0
    tuples = [one for one in (hint, *get_args(hint)) if get_origin(one) is tuple]
    if not tuples:
        return 1
    return None if Ellipsis in get_args(tuples[0]) else len(get_args(tuples[0]))
