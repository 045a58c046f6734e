"""Layers that are settled are those with directions above noise that stay the same, and no others."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import pays
from lowrank_vit.lowrank.switching.settled import Rule
from lowrank_vit.lowrank.switching.verdict import GAIN, NOTHING, Settling, Shares, margin
from tests.device_path import CudaPath

LOOKS = 30
SHAPES = {"square": (48, 48), "tall": (96, 32), "qkv": (96, 32)}
RULES: list[tuple[Rule, float]] = [("mp", 0.9), ("energy", 0.5), ("energy", 0.9), ("kfac", 0.9)]


def normal(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def noise(name: str, seed: int) -> Tensor:
    """Of the quickstart's size of entries; a qkv's thirds have three scales."""
    matrix = 0.02 * normal(SHAPES[name], seed)
    if name == "qkv":
        matrix[:32] *= 3
        matrix[64:] *= 0.5
    return matrix


def planted(shape: tuple[int, int], rank: int, share: float, seed: int, noise_seed: int) -> Tensor:
    """A product of normal factors that holds this share of the energy, over noise."""
    signal = normal((shape[0], rank), seed) @ normal((rank, shape[1]), seed + 1)
    rest = normal(shape, noise_seed)
    return signal * (share / signal.square().sum()).sqrt() + rest * ((1 - share) / rest.square().sum()).sqrt()


def watch(looks: Iterator[dict[str, Tensor]], rule: Rule, energy: float = 0.9, times: int = 3) -> list[Settling]:
    """The same one after every look, as it was then."""
    settling, seen = Settling(rule, energy=energy, times=times, fused=["qkv"]), list[Settling]()
    for update, weights in enumerate(looks):
        ranks = {name: max(pays(*matrix.shape) // 2, 1) for name, matrix in weights.items()}
        settling.see(update, weights, ranks=ranks)
        copy = Settling(rule, energy=energy, times=times, fused=["qkv"])
        copy.load_state_dict(settling.state_dict())
        seen.append(copy)
    return seen


def settled(settling: Settling) -> set[str]:
    return {name for name, verdict in settling.verdicts().items() if verdict.settled}


def unchanging(look: int) -> dict[str, Tensor]:
    return {name: noise(name, seed) for seed, name in enumerate(SHAPES)}


def redrawn(look: int) -> dict[str, Tensor]:
    return {name: noise(name, 100 * look + seed) for seed, name in enumerate(SHAPES)}


def drifting(look: int) -> dict[str, Tensor]:
    """Turned by a tenth between two looks, and of constant size."""
    angle = 0.1 * look
    return {
        name: np.cos(angle) * noise(name, seed) + np.sin(angle) * noise(name, 50 + seed)
        for seed, name in enumerate(SHAPES)
    }


@pytest.mark.parametrize("weights", [unchanging, redrawn, drifting])
@pytest.mark.parametrize(("rule", "energy"), RULES)
def test_no_layer_of_pure_noise_settles_in_thirty_looks(
    weights: Callable[[int], dict[str, Tensor]], rule: Rule, energy: float
) -> None:
    looks = LOOKS if weights is not unchanging else 6  # nothing changes after the fourth
    for after in watch((weights(look) for look in range(looks)), rule, energy):
        assert settled(after) == set()


@pytest.mark.slow
@pytest.mark.parametrize("lr", [0.0, 1e-5])
def test_no_layer_of_the_quickstarts_model_settles_while_its_weights_are_noise(lr: float) -> None:
    """Thirty epochs of AdamW on noise and labels at random, at rates that leave the weights what they were drawn as."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16,
        patch_size=4,
        embed_dim=96,
        depth=4,
        num_heads=3,
        num_classes=10,
        class_token=False,
        global_pool="avg",
    )
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and "blocks" in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    rules: list[tuple[Rule, float]] = [*RULES[:-1], ("energy", 0.8), ("energy", 0.95)]
    all_of = [Settling(rule, energy=energy, fused=[n for n in layers if "qkv" in n]) for rule, energy in rules]
    for epoch in range(LOOKS):
        for _ in range(5):
            logits: Tensor = model(torch.randn(32, 3, 16, 16))
            functional.cross_entropy(logits, torch.randint(0, 10, (32,))).backward()
            optimizer.step()
            optimizer.zero_grad()
        for settling in all_of:
            settling.see(epoch, {name: layer.weight for name, layer in layers.items()})
            assert settled(settling) == set()


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(("rule", "energy", "share"), [("mp", 0.9, 0.7), ("energy", 0.8, 0.9), ("energy", 0.5, 0.7)])
def test_planted_directions_settle_after_as_many_looks_as_asked_for_and_one(
    rule: Rule, energy: float, share: float, times: int
) -> None:
    """Though all that is around them is new at every look."""
    looks = ({"w": planted((96, 48), 6, share, 0, 10 + look)} for look in range(times + 1))
    seen = watch(looks, rule, energy, times)
    assert [settled(after) for after in seen] == [set()] * times + [{"w"}]
    verdict = seen[-1].verdicts()["w"]
    assert 1 <= verdict.rank <= 7
    assert verdict.streak == times
    assert verdict.energy > 0.75 > 0.3 > verdict.energy_of_chance
    assert verdict.cosine > 0.8 > 0.5 > verdict.chance
    assert verdict.above_noise > 0.5
    assert 0 < verdict.certificate < 1e-12


