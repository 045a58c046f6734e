"""A tree of class folders, as timm reads it: its splits, its classes in timm's order, and its image files."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

from data_prep.formats.image_formats import image_suffixes, is_of_the_system
from data_prep.sources.samples import FileList, Source, abbreviated, imagenet1k, in_timms_order, nearest, spelt_as, ties
from lowrank_vit.common.errors import UserError

Nested = Literal["leaf", "merge", "top"]
"""Which folders are classes: all that hold images; the same, with equal names merged; those directly in the root."""
TIMMS_SUFFIXES = (".jpeg", ".jpg", ".png")
"""The suffixes that timm reads by default, in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""timm's synonyms; if a directory has several of them, the first one here is taken."""
NO_CLASSES = {"test", *(name for names in SPLIT_NAMES.values() for name in names)}
"""A directory whose folders all have these names holds splits, not classes."""
_IMAGENET_1K = {"train": 1_281_167, "val": 50_000}
"""Images of its splits."""


@dataclass(frozen=True)
class Listing:
    """The classes below a folder, and an iterator over their images."""

    root: Path
    classes: tuple[str, ...]
    count: int
    """Images of all classes."""
    files: Callable[[], Iterator[tuple[int, str]]]
    """Yields label and name of each image, in sample order, without reading the folder again."""
    remarks: tuple[str, ...]


def image_folder(root: Path, classes_file: Path | None = None, nested: Nested = "leaf") -> Source:
    """The classes and images below `root`, see `list_folder`."""
    listing = list_folder(root, classes_file, nested)
    return Source(str(root), listing.classes, FileList.pack(listing.files()), remarks=listing.remarks)


def list_folder(root: Path, classes_file: Path | None = None, nested: Nested = "leaf") -> Listing:
    """List the classes and images below `root`. Classes, and so labels, are in timm's order (`in_timms_order`).

    `nested` says which folders are classes. `leaf`, as in timm: each folder that holds images, by its own name, at any
    depth; two with the same name are an error. `merge`: they are one class, as timm would treat them. `top`: the
    folders directly in `root`, with all images below them.

    `classes_file` keeps only the classes it names, one a line; labels still follow timm's order. Links to folders are
    followed. Names that start with a dot, and those of file servers and archives (`@eaDir`), are ignored unless
    `classes_file` has them. `remarks` tell of other files left out, and where timm would read the tree differently.
    Raises `UserError` if a folder is missing, unreadable or empty, or a link leads nowhere.
    """
    wanted = chosen_classes(classes_file) if classes_file else None
    present = top_folders(root, wanted or ())
    if not present:
        raise UserError(_no_classes_message(root))
    if set(present) <= NO_CLASSES:
        raise UserError(
            f"--src {root} holds {', '.join(present)}: these look like splits, not classes. Convert both in one "
            f"command by giving a directory as --out, or one of them with --src {root / present[0]}."
        )
    only = wanted if wanted and wanted <= set(present) else None  # then no other folder is visited
    tree = _Tree(root)
    tree.walk(only, wanted or set())
    folders_of = _classes(tree, nested)
    if wanted is not None:
        wanted = spelt_as(wanted, {_name(folder) for folders in tree.below.values() for folder in folders})
    tree.refuse_empty(wanted, nested)
    if wanted is not None:
        folders_of = _choose(folders_of, wanted, str(classes_file), tree)
    classes = in_timms_order(folders_of)
    count = sum(tree.num_images(folder) for folders in folders_of.values() for folder in folders)
    remarks = (
        *_remarks(tree, folders_of, nested, is_chosen=wanted is not None),
        *count_remarks(root, root.name, classes, count),
    )
    files = partial(_files, tree, [folders_of[name] for name in classes])
    return Listing(root, tuple(classes), count, files, remarks)


def split_folders(root: Path) -> dict[str, Path]:
    """{"train": folder, "val": folder} for the splits that exist below `root`, by timm's synonyms.

    Raises `UserError` if `root` cannot be listed.
    """
    present = set(top_folders(root))
    found = {}
    for split, names in SPLIT_NAMES.items():
        first = next((name for name in names if name in present), None)
        if first is not None:
            found[split] = root / first
    return found


