"""Layers of models that are not timm's: which are found, under which names, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchvision
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

from lowrank_vit.common.errors import UserError
from lowrank_vit.model.foreign import unwrapped
from lowrank_vit.spectral.fused import fused_qkv_of_state
from lowrank_vit.spectral.layers import matrices_of, targets_of_model
from lowrank_vit.spectral.select import choose_targets, module_depth, module_type
from tests.spectra import tiny_vit


class Dense(nn.Module):
    """A layer that is no Linear of torch's."""

    def __init__(self, columns: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, columns))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first, self.out = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.out.weight, self.again = self.embed.weight, self.first


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def encoder() -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2)


def of_torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=12, num_classes=3
    )


def compiled_inside() -> nn.Sequential:
    """Its blocks are wrapped, as torch.compile does."""
    wrapped = torch.compile(mlp())
    return nn.Sequential(wrapped, nn.Linear(3, 2))  # type: ignore[arg-type]


ENCODER = ["self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2"]
TORCHVISION = ["self_attention.in_proj_weight", "self_attention.out_proj", "mlp.0", "mlp.3"]


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (mlp(), ["0", "2"]),
        (nn.Sequential(mlp(), Dense()), ["0.0", "0.2", "1"]),
        (nn.Linear(3, 4), ["weight"]),
        (encoder(), [f"layers.{n}.{end}" for n in range(2) for end in ENCODER]),
        (
            of_torchvision(),
            [*(f"encoder.layers.encoder_layer_{n}.{end}" for n in range(2) for end in TORCHVISION), "heads.head"],
        ),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), ["1"]),
        (nn.Sequential(nn.LSTM(4, 5)), ["0.weight_ih_l0", "0.weight_hh_l0"]),
        (Tied(), ["first", "out"]),
        (mlp().requires_grad_(False), ["0", "2"]),
        (nn.ModuleDict({"a b/c": nn.Linear(2, 3), "weight": nn.Linear(3, 3), "wägen": nn.Linear(3, 1)}), None),
        (compiled_inside(), ["0.0", "0.2", "1"]),
        (nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 2)), ["0", "1"]),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, nn.Module) else "",
)
def test_without_names_each_linear_layer_is_taken_once(model: nn.Module, names: list[str] | None) -> None:
    chosen = targets_of_model(model, None)
    assert list(chosen) == (list(dict(model.named_children())) if names is None else names)
    assert list(targets_of_model(model, "all-linear")) == list(chosen)
    matrices = matrices_of(model, chosen)
    assert all(matrix.ndim == 2 for matrix in matrices.values())


def test_weights_are_the_models_own_and_a_parametrized_one_is_what_it_computes_with() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Linear(5, 2))
    before = copy.deepcopy(model.state_dict())
    matrices = matrices_of(model, targets_of_model(model, None))
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # took no step of its own
    torch.testing.assert_close(matrices["0"], model.eval()[0].weight)
    assert matrices["1"] is model[1].weight


def test_timms_four_matrices_are_taken_where_a_model_has_them() -> None:
    chosen = targets_of_model(tiny_vit(), None)
    assert chosen == targets_of_model(tiny_vit(), ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
    assert list({*targets_of_model(tiny_vit(), "all-linear")} - {*chosen}) == ["head"]


def test_torchs_attention_is_split_in_a_model_and_in_a_file() -> None:
    model = encoder()
    parts = targets_of_model(model, "in_proj_weight,linear1", split_qkv=True)
    assert list(parts)[:3] == [f"layers.0.self_attn.in_proj_weight.{letter}" for letter in "qkv"]
    whole = model.get_parameter("layers.0.self_attn.in_proj_weight")
    torch.testing.assert_close(torch.cat(list(matrices_of(model, parts).values())[:3]), whole)
    state = model.state_dict()
    assert choose_targets(state, "in_proj_weight,linear1", True, fused_qkv_of_state(state, "")) == parts


@pytest.mark.parametrize("make", [mlp, encoder, of_torchvision, Dense])
def test_a_file_has_the_names_of_the_model(make: Any) -> None:
    model = make()
    assert list(choose_targets(model.state_dict(), None)) == list(targets_of_model(model, None))


@pytest.mark.parametrize(
    "wrap",
    [
        torch.compile,
        nn.DataParallel,
        AveragedModel,
        ModelEmaV3,
        lambda model: nn.DataParallel(torch.compile(model)),  # type: ignore[arg-type]
    ],
)
def test_wrappers_are_taken_off(wrap: Any) -> None:
    wrapped = wrap(mlp())
    assert type(unwrapped(wrapped)) is nn.Sequential
    inner = mlp()
    assert unwrapped(inner) is inner


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("model", "patterns", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 3)), None, r"^--spec-targets: the model has no Linear layer\. Name conv.*: 0\."),
        (nn.Identity(), "all-linear", "has no Linear layer"),
        (nn.Linear(2, 3, dtype=torch.complex64), None, "weight is a tensor of complex64"),
        (nn.Sequential(Dense(0)), "0", "0 is empty, of shape"),
        (mlp(), ["2", "fc"], "'fc' matches no 2-D weight"),
        (encoder(), "self_attn.in_proj", "This model has self_attn.in_proj_weight instead"),
    ],
)
def test_what_has_no_spectrum_is_refused_by_name(model: nn.Module, patterns: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        targets_of_model(model, patterns)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_layer_is_told_before_its_first_batch() -> None:
    with pytest.raises(UserError, match=r"0\.weight does not exist yet.*first batch"):
        targets_of_model(lazy(), None)


def test_packed_weights_are_refused() -> None:
    model = mlp()
    model[0].weight = nn.Parameter(torch.zeros(6, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="0 is a tensor of uint8"):
        targets_of_model(model, None)


def test_names_of_ones_own_carry_types_and_depths() -> None:
    own = {"0": "blocks.0.mlp.fc1", "2": "blocks.0.mlp.fc2"}
    assert list(targets_of_model(mlp(), None, rename=own)) == list(own.values())
    renamed = targets_of_model(encoder(), None, True, rename=lambda name: name.replace("layers.", "blocks."))
    assert "blocks.1.self_attn.in_proj_weight.k" in renamed
    for wrong, message in (({"0": "2"}, "for both 0 and 2"), (lambda name: "", "gives '' for 0")):
        with pytest.raises(UserError, match=message):
            targets_of_model(mlp(), None, rename=wrong)


@pytest.mark.parametrize(
    ("name", "kind", "depth"),
    [
        ("encoder.layers.encoder_layer_0.mlp.3", "mlp.3", "0"),
        ("blocks.2.mlp.0", "mlp.0", "2"),
        ("encoder.layer.11.attention.self.query", "attention.self.query", "11"),
        ("stages_1.blocks.3.fc_1", "fc_1", "1.3"),
        ("0", "0", "0"),
        ("features.0.2", "features.0.2", "0.2"),
        ("fc_1", "fc_1", ""),
    ],
)
def test_numbers_of_blocks_and_of_layers_in_them(name: str, kind: str, depth: str) -> None:
    assert (module_type(name), module_depth(name)) == (kind, depth)
