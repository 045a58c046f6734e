"""What a run begins with: numpy's truncated SVD at the ranks that a share has room for, or adapters; or why not."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import Factors
from lowrank_vit.lowrank.switching.start import (
    adapters_in_words,
    check_adapters,
    check_share,
    start_in_factors,
    start_with_adapters,
)
from lowrank_vit.model.lora import lora_of
from lowrank_vit.model.low_rank import LowRankLinear, low_rank_layers, product, ranks_of

TARGETS = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"


def vit() -> nn.Module:
    torch.manual_seed(1)
    size: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)


def silent(line: str) -> None:
    """Say nothing."""


@pytest.mark.parametrize("share", [0.1, 0.3, 0.61])
def test_the_factors_are_numpys_truncated_svd_evenly_shared_at_a_share_that_is_never_exceeded(share: float):
    model = vit()
    whole = {name: one.weight.detach().clone() for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    biases = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("bias")}
    line = start_in_factors(model, share, TARGETS, say=silent)
    layers = low_rank_layers(model)
    assert len(layers) == 8
    of_layers = sum(layer.up.numel() + layer.down.numel() for layer in layers.values())
    of_targets = sum(whole[name].numel() for name in layers)
    one_rank_more = max(sum(whole[name].shape) for name in layers)
    assert share * of_targets - one_rank_more < of_layers <= share * of_targets
    for name, layer in layers.items():
        u, s, vh = np.linalg.svd(whole[name].double().numpy())
        best = (u[:, : layer.rank] * s[: layer.rank]) @ vh[: layer.rank]
        np.testing.assert_allclose(product(layer.up, layer.down).numpy(), best, atol=1e-6)
        up, down = layer.up.detach().double(), layer.down.detach().double()
        for gram in (up.mT @ up, down @ down.mT):  # both are the singular values
            np.testing.assert_allclose(gram.numpy(), np.diag(s[: layer.rank]), atol=1e-5)
    assert all(torch.equal(biases[name], tensor) for name, tensor in model.state_dict().items() if name in biases)
    ranks = sorted(set(ranks_of(model).values()))
    assert line == (
        f"--lowrank-init {share:g}: 8 layers factorised at rank {ranks[0]} to {ranks[-1]}: {of_layers:,} of their "
        f"{of_targets:,} parameters ({of_layers / of_targets:.1%})"
    )


def test_what_is_not_named_stays_and_nothing_is_drawn():
    model, other = vit(), vit()
    state = torch.get_rng_state()
    start_in_factors(model, 0.2, "mlp.fc1", say=silent)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(ranks_of(model)) == {"blocks.0.mlp.fc1", "blocks.1.mlp.fc1"}
    rest = {name: tensor for name, tensor in other.state_dict().items() if "fc1.weight" not in name}
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in rest.items())


def test_every_rank_takes_the_factors_of_the_first():
    models = vit(), vit()
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(1 + 1e-7)  # another machine's last bits
    told: list[dict[str, Factors]] = []

    def tell(made: dict[str, Factors] | None) -> dict[str, Factors]:
        told.extend([made] if made is not None else [])
        return copy.deepcopy(told[0])

    for n, model in enumerate(models):
        start_in_factors(model, 0.2, TARGETS, is_first=n == 0, from_first=tell, say=silent)
    assert len(told) == 1
    for name, layer in low_rank_layers(models[0]).items():
        other = models[1].get_submodule(name)
        assert isinstance(other, LowRankLinear)
        assert torch.equal(layer.up, other.up)
        assert torch.equal(layer.down, other.down)


def test_what_no_ranks_fit_is_refused_before_and_when_it_is_done():
    model = vit()
    words = r"--lowrank-init 0.001: rank 1 of every target needs 0\.\d+ of their parameters.*--lowrank-targets"
    with pytest.raises(UserError, match=words):
        check_share(model, 1e-3, TARGETS)
    with pytest.raises(UserError, match=words):
        start_in_factors(model, 1e-3, TARGETS, say=silent)
    assert not ranks_of(model)
    with pytest.raises(UserError, match=r"'attn\.qvk' matches no"):
        check_share(vit(), 0.1, "attn.qvk")
    model = vit()
    start_in_factors(model, 0.3, TARGETS, say=silent)
    with pytest.raises(UserError, match="factorised already"):
        start_in_factors(model, 0.1, TARGETS, say=silent)
    model = vit()
    model.get_submodule("blocks.1.mlp").fc1 = model.get_submodule("blocks.0.mlp.fc1")
    with pytest.raises(UserError, match=r"one tensor.*--lowrank-targets"):
        start_in_factors(model, 0.3, TARGETS, say=silent)
    model = vit()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        start_in_factors(model, 0.3, TARGETS, say=silent)


def test_adapters_stand_beside_what_may_have_them_and_their_scale_is_one_unless_told():
    model, said = vit(), list[str]()
    model.get_submodule("blocks.0.mlp.fc1").register_forward_hook(lambda *_: None)
    start_with_adapters(model, 3, None, 0.0, TARGETS, say=said.append)
    lora = lora_of(model)
    assert lora is not None
    assert (lora.rank, lora.scale, len(lora.layers)) == (3, 1.0, 7)
    assert said == ["note: left unchanged: blocks.0.mlp.fc1: it has hooks"]
    (line,) = adapters_in_words(model)
    rows = 3 * ((72 + 24) + (24 + 24) + (24 + 96) + (96 + 24)) * 2 - 3 * (24 + 96)
    assert f"adapters beside 7 layers, scaled by 1: {rows:,} parameters of the adapters and 75 of the head" in line
    assert not adapters_in_words(vit())


@pytest.mark.parametrize("patterns", ["patch_embed.proj", "patch_embed.proj,mlp.fc1"])
def test_what_is_asked_for_is_what_is_spoken_of(patterns: str):
    """Of convolutions alone it is refused before any data are opened; beside others they are named, and left."""
    kind = "patch_embed.proj: of class Conv2d; only Linear"
    for check, start, can, only in (
        (
            lambda model: check_share(model, 0.3, patterns),
            lambda model, say: start_in_factors(model, 0.3, patterns, say=say),
            "be factorised",
            "can be factorised",
        ),
        (
            lambda model: check_adapters(model, 2, patterns),
            lambda model, say: start_with_adapters(model, 2, None, 0.0, patterns, say=say),
            "have adapters",
            "can have adapters",
        ),
    ):
        said: list[str] = []
        if "," in patterns:
            check(vit())
            start(vit(), said.append)
            assert said == [f"note: left unchanged: {kind} {only}"]
            continue
        for refused in (check, lambda model, start=start: start(model, silent)):
            with pytest.raises(UserError, match=f"No layer that --lowrank-targets names can {can}. {kind} {only}"):
                refused(vit())


def test_a_layer_whose_weight_the_model_reads_itself_would_not_see_an_adapter():
    size: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    model, said = timm.create_model("beit_base_patch16_224", num_classes=3, **size), list[str]()
    start_with_adapters(model, 2, None, 0.0, "attn.qkv,attn.proj", say=said.append)
    lora = lora_of(model)
    assert lora is not None
    assert lora.layers == ("blocks.0.attn.proj",)
    assert all("factors" not in line for line in said)
    assert "and would not see an adapter" in " ".join(said)


def test_adapters_that_no_layer_can_have_are_refused_before_and_when_they_are_made():
    for rank, patterns, why in (
        (25, TARGETS, r"--lora 25 is too large for blocks\.0\.attn\.qkv, 72 x 24: its rank is 24 at most"),
        (2, "head", "head is the classifier, which is trained whole. Leave it out of --lowrank-targets"),
        (2, "attn.qvk", "'attn.qvk' matches no"),
    ):
        model = vit()
        with pytest.raises(UserError, match=why):
            check_adapters(model, rank, patterns)
        with pytest.raises(UserError, match=why):
            start_with_adapters(model, rank, None, 0.0, patterns, say=silent)
        assert lora_of(model) is None
    start_in_factors(model := vit(), 0.3, TARGETS, say=silent)
    with pytest.raises(UserError, match="factorised already"):
        start_with_adapters(model, 2, None, 0.0, TARGETS, say=silent)