@dataclass
class _Tree:
    """The folders and images below a root; a folder's key is its path from the root, empty for the root itself."""

    root: Path
    images: dict[str, bytes] = field(default_factory=dict)
    """Names of the images directly in each folder that holds some, in order, each followed by a NUL."""
    suffixes: dict[str, set[str]] = field(default_factory=dict)
    """Suffixes of these images, in lower case."""
    below: dict[str, list[str]] = field(default_factory=dict)
    """The sub-folders of each folder, by path."""
    others: Counter[str] = field(default_factory=Counter)
    """How many other files there are, by suffix in lower case."""
    system: list[str] = field(default_factory=list)
    """Folders that are ignored by their name."""
    loops: dict[str, str] = field(default_factory=dict)
    """Links to a folder above them, with that folder."""

    def walk(self, only: set[str] | None, wanted: set[str]) -> None:
        """Visit all folders; of those directly in the root only `only`. Names in `wanted` are never ignored.

        Raises `UserError`.
        """
        self._suffixes, self._wanted = image_suffixes(), wanted
        self._visit("", (), only)

    def _visit(self, folder: str, above: tuple[str, ...], only: set[str] | None) -> bool:
        """Visit a folder; return False for a link to a folder above it, which would never end."""
        path = f"{self.root}/{folder}" if folder else str(self.root)
        real = os.path.realpath(path)
        if real in above:
            self.loops[folder] = real
            return False
        images, below, suffixes = [], [], set[str]()
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    name = entry.name
                    dot = name.rfind(".")
                    suffix = name[dot:].lower() if dot > 0 else ""
                    is_image = suffix in self._suffixes and name[0] != "."
                    if is_image and entry.is_file(follow_symlinks=False):  # nearly all entries, so tested first
                        images.append(name)
                        suffixes.add(suffix)
                    elif is_of_the_system(name) and name not in self._wanted:
                        if entry.is_dir():
                            self.system.append(_join(folder, name))
                    elif _is_folder(entry, is_image):
                        if only is None or name in only:
                            below.append(_join(folder, name))
                    elif is_image:
                        images.append(name)
                        suffixes.add(suffix)
                    else:
                        self.others[suffix] += 1
        except OSError as error:
            _unreadable(error, path)
        if images:
            images.sort()
            self.images[folder] = b"".join(b"%s\0" % os.fsencode(name) for name in images)
            self.suffixes[folder] = suffixes
        self.below[folder] = [one for one in sorted(below) if self._visit(one, (*above, real), None)]
        return True

    def num_images(self, folder: str) -> int:
        """How many images are directly in a folder."""
        return self.images.get(folder, b"").count(b"\0")

    def names(self, folder: str) -> list[str]:
        """The names of the images directly in a folder, in order."""
        return [os.fsdecode(name) for name in self.images[folder].split(b"\0")[:-1]]

    def doubtful(self) -> list[str]:
        """Folders ignored by their name, but not hidden, that hold images where classes are: one may be a class."""
        places = [(one, one.rpartition("/")[0]) for one in self.system if _name(one)[0] != "."]
        return sorted(
            one for one, above in places if (not above or above not in self.images) and _any_image(self.root / one)
        )

    def holds_images(self, folder: str) -> bool:
        """Whether there are images in a folder or anywhere below it."""
        return folder in self.images or any(map(self.holds_images, self.below.get(folder, ())))

    def refuse_empty(self, wanted: set[str] | None, nested: Nested) -> None:
        """Raise `UserError` for a folder without images where classes are; beside images an empty folder is allowed."""
        for loop, above in self.loops.items():
            folder = loop.rpartition("/")[0]
            is_class = not folder or (folder not in self.images and nested != "top")
            if is_class and (wanted is None or _name(loop) in wanted):
                raise UserError(
                    f"{self.root / loop} is a link to {above}, a folder above it, so it holds no images of its own. If "
                    "it is a class, it would be missing; mend the link, remove it, or leave it out with --classes."
                )
        for folder, below in self.below.items():
            if folder in self.images and folder:
                continue
            for one in below if not folder or nested != "top" else ():
                if not self.holds_images(one) and (wanted is None or _name(one) in wanted):
                    raise UserError(
                        f"class folder {self.root / one} holds no image that Pillow decodes by itself. Fill it, remove "
                        "it, or leave it out with --classes."
                    )


