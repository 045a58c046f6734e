"""Stored bytes, and names of files, are whatever somebody made them: they run nothing, end nothing and cost nothing."""

from __future__ import annotations

import ast
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import METADATA_START, SAMPLE, find_parts, parse_shard
from data_prep.formats.sample_table import read_sample_table, sample_table_path
from data_prep.info import plot_info
from lowrank_vit.common.errors import BetonError, UserError, exit_cleanly
from lowrank_vit.common.terminal import one_line, printable, say
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan, TrainPlan, TrainRules
from lowrank_vit.report.augment_preview import _of_beton
from lowrank_vit.run.progress import Display
from tests.photos import BACKENDS, write_folder

ROOT = Path(__file__).parents[3]
BAD = 3
EVIL = "\x1b]0;title\x07[red]:cat:\x9b31m\u202e"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """24 JPEGs as a .beton, without sidecars."""
    root = tmp_path_factory.mktemp("photos")
    convert_image_folder(write_folder(root / "src"), root / "a.beton", workers=1)
    (root / "a.beton").rename(root / "b.beton")
    return root / "b.beton"


def with_sample(photos: Path, path: Path, stored: bytes, bad: int = BAD, **row: int) -> Path:
    """A copy in which the bytes of sample `bad` begin with `stored`, and its row says what `row` does."""
    content, start = bytearray(photos.read_bytes()), int(Beton(photos).pointers[bad])
    content[start : start + len(stored)] = stored
    image = np.frombuffer(content, SAMPLE, count=1, offset=METADATA_START + bad * SAMPLE.itemsize)["image"]
    for name, value in row.items():
        image[name] = value
    path.write_bytes(content)
    return path


def read_all(backend: str, path: Path, mode: str, **more) -> list[str]:
    """Decode a whole set without its damaged samples; what was said of those."""
    beton, said = Beton(path), []
    plan = EvalPlan(beton.heights, beton.widths, img_size=16, crop_pct=0.9, batch_size=5)
    if mode == "training":
        plan = TrainPlan(beton.heights, beton.widths, TrainRules(), seed=1, img_size=16, batch_size=4)
    loader, _ = open_loader(
        beton, plan, torch.device("cpu"), LoaderOptions(backend, 2, on_bad_sample="skip", **more), say=said.append
    )
    assert sum(len(batch) for batch in loader.batches(0)) == beton.num_samples - (mode == "evaluation")
    loader.close()
    return [line for line in said if "left out" in line]


def files_with(name: str) -> Iterator[tuple[Path, ast.Module]]:
    """The program's files that have a name somewhere, and their syntax."""
    for path in [*(ROOT / "data_prep").rglob("*.py"), *(ROOT / "lowrank_vit").rglob("*.py")]:
        if name in (text := path.read_text(encoding="utf-8")):
            yield path, ast.parse(text)


def test_every_opening_of_an_image_names_its_formats():
    for path, tree in files_with("Image"):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"


