"""What libjpeg warns of: mended where the picture is whole, else damage; all of it is listed, whole files or not."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.formats import turbojpeg
from data_prep.formats.jpeg import LOSSLESS, BadImageError, EncodedImage, ImageOptions, encode_image
from data_prep.formats.jpeg_segments import EXTRANEOUS, NO_END, REPAIRS, REVISION, SCAN_PARAMETERS, from_bits, to_bits
from data_prep.formats.sidecars import read_manifest
from data_prep.verify import verify
from lowrank_vit.common.errors import UserError
from tests.jpeg_damage import HUFFMAN, PRECISE, RUNS, encode, photos, run
from tests.measure_jpeg_warnings import measure

PHOTO = photos(96)[0]
WHOLE = {
    "no end marker": (HUFFMAN, (NO_END,)),
    "half an end marker": (HUFFMAN, (NO_END,)),
    "end marker overwritten": (HUFFMAN, (NO_END,)),
    "libjpeg counts 1 too many": (HUFFMAN, (EXTRANEOUS,)),
    "libjpeg counts 2 too many": (HUFFMAN, (EXTRANEOUS,)),
    "2 zeros before a segment": (("baseline", "grey", "adobe"), (EXTRANEOUS,)),
    "scan parameters": (("baseline", "restart", "grey"), (SCAN_PARAMETERS,)),
    "JFIF revision": (("baseline", "progressive", "grey"), (REVISION,)),
}
"""Of `PRECISE`: the kinds of JPEG whose picture is whole, and what it takes to mend them."""
DAMAGED = (
    "cut 1 byte before",
    "cut anywhere",
    "cut between scans",
    "libjpeg counts 3 too many",
    "libjpeg counts 2 too many, no padding",
    "500 zeros before the end",
    "9 zeros before a segment",
    "restart marker changed",
    "restart marker lost",
    "scan twice",
    "Adobe transform",
)
"""Of `PRECISE`: libjpeg's warnings that are damage in each kind of JPEG."""


def changed(tmp_path: Path, kind: str, what: str) -> Path:
    """An intact photograph x.png beside it as PIL decodes it, and a mutated JPEG of it."""
    intact = encode(PHOTO, kind)
    Image.open(io.BytesIO(intact)).convert("RGB").save(tmp_path / "x.png")
    (tmp_path / "x.jpg").write_bytes(PRECISE[what][1](intact, random.Random(1)))
    return tmp_path / "x.jpg"


def shown(encoded: EncodedImage) -> np.ndarray:
    """int64 (height, width, 3) by PIL."""
    return np.asarray(Image.open(io.BytesIO(encoded.data)).convert("RGB")).astype(np.int64)


@pytest.mark.parametrize(("what", "kind"), [(what, kind) for what, (kinds, _) in WHOLE.items() for kind in kinds])
def test_a_whole_picture_is_mended_without_loss(tmp_path: Path, what: str, kind: str) -> None:
    path = changed(tmp_path, kind, what)
    if kind == "baseline":
        with pytest.raises(turbojpeg.JpegDataError):
            turbojpeg.check(path.read_bytes(), *PHOTO.size)
    encoded = encode_image(path, LOSSLESS)
    assert (
        tuple(repair for repair in encoded.repairs if repair != EXTRANEOUS or repair in WHOLE[what][1])
        == WHOLE[what][1]
    )
    assert encoded.reason == ("gray" if kind == "grey" else "repaired")
    turbojpeg.check(encoded.data, *PHOTO.size)
    difference = np.abs(shown(encoded) - np.asarray(Image.open(tmp_path / "x.png")).astype(np.int64))
    assert difference.max() <= (2 if kind == "grey" else 0)  # a grey one is encoded again, as RGB
    small = encode_image(path, ImageOptions(max_side=48))
    assert (small.repairs, small.reason) == (encoded.repairs, "gray" if kind == "grey" else "resized")


