"""One image file in, the right bytes out: what passes through, what is converted and how, what is refused."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFile
from torchvision.transforms import v2

import data_prep.formats.jpeg
from data_prep.formats import turbojpeg
from data_prep.formats.beton import MODE_JPEG, MODE_RAW, PAGE_SIZE
from data_prep.formats.jpeg import BadImageError, EncodedImage, ImageOptions, UnreadableImageError
from data_prep.formats.jpeg import encode_image as encode_with_options

PHOTO = Image.fromarray(skimage.data.rocket()).convert("RGB").resize((120, 80))


def encode_image(path: Path, max_side: int = 500, quality: int = 90, **options: Any) -> EncodedImage:
    """`encode_image`, without the modification time that no test can know."""
    encoded = encode_with_options(path, ImageOptions(max_side, quality, **options))
    assert encoded.source_stat == (path.stat().st_size, path.stat().st_mtime_ns)
    return replace(encoded, source_stat=(0, 0))


def save(path: Path, image: Image.Image = PHOTO, **options: Any) -> Path:
    image.save(path, **options)
    return path


def decode(encoded: EncodedImage) -> np.ndarray:
    """int64 (height, width, 3)."""
    with Image.open(io.BytesIO(encoded.data)) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (encoded.width, encoded.height))
        return np.asarray(image).astype(np.int64)


def assert_looks_like(encoded: EncodedImage, expected: Image.Image, mean_difference: float = 4.0) -> None:
    difference = np.abs(decode(encoded) - np.asarray(expected).astype(np.int64))
    assert difference.mean() < mean_difference, difference.mean()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:4:4"}, {"quality": 100}])
def test_a_good_jpeg_passes_byte_for_byte(tmp_path: Path, options: dict[str, Any]) -> None:
    path = save(tmp_path / "photo.JPG", **options)
    encoded = encode_image(path, max_side=120, quality=50)
    assert encoded == EncodedImage(MODE_JPEG, 120, 80, path.read_bytes(), "passthrough")


def test_orientation_1_passes(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 1
    path = save(tmp_path / "photo.jpg", exif=exif)
    assert encode_image(path, 500, 90).data == path.read_bytes()


@pytest.mark.parametrize(("size", "expected"), [((1200, 800), (100, 67)), ((300, 31), (100, 10)), ((9, 900), (1, 100))])
def test_a_large_jpeg_is_made_smaller(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    path = save(tmp_path / "photo.jpg", PHOTO.resize(size), quality=95)
    encoded = encode_image(path, 100, 95)
    assert (encoded.reason, encoded.width, encoded.height) == ("resized", *expected)
    with Image.open(path) as image:
        assert_looks_like(encoded, image.resize(expected, Image.Resampling.BOX), 8.0)


def test_resizing_does_not_alias(tmp_path: Path) -> None:
    stripes = np.zeros((400, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    encoded = encode_image(save(tmp_path / "stripes.png", Image.fromarray(stripes)), 100, 90)
    assert np.abs(decode(encoded) - 127.5).max() < 20


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_other_formats_become_jpeg(tmp_path: Path, suffix: str) -> None:
    encoded = encode_image(save(tmp_path / f"photo.{suffix}"), 500, 90)
    assert encoded.reason == suffix
    assert_looks_like(encoded, PHOTO)


def test_a_suffix_proves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg", format="PNG")
    assert encode_image(path, 500, 90).reason == "png"
    path = save(tmp_path / "photo.png", format="JPEG")
    assert encode_image(path, 500, 90).data == path.read_bytes()


@pytest.mark.parametrize(("mode", "reason"), [("L", "gray"), ("CMYK", "cmyk")])
def test_grey_and_cmyk_jpeg_become_rgb(tmp_path: Path, mode: str, reason: str) -> None:
    encoded = encode_image(save(tmp_path / "photo.jpg", PHOTO.convert(mode), quality=95), 500, 95)
    assert encoded.reason == reason
    assert_looks_like(encoded, PHOTO.convert(mode).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(tmp_path: Path, mode: str) -> None:
    photo = PHOTO.convert("RGBA")
    alpha = np.zeros((80, 120), np.uint8)
    alpha[:, 64:] = 255
    photo.putalpha(Image.fromarray(alpha))
    encoded = encode_image(save(tmp_path / "photo.png", photo.convert(mode)), 500, 95)
    pixels = decode(encoded)
    assert pixels[:, :56].min() > 245
    opaque = np.asarray(PHOTO.convert("L" if mode == "LA" else "RGB").convert("RGB")).astype(np.int64)
    assert np.abs(pixels - opaque)[:, 72:].mean() < 12  # a palette of 256 colours is coarse


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_16_bit_grey_keeps_its_range(tmp_path: Path, suffix: str) -> None:
    levels = np.repeat(np.arange(0, 65536, 65535 // 15, dtype=np.uint16), 16)[None].repeat(64, axis=0)
    encoded = encode_image(save(tmp_path / f"ramp.{suffix}", Image.fromarray(levels)), 500, 100)
    expected = np.round(levels / 257)[..., None].repeat(3, axis=-1)
    assert np.abs(decode(encoded) - expected).max() <= 2


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
    8: lambda x: np.rot90(x, 1),
}
"""Exif 2.32, tag 0x0112: how to turn stored pixels (height, width, 3) upright."""


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_rotated_image_is_turned_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = encode_image(save(tmp_path / f"photo.{suffix}", exif=exif), 500, 90)
    assert encoded.reason == ("orientation" if suffix == "jpg" else suffix)
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](np.asarray(PHOTO))))
    assert_looks_like(encoded, upright, 5.0)
    with Image.open(io.BytesIO(encoded.data)) as image:
        assert 0x0112 not in image.getexif()


def test_converted_images_carry_no_metadata(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg", comment=b"a private remark", icc_profile=b"a colour profile")
    encoded = encode_image(path, 100, 90)
    assert encoded.reason == "resized"
    assert b"private" not in encoded.data
    assert b"profile" not in encoded.data


def test_a_jpeg_with_more_metadata_than_a_page_is_encoded_again(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg")
    data = path.read_bytes()
    comment = b"\xff\xfe\xff\xff" + bytes(65533)
    path.write_bytes(data[:2] + comment * (PAGE_SIZE // len(comment) + 1) + data[2:])
    encoded = encode_image(path, 500, 90)
    assert encoded.reason == "bytes"
    assert len(encoded.data) < 20_000
    assert_looks_like(encoded, PHOTO)


def jpeg_bytes() -> bytes:
    buffer = io.BytesIO()
    PHOTO.save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("empty.jpg", b"", "empty"),
        ("half.jpg", jpeg_bytes()[: len(jpeg_bytes()) // 2], "Premature end"),
        ("nearly_no_end.jpg", jpeg_bytes()[:-4], "Premature end"),
        ("header_only.jpg", jpeg_bytes()[:20], "not an image|does not decode"),
        ("text.png", b"this is not an image\n" * 100, "not an image"),
        ("zeros.jpg", bytes(5000), "not an image"),
        ("postscript.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not an image"),
    ],
)
@pytest.mark.parametrize("tolerant_library", [False, True])
def test_bad_files_are_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, data: bytes, message: str, tolerant_library: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant_library)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadImageError, match=message) as caught:
        encode_image(tmp_path / name, 500, 90)
    assert str(tmp_path / name) in str(caught.value)


def test_a_truncated_png_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.png")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadImageError):
        encode_image(path, 500, 90)


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "depth.tiff", Image.fromarray(np.ones((20, 20), np.float32)))
    with pytest.raises(BadImageError, match="8 or 16 bits"):
        encode_image(path, 500, 90)


@pytest.mark.parametrize("verify", ["decode", "header"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_decompression_bomb_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, verify: str
) -> None:
    path = save(tmp_path / f"photo.{suffix}")
    monkeypatch.setattr(data_prep.formats.jpeg, "MAX_PIXELS", 120 * 80 - 1)
    with pytest.raises(BadImageError, match="120 x 80 pixels are more than the limit of 9,599"):
        encode_image(path, verify=verify)
    monkeypatch.setattr(data_prep.formats.jpeg, "MAX_PIXELS", 120 * 80)
    encode_image(path, verify=verify)


def test_a_real_bomb_is_refused_quickly(tmp_path: Path) -> None:
    """A PNG of 900 million black pixels in 110 KB, and a JPEG header that promises 4 billion."""
    rows = zlib.compress(bytes(1 + 30_000 // 8), 9)
    bomb = io.BytesIO()
    Image.new("1", (8, 8)).save(bomb, "PNG")
    header = struct.pack(">IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    (tmp_path / "bomb.png").write_bytes(bomb.getvalue()[:8] + chunk + bomb.getvalue()[33:] + rows)
    data = bytearray(jpeg_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    (tmp_path / "bomb.jpg").write_bytes(data)
    for name in ("bomb.png", "bomb.jpg"):
        with pytest.raises(BadImageError, match=r"limit of 178,?956,?970"):
            encode_image(tmp_path / name)


def test_an_unreadable_file_is_not_a_bad_image(tmp_path: Path) -> None:
    """`--on-bad skip` must not leave out images because a disk failed."""
    with pytest.raises(UnreadableImageError, match="cannot be read: No such file"):
        encode_image(tmp_path / "gone.jpg", 500, 90)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(BadImageError, match="not a regular file"):
            encode_image(tmp_path / name, 500, 90)


@pytest.mark.parametrize("position", [0.3, 0.6, 0.9])
def test_one_flipped_bit_of_a_png_is_found(tmp_path: Path, position: float) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 40, (60, 80, 3), np.uint8)).save(tmp_path / "x.png")
    content = bytearray((tmp_path / "x.png").read_bytes())
    content[int(position * len(content))] ^= 4
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(BadImageError, match="does not decode"):
        encode_image(tmp_path / "x.png", 500, 90)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_colours_of_16_bits_are_counted_as_such(tmp_path: Path, suffix: str) -> None:
    import cv2

    cv2.imwrite(str(tmp_path / f"x.{suffix}"), np.full((20, 30, 3), 40_000, np.uint16))
    encoded = encode_image(tmp_path / f"x.{suffix}", 500, 90)
    assert (encoded.reason, encoded.width, encoded.height) == ("16-bit", 30, 20)


def test_an_orientation_behind_the_frame_header_is_obeyed(tmp_path: Path) -> None:
    plain, turned = io.BytesIO(), io.BytesIO()
    image, exif = Image.fromarray(np.zeros((40, 60, 3), np.uint8)), Image.Exif()
    exif[0x0112] = 6
    image.save(plain, "JPEG")
    image.save(turned, "JPEG", exif=exif)
    segment_at = turned.getvalue().index(b"\xff\xe1")
    length = 2 + int.from_bytes(turned.getvalue()[segment_at + 2 : segment_at + 4], "big")
    segment, data = turned.getvalue()[segment_at : segment_at + length], plain.getvalue()
    scan = data.index(b"\xff\xda")
    (tmp_path / "late.jpg").write_bytes(data[:scan] + segment + data[scan:])
    encoded = encode_image(tmp_path / "late.jpg", 500, 90)
    assert (encoded.reason, encoded.width, encoded.height) == ("orientation", 40, 60)


@pytest.mark.parametrize("verify", ["decode", "header"])
def test_truncation_is_caught(tmp_path: Path, verify: str) -> None:
    """Also where only headers are parsed, since the end marker is lacking. (One or two bytes: see `jpeg_segments`.)"""
    data = jpeg_bytes()
    for length in range(700, len(data) - 1, 97):
        (tmp_path / "cut.jpg").write_bytes(data[:length])
        with pytest.raises(BadImageError):
            encode_image(tmp_path / "cut.jpg", verify=verify)


def test_damage_that_pil_lets_pass_is_caught(tmp_path: Path) -> None:
    """Data cut out of the middle, and an early end marker: PIL decodes both to grey blocks without a word."""
    data = jpeg_bytes()
    middle = len(data) // 2
    for name, damaged in (
        ("hole.jpg", data[:middle] + data[middle + 400 :]),
        ("early_end.jpg", data[:middle] + b"\xff\xd9" + data[middle + 2 :]),
    ):
        (tmp_path / name).write_bytes(damaged)
        with Image.open(tmp_path / name) as image:
            image.load()
        with pytest.raises(BadImageError, match="does not decode"):
            encode_image(tmp_path / name)
        with pytest.raises(BadImageError, match="does not decode"):  # on the way to another size too
            encode_image(tmp_path / name, 100)


def test_a_progressive_jpeg_becomes_baseline_without_loss(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg", progressive=True, quality=92, icc_profile=b"a colour profile")
    encoded = encode_image(path, baseline=True)
    assert encoded.reason == "baseline"
    assert (b"\xff\xc2" in path.read_bytes(), b"\xff\xc2" in encoded.data) == (True, False)
    with Image.open(path) as image:
        assert np.array_equal(decode(encoded), np.asarray(image))
        assert image.info["icc_profile"] == Image.open(io.BytesIO(encoded.data)).info["icc_profile"]
    baseline = save(tmp_path / "baseline.jpg")
    assert encode_image(baseline, baseline=True) == encode_image(baseline)


@pytest.mark.parametrize("size", [(120, 80), (80, 120), (40, 33), (1600, 1000)])
def test_raw_pixels_are_the_resized_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    """Short side 64, centre crop: torchvision's Resize and CenterCrop are the twin."""
    photo = PHOTO.resize(size)
    encoded = encode_image(save(tmp_path / "photo.png", photo), raw=64)
    assert (encoded.mode, encoded.width, encoded.height, encoded.reason) == (MODE_RAW, 64, 64, "raw")
    twin = v2.Compose([v2.Resize(64, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])(photo)
    pixels = np.frombuffer(encoded.data, np.uint8).reshape(64, 64, 3).astype(np.int64)
    assert np.abs(pixels - np.asarray(twin)).mean() < 3
    assert np.abs(pixels[:, ::-1] - np.asarray(twin)).mean() > 10


def test_a_ycck_jpeg_is_told_from_cmyk(tmp_path: Path) -> None:
    """PIL writes CMYK without Adobe's transform; stating one makes it YCCK."""
    data = save(tmp_path / "cmyk.jpg", PHOTO.convert("CMYK")).read_bytes()
    adobe = data.index(b"Adobe")
    (tmp_path / "ycck.jpg").write_bytes(data[: adobe + 11] + b"\x02" + data[adobe + 12 :])
    assert encode_image(tmp_path / "ycck.jpg").reason == "ycck"


@pytest.mark.parametrize("shrink", [1, 2, 4, 8])
def test_turbojpeg_decodes_as_pil_does(shrink: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.rocket()).save(buffer, "JPEG", quality=90)  # 640 x 427
    pixels = turbojpeg.decode(buffer.getvalue(), 640, 427, shrink=shrink)  # type: ignore[arg-type]
    with Image.open(buffer) as image:
        image.draft(None, (640 // shrink, 427 // shrink))
        assert image.size == (pixels.shape[1], pixels.shape[0])
        assert np.abs(pixels.astype(np.int64) - np.asarray(image)).max() <= 1


def test_turbojpeg_encodes_what_pil_can_read() -> None:
    pixels = skimage.data.astronaut()
    with Image.open(io.BytesIO(turbojpeg.encode(pixels, 95))) as image:
        assert np.abs(np.asarray(image).astype(np.int64) - pixels).mean() < 3
        assert "exif" not in image.info
