"""`verify` finds every changed byte and names sample and source; `info` says what is there."""

from __future__ import annotations

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from sklearn.datasets import load_sample_images

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats.beton import HEADER, METADATA_START, SAMPLE
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.sample_table import read_sample_table, sample_table_path
from data_prep.formats.sidecars import manifest_path, read_manifest, write_manifest
from data_prep.formats.tables import read_tables
from data_prep.info import info_table, plot_info
from data_prep.verify import verify
from lowrank_vit.common.errors import BetonError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen photographs in two classes; the last of each is grey."""
    root = tmp_path_factory.mktemp("verify") / "src"
    for label, name in enumerate(("temple", "flower bed")):
        (root / name).mkdir(parents=True)
        for n in range(7):
            crop = Image.fromarray(load_sample_images().images[label]).crop((n * 9, n * 5, n * 9 + 120, n * 5 + 90))
            (crop if n < 6 else crop.convert("L")).save(root / name / f"{n}.jpg", quality=90)
    return root


@pytest.fixture
def beton(source: Path, tmp_path: Path) -> Path:
    convert_image_folder(source, tmp_path / "a.beton", workers=1)
    return tmp_path / "a.beton"


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def test_what_was_written_is_verified(beton: Path) -> None:
    assert verify(beton).num_samples == 14
    assert verify(beton, full=True, workers=2).decoded


def test_every_flipped_bit_of_a_sample_is_found_and_named(beton: Path, source: Path) -> None:
    tables, names = read_tables(beton), read_sample_table(beton).names
    rng = np.random.default_rng(0)
    for sample_id in range(14):
        position = int(tables.pointers[sample_id] + rng.integers(tables.sizes[sample_id]))
        bit = int(rng.integers(8))
        flip(beton, position, bit)
        with pytest.raises(BetonError, match="1 of 14 samples are damaged") as caught:
            verify(beton)
        assert f"sample {sample_id} (from {source / names[sample_id]}): " in str(caught.value)
        flip(beton, position, bit)
    verify(beton)


def test_a_flipped_bit_anywhere_is_found(beton: Path) -> None:
    """Header, field descriptors, each byte of a metadata row, padding between pages, allocation table."""
    size = beton.stat().st_size
    padding = int(read_tables(beton).pointers[-1] + read_tables(beton).sizes[-1]) + 5
    positions = [*range(HEADER.itemsize), HEADER.itemsize + 3, 900, *range(METADATA_START, METADATA_START + 2 * 24)]
    for position in [*positions, padding, size - 1, size - 20, *range(METADATA_START + 24 * 14, 4000, 250)]:
        flip(beton, position)
        with pytest.raises(BetonError):
            verify(beton)
        flip(beton, position)
    verify(beton)


def test_a_changed_label_is_named(beton: Path) -> None:
    flip(beton, METADATA_START + 3 * SAMPLE.itemsize + 16)
    with pytest.raises(BetonError, match=r"sample 3 \(from .*flower bed/3\.jpg\)"):
        verify(beton)


def test_damage_beside_the_samples_is_told_apart(beton: Path) -> None:
    flip(beton, 900)
    with pytest.raises(BetonError, match=r"but its samples are whole: the damage lies in its header"):
        verify(beton)


def test_sidecars_that_are_missing_or_foreign(beton: Path, tmp_path: Path) -> None:
    table, manifest = sample_table_path(beton), manifest_path(beton)
    content = table.read_bytes()
    for damaged in (b"", content[:-30], content[: len(content) // 2], b"text" * 100):
        table.write_bytes(damaged)
        with pytest.raises(BetonError, match=r"a\.beton\.samples"):
            verify(beton)
    table.unlink()
    with pytest.raises(BetonError, match=r"a\.beton\.samples is missing"):
        verify(beton)
    table.write_bytes(content)
    words = json.loads(manifest.read_text())
    for key, value in (("sample_table_sha256", "0" * 64), ("num_samples", 13), ("file_bytes", 5)):
        manifest.write_text(json.dumps({**words, key: value}))
        with pytest.raises(BetonError):
            verify(beton)
    manifest.unlink()
    with pytest.raises(BetonError, match=r"a\.beton\.json is missing"):
        verify(beton)


def test_mutated_sample_tables_never_crash(beton: Path) -> None:
    table = sample_table_path(beton)
    content, rng = table.read_bytes(), np.random.default_rng(0)
    for _ in range(500):
        mutated = bytearray(content)
        for position in rng.integers(len(content), size=3):
            mutated[position] = rng.integers(256)
        table.write_bytes(mutated[: int(rng.integers(len(content) // 2, len(content) + 1))])
        try:
            assert len(read_sample_table(beton).names) == len(read_sample_table(beton).checksums)
        except BetonError:
            continue


def test_full_finds_an_image_that_was_stored_damaged(source: Path, tmp_path: Path) -> None:
    """Stored with its header alone checked: every byte is as it was written, and yet it does not decode."""
    shutil.copytree(source, tmp_path / "src")
    victim = tmp_path / "src" / "temple" / "2.jpg"
    data = victim.read_bytes()
    middle = len(data) * 3 // 4
    victim.write_bytes(data[:middle] + data[middle + 60 :])
    out = tmp_path / "a.beton"
    convert_image_folder(tmp_path / "src", out, image=ImageOptions(verify="header"), workers=1)
    verify(out)
    with pytest.raises(BetonError, match=r"sample 9 \(from .*temple/2\.jpg\): it does not decode"):
        verify(out, full=True)


def test_commands(beton: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["verify", str(beton), "--full", "--workers", "1"])
    assert "is as it was written: 14 samples" in capsys.readouterr().out
    main(["info", str(beton), "--plot", str(tmp_path / "no" / "folder" / "yet" / "info.png")])
    assert "wrote " in capsys.readouterr().out
    flip(beton, int(read_tables(beton).pointers[0]) + 300)
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(beton)])
    assert caught.value.code == 2
    assert "flower bed/0.jpg" in capsys.readouterr().err
    for command in (["verify"], ["info"]):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path / "none.beton")])
        assert "none.beton does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", str(beton), "--plot", str(beton / "picture.png")])
    assert "picture.png cannot be written" in capsys.readouterr().err


def printed(beton: Path) -> str:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(info_table(beton))
    return console.export_text()


def test_info_table_fits_a_terminal(beton: Path) -> None:
    text = printed(beton)
    for words in ("14", "temple", "12 passthrough, 2 gray", "120 pixels", "90 pixels", "SHA-256"):
        assert words in text
    assert max(map(len, text.splitlines())) <= 80
    manifest_path(beton).unlink()
    assert "class names, origin and checksums are unknown" in printed(beton)


def test_picture_shows_samples(beton: Path, tmp_path: Path, digits_dir: Path) -> None:
    for path in (beton, digits_dir / "train.beton"):
        plot_info(path, tmp_path / "info.png")
        pixels = np.asarray(Image.open(tmp_path / "info.png").convert("RGB"))
        assert pixels.shape[0] > 800
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_a_damaged_row_names_the_source_file(beton: Path) -> None:
    data = bytearray(beton.read_bytes())
    data[METADATA_START + SAMPLE.itemsize + 5] ^= 1  # the pointer of sample 1
    beton.write_bytes(data)
    with pytest.raises(BetonError, match=r"sample 1 .*The sample was made from .*\.(jpg|png)\."):
        verify(beton)


ODD_CLASSES = ["[red]", "$\\frac$", "类", os.fsdecode(b"\xff\xfe"), "a\nb"]


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """Classes that are no plain words, below a folder that looks like markup."""
    for n, name in enumerate(ODD_CLASSES):
        (tmp_path / "[/x]" / name).mkdir(parents=True)
        Image.new("RGB", (20, 30), (40 * n, 10, 10)).save(tmp_path / "[/x]" / name / "0.jpg")
    convert_image_folder(tmp_path / "[/x]", tmp_path / "[bold]x.beton", workers=1)
    return tmp_path / "[bold]x.beton"


@pytest.mark.filterwarnings("error")
def test_odd_names_are_shown_as_they_are(
    odd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # no path is folded
    main(["info", str(odd), "--plot", str(odd.with_name("p.png"))])
    shown = capsys.readouterr().out
    for text in ("[bold]x.beton", "[red]", "$\\frac$", "类", "\\xff\\xfe", "a\\nb", "[/x]"):
        assert text in shown
    assert odd.with_name("p.png").stat().st_size > 10_000


def test_a_huge_label_is_only_a_number(beton: Path, tmp_path: Path) -> None:
    data = bytearray(beton.read_bytes())
    data[METADATA_START + SAMPLE.itemsize - 2] = 0x7F
    beton.write_bytes(data)
    with pytest.raises(BetonError, match=r"its index .* is not the one that was written"):
        info_table(beton)
    write_manifest(manifest_path(beton), replace(read_manifest(beton), index_xxh3=""))  # as earlier versions did
    plot_info(beton, tmp_path / "p.png")
    Console(file=io.StringIO()).print(info_table(beton))


def test_parts_are_checked_and_shown_one_after_the_other(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in (1, 2):
        convert_image_folder(source, tmp_path / "s.beton", part=(i, 2), workers=1)
    main(["verify", str(tmp_path / "s.beton")])
    main(["info", str(tmp_path / "s.beton"), "--plot", str(tmp_path / "p.png")])
    shown = capsys.readouterr().out
    for i in (1, 2):
        assert f"s-{i}-of-2.beton is as it was written" in shown
        assert f"part {i} of 2" in shown
        assert (tmp_path / f"p-{i}.png").exists()
