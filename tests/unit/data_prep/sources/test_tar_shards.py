"""Shards of WebDataset: found by pattern, `_info.json` or name, grouped into samples, refused where unclear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_prep.__main__ import main
from data_prep.convert import convert_image_folder
from data_prep.convert_rows import RowData, convert_rows, parse_name
from data_prep.formats.jpeg import ImageOptions
from data_prep.formats.sample_table import read_sample_table
from data_prep.formats.sidecars import read_manifest
from data_prep.sources.table_columns import Columns
from data_prep.sources.tar_shards import expanded, find_shards, tar_shards
from data_prep.writing.bad_images import BadImagesError
from lowrank_vit.common.errors import UserError
from tests.rows import PAIRS, members, photos, write_shards, write_tar
from tests.sources import Said

PATTERN = "x-train-{000..002}.tar"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> PAIRS:
    return photos(tmp_path_factory.mktemp("photos") / "folder")


def convert(root: Path, split: str = PATTERN, columns: Columns = Columns(), **options):  # noqa: B008
    out = root / "out.beton"
    return convert_rows(RowData("wds", "", root, columns), {out: (split, "--split")}, {out: ImageOptions()}, **options)[
        0
    ]


def test_patterns_are_expanded_as_braceexpand_does():
    assert expanded("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expanded("{a,b}-{1..2}::c") == ["a-1", "a-2", "b-1", "b-2", "c"]
    assert expanded("x{2..0}") == ["x2", "x1", "x0"]
    for wrong in ("x{a..}.tar", "x{1}.tar"):
        with pytest.raises(UserError, match="is neither a range"):
            expanded(wrong)


def test_shards_give_what_the_folder_gives(pairs, tmp_path):
    photos(tmp_path / "folder")
    folder = convert_image_folder(tmp_path / "folder", tmp_path / "folder.beton")
    write_shards(tmp_path / "wds", pairs)
    shards = convert(tmp_path / "wds")
    assert shards.manifest.sha256 == folder.manifest.sha256
    assert shards.manifest.classes == folder.manifest.classes
    assert shards.manifest.source == f"wds/{tmp_path / 'wds' / PATTERN}"
    assert read_sample_table(shards.beton).names[9] == "x-train-001.tar/a.b/0009.jpg"
    assert convert(tmp_path / "wds").was_finished
    (tmp_path / "wds" / "x-train-002.tar").touch()
    assert not convert(tmp_path / "wds").was_finished


def test_samples_are_grouped_by_key_whatever_their_files_are_called(pairs, tmp_path):
    (a, _), (b, _), (c, _) = pairs[:3]
    write_tar(
        tmp_path / "t-0.tar",
        [
            *members("./dir.x/1", a, {"label": 1}, "JPEG"),
            ("dir.x/2.jpeg", b),
            ("dir.x/3.cls", b"2"),  # not one behind the other
            ("dir.x/2.cls", b"0\n"),
            ("dir.x/3.seg.png", b"no"),
            ("__skipped__.txt", b""),
        ],
    )
    source = tar_shards(tmp_path, "t-{0..0}.tar", Columns(input_key="jpg;jpeg;png"))
    assert [(s.label, s.name) for s in source.samples] == [
        (1, "t-0.tar/dir.x/1.jpeg"),
        (0, "t-0.tar/dir.x/2.jpeg"),
        (2, "t-0.tar/dir.x/3"),
    ]
    assert source.bad == {2: "there is no image among its files (cls, seg.png)"}
    assert source.read(source.samples[1]) == b
    write_tar(tmp_path / "two-0.tar", [*members("1", a, 0), ("1.png", c)])
    with pytest.raises(UserError, match=r"two-0\.tar/1 has 2 images, jpg, png\. Say which with --input-key"):
        tar_shards(tmp_path, "two-0.tar", Columns())


def test_labels_are_words_numbers_or_keys_of_the_json(pairs, tmp_path):
    image = pairs[0][0]
    metas = [{"label": n, "deep": {"name": name}} for n, name in enumerate(("z", "<b>é"))]
    write_tar(tmp_path / "j.tar", [m for n, meta in enumerate(metas) for m in members(str(n), image, meta)])
    assert tar_shards(tmp_path, "j.tar", Columns()).classes == ("0", "1")
    assert tar_shards(tmp_path, "j.tar", Columns(target_key="deep/name")).classes == ("<b>é", "z")
    with pytest.raises(UserError, match=r"has no --target-key nope.*keys of the \.json are deep, label"):
        tar_shards(tmp_path, "j.tar", Columns(target_key="nope"))
    write_tar(tmp_path / "n.tar", [("1.jpg", image), ("1.txt", b"a caption")])
    with pytest.raises(UserError, match=r"has no labels\. Files of a sample end in jpg, txt.*inference"):
        tar_shards(tmp_path, "n.tar", Columns())
    write_tar(tmp_path / "i.tar", [("1.cls", b"1")])
    with pytest.raises(UserError, match=r"has no images\. Files of a sample end in cls"):
        tar_shards(tmp_path, "i.tar", Columns())


def test_bad_samples_are_listed_or_left_out(pairs, tmp_path):
    rows = [members(f"{n:02d}", *pairs[n]) for n in range(8)]
    rows += [[("8.cls", b"temple")], [("9.jpg", pairs[0][0])], members("a", pairs[0][0][:99], "flower")]
    write_tar(tmp_path / "b-0.tar", [m for row in rows for m in row])
    with pytest.raises(BadImagesError) as caught:
        convert(tmp_path, "b-0.tar")
    assert "3 of 11 images cannot be converted" in str(caught.value)
    for name, why in (("8", "there is no image"), ("9.jpg", "there is no label"), ("a.jpg", "does not decode")):
        assert f"b-0.tar/{name}: {why}" in str(caught.value)
    manifest = convert(tmp_path, "b-0.tar", on_bad="skip").manifest
    assert (manifest.num_samples, len(manifest.skipped), manifest.empty_classes) == (8, 3, ("temple",))


def test_splits_are_found_by_info_pattern_or_name(pairs, tmp_path):
    write_shards(tmp_path / "n", pairs[:6], 2, "set-train")
    write_shards(tmp_path / "n", pairs[:3], 1, "set-test")
    assert [p.name for p in find_shards(tmp_path / "n", "train").files] == ["set-train-000.tar", "set-train-001.tar"]
    found = find_shards(tmp_path / "n", "validation")
    assert "validating on those of test" in found.remarks[0]
    assert len(find_shards(tmp_path / "n", "set-train-*.tar").files) == 2
    with pytest.raises(UserError, match=r"neither _info\.json nor shards named nope; its shards are set-test-000\.tar"):
        find_shards(tmp_path / "n", "nope")
    write_shards(tmp_path / "n" / "validation", pairs[:3], 1, "anything")
    assert find_shards(tmp_path / "n", "val").split == "validation"
    entry = {"name": "train", "filenames": ["set-train-000.tar"], "shard_lengths": [3], "num_samples": 4}
    (tmp_path / "n" / "_info.json").write_text(json.dumps({"splits": {"train": {**entry, "alt_label": "cls"}}}))
    by_info = find_shards(tmp_path / "n", "train")
    assert ([p.name for p in by_info.files], by_info.label_key, by_info.expected) == (["set-train-000.tar"], "cls", 4)
    with pytest.raises(UserError, match="has no split validation; there are train"):
        find_shards(tmp_path / "n", "validation")


def test_what_is_missing_or_remote_is_named(pairs, tmp_path):
    write_shards(tmp_path, pairs)
    with pytest.raises(UserError, match=r"2 of the 4 shards of the pattern .*x-train-003\.tar, x-train-004\.tar"):
        find_shards(tmp_path, "x-train-{001..004}.tar|100")
    with pytest.raises(UserError, match="not on a disk"):
        find_shards(tmp_path, "https://a/x-{0..1}.tar")
    with pytest.raises(UserError, match="more than once"):
        find_shards(tmp_path, "x-train-000.tar::x-train-000.tar")
    said = Said()
    assert convert(tmp_path, f"{PATTERN}|100", say=said).manifest.num_samples == 24
    assert said.about("holds 24 samples, 100 were announced")


@pytest.mark.parametrize("kept", ["half", "between", "data"])
def test_a_shard_that_is_cut_off_is_refused_whatever_is_skipped(pairs, tmp_path, kept):
    path = write_shards(tmp_path, pairs, 1) / "x-train-000.tar"
    whole = path.read_bytes()
    with path.open("r+b") as file:
        end = {"between": len(whole.rstrip(b"\0")) // 512 * 512 + 512, "data": 512 + 100}.get(
            str(kept), len(whole) // 2
        )
        file.truncate(end)
    with pytest.raises(UserError, match=r"x-train-000\.tar is cut off: copy it again"):
        convert(tmp_path, "x-train-{000..000}.tar", on_bad="skip")


def test_what_is_no_tar_or_is_compressed_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"rubbish" * 200)
    with pytest.raises(UserError, match=r"a\.tar is not a tar file"):
        tar_shards(tmp_path, "a.tar", Columns())
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(UserError, match="compressed"):
        tar_shards(tmp_path, "a.tar.gz", Columns())
    write_tar(tmp_path / "e.tar", [])
    with pytest.raises(UserError, match="hold no samples"):
        tar_shards(tmp_path, "e.tar", Columns())


def test_keys_in_several_shards_are_told(pairs, tmp_path):
    for n in range(2):
        write_tar(tmp_path / f"d-{n}.tar", members("same", *pairs[n]))
    source = tar_shards(tmp_path, "d-{0..1}.tar", Columns())
    assert len(source.samples) == 2
    assert "1 keys are in several shards (same.jpg)" in source.remarks[0]
    write_tar(tmp_path / "t.tar", [*members("a", *pairs[0]), *members("a", *pairs[1])])
    with pytest.raises(UserError, match=r"contains .*a\.jpg twice"):
        tar_shards(tmp_path, "t.tar", Columns())


def test_folders_are_no_patterns_and_may_have_the_prefixs_name(pairs, tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder in ("../wcls", "my..shards", "x.tar.d", "a{1..2}", "wds", "wds/wds"):
        write_shards(Path(folder), pairs[:4], 1)
        write_shards(Path(folder), pairs[:4], 1, "x-val")
        for given in (folder, str(Path(folder).absolute())):
            data, split = parse_name("wds", given, None)
            assert (data.root, split) == (Path(given), "")
        assert parse_name("wds", folder, tmp_path)[0].root == tmp_path  # timm does not look at the name then
    assert find_shards(Path("wds"), "wds").files[0].name == "x-train-000.tar"
    pattern = "x-train-{000..000}.tar"
    main(["wds", f"wds/{pattern}", "--out", "a.beton"])
    assert read_manifest(Path("a.beton")).source == f"wds/{Path().resolve() / 'wds' / pattern}"
    main(["wds", f"wds/../wcls/{pattern}", "--out", "b.beton"])
    main(["wds", "../wcls", "--out", "out"])
    assert read_manifest(Path("out/val.beton")).num_samples == 4
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["wds", "../wclz", "--out", "out"])
    assert "wclz has neither" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["wds", "../wcls.tar.d", "--out", "out"])
    assert "wcls.tar.d is not a folder" in capsys.readouterr().err


def test_names_are_timms(tmp_path):
    assert parse_name("wds", "imagenet", None)[0].root == Path("data")
    data, split = parse_name("wds", "/x/y/a-{0..1}.tar", None)
    assert (data.root, split) == (Path("/x/y"), "a-{0..1}.tar")
    data, split = parse_name("wds", "y/a-{0..1}.tar", tmp_path)
    assert (data.root, split) == (tmp_path, "y/a-{0..1}.tar")


@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to the garbage collector
def test_webdataset_itself_reads_the_same_samples(pairs, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    write_shards(tmp_path, pairs)
    theirs = [(s["jpg"], s["cls"].decode()) for s in webdataset.WebDataset(str(tmp_path / PATTERN), shardshuffle=False)]
    source = tar_shards(tmp_path, PATTERN, Columns())
    assert [(source.read(s), source.classes[s.label]) for s in source.samples] == theirs
