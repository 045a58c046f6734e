"""Whose heads have circuits, that these are what the model computes, and that they are the same online and offline."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from lowrank_vit.analyze_spectrum import main
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.spectral.heads import (
    Circuits,
    Heads,
    attention_blocks,
    circuits_by_block,
    circuits_of_state,
    head_weights,
)
from lowrank_vit.spectral.measures.circuits import BlockCircuits, circuit_metrics, of_arrays
from lowrank_vit.spectral.watching.files import read_newest_circuits
from tests.monitors import watch
from tests.spectra import tiny_vit

SMALL = {"depth": 3, "embed_dim": 12, "num_heads": 2, "num_classes": 3, "img_size": 16}


def made(name: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.zero_()
    return model


PLAIN = {
    "a plain one": lambda: made("vit_tiny_patch16_224", patch_size=8),
    "with LayerScale": lambda: made("vit_tiny_patch16_224", patch_size=8, init_values=0.5, num_heads=1),
    "with heads of another width": lambda: made("eva_giant_patch14_224", patch_size=8, num_heads=3),
    "with a table of places": lambda: made("beit_base_patch16_224", patch_size=8, init_values=0.3),
    "with a function of places": lambda: made("vit_relpos_small_patch16_224", patch_size=8),
    "with separate layers": lambda: made(
        "eva02_tiny_patch14_224", patch_size=8, use_rot_pos_emb=False, qkv_fused=False, init_values=0.4
    ),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_the_factors_are_what_the_block_compares_and_writes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folded: logits are x^T W_Q^T W_K x' of the normalised input, and W_O W_V x' is added to the stream."""
    model = PLAIN[kind]()
    blocks = attention_blocks(model, "folded")
    assert list(blocks) == [f"blocks.{i}" for i in range(3)]
    assert [block.follows for block in blocks.values()] == ["", "blocks.0", "blocks.1"]
    block: Any = model.get_submodule("blocks.1")
    (weights,) = (
        head_weights(blocks["blocks.1"], {name: w.detach().numpy() for name, w in own.items()})
        for own in [Heads(blocks, ("blocks.1",)).others(model, ())]
    )
    x_BTn = torch.randn(1, 5, SMALL["embed_dim"])
    seen: list[Tensor] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        seen.extend([q, k])
        return v  # each place attends to itself

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attention)
    if hasattr(block.attn, "relative_position_bias_table"):
        block.attn.relative_position_bias_table = None
    if hasattr(block.attn, "rel_pos"):
        block.attn.rel_pos = None
    block.drop_path2 = Nothing()
    block.attn.fused_attn = True
    with torch.no_grad():
        added_Tn = (block.eval()(x_BTn) - x_BTn)[0].double().numpy()
        normed_Tn = nn.functional.layer_norm(x_BTn, x_BTn.shape[-1:], eps=block.norm1.eps)[0].double().numpy()
    q, k = (part[0].double().detach().numpy() for part in seen)
    for h in range(blocks["blocks.1"].heads):
        qk = weights.q_HDn[h].T @ weights.k_HDn[h]
        np.testing.assert_allclose(q[h] @ k[h].T, normed_Tn @ qk @ normed_Tn.T, rtol=1e-4, atol=1e-4)
    written = sum(normed_Tn @ (o.T @ v).T for o, v in zip(weights.o_HDn, weights.v_HDn, strict=True))
    np.testing.assert_allclose(added_Tn, written, rtol=1e-4, atol=1e-4)


