"""Layers that are factorised, or have adapters beside them, from a run's first update."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.locks import Say
from lowrank_vit.common.threads import beat
from lowrank_vit.lowrank.allocation import Ranks, check_share_of, uniform
from lowrank_vit.lowrank.layers import Costs, Factors, costs_alone, factorise
from lowrank_vit.lowrank.switching.factors import NewFactors, make_factors
from lowrank_vit.lowrank.targets import find_targets, possible_weights
from lowrank_vit.model.lora import Lora, add_adapters, classifiers, lora_of, require_peft

_TARGETS = "--lowrank-targets"
_LINE_EVERY_S = 10.0
"""Seconds between two lines while a large model is decomposed."""


def start_in_factors(
    model: nn.Module,
    share: float,
    patterns: str,
    *,
    img_size: int | None = None,
    is_first: bool = True,
    from_first: Callable[[dict[str, Factors] | None], dict[str, Factors]] | None = None,
    say: Say = terminal.say,
) -> str:
    """Factorise the layers that the patterns name to this share of their parameters, in place.

    Spectral initialisation (Khodak et al., "Initialization and Regularization of Factorized Neural Layers", ICLR 2021):
    the truncated SVD of each initial weight, with the singular values split evenly between the factors. All layers keep
    the same share, up to whole ranks. No random numbers are drawn, so the factors are the best approximations of the
    very matrices with which a run of the same seed starts without factors.

    Args:
        model: with its initial weights, on its device.
        share: of the layers' weights that all factors together may have, above 0 and below 1.
        patterns: see `find_targets`.
        img_size: see `find_targets`.
        is_first: whether this rank makes the factors; their last bits depend on the machine.
        from_first: sends the first rank's factors to every rank, on the CPU; None: there is one rank.
        say: prints a line about layers that stay whole.

    Returns:
        A line for the log with ranks and parameters.

    Raises:
        UserError: as for `find_targets`; or the share is too small for rank 1 of every layer.
    """
    targets = find_targets(model, patterns, img_size=img_size, flag=_TARGETS, say=say)
    costs = costs_alone({name: layer.weight for name, layer in targets.items()})
    ranks = _ranks(costs, share)
    made = None
    if is_first:
        shown = terminal.Steady(len(ranks), say)

        def progress(done: int) -> None:
            beat()
            shown.tell(done, "initial weights factorised: layer", every_s=_LINE_EVERY_S)

        made = {name: _on_host(one) for name, one in make_factors(model, ranks, progress=progress).items()}
    if from_first:
        made = from_first(made)
    assert made is not None, "the first rank makes the factors"
    factorise(model, made)
    return f"--lowrank-init {share:g}: {_in_words(costs, ranks)}"


def check_share(model: nn.Module, share: float, patterns: str) -> None:
    """Raise `UserError` if no layer can be factorised, or the share is too small for rank 1 of every layer.

    The model needs no weights yet; `start_in_factors` makes the checks that need them.
    """
    _ranks(costs_alone(possible_weights(model, patterns, _TARGETS, "factors")), share)


def start_with_adapters(
    model: nn.Module,
    rank: int,
    alpha: float | None,
    dropout: float,
    patterns: str,
    *,
    img_size: int | None = None,
    say: Say = terminal.say,
) -> None:
    """Add LoRA adapters to the layers that the patterns name, in place; freeze everything else but the classifier.

    Args:
        model: with the weights to fine-tune, on its device.
        rank: of the adapters.
        alpha: see `model.lora`; None: the rank.
        dropout: see `add_adapters`.
        patterns: see `find_targets`.
        img_size: see `find_targets`.
        say: prints a line about layers that get no adapter.

    Raises:
        UserError: as for `find_targets` and `check_adapters`.
    """
    layers = find_targets(model, patterns, img_size=img_size, flag=_TARGETS, purpose="adapters", say=say)
    _check_rank(model, {name: layer.weight for name, layer in layers.items()}, rank)
    add_adapters(model, Lora(rank, rank if alpha is None else alpha, tuple(layers)), dropout)


def check_adapters(model: nn.Module, rank: int, patterns: str) -> None:
    """Raise `UserError` if the patterns match no Linear, or name the classifier, or the rank is too large, or PEFT is
    missing.

    The model needs no weights yet.
    """
    require_peft()
    _check_rank(model, possible_weights(model, patterns, _TARGETS, "adapters"), rank)


def adapters_in_words(model: nn.Module) -> list[str]:
    """A line for the log about what is trained in a model with adapters; no line without adapters."""
    lora = lora_of(model)
    if lora is None:
        return []
    of_adapters = sum(one.numel() for name, one in model.named_parameters() if ".lora_" in name)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in model.parameters()) - trained
    return [
        f"--lora {lora.rank}: adapters beside {len(lora.layers)} layers, scaled by {lora.scale:g}: {of_adapters:,} "
        f"parameters of the adapters and {trained - of_adapters:,} of the head are trained, {frozen:,} are frozen"
    ]


def _check_rank(model: nn.Module, weights: Mapping[str, Tensor], rank: int) -> None:
    heads = classifiers(model)
    for name, weight in weights.items():
        if name in heads:
            raise UserError(f"--lora: {name} is the classifier, which is trained whole. Leave it out of {_TARGETS}.")
        if weight.ndim == 2 and rank > min(weight.shape):
            rows, columns = weight.shape
            raise UserError(
                f"--lora {rank} is too large for {name}, {rows} x {columns}: its rank is {min(weight.shape)} at most. "
                f"Give a smaller rank, or other {_TARGETS}."
            )


def _ranks(costs: Costs, share: float) -> Ranks:
    check_share_of(f"--lowrank-init {share:g}", share, costs)
    return uniform(costs.layers, share, costs)


def _on_host(made: NewFactors) -> Factors:
    return made.up.cpu(), made.down.cpu(), None if made.bias is None else made.bias.cpu()


def _in_words(costs: Costs, ranks: Ranks) -> str:
    whole, now = costs.count({}), costs.count(ranks)
    low, high = min(ranks.values()), max(ranks.values())
    left = len(costs.layers) - len(ranks)
    return (
        f"{len(ranks)} layers factorised at rank {low if low == high else f'{low} to {high}'}"
        f"{f', {left} whole' if left else ''}: {now:,} of their {whole:,} parameters ({now / whole:.1%})"
    )
