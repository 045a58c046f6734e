"""What a page embeds: numbers that come back, bounds that hold, and doubts with their reasons."""

from __future__ import annotations

import base64
import gzip
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_vit.report.interactive import embed
from lowrank_vit.report.interactive.packing import Packer, embedded_json
from lowrank_vit.report.interactive.trust import Numbers, matrix_table
from lowrank_vit.report.read import Run, read_run
from lowrank_vit.report.style import browser_look, type_look
from tests.big_run import write_big_run
from tests.reported import fill


def inflated(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def unpacked(text: str) -> np.ndarray:
    """As the page's script does it."""
    return np.frombuffer(inflated(text), np.uint8).reshape(4, -1).T.copy().view("<f4").ravel()


def test_packed_numbers_come_back_with_four_digits_and_what_is_not_finite_stays_so() -> None:
    pack = Packer()
    values = np.concatenate(
        [np.random.default_rng(0).standard_normal(500) * 10.0 ** np.arange(-25, 25).repeat(10), [0]]
    )
    odd = np.array([np.nan, np.inf, -np.inf, 3.4e38, 1e300])
    places = [pack(values), pack(odd)]
    assert places == [{"$": [0, 501]}, {"$": [501, 5]}]
    back = unpacked(pack.embedded())
    np.testing.assert_allclose(back[:501], values, rtol=6.2e-5)
    assert np.isnan(back[501])
    assert back[502:].tolist() == [np.inf, -np.inf, pytest.approx(3.4e38), np.inf]


def test_json_has_no_word_for_what_is_not_finite() -> None:
    data = {"a": [np.float32(1.5), float("nan"), np.inf], "b": np.arange(2), "<": None}
    assert json.loads(inflated(embedded_json(data))) == {"a": [1.5, None, None], "b": [0, 1], "<": None}


def many(matrices: int, updates: int) -> Run:
    """A run with so many matrices, of which twenty numbers were logged."""
    rng = np.random.default_rng(0)
    names = [
        f"blocks.{i // 4}.{kind}" for i, kind in zip(range(matrices), ("q", "k", "v", "o") * matrices, strict=False)
    ]
    scalars = {
        f"spec/{name}/{metric}": rng.random(updates) for name in names for metric in ["sigma_max", *map(str, range(19))]
    }
    return Run(Path("x"), {}, {}, {}, {}, [], scalars | {"update": np.arange(updates) * 100.0})


@pytest.mark.parametrize("most", [embed.DATA_AT_MOST, 300_000])
def test_two_thousand_matrices_stay_within_the_bound_with_a_note(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "DATA_AT_MOST", most)
    texts, notes = embed.embedded(many(2000 if most > 1e6 else 300, 40))
    assert len(texts["json"]) + len(texts["numbers"]) <= most
    assert any("of 40 refreshes" in note for note in notes)


def test_pictures_that_are_too_large_together_are_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    from io import BytesIO

    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)).save(buffer, "PNG")
    assert inflated_png(embed.embedded_pictures({"a": buffer.getvalue()})["a"]) == buffer.getvalue()
    monkeypatch.setattr(embed, "PICTURES_AT_MOST", 50_000)
    assert len(embed.embedded_pictures({"a": buffer.getvalue()})["a"]) <= 50_000


def inflated_png(text: str) -> bytes:
    return base64.b64decode(text)


def table(values: dict[str, list[list[float]]], updates: int, shape: tuple[int, int] = (4, 8)) -> dict[str, Any]:
    names = [f"blocks.{i}.attn.proj" for i in range(len(next(iter(values.values()))))]
    numbers = Numbers(
        names, np.arange(updates) * 10, {"spec": {k: np.array(v, float) for k, v in values.items()}},
        dict.fromkeys(names, shape),
    )  # fmt: skip
    return matrix_table(numbers, {"spec": "model"}, list(values), {}, (), Packer())


def reasons(made: dict[str, Any], part: str, row: int, metric: int) -> str:
    return " ".join(made["reasons"][i] for i in made["doubts"][part].get(f"{row},{metric}", []))


NAN = float("nan")


