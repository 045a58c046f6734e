"""Deal the samples of an update, a global batch, out to ranks and accumulation steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lowrank_vit.common.errors import UserError

_ROUND = 256
_MANY_RANKS = 8
"""An error names numbers of ranks up to this, or up to twice the present one."""


@dataclass(frozen=True)
class Dealing:
    """Which samples of a global batch of G make up which of S batches of B, or of some of them; as in every update."""

    positions: np.ndarray
    """int64 (S, B), each of 0 to G - 1 once in all: places in the epoch's order, counted from the update's first."""
    blocks: np.ndarray
    """int64 (S, B): the mixing block that each sample belongs to."""
    num_blocks: int
    is_alone: np.ndarray
    """bool (S, B): samples that have no partner, though they mirror another one in their batch."""


def deal(global_batch: int, batch_size: int, block: int, own: slice = slice(None)) -> Dealing:
    """Deal G samples out to batches so that partners share a batch and mirror each other in it.

    Each `block` of consecutive samples (0: all) is mirrored in itself: in a block of M samples, i and M - 1 - i are
    partners. The last block may be shorter; the middle sample of an odd block is alone. Partners do not depend on
    `batch_size` as long as that is even, or as every batch can have the middle of a block in its own middle; else
    batches are consecutive samples, each batch mirrored in itself. `own`: deal only these.
    """
    slots, half, is_odd = global_batch // batch_size, batch_size // 2, batch_size % 2
    some = range(slots)[own]
    slots_S1 = np.arange(some.start, some.stop, some.step)[:, None]
    blocks = _Blocks.of(global_batch, block)
    if not _keeps_partners(batch_size, slots, blocks.num_middles):
        positions, first_alone = slots_S1 * batch_size + np.arange(batch_size), blocks.num_middles
    else:
        first_alone = slots * is_odd
        first, partner = blocks.pairs(slots_S1 * half + np.arange(half), first_alone)
        positions = np.concatenate([first, blocks.middles(slots_S1)[:, :is_odd], partner[:, ::-1]], axis=1)
    is_alone = blocks.are_middles(positions, first_alone)
    return Dealing(positions, positions // blocks.size, -(-global_batch // blocks.size), is_alone)


@dataclass(frozen=True)
class _Blocks:
    """Blocks of `size` samples, of which `whole` are whole, and one of `rest` behind them unless that is 0."""

    size: int
    whole: int
    rest: int

    @classmethod
    def of(cls, global_batch: int, block: int) -> _Blocks:
        size = min(block or global_batch, global_batch)
        return cls(size, *divmod(global_batch, size))

    @property
    def num_middles(self) -> int:
        """Blocks that have a middle sample."""
        return self.whole * (self.size % 2) + self.rest % 2

    def pairs(self, numbers: np.ndarray, first_alone: int) -> tuple[np.ndarray, np.ndarray]:
        """Both samples of each pair: those of the blocks in turn, then middle ones from `first_alone` on, by two."""
        each = self.size // 2
        blocks = np.minimum(numbers // max(1, each), self.whole)
        begin, inside = blocks * self.size, numbers - blocks * each
        mirrored = begin + self._sizes(blocks) - 1 - inside
        rest = numbers - (self.whole * each + self.rest // 2)
        middle = first_alone + 2 * rest
        is_rest = rest >= 0
        first = np.where(is_rest, self.middles(middle), begin + inside)
        return first, np.where(is_rest, self.middles(middle + 1), mirrored)

    def middles(self, numbers: np.ndarray) -> np.ndarray:
        """The middle samples of these numbers, counted over the blocks that have one."""
        blocks = numbers + self._first_with_middle
        return blocks * self.size + self._sizes(blocks) // 2

    def are_middles(self, positions: np.ndarray, first: int) -> np.ndarray:
        """Whether each sample is a middle one, from number `first` on."""
        blocks = positions // self.size
        is_middle = 2 * (positions - blocks * self.size) + 1 == self._sizes(blocks)
        return is_middle & (blocks - self._first_with_middle >= first)

    @property
    def _first_with_middle(self) -> int:
        return 0 if self.size % 2 else self.whole

    def _sizes(self, blocks: np.ndarray) -> np.ndarray:
        return np.where(blocks < self.whole, self.size, self.rest)


def dealt_repeats(update: int, global_batch: int, positions: np.ndarray, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of an update's samples in the epoch's order, and each one's repetition, from 0: int64 (B,) each.

    Each sample of the order comes `repeats` times in a row (Hoffer et al., "Augment your batch", CVPR 2020), and an
    update takes the next G of these. Its first positions have the first repetitions, and so on: repetitions of a sample
    are in different batches if there are enough, as timm deals them to different processes.
    """
    begin, each = update * global_batch, np.arange(repeats)
    first = begin + (each - begin) % repeats
    counts = (begin + global_batch - first + repeats - 1) // repeats
    ends = np.cumsum(counts)
    repetition = np.searchsorted(ends, positions, side="right")
    return (first + (counts - ends) * repeats)[repetition] // repeats + positions, repetition


