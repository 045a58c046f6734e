"""Simulated sets: what opens, verifies and decodes real sets does so with them, at any number of files and classes."""

from __future__ import annotations

import io
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import simulated
from benchmarks.harness.simulated import Options, main, simulate
from data_prep.formats.sample_table import read_sample_table
from data_prep.formats.sidecars import read_manifest
from data_prep.formats.tables import read_tables
from data_prep.sources.samples import Sample, file_list_sha256
from data_prep.verify import verify
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan

CLASSES = 11


@pytest.fixture(scope="module", params=[(97, 1), (250, 3)], ids=["one file", "three files"])
def beton(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Beton:
    samples, files = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulated, "_CHUNK", 40)  # several, as large sets have
        out = tmp_path_factory.mktemp("simulated")
        return Beton(simulate(Options(out, samples, files, CLASSES)))


def test_labels_and_names_are_those_of_listed_folders(beton: Beton) -> None:
    classes = [f"c{label:02d}" for label in range(CLASSES)]
    assert beton.classes == classes
    assert np.array_equal(np.unique(beton.labels), np.arange(CLASSES))
    assert (np.diff(beton.labels) >= 0).all()
    names = [name for part in beton.parts for name in read_sample_table(part).names]
    assert names == sorted(set(names))
    assert [name.split("/")[0] for name in names] == [classes[label] for label in beton.labels]
    assert not beton.unverified


def test_the_manifests_are_the_converters(beton: Beton) -> None:
    lists = []
    for part in beton.parts:
        manifest, table, tables = read_manifest(part), read_sample_table(part), read_tables(part)
        pairs = zip(tables.labels.tolist(), table.names, strict=True)
        lists.append([Sample(label, name) for label, name in pairs])
        assert manifest.file_list_sha256 == file_list_sha256(lists[-1])
        assert manifest.sample_bytes == tables.sizes.sum()
        assert manifest.reasons == {table.reason_names[code]: len(table.reasons) for code in set(table.reasons)}
    whole = file_list_sha256(sample for one in lists for sample in one)
    assert {read_manifest(part).whole_list_sha256 for part in beton.parts} == {whole}


def test_every_byte_and_sample_is_verified(beton: Beton) -> None:
    for part in beton.parts:
        assert verify(part, full=True).decoded
        path = part.with_name("broken.beton")
        tables, data = read_tables(part), bytearray(part.read_bytes())
        data[tables.pointers[-1] + 40] ^= 1
        for suffix in (".json", ".samples"):
            Path(f"{path}{suffix}").write_bytes(Path(f"{part}{suffix}").read_bytes())
        path.write_bytes(data)
        sharing = int((tables.pointers == tables.pointers[-1]).sum())
        with pytest.raises(UserError, match=rf"{sharing} of {len(tables.labels)} samples are damaged"):
            verify(path)
        path.unlink()


def test_neighbours_share_bytes_in_ascending_order(beton: Beton) -> None:
    for part in beton.parts:
        tables = read_tables(part)
        assert (np.diff(tables.pointers) >= 0).all()
        assert 1 < len(np.unique(tables.pointers)) < len(tables.pointers) / 4


@pytest.mark.parametrize("kind", [pytest.param("ffcv", marks=pytest.mark.slow), "dali", "resident"])
def test_loaders_decode_what_pil_does(beton: Beton, kind: str) -> None:
    plan = EvalPlan.of(beton, img_size=16, batch_size=8, crop_pct=1.0)
    loader, _ = open_loader(beton, plan, "cpu", LoaderOptions(kind, 1))
    with closing(loader):
        batch = next(iter(loader.batches(0)))
        images, targets = batch.images.clone(), batch.targets.tolist()
    assert targets == beton.labels[:8].tolist()
    for n, image in enumerate(images):
        decoded = Image.open(io.BytesIO(beton.sample(n).tobytes()))
        assert (decoded.height, decoded.width) == (beton.heights[n], beton.widths[n])
        mean = torch.from_numpy(np.array(decoded)).float().mean()
        assert abs(image.float().mean() - mean) < 30  # of the middle alone


def test_the_command_and_its_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--samples", "20", "--classes", "3", "--files", "2", "--out", str(tmp_path)])
    assert Beton(capsys.readouterr().out.splitlines()[-1]).num_samples == 20
    for files, classes, flag in ((21, 3, "--files"), (0, 3, "--files"), (1, 0, "--classes"), (1, 21, "--classes")):
        with pytest.raises(UserError, match=f"{flag} is "):
            simulate(Options(tmp_path, 20, files, classes))
