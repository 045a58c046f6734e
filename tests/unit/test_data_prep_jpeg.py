"""One image file in, the right bytes out: what passes through, what is converted and how, what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFile

from data_prep.beton_format import MODE_JPEG, PAGE_SIZE
from data_prep.errors import UserError
from data_prep.jpeg import BadImageError, EncodedImage, encode_image

PHOTO = Image.fromarray(skimage.data.rocket()).convert("RGB").resize((120, 80))


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
    assert encoded.reason == "format"
    assert_looks_like(encoded, PHOTO)


def test_a_suffix_proves_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "photo.jpg", format="PNG")
    assert encode_image(path, 500, 90).reason == "format"
    path = save(tmp_path / "photo.png", format="JPEG")
    assert encode_image(path, 500, 90).data == path.read_bytes()


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_grey_and_cmyk_jpeg_become_rgb(tmp_path: Path, mode: str) -> None:
    encoded = encode_image(save(tmp_path / "photo.jpg", PHOTO.convert(mode), quality=95), 500, 95)
    assert encoded.reason == "mode"
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
    assert encoded.reason == ("orientation" if suffix == "jpg" else "format")
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
        ("half.jpg", jpeg_bytes()[: len(jpeg_bytes()) // 2], "truncated"),
        ("no_end.jpg", jpeg_bytes()[:-2], "truncated"),
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


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "photo.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 120 * 80 // 2 - 1)
    with pytest.raises(BadImageError, match="too many pixels"):
        encode_image(path, 500, 90)


def test_an_unreadable_file_is_not_a_bad_image(tmp_path: Path) -> None:
    """`--on-bad skip` must not leave out images because a disk failed."""
    with pytest.raises(UserError, match="cannot be read: No such file") as caught:
        encode_image(tmp_path / "gone.jpg", 500, 90)
    assert not isinstance(caught.value, BadImageError)