def test_nothing_is_handed_the_bare_print():
    """`terminal.say` escapes what names from files may hold; what calls `print` itself is looked at one by one."""
    for path, tree in files_with("print"):
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id == "print":
                assert id(node) in called, f"{path}:{node.lineno}: give terminal.say instead"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_no_backend_takes_postscript_or_another_format_for_a_jpeg(photos, tmp_path, monkeypatch, backend, mode):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\nshowpage\n%%EOF\n"
    image = Image.new("RGB", (int(Beton(photos).widths[BAD]), int(Beton(photos).heights[BAD])), "red")
    image.save(tmp_path / "red.png")
    path = tmp_path / "foreign.beton"
    for stored in (eps, (tmp_path / "red.png").read_bytes()):
        with_sample(photos, path, stored)
        (line,) = read_all(backend, path, mode)
        assert f"sample {BAD} (cannot identify image file)" in line
    with pytest.raises(UserError, match=f"sample {BAD} does not decode"):
        plot_info(path, tmp_path / "p.png")
    with pytest.raises(UserError, match=f"sample {BAD} does not decode"):
        _of_beton(Beton(path), np.array([BAD]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_decompression_bomb_is_one_damaged_sample(photos, tmp_path, backend, mode):
    """Header and index agree about 14000 x 14000 pixels, more than Pillow takes."""
    beton = Beton(photos)
    stored = bytearray(beton.sample(BAD))
    at = stored.find(b"\xff\xc0") + 5
    stored[at : at + 4] = struct.pack(">HH", 14000, 14000)
    path = with_sample(photos, tmp_path / "bomb.beton", bytes(stored), height=14000, width=14000)
    (line,) = read_all(backend, path, mode)
    assert "decompression bomb" in line


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_an_index_that_contradicts_a_jpeg_is_one_damaged_sample(photos, tmp_path, backend, mode):
    beton = Beton(photos)
    height, width = int(beton.heights[BAD]), int(beton.widths[BAD])
    for row in ({"height": height ^ 1}, {"height": height | 1 << 13}, {"width": width // 2}, {"width": width + 8}):
        path = with_sample(photos, tmp_path / "a.beton", b"", **row)
        wanted = " x ".join(str({"height": height, "width": width, **row}[side]) for side in ("width", "height"))
        (line,) = read_all(backend, path, mode)
        assert f"sample {BAD} (the JPEG is {width} x {height} pixels, the index says {wanted})" in line


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_scans_without_end_are_one_damaged_sample(photos, tmp_path, backend, mode):
    """A progressive JPEG may take the whole picture up again every few bytes."""
    beton = Beton(photos)
    bad = int(beton.sizes.argmax())
    size, height, width = int(beton.sizes[bad]), int(beton.heights[bad]), int(beton.widths[bad])
    Image.new("RGB", (width, height), "red").save(tmp_path / "red.jpg", progressive=True)
    red = (tmp_path / "red.jpg").read_bytes()
    last = red[red.rfind(b"\xff\xda") : -2]
    stored = red[:-2] + last * ((size - len(red)) // len(last))
    assert stored.count(b"\xff\xda") > 600
    path = with_sample(photos, tmp_path / "scans.beton", stored + b"\xff\xd9", bad)
    (line,) = read_all(backend, path, mode)
    assert "more than 500 scans" in line


@pytest.mark.parametrize("error", [KeyError("x"), struct.error("short"), ZeroDivisionError(), AssertionError()])
@pytest.mark.parametrize("backend", BACKENDS)
def test_whatever_pillow_raises_concerns_one_sample(photos, tmp_path, monkeypatch, backend, error):
    path = with_sample(photos, tmp_path / "bad.beton", bytes(64))
    opened = Image.open

    def raising(file, **options):
        if not file.getvalue().startswith(b"\xff\xd8"):
            raise error
        return opened(file, **options)

    monkeypatch.setattr(Image, "open", raising)
    (line,) = read_all(backend, path, "evaluation")
    assert (str(error) or type(error).__name__) in line


def test_names_cannot_move_the_cursor():
    assert printable("a\nb\tc") == "a\nb\\tc"
    assert one_line("a\nb") == "a\\nb"
    assert printable(EVIL) == "\\x1b]0;title\\x07[red]:cat:\\x9b31m\\u202e"
    assert printable("类 é ² …") == "类 é ² …"
    assert printable(b"\xff".decode("utf-8", "surrogateescape")) == "\\xff"


def test_names_are_harmless_wherever_they_are_printed(tmp_path, capsys):
    def fail() -> None:
        error = UserError(f"{EVIL} is wrong")
        error.add_note(EVIL)
        raise error

    with pytest.raises(SystemExit):
        exit_cleanly(fail)
    say(EVIL)
    Display(1, 0).say(EVIL)
    out, errors = capsys.readouterr()
    assert out == f"{printable(EVIL)}\n" * 2
    assert errors == f"error: {printable(EVIL)} is wrong\n{printable(EVIL)}\n"


def test_names_of_files_and_classes_are_harmless_in_the_converter(tmp_path, capsys):
    folder = tmp_path / "src" / f"class {EVIL}"
    folder.mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(folder / "good.png")
    (folder / f"a\n{EVIL}.jpg").write_bytes(b"\xff\xd8 no image")
    out = tmp_path / f"{EVIL}.beton"
    command = ["imagefolder", "--src", str(tmp_path / "src"), "--out", str(out), "--workers", "1"]
    with pytest.raises(SystemExit):
        main(command)
    main([*command, "--on-bad", "skip"])
    main(["verify", str(out)])
    main(["info", str(out)])
    for text in capsys.readouterr():
        assert not any(c in text for c in "\x1b\x07\x9b\u202e")
        assert printable(EVIL) in text.replace("\n", "")


def test_a_name_that_promises_billions_of_parts_costs_nothing(tmp_path):
    (tmp_path / "a-1-of-3000000000.beton").touch()
    (tmp_path / f"b-1-of-{'9' * 200}.beton").touch()
    with pytest.raises(
        BetonError, match=r"lacks 2,999,999,999 of the 3,000,000,000 parts of a.beton: a-0000000002-of-"
    ):
        find_parts(tmp_path / "a.beton")
    with pytest.raises(BetonError, match=r"lacks 99,999,"):
        find_parts(tmp_path / "b.beton")
    (tmp_path / "c-1-of-1.beton").touch()
    (tmp_path / "c-7-of-1.beton").touch()
    with pytest.raises(BetonError, match="numbered beyond 1"):
        find_parts(tmp_path / "c.beton")
    with pytest.raises(UserError, match="expected i/n"):
        parse_shard("1/" + "9" * 5000)


def test_a_sample_table_that_unpacks_to_gigabytes_is_refused(photos, tmp_path):
    path = tmp_path / "a.beton"
    path.write_bytes(photos.read_bytes()[:5000])
    names = np.zeros(8_000_000, np.uint8)
    arrays = {"checksums": np.zeros(1, np.uint64), "reasons": np.zeros(1, np.uint8), "reason_names": np.array(["raw"])}
    with sample_table_path(path).open("wb") as file:
        np.savez_compressed(file, names=names, **arrays)
    with pytest.raises(BetonError, match="unpacks to more"):
        read_sample_table(path)
