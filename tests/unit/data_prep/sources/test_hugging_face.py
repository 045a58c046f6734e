"""Data sets of Hugging Face: tables, saved ones and streams give the bytes that the folder of the images gives."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from data_prep.convert import Conversion, convert_image_folder
from data_prep.convert_rows import RowData, convert_dataset, convert_rows, parse_name, spool_path, without_prefix
from data_prep.formats.jpeg import EncodedImage, ImageOptions
from data_prep.formats.sample_table import read_sample_table
from data_prep.sources.rows import RowSource
from data_prep.sources.table_columns import NO_COLUMNS, Columns
from data_prep.writing.bad_images import BadImagesError
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets.beton import Beton
from tests.rows import CLASSES, PAIRS, photos, table, write_parquet
from tests.sources import Said

datasets: Any = pytest.importorskip("datasets")
KINDS = ("hfds", "hfids")
WITH_PATHS = ("struct", "swapped", "large", "only paths", "other")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """`datasets` keeps its copies with the test's files, and shows no bars."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        datasets.disable_progress_bars()
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PAIRS:
    return photos(tmp_path_factory.mktemp("photos") / "folder")


def convert(data: Path | str, split: str = "train", kind: Any = "hfds", columns: Columns = NO_COLUMNS, **options: Any):
    out = options.pop("out", None) or Path(data).parent / f"{kind}-{split}.beton"
    given = {"image": ImageOptions(), **options}
    images = {out: given.pop("image")}
    return convert_rows(RowData(kind, str(data), None, columns), {out: (split, "--split")}, images, **given)[0]


def png(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", ["parquet", "folder", "saved", "file"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_what_the_folder_gives(tmp_path, kind, form):
    root = tmp_path / "root"
    rows = photos(root / "train")
    folder = convert_image_folder(root / "train", tmp_path / "folder.beton")
    if form == "folder":
        data = root
    elif form == "saved":
        data = tmp_path / "saved"
        datasets.DatasetDict(train=table(rows)).save_to_disk(str(data))
    else:
        data = write_parquet(tmp_path / "table", rows)
        data = data if form == "parquet" else next(data.iterdir())
    found = convert(data, kind=kind, out=tmp_path / "out.beton")
    assert found.manifest.sha256 == folder.manifest.sha256
    assert found.manifest.classes == folder.manifest.classes
    assert found.manifest.source == f"{kind}/{data}:train"
    assert len(found.manifest.fingerprint) == 64
    assert read_sample_table(found.beton).names[3] == "row 3 (03.jpg)"
    assert not spool_path(found.beton).exists()
    assert convert(data, kind=kind, out=tmp_path / "out.beton").was_finished


def test_images_as_paths_are_relative_to_the_table(pairs, tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "t" / "images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / "images" / name).write_bytes(pairs[0][0])
    paths = ["images/a.jpg", str(tmp_path / "t" / "images" / "b.jpg"), "images/c.jpg", "https://x/y.jpg"]
    rows = datasets.Dataset.from_dict({"image": paths, "label": ["x", "y", "x", "x"]})
    rows.to_parquet(tmp_path / "t" / "train.parquet")
    for kind in KINDS:
        manifest = convert(tmp_path / "t", kind=kind, on_bad="skip").manifest
        assert (manifest.num_samples, manifest.classes) == (2, ("x", "y"))
        if kind == "hfds":
            assert [one.name for one in manifest.skipped] == ["row 2 (c.jpg)", "row 3 (y.jpg)"]
            assert "there is no" in manifest.skipped[0].reason
            assert "download it first" in manifest.skipped[1].reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "form", ["struct", "swapped", "large", "only bytes", "only paths", "no paths", "plain", "other"]
)
def test_tables_without_the_librarys_own_mark_are_read(pairs, tmp_path, form, kind):
    images = [{"bytes": pairs[n][0], "path": f"{n}.jpg"} for n in range(4)]
    (tmp_path / "t").mkdir()
    for n in range(4):
        (tmp_path / "t" / f"{n}.jpg").write_bytes(pairs[n][0])
    struct, binary, string = pa.struct, pa.binary(), pa.string()
    made: dict[str, Any] = {
        "struct": (struct({"bytes": binary, "path": string}), images),
        "swapped": (struct({"path": string, "bytes": binary}), images),
        "large": (struct({"bytes": pa.large_binary(), "path": pa.large_string()}), images),
        "only bytes": (struct({"bytes": binary}), [{"bytes": one["bytes"]} for one in images]),
        "only paths": (struct({"path": string}), [{"path": one["path"]} for one in images]),
        "no paths": (struct({"bytes": binary, "path": pa.null()}), [{**one, "path": None} for one in images]),
        "plain": (pa.large_binary(), [one["bytes"] for one in images]),
        "other": (struct({"bytes": binary, "path": string}), images),
    }
    name = "picture" if form == "other" else "image"  # the only column of that kind
    columns = {name: pa.array(made[form][1], made[form][0]), "label": pa.array([0, 1, 0, 1])}
    parquet.write_table(pa.table(columns), tmp_path / "t" / "train.parquet")
    data = tmp_path / "t" / "train.parquet" if form == "only paths" else tmp_path / "t"
    found = convert(data, kind=kind, out=tmp_path / "out.beton")
    assert (found.manifest.reasons, Beton(found.beton).labels.tolist()) == ({"passthrough": 4}, [0, 1, 0, 1])
    assert read_sample_table(found.beton).names[1] == ("row 1 (1.jpg)" if form in WITH_PATHS else "row 1")


def test_what_is_no_image_or_has_no_labels_is_said(tmp_path):
    (tmp_path / "t").mkdir()
    for image, said in (
        ([{"bytes": "text", "path": "a"}], "not images, their bytes or paths"),
        ([{"x": b"1"}], "not images, their bytes or paths"),
        ([{"bytes": b"1", "path": "a"}], r"has no labels\. Its only column is image .*inference"),
        ([b"1"], r"has no labels\. Its only column is image"),
    ):
        parquet.write_table(pa.table({"image": pa.array(image)}), tmp_path / "t" / "train.parquet")
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "t")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ("train", range(20)),
        ("train[:10%]", range(2)),
        ("train[-3:]", range(17, 20)),
        ("train+validation", range(24)),
        ("train[:2]+val[1:3]", [0, 1, 21, 22]),
    ],
)
@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_splits_are_sliced_and_added(pairs, tmp_path, form, split, rows):
    if form == "saved":
        parts = {"train": table(pairs[:20]), "validation": table(pairs[20:])}
        datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "t"))
    else:
        write_parquet(tmp_path / "t", pairs[:20])
        write_parquet(tmp_path / "t", pairs[20:], "validation")
    found = Beton(convert(tmp_path / "t", split, out=tmp_path / "o.beton").beton)
    assert [bytes(found.sample(n)) for n in range(len(found.labels))] == [pairs[row][0] for row in rows]
    for wrong, said in (
        ("train+test", "has no split test; there are train, validation"),
        ("nope[:3]", "has no split nope"),
        ("train+", r"has no split \(an empty name\)"),
        ("train[:10", r"train\[:10 is not a slice, such as train\[:10%\]"),
    ):
        with pytest.raises(UserError, match=said):
            convert(tmp_path / "t", wrong)