def test_a_slow_turn_does_not_settle_though_neighbours_are_alike() -> None:
    shape, settling = (64, 48), Settling("kfac", times=3)
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((n, 8)))[0] for s, n in enumerate(shape))
    for update in range(12):
        cos, sin = np.cos(0.25 * update), np.sin(0.25 * update)  # cos(0.25) squared is 0.94, cos(0.5) squared 0.77
        u, v = (cos * side[:, :4] + sin * side[:, 4:] for side in (left, right))
        settling.see(update, {"w": torch.from_numpy(u @ v.T) + 1e-3 * normal(shape, 9)}, ranks={"w": 4})
        assert settling.verdicts()["w"].streak <= 2


def test_a_streak_is_gained_above_one_threshold_and_lost_below_another() -> None:
    """A share of the planted directions is replaced: none, few, more, none of the first."""
    shape, rank = (80, 60), 20
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((n, 40)))[0] for s, n in enumerate(shape))

    def with_replaced(count: int) -> dict[str, Tensor]:
        chosen = np.r_[count : rank + count]
        return {"w": torch.from_numpy(left[:, chosen] @ right[:, chosen].T) + 1e-3 * normal(shape, 5)}

    settling = Settling("kfac", times=2)
    streaks: list[tuple[int, bool]] = []
    for update, count in enumerate([0, 1, 1, 5, 5, 1, 12, 12]):  # 5 of 20: shares of 0.63 and 0.73
        settling.see(update, with_replaced(count), ranks={"w": rank})
        verdict = settling.verdicts()["w"]
        streaks.append((verdict.streak, verdict.settled))
    assert streaks == [(0, False), (1, False), (2, True), (2, True), (2, True), (3, True), (0, False), (1, False)]


def test_thresholds_say_what_counts_as_the_same() -> None:
    """Of twenty directions five are replaced: shares of 0.63 and 0.73, which the usual thresholds leave undecided."""
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((n, 40)))[0] for s, n in enumerate((80, 60)))
    kinds = {"strict": Shares(0.8, 0.9, 0.2), "usual": GAIN, "lax": Shares(0.5, 0.5, 0.2), "noisy": Shares(0.5, 0.5, 1)}
    found: dict[str, int] = {}
    for kind, gain in kinds.items():
        settling = Settling("kfac", times=2, gain=gain)
        for update, first in enumerate([0, 0, 5]):
            chosen = np.r_[first : 20 + first]
            weights = torch.from_numpy(left[:, chosen] @ right[:, chosen].T) + 1e-3 * normal((80, 60), 5)
            settling.see(update, {"w": weights}, ranks={"w": 20})
        found[kind] = settling.verdicts()["w"].streak
    assert found == {"strict": 0, "usual": 1, "lax": 2, "noisy": 0}


def test_a_state_of_other_constants_is_refused_and_one_without_any_is_taken() -> None:
    state = Settling("mp").state_dict()
    with pytest.raises(UserError, match=r"small was 5.0, now 4.0\. Resume it with that version"):
        Settling("mp").load_state_dict({**state, "constants": {**state["constants"], "small": 5.0}})
    del state["constants"]
    Settling("mp").load_state_dict(state)


def test_without_a_gap_at_the_rank_energy_alone_decides() -> None:
    """Twenty equal values, as spectral clipping makes them: which ten of their directions come first is rounding's."""
    left, right = (np.linalg.qr(np.random.default_rng(s).standard_normal((n, 20)))[0] for s, n in enumerate((160, 120)))
    settling = Settling("kfac", times=2)
    for update in range(3):
        weights = torch.from_numpy(left @ right.T).float() * (1 + 1e-7 * normal((160, 120), update))
        settling.see(update, {"w": weights}, ranks={"w": 10})
    verdict = settling.verdicts()["w"]
    assert verdict.cosine < 0.8  # not enough where there is a gap
    assert verdict.settled


def test_a_rank_that_moves_far_begins_anew() -> None:
    weights = {"w": planted((96, 96), 24, 0.9, 0, 1)}
    settling = Settling("kfac", times=9)
    streaks: list[int] = []
    for update, rank in enumerate([20, 20, 22, 16, 15, 15, 18]):
        settling.see(update, weights, ranks={"w": rank})
        streaks.append(settling.verdicts()["w"].streak)
    assert streaks == [0, 1, 2, 3, 0, 1, 0]
    assert [margin(r) for r in (1, 2, 8, 16, 80)] == [1, 2, 2, 2, 10]


