"""From the data flags to a run's two sets: find them, or convert their source; open them; check that they fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from data_prep.convert_rows import KINDS, Kind, parse_name
from data_prep.formats.beton import find_parts
from data_prep.formats.image_formats import image_suffixes, is_of_the_system
from data_prep.formats.sidecars import read_manifest
from data_prep.sources.image_folder import NO_CLASSES, Nested, count_remarks
from data_prep.sources.samples import DIGITS, abbreviated
from data_prep.sources.table_columns import Columns
from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filesystem import place_of
from lowrank_vit.common.locks import Say, one_process_in
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.data.sets.cifar import TORCH_DATASETS, cifar100, find_archive
from lowrank_vit.data.sets.image_dirs import FOLDER, converted, names_of, split_folder
from lowrank_vit.data.sets.labels import give_labels_of
from lowrank_vit.data.sets.row_sets import converted_rows
from lowrank_vit.data.sets.staging import stage_all

Split = Literal["train", "val"]
OneOf = Callable[[str, Callable[[], Any]], Any]
"""Lets one of all processes that name the same place call a function; all get its result, which must be JSON."""
FOLDERS = ("", "folder", "imagefolder", "image_folder", "torch/folder", "torch/image_folder")
"""timm's names for a folder of images."""
FINDING = "opening the data, or converting or staging them"
"""A command's current step while it calls this module, for messages."""
DEFAULT_DIR = Path("data")
_ADVICE = (
    "Give a folder with train/ and val/, each with one folder per class, or one that `python -m data_prep` wrote. "
    "--dataset digits trains on scikit-learn's handwritten digits."
)


def by_itself(place: str, do: Callable[[], Any]) -> Any:
    """The `OneOf` of a process that is alone."""
    return do()


@dataclass(frozen=True)
class DataOptions:
    """Which data; names and meanings are the flags'."""

    dataset: str = ""
    data_dir: Path | None = None
    dataset_download: bool = False
    beton_dir: Path | None = None
    train_split: str = "train"
    val_split: str = "validation"
    on_bad: Literal["error", "skip"] = "error"
    """What a conversion does with an image that does not decode."""
    nested: Nested = "leaf"
    """Which folders are classes, see `data_prep.sources.image_folder`."""
    trust_labels: bool = False
    """Two sets may have different classes: label N of one is label N of the other."""
    input_key: str = ""
    target_key: str = ""
    class_map: Path | None = None
    """For data sets other than image folders, see `data_prep.sources.table_columns.Columns`."""
    flag: str = "--data-dir"
    """The command's name for `data_dir`, for messages."""

    @property
    def columns(self) -> Columns:
        """Which columns of the rows hold images and labels."""
        return Columns(self.input_key, self.target_key, self.class_map)


def locate(options: DataOptions, say: Say = terminal.say, one_of: OneOf = by_itself) -> tuple[Path, Path]:
    """The training and the validation `.beton` (either may stand for its parts), converted now if need be.

    `one_of`: see `OneOf`; with it one process examines the images and converts them, for all that share the folders.
    Raises `UserError`: unknown data set, no data, no such split, folder not writable, images that do not decode.
    """
    train, val = _by_one(one_of, _places(options), lambda: _locate(options, ("train", "val"), say))
    return train, val


def locate_validation(
    path: Path | None,
    options: DataOptions,
    say: Say = terminal.say,
    stage_dir: Path | None = None,
    one_of: OneOf = by_itself,
) -> Path:
    """The validation `.beton` alone: `path` itself, or that of `options` with `path` as `data_dir`.

    `path` may also be a folder of class folders without splits. `stage_dir`: return a copy there. Raises `UserError`.
    """
    places = _places(options if path is None else replace(options, data_dir=path))
    found = _by_one(one_of, places, lambda: [_locate_validation(path, options, say)])
    return staged(found, stage_dir, say, one_of)[0]


def staged(betons: Sequence[Path], stage_dir: Path | None, say: Say, one_of: OneOf = by_itself) -> list[Path]:
    """`betons` themselves, or with `stage_dir` their copies there (`stage_all`), made by one process of those there."""
    if stage_dir is None:
        return list(betons)
    return _by_one(one_of, [stage_dir, *betons], lambda: stage_all(betons, stage_dir, say))


