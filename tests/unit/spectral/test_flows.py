"""What hooks on a model see, against the same written out, and which models are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.flows import attentions_of, blocks_of, check_flows, measure, remark_on_attention
from lowrank_vit.spectral.watching.files import forget_flows, write_flows

TINY: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}


def tiny_vit(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **TINY, **more).eval()
    for module in model.modules():  # fresh ones look at all alike
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7)
    return model


def images(n: int = 5, side: int = 16) -> torch.Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("more", [{}, {"class_token": False, "global_pool": "avg"}, {"qk_norm": True}])
def test_blocks_and_entropies_are_those_of_the_forward_pass_written_out(more):
    model, x = tiny_vit(**more), images()
    found = measure(model, model, x.split(2))
    assert list(found.values) == list(found.variances) == list(found.entropies) == ["blocks.0", "blocks.1"]
    assert found.values["blocks.0"]["entropy"] < 0.98 * found.values["blocks.0"]["entropy_uniform"]
    with torch.no_grad():
        tokens = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
        for name, block in zip(found.values, model.blocks, strict=True):
            attention, (n, t, c) = block.attn, tokens.shape
            weight, bias = attention.qkv.weight.double(), attention.qkv.bias.double()
            qkv = block.norm1(tokens).double() @ weight.T + bias
            q, k = (qkv[..., i * c : (i + 1) * c].reshape(n, t, 2, c // 2).transpose(1, 2) for i in (0, 1))
            q, k = (norm.double()(one) for norm, one in ((attention.q_norm, q), (attention.k_norm, k)))
            p = torch.softmax(q @ k.mT / (c // 2) ** 0.5, dim=-1)
            attention.float()
            expected = -(p * p.log()).sum(-1).mean((0, 2))
            np.testing.assert_allclose(found.entropies[name], expected, rtol=1e-5)
            assert found.values[name]["entropy"] == pytest.approx(float(expected.mean()), rel=1e-5)
            assert found.values[name]["entropy_uniform"] == pytest.approx(np.log(t))
            tokens = block(tokens)
            cov = np.cov(tokens.double().reshape(-1, c).numpy().T, bias=True)
            np.testing.assert_allclose(found.variances[name], np.linalg.eigvalsh(cov)[::-1], rtol=1e-4, atol=1e-9)


def test_nothing_of_the_model_or_of_random_numbers_is_changed():
    model = tiny_vit().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    measure(model, model, [images()])
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_is_stored_holds_each_head_and_a_resumed_run_forgets_what_came_later(tmp_path: Path):
    model = tiny_vit()
    found = {"spec": measure(model, model, [images()])}
    paths = [write_flows(tmp_path / "spectra", update, found) for update in (11, 22)]
    stored = np.load(paths[0])
    assert int(stored["update"]) == 11
    assert stored["spec/blocks.1:variances"].shape == (16,)
    assert stored["spec/blocks.1:entropies"].mean() == found["spec"].values["blocks.1"]["entropy"]
    forget_flows(tmp_path / "spectra", 11)
    assert [path.exists() for path in paths] == [True, False]
    forget_flows(tmp_path / "missing", 0)


def test_a_nan_stays_in_its_own_block_and_those_after_it():
    model = tiny_vit()
    nn.init.constant_(model.blocks[1].mlp.fc2.bias, float("nan"))
    found = measure(model, model, [images()])
    assert np.isfinite(list(found.values["blocks.0"].values())).all()
    assert np.isnan(found.values["blocks.1"]["effective_rank"])
    assert np.isnan(found.variances["blocks.1"]).all()
    assert np.isfinite(found.values["blocks.1"]["entropy"])  # its attention comes before


@pytest.mark.parametrize(
    ("name", "side", "channels", "attention"),
    [
        ("swin_tiny_patch4_window7_224", 224, (96, 96, 192), "timm.models.swin_transformer.WindowAttention"),
        ("eva02_tiny_patch14_224", 224, (192,), "timm.models.eva.EvaAttention"),
        ("tiny_vit_5m_224", 224, (64, 64, 128), "no module is named like one"),
        ("convnext_atto", 64, (40, 40, 80), "no module is named like one"),
        ("mixer_s32_224", 224, (512,), "no module is named like one"),
    ],
)
def test_models_of_unknown_attention_have_activations_alone_and_a_line_says_so(name, side, channels, attention):
    with torch.device("meta"):
        model = timm.create_model(name).eval()
    seen: dict[str, int] = {}

    def note(name: str, block: nn.Module) -> None:
        from lowrank_vit.spectral import flows

        block.register_forward_hook(lambda m, _, out: seen.update({name: flows._as_tokens(name, m, out).shape[2]}))

    for block in blocks_of(model):
        note(block, model.get_submodule(block))
    image = torch.zeros(2, 3, side, side, device="meta")
    check_flows(model, lambda: model(image))
    assert tuple(seen.values())[: len(channels)] == channels
    assert not attentions_of(model, blocks_of(model))
    line = remark_on_attention(model)
    assert "so its entropy is not measured" in line
    assert attention in line


def test_a_model_without_blocks_or_tokens_is_refused_by_name():
    with torch.device("meta"):
        resnet, crossvit = (timm.create_model(name).eval() for name in ("resnet18", "crossvit_9_240"))
    with pytest.raises(UserError, match="ResNet has no blocks"):
        check_flows(resnet, lambda: None)
    with pytest.raises(UserError, match=r"the output of blocks\.0 \(MultiScaleBlock\) is a list"):
        check_flows(crossvit, lambda: crossvit(torch.zeros(1, 3, 240, 240, device="meta")))
    assert remark_on_attention(tiny_vit()) == ""
