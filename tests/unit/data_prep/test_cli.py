"""`python -m data_prep` as its user meets it: what it prints, and its exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import data_prep
from data_prep.__main__ import main
from data_prep.formats.sidecars import read_manifest
from data_prep.formats.tables import read_tables


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of one image each."""
    for name in ("ant", "bee"):
        (tmp_path / "src" / name).mkdir(parents=True)
        Image.new("RGB", (24, 16), "green").save(tmp_path / "src" / name / "a.jpg")
    return tmp_path / "src"


def test_imagefolder_says_what_it_wrote(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new folder" / "train.beton"
    main(["imagefolder", "--src", str(folder), "--out", str(out), "--workers", "1", "--max-side", "16"])
    printed = capsys.readouterr()
    assert f"wrote {out}" in printed.out
    assert "2 images, 2 classes" in printed.out
    assert "2 resized" in printed.out
    assert printed.err == ""
    assert read_manifest(out).options == {
        "classes": None,
        "max_side": 16,
        "quality": 90,
        "on_bad": "error",
        "verify": "decode",
        "baseline": False,
        "raw": None,
        "lossless": False,
    }


def test_lossless_keeps_pixels_and_is_not_combined_with_what_changes_them(folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (600, 16), "green").save(folder / "ant" / "a.png")
    command = ["imagefolder", "--src", str(folder), "--out", str(tmp_path / "a.beton"), "--lossless"]
    main(command)
    tables = read_tables(tmp_path / "a.beton")
    assert (tables.modes.tolist(), tables.widths.tolist()) == ([0, 1, 0], [24, 600, 24])
    for more in (["--raw", "16"], ["--max-side", "600"], ["--quality", "95"]):
        with pytest.raises(SystemExit, match="2"):
            main([*command, *more])


def test_imagefolder_replaces_and_takes_a_subset(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("bee\n")
    (folder / "bee" / "b.jpg").write_bytes(b"")
    command = ["imagefolder", "--src", str(folder), "--out", str(tmp_path / "a.beton"), "--workers", "1"]
    main([*command, "--on-bad", "skip"])
    assert "left out: 1 bad, listed in" in capsys.readouterr().out
    main([*command, "--on-bad", "skip", "--classes", str(tmp_path / "classes.txt")])
    assert read_tables(tmp_path / "a.beton").labels.tolist() == [0]
    assert read_manifest(tmp_path / "a.beton").classes == ("bee",)


def test_digits_writes_both_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["digits", "--out", str(tmp_path / "digits")])
    assert capsys.readouterr().out.count("wrote ") == 2
    assert len(read_tables(tmp_path / "digits" / "train.beton").labels) == 1437
    assert len(read_tables(tmp_path / "digits" / "val.beton").labels) == 360


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quality", "0"], "--quality is 0, expected 1"),
        (["--quality", "101"], "--quality is 101, expected 1"),
        (["--workers", "0"], "--workers is 0, expected 1 or more"),
        (["--max-side", "15"], "--max-side is 15, expected 16"),
        (["--max-side", "65501"], "--max-side is 65501, expected 16"),
        (["--src", "nowhere"], "--src nowhere does not exist"),
        (["--classes", "nowhere.txt"], "--classes nowhere.txt cannot be read"),
        (["--raw", "1673"], "--raw is 1673, expected 1 to 1672 pixels"),
        (["--shard", "3/2"], "--shard is 3/2, expected i/n with i from 1 to n"),
        (["--shard", "0/2"], "--shard is 0/2, expected i/n"),
        (["--shard", "half"], "--shard is half, expected i/n"),
        (["--shard", "1/3"], "there are only 2 images"),
        (["--out", "train"], "holds no split such as train or val"),
        (["--out", "/dev/null/a.beton"], "/dev/null/a.beton cannot be written: Not a directory"),
    ],
)
def test_errors_are_one_paragraph_and_exit_code_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["imagefolder", "--src", str(folder), "--out", str(tmp_path / "a.beton"), "--workers", "1"]
    with pytest.raises(SystemExit) as caught:
        main(command + arguments)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.out == ""
    assert not (tmp_path / "a.beton").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["imagefolder"], ["digits", "--out", "x", "--quality", "3"], ["digits"]]
)
def test_wrong_flags_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_digits_into_a_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        main(["digits", "--out", str(tmp_path / "file")])
    assert "cannot be written: Not a directory" in capsys.readouterr().err


def test_as_a_process_with_workers(folder: Path, tmp_path: Path) -> None:
    (folder / "bee" / "bad.jpg").write_text("not an image")
    arguments = ["imagefolder", "--src", str(folder), "--out", str(tmp_path / "a.beton"), "--workers", "2"]
    process = subprocess.run(
        [sys.executable, "-m", "data_prep", *arguments],
        cwd=Path(data_prep.__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    out = tmp_path / "a.beton"
    message = f"error: 1 of 3 images cannot be converted, so {out} was not written:\n  bee/bad.jpg"
    assert process.stderr.startswith(message)
    assert "Traceback" not in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["src"]


def widths_after(folder: Path, out: Path, *more: str) -> dict[str, int]:
    """The stored width of a photograph 600 pixels wide, by file."""
    main(["imagefolder", "--src", str(folder), "--out", str(out), "--workers", "1", *more])
    files = [out] if out.suffix else sorted(out.glob("*.beton"))
    return {file.name: int(read_tables(file).widths.max()) for file in files}


def test_validation_sets_keep_their_pixels_unless_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whichever command makes them; options speak of what is trained on, or of the one set that is converted."""
    root = tmp_path / "images"
    for split in ("train", "validation", "test"):
        for name in ("ant", "bee"):
            (root / split / name).mkdir(parents=True)
            Image.new("RGB", (600, 16), "green").save(root / split / name / "a.jpg")
    both = tmp_path / "both"
    assert widths_after(root, both) == {"train.beton": 500, "val.beton": 600}
    assert "stored without loss as: 2 passthrough" in capsys.readouterr().out
    assert widths_after(root, both, "--max-side", "400") == {"train.beton": 400, "val.beton": 600}
    assert widths_after(root, both, "--max-side", "400", "--lossy-val") == {"train.beton": 400, "val.beton": 400}
    assert widths_after(root, both, "--lossless") == {"train.beton": 600, "val.beton": 600}
    for source, name, width in (
        ("validation", "a.beton", 600),
        ("test", "a.beton", 600),
        ("train", "a.beton", 500),
        ("train", "val.beton", 600),  # the file's name counts first
        ("test", "training.beton", 500),
        ("train", "cars_valset.beton", 600),
        ("train", "holdout.beton", 600),
        ("train", "carsDev.beton", 600),
        ("validation", "trainval.beton", 600),  # no word of it is one; the folder's name is
    ):
        assert widths_after(root / source, tmp_path / source / name) == {name: width}
    (root / "validation").rename(root / "ILSVRC2012")
    assert widths_after(root / "ILSVRC2012", tmp_path / "imagenet_val.beton") == {"imagenet_val.beton": 600}
    assert "as a training set" not in capsys.readouterr().out
    assert widths_after(root / "ILSVRC2012", tmp_path / "interval.beton") == {"interval.beton": 500}
    assert (
        "interval.beton was converted as a training set; if it is for validation, --lossless" in capsys.readouterr().out
    )
    for more in (["--max-side", "500"], ["--quality", "95"], ["--lossy-val"]):
        assert widths_after(root / "ILSVRC2012", tmp_path / "val.beton", *more) == {"val.beton": 500}
