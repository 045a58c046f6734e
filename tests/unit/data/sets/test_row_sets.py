"""`--dataset hfds/`, `hfids/` and `wds/`: converted once, found again, made anew when the data have changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.formats.sidecars import read_manifest
from data_prep.sources import hugging_face
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.sets import made_once
from lowrank_vit.data.sets.datasets import DataOptions, locate, locate_validation, open_datasets, without_split
from tests.rows import PAIRS, photos, table, write_parquet, write_shards
from tests.sources import Said, write_splits

datasets: Any = pytest.importorskip("datasets")


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


@pytest.fixture
def options(pairs: PAIRS, tmp_path: Path, request: pytest.FixtureRequest) -> DataOptions:
    """Of a table or of shards with both splits."""
    if request.param == "wds":
        write_shards(tmp_path / "d", pairs)
        write_shards(tmp_path / "d", pairs[:12], 1, "x-val")
        return DataOptions("wds/", tmp_path / "d", train_split="x-train-{000..002}.tar")
    write_parquet(write_parquet(tmp_path / "d", pairs), pairs[:12], "test")
    return DataOptions(f"{request.param}/{tmp_path / 'd'}")


def refused(options: DataOptions) -> str:
    with pytest.raises(UserError) as caught:
        locate(options, Said())
    return str(caught.value)


@pytest.mark.parametrize("options", ["hfds", "hfids", "wds"], indirect=True)
def test_it_is_converted_once_and_again_when_it_changes(options, pairs, tmp_path, monkeypatch):
    said = Said()
    train, val, num_classes = open_datasets(options, None, say=said)
    assert (train.num_samples, val.num_samples, num_classes, train.classes) == (24, 12, 2, ["flower", "temple"])
    assert train.path.parent == tmp_path / "d" / ".lowrank_vit"
    assert said.about("(once)")
    said.clear()
    with monkeypatch.context() as patch:
        patch.setattr(made_once, "one_process_in", lambda *_: pytest.fail("wants to write"))
        assert locate(options, said) == (train.path, val.path)
        assert locate_validation(None, replace(options, dataset=without_split(options.dataset, options.data_dir)[0]))
    assert not said.about("converting")
    if "wds" in options.dataset:
        write_shards(tmp_path / "d", pairs[:6])
    else:
        write_parquet(tmp_path / "d", pairs[:6])
    assert read_manifest(locate(options, said)[0]).num_samples == 6
    assert said.about("again, since the data have changed")


@pytest.mark.parametrize("options", ["hfds"], indirect=True)
def test_other_columns_and_other_data_are_seen(options, pairs, tmp_path):
    locate(options, Said())
    said = Said()
    lines = tmp_path / "classes.txt"
    lines.write_text("temple\nflower\n")
    mapped = replace(options, class_map=lines)
    assert read_manifest(locate(mapped, said)[0]).classes == ("temple", "flower")
    assert said.about("again, since other columns or classes are asked for")
    own = replace(options, beton_dir=tmp_path / "b")
    locate(own, Said())
    write_parquet(write_parquet(tmp_path / "e", pairs[:4]), pairs[:4], "test")
    message = refused(replace(own, dataset=f"hfds/{tmp_path / 'e'}"))
    assert "exists already, and is made from hfds/" in message
    assert "Give another --beton-dir" in message


@pytest.mark.parametrize("options", ["wds"], indirect=True)
def test_shards_that_are_gone_are_not_needed(options, tmp_path):
    found = locate(options, Said())
    for path in (tmp_path / "d").glob("*.tar"):
        path.unlink()
    said = Said()
    assert locate(options, said) == found
    assert said.about("is used as it is: 3 of the 3 shards")


def test_a_split_behind_the_name_is_the_one_that_is_asked_for(pairs, tmp_path):
    datasets.DatasetDict(big=table(pairs), test=table(pairs[:8])).save_to_disk(str(tmp_path / "d"))
    name = f"hfds/{tmp_path / 'd'}"
    train, val = locate(DataOptions(f"{name}:big"), Said())
    assert (train.name, val.name) == ("big.beton", "validation.beton")
    assert read_manifest(locate_validation(None, DataOptions(f"{name}:big"), Said())).num_samples == 24
    assert "names a split, and --train-split other another" in refused(DataOptions(f"{name}:big", train_split="other"))
    assert "has no split train; there are big, test. Name one with --train-split" in refused(DataOptions(name))
    assert without_split(f"{name}:big", None) == (name, None)
    assert without_split("wds/a/b-{0..1}.tar", None) == ("wds/", Path("a"))


@pytest.mark.parametrize("options", ["hfds", "wds"], indirect=True)
def test_bad_rows_are_left_out_on_request(options, pairs, tmp_path):
    rows = [(data[:50], label) if n == 3 else (data, label) for n, (data, label) in enumerate(pairs)]
    if "wds" in options.dataset:
        write_shards(tmp_path / "d", rows)
    else:
        write_parquet(tmp_path / "d", rows)
    assert "leave them out with --on-bad-sample skip" in refused(options)
    said = Said()
    assert read_manifest(locate(replace(options, on_bad="skip"), said)[0]).num_samples == 23
    assert said.about("leaves out 1 bad image")


def test_flags_of_rows_are_not_for_folders(tmp_path):
    write_splits(tmp_path)
    assert "--target-key is for --dataset hfds/, hfids/ and wds/" in refused(
        DataOptions(data_dir=tmp_path, target_key="label")
    )
    assert "needs a name after it" in refused(DataOptions("hfds/"))


def test_a_name_of_the_hub_is_asked_for_once(pairs, tmp_path, monkeypatch):
    rows = write_parquet(tmp_path / "d", pairs)
    load, asked = hugging_face._load, list[str]()

    def of_the_hub(datasets: Any, name: str, split: str, root: Any, *rest: Any, **options: Any) -> Any:
        asked.append(name)
        found = load(datasets, str(rows), "train", None, *rest, **options)
        return replace(found, base=None, fingerprint="", revision="0123456789abcdef")

    monkeypatch.setattr(hugging_face, "_load", of_the_hub)
    monkeypatch.setattr(hugging_face, "quick_without_network", lambda *_: _Nothing())
    options, said = DataOptions("hfds/owner/name", tmp_path / "root"), Said()
    train, _ = locate(options, said)
    assert train.parent.parent == tmp_path / "root" / ".lowrank_vit"
    manifest = read_manifest(train)
    assert (manifest.source, manifest.revision) == ("hfds/owner/name:train", "0123456789abcdef")
    assert asked == ["owner/name"] * 2
    shutil.rmtree(rows)
    assert locate(options, said)[0] == train
    assert said.about("train.beton: revision 0123456789ab of hfds/owner/name, as it was converted")


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
