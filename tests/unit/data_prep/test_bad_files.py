"""Whatever lies in a folder: it is converted to something that decodes, or named as bad; nothing else happens."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.convert import convert_image_folder
from data_prep.formats import turbojpeg
from data_prep.formats.beton import MODE_JPEG
from data_prep.formats.jpeg import BadImageError, ImageOptions, encode_image
from lowrank_vit.common.errors import UserError

PHOTO = Image.fromarray(skimage.data.coffee()).resize((96, 64))
KINDS = {
    "baseline.jpg": {},
    "progressive.jpg": {"progressive": True},
    "restart.jpg": {"restart_marker_blocks": 2},
    "gray.jpg": {},
    "cmyk.jpg": {},
    "exif.jpg": {},
    "photo.png": {},
    "palette.png": {},
    "alpha.png": {},
    "photo.webp": {},
    "photo.bmp": {},
    "photo.gif": {},
    "photo.tiff": {},
    "deflate.tiff": {"compression": "tiff_adobe_deflate"},
    "photo.ppm": {},
}
MODES = {"gray": "L", "cmyk": "CMYK", "palette": "P", "alpha": "RGBA"}
OPTIONS = [
    ImageOptions(),
    ImageOptions(max_side=50),
    ImageOptions(baseline=True, verify="header"),
    ImageOptions(raw=32),
]


def file_bytes(name: str) -> bytes:
    buffer, options = io.BytesIO(), dict(KINDS[name])
    if name.startswith("exif"):
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    suffix = name.rpartition(".")[2]
    image = PHOTO.convert(MODES.get(name.partition(".")[0], "RGB"))
    image.save(buffer, {"jpg": "JPEG"}.get(suffix, suffix.upper()), **options)  # type: ignore[arg-type]
    return buffer.getvalue()


FILES = {name: file_bytes(name) for name in KINDS}


def converts_or_is_bad(path: Path, options: ImageOptions) -> bool:
    """Convert `path`; whatever comes out must decode, fully and without a warning."""
    encoded, message = None, ""
    try:
        encoded = encode_image(path, options)
    except BadImageError as error:
        message = str(error)
    if encoded is None:
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        return False
    if encoded.mode == MODE_JPEG:
        assert max(encoded.width, encoded.height) <= options.max_side
        if options.verify == "decode":
            pixels = turbojpeg.decode(encoded.data, encoded.width, encoded.height)
            assert pixels.shape == (encoded.height, encoded.width, 3)
    else:
        assert len(encoded.data) == encoded.width * encoded.height * 3
    return True


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_whole_files_convert(tmp_path: Path, name: str, options: ImageOptions) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert converts_or_is_bad(tmp_path / name, options)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.filterwarnings("ignore")  # PIL's remarks on odd metadata
def test_files_cut_at_every_kind_of_place_are_bad(tmp_path: Path, name: str) -> None:
    """After each of the first 40 bytes, and at sixty places from the header to the last byte but three."""
    data = FILES[name]
    for length in {*range(40), *np.linspace(40, len(data) - 3, 60).astype(int).tolist()}:
        (tmp_path / name).write_bytes(data[:length])
        # A deflate stream may be complete before its last bytes (a checksum), and a PNG or WebP has trailing chunks.
        tolerated = length > 0.97 * len(data) and not name.endswith(".jpg")
        assert not converts_or_is_bad(tmp_path / name, ImageOptions()) or tolerated, length


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=600)
@given(
    name=st.sampled_from(sorted(KINDS)),
    damage=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=6),
    zeroed=st.tuples(st.floats(0, 1), st.integers(0, 64)),
    options=st.sampled_from(OPTIONS),
)
def test_damaged_files_are_converted_or_bad(tmp_path: Path, name, damage, zeroed, options) -> None:
    data = bytearray(FILES[name])
    for where, written in damage:
        position = int(where * len(data))
        data[position : position + len(written)] = written
    position = int(zeroed[0] * len(data))
    data[position : position + zeroed[1]] = bytes(zeroed[1])
    (tmp_path / name).write_bytes(data)
    converts_or_is_bad(tmp_path / name, options)


@settings(max_examples=300)
@given(data=st.binary(max_size=300), prefix=st.sampled_from([data[:n] for data in FILES.values() for n in (4, 24)]))
@pytest.mark.filterwarnings("ignore")
def test_rubbish_is_bad(tmp_path: Path, data: bytes, prefix: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(prefix + data)
    converts_or_is_bad(tmp_path / "x.jpg", ImageOptions())


def test_a_jpeg_of_a_thousand_scans_is_bad(tmp_path: Path) -> None:
    """A progressive JPEG that repeats one scan decodes for minutes in other programs."""
    data = FILES["progressive.jpg"]
    start = data.rindex(b"\xff\xda")
    scan = data[start:-2]
    (tmp_path / "scans.jpg").write_bytes(data[:start] + scan * 1000 + data[-2:])
    with pytest.raises(BadImageError, match=r"scans|progression|Inconsistent"):
        encode_image(tmp_path / "scans.jpg", ImageOptions())


def test_a_png_with_a_bomb_of_text_is_bad_or_harmless(tmp_path: Path) -> None:
    data = FILES["photo.png"]
    text = b"key\0\0" + zlib.compress(bytes(200 << 20), 9)
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    (tmp_path / "bomb.png").write_bytes(data[:33] + chunk + data[33:])
    converts_or_is_bad(tmp_path / "bomb.png", ImageOptions())


def test_odd_files_in_a_folder_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "src" / "a class"
    folder.mkdir(parents=True)
    good = ["good.jpg", "grün 绿.png", os.fsdecode(b"not \xff utf-8.jpg"), "wrong extension.png", "UPPER.JPEG"]
    for name in good:
        (folder / name).write_bytes(FILES["photo.png" if name.endswith("绿.png") else "baseline.jpg"])
    bad = ["empty.jpg", "text.jpg", "zeros.png", "half.webp", "folder of a mac.jpg"]
    for name, data in zip(
        bad, [b"", b"text\n" * 99, bytes(999), FILES["photo.webp"][:700], b"\0\5\x16\7"], strict=True
    ):
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match="5 of 10 images cannot be converted") as caught:
        convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=2)
    assert all(f"a class/{name}: " in str(caught.value) for name in bad)
    manifest = convert_image_folder(tmp_path / "src", tmp_path / "a.beton", workers=2, on_bad="skip").manifest
    assert sorted(image.name for image in manifest.skipped) == sorted(f"a class/{name}" for name in bad)
    assert manifest.reasons == {"passthrough": 4, "png": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.jpg").write_bytes(FILES["baseline.jpg"])
    (tmp_path / "src" / "a" / "x.jpg").chmod(0)
    with pytest.raises(UserError, match=r"x\.jpg cannot be read: Permission denied"):
        convert_image_folder(tmp_path / "src", tmp_path / "a.beton", on_bad="skip")


def test_a_refused_read_is_an_error_even_when_skipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--on-bad skip` must not hide: permission denied, also seen as root."""
    (tmp_path / "src" / "a").mkdir(parents=True)
    (tmp_path / "src" / "a" / "x.jpg").write_bytes(FILES["baseline.jpg"])
    opened = os.open

    def refuse(path: str | Path, *args: int, **kwargs: int) -> int:
        if str(path).endswith(".jpg"):
            raise PermissionError(13, os.strerror(13), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"x\.jpg: cannot be read: Permission denied(.|\n)*Check the source"):
        convert_image_folder(tmp_path / "src", tmp_path / "a.beton", on_bad="skip", workers=1)
