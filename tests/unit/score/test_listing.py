"""Images of folders come in the order of `sorted(folder.rglob("*"))`, however many a folder has."""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

import pytest
import xxhash

from data_prep.formats.image_formats import image_suffixes, is_of_the_system
from lowrank_vit.common.errors import UserError
from lowrank_vit.score import listing
from lowrank_vit.score.listing import ImageList


def by_sorting(folder: Path) -> tuple[list[Path], Counter[str]]:
    below = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in below if not any(map(is_of_the_system, path.relative_to(folder).parts))]
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in image_suffixes())
    return [path for path in files if path.suffix.lower() in image_suffixes()], others


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    names = ["a.jpg", "a/b.JPG", "a/b/c.png", "a-b/c.png", "a.b/c.jpg", "B/1.jpg", "b/x.txt", "b/y", "b/.hidden.jpg"]
    names += [
        ".git/a.jpg",
        "@eaDir/a.jpg",
        "c/2.jpg",
        "c/10.jpg",
        "c/new\nline.jpg",
        "c/ends.",
        "c/.jpg",
        "d.jpg/e.jpg",
    ]
    names += [os.fsdecode(b"c/\xe9.jpg"), "c/\u00e9.jpg", "c/\U0001f600.jpg", os.fsdecode(b"\xff/a.jpg")]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "empty").mkdir()
    (root / "linked.jpg").symlink_to(root / "a.jpg")
    (root / "nowhere.jpg").symlink_to(root / "none")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "folder.jpg").symlink_to(root / "c")
    return root


@pytest.mark.parametrize("at_once", [3, 1 << 16])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_order_is_that_of_sorting_all(tree, tmp_path, monkeypatch, at_once, batch_size):
    monkeypatch.setattr(listing, "_SORTED_AT_ONCE", at_once)
    monkeypatch.setattr(listing, "_BLOCK", 5)
    monkeypatch.chdir(tree)
    single, notes = tmp_path / "single.bin", list[str]()
    single.touch()
    expected, others = by_sorting(tree)
    here = by_sorting(Path())[0]
    with ImageList((single, tree, Path(), Path("a.jpg"), tree / "a"), batch_size, notes.append) as images:
        found = [file for n in range(-(-len(images) // batch_size)) for file in images.batch(n)]
        assert found == [single, *expected, *here, Path("a.jpg"), *by_sorting(tree / "a")[0]]
        assert len(images) == len(found)
        assert images.batch(len(found)) == images.batch(len(found) + 5) == []
        assert images.digest == xxhash.xxh3_64_hexdigest(b"\0".join(map(os.fsencode, found)))
    assert notes[0].startswith(f"{tree}: left out {others.total()} files without an image suffix (")


def test_a_folder_without_images_and_no_room_for_names_are_told(tree, tmp_path, monkeypatch):
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").touch()
    with pytest.raises(UserError, match="holds no image, only other files"):
        ImageList((tmp_path / "none",), 5, str)
    monkeypatch.setattr(listing.tempfile, "TemporaryFile", functools.partial(Path("/dev/full").open, "wb", 0))
    with pytest.raises(UserError, match=r"cannot be listed: No space left on device.*TMPDIR=DIR"):
        ImageList((tree,), 5, str)
