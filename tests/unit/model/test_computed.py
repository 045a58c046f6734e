"""Weights that layers compute: what is watched is what the forward multiplies by, or the layer is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.layers import matrices_of, targets_of_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


class Net(nn.Module):
    """Two layers, an embedding and an attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.a, self.b, self.attn = (
            nn.Embedding(7, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 4),
            nn.MultiheadAttention(4, 2),
        )

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.b(self.a(images))
        return self.attn(tokens, tokens, tokens)[0]


def of_forward(layer: nn.Module, columns: int) -> Tensor:
    """(R, C), float64: what a layer without its bias makes of the unit vectors."""
    layer = copy.deepcopy(layer).double().eval()
    with torch.no_grad():
        return (layer(torch.eye(columns).double()) - layer(torch.zeros(1, columns).double())).T


def learnt(model: nn.Module) -> nn.Module:
    """Adapters that are no longer as they began."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def with_peft(config: Any) -> nn.Module:
    return learnt(peft.get_peft_model(Net(), config))


def lora(**more: Any) -> Any:
    return peft.LoraConfig(**{"r": 2, "target_modules": ["a"], "init_lora_weights": False} | more)


KINDS: dict[str, Any] = {
    "lora": lora(),
    "rslora": lora(use_rslora=True, lora_alpha=5),
    "dora": lora(use_dora=True),
    "lora of both and the embedding": lora(target_modules=["a", "b", "embed"]),
    "of the attention": lora(target_modules=["a", "attn"]),
    "a head of its own": lora(modules_to_save=["b"]),
    "ia3": peft.IA3Config(target_modules=["a"], feedforward_modules=[]),
    "ia3 of inputs": peft.IA3Config(target_modules=["a"], feedforward_modules=["a"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["a"], init_weights=False),
    "lokr": peft.LoKrConfig(r=2, target_modules=["a"], init_weights=False),
    "adalora": peft.AdaLoraConfig(init_r=2, target_modules=["a"], total_step=9),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["a"]),
    "boft": peft.BOFTConfig(boft_block_size=4, target_modules=["a"]),
    "vera": peft.VeraConfig(r=2, target_modules=["a"]),
    "fourier": peft.FourierFTConfig(n_frequency=9, target_modules=["a"], init_weights=False),
    "hra": peft.HRAConfig(r=2, target_modules=["a"]),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_adapters_of_each_kind_count_as_what_peft_merges_and_as_what_is_computed(config: Any) -> None:
    model: Any = with_peft(config)
    before = {name: (tensor.clone(), tensor.dtype) for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = matrices_of(model, targets_of_model(model, "all-linear"))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, before[name][0]) for name, tensor in model.state_dict().items())
    assert model.training
    prefix = "base_model.model."
    assert list(found) == [f"{prefix}{name}" for name in ("a", "b", "attn.in_proj_weight", "attn.out_proj")]
    torch.testing.assert_close(
        found[f"{prefix}a"].double(), of_forward(model.get_submodule(f"{prefix}a"), 16), atol=1e-6, rtol=0
    )
    merged: Any = copy.deepcopy(model).merge_and_unload()
    for name, expected in matrices_of(merged, targets_of_model(merged, "all-linear")).items():
        torch.testing.assert_close(found[f"{prefix}{name}"].double(), expected.double(), atol=1e-6, rtol=1e-5)


A = "base_model.model.a"


def two(model: Any) -> None:
    model.add_adapter("other", lora(target_modules=["a", "b"]))
    model.base_model.set_adapter(["default", "other"])


def disabled_when_merged(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


@pytest.mark.parametrize("config", [KINDS["lora"], KINDS["dora"], KINDS["ia3"]], ids=["lora", "dora", "ia3"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.disable_adapter_layers(),
        disabled_when_merged,
        lambda model: model.bfloat16(),
    ],
)
def test_adapters_count_as_they_are_in_use(config: Any, change: Callable[[Any], None]) -> None:
    model: Any = with_peft(config)
    change(model)
    found = matrices_of(model, targets_of_model(model, "a,b"))
    tolerance = {"atol": 1e-5, "rtol": 0} if found[A].dtype != torch.bfloat16 else {}
    torch.testing.assert_close(found[A].double(), of_forward(model.get_submodule(A), 16), **tolerance)


def test_adapters_that_are_added_count_when_they_are_in_use() -> None:
    model: Any = with_peft(lora(modules_to_save=["attn"]))
    model.add_adapter("other", lora(target_modules=["a", "b"], r=3))
    learnt(model)
    chosen = targets_of_model(model, "all-linear")
    assert [name.removeprefix("base_model.model.") for name in chosen] == [
        "a",
        "b",
        "attn.in_proj_weight",
        "attn.out_proj",
    ]
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        found = matrices_of(model, chosen)
        for name, columns in ((A, 16), (A[:-1] + "b", 8)):
            torch.testing.assert_close(
                found[name].double(), of_forward(model.get_submodule(name), columns), atol=1e-5, rtol=0
            )
        attn = model.get_submodule("base_model.model.attn")
        torch.testing.assert_close(found["base_model.model.attn.in_proj_weight"], attn.in_proj_weight)


def hooked(*wraps: Any, at: str = "a") -> Any:
    model = Net()
    for wrap in wraps:
        wrap(model.get_submodule(at))
    return model


@pytest.mark.parametrize(
    "wraps",
    [
        [weight_norm],
        [spectral_norm],
        [lambda layer: prune.random_unstructured(layer, "weight", 0.5)],
        [
            lambda layer: prune.ln_structured(layer, "weight", 2, 2, 0),
            lambda layer: prune.l1_unstructured(layer, "weight", 9),
        ],
        [weight_norm, lambda layer: prune.l1_unstructured(layer, "weight_v", 9)],
        [lambda layer: weight_norm(layer, dim=-1), lambda layer: prune.l1_unstructured(layer, "bias", 2)],
        [parametrizations.weight_norm],
        [parametrizations.spectral_norm],
        [parametrizations.orthogonal],
        [lambda layer: prune.random_unstructured(layer, "weight", 0.5), lambda layer: prune.remove(layer, "weight")],
    ],
)
def test_weights_of_hooks_are_those_of_the_next_forward(wraps: Any) -> None:
    model = hooked(*wraps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(3, 5, 16)).square().sum().backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    of_layer = {name: id(tensor) for name, tensor in vars(model.a).items()}
    found = matrices_of(model, targets_of_model(model, None))
    assert list(found) == ["a", "b", "attn.in_proj_weight", "attn.out_proj"]
    assert found["b"] is model.b.weight
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert of_layer == {name: id(tensor) for name, tensor in vars(model.a).items()}
    torch.testing.assert_close(found["a"], next_weight(model.a))


def next_weight(layer: Any) -> Tensor:
    layer.eval()(torch.zeros(1, 16))
    return layer.weight


def test_other_tensors_than_a_layers_weight_are_pruned_too() -> None:
    model = hooked(lambda attn: prune.random_unstructured(attn, "in_proj_weight", 0.5), at="attn")
    found = matrices_of(model, targets_of_model(model, None, split_qkv=True))
    assert list(found)[2:5] == [f"attn.in_proj_weight.{letter}" for letter in "qkv"]
    torch.testing.assert_close(torch.cat([*found.values()][2:5]), model.attn.in_proj_weight)
    lstm = nn.Sequential(weight_norm(nn.LSTM(4, 5), "weight_hh_l0"))
    assert list(targets_of_model(lstm, None)) == ["0.weight_ih_l0", "0.weight_hh_l0"]


def computed_by_nobody_knows_what() -> nn.Module:
    model = Net()
    weight = model.a.weight
    del model.a.weight
    model.a.weight = weight * 2
    return model


def around_another() -> nn.Module:
    model: Any = with_peft(KINDS["lora"])
    inner = model.get_submodule(A)
    model.set_submodule(A, peft.tuners.lora.layer.Linear(inner, "default", config=lora(), r=2, lora_alpha=1))
    return model


def on_a_computed_one() -> nn.Module:
    model: Any = with_peft(KINDS["loha"])
    parametrizations.weight_norm(model.get_submodule(A).base_layer)
    return model


def poly() -> nn.Module:
    return with_peft(peft.PolyConfig(r=2, target_modules=["a"], n_tasks=2, n_skills=2, n_splits=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (computed_by_nobody_knows_what, "^a.weight is not a parameter: its layer computes it.*targets without it"),
        (around_another, "^base_model.model.a: the weight that it computes with is unknown.*wraps another"),
        (on_a_computed_one, "kind loha, and the weight that it adapts is computed, too"),
        (poly, "kind poly, and it cannot be merged.*targets without it"),
    ],
)
def test_a_layer_that_is_not_understood_is_refused_by_name_and_others_are_watched(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(UserError, match=message):
        matrices_of(model, targets_of_model(model, None))
    assert [name[-1] for name in matrices_of(model, targets_of_model(model, "b"))] == ["b"]


def test_plain_adapters_on_a_computed_weight_are_added_to_that() -> None:
    model: Any = with_peft(KINDS["lora"])
    layer = model.get_submodule(A)
    spectral_norm(layer.base_layer)
    found = matrices_of(model, targets_of_model(model, "a"))
    torch.testing.assert_close(found[A], of_forward(layer, 16), atol=1e-5, rtol=0)


def test_a_layer_in_two_places_is_watched_once_and_two_adapters_on_one_weight_are_two() -> None:
    for wrap in (parametrizations.weight_norm, weight_norm):
        layer = wrap(nn.Linear(5, 5))
        assert list(targets_of_model(nn.Sequential(layer, nn.ReLU(), layer), None)) == ["0"]
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].weight = model[0].weight
    assert list(targets_of_model(model, None)) == ["0"]
    adapted = peft.inject_adapter_in_model(lora(target_modules=["0", "1"]), model)
    assert list(targets_of_model(adapted, None)) == ["0", "1"]


def test_a_head_of_several_layers_is_named_as_without_peft() -> None:
    class Deep(Net):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))  # type: ignore[assignment]

    model: Any = learnt(peft.get_peft_model(Deep(), lora(modules_to_save=["b"])))
    found = matrices_of(model, targets_of_model(model, "b.0,b.1"))
    head = model.get_submodule("base_model.model.b.modules_to_save.default")
    assert [*found.values()] == [layer.weight for layer in head]