def _any_image(folder: Path) -> bool:
    suffixes = image_suffixes()
    files = (name for _, _, names in os.walk(folder) for name in names if name[0] != ".")
    return any(os.path.splitext(name)[1].lower() in suffixes for name in files)  # noqa: PTH122  a string, no path


def _is_folder(entry: os.DirEntry[str], is_image: bool) -> bool:
    """Whether an entry is a folder or a link to one. Raises `UserError` for a link to nowhere that may be a class."""
    try:
        if entry.is_dir():
            return True
        if is_image or not entry.is_symlink():
            return False
        entry.stat()
    except FileNotFoundError:
        target = Path(entry.path).readlink()
        raise UserError(
            f"{entry.path} is a link to {target}, which does not exist. If it is a class, it would be missing; mend "
            "the link or remove it."
        ) from None
    except OSError as error:
        if is_image:  # reading it will say why
            return False
        _unreadable(error, entry.path)
    return False


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _name(folder: str) -> str:
    return folder.rpartition("/")[2]


def _classes(tree: _Tree, nested: Nested) -> dict[str, list[str]]:
    """The folders of each class, by the class's name. Raises `UserError` for two classes with the same name."""
    found: dict[str, list[str]] = defaultdict(list)
    for folder in sorted(tree.images):
        if folder:  # images in the root itself belong to no class
            found[folder.partition("/")[0] if nested == "top" else _name(folder)].append(folder)
    same = next((folders for folders in found.values() if nested == "leaf" and len(folders) > 1), None)
    if same:
        first, second = same[:2]
        tops = abbreviated(_name(top) for top in tree.below[""] if tree.holds_images(top))
        raise UserError(
            f"{tree.root / first} and {tree.root / second} are both named {_name(first)}: a class is a folder that "
            f"holds images, as in timm, which would merge the two. Rename them, or choose: "
            f"--nested-classes merge makes one class of each name, --nested-classes top takes the folders in "
            f"{tree.root} ({tops}) with all images below them."
        )
    return found


def _files(tree: _Tree, folders_of_classes: list[list[str]]) -> Iterator[tuple[int, str]]:
    for label, folders in enumerate(folders_of_classes):
        names = [f"{folder}/{name}" for folder in folders for name in tree.names(folder)]
        yield from ((label, name) for name in (sorted(names) if len(folders) > 1 else names))


def _remarks(tree: _Tree, folders_of: Mapping[str, list[str]], nested: Nested, *, is_chosen: bool) -> Iterator[str]:
    root = tree.root
    taken = {folder for folders in folders_of.values() for folder in folders}
    inside = [folder for folder in sorted(tree.images) if folder not in taken and folder.rpartition("/")[0] in taken]
    if is_chosen and inside:
        yield (
            f"warning: left out the images in {abbreviated(inside, 3)}: a folder that holds images is a class of its "
            "own, which the list of classes does not name; --nested-classes top adds them to the class above"
        )
    for tie in ties(folders_of):
        yield (
            f"warning: timm's order does not distinguish the class folders {' and '.join(tie)}, so timm's labels of "
            "them change from run to run; here they are in the order of their code points"
        )
    deep = [folders[0] for folders in folders_of.values() if "/" in folders[0]]
    if deep and nested != "top":
        yield (
            f"{root}: the classes are its {len(folders_of):,} folders that hold images, as in timm "
            f"({abbreviated(deep, 3)}); --nested-classes top takes those directly in {root}"
        )
    if loose := tree.num_images(""):
        yield (
            f"warning: left out {loose:,} images directly in {root}, outside every class folder; timm makes them its "
            "first class, so all its other labels are greater by one"
        )
    odd = {name: set[str]().union(*map(tree.suffixes.__getitem__, folders)) for name, folders in folders_of.items()}
    unseen = [name for name, suffixes in odd.items() if suffixes.isdisjoint(TIMMS_SUFFIXES)]
    if unseen:
        yield (
            f"warning: timm reads {', '.join(TIMMS_SUFFIXES)} only, so it does not see the class"
            f"{'es' if len(unseen) > 1 else ''} {abbreviated(unseen)} ({' '.join(sorted(odd[unseen[0]]))}), and its "
            "labels of all later classes are smaller"
        )
    counts = sorted(tree.others.items(), key=lambda item: (-item[1], item[0]))
    left_out = [f"{count:,} {suffix or 'without suffix'}" for suffix, count in counts]
    parts = [f"{tree.others.total():,} files without an image suffix ({', '.join(left_out)})"] if left_out else []
    doubtful = [] if is_chosen else tree.doubtful()
    if doubtful:
        yield (
            f"warning: left out {abbreviated(doubtful, 3)} with images inside, since systems and file servers make "
            "folders with such names; if it is a class, rename it or list the classes (`python -m data_prep "
            "imagefolder --classes`)"
        )
    if system := sorted(set(tree.system).difference(doubtful)):
        parts.append(f"system folders ({abbreviated(system, 3)})")
    if tree.loops:
        parts.append(f"links to folders above them ({abbreviated(sorted(tree.loops), 3)})")
    if parts:
        yield f"{root}: left out {' and '.join(parts)}"


