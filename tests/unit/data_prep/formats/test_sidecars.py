"""The sidecar: it describes its file, survives a round trip, and is refused when damaged."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path

import pytest

from data_prep.convert import Conversion, convert_digits
from data_prep.formats.sidecars import Manifest, Skipped, manifest_path, read_manifest, write_manifest
from data_prep.sources.samples import Superclasses
from lowrank_vit.common.errors import BetonError


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    return convert_digits(tmp_path_factory.mktemp("digits"))[1]


def test_manifest_describes_its_file(converted: Conversion) -> None:
    manifest, data = read_manifest(converted.beton), converted.beton.read_bytes()
    assert manifest == converted.manifest
    assert manifest.file_bytes == len(data)
    assert manifest.sha256 == hashlib.sha256(data).hexdigest()
    assert (manifest.num_samples, manifest.reasons) == (360, {"raw": 360})
    assert manifest.classes == tuple("0123456789")


def test_manifest_round_trip_with_odd_names(tmp_path: Path, converted: Conversion) -> None:
    manifest = replace(
        converted.manifest, classes=("ä b", "类"), skipped=(Skipped("x/\udcff.jpg", 'why "not"\n'),), source="/a dir"
    )
    write_manifest(manifest_path(tmp_path / "a.beton"), manifest)
    assert read_manifest(tmp_path / "a.beton") == manifest


EMPTY = Manifest(0, (), {}, (), "", {}, {}, 0, "")
LATER = {field.name for field in fields(Manifest) if field.default is not MISSING} - {
    "schema_version",
    "converter_version",
}


@pytest.mark.parametrize("key", [*asdict(EMPTY)])
def test_a_manifest_without_a_key_or_of_another_type_is_refused(
    tmp_path: Path, converted: Conversion, key: str
) -> None:
    content = asdict(converted.manifest)
    damages = [{**content, key: [object] if key in ("shard", "superclasses") else None}]
    if key not in LATER:
        damages.append({k: v for k, v in content.items() if k != key})
    for damage in damages:
        manifest_path(tmp_path / "a.beton").write_text(json.dumps(damage, default=str))
        with pytest.raises(BetonError, match="not a manifest" if key in ("shard", "superclasses") else key):
            read_manifest(tmp_path / "a.beton")


def test_a_manifest_of_an_earlier_converter_is_read(tmp_path: Path, converted: Conversion) -> None:
    """Keys that came later have defaults; a file that was written before them need not be converted again."""
    content = {key: value for key, value in asdict(converted.manifest).items() if key not in LATER}
    manifest_path(tmp_path / "a.beton").write_text(json.dumps(content))
    assert read_manifest(tmp_path / "a.beton").sha256 == converted.manifest.sha256


@pytest.mark.parametrize(("old", "new"), [('"raw"', '"rau"'), ('"sha256": "', '"sha256": "0'), ('"0"', '"O"')])
def test_a_changed_manifest_is_refused(tmp_path: Path, converted: Conversion, old: str, new: str) -> None:
    text = manifest_path(converted.beton).read_text()
    assert old in text
    manifest_path(tmp_path / "a.beton").write_text(text.replace(old, new, 1))
    with pytest.raises(BetonError, match=r"a\.beton\.json was changed after the conversion"):
        read_manifest(tmp_path / "a.beton")


def test_coarse_classes_and_shard_survive(tmp_path: Path, converted: Conversion) -> None:
    manifest = replace(converted.manifest, superclasses=Superclasses(("a", "b"), (0, 1, 1)), shard=(2, 8))
    write_manifest(manifest_path(tmp_path / "a.beton"), manifest)
    assert read_manifest(tmp_path / "a.beton") == manifest


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"text"', "\xff", "[" * 100_000, '{"schema_version": 2}', '{"skipped": [1]}']
)
def test_damaged_manifests_are_refused(tmp_path: Path, text: str) -> None:
    manifest_path(tmp_path / "a.beton").write_bytes(text.encode("latin-1"))
    with pytest.raises(BetonError, match=r"a\.beton\.json is not"):
        read_manifest(tmp_path / "a.beton")


@pytest.mark.parametrize("skipped", [[1], [{"name": "x"}], {"a": 1}])
def test_damaged_lists_are_refused(tmp_path: Path, converted: Conversion, skipped: object) -> None:
    manifest_path(tmp_path / "a.beton").write_text(json.dumps({**asdict(converted.manifest), "skipped": skipped}))
    with pytest.raises(BetonError, match="is not a manifest"):
        read_manifest(tmp_path / "a.beton")


def test_unknown_keys_of_a_later_converter_are_ignored(tmp_path: Path, converted: Conversion) -> None:
    manifest_path(tmp_path / "a.beton").write_text(json.dumps({**asdict(converted.manifest), "later": 1}))
    assert read_manifest(tmp_path / "a.beton") == converted.manifest