@pytest.mark.parametrize("rank", [24, 100])
def test_a_layer_whose_rank_saves_nothing_never_settles(rank: int) -> None:
    weights = {"w": planted((48, 48), 40, 0.99, 0, 1)}
    settling = Settling("kfac", times=1)
    for update in range(4):
        settling.see(update, weights, ranks={"w": rank})
    assert settling.verdicts()["w"] == NOTHING
    assert not settling.state_dict()["layers"]["w"].keys() & {"left", "right"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_weights_that_are_not_finite_or_zero_end_a_streak(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    good = planted((48, 32), 4, 0.9, 0, 1)
    broken = good.clone()
    broken[3, 4] = bad
    settling = Settling("energy", energy=0.8, times=1)
    for update, matrix in enumerate([good, good, broken if bad else 0 * good, good]):
        settling.see(update, {"w": matrix})
        assert settled(settling) == ({"w"} if update == 1 else set())


def test_a_layer_in_factors_only_shrinks() -> None:
    """Of its own noise nothing is left out, of what is planted in its factors everything is kept."""
    of_noise = normal((96, 12), 0) @ normal((12, 48), 1) / 96
    u, s, vh = torch.linalg.svd(normal((96, 48), 2), full_matrices=False)
    truncated_noise = (u[:, :12] * s[:12]) @ vh[:12]
    falling = (u[:, :12] * torch.tensor([9.0] * 3 + [0.3] * 9)) @ vh[:12]
    weights = {"product": of_noise, "truncated": truncated_noise, "falling": falling}
    cases: list[tuple[Rule, float]] = [("energy", 0.5), ("energy", 0.9), ("energy", 0.999), ("mp", 0.9)]
    for rule, energy in cases:
        settling = Settling(rule, energy=energy, times=1)
        for update in range(3):
            settling.see(update, weights, in_factors=dict.fromkeys(weights, 12))
        assert settled(settling) == ({"falling"} if rule == "energy" else set())
        assert all(verdict.rank < 12 for verdict in settling.verdicts().values())


def test_a_state_goes_on_with_the_same_bits_and_is_read_with_weights_only() -> None:
    looks = [{"w": planted((96, 48), 6, 0.7, 0, 10 + look), "n": noise("tall", 3)} for look in range(5)]
    whole, first = (Settling("energy", energy=0.8) for _ in range(2))
    for update, weights in enumerate(looks):
        whole.see(update, weights)
        if update < 3:
            first.see(update, weights)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Settling("energy", energy=0.8)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.verdicts() == first.verdicts()
    for update in (2, 3, 4):  # what was seen before the state was made counts once
        second.see(update, looks[update])
    assert second.verdicts() == whole.verdicts()
    for name, layer in whole.state_dict()["layers"].items():
        for key in layer.keys() & {"left", "right"}:
            assert torch.equal(layer[key], second.state_dict()["layers"][name][key])
            assert layer[key].dtype == torch.float32


def test_bits_depend_on_no_generator_no_thread_and_no_neighbour_and_generators_are_not_touched() -> None:
    weights = {"w": planted((96, 48), 6, 0.7, 0, 1), "n": noise("square", 3)}
    expected = Settling("mp")
    expected.see(1, weights)
    torch.manual_seed(5)
    np.random.seed(5)
    states, threads = (torch.get_rng_state(), str(np.random.get_state())), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        found = Settling("mp")
        found.see(1, {"w": weights["w"].clone()})
    finally:
        torch.set_num_threads(threads)
    assert found.verdicts()["w"] == expected.verdicts()["w"]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == str(np.random.get_state())


def test_a_gpus_way_comes_to_the_same_verdicts(on_cuda_path: CudaPath) -> None:
    looks = [{"w": 0.3 * planted((96, 48), 6, 0.7, 0, look), "n": noise("tall", 3)} for look in range(4)]
    by_cpu = watch(iter(looks), "mp", times=2)[-1].verdicts()
    with on_cuda_path():
        by_gpu = watch(iter(looks), "mp", times=2)[-1].verdicts()
    for name, one in by_cpu.items():
        assert (by_gpu[name].rank, by_gpu[name].settled, by_gpu[name].streak) == (one.rank, one.settled, one.streak)
        assert by_gpu[name].energy == pytest.approx(one.energy, abs=1e-6)
        assert by_gpu[name].above_noise == pytest.approx(one.above_noise, abs=1e-6)


@settings(max_examples=25)
@given(
    st.tuples(st.integers(2, 40), st.integers(2, 40)),
    st.integers(0, 2**16),
    st.sampled_from(RULES),
    st.floats(0.0, 0.99),
)
def test_numbers_of_any_weights_stay_in_their_range(
    shape: tuple[int, int], seed: int, rule: tuple[Rule, float], share: float
) -> None:
    settling = Settling(rule[0], energy=rule[1], times=1)
    for update in range(2):
        settling.see(update, {"w": planted(shape, 2, share, seed, seed + update)}, ranks={"w": 1})
    (verdict,) = settling.verdicts().values()
    assert 0 <= verdict.rank <= pays(*shape)
    assert 0 <= verdict.energy <= 1
    assert 0 <= verdict.cosine <= 1
    assert verdict.above_noise <= 1
    assert verdict.settled == (verdict.streak >= 1)
