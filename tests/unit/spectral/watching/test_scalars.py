"""The scalars on disk: as recorded, bounded, read while a run goes on, and those of runs that only logged them."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.watching.files import StoredScalars, list_scalars, read_scalars, write_scalars
from lowrank_vit.spectral.watching.scalars import ScalarHistory, columns_of
from lowrank_vit.spectral.watching.store import SCALARS_SHARE, SpectraStore
from lowrank_vit.spectral.watching.stored import open_spectra
from tests.hidden_packages import hidden_packages
from tests.monitors import watch
from tests.reported import add_spectra
from tests.spectra import tiny_vit

NAMES = ("blocks.0.attn.qkv", "blocks.1.mlp.fc1", "ü.日本")


def values(update: int) -> dict[str, float]:
    """A record: not every row has every metric."""
    found = {f"{kind}/{name}/sigma_max": update + n for kind in ("spec", "spec_ema") for n, name in enumerate(NAMES)}
    found |= {f"spec/{name}/alpha": math.nan if n else 2.5 for n, name in enumerate(NAMES)}
    return {**found, "spec/type/mlp.fc1/turn_bound": math.inf, "spec/refresh/seconds": 0.5, "spec/refresh/full": 1.0}


def updates(folder: Path) -> list[int]:
    return ScalarHistory(folder).updates


def test_the_store_has_all_numbers_of_a_record_as_they_are(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path, tiny_vit()) as monitor:
        for update in (0, 2):
            monitor.observe(update)
            monitor.wait()
        records = monitor.records()
    history = ScalarHistory(tmp_path)
    assert history.updates == history.full_updates == [0, 2]
    for record in records:
        of_matrices = {key: v for key, v in record.values.items() if not key.startswith("spec/refresh/")}
        numbers = {key: v for key, v in of_matrices.items() if not math.isnan(v)}
        assert history.read(record.update).named() == numbers
        assert set(StoredScalars.of(0, of_matrices).metrics) == set(history.read(record.update).metrics)


def test_what_is_no_number_and_any_name_come_back(tmp_path: Path) -> None:
    write_scalars(tmp_path, StoredScalars.of(7, values(7), full=False))
    found = read_scalars(tmp_path / "scalars_00000007.npz")
    assert (found.update, found.full) == (7, False)
    assert found.named() == {k: v for k, v in values(7).items() if v == v and "/refresh/" not in k}
    assert found.named({"alpha"}) == {"spec/blocks.0.attn.qkv/alpha": 2.5}
    assert ScalarHistory(tmp_path).full_updates == []


def test_they_keep_their_share_of_the_limit_and_thin_out_evenly(tmp_path: Path) -> None:
    SpectraStore(tmp_path, 1e9).save(0, {}, scalars=values(0))
    limit = 8.5 * (tmp_path / "scalars_00000000.npz").stat().st_size / SCALARS_SHARE
    store = SpectraStore(tmp_path, limit)
    for update in range(10, 1000, 10):
        if update == 500:  # a run that is resumed
            store = SpectraStore(tmp_path, limit)
        store.save(update, {}, scalars=values(update))
        assert sum(path.stat().st_size for path in list_scalars(tmp_path)) <= SCALARS_SHARE * limit
        assert (updates(tmp_path)[0], updates(tmp_path)[-1]) == (0, update)
        assert len({b - a for a, b in itertools.pairwise(updates(tmp_path)[:-1])}) <= 1
    assert 4 <= len(updates(tmp_path)) <= 8
    store.forget_after(500)
    assert max(updates(tmp_path)) <= 500
    store.forget()
    assert not tmp_path.exists()


def line(update: int, record: dict[str, float]) -> str:
    plain = {key: None if not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps({"kind": "spec", "update": update, **plain}) + "\n"


def test_a_run_that_only_logged_its_numbers_is_read_as_well(tmp_path: Path) -> None:
    store = tmp_path / "spectra"
    store.mkdir()
    means = {key: value for key, value in values(0).items() if "/type/" in key or "/refresh/" in key}
    log = [line(0, values(1)), line(0, values(0)), line(10, values(10)), line(20, means), line(30, values(30))[:90]]
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "update": 1}\n' + "".join(log))
    assert updates(store) == ScalarHistory(store).full_updates == [0, 10]
    expected = {k: v for k, v in values(0).items() if math.isfinite(v) and "/refresh/" not in k}
    assert ScalarHistory(store).read(0).named() == expected  # the later one of two lines
    for update in (10, 40):  # the run goes on with a store, which counts
        write_scalars(store, StoredScalars.of(update, values(update + 1)))
    history = ScalarHistory(store)
    assert history.updates == [0, 10, 40]
    assert history.read(10).named()["spec/ü.日本/sigma_max"] == 13
    (store / "scalars_00000010.npz").write_bytes(b"PK damaged")
    assert history.read(10).named()["spec/ü.日本/sigma_max"] == 12
    (store / "scalars_00000040.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match="scalars_00000040"):
        history.read(40)
    with pytest.raises(UserError, match=r"no scalars of update 5\. There are 0, 10, 40"):
        history.read(5)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    add_spectra(tmp_path)
    for update in (0, 10):
        write_scalars(tmp_path / "spectra", StoredScalars.of(update, values(update)))
    return tmp_path


def test_columns_have_a_row_for_each_refresh_and_matrix(run: Path) -> None:
    spectra = open_spectra(run)
    assert spectra.scalar_updates == [0, 10]
    found = spectra.scalars()
    assert list(found) == ["update", "ema", "name", "sigma_max", "alpha", "turn_bound"]
    assert {len(column) for column in found.values()} == {14}
    is_model = (found["name"] == "blocks.1.mlp.fc1") & ~found["ema"]
    np.testing.assert_array_equal(found["update"][is_model], [0, 10])
    np.testing.assert_array_equal(found["sigma_max"][is_model], [1, 11])
    assert np.isnan(found["alpha"][is_model]).all()
    np.testing.assert_array_equal(found["turn_bound"][found["name"] == "type/mlp.fc1"], [math.inf] * 2)
    assert list(spectra.scalars("alpha", updates=[10])) == ["update", "ema", "name", "alpha"]
    with pytest.raises(UserError, match=r"no metric sigma\. There are sigma_max"):
        spectra.scalars("sigma")
    with pytest.raises(UserError, match="no scalars of update 7"):
        spectra.scalars(updates=[7])


def test_a_refresh_that_is_thinned_out_meanwhile_is_left_out(run: Path) -> None:
    spectra = open_spectra(run)
    assert spectra.scalar_updates == [0, 10]
    (run / "spectra" / "scalars_00000000.npz").unlink()
    assert set(spectra.scalars()["update"]) == {10}


def test_no_refresh_makes_columns_without_rows() -> None:
    assert {name: len(column) for name, column in columns_of([]).items()} == {"update": 0, "ema": 0, "name": 0}


def test_pandas_gets_the_same_columns(run: Path) -> None:
    pytest.importorskip("pandas")
    frame = open_spectra(run).to_pandas("sigma_max")
    assert list(frame.columns) == ["update", "ema", "name", "sigma_max"]
    assert frame[~frame.ema].groupby("name").sigma_max.max()["blocks.1.mlp.fc1"] == 11


def test_without_pandas_it_is_said_what_to_do(run: Path) -> None:
    said = r"the package pandas, which is not installed: `pip install 'lowrank-vit\[tables\]'`, or use `scalars`"
    with hidden_packages("pandas"), pytest.raises(UserError, match=said):
        open_spectra(run).to_pandas()