def count_remarks(what: Path, split: str, classes: Sequence[str], num_images: int) -> Iterator[str]:
    """A warning if a set with ImageNet-1k's classes has another number of images; `split`: its name in timm."""
    if tuple(classes) != imagenet1k():
        return
    known = next((name for name, names in SPLIT_NAMES.items() if split in names), None)
    expected = [_IMAGENET_1K[known]] if known else list(_IMAGENET_1K.values())
    if num_images not in expected:
        yield (
            f"warning: {what} has ImageNet-1k's classes, but {num_images:,} images instead of "
            f"{' or '.join(f'{count:,}' for count in expected)}"
        )


def _no_classes_message(root: Path) -> str:
    message = f"--src {root} has no class folders. Put the images of each class into a sub-folder of it"
    with os.scandir(root) as entries:
        if any(entry.name.startswith("ILSVRC2012_val_") for entry in entries):
            message += " (ImageNet's own validation archive comes without them: sort it by its ground truth first)"
    return message + "."


def top_folders(root: Path, wanted: Collection[str] = ()) -> list[str]:
    """The folders directly in `root`; system folders only if they are `wanted`. Raises `UserError`."""
    try:
        with os.scandir(root) as entries:
            image = image_suffixes()
            kept = (entry for entry in entries if entry.name in wanted or not is_of_the_system(entry.name))
            return sorted(e.name for e in kept if _is_folder(e, e.name.lower().endswith(tuple(image))))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else "is not a directory"
        raise UserError(f"--src {root} {what}. Give a directory with one sub-folder for each class.") from error
    except OSError as error:
        _unreadable(error, str(root))


def chosen_classes(classes_file: Path) -> set[str]:
    """The names in a text file, one a line. Raises `UserError`."""
    try:
        text = classes_file.read_text(encoding="utf-8-sig", errors="surrogateescape")  # a folder's name is any bytes
    except OSError as error:
        raise UserError(f"--classes {classes_file} cannot be read: {error.strerror}. Give a text file.") from error
    names = {line.strip() for line in text.splitlines()} - {""}
    if not names:
        raise UserError(f"--classes {classes_file} names no class. Give one folder name a line.")
    return names


def _choose(
    folders_of: Mapping[str, list[str]], wanted: set[str], classes_file: str, tree: _Tree
) -> dict[str, list[str]]:
    missing = sorted(wanted - set(folders_of))
    group = next((name for name in missing if tree.holds_images(name)), None)
    if group:
        raise UserError(
            f"{tree.root / group}, which {classes_file} names, holds no image itself but folders with images "
            f"({abbreviated(map(_name, tree.below[group]))}): these are the classes, as in timm. Name them instead, "
            "or give --nested-classes top to take the folders above them."
        )
    if any("\udc80" <= character <= "\udcff" for name in missing for character in name):
        raise UserError(f"--classes {classes_file} is not UTF-8 text. Give one folder name a line.")
    if missing:
        near = [f"{other} for {name}" for name in missing[:10] if (other := nearest(name, folders_of))]
        hint = f" There is {abbreviated(near)}." if near else ""
        raise UserError(
            f"--src {tree.root} lacks {len(missing)} of the {len(wanted)} classes that {classes_file} names: "
            f"{abbreviated(missing, 10)}.{hint} Check the names (one folder name a line) and the directory."
        )
    return {name: folders for name, folders in folders_of.items() if name in wanted}


def _unreadable(error: OSError, path: str) -> NoReturn:
    raise UserError(f"{error.filename or path} cannot be listed: {error.strerror}. Check its permissions.") from error
