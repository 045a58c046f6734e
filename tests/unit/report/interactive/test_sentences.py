"""What the page says happened: the greatest change first, with the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.report.interactive.sentences import sentences
from lowrank_vit.report.read import read_run
from lowrank_vit.spectral.watching.files import write_spectra
from tests.reported import add_metrics, add_summary, train_line

TYPES = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
K = 24


def grown(share: float, factor: float) -> np.ndarray:
    """A spectrum whose values all grow by the share, and the first one by the factor as well."""
    s = np.linspace(2, 1, K) * (1 + 0.1 * share)
    s[0] *= factor**share
    return s


def planted(path: Path, factor_of: Callable[[str, int], float]) -> Path:
    path.mkdir()
    for update, share in ((0, 0.0), (100, 0.5), (200, 1.0)):
        spectra = {
            f"spec/blocks.{block}.{name}": grown(share, factor_of(name, block)) for block in range(12) for name in TYPES
        }
        (path / "spectra").mkdir(exist_ok=True)
        write_spectra(path / "spectra", update, spectra)
    return path


def test_the_first_sentence_names_the_difference_that_was_planted(tmp_path: Path) -> None:
    everywhere = planted(tmp_path / "a", lambda name, _: 3.1 / 1.1 if name == "attn.proj" else 1.0)
    late = planted(tmp_path / "b", lambda name, block: 4.0 if name == "mlp.fc1" and block >= 9 else 1.0)
    of_all, of_late = (sentences(read_run(path))[0] for path in (everywhere, late))
    assert of_all == "σ₁ of attn.proj grew 3.1 times in all 12 blocks (mean 2 → 6.2), from update 0 to 200."
    assert of_late == (
        "σ₁ of mlp.fc1 grew 1.1-4.4 times in all 12 blocks (mean 2 → 3.85), most in blocks 9-11 (4.4 times), "
        "from update 0 to 200."
    )


def test_each_type_is_named_once_and_the_training_comes_last(tmp_path: Path) -> None:
    run = planted(tmp_path / "a", lambda name, _: {"attn.proj": 0.2, "mlp.fc2": 1.8}.get(name, 1.0))
    add_summary(run)
    add_metrics(run)
    told = sentences(read_run(run))
    assert [any(kind in one for kind in TYPES) for one in told] == [True, True, False]
    assert "attn.proj" in told[0]
    assert "mlp.fc2" in told[1]
    assert told[2] == (
        "Top-1 of the model went from 10.00 % to 60.50 % (best: 61.25 % after epoch 2); "
        "top-1 of the EMA went from 11.00 % to 61.50 % (best: 62.25 % after epoch 2); "
        "the training loss went from 5 to 0.167 nats; 1.0 % of the time was spent waiting for data (median)."
    )


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([9.72], "Top-1 is 9.72 %, measured once"),
        ([9.5, 20.0], "Top-1 went from 9.50 % to 20.00 %, its best"),
        ([9.5, 30.0, 20.0], "Top-1 went from 9.50 % to 20.00 % (best: 30.00 % after epoch 2)"),
    ],
)
def test_a_best_score_is_told_where_it_is_another_than_the_last(tmp_path: Path, scores: list[float], said: str) -> None:
    lines = [f"{epoch},{epoch + 1},{top1}\n" for epoch, top1 in enumerate(scores)]
    (tmp_path / "summary.csv").write_text("epoch,update,eval_top1\n" + "".join(lines))
    assert sentences(read_run(tmp_path)) == [f"{said}."]


def test_a_loss_that_is_not_finite_comes_before_everything(tmp_path: Path) -> None:
    run = planted(tmp_path / "a", lambda *_: 9.0)
    (run / "metrics.jsonl").write_text("".join(train_line(u, None if u > 5 else 1.5) for u in range(1, 10)))
    assert sentences(read_run(run))[0] == "The training loss is not finite; the last finite one is 1.5 at update 5."


@pytest.mark.parametrize("scale", [0.0, float("nan")])
def test_weights_without_a_finite_or_positive_value_are_told_of_or_left_out(tmp_path: Path, scale: float) -> None:
    (tmp_path / "spectra").mkdir()
    for update in (0, 10):
        write_spectra(tmp_path / "spectra", update, {"spec/blocks.0.attn.proj": scale**update * np.linspace(2, 1, 4)})
    told = sentences(read_run(tmp_path))
    assert told == (
        ["Weights are not finite at update 10: 1 of 1 matrices, blocks.0.attn.proj first."] if scale else []
    )


def test_little_to_tell_gives_few_sentences(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text("model: vit\n")
    assert sentences(read_run(tmp_path)) == []
    add_metrics(tmp_path)
    assert len(sentences(read_run(tmp_path))) == 1
