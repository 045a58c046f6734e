"""What a run has in the place of whole layers from its first update: factors of them, or adapters beside them."""

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
    """Put the layers that the patterns name in factors that have this share of their parameters, in place.

    Spectral initialisation (Khodak et al., "Initialization and Regularization of Factorized Neural Layers", ICLR 2021):
    the truncated SVD of each weight as it is, its values shared out evenly. All layers keep the same share, as far as
    whole ranks go. Nothing is drawn, so a run of the same seed without factors begins with the very matrices that
    these are the best approximations of.

    Args:
        model: as it begins, on its device.
        share: of the layers' weights that their factors may have together, above 0 and below 1.
        patterns: see `find_targets`.
        img_size: likewise.
        is_first: whether this rank makes the factors, whose last bits depend on the machine.
        from_first: gives every rank those of the first, on the CPU; None: there is one rank.
        say: is told of layers that are left as they are.

    Returns:
        Ranks and parameters, in a line for the log.

    Raises:
        UserError: as `find_targets`; the share has no room for rank 1 of every layer.
    """
    targets = find_targets(model, patterns, img_size=img_size, flag=_TARGETS, say=say)
    costs = costs_alone({name: layer.weight for name, layer in targets.items()})
    ranks = _ranks(costs, share)
    made = None
    if is_first:
        shown = terminal.Steady(len(ranks), say)

        def progress(done: int) -> None:
            beat()
            shown.tell(done, "first weights put in factors: layer", every_s=_LINE_EVERY_S)

        made = {name: _on_host(one) for name, one in make_factors(model, ranks, progress=progress).items()}
    if from_first:
        made = from_first(made)
    assert made is not None, "the first rank makes them"
    factorise(model, made)
    return f"--lowrank-init {share:g}: {_in_words(costs, ranks)}"


def check_share(model: nn.Module, share: float, patterns: str) -> None:
    """Raise `UserError` where the patterns match nothing that may be put in factors, or there is no room for rank 1.

    For a model as it is built: what else `start_in_factors` refuses, its weights must tell.
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
    """Give the layers that the patterns name LoRA's adapters, in place, and freeze all but these and the classifier.

    Args:
        model: with the weights that are to be tuned, on its device.
        rank: of the adapters.
        alpha: see `model.lora`; None: the rank.
        dropout: see `add_adapters`.
        patterns: see `find_targets`.
        img_size: likewise.
        say: is told of layers that are left without.

    Raises:
        UserError: as `find_targets` and `check_adapters`.
    """
    layers = find_targets(model, patterns, img_size=img_size, flag=_TARGETS, purpose="adapters", say=say)
    _check_rank(model, {name: layer.weight for name, layer in layers.items()}, rank)
    add_adapters(model, Lora(rank, rank if alpha is None else alpha, tuple(layers)), dropout)


def check_adapters(model: nn.Module, rank: int, patterns: str) -> None:
    """Raise `UserError` where the patterns match no Linear, the rank is above a matrix, or PEFT is missing.

    So for the classifier, which is trained whole. For a model as it is built.
    """
    require_peft()
    _check_rank(model, possible_weights(model, patterns, _TARGETS, "adapters"), rank)


def adapters_in_words(model: nn.Module) -> list[str]:
    """What is trained of a model with adapters, in a line for the log; none without adapters."""
    lora = lora_of(model)
    if lora is None:
        return []
    of_adapters = sum(one.numel() for name, one in model.named_parameters() if ".lora_" in name)
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    frozen = sum(one.numel() for one in model.parameters()) - trained
    return [
        f"--lora {lora.rank}: adapters beside {len(lora.layers)} layers, times {lora.scale:g}: {of_adapters:,} "
        f"parameters of theirs and {trained - of_adapters:,} of the head are trained, {frozen:,} stay as they are"
    ]


def _check_rank(model: nn.Module, weights: Mapping[str, Tensor], rank: int) -> None:
    heads = classifiers(model)
    for name, weight in weights.items():
        if name in heads:
            raise UserError(f"--lora: {name} is the classifier, which is trained whole. Leave it out of {_TARGETS}.")
        if weight.ndim == 2 and rank > min(weight.shape):
            rows, columns = weight.shape
            raise UserError(
                f"--lora {rank} is above the rank of {name}, {rows} x {columns}: {min(weight.shape)} at most. Give a "
                f"smaller rank, or other {_TARGETS}."
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
        f"{len(ranks)} layers in factors of rank {low if low == high else f'{low} to {high}'}"
        f"{f', {left} whole' if left else ''}: {now:,} of their {whole:,} parameters ({now / whole:.1%})"
    )