class Nothing(nn.Module):
    """In place of the MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("vit_tiny_patch16_224", {"qk_norm": True}, r"blocks\.0\.attn\.q_norm normalises queries and keys \(qk-norm\)"),
        ("eva02_tiny_patch14_224", {}, "rope rotates queries and keys by their position"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"blocks\.0\.attn\.norm normalises the outputs"),
        ("vit_base_patch16_rpn_224", {"depth": 1}, r"blocks\.0 \(ResPostBlock\) normalises the output of attention"),
        ("vit_base_patch16_xp_224", {"depth": 1}, "ParallelScalingBlock.* other branches"),
        ("vit_small_patch16_18x2_224", {"depth": 1}, "ParallelThingsBlock.* other branches"),
        ("vit_dlittle_patch16_reg1_gap_256", {"depth": 1}, "subtracts one attention map"),
        ("cait_xxs24_224", {"depth": 1}, "mixes the attention maps of its heads"),
        ("xcit_nano_12_p8_224", {"depth": 1}, "XCABlock"),
        ("swinv2_tiny_window8_256", {}, "normalises the output of attention"),
        ("tiny_vit_5m_224", {}, r"Attention\) is an attention whose forward is not known"),
        ("resnet18", {}, "ResNet has no attention of a known class"),
        (
            "eva02_tiny_patch14_224",
            {"use_rot_pos_emb": False, "qkv_fused": False, "attn_type": "rope", "num_kv_heads": 1},
            r"k_proj has fewer heads than the queries \(grouped queries\)",
        ),
    ],
)
def test_other_attention_is_refused_by_name(name: str, more: dict[str, Any], expected: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, **more)
    with pytest.raises(UserError, match=f"--spec-circuits: .*{expected}.* leave --spec-circuits out"):
        attention_blocks(model, "raw")
    assert attention_blocks(model, "none") == {}


def test_a_norm_that_is_no_factor_and_a_layer_that_is_none_are_refused() -> None:
    model = tiny_vit()
    model.blocks[1].norm1 = nn.BatchNorm1d(16)
    assert attention_blocks(model, "raw")
    with pytest.raises(UserError, match=r"blocks\.1\.norm1 is a BatchNorm1d"):
        attention_blocks(model, "folded")
    model.set_submodule("blocks.0.attn.proj", nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 16)))
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.proj is not a plain linear layer but a Sequential"):
        attention_blocks(model, "raw")


def test_blocks_of_another_stage_do_not_follow() -> None:
    with torch.device("meta"):
        blocks = attention_blocks(timm.create_model("pit_ti_224"), "raw")
    first = [name for name, block in blocks.items() if not block.follows]
    assert first == [f"transformers.{i}.blocks.0" for i in range(3)]


def numbers(model: nn.Module, circuits: Circuits = "folded") -> dict[str, BlockCircuits]:
    return circuits_of_state(model, model.state_dict(), circuits, "--circuits")


def same(found: dict[str, BlockCircuits], expected: dict[str, BlockCircuits]) -> bool:
    pairs = [(a, b) for key in expected for a, b in zip(found[key], expected[key], strict=True)]
    return list(found) == list(expected) and all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_and_threads_change_no_bit(ranks: int) -> None:
    model = PLAIN["with LayerScale"]()
    expected = numbers(model)
    shares = Heads.shared_out(attention_blocks(model, "folded"), ranks)
    found: dict[str, BlockCircuits] = {}
    for share in shares:
        weights = {name: w.detach().numpy() for name, w in share.others(model, ()).items()}
        assert all(share.reads(name) for name in weights)
        found |= circuits_by_block(share, weights, cpu_threads=ranks)
    assert same(found, expected)


def test_raw_ones_have_no_factors() -> None:
    model = PLAIN["with LayerScale"]()
    raw, folded = numbers(model, "raw"), numbers(model)
    for name, parameter in model.named_parameters():
        if "norm1" in name or "ls1" in name:
            nn.init.ones_(parameter)
    assert same(numbers(model, "raw"), raw)
    assert not same(numbers(model), folded)
    for key, one in numbers(model).items():
        np.testing.assert_allclose(one.qk_HK, raw[key].qk_HK, rtol=1e-12)


@pytest.mark.parametrize(
    ("circuits", "changes"),
    [
        ("raw", {}),
        ("folded", {"split_qkv": True}),
        ("folded", {"targets": "mlp.fc1"}),
        ("raw", {"targets": "attn.qkv"}),
    ],
)
def test_what_a_monitor_stores_and_records_is_what_an_analysis_says(
    tmp_path: Path, circuits: Circuits, changes: dict[str, Any]
) -> None:
    model, ema = tiny_vit(0), tiny_vit(1)
    with watch(model, tmp_path, ema, circuits=circuits, **changes) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    assert monitor.failed == 0
    _, stored, kind_of_circuits = read_newest_circuits(tmp_path)
    assert kind_of_circuits == circuits
    for kind, one in (("spec", model), ("spec_ema", ema)):
        expected = numbers(one, circuits)
        prefix = f"{kind}/circuit/"
        found = {key.removeprefix(prefix): one for key, one in stored.items() if key.startswith(prefix)}
        assert same(found, expected)
        for block, of_block in expected.items():
            for metric, value in circuit_metrics(of_block).items():
                np.testing.assert_array_equal(record.values[f"{prefix}{block}/{metric}"], value)
        mean = np.mean([np.max(one.ov_HK) for one in expected.values()])
        assert record.values[f"{kind}/type/circuit/ov_sigma_max"] == pytest.approx(mean)
    assert json.loads((tmp_path / "index.json").read_text())["circuits"] == circuits
    assert sum("circuit" in key for key in record.values) < 100


def test_a_weight_that_is_not_finite_is_said_once_and_spoils_its_head_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.attn.proj.weight")[3, 9] = float("nan")  # of the second head
    with watch(model, tmp_path, circuits="raw", targets="mlp.fc1") as monitor:
        for update in (0, 2):
            monitor.observe(update)
            monitor.wait()
    assert monitor.failed == 0
    update, stored, _ = read_newest_circuits(tmp_path)
    assert update == 2
    found = stored["spec/circuit/blocks.1"]
    assert np.isnan(found.ov_HK[1]).all()
    assert np.isfinite(found.ov_HK[0]).all()
    assert np.isfinite(found.k_HG).all()
    warnings = [line.getMessage() for line in caplog.records if line.levelname == "WARNING"]
    assert warnings == ["spec: circuits of blocks.1: a weight is not finite, so the values of its head are NaN"]


@pytest.mark.parametrize("targets", ["attn.qkv,attn.proj", "mlp.fc2"])
def test_of_a_layer_in_factors_the_product_counts(tmp_path: Path, targets: str) -> None:
    model = tiny_vit()
    state = model.state_dict()
    for name, parts in (("blocks.0.attn.qkv", 3), ("blocks.1.attn.proj", 1)):
        up, down = torch.randn(len(state[f"{name}.weight"]), 4), torch.randn(4 * parts, 16)
        model.set_submodule(name, LowRankLinear(up, down))
    with watch(model, tmp_path, circuits="folded", targets=targets) as monitor:
        monitor.observe(0)
    _, stored, _ = read_newest_circuits(tmp_path)
    expected = circuits_of_state(tiny_vit(), model.state_dict(), "folded", "--circuits")
    assert same({key.removeprefix("spec/circuit/"): one for key, one in stored.items()}, expected)
    assert (stored["spec/circuit/blocks.0"].qk_HK[:, 4:] < 1e-12 * stored["spec/circuit/blocks.0"].qk_HK[:, :1]).all()


def analyze(path: Path, *flags: str) -> tuple[dict[str, Any], dict[str, BlockCircuits]]:
    out = path.parent / "out"
    main(["--checkpoint", str(path), "--save-dir", str(out), *flags])
    (json_path,), (npz_path,) = out.glob("*_spectral.json"), out.glob("*_circuits.npz")
    with np.load(npz_path) as arrays:
        content, (found, circuits) = json.loads(json_path.read_text()), of_arrays(dict(arrays))
    assert circuits == content["meta"]["circuits"]
    return content, found


def test_analyze_spectrum_makes_the_model_as_its_run_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head count is not in the weights; half precision, the EMA, and a table among its output."""
    kwargs = ("embed_dim=12", "depth=2", "num_heads=3", "patch_size=8", "init_values=0.1")
    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=12, depth=2, num_heads=3, patch_size=8, init_values=0.1, img_size=16
    )
    ema = deepcopy(model).to(torch.bfloat16)
    content = {"state_dict": model.state_dict(), "state_dict_ema": ema.state_dict(), "arch": "vit_tiny_patch16_224"}
    args = {"model-kwargs": kwargs, "img-size": 16}
    torch.save(content | {"args": args}, tmp_path / "run.pth.tar")
    content, found = analyze(tmp_path / "run.pth.tar", "--circuits", "folded", "--use-ema")
    assert same(found, numbers(ema.float()))
    assert content["meta"]["circuits"] == "folded"
    assert found["blocks.1"].qk_HK.shape == (3, 4)
    assert content["circuits"]["blocks.1"]["composition_chance"] == 1 / 12
    printed = capsys.readouterr().out
    assert "Heads (z" in printed
    assert max(map(len, printed.split("Heads (z")[1].split("wrote")[0].splitlines())) <= 80


def test_a_file_that_does_not_tell_its_model_or_is_of_another_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tiny_vit().state_dict(), path)
    with pytest.raises(UserError, match=r"how many heads weights has is not in the file.*--model"):
        main(["--checkpoint", str(path), "--circuits"])
    with pytest.raises(
        UserError, match=r"--circuits: the model has blocks\.0\.attn\.qkv\.weight of shape \(576, 192\)"
    ):
        main(["--checkpoint", str(path), "--circuits", "raw", "--model", "vit_tiny_patch16_224"])
    with pytest.raises(UserError, match="--circuits is about one state"):
        main(["--compare", str(path), str(path), "--circuits"])
    with pytest.raises(UserError, match="--circuits takes one of none, raw, folded, not `foldet`"):
        main(["--checkpoint", str(path), "--circuits", "foldet"])