@pytest.mark.parametrize(("what", "kind"), [(what, kind) for what in DAMAGED for kind in PRECISE[what][0]])
def test_every_other_warning_is_damage(tmp_path: Path, what: str, kind: str) -> None:
    path = changed(tmp_path, kind, what)
    with pytest.raises(BadImageError, match="does not decode"):
        encode_image(path, ImageOptions())
    with pytest.raises(BadImageError, match="does not decode"):
        encode_image(path, ImageOptions(max_side=40))


@pytest.mark.parametrize("kind", ["baseline", "restart", "progressive", "grey"])
def test_what_libjpeg_warns_of_in_overwritten_files_never_passes(tmp_path: Path, kind: str) -> None:
    """Runs of 1 to 4096 bytes; what gives no warning nobody can see."""
    rng, path, warned = random.Random(kind), tmp_path / "x.jpg", 0
    intact = encode(PHOTO, kind)
    right = np.asarray(Image.open(io.BytesIO(intact)).convert("RGB")).astype(np.int64)
    for n in range(120):
        data = run(intact, rng, RUNS[n % len(RUNS)], int(2 ** rng.uniform(0, 12)))
        path.write_bytes(data)
        try:
            turbojpeg.check(data, *PHOTO.size)
            continue
        except turbojpeg.JpegDataError:
            warned += 1
        try:
            encoded = encode_image(path, LOSSLESS)
        except BadImageError:
            continue
        assert np.abs(shown(encoded) - right).max() <= (2 if kind == "grey" else 0), n
    assert warned > 40


def test_a_harmless_warning_hides_no_damage(tmp_path: Path) -> None:
    """The library tells its first warning only."""
    path = changed(tmp_path, "baseline", "JFIF revision")
    whole = path.read_bytes()
    assert encode_image(path, ImageOptions()).repairs == (REVISION,)
    middle = len(whole) // 2
    for data in (whole[:middle] + whole[middle + 300 :], whole[:middle], whole[:middle] + b"\xff\xd9"):
        path.write_bytes(data)
        with pytest.raises(BadImageError, match="does not decode"):
            encode_image(path, ImageOptions())
    path.write_bytes(PRECISE["libjpeg counts 2 too many"][1](encode(PHOTO, "baseline"), random.Random(1))[:-2])
    assert encode_image(path, ImageOptions()).repairs == (NO_END, EXTRANEOUS)


def test_bytes_between_header_segments_do_not_lead_past_the_check(tmp_path: Path) -> None:
    """Such a file used to be left to PIL, which keeps libjpeg's warnings to itself."""
    path = changed(tmp_path, "baseline", "2 zeros before a segment")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    with pytest.raises(BadImageError, match="does not decode"):
        encode_image(path, ImageOptions())


