"""A folder that is listed once converts to the bytes of one that each process lists; what does not fit is told."""

from __future__ import annotations

import io
import os
import re
import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder, convert_splits
from data_prep.formats.sidecars import read_manifest
from data_prep.sources import file_list
from data_prep.sources.file_list import ListedFiles, listed_source, read_list, write_list
from data_prep.sources.image_folder import image_folder
from data_prep.sources.samples import FileList, file_list_sha256, shard
from lowrank_vit.common.errors import UserError
from tests.sources import Said

ODD = (b"new\nline.jpg", b"\xff\xfe.jpg", b"a b.jpg", b"1 2.jpg", "\u6771.jpg".encode(), b"\\n.png", b"-.jpg")


def picture(n: int, kind: str = "JPEG") -> bytes:
    """An image file; no two have the same size."""
    data = io.BytesIO()
    Image.new("RGB", (8 + n % 5, 8), (n % 256, n % 7, 0)).save(data, kind, comment="x" * n)
    return data.getvalue() + (b"" if kind == "JPEG" else b"\0" * n)


def fill(root: Path, folders: dict[str, int]) -> Path:
    """`root`/FOLDER with so many images, of which the first ones have odd names, and a file that is none."""
    for number, (folder, count) in enumerate(folders.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            name = ODD[n] if n < len(ODD) else b"%02d.jpg" % n
            path = root / folder / os.fsdecode(name)
            path.write_bytes(picture(number * 50 + n, "PNG" if name.endswith(b"png") else "JPEG"))
        (root / folder / "notes.txt").touch()
    return root


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(file_list, "LINES", 4)


@pytest.fixture
def folder(tmp_path) -> Path:
    return fill(tmp_path / "data", {"10": 9, "9": 5, "dog": 8})


@pytest.fixture
def listed(folder, tmp_path) -> Path:
    write_list(folder, tmp_path / "list", None, "leaf")
    return tmp_path / "list"


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def scanned(monkeypatch) -> list[str]:
    """The folders that are listed from now on."""
    seen, scandir = list[str](), os.scandir

    def counting(path: Any = ".") -> Any:
        seen.append(str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    return seen


TREES: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "plain": ({"10": 9, "9": 5, "dog": 8}, {}),
    "nested": ({"b/x": 4, "a": 5, "a/y": 3, "c/z/w": 6}, {}),
    "merge": ({"a/x": 4, "b/x": 5, "y": 3}, {"nested": "merge"}),
    "top": ({"a/x": 4, "a": 5, "b/x": 5, "b/y/z": 3}, {"nested": "top"}),
    "chosen": ({"a": 4, "b": 5, "e\u0301": 3, "c": 4}, {"classes": "b\n\u00e9\n"}),
}


@pytest.mark.parametrize("tree", TREES)
def test_the_same_bytes_and_words_as_without_a_list(tree, tmp_path, scanned):
    """Of one folder in its parts, and undivided; no folder below is looked at again."""
    folders, options = TREES[tree]
    src = fill(tmp_path / "data", folders)
    if "classes" in options:
        (tmp_path / "chosen.txt").write_text(options["classes"])
        options = {"classes": tmp_path / "chosen.txt"}
    files = tmp_path / "list"
    write_list(src, files, options.get("classes"), options.get("nested", "leaf"))
    for part in (None, (1, 3), (2, 3), (3, 3)):
        said = [Said(), Said()]
        convert_image_folder(src, tmp_path / "own" / "x.beton", part=part, say=said[0], **options)
        scanned.clear()
        for given in ({}, options):
            convert_image_folder(src, tmp_path / "by" / "x.beton", part=part, say=said[1], file_list=files, **given)
        assert not [path for path in scanned if path.startswith(str(src))]
        assert said[0] * 2 == said[1]
    assert outputs(tmp_path / "own") == outputs(tmp_path / "by")


@pytest.mark.parametrize("val", [{"10": 4, "9": 5, "dog": 3}, {"10": 4, "dog": 3}, {"dog": 2, "e\u0301": 1}])
def test_both_splits_stand_in_one_list(val, tmp_path):
    """Labels are those of the training set, also of a validation set that lacks a class or spells it otherwise."""
    src = tmp_path / "data"
    accented = "\u00e9" if "e\u0301" in val else "9"
    fill(src / "train", {"10": 9, accented: 5, "dog": 8})
    fill(src / "val", val)
    assert unicodedata.normalize("NFC", "e\u0301") == "\u00e9"
    main(["list", str(src), "--out", str(tmp_path / "list")])
    for part in (None, (1, 2), (2, 2)):
        said = [Said(), Said()]
        convert_splits(src, tmp_path / "own", part=part, say=said[0])
        convert_splits(src, tmp_path / "by", part=part, say=said[1], file_list=tmp_path / "list")
        assert said[0] == said[1]
    assert outputs(tmp_path / "own") == outputs(tmp_path / "by")


def test_a_stretch_of_a_list_is_that_of_the_folder(folder, listed):
    """Against the folder itself, for every part of every number of parts."""
    own = image_folder(folder)
    by_list = listed_source(read_list(listed), folder)
    assert by_list.classes == own.classes
    assert file_list_sha256(by_list.samples) == file_list_sha256(own.samples)
    expected = [(sample.label, sample.name) for sample in own.samples]
    assert {sample.size for sample in by_list.samples} == {
        path.stat().st_size for path in folder.rglob("*") if path.suffix in (".jpg", ".png")
    }
    assert [(by_list.samples[n].label, by_list.samples[n].name) for n in range(-len(own.samples), 0)] == expected
    for count in range(1, len(expected) + 1):
        parts = [shard(by_list.samples, n, count) for n in range(1, count + 1)]
        assert [(sample.label, sample.name) for part in parts for sample in part] == expected
        for n, part in enumerate(parts, 1):
            assert file_list_sha256(part) == file_list_sha256(shard(own.samples, n, count))
    assert isinstance(by_list.samples, ListedFiles)
    turned = by_list.samples.relabelled([0, 2, 5]).relabelled([1, 1, 1, 1, 1, 3])
    assert [sample.label for sample in turned] == [(1, 1, 3)[label] for label, _ in expected]
    assert file_list_sha256(turned) == file_list_sha256(FileList.pack((s.label, s.name) for s in turned))


def test_a_part_reads_its_own_stretch(folder, listed, monkeypatch):
    read, pread = list[int](), os.pread
    monkeypatch.setattr(os, "pread", lambda *given: read.append(given[1]) or pread(*given))
    list(shard(listed_source(read_list(listed), folder).samples, 2, 5))
    blocks = read_list(listed).folders[0].blocks
    assert sum(read) < blocks[-1][0] / 2


def test_what_was_begun_without_a_list_is_gone_on_with(folder, listed, tmp_path):
    """Finished ones are known as such; bad images that were left out are the same."""
    (folder / "dog" / "00.jpg").write_bytes(b"no image")
    write_list(folder, listed, None, "leaf")
    how: dict[str, Any] = {"on_bad": "skip", "part": (2, 2)}
    convert_image_folder(folder, tmp_path / "x.beton", **how)
    assert convert_image_folder(folder, tmp_path / "x.beton", file_list=listed, **how).was_finished
    assert len(read_manifest(tmp_path / "x-2-of-2.beton").skipped) == 1


def test_a_list_that_was_changed_or_cut_off_is_refused(folder, listed):
    """Wherever that is: some part finds it, and no sample is another."""
    whole = listed.read_bytes()
    own = [(sample.label, sample.name) for sample in image_folder(folder).samples]
    for at in [*range(0, len(whole), 7), *range(len(whole) - 40, len(whole))]:
        for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]):
            listed.write_bytes(content)
            with pytest.raises(UserError, match=r"^--file-list .* List the folder again: `python -m data_prep list"):
                list(listed_source(read_list(listed), folder).samples)
    listed.write_bytes(whole)
    assert [(s.label, s.name) for s in listed_source(read_list(listed), folder).samples] == own


