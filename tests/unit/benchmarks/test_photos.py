"""The photographs that benchmarks convert: like ImageNet's, always the same, made once."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.harness import sets
from benchmarks.harness.sets import STAMP, ensure_photos, make_photos, read_stamp
from lowrank_vit.common.errors import UserError


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_photos(tmp_path_factory.mktemp("bench") / "photos", 25)


def test_an_image_folder_of_ten_classes(root: Path) -> None:
    names = list(files_of(root))
    assert len(names) == 25
    assert all(re.fullmatch(r"class_0\d/0000\d\d\.jpg", name) for name in names)
    assert len({name.split("/")[0] for name in names}) == 10
    assert [path.name for path in root.parent.iterdir()] == ["photos"]


def test_like_imagenets() -> None:
    data = list(make_photos(100))
    for jpeg in data:
        with Image.open(io.BytesIO(jpeg)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (500, 375))
    assert 100_000 < sum(map(len, data)) / len(data) < 120_000
    assert len(set(data)) == len(data)


def test_deterministic() -> None:
    first = list(make_photos(6, seed=3))
    assert first == list(make_photos(6, seed=3))
    assert first[:4] == list(make_photos(4, seed=3))
    assert first != list(make_photos(6, seed=4))


def test_the_stamp_tells_the_sizes(root: Path) -> None:
    stamp = read_stamp(root)
    assert stamp is not None
    total = sum(map(len, files_of(root).values()))
    assert stamp == {
        "version": sets.VERSION,
        "count": 25,
        "seed": 0,
        "bytes": total,
        "mean_bytes": round(total / 25),
    }


def test_made_once(root: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")}
    notes: list[str] = []
    assert ensure_photos(root, 25, note=notes.append) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.jpg")} == before
    assert not notes


@pytest.mark.parametrize("change", ["count", "seed", "version"])
def test_made_anew_where_the_stamp_differs(tmp_path: Path, change: str) -> None:
    root = ensure_photos(tmp_path / "photos", 12)
    before = files_of(root)
    if change == "version":  # an older recipe, and a file that only it made
        stamp = json.loads((root / STAMP).read_text())
        (root / STAMP).write_text(json.dumps(stamp | {"version": sets.VERSION - 1}))
        (root / "class_00" / "999999.jpg").touch()
    notes: list[str] = []
    ensure_photos(root, 11 if change == "count" else 12, 7 if change == "seed" else 0, note=notes.append)
    assert len(notes) == 1
    after = files_of(root)
    if change == "count":
        assert after == {name: before[name] for name in list(before) if name in after}
        assert len(after) == 11
    else:
        assert (after == before) == (change == "version")


def test_an_interrupted_making_is_begun_again(tmp_path: Path) -> None:
    part = tmp_path / ".photos.part"
    (part / "class_00").mkdir(parents=True)
    (part / "class_00" / "999999.jpg").touch()
    assert len(files_of(ensure_photos(tmp_path / "photos", 10))) == 10
    assert not part.exists()


def test_other_files_are_never_removed(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="has other files"):
        ensure_photos(tmp_path, 10)
    assert (tmp_path / "mine.txt").exists()
    with pytest.raises(UserError, match="has other files"):
        ensure_photos(tmp_path / "mine.txt", 10)


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--count is 9, expected 10 or more"):
        ensure_photos(tmp_path / "photos", 9)
    monkeypatch.setitem(__import__("sys").modules, "skimage.data", None)
    with pytest.raises(UserError, match="scikit-image"):
        ensure_photos(tmp_path / "photos", 10)
    assert not (tmp_path / "photos").exists()
