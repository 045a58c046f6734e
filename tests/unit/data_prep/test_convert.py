"""Sources and the writer: what is listed, what is stored, and what is left behind when something goes wrong."""

from __future__ import annotations

import hashlib
import math
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_prep.convert import convert_digits, convert_image_folder
from data_prep.formats.beton import MIN_PAGE_SIZE, MODE_RAW
from data_prep.formats.jpeg import EncodedImage, ImageOptions
from data_prep.formats.sidecars import Manifest, manifest_path, read_manifest, write_manifest
from data_prep.formats.tables import read_tables
from data_prep.sources.image_folder import image_folder
from data_prep.sources.samples import Sample, digits, digits_indices
from data_prep.writing.beton import write_beton
from data_prep.writing.workers import CHUNK, CHUNKS_AHEAD, map_ordered
from lowrank_vit.common.errors import BetonError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes; 5 + 5 + 60 small JPEGs, one of them too large for --max-side 32."""
    rng = np.random.default_rng(0)
    for name, count in (("ant", 5), ("bee", 5), ("cat", 60)):
        (tmp_path / "src" / name).mkdir(parents=True)
        for i in range(count):
            side = 40 if (name, i) == ("ant", 0) else 24
            image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            image.save(tmp_path / "src" / name / f"{i:03d}.jpg")
    return tmp_path / "src"


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_digits_split_is_a_fixed_partition() -> None:
    train, val = digits_indices("train", 1797), digits_indices("val", 1797)
    assert (len(train), len(val)) == (1437, 360)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(1797))
    digest = hashlib.sha256(np.concatenate([train, val]).astype("<i8").tobytes()).hexdigest()
    assert digest == "0cb1b774f2536b82c0fe7bc3b3e49b27d3d7003310afe96328187eb70a1b4213"


def test_digits_pixels_and_labels() -> None:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for split in ("train", "val"):
        source, indices = digits(split), digits_indices(split, 1797)
        assert source.classes == tuple("0123456789")
        assert [sample.label for sample in source.samples] == labels[indices].tolist()
        pixels = np.stack([sample.pixels for sample in source.samples if sample.pixels is not None])
        expected = np.floor(images[indices].reshape(-1, 8, 8) * 255 / 16 + 0.5)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=-1))


def test_bytes_do_not_depend_on_the_number_of_workers(folder: Path, tmp_path: Path) -> None:
    written = [
        convert_image_folder(folder, tmp_path / f"{workers}.beton", image=ImageOptions(max_side=32), workers=workers)
        for workers in (1, 2)
    ]
    assert (tmp_path / "1.beton").read_bytes() == (tmp_path / "2.beton").read_bytes()
    assert written[0].manifest == written[1].manifest
    assert written[0].manifest.reasons == {"passthrough": 69, "resized": 1}


def test_stored_jpegs_are_the_files_themselves(folder: Path, tmp_path: Path) -> None:
    convert_image_folder(folder, tmp_path / "out.beton", workers=1)
    tables, data = read_tables(tmp_path / "out.beton"), (tmp_path / "out.beton").read_bytes()
    for i, sample in enumerate(image_folder(folder).samples):
        assert data[tables.pointers[i] :][: tables.sizes[i]] == (folder / sample.name).read_bytes()
        assert tables.labels[i] == sample.label


def fill(sample: Sample, size: int) -> EncodedImage:
    return EncodedImage(MODE_RAW, size // 3, 1, bytes([sample.label]) * size, "raw")


def test_samples_fill_pages_and_never_span_them(tmp_path: Path) -> None:
    sizes = [3 * int(n) for n in np.random.default_rng(0).integers(1, 65536, 200)]
    samples = [Sample(i, str(i)) for i in range(len(sizes))]
    write_beton(tmp_path / "a.beton", samples, lambda s: fill(s, sizes[s.label]), page_size=MIN_PAGE_SIZE)
    tables, data = read_tables(tmp_path / "a.beton"), (tmp_path / "a.beton").read_bytes()
    assert tables.sizes.tolist() == sizes
    pointer, expected = MIN_PAGE_SIZE, []  # the metadata takes less than the first page
    for size in sizes:
        if pointer % MIN_PAGE_SIZE + size > MIN_PAGE_SIZE:
            pointer = -(-pointer // MIN_PAGE_SIZE) * MIN_PAGE_SIZE
        expected.append(pointer)
        pointer += size
    assert tables.pointers.tolist() == expected
    for i, size in enumerate(sizes):
        assert data[tables.pointers[i] :][:size] == bytes([i]) * size


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (EncodedImage(MODE_RAW, 1000, 1000, bytes(3_000_000), "raw"), "big takes 3,000,000 bytes, more than the 2,097"),
        (EncodedImage(MODE_RAW, 65536, 1, bytes(65536 * 3), "raw"), "big has 65536 x 1 pixels"),
    ],
)
def test_what_does_not_fit_is_an_error(tmp_path: Path, image: EncodedImage, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_beton(tmp_path / "a.beton", [Sample(0, "big")], lambda sample: image, page_size=MIN_PAGE_SIZE)
    assert names_in(tmp_path) == []


def spoil(folder: Path) -> list[str]:
    """Damage 13 images in four ways; their names in order."""
    (folder / "ant" / "001.jpg").write_bytes(b"")
    (folder / "bee" / "002.jpg").write_text("text")
    bad = ["ant/001.jpg", "bee/002.jpg"]
    for i in range(10, 21):
        path = folder / "cat" / f"{i:03d}.jpg"
        path.write_bytes(path.read_bytes()[: -30 * (i - 9)])
        bad.append(f"cat/{path.name}")
    return bad


@pytest.mark.parametrize("workers", [1, 2])
def test_all_bad_images_are_listed_and_nothing_is_written(folder: Path, tmp_path: Path, workers: int) -> None:
    bad = spoil(folder)
    with pytest.raises(UserError, match="13 of 70 images cannot be converted") as caught:
        convert_image_folder(folder, tmp_path / "out" / "a.beton", workers=workers)
    for name in bad:
        assert f"  {name}: " in str(caught.value)
    assert names_in(tmp_path / "out") == []


def test_skipped_images_are_recorded(folder: Path, tmp_path: Path) -> None:
    bad = spoil(folder)
    conversion = convert_image_folder(folder, tmp_path / "a.beton", workers=1, on_bad="skip")
    assert [image.name for image in conversion.manifest.skipped] == bad
    assert conversion.manifest.skipped[0].reason == "the file is empty"
    assert conversion.manifest.num_samples == len(read_tables(tmp_path / "a.beton").labels) == 57
    assert read_manifest(tmp_path / "a.beton") == conversion.manifest


def test_only_bad_images_are_an_error_even_when_skipping(folder: Path, tmp_path: Path) -> None:
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"70 of 70 images(.|\n)*all, from ant/000.jpg to cat/059.jpg: the file is empty"
    ):
        convert_image_folder(folder, tmp_path / "a.beton", workers=1, on_bad="skip")
    assert names_in(tmp_path) == ["src"]


def test_an_unreadable_image_stops_even_when_skipping(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "999.jpg").symlink_to(tmp_path / "gone.jpg")
    (folder / "cat" / "998.jpg").write_text("not an image")
    with pytest.raises(
        UserError, match=r"998\.jpg: not an image(.|\n)*999\.jpg: cannot be read(.|\n)*cannot be skipped"
    ):
        convert_image_folder(folder, tmp_path / "a.beton", workers=2, on_bad="skip")
    assert names_in(tmp_path) == ["src"]


def test_an_interrupted_run_leaves_the_old_pair(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "a.beton"
    convert_image_folder(folder, out, workers=1)
    before = [path.read_bytes() for path in (out, manifest_path(out))]

    def interrupted(sample: Sample) -> EncodedImage:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_beton(out, [Sample(0, "x")], interrupted)
    assert names_in(out.parent) == ["a.beton", "a.beton.json", "a.beton.samples"]
    assert [path.read_bytes() for path in (out, manifest_path(out))] == before


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIN_PAGE_SIZE + 100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.beton cannot be written: .* Check the free space"):
            write_beton(tmp_path / "a.beton", [Sample(0, "x")], lambda s: fill(s, 3000), page_size=MIN_PAGE_SIZE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names_in(tmp_path) == []


def test_a_directory_in_the_way_is_found_before_converting(tmp_path: Path) -> None:
    (tmp_path / "a.beton").mkdir()
    with pytest.raises(UserError, match=r"a\.beton cannot be written: Is a directory"):
        write_beton(tmp_path / "a.beton", [Sample(0, "x")], lambda s: pytest.fail("converted"))


class Crash:
    """os.replace that raises KeyboardInterrupt after a number of renames."""

    def __init__(self, renames: int) -> None:
        self.left, self.rename = renames, os.replace

    def __call__(self, source: Path, target: Path) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        self.rename(source, target)


@pytest.mark.parametrize("renames", range(5))
def test_a_crash_never_pairs_a_beton_with_a_foreign_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Stop before each of the renames; what is left has its own manifest or none."""
    out = tmp_path / "train.beton"
    write_beton(out, [Sample(0, "x")], lambda s: fill(s, 30))
    write_manifest(manifest_path(out), Manifest(1, ("a",), {}, (), "old", {}, {}, out.stat().st_size, "old"))
    monkeypatch.setattr(os, "replace", Crash(renames))
    with pytest.raises(KeyboardInterrupt):
        convert_digits(tmp_path)
    monkeypatch.undo()
    num_samples = len(read_tables(out).labels)
    assert num_samples == (1 if renames < 3 else 1437)
    if renames < 2:
        assert read_manifest(out).source == "old"
    else:
        with pytest.raises(BetonError, match="is missing"):
            read_manifest(out)


