"""Normalising, mixing and erasing as torch.compile fuses them for a GPU, here compiled for the CPU."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from timm.layers import PatchEmbed
from torch._functorch import config as functorch
from torch._inductor import config
from torch._inductor.exc import InductorError
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import run_and_get_code

from lowrank_vit.augment.mixing import mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.model.patches import patch_of_product, set_patch_embedding
from lowrank_vit.plan.mixing import Mix
from tests.unit.augment.test_pipeline import FULL, MIXES, drawn_as_tensors, photographs, plan_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
@pytest.mark.parametrize("erase_first", [False, True])
def test_inputs_by_patches_are_the_same_bits(mode, erase_first):
    """Of patches that are not square too, and of sides that they do not fill, which are computed as without."""
    photos, plan = photographs(6, 40), plan_of(FULL, 6, 40)
    augment = Augment((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 10, 0.1, mode, erase_first=erase_first)
    _, boxes, keys = drawn_as_tensors(plan)
    images, targets = torch.from_numpy(photos).permute(0, 3, 1, 2), torch.arange(6)
    for mixes in ([Mix(0.3, is_cutmix=False)], [Mix(0.6, is_cutmix=True, box=(2, 30, 7, 40))], [*MIXES]):
        mix = mix_to_tensor(mixes)
        for drawn in ((mix,), (mix, boxes, keys)):
            expected = augment(images, targets, *drawn)
            for patch in ((8, 8), (4, 10), (40, 40), (16, 16)):
                found, soft = augment(images, targets, *drawn, patch=patch)
                assert torch.equal(found, expected[0])
                assert torch.equal(soft, expected[1])


def with_code_alone(function: Callable[..., Any], *given: Any) -> tuple[Any, list[str]]:
    """What the function gives, and the code that torch.compile writes for it, which is not compiled: 20 s of a core."""
    written = list[str]()

    def write(graph: GraphLowering) -> None:
        written.append(graph.codegen()[0].value)
        raise NotImplementedError

    with (
        config.patch(fx_graph_cache=False),
        functorch.patch(enable_autograd_cache=False),
        mock.patch("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list),  # seconds to find out
        mock.patch.object(GraphLowering, "compile_to_module", write),
        contextlib.suppress(InductorError),
    ):
        torch.compile(function)(*given)
    return function(*given), written


def compiled_with_code(function: Callable[..., Any], *given: Any) -> tuple[Any, list[str]]:
    """What the function gives when it is compiled, and its code."""
    return run_and_get_code(torch.compile(function), *given)


@pytest.mark.parametrize("run", [with_code_alone, pytest.param(compiled_with_code, marks=pytest.mark.slow)])
def test_compiled_the_input_of_the_patch_embedding_is_written_once(run):
    check_that_patches_are_written_once(CPU, run)


def check_that_patches_are_written_once(device: torch.device, run: Callable[..., Any] = compiled_with_code) -> None:
    """With weights that give each pixel back: as many numbers as the images have are made for it and for nothing else.

    So no whole images lie between uint8 and patches, in the augmentation that takes the most of all.
    """
    photos, plan = photographs(9, 40), plan_of(FULL, 9, 40)
    assert plan.erase is not None
    augment = Augment((0.5,) * 3, (0.2,) * 3, 10, 0.1, "pixel").to(device)
    model, embed = torch.nn.Module(), PatchEmbed(40, 8, embed_dim=192).to(device)
    model.patch_embed = embed
    assert set_patch_embedding(model, as_product=True)
    patch = patch_of_product(model)
    assert patch == (8, 8)
    weight = torch.eye(192).view(192, 8, 8, 3).permute(0, 3, 1, 2)
    embed.load_state_dict({"proj.weight": weight, "proj.bias": torch.zeros(192)})

    def embedded(images: torch.Tensor, targets: torch.Tensor, *drawn: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs, soft = augment(images, targets, *drawn, patch=patch)
        return embed(inputs), soft

    _, boxes, keys = drawn_as_tensors(plan)
    arguments = torch.from_numpy(photos).to(device).permute(0, 3, 1, 2), torch.arange(9, device=device)
    drawn = [one.to(device) for one in (mix_to_tensor([Mix(0.3, is_cutmix=False)]), boxes, keys)]
    with torch.no_grad():
        (pixels, soft), (code,) = run(embedded, *arguments, *drawn)
    inputs, expected = augment(*arguments, *drawn)
    patches = inputs.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)
    torch.testing.assert_close(pixels, patches.reshape(9, 25, 192), rtol=0, atol=2e-6)
    torch.testing.assert_close(soft, expected, rtol=0, atol=2e-6)
    shapes = re.findall(rf"empty_strided_{device.type}\(\(([\d, ]+)\), ", code)
    made = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert sum(number >= photos.size for number in made) == 2  # the patches and what the product makes of them