def test_one_saved_set_and_one_file_are_one_split(pairs, tmp_path):
    table(pairs).save_to_disk(str(tmp_path / "saved"))
    file = next(write_parquet(tmp_path / "t", pairs, "my-val").iterdir())
    for data, split, other in ((tmp_path / "saved", "train", "validation"), (file, "validation", "train")):
        assert convert(data, f"{split}[:3]", out=tmp_path / "o.beton").manifest.num_samples == 3
        for wrong in (other, f"{split}+{other}"):
            with pytest.raises(UserError, match=f"has no split {other}; there is "):
                convert(data, wrong)


def test_odd_images_are_converted_and_broken_rows_listed(pairs, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    odd = [
        png(pixels, "CMYK", "JPEG"),
        png(pixels[..., 0].astype(np.uint16) * 257),
        png(pixels, "P"),
        png(pixels, kind="GIF", save_all=True, append_images=[Image.fromarray(pixels)]),
    ]
    rows: list[tuple[Any, Any]] = [(image, "flower") for image in odd] + list(pairs[:18])
    rows[5], rows[7] = (b"broken", "flower"), (None, "temple")
    data = write_parquet(tmp_path / "t", rows)
    with pytest.raises(BadImagesError) as caught:
        convert(data)
    assert "2 of 22 images cannot be converted" in str(caught.value)
    assert "row 5 (05.jpg): not an image in a known format" in str(caught.value)
    assert "row 7: there is no image" in str(caught.value)
    manifest = convert(data, on_bad="skip").manifest
    assert (manifest.num_samples, len(manifest.skipped)) == (20, 2)
    assert {"cmyk", "16-bit", "palette"} <= set(manifest.reasons)
    assert convert(data, kind="hfids", on_bad="skip").manifest.sha256 == manifest.sha256


def test_names_of_classes_are_kept_and_words_get_labels(pairs, tmp_path):
    names = ["z <b>&", "a\u0301 ü", "1"]
    rows = [(pairs[n][0], n % 2) for n in range(4)]
    data = write_parquet(tmp_path / "c", rows, label=datasets.ClassLabel(names=names))
    found = convert(data)
    assert (list(found.manifest.classes), Beton(found.beton).labels.tolist()) == (names, [0, 1, 0, 1])
    words = [(pairs[n][0], ("b", "a", None, "")[n]) for n in range(4)]
    data = write_parquet(tmp_path / "w", words, label=datasets.Value("string"))
    found = convert(data, on_bad="skip")
    assert (found.manifest.classes, Beton(found.beton).labels.tolist()) == (("a", "b"), [1, 0])


def test_splits_have_one_order_of_classes(pairs, tmp_path):
    data = tmp_path / "t"
    string = datasets.Value("string")
    write_parquet(data, [(pairs[0][0], one) for one in "cab"], "train", string)
    write_parquet(data, [(pairs[0][0], one) for one in "cb"], "test", string)
    outs = {tmp_path / "train.beton": ("train", "--train-split"), tmp_path / "val.beton": ("validation", "--val-split")}
    images, said = dict.fromkeys(outs, ImageOptions()), Said()
    both = convert_rows(RowData("hfds", str(data)), outs, images, say=said)
    assert [Beton(one.beton).labels.tolist() for one in both] == [[2, 0, 1], [2, 1]]
    assert both[1].manifest.classes == ("a", "b", "c")
    assert said.about("validating on test (--val-split chooses)")
    assert said.about("has no image of 1 of the 3 classes")
    write_parquet(data, [(pairs[0][0], one) for one in "cd"], "test", string)
    with pytest.raises(UserError, match=r"sets have different classes.*only the latter has d"):
        convert_rows(RowData("hfds", str(data)), outs, images)


@pytest.mark.parametrize(
    ("columns", "rename", "said"),
    [
        (Columns(target_key="nope"), {}, r"--target-key nope is not a column. Its columns are image \(PIL"),
        (Columns(input_key="nope"), {}, "--input-key nope is not a column"),
        (Columns(input_key="label"), {}, "not images, their bytes or paths"),
        (Columns(target_key="a,b"), {}, "several labels"),
        (NO_COLUMNS, {"label": "fine", "other": "coarse"}, "classes are fine, coarse. Give --target-key"),
        (NO_COLUMNS, {"image": "left", "second": "right"}, "images are left, right. Give --input-key"),
    ],
)
def test_a_column_that_is_not_clear_is_asked_for(pairs, tmp_path, columns, rename, said):
    rows = table(pairs[:2])
    rows = rows.add_column("other", [0, 1]).cast_column("other", datasets.ClassLabel(names=CLASSES))
    rows = rows.add_column("second", [{"bytes": one, "path": None} for one, _ in pairs[:2]])
    rows = rows.cast_column("second", datasets.Image()).rename_columns(rename)
    with pytest.raises(UserError, match=said):
        convert_dataset(rows, tmp_path / "x.beton", input_key=columns.input_key, target_key=columns.target_key)


def test_the_only_columns_of_their_kind_are_found(pairs, tmp_path):
    said = Said()
    rows = table(pairs).rename_columns({"image": "img", "label": "kind"})
    found = convert_dataset(rows, tmp_path / "x.beton", say=said)
    assert found.manifest.num_samples == 24
    assert said.about("images are from column img, labels from column kind")


@pytest.mark.parametrize("kind", KINDS)
def test_no_labels_no_rows_no_split(pairs, tmp_path, kind):
    data = write_parquet(tmp_path / "t", [(pairs[0][0], -1), (pairs[1][0], -1)])
    write_parquet(tmp_path / "t", [], "validation")
    with pytest.raises(UserError, match=r"no labels: in all 2 rows label is unusable .*-1.*inference"):
        convert(data, kind=kind)
    with pytest.raises(UserError, match="no rows"):
        convert(data, "validation", kind)
    with pytest.raises(UserError, match=r"has no split trian; there are train, validation. Did you mean train\?"):
        convert(data, "trian", kind)
    several = datasets.Dataset.from_dict({"image": [b"x"], "label": [[0, 1]]})
    with pytest.raises(UserError, match="label of row 0 is not a single label"):
        convert_dataset(several, tmp_path / "x.beton")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_off_goes_on_to_the_same_bytes(pairs, tmp_path, monkeypatch, kind):
    data = write_parquet(tmp_path / "t", pairs[:12])
    big = ImageOptions(raw=1000)  # two to a page, so that some are on the disk
    whole = convert(data, kind=kind, image=big, out=tmp_path / "whole.beton", workers=1)
    encode, out = RowSource.encode, tmp_path / "cut.beton"

    def stop(self: RowSource, sample: Any, options: ImageOptions) -> EncodedImage:
        if sample.row == 9:
            raise KeyboardInterrupt
        return encode(self, sample, options)

    with monkeypatch.context() as patch:
        patch.setattr(RowSource, "encode", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(data, kind=kind, image=big, out=out, workers=1)
    if kind == "hfids":  # the rows are there: none is read again
        monkeypatch.setattr("data_prep.sources.hugging_face._keep", lambda *_: pytest.fail("reads the stream again"))
    done = convert(data, kind=kind, image=big, out=out)
    assert done.resumed >= 4
    assert done.manifest.sha256 == whole.manifest.sha256


def test_a_stream_that_is_cut_off_is_gone_on_with(pairs, tmp_path, monkeypatch):
    data, out = write_parquet(tmp_path / "t", pairs), tmp_path / "out.beton"
    from data_prep.sources import hugging_face

    keep, read = hugging_face._keep, list[int]()

    def stop(spool: Any, *rest: Any) -> None:
        if len(spool) == 10 and not read:
            raise KeyboardInterrupt
        keep(spool, *rest)

    monkeypatch.setattr(hugging_face, "_keep", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(data, kind="hfids", out=out)
    read.append(1)
    said = Said()
    found = convert(data, kind="hfids", out=out, say=said)
    assert said.about("after 10 rows that an interrupted run has read")
    assert found.manifest.sha256 == convert(data, out=tmp_path / "other.beton").manifest.sha256


def test_parts_are_the_whole(pairs, tmp_path):
    data = write_parquet(tmp_path / "t", pairs)
    whole = Beton(convert(data, out=tmp_path / "w.beton").beton)
    for n in (1, 2, 3):
        convert(data, out=tmp_path / "p.beton", part=(n, 3))
    parts = Beton(tmp_path / "p.beton")
    assert parts.labels.tolist() == whole.labels.tolist()
    assert all(bytes(parts.sample(n)) == bytes(whole.sample(n)) for n in range(24))
    with pytest.raises(UserError, match="a stream is read from its beginning"):
        convert(data, kind="hfids", part=(1, 3))


def test_objects_of_datasets_are_read_without_decoding(pairs, tmp_path):
    rows = table(pairs)
    found = convert_dataset(rows, tmp_path / "a.beton")
    assert found.manifest.reasons == {"passthrough": 24}
    assert convert_dataset(rows, tmp_path / "a.beton").was_finished
    shuffled: Conversion = convert_dataset(rows.shuffle(seed=1), tmp_path / "a.beton")
    assert not shuffled.was_finished
    turned = rows.with_transform(lambda batch: {"picture": [png(np.zeros((9, 9, 3), np.uint8))], "class": [1]})
    moved = convert_dataset(turned, tmp_path / "t.beton", input_key="picture", target_key="class")
    assert set(Beton(moved.beton).labels.tolist()) == {1}
    with pytest.raises(UserError, match="item 0 is of the kind dict with the keys picture, class"):
        convert_dataset(turned, tmp_path / "t.beton")
    with pytest.raises(UserError, match="a dict of data sets"):
        convert_dataset(datasets.DatasetDict(train=rows), tmp_path / "b.beton")
    with pytest.raises(UserError, match="a stream has no length"):
        convert_dataset(rows.to_iterable_dataset(), tmp_path / "b.beton")


def test_names_and_splits(tmp_path):
    data, split = parse_name("hfds", "owner/name:test", tmp_path)
    assert (data.name, split, data.title, data.local) == ("owner/name", "test", "hfds/owner/name", None)
    (tmp_path / "mine").mkdir()
    assert parse_name("hfds", "mine", tmp_path)[0].local == tmp_path / "mine"
    (tmp_path / "hfds" / "a:b").mkdir(parents=True)
    assert parse_name("hfds", "hfds/a:b", tmp_path)[1] == ""
    both = ("hfds", "hfids")
    assert without_prefix("hfds/a:train", both, None) == "a:train"
    assert without_prefix("hfids/a/b", both, tmp_path) == "a/b"
    assert without_prefix("hfds/a:b", both, tmp_path) == "hfds/a:b"
    assert without_prefix("hfds/mine:train[:5]", both, tmp_path / "hfds") == "mine:train[:5]"
    with pytest.raises(UserError, match="needs a name after it"):
        parse_name("hfds", "", None)
    with pytest.raises(UserError, match="holds no data files"):
        convert(tmp_path / "mine")
    (tmp_path / "x.csv").touch()
    with pytest.raises(UserError, match=r"give a folder, or a \.parquet"):
        convert(tmp_path / "x.csv")


def test_a_damaged_table_is_named(pairs, tmp_path):
    data = write_parquet(tmp_path / "t", pairs)
    path = next(data.iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"t cannot be loaded: "):
        convert(data)
    shutil.rmtree(data)
