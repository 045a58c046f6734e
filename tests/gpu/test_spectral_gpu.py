"""The solver and the monitor on a CUDA device."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim.muon import Muon
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_vit.spectral.analyze import analyze_weights, compare
from lowrank_vit.spectral.flows import measure
from lowrank_vit.spectral.heads import circuits_of_state
from lowrank_vit.spectral.layers import targets_of_model
from lowrank_vit.spectral.measures.updates import update_norms
from lowrank_vit.spectral.select import DEFAULT_TARGETS, select_targets
from lowrank_vit.spectral.solving.ends import solve_ends
from lowrank_vit.spectral.solving.extremes import Solved
from lowrank_vit.spectral.solving.norm import BRACKET, spectral_norms
from lowrank_vit.spectral.solving.solve import MatrixStack, solve, solve_stack, stack_by_shape
from lowrank_vit.spectral.watching import files
from lowrank_vit.spectral.watching import refresh as refresh_module
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import Memory, SpectralSettings, refresh
from lowrank_vit.spectral.watching.watched import directions_of
from tests.spectra import sine, with_spectrum
from tests.waiting import LONG_S

pytestmark = pytest.mark.gpu


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Holds the worker back until set."""
    gate = threading.Event()

    def held(stack: MatrixStack, *args: Any, **more: Any) -> dict[str, Solved]:
        assert gate.wait(LONG_S)
        return solve_stack(stack, *args, **more)

    monkeypatch.setattr(refresh_module, "solve_stack", held)
    yield gate
    gate.set()


def small_vit() -> VisionTransformer:
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=192, depth=3, num_heads=3, num_classes=10)
    return vit.to("cuda")


def watch(
    model: VisionTransformer, store_dir: Path, every: int = 1, on_cpu: bool = False, **more: Any
) -> SpectralMonitor:
    settings = SpectralSettings(topk=4, on_cpu=on_cpu)
    return SpectralMonitor(
        model, model, targets=DEFAULT_TARGETS, every=every, settings=settings, store_dir=store_dir, **more
    )


def targets(model: VisionTransformer) -> dict[str, torch.Tensor]:
    return select_targets(dict(model.named_parameters()), DEFAULT_TARGETS)


@pytest.mark.parametrize("shape", [(576, 192), (192, 768), (192, 192), (2304, 768)])
def test_values_and_vectors_agree_with_the_cpu_twin(shape: tuple[int, int]) -> None:
    weights = {f"m{i}": torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02 for i in range(4)}
    solved = solve({name: w.cuda() for name, w in weights.items()}, 8)
    for name, expected in solve(weights, 8, "svd").items():
        found = solved[name]
        tolerance = 1e-12 + 16 * np.finfo(np.float64).eps * (expected.s[0] / expected.s) ** 2
        assert (np.abs(found.s / expected.s - 1) <= tolerance).all()
        for end, true in ((found.top, expected.top), (found.last, expected.last)):
            assert (np.abs(end.s - true.s) <= end.certificate + true.certificate).all()
            assert sine(end.u, true.u) <= 1e-6
            assert sine(end.v, true.v) <= 1e-6


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e7])
def test_ill_conditioned_matrices_are_right_or_fall_back(condition: float) -> None:
    s = np.geomspace(1, 1 / condition, 128)
    found = solve({"m": with_spectrum(s, 192, 128).cuda()}, 8)["m"]
    assert np.abs(found.top.s / s[:8] - 1).max() <= 1e-12
    assert np.abs(found.last.s / s[::-1][:8] - 1).max() <= 1e-6


@pytest.mark.parametrize("shape", [(100, 60), (400, 300), (300, 700)])
def test_sigma_1_alone_agrees_with_the_cpu(shape: tuple[int, int]) -> None:
    """Also of a short side that is long enough for Lanczos steps, and of a stack that has to be scaled."""
    stack = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    stack[1] *= 1e-20
    stack[2] = torch.outer(stack[2, :, 0], stack[2, 0])
    stack[3] = 0
    for matrices in (stack, stack * torch.tensor([1.0, 1e-15, 1.0, 1.0]).view(4, 1, 1)):
        found, expected = spectral_norms(matrices.cuda()), spectral_norms(matrices)
        np.testing.assert_allclose(found.value, expected.value, rtol=1e-7)
        for one in (found, expected):
            assert (one.low <= found.value).all()
            assert (found.value <= one.high).all()
            assert (one.high <= one.low * (1 + BRACKET)).all()


