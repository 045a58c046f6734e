"""The plan: every random choice about the data, as a pure function of (seed, epoch, sample id or step).

Order, crop windows, flips, image operations, erased boxes and mixing come from Philox4x32-10 with the seed as key and
the counter `(draw, sample id or step, epoch, stream)`. The plan knows each image's size from the index, so that nothing
has to be decoded first; decoders, ranks, worker counts and restarts cannot change what it says. Nothing else in the
project draws a random number about the data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numba import njit

from lowrank_vit.common.arguments import ABOVE_0, check_number, check_type, check_whole, wrong_argument
from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import BICUBIC, BILINEAR
from lowrank_vit.plan.arguments import EPOCHS, SEEDS, Sizes, check_batch, check_share, check_step, sides_of
from lowrank_vit.plan.dealing import check_global_batch, deal, dealt_repeats, length_of_epoch
from lowrank_vit.plan.mixing import NO_MIX, Mix, MixRules, draw_mixes
from lowrank_vit.plan.operations import ImageOps, draw_jitter, draw_ops, join_ops
from lowrank_vit.plan.order import Order, OrderName
from lowrank_vit.plan.philox import LAST_ID, Stream, counter_of, philox, to_unit
from lowrank_vit.plan.rectangles import CenterCrops, Erase, center_crops, center_windows, crop_windows, draw_erase_boxes
from lowrank_vit.plan.rules import TrainRules


@dataclass(frozen=True)
class BatchPlan:
    """One rank's batch of B samples: which they are, and how they are cropped and augmented."""

    epoch: int
    step: int
    ids: np.ndarray
    """int64 (B,), sample numbers in the `.beton`."""
    windows: np.ndarray
    """int32 (B, 4): top, left, height, width of the crop, in pixels of the stored image (rounded where `center` is)."""
    flips: np.ndarray
    """bool (B,): mirror left and right after resizing."""
    interpolations: np.ndarray
    """int8 (B,): NEAREST, BILINEAR or BICUBIC resizing."""
    mix: tuple[Mix, ...]
    """One for the whole batch, or one for each sample; samples of a block share one object."""
    vflips: np.ndarray | None = None
    """bool (B,): turn upside down; None: nothing to turn."""
    ops: ImageOps | None = None
    """Operations on uint8 pixels, after the flips; None: nothing to do."""
    erase: Erase | None = None
    """Rectangles to erase after normalising; None: nothing to erase."""
    center: CenterCrops | None = None
    """Evaluation: the crops of `windows`, exact to fractions of a pixel; None: stretch `windows` to the size."""


