"""What a comparison says at its top: the planted difference first, and nothing where seeds alone differ."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind

from lowrank_vit.report.compare.differences import LEVEL, Measure, differences, sentences
from lowrank_vit.report.compare.extract import Numbers
from lowrank_vit.report.compare.groups import Compared, Group, read_compared
from lowrank_vit.report.language import in_language
from lowrank_vit.report.read import Run
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
    first, *_, last = of(*runs, *planted)
    assert first.startswith("σ₁ of attn.proj is 1.8 times as large in muon (seeds 3-5) as in adamw (seeds 0-2)")
    assert ", most in blocks 6-7: " in first
    assert "± " in first
    assert "(n = 3)" in first
    assert "standard deviations over seeds, p < 10⁻⁶ after correction (× 21)." in first
    assert last.startswith("Proven differences (beyond the spread over seeds, p < 0.05 after")
    assert "correction): 0 of" not in last
    better = [run(tmp_path, f"better-{n}", n, top1=75, opt="better") for n in range(6, 8)]
    first, *_ = of(*runs, *better)
    assert first.startswith("Best top-1 accuracy (%) is 1")
    assert "higher in better" in first


def test_two_runs_alone_name_the_planted_difference_and_that_no_spread_is_known(tmp_path: Path) -> None:
    first, *others = of(run(tmp_path, "a", 0), run(tmp_path, "b", 1, blocks=range(8), factor=0.5, lr=1))
    assert first.startswith("σ₁ of attn.proj is 2 times as large in a as in b: 1.988 (n = 1) against 0.9998 (n = 1);")
    assert "in blocks" not in first
    assert first.endswith("; one run each, so the spread over seeds is not known.")
    assert len(others) <= 2
    (same,) = of(run(tmp_path, "c", 0), run(tmp_path, "d", 0, lr=1))
    assert same == "No compared number differs by more than 1 % between the runs."


def test_where_only_seeds_differ_nothing_is_claimed(tmp_path: Path) -> None:
    alike = [run(tmp_path, f"a-{n}", n) for n in range(3)]
    (one,) = of(*alike)
    assert one.startswith("The runs differ in their seeds alone, so no difference between them is claimed. Best top-1")
    same = [run(tmp_path, f"b-{n}", n, log_interval=7) for n in range(10, 13)]
    nothing, largest = of(*alike, *same)
    assert nothing.startswith("Proven differences (beyond the spread over seeds")
    assert nothing.endswith("): 0 of 21.")
    assert largest.startswith("The largest one: ")
    with in_language("zh"):
        assert of(*alike, *same)[0] != nothing


SIZES = [(2, 3), (2, 2, 2), (8, 1), (8, 2)]


def of_sizes(sizes: Sequence[int]) -> list[list[int]]:
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(
    "of", ["normal", "count of one matrix", "mean count of four", "rare", "rounded", "few", "skewed", "long tail"]
)
def test_a_claim_is_wrong_no_more_often_than_it_says(of: str, sizes: tuple[int, ...]) -> None:
    """Of 100 comparisons of 20 numbers under seeds alone, also of counts, which are often equal, and of skewed ones."""
    rng, wrong, groups, runs = np.random.default_rng(0), 0, of_sizes(sizes), sum(sizes)
    draw: Callable[[], np.ndarray] = {
        "normal": lambda: rng.normal(10, 1, runs),
        "count of one matrix": lambda: rng.poisson(2, runs),
        "mean count of four": lambda: rng.poisson(20, runs) / 4,
        "rare": lambda: 5.0 * (rng.random(runs) < 0.05),
        "rounded": lambda: np.round(rng.normal(5, 0.4, runs)),
        "few": lambda: rng.poisson(0.3, runs),
        "skewed": lambda: rng.geometric(0.4, runs),
        "long tail": lambda: rng.lognormal(0, 0.5, runs),
    }[of]
    for _ in range(100):
        measures = [Measure(str(i), str(i), draw().astype(float).tolist(), float, str) for i in range(20)]
        found = differences(measures, groups)
        wrong += any(one.p * len(found) < LEVEL for one in found)
    assert wrong / 100 < LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / 100)  # three standard deviations of such a share


@pytest.mark.parametrize("sizes", [(2, 3), (8, 2), (4, 4), (3, 3)], ids=str)
def test_a_large_difference_is_proven_from_two_runs_of_each_group_on(sizes: tuple[int, int]) -> None:
    rng, groups = np.random.default_rng(0), of_sizes(sizes)
    values = rng.normal(10, 0.01, sum(sizes))
    values[groups[1]] += 10
    (one,) = differences([Measure("a", "a", values.tolist(), float, str)], groups)
    assert one.p * 20 < LEVEL
    (alone,) = differences([Measure("a", "a", values.tolist(), float, str)], [groups[0], groups[1][:1]])
    assert math.isnan(alone.p)
    assert alone.deviations > 100


def compared(measured: Sequence[tuple[str, Sequence[float]]], groups: Sequence[Sequence[int]]) -> list[str]:
    """What is said of such numbers of matrices alone."""
    runs = [Run(Path(str(i)), {}, {}, {}, {}, []) for i in range(sum(map(len, groups)))]
    numbers = [
        Numbers(
            np.zeros(1, np.int64),
            {
                ("spec", metric): {"blocks.0.mlp.fc1": np.array([values[i]])}
                for metric, values in [("sigma_max", [1.0] * len(runs)), *measured]
            },
            {},
            0,
        )
        for i in range(len(runs))
    ]
    names = [Group("abc"[place], list(at), place) for place, at in enumerate(groups)]
    return sentences(Compared(runs, [str(i) for i in range(len(runs))], names, numbers))


def test_seeds_that_coincide_prove_nothing_and_large_differences_are_told_as_not_proven() -> None:
    proven, first = compared([("mp_outliers", [5.25, 5.25, 0.75])], [[0, 1], [2]])
    assert proven.endswith("): 0 of 2.")
    assert first == (
        "Not proven: count of values beyond the noise edge of mlp.fc1 is 4.5 higher in a than in b: 5.25 ± 0 (n = 2) "
        "against 0.75 (n = 1); its seeds have equal values, so their spread is not known: add seeds."
    )
    proven, first = compared([("alpha", [10.0, 10.5, 2.0])], [[0, 1], [2]])
    assert proven.endswith("): 0 of 2.")
    assert first.startswith(
        "Not proven: power-law exponent α of mlp.fc1 is 5.1 times as large in a as in b: 10.25 ± 0."
    )
    assert first.endswith(
        "23 standard deviations over seeds, but a single run proves no difference; "
        "2 runs of each group would prove it if difference and spread stay."
    )
    *_, last = compared([("alpha", [10.0, 10.5, 7.0, 4.0])], [[0, 1], [2, 3]])
    assert "standard deviations over seeds, p = 0.2 after" in last
    assert last.endswith(" after correction (× 2); 3 runs of each group would prove it if difference and spread stay.")
    _, first = compared([("alpha", [300.0, 320.0, 2.0])], [[0, 1], [2]])
    assert " is 155 times as large in a as in b: 310 ±" in first
    assert "e+" not in first
    nan = math.nan
    _, first = compared([("alpha", [9.0, nan, 2.0])], [[0, 1], [2]])
    assert "9 (n = 1) against 2 (n = 1); no group has two runs with this number" in first
    _, first = compared([("alpha", [3.0, 3.3, 2.1])], [[0, 1], [2]])
    assert first.startswith("Not proven: power-law exponent α of mlp.fc1 is 1.5 times as large")
    _, first = compared([("alpha", [3.0, 3.3, 2.9])], [[0, 1], [2]])
    assert first.startswith("The largest one: power-law exponent α")
    with in_language("zh"):
        proven, first = compared([("mp_outliers", [5.25, 5.25, 0.75])], [[0, 1], [2]])
    assert "2 次比较中有 0 个" in proven
    assert first.startswith(
        "未证实：mlp.fc1 的超出噪声边缘的奇异值个数：a 比 b 高 4.5：5.25 ± 0（n = 2）对 0.75（n = 1）；"
    )


def test_a_score_is_told_beside_larger_differences_of_matrices(tmp_path: Path) -> None:
    runs = [run(tmp_path, f"a-{n}", n, top1=50) for n in range(2)]
    other = run(tmp_path, "b", 2, top1=30, lr=1)
    for place in (*runs, other):
        for update in (0, 30):
            factor = 9 if place == other else 1
            spectra = {f"spec/blocks.0.{kind}": factor * np.geomspace(2, 0.1, 12) for kind in KINDS}
            write_spectra(place / "spectra", update, spectra)
    found = of(*runs, other)
    assert sum(" of attn.qkv is " in one or " of attn.proj is " in one for one in found) == 2
    assert any("est top-1 accuracy (%) is" in one and "higher in a (seeds 0, 1) than in b" in one for one in found)


@pytest.mark.parametrize(
    ("factors", "where"),
    [
        ([1, 1, 1, 1, 1, 3, 1, 1], "block 5"),
        ([3, 3, 1, 1, 1, 1, 1, 3], "blocks 0-1, 7"),
        ([3, 3, 3, 3, 3, 1, 1, 1], ""),
        ([3, 2.5, 2, 1.7, 1.4, 1.2, 1.1, 1], ""),
        ([4, 1, 1, 1, 1, 1, 1, 0.3], ""),
        ([2] * 8, ""),
    ],
)
def test_blocks_are_named_where_each_differs_far_more_than_every_other(
    tmp_path: Path, factors: list[float], where: str
) -> None:
    a, b = run(tmp_path, "a", 0), run(tmp_path, "b", 0, lr=1)
    for place in (a, b):
        scaled = factors if place == b else [1.0] * 8
        spectra = {f"spec/blocks.{i}.attn.proj": by * np.geomspace(2, 0.1, 12) for i, by in enumerate(scaled)}
        write_spectra(place / "spectra", 30, spectra)
    said = next(one for one in of(a, b) if one.startswith("σ₁ of attn.proj"))
    assert said.partition(" in b as in a")[2].partition(":")[0] == (f", most in {where}" if where else "")


def test_the_spread_is_pooled_and_numbers_that_are_not_there_are_left_out() -> None:
    nan = math.nan
    spread = Measure("a", "a", [1.0, 3.0, 11.0, nan], float, str)
    (one,) = differences([spread], [[0, 1], [2], [3]])
    assert (one.high, one.low, one.weight) == (1, 0, 9)
    assert one.deviations == pytest.approx(9 / math.sqrt(2))
    assert math.isnan(one.p)
    equal = [1.0, 3.0, 4.0, 9.0, 11.0, 13.0]
    (one,) = differences([Measure("a", "a", equal, float, str)], of_sizes([3, 3]))
    _, expected = ttest_ind(equal[:3], equal[3:])
    assert one.p == pytest.approx(expected)
    (other,) = differences([Measure("a", "a", [*equal, 11.0], float, str)], of_sizes([3, 4]))
    _, expected = ttest_ind(equal[:3], [*equal[3:], 11.0])
    assert other.p > float(expected)  # type: ignore[arg-type]  # it has fewer degrees of freedom
    for same in ([2.0, 2.0, 5.0], [0.3, 0.1 + 0.2, 5.0], [0.0, 0.0, 5.0]):
        (one,) = differences([Measure("a", "a", same, float, str)], [[0, 1], [2]])
        assert (one.spread, one.freedom, math.isnan(one.p), math.isnan(one.deviations)) == (0, 1, True, True)
    assert differences([Measure("a", "a", [nan, 1.0], float, str)], [[0], [1]]) == []
    (one,) = differences([Measure("a", "a", [1.0, 2.0], float, str)], [[0], [1]])
    assert math.isnan(one.p)