def _by_one(one_of: OneOf, places: Sequence[Path], find: Callable[[], Sequence[Path]]) -> list[Path]:
    place = json.dumps([place_of(path) for path in places])
    return [Path(path) for path in one_of(place, lambda: [str(path) for path in find()])]


def _places(options: DataOptions) -> list[Path]:
    """All folders and files that decide what is found and whether it is converted; some may not exist."""
    kind = kind_of(options.dataset, options.flag)
    places = [options.data_dir or DEFAULT_DIR, *filter(None, (options.beton_dir, options.class_map))]
    if kind == "cifar100" and options.data_dir is None:
        places.append(TORCH_DATASETS.expanduser())
    if kind in KINDS:
        data, _ = parse_name(kind, options.dataset.partition("/")[2], options.data_dir, options.columns)
        places += [data.local] if data.local else []
    return places


def _locate_validation(path: Path | None, options: DataOptions, say: Say) -> Path:
    if path is None:
        return _locate(options, ("val",), say)[0]
    if not path.is_dir() and (path.suffix == ".beton" or path.is_file()):
        return path
    given = replace(options, data_dir=path)
    may_be_single = kind_of(options.dataset, options.flag) == "" and path.is_dir() and not _betons(given, ("val",))
    if may_be_single and _is_single(path, options):
        if not _folders_in(path):  # before anything is made
            raise UserError(
                f"{options.flag} {path} has no class folders. Put the images of each class into a sub-folder."
            )
        place = options.beton_dir or path.resolve().parent / FOLDER
        return converted([(path, "val")], place, say, **_rules(options))[0]
    return _locate(given, ("val",), say)[0]


def _is_single(root: Path, options: DataOptions) -> bool:
    """Whether a folder holds classes, not splits. A class may be named test or val: it holds images, a split folders.

    A folder that is named by --val-split is a split.
    """
    splits = [name for name in (*names_of(options.val_split), "test") if (root / name).is_dir()]
    if not splits:
        return not (root / FOLDER).is_dir()
    if options.val_split in splits and options.val_split != DataOptions.val_split:
        return False
    others = set(_folders_in(root)) - NO_CLASSES - {options.train_split, options.val_split}
    return bool(others) and all(_holds_images(root / name) for name in splits)


def _holds_images(folder: Path) -> bool:
    return any(path.suffix.lower() in image_suffixes() for path in folder.iterdir())


def _rules(options: DataOptions) -> dict[str, Any]:
    """The arguments of `converted` that follow from the options."""
    return {
        "is_own": options.beton_dir is None,
        "on_bad": options.on_bad,
        "nested": options.nested,
        "trust_labels": options.trust_labels,
        "flag": options.flag,
    }


def _locate(options: DataOptions, wanted: tuple[Split, ...], say: Say) -> list[Path]:
    kind = kind_of(options.dataset, options.flag)
    if kind in KINDS:
        return _locate_rows(kind, options, wanted, say)
    if given := next((name for name, value in options.columns.options().items() if value), ""):
        raise UserError(
            f"--{given.replace('_', '-')} is for --dataset hfds/, hfids/ and wds/. The labels of folders are timm's "
            "order of their names; `python -m data_prep imagefolder --classes FILE` chooses among them."
        )
    splits = options.train_split, options.val_split
    for flag, name in zip(("--train-split", "--val-split"), splits, strict=True):
        if not name or Path(name).name != name or name == "..":
            raise UserError(f"{flag} '{name}' must be the name of a folder in {options.flag}, say {flag} train.")
    if kind == "cifar100":
        how: dict[str, Any] = {"download": options.dataset_download, "splits": splits, "say": say, "flag": options.flag}
        both = cifar100(options.data_dir, options.beton_dir, **how)
        return [both[("train", "val").index(split)] for split in wanted]
    root = options.data_dir or DEFAULT_DIR
    if kind == "digits" and _lacks_digits(options):
        from data_prep.convert import convert_digits

        with one_process_in(root, say, f"Give a folder that can be written with {options.flag}."):
            if _lacks_digits(options):
                convert_digits(root)
    there = _betons(options, wanted)
    if there or kind == "digits":
        return [there.get(split, root / f"{split}.beton") for split in wanted]
    return _from_images(root, options, wanted, say)


