"""A monitor whose run goes on compares with what was stored, as if there had been no break."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lowrank_vit.spectral.heads import Circuits
from lowrank_vit.spectral.watching import files, store
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from tests.monitors import (
    TIMES,
    WITH_UPDATES,
    Gate,
    adamw,
    comparable,
    nudge,
    observe,
    step,
    stored,
    watch,
)
from tests.spectra import tiny_vit
from tests.waiting import LONG_S

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("has_files", [False, True])
def test_a_refresh_that_a_kill_cut_short_is_done_again_when_the_run_goes_on(
    tmp_path: Path, gate: Gate, has_files: bool
) -> None:
    """It was under way when the checkpoint was written; at the kill its record was missing, or even its files."""
    gate.open.set()
    model, again = tiny_vit(0), tiny_vit(0)
    optimizers: dict[nn.Module, torch.optim.Optimizer] = {one: adamw(one) for one in (model, again)}

    def watch_with(watched: nn.Module, folder: Path, **more: Any) -> SpectralMonitor:
        options: dict[str, Any] = {"settings": WITH_UPDATES, "optimizer": optimizers[watched], "circuits": "folded"}
        return watch(watched, folder, watched, **options, **more)

    def observe(monitor: SpectralMonitor, watched: nn.Module, update: int) -> None:
        monitor.wait()
        if update:
            step(watched, optimizers[watched], update)
        monitor.observe(update)

    def numbers(monitor: SpectralMonitor) -> list[dict[str, float]]:
        monitor.close()
        return [{k: v for k, v in r.values.items() if not k.endswith(TIMES)} for r in monitor.records()]

    whole = watch_with(model, tmp_path / "whole")
    for update in (0, 2, 4, 6):
        observe(whole, model, update)
    expected = numbers(whole)
    assert {"spec/blocks.1.mlp.fc1/dw_top_u", "spec/blocks.1.mlp.fc1/opt_top_u"} <= set(expected[1])

    folder = tmp_path / "cut"
    cut = watch_with(again, folder)
    for update in (0, 2):
        observe(cut, again, update)
    cut.wait()
    gate.open.clear()
    observe(cut, again, 4)
    kept = cut.kept()
    assert kept is not None
    assert kept.before is not None
    assert (kept.update, kept.before.update) == (4, 2)
    torch.save(kept.content(), folder / store.kept_name(4))
    gate.open.set()
    cut.close(cancel=not has_files)
    assert stored(folder) == ([0, 2, 4] if has_files else [0, 2])

    resumed = watch_with(again, folder, resumed_update=5, recorded_update=2)
    observe(resumed, again, 6)
    assert numbers(resumed) == expected[2:]
    for path in (tmp_path / "whole").glob("*.npz"):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    # With all records there nothing is done again, and the next one knows the weights of the last.
    another = watch_with(again, folder, resumed_update=5, recorded_update=4)
    another.observe(6)
    assert numbers(another) == expected[3:]


@pytest.mark.parametrize(("before", "after", "done_again_has"), [("raw", "folded", 0), ("folded", "raw", 2)])
def test_other_circuits_than_before_are_said_and_each_file_tells_its_own(
    tmp_path: Path, before: Circuits, after: Circuits, done_again_has: int
) -> None:
    """Directions, too, are missing in the refresh that is done again, where the run before did not look at them."""
    model = tiny_vit(0)
    optimizer, said = adamw(model), list[str]()
    more: dict[str, Any] = {"settings": WITH_UPDATES, "optimizer": optimizer, "say": said.append}
    with watch(model, tmp_path, circuits=before) as monitor:
        monitor.observe(0)
        monitor.wait()
        step(model, optimizer, 1)
        monitor.observe(2)
        kept = monitor.kept()
    assert kept is not None
    torch.save(kept.content(), tmp_path / store.kept_name(2))
    with watch(model, tmp_path, circuits=after, resumed_update=3, recorded_update=0, **more) as monitor:
        monitor.wait()
        records = monitor.records()
    step_in_curves = (
        f"warning: circuits are {after} from update 3 on and were {before} before: their curves mix the two."
    )
    without = "the optimizer's direction" if done_again_has else "circuits and the optimizer's direction"
    again = f"warning: the refresh of update 2 is done again without {without}: "
    assert [line[: len(again)] for line in said] == [step_in_curves[: len(again)], again]
    assert said[0] == step_in_curves
    assert [record.update for record in records] == [2]
    assert len([key for key in records[0].values if key.endswith("/qk_sigma_max") and "/blocks." in key]) == (
        done_again_has
    )
    newest = files.read_newest_circuits(tmp_path)
    assert (newest.update, newest.circuits) == (2, after if done_again_has else before)


@pytest.mark.parametrize(("resumed", "recorded", "expected"), [(4, 2, [4, 6]), (4, 4, [6]), (5, 2, [6])])
def test_a_refresh_of_the_checkpoints_own_update_needs_no_kept_file(
    tmp_path: Path, resumed: int, recorded: int, expected: list[int]
) -> None:
    """The checkpoint has its weights; of what was due before it they are gone."""
    model = tiny_vit()
    with watch(model, tmp_path, model) as monitor:
        whole = observe(monitor, model, range(0, 6, 2))
        at_4 = deepcopy(model.state_dict())
        whole += observe(monitor, model, range(6, 8, 2))
    model.load_state_dict(at_4)
    with watch(model, tmp_path, model, resumed_update=resumed, recorded_update=recorded) as monitor:
        nudge(model, 6)
        monitor.observe(6)
        monitor.wait()
        found = monitor.records()
    assert [record.update for record in found] == expected
    lost = {key for key in whole[2] if "update_norm" in key or "turn_bound" in key}
    wanted = {key: value for key, value in whole[2].items() if key not in lost}
    assert expected[0] != 4 or comparable(found[0].values) == wanted
    assert len(found) == 1 or comparable(found[1].values) == whole[3]


def test_a_resumed_monitor_goes_on_as_if_there_had_been_no_break(tmp_path: Path) -> None:
    model = tiny_vit()
    with watch(model, tmp_path / "whole", model) as monitor:
        expected = observe(monitor, model, range(0, 12, 2))
    model = tiny_vit()
    with watch(model, tmp_path / "broken", model) as monitor:
        observe(monitor, model, range(0, 6, 2))
        checkpoint = deepcopy(model.state_dict())
        observe(monitor, model, range(6, 10, 2))  # lost with the process
    model.load_state_dict(checkpoint)
    with watch(model, tmp_path / "broken", model, resumed_update=5) as monitor:
        assert stored(tmp_path / "broken") == [0, 2, 4]
        resumed = observe(monitor, model, range(6, 12, 2))
    # The weights before the break are gone, so the first update after it has no norm, and no bound by it.
    lost = {key for key in expected[3] if "update_norm" in key or "turn_bound" in key}
    assert resumed[0] == {key: value for key, value in expected[3].items() if key not in lost}
    assert resumed[1:] == expected[4:]
    assert stored(tmp_path / "broken") == stored(tmp_path / "whole")


@pytest.mark.parametrize(("is_cut_short", "recorded"), [(False, 4), (True, 4), (True, 6)])
def test_what_a_tight_limit_has_thinned_out_is_compared_with_all_the_same(
    tmp_path: Path, gate: Gate, is_cut_short: bool, recorded: int
) -> None:
    """At the checkpoint the refresh of update 4 was the newest, or that of 6 was under way; its record came, or not."""
    gate.open.set()
    model, whole, folder = tiny_vit(), tmp_path / "whole", tmp_path / "broken"
    with watch(model, whole, model, limit_gb=1e-9) as monitor:
        expected = observe(monitor, model, range(0, 14, 2))
    model = tiny_vit()
    with watch(model, folder, model, limit_gb=1e-9) as monitor:
        observe(monitor, model, range(0, 6, 2))
        if is_cut_short:
            gate.open.clear()
            nudge(model, 6)
            monitor.observe(6)
        kept, checkpoint = monitor.kept(), deepcopy(model.state_dict())
        assert kept is not None
        gate.open.set()
        monitor.wait()
        observe(monitor, model, range(6 + 2 * is_cut_short, 12, 2))  # lost with the process
        torch.save(kept.content(), folder / store.kept_name(kept.update))
    assert stored(folder) == [0, 10]
    model.load_state_dict(checkpoint)
    resumed_update = 7 if is_cut_short else 5
    with watch(model, folder, model, limit_gb=1e-9, resumed_update=resumed_update, recorded_update=recorded) as monitor:
        assert stored(folder) == [0]
        resumed = observe(monitor, model, range(resumed_update + 1, 14, 2))
    assert resumed == expected[recorded // 2 + 1 :]
    assert sorted(path.name for path in whole.iterdir()) == sorted(path.name for path in folder.glob("*[!h]"))
    for path in whole.glob("*.npz"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_a_store_that_cannot_be_read_ends_no_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    said: list[str] = []
    monkeypatch.setattr(store, "files_of", stale)
    watch(tiny_vit(), tmp_path, resumed_update=2, recorded_update=0, say=said.append).close()
    assert len(said) == 2
    assert "cannot be read ([Errno 116] Stale file handle). Training goes on" in said[1]


def test_what_another_monitor_recorded_is_not_compared_with(tmp_path: Path) -> None:
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=2)) as monitor:
        monitor.observe(0)
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=3), resumed_update=2) as monitor:
        monitor.observe(2)
    (record,) = monitor.records()
    assert not [key for key in record.values if "/cos" in key]


def test_a_run_that_goes_on_with_other_vectors_compares_with_the_kept_weights_and_says_what_starts_anew(
    tmp_path: Path,
) -> None:
    model, lines = tiny_vit(), list[str]()
    with watch(model, tmp_path, model, settings=SpectralSettings(topk=2)) as monitor:
        observe(monitor, model, range(0, 4, 2))
        kept = monitor.kept()
        assert kept is not None
        torch.save(kept.content(), tmp_path / store.kept_name(2))
    options: dict[str, Any] = {"resumed_update": 2, "recorded_update": 2, "say": lines.append}
    with watch(model, tmp_path, model, settings=SpectralSettings(topk=3, interval=2), **options) as monitor:
        fourth, sixth = observe(monitor, model, range(4, 8, 2))
    assert any("cos0_* compare with the next whole refresh" in line for line in lines), lines
    assert fourth["spec/refresh/since"] == 2
    found = {key.rpartition("/")[2] for key in fourth}
    assert {"update_norm2", "turn_bound", "cos_u1", "block_cos_u_mean", "delta_sv_rel"} <= found
    assert "cos0_u1" not in found
    assert "cos0_u1" in {key.rpartition("/")[2] for key in sixth}


@pytest.mark.parametrize("interval", [1, 2])
def test_a_store_of_an_earlier_version_has_no_blocks_and_is_compared_with_all_the_same(
    tmp_path: Path, interval: int
) -> None:
    chosen = SpectralSettings(topk=3, interval=interval)
    model = tiny_vit()
    with watch(model, tmp_path, model, settings=chosen) as monitor:
        whole = observe(monitor, model, range(0, 4, 2))
        at_2 = deepcopy(model.state_dict())
        whole += observe(monitor, model, range(4, 8, 2))
    for path in files.list_vectors(tmp_path):
        with np.load(path) as arrays:
            earlier = {name: arrays[name] for name in arrays.files if ":between:" not in name}
        np.savez(path, allow_pickle=False, **earlier)
    model.load_state_dict(at_2)
    with watch(model, tmp_path, model, settings=chosen, resumed_update=2) as monitor:
        resumed = observe(monitor, model, range(4, 8, 2))
    lost = {key for key in whole[2] if "update_norm" in key or "turn_bound" in key}
    of_first = {key for key in whole[2] if interval > 1 and "block_cos0" in key}
    if interval > 1:
        lost |= {key for key in whole[2] if "block_cos_" in key or "block_energy" in key}
    assert resumed[0] == {key: value for key, value in whole[2].items() if key not in lost | of_first}
    assert resumed[1] == {key: value for key, value in whole[3].items() if key not in of_first}


@pytest.mark.parametrize(("topk", "interval", "then", "later"), [(3, 2, 3, 3), (3, 2, 3, 1), (3, 2, 2, 4)])
def test_vectors_of_other_indices_are_not_compared_with(
    tmp_path: Path, topk: int, interval: int, then: int, later: int
) -> None:
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=topk, interval=interval)) as monitor:
        monitor.observe(0)
    with watch(tiny_vit(), tmp_path, settings=SpectralSettings(topk=then, interval=later), resumed_update=2) as monitor:
        monitor.observe(2)
    (record,) = monitor.records()
    assert not [key for key in record.values if "/cos" in key or "/block_cos" in key]


def test_a_checkpoint_taken_while_a_refresh_runs_is_of_the_training_alone(tmp_path: Path, gate: Gate) -> None:
    model = tiny_vit()
    before = deepcopy(model.state_dict())
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
        assert gate.asked.wait(LONG_S)
        torch.save(model.state_dict(), tmp_path / "checkpoint")
        gate.open.set()
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert all(torch.equal(saved[key], value) for key, value in before.items())
    assert stored(tmp_path) == [0]