def test_doubted_numbers_are_marked_with_the_reason() -> None:
    made = table(
        {
            "alpha": [[3, 3.1], [3, 5], [3, NAN], [NAN, NAN]],
            "alpha_ks": [[0.05, 0.05], [0.05, 0.2], [0.05, 0.05], [0, 0]],
            "alpha_tail": [[90, 90], [90, 90], [7, 7], [90, 90]],
            "alpha_sigma": [[0.3, 0.3], [0.3, 0.3], [0.3, 0.3], [0.3, 0.3]],
            "mp_outliers": [[1, 1]] * 4,
            "mp_ks": [[0.01, 0.01], [0.01, 0.3], [0.01, 0.01], [0.01, 0.01]],
            "block_cos_u_overlap": [[NAN, 0.5]] * 4,
            "block_gap": [[0.2, 0.2], [0.2, 0.001], [0.2, 0.001], [0.2, 0.2]],
            "turn_bound": [[NAN, 5], [NAN, NAN], [NAN, 0.5], [NAN, 5]],
            "sigma_max": [[1, 2], [1, 2], [NAN, 2], [1, 2]],
        },
        2,
    )
    assert reasons(made, "newest", 0, 0) == ""
    assert "smaller than the standard error" in reasons(made, "change", 0, 0)
    assert "no power law" in reasons(made, "newest", 1, 0)
    assert "fewer than 20" in reasons(made, "newest", 2, 0)
    assert "It is of update 0" in reasons(made, "newest", 2, 0)
    assert "not finite at any refresh" in reasons(made, "newest", 3, 0)
    assert ["edge and outliers" in reasons(made, "newest", row, 4) for row in range(4)] == [False, True, False, False]
    assert ["not well defined" in reasons(made, "newest", row, 6) for row in range(4)] == [False, True, False, False]
    assert ["since update 10" in reasons(made, "change", row, 9) for row in range(4)] == [False, False, True, False]
    assert reasons(made, "change", 0, 6) == ""  # at the first refresh there is nothing to compare with


def test_a_run_of_one_refresh_has_no_changes_and_a_square_matrix_no_condition() -> None:
    made = table({"condition": [[100.0]], "sigma_max": [[2.0]]}, 1, shape=(8, 8))
    assert "square" in reasons(made, "newest", 0, 0)
    assert made["doubts"]["change"] == {}


def test_each_type_has_a_colour_and_a_marker_of_its_own_in_every_report() -> None:
    kinds = ("attn.qkv.q", "attn.qkv.k", "attn.qkv.v", "attn.proj", "mlp.fc1", "mlp.fc2")
    for looks in ([type_look(kind) for kind in kinds], [tuple(browser_look(kind).values()) for kind in kinds]):
        for at in (0, 1):
            assert len({look[at] for look in looks}) == len(kinds)
    seen = [deuteranope(type_look(kind)[0]) for kind in kinds]
    nearest = min(float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[:i])
    assert nearest > 20  # of 255; and their markers differ beside that
    for background in ("#ffffff", "#1b242c"):
        assert min(contrast(type_look(kind)[0], background) for kind in kinds) > 2
    assert type_look("head") == type_look("head")


def contrast(color: str, background: str) -> float:
    """The ratio of luminances (WCAG), from 1 on."""
    low, high = sorted(
        float(np.dot([0.2126, 0.7152, 0.0722], [(int(one[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)])) + 0.05
        for one in (color, background)
    )
    return high / low


def deuteranope(color: str) -> np.ndarray:
    """What is left of a colour without green cones (Machado, Oliveira & Fernandes 2009, severity 1), 0-255."""
    linear = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]) ** 2.2
    seen = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]) @ linear
    return 255 * np.clip(seen, 0, 1) ** (1 / 2.2)


def test_every_number_of_a_run_is_in_its_page(tmp_path: Path) -> None:
    texts, notes = embed.embedded(read_run(fill(tmp_path)))
    data, numbers = json.loads(inflated(texts["json"])), unpacked(texts["numbers"])
    content = data["matrices"]
    place, count = content["values"]["spec"]["sigma_max"]["$"]
    np.testing.assert_array_equal(numbers[place : place + count].reshape(12, 3), [[1, 2, 3]] * 12)
    assert [one["id"] for one in data["figures"]] == ["training", "vectors"]
    assert len(content["bulk"]) == 24
    assert notes == [
        "This page holds 9 of the logged numbers of each matrix; other numbers, and means by type and by depth, "
        "are left out."
    ]


def test_what_regularisers_have_done_is_drawn_beside_the_loss() -> None:
    columns = {
        "update": np.arange(5.0),
        "loss": np.ones(5),
        "nuclear_norm": np.arange(5.0),
        "clipped_values": np.ones(5),
    }
    data = json.loads(inflated(embed.embedded(Run(Path("x"), {}, columns, {}, {}, []))[0]["json"]))
    (training,) = data["figures"]
    titles = [one["title"] for one in training["views"]["all"]]
    assert titles == ["Loss", "Nuclear norm of the regularised matrices", "Clipped singular values"]


@pytest.mark.slow
def test_a_report_of_a_long_run_takes_less_than_a_minute_and_1_5_gb(tmp_path: Path) -> None:
    run = write_big_run(tmp_path / "big")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "lowrank_vit.report", str(run)], check=True, env=os.environ)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert cpu_s < 60  # of a process that uses one core: its time on a machine with nothing else to do
    assert after.ru_maxrss < 1.5e6, "KiB of this process's largest child"
    assert (run / "report.html").stat().st_size < 6e6