@pytest.mark.parametrize("factors", [(0.7, 3.0, 1e-5), (0.011, 1e-40, 0.3), (0.3, torch.nan, 0.9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_update_norms_agree_with_the_cpus(factors: tuple[float, ...], dtype: torch.dtype) -> None:
    """Changes whose scale is no power of two; also beside one that is tiny or not finite, so that all are divided.

    Against numpy's norms, too, lest both ways be wrong alike.
    """
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(3, 96, 64, generator=generator, dtype=torch.float64).mul(0.02).to(dtype)
    change = torch.randn(3, 96, 64, generator=generator, dtype=torch.float64) * torch.tensor(factors).view(3, 1, 1)
    now = (before.double() + change).to(dtype)
    names = ("a", "b", "c")
    expected = update_norms(MatrixStack(names, before), MatrixStack(names, now))
    found = update_norms(MatrixStack(names, before.cuda()), MatrixStack(names, now.cuda()))
    for name, old, new in zip(names, before.double().numpy(), now.double().numpy(), strict=True):
        assert found[name] == pytest.approx(expected[name], rel=1e-10, nan_ok=True)
        if np.isfinite(new).all():
            assert found[name]["update_norm2"] == pytest.approx(np.linalg.norm(new - old, 2), rel=1e-12)


def test_tf32_and_autocast_do_not_touch_the_bits() -> None:
    weights = {"m": torch.randn(256, 192, generator=torch.Generator().manual_seed(0)).cuda()}
    expected = solve(weights, 4)["m"]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            actual = solve(weights, 4)["m"]
    finally:
        torch.set_float32_matmul_precision(before)
    np.testing.assert_array_equal(actual.s, expected.s)
    np.testing.assert_array_equal(actual.top.u, expected.top.u)


def test_a_nan_matrix_does_not_harm_its_batch() -> None:
    weights = {f"m{i}": torch.randn(64, 48, generator=torch.Generator().manual_seed(i)).cuda() for i in range(3)}
    weights["m1"][5, 7] = torch.nan
    solved = solve(weights, 4)
    assert np.isnan(solved["m1"].s).all()
    for name in ("m0", "m2"):
        expected = solve({name: weights[name]}, 4, "svd")[name]
        np.testing.assert_allclose(solved[name].s, expected.s, rtol=1e-9)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_stored_spectra_equal_an_offline_computation_on_the_same_device(tmp_path: Path, on_cpu: bool) -> None:
    model = small_vit()
    weights = {name: w.cpu() if on_cpu else w for name, w in targets(model).items()}
    expected = analyze_weights(weights, SpectralSettings(topk=4)).solved
    with watch(model, tmp_path, on_cpu=on_cpu) as monitor:
        monitor.observe(0)
    stored = files.read_spectra(tmp_path / "update_00000000.npz").spectra
    for name, one in expected.items():
        np.testing.assert_array_equal(stored[f"spec/{name}"], one.s)
        np.testing.assert_array_equal(stored[f"spec_ema/{name}"], one.s)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_circuits_have_the_bits_of_a_cpu(tmp_path: Path, on_cpu: bool) -> None:
    """They are computed on the host, from copies of the weights."""
    model = small_vit()
    with watch(model, tmp_path, on_cpu=on_cpu, circuits="folded") as monitor:
        monitor.observe(0)
    _, found, _ = files.read_newest_circuits(tmp_path)
    for block, one in circuits_of_state(model.cpu(), model.state_dict(), "folded", "").items():
        assert all(np.array_equal(x, y) for x, y in zip(found[f"spec/circuit/{block}"], one, strict=True))


def test_numbers_of_the_block_are_a_cpus_and_the_same_bits_offline() -> None:
    settings = SpectralSettings(topk=4, interval=2)
    before = {"blocks.0.m": torch.randn(96, 64, generator=torch.Generator().manual_seed(0))}
    after = {
        "blocks.0.m": before["blocks.0.m"] + 0.01 * torch.randn(96, 64, generator=torch.Generator().manual_seed(1))
    }
    found: dict[str, dict[str, float]] = {}
    for device in ("cpu", "cuda"):
        moments = [{name: w.to(device) for name, w in weights.items()} for weights in (before, after)]
        memory = Memory()
        for update, weights in enumerate(moments):
            values = refresh(update, {"spec": stack_by_shape(weights)}, settings, memory).values
            found[device] = values["spec/blocks.0.m"]
        offline = compare(*(analyze_weights(weights, settings) for weights in moments))["blocks.0.m"]
        assert {"block_energy", "turn_bound", "block_cos_u_mean"} <= set(offline)
        assert offline == {key: found[device][key] for key in offline}
    for key in ("block_energy", "turn_bound", "block_gap", "block_cos_v_min", "block_cos_u_overlap"):
        assert found["cuda"][key] == pytest.approx(found["cpu"][key], rel=1e-7)


def test_a_snapshot_holds_while_the_weights_move_on_and_memory_is_reused(tmp_path: Path, gate: threading.Event) -> None:
    model = small_vit()
    expected = solve(targets(model), 4)
    with watch(model, tmp_path) as monitor:
        monitor.observe(0)
        for _ in range(20):  # frees and takes blocks of the snapshot's sizes on the main stream
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.full_like(parameter, 7.0))
        gate.set()
    stored = files.read_spectra(tmp_path / "update_00000000.npz").spectra
    for name, one in expected.items():
        np.testing.assert_array_equal(stored[f"spec/{name}"], one.s)


def test_observe_never_waits_for_the_device(tmp_path: Path, gate: threading.Event) -> None:
    model = small_vit()
    with watch(model, tmp_path) as monitor:
        torch.cuda.synchronize()
        # The mode holds for the whole process, and the worker may wait; so it is kept back until the mode is off.
        torch.cuda.set_sync_debug_mode("error")
        try:
            monitor.observe(0)
            monitor.observe(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        gate.set()
    assert monitor.skipped == 1
    assert [record.update for record in monitor.records()] == [0]


def train(store_dir: Path | None) -> tuple[list[float], torch.Tensor]:
    model = small_vit()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    monitor = watch(model, store_dir, every=2) if store_dir else None
    torch.manual_seed(1)
    losses: list[torch.Tensor] = []
    for step in range(12):
        if monitor:
            monitor.observe(step)
        images, labels = torch.randn(16, 3, 32, 32, device="cuda"), torch.randint(10, (16,), device="cuda")
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels' backward pass adds up in no fixed order
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    if monitor:
        monitor.close()
        assert monitor.records()
    return torch.stack(losses).tolist(), torch.cuda.get_rng_state()


def test_losses_and_random_numbers_are_the_same_bits_with_and_without_the_monitor(tmp_path: Path) -> None:
    plain_losses, plain_rng = train(None)
    again_losses, _ = train(None)
    assert again_losses == plain_losses, "the training step itself does not repeat, so this cannot be judged"
    watched_losses, watched_rng = train(tmp_path)
    assert watched_losses == plain_losses
    assert torch.equal(watched_rng, plain_rng)


def test_flows_are_those_of_the_cpu() -> None:
    model = small_vit().eval()
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    on_gpu = measure(model, model, [part.cuda() for part in images.split(4)])
    cpu = model.cpu()
    expected = measure(cpu, cpu, images.split(4))
    for block, values in expected.values.items():
        assert on_gpu.values[block] == pytest.approx(values, rel=1e-2)
        np.testing.assert_allclose(on_gpu.entropies[block], expected.entropies[block], rtol=1e-2)


@pytest.mark.parametrize("is_muon", [False, True])
def test_update_directions_are_copied_without_a_wait_for_the_device(is_muon: bool) -> None:
    model = small_vit()
    adamw = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = Muon(model.parameters()) if is_muon else adamw
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    watched = targets_of_model(model, DEFAULT_TARGETS)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = directions_of(model, optimizer, watched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert set(found) == set(watched)
    for direction in found.values():
        expected = direction.mean() if is_muon else 1.0  # a gradient of ones has one direction, before and after
        torch.testing.assert_close(direction, torch.ones_like(direction) * expected, rtol=1e-2, atol=1e-4)


def test_the_first_triplets_alone_are_those_of_the_whole_spectrum() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for shape in ((768, 768), (2304, 768), (768, 3072)):
        before = {f"m{i}": 0.02 * torch.randn(shape, generator=generator, device="cuda") for i in range(3)}
        now = {name: w + 6e-5 * torch.randn(shape, generator=generator, device="cuda") for name, w in before.items()}
        starts = {name: one.start for name, one in solve(before, 15).items() if one.start is not None}
        (stack,) = stack_by_shape(now)
        found, whole = solve_ends(stack, starts, 15), solve(now, 15)
        for name, one in found.items():
            assert one is not None
            assert one.certificate_max <= 1e-12
            np.testing.assert_allclose(one.top.s, whole[name].top.s, rtol=1e-12)
