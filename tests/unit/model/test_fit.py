"""--initial-checkpoint reads what timm's own loading reads, and says whose weights it took."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from data_prep.sources.samples import imagenet1k
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.class_match import Classes, Trust
from lowrank_vit.model.fit import fit_kept_head, load_initial, tell_of_published_head
from lowrank_vit.model.weights import read_checkpoint

NAME = "vit_tiny_patch16_224"


def made(seed: int, num_classes: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(
        NAME, num_classes=num_classes, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    )


OWN, EMA = made(1).state_dict(), made(2).state_dict()


@pytest.mark.parametrize(
    ("content", "is_ema"),
    [
        ({"arch": NAME, "state_dict": OWN, "state_dict_ema": EMA, "epoch": 3}, True),
        ({"state_dict": OWN, "state_dict_ema": EMA, "better": "ema"}, True),
        ({"state_dict": OWN, "state_dict_ema": None}, False),
        ({"state_dict": OWN}, False),
        ({"model": OWN}, False),
        ({"model": OWN, "model_ema": EMA}, True),
        (OWN, False),
        ({"state_dict": {f"module.{key}": value for key, value in OWN.items()}}, False),
        ({"model": {f"_orig_mod.{key}": value for key, value in OWN.items()}}, False),
        ({"state_dict": {f"module._orig_mod.{key}": value for key, value in OWN.items()}}, False),
    ],
)
def test_the_weights_are_those_that_timm_takes(content, is_ema, tmp_path):
    path, said, model = tmp_path / "x.pth.tar", list[str](), made(3)
    torch.save(content, path)
    load_initial(model, path, NAME, said.append)
    twin = timm.create_model(
        NAME, num_classes=7, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, checkpoint_path=str(path)
    )
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(model.state_dict()["head.weight"], (EMA if is_ema else OWN)["head.weight"])
    assert said == [f"initial weights: {'the EMA of' if is_ema else 'those of'} {path}"]


def test_what_cannot_be_taken_is_named(tmp_path):
    def refused(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            load_initial(made(3), path, NAME, list[str]().append)
        return str(caught.value)

    path = tmp_path / "x.pth"
    assert "does not exist" in refused(path)
    path.write_text("no checkpoint")
    assert "--initial-checkpoint" in refused(path)
    assert "cannot be read" in refused(path)
    torch.save({"epoch": 3}, path)
    assert "has no `state_dict`" in refused(path)
    torch.save({"model": {**OWN, "more": torch.zeros(1)}}, path)
    assert "1 are unknown here (more)" in refused(path)


NAMES = ["a", "b", "c", "d", "e", "f", "g"]


def head_after(
    tmp_path, data: list[str], names: list[str] | None, trust: Trust | None = None, num_outputs: int | None = None
) -> tuple[torch.Tensor, list[str]]:
    """The head's rows, weight and bias side by side, that training on classes `data` starts from."""
    path, said, model = tmp_path / "x.pth.tar", list[str](), made(3, num_outputs or len(data))
    torch.save({"state_dict": OWN, "class_names": names}, path)
    load_initial(model, path, NAME, said.append, (Classes("DATA", len(data), data), trust or Trust()))
    return rows(model.state_dict()), said


def rows(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([state["head.weight"], state["head.bias"][:, None]], dim=1)


def test_the_heads_rows_follow_the_names(tmp_path):
    head, said = head_after(tmp_path, NAMES, NAMES)
    assert torch.equal(head, rows(OWN))
    assert len(said) == 1
    head, said = head_after(tmp_path, NAMES[::-1], NAMES)
    assert torch.equal(head, rows(OWN).flip(0))
    assert "mapped by name" in said[0]
    head, said = head_after(tmp_path, ["f", "b"], NAMES)
    assert torch.equal(head, rows(OWN)[[5, 1]])
    assert "2 of the head's 7 rows" in said[1]
    with pytest.raises(UserError, match=r"only the former has zoo.*--pretrained-path .* new head.*--trust-labels"):
        head_after(tmp_path, [*NAMES[:6], "zoo"], NAMES)
    head, _ = head_after(tmp_path, [*NAMES[:6], "zoo"], NAMES, Trust(labels=True))
    assert torch.equal(head, rows(OWN))


@pytest.mark.parametrize("names", [NAMES, None])
def test_a_larger_head_keeps_the_new_outputs_as_initialised(tmp_path, names):
    data = NAMES[::-1] if names else NAMES
    head, said = head_after(tmp_path, data, names, num_outputs=9)
    assert torch.equal(head[:7], rows(OWN).flip(0) if names else rows(OWN))
    assert torch.equal(head[7:], rows(made(3, 9).state_dict())[7:])
    assert "last 2 outputs stay as initialised" in said[-2]
    if names:
        head, _ = head_after(tmp_path, ["f", "b"], names, num_outputs=9)
        assert torch.equal(head[:3], rows(OWN)[[5, 1, 0]])
    with pytest.raises(UserError, match="classes do not fit"):
        head_after(tmp_path, [*NAMES, "zoo"], names, num_outputs=9)


def test_without_names_the_order_of_the_rows_is_said(tmp_path):
    numbers, mixed = ["1", "2", "3", "4", "5", "6", "10"], [0, 2, 3, 4, 5, 6, 1]
    head, said = head_after(tmp_path, numbers, None)
    assert torch.equal(head, rows(OWN))
    assert "taken in timm's order" in said[0]
    head, said = head_after(tmp_path, numbers, None, Trust(order="code-point"))
    assert torch.equal(head, rows(OWN)[mixed])
    head, said = head_after(tmp_path, sorted(numbers), None)  # an older set
    assert torch.equal(head[mixed], rows(OWN))
    with pytest.raises(UserError, match="7 outputs, without names"):
        head_after(tmp_path, ["1", "2"], None)


def test_a_pretrained_head_that_is_kept_follows_the_names(tmp_path):
    def fitted(data: list[str], names: list[str] | None) -> tuple[torch.Tensor, list[str]]:
        path, said, model = tmp_path / "x.pth.tar", list[str](), made(1, len(data))
        torch.save({"state_dict": OWN, "class_names": names}, path)
        fit_kept_head(model, read_checkpoint(path), NAME, said.append, Classes("DATA", len(data), data), Trust())
        return rows(model.state_dict()), said

    head, said = fitted(NAMES[::-1], NAMES)
    assert torch.equal(head, rows(OWN).flip(0))
    head, said = fitted([*NAMES[:6], "zoo"], NAMES)
    assert torch.equal(head, rows(OWN))
    assert "has other classes (a, b, c, d, e, f, ...); it is kept as an initialisation" in said[0]
    head, said = fitted(["f", "b"], NAMES)  # a new head
    assert (len(head), said) == (2, [])


def test_a_published_head_of_other_classes_is_told():
    said: list[str] = []
    wnids = list(imagenet1k())
    for names in (wnids, wnids[:100], ["zoo", *wnids[1:]]):
        tell_of_published_head(NAME, Classes("DATA", len(names), names), said.append)
    assert said == [f"note: the head of {NAME} has ImageNet's classes, not DATA's; it is kept as an initialisation"]
