"""Which layers may be factorised, and what a stranger is told of those that may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.layers import costs_of
from lowrank_vit.lowrank.targets import find_targets, parts_of_targets

SIDE = 32


def small(name: str, **kwargs: Any) -> nn.Module:
    """A model of timm's whose weights all matter to its answer."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, img_size=SIDE, **kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def plain(**kwargs: Any) -> nn.Module:
    return small("vit_tiny_patch16_224", **{"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, **kwargs})


def found(model: nn.Module, patterns: str = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2") -> tuple[list[str], list[str]]:
    said: list[str] = []
    return list(find_targets(model, patterns, img_size=SIDE, say=said.append)), said


def test_the_layers_of_a_plain_vit_are_found_in_order_and_the_model_stays_as_it_was():
    model = plain().train()
    before, layers = {name: tensor.clone() for name, tensor in model.state_dict().items()}, dict(model.named_modules())
    names, said = found(model)
    assert names == [f"blocks.{i}.{one}" for i in (0, 1) for one in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert not said
    assert dict(model.named_modules()) == layers
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("eva02_tiny_patch14_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        ("beit_base_patch16_224", {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}),
        (
            "swinv2_tiny_window8_256",
            {"patch_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4},
        ),
    ],
)
def test_a_layer_whose_weight_the_model_reads_itself_is_refused_by_name_and_the_others_go_on(
    name: str, kwargs: dict[str, Any]
):
    model = small(name, **kwargs)
    names, said = found(model, "qkv,attn.proj,mlp.fc1")
    assert {one.rpartition(".")[2] for one in names} == {"proj", "fc1"}
    assert len(names) == 4
    (line,) = said
    assert "attn.qkv and 1 more: timm.models." in line
    assert "reads its weight itself" in line
    with pytest.raises(UserError, match=r"No layer that --targets names can be factorised. .*reads its weight"):
        found(model, "qkv")


class _Odd(nn.Module):
    """Layers of which only some may be factorised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, SIDE)
        self.good, self.unused, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table = nn.Embedding(4, 8)
        self.seen = nn.Linear(8, 8)
        self.watched = nn.Linear(8, 8)
        self.watched.register_forward_hook(lambda *_: None)
        self.doubled = _Doubled(8, 8)
        self.pretrained_cfg = {"input_size": (3, SIDE, SIDE), "num_classes": 5}

    def forward(self, x: Tensor) -> Tensor:
        x = self.good(self.conv(x).flatten(1)) + self.table.weight.sum(0)
        x = self.doubled(self.watched(x))[:, None]
        x = self.attention(x, x, x)[0][:, 0]
        x = self.seen(x) if type(self.seen).__name__ != "LowRankLinear" else -self.seen(x)
        return self.out(F.gelu(x))


class _Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_each_layer_that_cannot_be_in_factors_is_named_with_its_reason():
    torch.manual_seed(0)
    names, said = found(_Odd(), "conv,good,unused,out,out_proj,table,seen,watched,doubled")
    assert names == ["good", "out"]
    reasons = dict(line.removeprefix("note: left unchanged: ").split(": ", 1) for line in said)
    expected = {
        "conv": "of class Conv2d",
        "table": "of class Embedding",
        "attention.out_proj": "reads its weight itself",
        "unused": "does not use it",
        "seen": "change the model's output",
        "watched": "it has hooks",
        "doubled": "_Doubled is a Linear with its own forward",
    }
    assert reasons.keys() == expected.keys()
    assert all(part in reasons[name] for name, part in expected.items())


def tied(model: nn.Module) -> None:
    model.get_submodule("blocks.1.mlp.fc1").register_parameter("weight", model.get_parameter("blocks.0.mlp.fc1.weight"))


def broken(model: nn.Module) -> None:
    model.get_parameter("blocks.1.mlp.fc2.weight").data[3, 4] = float("nan")


def broken_elsewhere(model: nn.Module) -> None:
    model.get_parameter("head.weight").data[1, 2] = float("nan")


def too_large(model: nn.Module) -> None:
    model.get_parameter("blocks.0.mlp.fc1.weight").data.mul_(1e30)


@pytest.mark.parametrize(
    ("change", "patterns", "message"),
    [
        (tied, "mlp.fc1", r"blocks.0.mlp.fc1.weight and blocks.1.mlp.fc1.weight are one tensor.*--targets"),
        (broken, "mlp.fc2", r"blocks.1.mlp.fc2 has weights that are not finite"),
        (broken_elsewhere, "mlp.fc2", r"logits are not finite: head\.weight holds a NaN or an infinity"),
        (too_large, "mlp.fc2", r"logits are not finite: no weight .* but blocks\.0\.mlp\.fc1\.weight has .*e\+\d\d"),
        (lambda model: model.half(), "mlp.fc2", r"blocks.0.mlp.fc2 is float16.*float32"),
        (lambda model: model.bfloat16(), "mlp.fc2", r"blocks.0.mlp.fc2 is bfloat16.*float32"),
        (lambda model: None, "mlp.fc3", r"'mlp.fc3' matches no 2-D weight.*mlp.fc1"),
        (
            lambda model: None,
            "patch_embed.proj",
            r"No layer .* factorised. patch_embed.proj: of class Conv2d",
        ),
    ],
)
def test_weights_of_which_no_factors_can_be_made_are_an_error(
    change: Callable[[nn.Module], object], patterns: str, message: str
):
    model = plain()
    change(model)
    with pytest.raises(UserError, match=message):
        found(model, patterns)


def test_images_are_of_the_size_that_the_model_was_built_for():
    for model in (plain(), plain(dynamic_img_size=True)):
        targets = find_targets(model, "mlp.fc1")
        assert {one.tokens for one in costs_of(model, targets).layers.values()} == {(SIDE // 8) ** 2 + 1}


def test_rows_are_split_only_where_their_order_is_known():
    model = plain()
    targets = find_targets(model, "attn.qkv,mlp.fc1", img_size=SIDE)
    assert parts_of_targets(model, targets, "heads") == {name: 6 if "qkv" in name else 1 for name in targets}
    with pytest.raises(UserError, match=r"--split thirds needs a target named qkv"):
        parts_of_targets(model, {name: one for name, one in targets.items() if "fc1" in name}, "thirds")
    model.get_submodule("blocks.0.attn").head_first = True  # type: ignore[assignment]  # as timm's own of another order
    with pytest.raises(UserError, match=r"rows of blocks.0.attn.qkv are Q, K and V, a third each, and how many heads"):
        parts_of_targets(model, targets, "heads")