@pytest.mark.parametrize("renames", range(5))
def test_after_a_crash_between_renames_the_same_command_ends_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    out = tmp_path / "a.beton"
    convert_image_folder(folder, tmp_path / "whole.beton", workers=1)
    monkeypatch.setattr(os, "replace", Crash(renames))
    with pytest.raises(KeyboardInterrupt):
        convert_image_folder(folder, out, workers=1)
    monkeypatch.undo()
    assert convert_image_folder(folder, out, workers=1).was_finished == (renames >= 3)
    for suffix in ("", ".samples", ".json"):
        assert Path(f"{out}{suffix}").read_bytes() == (tmp_path / f"whole.beton{suffix}").read_bytes()
    assert convert_image_folder(folder, out, workers=1).was_finished
    assert [name for name in names_in(tmp_path) if name.startswith(".") and not name.endswith("journal")] == []


def test_what_is_finished_is_not_done_again_unless_something_changed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.beton"

    def is_done(**options: Any) -> bool:
        return convert_image_folder(folder, out, workers=1, **options).was_finished

    assert not is_done()
    assert is_done()
    assert not is_done(image=ImageOptions(quality=80))
    assert is_done(image=ImageOptions(quality=80))
    image = next(folder.rglob("*.jpg"))
    os.utime(image, ns=(1, 1))
    assert not is_done()
    image.rename(image.with_name("renamed.jpg"))
    assert not is_done()
    with out.open("ab") as file:
        file.write(b"x")
    assert not is_done()
    (folder / "cat" / "bad.jpg").write_text("not an image")
    assert not is_done(on_bad="skip")
    assert is_done(on_bad="skip")
    with pytest.raises(UserError, match=r"bad\.jpg"):
        is_done()
    shutil.copy(image.with_name("renamed.jpg"), folder / "cat" / "bad.jpg")  # mended
    assert not is_done(on_bad="skip")
    assert is_done()


def test_output_is_as_readable_as_the_umask_says_and_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.beton").symlink_to(tmp_path / "disk" / "real.beton")
    write_beton(tmp_path / "link.beton", [Sample(0, "x")], lambda s: fill(s, 30))
    assert (tmp_path / "link.beton").is_symlink()
    (tmp_path / "plain").touch()
    assert (tmp_path / "disk" / "real.beton").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_map_keeps_order_and_stays_bounded(workers: int) -> None:
    taken = []
    source = (taken.append(i) or i for i in range(1000))
    results = map_ordered(math.factorial, source, workers)
    assert next(results) == 1
    assert len(taken) <= max(1, CHUNKS_AHEAD * workers * CHUNK)
    results.close()
    assert list(map_ordered(math.sqrt, map(float, range(200)), workers)) == [math.sqrt(i) for i in range(200)]


def test_an_exception_in_a_worker_arrives() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        list(map_ordered(math.sqrt, [1.0, -1.0], 2))
