"""What a comparison says at its top: the planted difference first, and nothing where seeds alone differ."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.report.compare.differences import LEVEL, Measure, differences, sentences
from lowrank_vit.report.compare.groups import read_compared
from lowrank_vit.report.language import in_language
from lowrank_vit.spectral.watching.files import write_spectra

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1")


def run(
    folder: Path,
    name: str,
    seed: int,
    *,
    top1: float = 60.0,
    blocks: Sequence[int] = (),
    factor: float = 1.0,
    **more: object,
) -> Path:
    """A run whose numbers a seed moves a little. σ₁ of attn.proj is `factor` times as large in `blocks`."""
    rng, path = np.random.default_rng(seed), folder / name
    (path / "spectra").mkdir(parents=True)
    noise = rng.normal(0, 0.4, 3)
    rows = [f"{e},{10 * e + 10},{2 + noise[0] / 9 - e / 9},{2 + noise[1] / 9},{top1 + noise[2] + e}" for e in range(3)]
    (path / "summary.csv").write_text("\n".join(["epoch,update,train_loss,eval_loss,eval_top1", *rows]) + "\n")
    (path / "args.yaml").write_text(json.dumps({"model": "vit", "seed": seed} | more))
    for update in (0, 30):
        spectra: dict[str, np.ndarray] = {}
        for block in range(8):
            for kind in KINDS:
                s = np.geomspace(2, 0.1, 12) * rng.normal(1, 0.01, 12)
                s[0] *= factor if kind == "attn.proj" and block in blocks else 1
                spectra |= dict.fromkeys((f"spec/blocks.{block}.{kind}", f"spec_ema/blocks.{block}.{kind}"), s)
        write_spectra(path / "spectra", update, spectra)
    return path


def of(*paths: Path) -> list[str]:
    return sentences(read_compared(paths))


def test_what_was_planted_comes_first_with_the_spread_over_seeds(tmp_path: Path) -> None:
    runs = [run(tmp_path, f"adamw-{n}", n) for n in range(3)]
    planted = [run(tmp_path, f"muon-{n}", n, blocks=(6, 7), factor=4, opt="muon") for n in range(3, 6)]
    first, last, *_ = of(*runs, *planted)
    assert first.startswith("σ₁ of attn.proj is 1.8 times as large in muon (seeds 3-5) as in adamw (seeds 0-2)")
    assert ", most in blocks 6-7: " in first
    assert "± " in first
    assert "(n = 3)" in first
    assert "standard deviations over seeds, p < 10⁻⁶ after correction for 21 comparisons." in first
    assert last.startswith("Of 21 comparisons ")
    better = [run(tmp_path, f"better-{n}", n, top1=75, opt="better") for n in range(6, 8)]
    first, *_ = of(*runs, *better)
    assert first.startswith("Best top-1 accuracy (%) is 1")
    assert "higher in better" in first


def test_two_runs_alone_name_the_planted_difference_and_that_no_spread_is_known(tmp_path: Path) -> None:
    first, *others = of(run(tmp_path, "a", 0), run(tmp_path, "b", 1, blocks=range(8), factor=0.5, lr=1))
    assert first.startswith("σ₁ of attn.proj is 2 times as large in a as in b: 1.988 (n = 1) against 0.9998 (n = 1);")
    assert "in blocks" not in first
    assert first.endswith("; one run each, so there is no spread over seeds to hold it against.")
    assert len(others) <= 2
    (same,) = of(run(tmp_path, "c", 0), run(tmp_path, "d", 0, lr=1))
    assert same == "No number that is compared differs by more than a hundredth between the runs."


def test_where_only_seeds_differ_nothing_is_claimed(tmp_path: Path) -> None:
    alike = [run(tmp_path, f"a-{n}", n) for n in range(3)]
    (one,) = of(*alike)
    assert one.startswith("The runs differ in their seeds alone, so no difference between them is claimed. Best top-1")
    same = [run(tmp_path, f"b-{n}", n, log_interval=7) for n in range(10, 13)]
    nothing, largest = of(*alike, *same)
    assert nothing.startswith("No difference is claimed: of 21 comparisons none is beyond what seeds alone make of it")
    assert largest.startswith("The largest one: ")
    with in_language("zh"):
        assert of(*alike, *same)[0] != nothing


def test_a_claim_is_wrong_no_more_often_than_it_says() -> None:
    """Of 400 comparisons of 20 numbers under two and three seeds, of one distribution."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(400):
        measures = [Measure(str(i), str(i), rng.normal(10, 1, 5).tolist(), float, str) for i in range(20)]
        found = differences(measures, [[0, 1], [2, 3, 4]])
        wrong += any(one.p * len(found) < LEVEL for one in found)
    assert wrong / 400 < 1.6 * LEVEL


def test_the_spread_is_pooled_and_numbers_that_are_not_there_are_left_out() -> None:
    nan = math.nan
    spread = Measure("a", "a", [1.0, 3.0, 11.0, nan], float, str)
    (one,) = differences([spread], [[0, 1], [2], [3]])
    assert (one.high, one.low, one.weight) == (1, 0, 9)
    assert one.deviations == pytest.approx(9 / math.sqrt(2))
    assert one.p == pytest.approx(0.121, abs=1e-3)  # t = 9 / (√2 · √(1/2 + 1)) of one degree of freedom
    (one,) = differences([Measure("a", "a", [2.0, 2.0, 5.0], float, str)], [[0, 1], [2]])
    assert (one.p, one.deviations) == (0, math.inf)
    assert differences([Measure("a", "a", [nan, 1.0], float, str)], [[0], [1]]) == []
    (one,) = differences([Measure("a", "a", [1.0, 2.0], float, str)], [[0], [1]])
    assert math.isnan(one.p)