def _locate_rows(kind: Kind, options: DataOptions, wanted: tuple[Split, ...], say: Say) -> list[Path]:
    name = options.dataset.partition("/")[2]
    data, split = parse_name(kind, name, options.data_dir, options.columns)
    asked = {"train": options.train_split, "val": options.val_split}
    one = wanted[0]
    default = DataOptions.train_split if one == "train" else DataOptions.val_split
    if split and asked[one] not in (default, split):
        raise UserError(
            f"--dataset {options.dataset} names a split, and --{one}-split {asked[one]} another. Leave one."
        )
    if split:
        asked[one] = split
    flags = {"train": "--train-split", "val": "--val-split" if len(wanted) > 1 else "--split"}
    splits: list[tuple[str, Split, str]] = [(asked[role], role, flags[role]) for role in wanted]
    rules: dict[str, Any] = {"on_bad": options.on_bad, "trust_labels": options.trust_labels}
    return converted_rows(data, splits, options.beton_dir, DEFAULT_DIR, say, **rules)


def columns_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """The columns that a run has read, from its options `args` by flag name; arguments of `DataOptions`."""
    class_map = args.get("class-map")
    keys: dict[str, Any] = {key: str(args.get(key.replace("_", "-")) or "") for key in ("input_key", "target_key")}
    return {**keys, "class_map": Path(class_map) if class_map else None}


def without_split(dataset: str, data_dir: Path | None, flag: str = DataOptions.flag) -> tuple[str, Path | None]:
    """--dataset and --data-dir without the split that the former may name, since that is the training split.

    Raises `UserError`.
    """
    kind = kind_of(dataset, flag)
    if kind not in KINDS:
        return dataset, data_dir
    data, _ = parse_name(kind, dataset.partition("/")[2], data_dir)
    return f"{kind}/{data.name}", data.root


def _lacks_digits(options: DataOptions) -> bool:
    """Whether the digits must be written: never over a file of the user's, but also if only our training set exists.

    A killed attempt leaves that.
    """
    there = _betons(options, ("train", "val"))
    if not there or "val" in there:
        return not there
    try:
        return read_manifest(there["train"]).source == DIGITS.format(split="train")
    except UserError:
        return False


def kind_of(dataset: str, flag: str = DataOptions.flag) -> Literal["", "digits", "cifar100"] | Kind:
    """The kind of --dataset; an empty string for a folder. Raises `UserError` for an unknown one.

    `flag`: see `DataOptions`.
    """
    name = dataset.lower()
    for kind in KINDS:
        if name.startswith(f"{kind}/"):
            return kind
    if name in FOLDERS:
        return ""
    if name == "digits":
        return "digits"
    if name == "torch/cifar100":
        return "cifar100"
    hint = f"Save its images as train/CLASS/FILE.jpg and val/CLASS/FILE.jpg, and give that folder with {flag}."
    if name.startswith("torch/"):
        hint = (
            "`python -m data_prep torch MODULE:FUNCTION --out DIR/train.beton` converts what a function of yours "
            f"returns, such as a data set of torchvision's; then give DIR with {flag}."
        )
    if name == "cifar100":
        hint = "Did you mean torch/cifar100?"
    raise UserError(
        f"--dataset {dataset} is not there. There are: folder (the default: {flag} holds images or .beton files), "
        f"hfds/NAME and hfids/NAME (Hugging Face's), wds/ (shards of WebDataset), torch/cifar100, digits. {hint}"
    )


def _betons(options: DataOptions, wanted: tuple[Split, ...], folder: Path | None = None) -> dict[Split, Path]:
    """The wanted sets that are in `folder`, by default the data directory, by timm's split names."""
    root = folder or options.data_dir or DEFAULT_DIR
    names = {"train": options.train_split, "val": options.val_split}
    found: dict[Split, Path] = {}
    for split in wanted:
        candidates = (root / f"{name}.beton" for name in names_of(names[split]))
        first = next((path for path in candidates if path.exists() or find_parts(path)), None)
        if first:
            found[split] = first
    return found