class TrainPlan:
    """The shuffled, cropped, flipped and mixed training stream; whole global batches only (the tail is dropped).

    A global batch is dealt out to S slots, one for each of the `accum_steps` batches of each rank. Two samples that
    mirror each other in their mixing block are in one slot and mirror each other there (`deal`). So mixing a batch with
    its own reverse pairs the same samples whatever the ranks and the accumulation, if the batch size is even.

    Example:
        >>> plan = TrainPlan.of(Beton("train.beton"), img_size=32, batch_size=8, aa="rand-m9-mstd0.5-inc1", mixup=0.8)
        >>> batch = plan.batch(epoch=0, step=1, ids=plan.ids(0)[1])
        >>> batch.ids.shape, batch.windows.shape, batch.flips.dtype
        ((8,), (8, 4), dtype('bool'))
    """

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        rules: TrainRules,
        *,
        seed: int,
        img_size: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        accum_steps: int = 1,
    ) -> None:
        """`heights`, `widths`: int (N,), pixels; `batch_size`: samples per step and rank. Raises `UserError`.

        `accum_steps`: steps per update. See `of` for a `Beton`.
        """
        check_whole(SEEDS, seed=seed)
        check_whole(accum_steps=accum_steps)
        check_share(img_size, batch_size, rank, world_size)
        self.heights, self.widths = heights, widths
        self.num_samples = len(heights)
        self.rules, self.img_size = rules, img_size
        self.batch_size, self.rank, self.world_size, self.accum_steps = batch_size, rank, world_size, accum_steps
        self.seed, self._key = seed, np.uint64(seed)
        self.global_batch = global_batch = batch_size * world_size * accum_steps
        epoch_length = length_of_epoch(self.num_samples, rules.repeats)
        check_global_batch(epoch_length, batch_size, world_size, accum_steps)
        if self.num_samples >= 2**32:
            raise UserError(f"{self.num_samples} samples are more than the plan can number (2**32 - 1).")
        block = rules.mixing.block if rules.mixing.is_on else 0
        dealing = deal(global_batch, batch_size, block, slice(rank, None, world_size))
        self._num_blocks, self._positions_AB = dealing.num_blocks, dealing.positions
        self._blocks_AB, self._is_alone_AB = dealing.blocks, dealing.is_alone
        self._order_of_epoch: tuple[int, Order] | None = None
        has_one_draw = not self._is_alone_AB.any() and bool((self._blocks_AB == self._blocks_AB[:, :1]).all())
        self._mixes_batches = rules.mixing.mode == "batch" and has_one_draw
        self.updates_per_epoch = epoch_length // global_batch
        self.steps_per_epoch = self.updates_per_epoch * accum_steps

    @classmethod
    def of(
        cls,
        images: Sizes,
        *,
        img_size: int,
        batch_size: int,
        seed: int = 42,
        aa: str = "none",
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        reprob: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        rank: int = 0,
        world_size: int = 1,
        accum_steps: int = 1,
        order: OrderName = "keyed",
        repeats: int = 1,
    ) -> TrainPlan:
        """The plan for a `Beton`, with timm's names for random choices; `TrainRules` has all. Raises `UserError`.

        `aa`: timm's policy, e.g. "rand-m9-mstd0.5-inc1"; `scale`, `ratio`: of random resized crops; `hflip`, `reprob`:
        probabilities; `mixup`, `cutmix`: alpha, 0 for none; `order`: sorted for the stream of earlier versions, which
        differs for more than 65,536 samples; `repeats`: timm's --aug-repeats.
        """
        from lowrank_vit.plan.operations import parse_policy  # imports timm

        sides = sides_of(images)
        check_type(str, "a text such as rand-m9-mstd0.5-inc1, or none", aa=aa)
        mixing = MixRules(mixup=mixup, cutmix=cutmix)
        if mixing.is_on and batch_size == 1:
            raise UserError("mixup and cutmix mix an image with another one of its batch: batch_size=1 has none.")
        policy = parse_policy(aa, "aa=")
        rules = TrainRules(
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            policy=policy,
            reprob=reprob,
            mixing=mixing,
            order=order,
            repeats=repeats,
        )
        share = {"rank": rank, "world_size": world_size, "accum_steps": accum_steps}
        return cls(*sides, rules, seed=seed, img_size=img_size, batch_size=batch_size, **share)

    def order(self, epoch: int) -> np.ndarray:
        """int64 (N,): the permutation of all sample ids for this epoch, the same on every rank."""
        return self._order(epoch).at(np.arange(self.num_samples))

    def ids(self, epoch: int) -> np.ndarray:
        """int64 (steps, batch_size): this rank's share of the epoch's order, `accum_steps` rows per update."""
        check_whole(EPOCHS, epoch=epoch)
        order, slots, repeats = self._order(epoch), self._positions_AB, self.rules.repeats
        if repeats == 1:  # the same as `dealt_repeats`, for all updates at once
            firsts = np.arange(self.updates_per_epoch)[:, None, None] * self.global_batch
            return order.at(firsts + slots).reshape(-1, self.batch_size)
        return np.stack([order.at(self._dealt(step)[0]) for step in range(self.steps_per_epoch)])

    def step_ids(self, epoch: int, step: int, without: Collection[int] = ()) -> np.ndarray:
        """int64 (batch_size,): row `step` of `ids(epoch)`, in a time that does not depend on the set's size.

        `without`: samples to leave out. Each is replaced by the next one in the epoch's order, of all ranks, so the
        result depends on neither ranks nor batches. Raises `UserError` for a step that does not exist.
        """
        check_step(self, epoch, step)
        return self._order(epoch).without(without, self._dealt(step)[0])

    def _order(self, epoch: int) -> Order:
        """The epoch's order, which is kept, since sorting takes all samples."""
        kept = self._order_of_epoch
        if kept is None or kept[0] != epoch:
            order = Order.of(self._key, self.num_samples, epoch, Stream.ORDER, self.rules.order)
            self._order_of_epoch = kept = epoch, order
        return kept[1]

    def _dealt(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 (B,) each: places of a batch's samples in the epoch's order, and each one's repetition."""
        update, slot = divmod(step, self.accum_steps)
        return dealt_repeats(update, self.global_batch, self._positions_AB[slot], self.rules.repeats)

    def windows(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """int32 (B, 4), top, left, height, width: RandomResizedCrop of torchvision and timm for each id.

        As elsewhere in this class, ids may contain the number of a repetition, see `counter_of`.
        """
        numbers, rules = ids.astype(np.int64, copy=False) & LAST_ID, self.rules
        heights, widths = self.heights[numbers].astype(np.int64), self.widths[numbers].astype(np.int64)
        if not rules.is_cropped:
            corner = np.zeros(len(ids), np.int64)
            return np.stack([corner, corner, heights, widths], axis=1).astype(np.int32)
        return crop_windows(self._key, epoch, Stream.CROP, ids, heights, widths, *rules.scale, *rules.ratio)

    def flips(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """Bool (B,): whether each sample is mirrored in this epoch."""
        return _flips(self._key, epoch, ids, self.rules.hflip, Stream.FLIP)

    def interpolations(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """int8 (B,): the interpolation with which each crop is resized."""
        if self.rules.interpolation is not None:
            return np.full(len(ids), self.rules.interpolation, np.int8)
        return np.where(_flips(self._key, epoch, ids, 0.5, Stream.INTERPOLATION), BILINEAR, BICUBIC).astype(np.int8)

    def mix(self, epoch: int, step: int, ids: np.ndarray) -> tuple[Mix, ...]:
        """Mixup or cutmix in timm's `batch` mode (a draw for each block of the global batch), `pair` or `elem` mode.

        A sample's partner mirrors it in its block; in `pair` mode both share one draw. Returns one for the whole batch
        if in `batch` mode each batch of this rank is in one block, else one per sample, the same way in every step.
        """
        rules, key, slot = self.rules.mixing, self._key, step % self.accum_steps
        is_off = self.rules.mixup_off_epoch and epoch >= self.rules.mixup_off_epoch
        if is_off or not rules.is_on:
            return (NO_MIX,) * (1 if self._mixes_batches else len(ids))
        if rules.mode == "batch":
            blocks, first = self._blocks_AB[slot], step // self.accum_steps * self._num_blocks
            own = np.unique(blocks)
            draws = draw_mixes(rules, self.img_size, key, epoch, first + own, Stream.MIX)
            if self._mixes_batches:
                return draws
            mixes = tuple(draws[n] for n in np.searchsorted(own, blocks))
        else:
            drawn = ids if rules.mode == "elem" else ids[: len(ids) // 2]
            mixes = draw_mixes(rules, self.img_size, key, epoch, drawn, Stream.MIX_SAMPLE)
            if rules.mode == "pair":
                mixes += (NO_MIX,) * (len(ids) % 2) + mixes[::-1]
        is_alone = self._is_alone_AB[slot]
        if not is_alone.any():
            return mixes
        return tuple(NO_MIX if alone else mix for alone, mix in zip(is_alone, mixes, strict=True))

    def ops(self, epoch: int, ids: np.ndarray) -> ImageOps | None:
        """The operations of the policy, then colour jitter, for each id."""
        rules, parts = self.rules, []
        if rules.policy is not None:
            parts.append(draw_ops(rules.policy, rules.interpolation, self.img_size, self._key, epoch, ids, Stream.OPS))
        if rules.color_jitter is not None:
            parts.append(draw_jitter(rules.color_jitter, self._key, epoch, ids, Stream.JITTER))
        return join_ops(parts)

    def erase(self, epoch: int, ids: np.ndarray) -> Erase | None:
        """Random erasing's boxes for each id."""
        rules, size = self.rules, self.img_size
        if rules.reprob == 0:
            return None
        return Erase(*draw_erase_boxes(self._key, epoch, ids, Stream.ERASE, rules.reprob, rules.recount, size, size))

    def batch(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan:
        """The batch whose ids are row `step` of `ids(epoch)`. Raises `UserError` for ids that do not exist."""
        check_batch(self, epoch, step, ids)
        drawn = ids = ids.astype(np.int64, copy=False)
        if self.rules.repeats > 1:
            if len(ids) != self.batch_size:
                raise wrong_argument("ids", f"the {self.batch_size} of a batch, since samples are repeated", ids)
            drawn = ids + (self._dealt(step)[1] << 32)
        return BatchPlan(
            epoch,
            step,
            ids,
            self.windows(epoch, drawn),
            self.flips(epoch, drawn),
            self.interpolations(epoch, drawn),
            self.mix(epoch, step, drawn),
            _flips(self._key, epoch, drawn, self.rules.vflip, Stream.VFLIP) if self.rules.vflip > 0 else None,
            self.ops(epoch, drawn),
            self.erase(epoch, drawn),
        )


class EvalPlan:
    """Every sample exactly once, in file order, centre-cropped; the last batch may be short.

    Example:
        >>> plan = EvalPlan.of(Beton("val.beton"), img_size=32, batch_size=8)
        >>> plan.steps_per_epoch, [len(ids) for ids in plan.ids(0)]
        (2, [8, 4])
    """

    def __init__(
        self,
        heights: np.ndarray,
        widths: np.ndarray,
        *,
        img_size: int,
        crop_pct: float,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        interpolation: int = BICUBIC,
        samples: np.ndarray | None = None,
    ) -> None:
        """`interpolation`: how images are resized, NEAREST, BILINEAR or BICUBIC; `samples`: their ids, if not all."""
        check_share(img_size, batch_size, rank, world_size)
        check_number(ABOVE_0, crop_pct=crop_pct)
        self.heights, self.widths, self._interpolation = heights, widths, interpolation
        self.num_samples, self.batch_size, self.img_size, self.rank = len(heights), batch_size, img_size, rank
        self._crop_pct, self._samples = crop_pct, samples
        each, rest = divmod(len(heights) if samples is None else len(samples), world_size)
        self._first = rank * each + min(rank, rest)
        self._end = self._first + each + (rank < rest)
        """First and end of this rank's share, in the order of the file."""
        self.steps_per_epoch = -(-(self._end - self._first) // batch_size)

    @classmethod
    def of(
        cls,
        images: Sizes,
        *,
        img_size: int,
        batch_size: int,
        crop_pct: float = 0.875,
        rank: int = 0,
        world_size: int = 1,
    ) -> EvalPlan:
        """The plan for a `Beton`; `crop_pct`: the centre crop as a share of the short side, timm's default."""
        return cls(
            *sides_of(images),
            img_size=img_size,
            crop_pct=crop_pct,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )

    def ids(self, epoch: int) -> list[np.ndarray]:
        """This rank's batches of ids, int64 (B,) each; the same in every epoch."""
        check_whole(EPOCHS, epoch=epoch)
        return [self.step_ids(epoch, step) for step in range(self.steps_per_epoch)]

    def step_ids(self, epoch: int, step: int, without: Collection[int] = ()) -> np.ndarray:
        """Batch `step` of `ids(epoch)`, int64 (B,), without the samples in `without`."""
        check_step(self, epoch, step)
        first = self._first + step * self.batch_size
        end = min(first + self.batch_size, self._end)
        ids = np.arange(first, end) if self._samples is None else self._samples[first:end]
        return ids[~np.isin(ids, np.fromiter(without, np.int64, len(without)))] if len(without) else ids

    def batch(self, epoch: int, step: int, ids: np.ndarray) -> BatchPlan:
        """The centre crops of `ids`, unmirrored and unmixed. Raises `UserError` for ids that do not exist."""
        check_batch(self, epoch, step, ids)
        heights, widths = self.heights[ids].astype(np.int64), self.widths[ids].astype(np.int64)
        resized, corners = center_crops(heights, widths, self.img_size, self._crop_pct)
        windows = center_windows(heights, widths, resized, corners, self.img_size)
        flips, interpolations = np.zeros(len(ids), bool), np.full(len(ids), self._interpolation, np.int8)
        center = CenterCrops(resized, corners)
        return BatchPlan(epoch, step, ids, windows, flips, interpolations, (NO_MIX,), center=center)


@njit(cache=True)
def _flips(key: np.uint64, epoch: int, ids: np.ndarray, probability: float, stream: int) -> np.ndarray:
    flips = np.empty(len(ids), np.bool_)
    for n in range(len(ids)):
        id_, use = counter_of(ids[n], stream)
        flips[n] = to_unit(philox(key, 0, id_, epoch, use)[0]) < probability
    return flips