def test_repairs_as_bits() -> None:
    assert all(to_bits(from_bits(bits)) == bits for bits in range(1 << len(REPAIRS)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three photographs; of the second all are cut short, in the first one lacks its end marker."""
    for name in ("ant", "bee"):
        (tmp_path / "src" / name).mkdir(parents=True)
        for n in range(3):
            data = encode(photos(96)[n], "baseline")
            (tmp_path / "src" / name / f"{n}.jpg").write_bytes(data if name == "ant" else data[:-400])
    (tmp_path / "src" / "ant" / "9.jpg").write_bytes(encode(PHOTO, "progressive")[:-2])
    return tmp_path / "src"


def test_all_is_read_before_it_stops_and_the_next_command_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a b.beton"
    command = ["imagefolder", "--src", str(folder), "--out", str(out), "--workers", "1"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--on-bad", "error"])
    said = capsys.readouterr().err
    assert all(f"  bee/{n}.jpg: does not decode: Premature end of JPEG file\n" in said for n in range(3))
    assert f"imagefolder --src {folder} --out '{out}' --workers 1 --on-bad skip\n" in said
    main([*command, "--on-bad", "skip"])
    said = capsys.readouterr().out
    assert "repaired without loss: 1, listed in" in said
    assert f"    ant/9.jpg: {NO_END}\n" in said
    assert "left out: 3 bad" in said
    assert "no image is left of class bee: its images were all bad" in said
    main([*command, "--on-bad", "skip"])
    said = capsys.readouterr().out
    assert "nothing to do" in said
    assert "no image is left of class bee" in said
    assert f"    ant/9.jpg: {NO_END}" in said
    manifest = read_manifest(out)
    assert [(image.name, image.repairs) for image in manifest.repaired] == [("ant/9.jpg", (NO_END,))]
    assert (manifest.reasons, manifest.empty_classes) == ({"passthrough": 3, "repaired": 1}, ("bee",))
    assert verify(out, full=True).num_samples == 4
    main(["info", str(out)])
    assert "1 JPEGs, without loss" in capsys.readouterr().out


def test_a_long_list_goes_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "src" / "ant").mkdir(parents=True)
    (tmp_path / "src" / "ant" / "good.jpg").write_bytes(encode(PHOTO, "baseline"))
    for n in range(60):
        (tmp_path / "src" / "ant" / f"bad {n:02}.jpg").write_bytes(b"no image")
    out = tmp_path / "out" / "a.beton"
    with pytest.raises(UserError, match="60 of 61 images cannot be converted") as caught:
        convert_image_folder(tmp_path / "src", out, workers=1)
    assert str(caught.value).count("ant/bad") == 40
    whole = out.with_name("a.beton.bad.txt")
    assert f"... and 20 more; all of them, one a line with the reason after a tab: {whole}\n" in str(caught.value)
    lines = [line.split("\t") for line in whole.read_text().splitlines()]
    assert lines == [[f"ant/bad {n:02}.jpg", "not an image in a known format"] for n in range(60)]
    manifest = convert_image_folder(tmp_path / "src", out, workers=1, on_bad="skip").manifest
    assert (len(manifest.skipped), manifest.empty_classes) == (60, ())
    assert not whole.exists()


def test_a_resumed_conversion_lists_the_same(folder: Path, tmp_path: Path) -> None:
    """What was finished before the interruption is known from the journal."""
    for n in range(10, 14):  # pages, of 8 MiB, are noted when they are full
        comment = b"\xff\xfe\xff\xff" + bytes(65533)
        data = encode(PHOTO, "baseline")
        (folder / "ant" / f"{n}.jpg").write_bytes(data[:2] + 40 * comment + data[2:-2])
    whole = convert_image_folder(folder, tmp_path / "whole.beton", workers=1, on_bad="skip").manifest
    assert [image.name for image in whole.repaired] == [
        "ant/10.jpg",
        "ant/11.jpg",
        "ant/12.jpg",
        "ant/13.jpg",
        "ant/9.jpg",
    ]
    with pytest.raises(UserError, match="3 of 11"):
        convert_image_folder(folder, tmp_path / "a.beton", workers=1)
    done = convert_image_folder(folder, tmp_path / "a.beton", workers=1, on_bad="skip")
    assert done.resumed > 0
    assert (done.manifest.repaired, done.manifest.empty_classes) == (whole.repaired, ("bee",))
    assert done.manifest.sha256 == whole.sha256


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(max_side=40), ImageOptions(baseline=True)], ids=str)
def test_a_jpeg_without_its_tables_does_not_borrow_those_of_the_one_before(
    tmp_path: Path, options: ImageOptions
) -> None:
    path = tmp_path / "x.jpg"
    for kind in ("baseline", "progressive"):
        whole = encode(PHOTO, kind)
        path.write_bytes(whole)
        encode_image(path, options)
        path.write_bytes(whole.replace(b"\xff\xdb", b"\xff\xfe"))  # a comment in the place of quantisation tables
        with pytest.raises(BadImageError, match="Quantization table"):
            encode_image(path, options)


@pytest.mark.slow
def test_no_picture_that_is_mended_is_off(tmp_path: Path) -> None:
    """The measurement of docs/data_format.md, shorter."""
    mended = [case for case in measure(2, tmp_path) if case.verdict == "repaired"]
    assert len(mended) > 500
    assert {case.off for case in mended} == {0.0}
    assert {case.what for case in mended} >= set(WHOLE)