def length_of_epoch(num_samples: int, repeats: int) -> int:
    """Samples in an epoch: all, or if they are repeated a multiple of 256, as in timm's `RepeatAugSampler`."""
    return num_samples if repeats == 1 else num_samples // _ROUND * _ROUND or num_samples


def check_global_batch(
    num_samples: int,
    batch_size: int,
    world_size: int,
    accum_steps: int,
    names: tuple[str, str] = ("batch_size=", "accum_steps"),
) -> None:
    """Raise `UserError` if a set is smaller than a global batch. `names`: those of the arguments, or of their flags."""
    if (global_batch := batch_size * world_size * accum_steps) <= num_samples:
        return
    most = num_samples // (world_size * accum_steps)
    advice = f"{names[0]}{most} or less" if most else f"fewer {names[1]} than {accum_steps}, or ranks"
    raise UserError(
        f"The global batch of {global_batch} is larger than the training set of {num_samples} samples, "
        f"which leaves no whole batch. Use {advice}."
    )


def split(global_batch: int, largest: int, ranks: int, block: int | None) -> tuple[int, int]:
    """Batch size and accumulation steps of `ranks` that make up an update of G samples, with the fewest steps.

    Batches have at most `largest` samples. `block`: as for `deal`, if samples are mixed, so that each keeps its partner
    whatever the ranks; None: nothing is mixed. Raises `UserError` that names the numbers of ranks that fit.
    """
    if steps := _fewest_steps(global_batch, largest, ranks, block):
        return global_batch // (ranks * steps), steps
    most = max(_MANY_RANKS, 2 * ranks)
    fitting = [str(n) for n in range(1, most + 1) if _fewest_steps(global_batch, largest, n, block)]
    of_what = "" if block is None else " of whole pairs, since images are mixed two by two,"
    raise UserError(
        f"--global-batch-size {global_batch} does not fit {ranks} rank{'s' if ranks > 1 else ''}: an update needs the "
        f"same number of equal batches{of_what} on each, of at most --batch-size {largest} images. It fits "
        f"{', '.join(fitting) or 'no number of'} ranks (of 1 to {most})."
    )


def _fewest_steps(global_batch: int, largest: int, ranks: int, block: int | None) -> int:
    """The fewest accumulation steps of `split`; 0 if no number fits."""
    own, rest = divmod(global_batch, ranks)
    if rest:
        return 0
    middles = None if block is None else _Blocks.of(global_batch, block).num_middles
    for steps in range(-(-own // largest), own + 1):
        if own % steps == 0 and (middles is None or _keeps_partners(own // steps, ranks * steps, middles)):
            return steps
    return 0


def _keeps_partners(batch_size: int, slots: int, num_middles: int) -> bool:
    """Whether partners of a block can share a batch; else each batch is mirrored in itself."""
    return batch_size % 2 == 0 or num_middles >= slots