def _from_images(root: Path, options: DataOptions, wanted: tuple[Split, ...], say: Say) -> list[Path]:
    names = {"train": options.train_split, "val": options.val_split}
    found: dict[Split, Path | None] = {split: split_folder(root, names[split], say) for split in wanted}
    folders: list[tuple[Path, Split]] = [(folder, split) for split, folder in found.items() if folder]
    place = options.beton_dir or root / FOLDER
    if len(folders) == len(wanted):
        return converted(folders, place, say, **_rules(options))
    done = _betons(options, wanted, place)
    if not folders and len(done) == len(wanted):
        say(f"the images of {root} are gone: using the converted ones in {place}")
        return [done[split] for split in wanted]
    missing: dict[Split, str] = {split: names[split] for split in wanted if not found[split]}
    raise UserError(
        _what_is_missing(f"{options.flag} {root}", root, missing, is_split=bool(folders) or wanted == ("val",))
    )


def _folders_in(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir() and not is_of_the_system(path.name))


def _what_is_missing(given: str, root: Path, missing: dict[Split, str], *, is_split: bool) -> str:
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        return f"{given} {what}, so there is neither train.beton nor a folder of images named train. {_ADVICE}"
    if find_archive(root):
        return f"{given} holds CIFAR-100's archive. Add --dataset torch/cifar100."
    present = _folders_in(root)
    holds = (
        f"it holds {', '.join(present[:6])}{', ...' if len(present) > 6 else ''}" if present else "it has no folders"
    )
    split, name = next(iter(missing.items()))
    flag = f"--{split}-split"
    if is_split and present:
        also = ", ".join(n for n in (*names_of(name), *(("test",) if split == "val" else ())) if n != name)
        return (
            f"{given} has no folder for {flag} {name}{f' (nor {also})' if also else ''}; {holds}. Put images "
            f"into {root / name}, one folder a class, or name another folder with {flag}."
        )
    return f"{given}: there is neither {split}.beton nor a folder of images named {name}; {holds}. {_ADVICE}"


def open_datasets(
    options: DataOptions,
    num_classes: int | None,
    stage_dir: Path | None = None,
    say: Say = terminal.say,
    *,
    larger_head: bool = False,
    one_of: OneOf = by_itself,
) -> tuple[Beton, Beton, int]:
    """Find or make the sets and open them: training set, validation set, number of classes.

    The validation set gets the labels of the training set, by the names of the classes; it may lack some. A training
    set without names gets those of the validation set. `stage_dir`: open copies there. `larger_head`: `num_classes` may
    be more than the data have. `one_of`: see `locate`. Raises `UserError` if something is missing or damaged, if the
    validation set has a class of its own, or if `num_classes` is not that of the data.
    """
    paths = locate(options, say, one_of)
    for path in paths:
        # Listing the folder first has a network file system ask its server for what another machine has just written.
        if not find_parts(path) and not path.exists():
            raise UserError(
                f"{path.parent}: {path.name} does not exist. Write it with `python -m data_prep imagefolder "
                f"--src DIR --out {path}`."
            )
    train, val = (Beton(path) for path in staged(paths, stage_dir, say, one_of))
    for beton in (train, val):
        for remark in count_remarks(beton.path, beton.path.stem, beton.classes or (), beton.num_samples):
            say(remark)
    give_labels_of(train, val, say, trust_labels=options.trust_labels, larger_head=larger_head)
    of_data = max(train.num_classes, val.num_classes)
    if num_classes is None or num_classes == of_data or (larger_head and num_classes > of_data):
        return train, val, num_classes or of_data
    has = f"{paths[0].parent} has {of_data:,} classes{f' ({abbreviated(train.classes)})' if train.classes else ''}"
    if num_classes < of_data:
        raise UserError(f"--num-classes {num_classes} is too small: {has}. Leave the flag out.")
    raise UserError(
        f"--num-classes {num_classes} is too large: {has}. Leave the flag out, or add --larger-head if the model is "
        "meant to have outputs without a class."
    )