def test_a_list_of_another_version_says_so(folder, listed):
    listed.write_bytes(listed.read_bytes().replace(b"lowrank-vit 1\n", b"lowrank-vit 2\n", 1))
    with pytest.raises(UserError, match="another version of this program: its format is 2, expected 1"):
        read_list(listed)


@pytest.mark.parametrize("on_bad", ["error", "skip"])
def test_files_that_changed_since_are_named(folder, listed, tmp_path, on_bad):
    """Those that are gone, and those of another size, whether they decode or not; none of them is skipped."""
    (folder / "9" / "a b.jpg").unlink()
    (folder / "10" / "a b.jpg").write_bytes(picture(49))
    (folder / "10" / "-.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^3 of 22 images cannot be converted") as caught:
        convert_image_folder(folder, tmp_path / "x.beton", file_list=listed, on_bad=on_bad)
    said = str(caught.value)
    assert re.search(r"9/a b\.jpg: no longer exists, though the file list names it: list the folder again", said)
    for name in ("a b", "-"):
        assert re.search(rf"10/{name}\.jpg: has [\d,]+ bytes, [\d,]+ when it was listed: list the folder again", said)


def refused(tmp_path: Path, folder: Path, listed: Path) -> Iterator[tuple[str, str]]:
    """Command lines, and what is said of them."""
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "some.txt").write_text("dog\n")
    out = f"--out {tmp_path}/x.beton"
    yield f"list {folder} --out {folder}/9/list", r"^--out .* lies in .*data, which is listed"
    yield f"list {tmp_path}/nothing --out {tmp_path}/l", r"^--src .*nothing does not exist"
    yield f"list {folder} --out {tmp_path}/some.txt/l", r"cannot be written: "
    convert = f"imagefolder --src {folder} {out} --file-list"
    yield f"{convert} {tmp_path}/nothing", r"^--file-list .*nothing cannot be read: No such file"
    yield f"{convert} {folder}", r"cannot be read: Is a directory"
    yield f"{convert} {tmp_path}/some.txt", r"some.txt is not a list of files\."
    yield (
        f"{convert} {listed} --nested-classes top",
        r"^--nested-classes top does not fit .* --nested-classes leaf",
    )
    yield f"{convert} {listed} --classes {tmp_path}/some.txt", r"names other classes than .* made of all classes"
    yield f"{convert} {listed} --shard 4/3", r"^--shard "
    yield f"{convert} {listed} --shard 1/23", r"^--shard 1/23: there are only 22 images"
    yield f"imagefolder --src {tmp_path}/moved {out} --file-list {listed}", r"list is of .*data, not of .*moved"
    folder.rename(tmp_path / "gone")
    yield f"{convert} {listed}", r"^--src .*data does not exist"


def test_what_does_not_fit_is_refused(folder, listed, tmp_path, capsys):
    for line, said in refused(tmp_path, folder, listed):
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert caught.value.code == 2, line
        told = capsys.readouterr().err.removeprefix("error: ")
        assert re.search(said, told), (line, told)
    assert not list(tmp_path.glob("x*.beton"))
