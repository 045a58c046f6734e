"""Activations and attention of a model on some images, seen by hooks on a copy of the model, and their metrics."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.fused import has_plain_attention
from lowrank_vit.spectral.measures.flows import TokenSums, attention_entropies, token_metrics, token_variances

_BLOCK = re.compile(r"(.*\.)?blocks\.\d+")
_NAMED_ATTENTION = re.compile(r"(.*\.)?(attn\w*|token_mixer|attention)")


@dataclass
class _Entropy:
    """Entropies of the heads of one attention, added up."""

    sums_H: Tensor
    queries: int = 0
    keys: int = 0


@dataclass(frozen=True)
class Flows:
    """The measurements of one model; every dictionary is by block."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    """`token_metrics`, and where the attention is known "entropy", a mean over heads, tokens and images, in nats, and
    "entropy_uniform", ln T, the most that it can be."""
    variances: dict[str, np.ndarray] = field(default_factory=dict)
    """(C,) `token_variances`."""
    entropies: dict[str, np.ndarray] = field(default_factory=dict)
    """(H,) means over tokens and images, in nats; the heads of several attentions of a block follow one another."""


def blocks_of(model: nn.Module) -> list[str]:
    """The outermost modules of a model that are named like the blocks of timm's: "blocks.0", "layers.1.blocks.0".

    Raises `UserError` where there are none.
    """
    found = [name for name, _ in model.named_modules() if _BLOCK.fullmatch(name)]
    found = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    if not found:
        raise UserError(
            f"--spec-flows: {type(model).__name__} has no blocks (modules named blocks.0 and so on) whose outputs "
            "could be measured. Leave --spec-flows out."
        )
    return found


def attentions_of(model: nn.Module, blocks: Iterable[str]) -> dict[str, list[str]]:
    """Block to its attentions whose probabilities are known to be softmax(scale q k^T) (see `fused`), by name."""
    names = [name for name, module in model.named_modules() if has_plain_attention(module)]
    return {block: found for block in blocks if (found := [n for n in names if n.startswith(f"{block}.")])}


def check_flows(model: nn.Module, run: Callable[[], object]) -> None:
    """Raise `UserError` where `measure` could not tell what the tokens of a model are.

    `run` calls the model on an image, which may be on the device "meta". Other errors of the call are ignored.
    """
    with ExitStack() as stack:
        for name in blocks_of(model):

            def hook(module: nn.Module, _: Any, output: Any, name: str = name) -> None:
                _as_tokens(name, module, output)

            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        try:
            run()
        except UserError:
            raise
        except Exception:  # some models read values, which meta tensors lack
            return


def remark_on_attention(model: nn.Module) -> str:
    """A line about blocks whose attention entropy is not measured, and why; empty where there are none."""
    blocks = blocks_of(model)
    known = attentions_of(model, blocks)
    missing = [block for block in blocks if block not in known]
    if not missing:
        return ""
    named = [m for n, m in model.get_submodule(missing[0]).named_modules() if _NAMED_ATTENTION.fullmatch(n)]
    cls = type(named[0]) if named else None
    whose = f"{cls.__module__}.{cls.__qualname__}" if cls else "no module is named like one"
    which = missing[0] if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
    return (
        f"--spec-flows: the attention of {which} ({whose}) is not known to be plain softmax(q k), so its entropy is "
        "not measured; activations are"
    )


@torch.no_grad()
def measure(
    model: nn.Module,
    run: Callable[[Tensor], object],
    batches: Iterable[Tensor],
) -> Flows:
    """Run a model over batches of images and measure the outputs and the attention of its blocks.

    The model gets hooks, which are removed afterwards: pass a copy in evaluation mode that was not compiled.

    Args:
        model: the module whose blocks are watched.
        run: calls the model on the images of a batch, for example under autocast.
        batches: of images, at least one.

    Raises:
        UserError: there are no blocks, or it is not clear what their tokens are.
    """
    tokens: dict[str, TokenSums] = {}
    entropies: dict[str, _Entropy] = {}
    blocks = blocks_of(model)
    attentions = attentions_of(model, blocks)

    def see_block(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            x = _as_tokens(name, module, output)
            tokens.setdefault(name, TokenSums.like(x)).add(x)

        return hook

    def see_qkv(name: str, attention: Any) -> Callable[..., None]:
        def hook(_module: nn.Module, _input: Any, qkv: Tensor) -> None:
            n, t, _ = qkv.shape
            q, k, _ = qkv.reshape(n, t, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            found = attention_entropies(attention.q_norm(q), attention.k_norm(k), float(attention.scale))
            sums = entropies.setdefault(name, _Entropy(torch.zeros_like(found)))
            sums.sums_H += found
            sums.queries, sums.keys = sums.queries + n * t, t

        return hook

    with ExitStack() as stack:
        for block in blocks:
            hook = model.get_submodule(block).register_forward_hook(see_block(block))
            stack.callback(hook.remove)
            for name in attentions.get(block, ()):
                attention: Any = model.get_submodule(name)
                hook = attention.qkv.register_forward_hook(see_qkv(name, attention))
                stack.callback(hook.remove)
        for images in batches:
            run(images)
    return _described(tokens, entropies, attentions)


def _described(tokens: dict[str, TokenSums], entropies: dict[str, _Entropy], attentions: dict[str, list[str]]) -> Flows:
    flows = Flows()
    for block, sums in tokens.items():
        flows.variances[block] = token_variances(sums)
        flows.values[block] = token_metrics(sums, flows.variances[block])
        if found := [entropies[name] for name in attentions.get(block, ()) if name in entropies]:
            of_heads = torch.cat([one.sums_H / one.queries for one in found])
            flows.entropies[block] = of_heads.cpu().numpy()
            flows.values[block] |= {
                "entropy": float(of_heads.mean()),
                "entropy_uniform": math.log(max(one.keys for one in found)),
            }
    return flows


def _as_tokens(block: str, module: nn.Module, output: Any) -> Tensor:
    """A block's output as (N, T, C); each position of a feature map is a token. Raises `UserError` if unclear.

    The channels of a feature map are the dimension that is as long as a vector among the block's parameters, such as a
    norm's weight.
    """
    x = output[0] if isinstance(output, tuple) else output
    if isinstance(x, Tensor) and x.ndim == 3:
        return x
    if isinstance(x, Tensor) and x.ndim == 4:
        lengths = {p.numel() for p in module.parameters() if p.ndim == 1}
        is_first, is_last = (x.shape[dim] in lengths for dim in (1, 3))
        if is_first != is_last:
            return x.flatten(1, 2) if is_last else x.flatten(2).mT
    what = tuple(x.shape) if isinstance(x, Tensor) else f"a {type(x).__name__}"
    raise UserError(
        f"--spec-flows: the output of {block} ({type(module).__name__}) is {what}: it is not clear which dimensions "
        "are tokens and which are channels. Leave --spec-flows out."
    )
