"""Training that becomes low-rank: waits for complete refreshes, decides alike on every rank, and switches.

Nothing here depends on the speed of a worker. The complete refresh of update u is waited for at update v, when the next
refresh is due, and its results act there. The switch belongs to update v, and so to every checkpoint of it. A switch by
--lowrank-schedule belongs to its epoch's first update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.low_rank_options import LowRank, parse_schedule
from lowrank_vit.lowrank.allocation import Ranks
from lowrank_vit.lowrank.layers import Costs
from lowrank_vit.lowrank.switching.change import Made
from lowrank_vit.lowrank.switching.decision import Decision, decide, enough, share_of_due
from lowrank_vit.lowrank.switching.planner import Calibration, Measured, Planner
from lowrank_vit.lowrank.switching.switch import prepare, work_out
from lowrank_vit.lowrank.switching.verdict import Settling, Verdict, is_near
from lowrank_vit.model.low_rank import ranks_of
from lowrank_vit.ranks.world import World
from lowrank_vit.run.metrics import Event

T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """The updates at which a switch can happen."""

    full_every: int
    """Updates between two complete refreshes."""
    last_update: int
    """The last update of the run."""


@dataclass
class LowRankTraining:
    """The switches of one run. Every rank has one and makes the same calls, except `see`.

    `see` is called in the monitor's thread, all other methods in the main thread. At an update with a due refresh,
    `at_refresh` is called before the weights are copied; before an epoch's first update, `at_epoch`. Both return
    whether the model has changed. `wait` must have been called before a state is saved or inspected.
    """

    options: LowRank
    model: nn.Module
    ema: ModelEmaV3 | None
    optimizer: Optimizer
    scheduler: Any
    costs: Costs
    """Costs of the targets alone."""
    settling: Settling
    planner: Planner
    span: Span
    world: World
    rebuild: Callable[[], object]
    """Called after a switch, to rebuild what depends on the model's parameters."""
    wait: Callable[[], object] = lambda: None
    """Waits until the monitor's worker has finished its work."""
    _events: list[Event] = field(default_factory=list[Event])
    _num_switches: int = 0
    _ranks: Ranks = field(default_factory=Ranks)
    """Ranks of the factorised layers, or in a dry run of those that would be."""
    _seen: int = -1
    """The update of the latest complete refresh that was judged."""
    _decided: int = -1
    """The update of the latest refresh that was decided on."""
    _wanted: Ranks | None = None
    """kfac: the ranks at which directions are judged."""
    _chosen: int = -1
    """kfac: the update at which these ranks were chosen."""
    _failure: str = ""
    """Why the latest refresh could not be judged; empty if it could."""
    _shown: frozenset[str] | None = None
    """The layers that this rank sees. None: it has seen none yet, and knows what a checkpoint says of all."""

    def __post_init__(self) -> None:
        self.schedule = parse_schedule(self.options.lowrank_schedule)
        self._ranks = {name: rank for name, rank in ranks_of(self.model).items() if name in self.costs.layers}

    def see(self, update: int, weights: Mapping[str, Tensor] | Exception) -> None:
        """Judge the weight copies of a complete refresh, or note why there are none; in the worker's thread.

        Repeated refreshes are ignored. So are those at other updates: they follow a resume without spectra, and an
        uninterrupted run does not have them.
        """
        if self._is_used_up or update <= max(self._seen, self._decided) or update % self.span.full_every:
            return
        try:
            if isinstance(weights, Exception):
                raise weights
            watched = {name: weight for name, weight in weights.items() if name in self.costs.layers}
            self._shown = frozenset(watched)
            in_factors = {} if self.options.lowrank_dry_run else self._ranks
            self.settling.see(update, watched, ranks=self._wanted, in_factors=in_factors)
            self._failure = ""
        except Exception as error:  # the refresh's own numbers are still good
            self._failure = _why(error)
        self._seen = update

    def at_refresh(self, update: int) -> bool:
        """Decide by the previous refresh, and prepare for the one that is due now. Returns whether the model has
        changed.

        Whether there is something to decide follows from the update alone, so the ranks communicate in step, even if
        the refresh failed on some of them.
        """
        self._wait_for_worker()
        is_changed, newest = False, (update - 1) // self.span.full_every * self.span.full_every
        if newest > self._decided and not self._is_used_up:
            self._decided = newest
            is_changed = self._act_on_evidence(update)
        is_seen_next = update % self.span.full_every == 0 and update > self._decided
        if is_seen_next and self.options.lowrank_train == "kfac" and self._may_switch(update):
            self._choose_in_turn(update)
        return is_changed

    def at_epoch(self, epoch: int, update: int) -> bool:
        """Switch if the schedule says so; `epoch` is 0-based, `update` counts the updates made so far."""
        budget = self.schedule.get(epoch)
        if budget is None:
            return False
        self._wait_for_worker()
        notes: list[str] = []

        def planned() -> tuple[Ranks, Calibration]:
            return self.planner.ranks(self.model, self.costs, budget, notes.append)

        found, failure = self._on_first(planned, send=lambda made: (made[0], None))
        if found is None:
            return self._leave_whole(update + 1, failure)
        ranks, moments = found
        self._events += [Event(update + 1, {"event": "note", "why": line}, f"note: {line}") for line in notes]
        ranks = {name: rank for name, rank in ranks.items() if rank < self._ranks.get(name, rank + 1)}
        if not ranks:
            return self._leave_whole(update + 1, f"a budget of {budget:g} makes no layer smaller")
        return self._switch(Decision(update + 1, ranks), update, moments, {"epoch": epoch, "budget": budget})

    def events(self) -> list[Event]:
        """What has happened since the last call, oldest first; empty on all ranks but the first."""
        events, self._events = self._events, []
        return events if self.world.is_first else []

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors for a checkpoint; all ranks must call it together, and get the same."""
        self._wait_for_worker()
        own = self.settling.state_dict()
        parts = self.world.gather((self._own(own["layers"]), own["update"], self._seen, self._failure))
        looks, seen = [one[2:] for one in parts], max(one[2] for one in parts)
        updates = [update for _, update, _, _ in parts if update is not None]
        layers = {name: layer for part, *_ in parts for name, layer in part.items()}
        return {
            "num_switches": self._num_switches,
            "ranks": dict(self._ranks),
            "seen": seen,
            "decided": self._decided,
            "wanted": self._wanted,
            "chosen": self._chosen,
            "failure": _failure_of(looks, seen),
            "settling": own | {"update": max(updates, default=None), "layers": layers},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the model must have the layers of that time."""
        self._num_switches, self._ranks = state["num_switches"], state["ranks"]
        self._wanted, self._chosen = state["wanted"], state["chosen"]
        self._seen, self._decided, self._failure = state["seen"], state["decided"], state["failure"]
        self.settling.load_state_dict(state["settling"])

    @property
    def _is_used_up(self) -> bool:
        """Whether settled layers have no effect any more, not even a line in the log."""
        return self._num_switches >= self.options.lowrank_switches and not self.schedule

    def _wait_for_worker(self) -> None:
        try:
            self.wait()
        except Exception as error:  # the worker has ended: tell the other ranks, so that they do not wait
            self._failure = _why(error)

    def _own(self, by_layer: Mapping[str, T]) -> dict[str, T]:
        """The part that this rank reports: the layers that it sees now, not those that it saw earlier."""
        return {name: one for name, one in by_layer.items() if self._shown is None or name in self._shown}

    def _may_switch(self, update: int) -> bool:
        left = self._num_switches < self.options.lowrank_switches
        return left and not self.schedule and update < self.span.last_update

    def _choose_in_turn(self, update: int) -> None:
        """kfac: choose ranks anew after as many complete refreshes as a layer needs to settle.

        More often would only cost time, since directions are judged at one rank in the meantime.
        """
        turn = (self.options.lowrank_settled + 1) * self.span.full_every
        if self._wanted is None or update >= self._chosen + turn:
            self._choose(update)

    def _choose(self, update: int) -> Calibration:
        """kfac: choose ranks by the current weights, or none if that fails. Returns the moments on the first rank."""

        def chosen() -> tuple[Ranks, Calibration]:
            return self.planner.ranks_beside(self.model, self.costs, self.options.lowrank_budget, self._ranks)

        found, failure = self._on_first(chosen, send=lambda made: (made[0], None))
        self._wanted, moments = found or (None, None)
        self._chosen = update
        if self._wanted is None:
            self._leave_whole(update, failure)
        else:
            self._events.append(Event(update, {"event": "ranks", "ranks": self._wanted}))
        return moments

    def _act_on_evidence(self, update: int) -> bool:
        gathered = self.world.gather((self._own(self.settling.verdicts()), self._seen, self._failure))
        newest = self._seen = self._decided
        if failure := _failure_of([one[1:] for one in gathered], newest):
            return self._leave_whole(update, f"the refresh at update {newest} could not be judged: {failure}")
        verdicts = {name: verdict for part, *_ in gathered for name, verdict in part.items()}
        evidence = {name: asdict(verdicts[name]) for name in self.costs.layers if name in verdicts}
        due = decide(verdicts, self._ranks, self.costs)
        share, needed = self._share_and_needed(due, update)
        about = {"event": "evidence", "seen": newest, "due": due, "share": share, "needed": needed}
        self._events.append(Event(update, about | {"layers": evidence}))
        if due and update >= self.span.last_update and not self.schedule:
            self._leave_whole(update, f"{len(due)} have settled, but no update is left to train their factors")
        if not due or not self._may_switch(update) or share < needed:
            return False
        moments = None
        if self.options.lowrank_train == "kfac":
            due, moments = self._due_as_chosen_now(verdicts, update)
            if not due or self._share_and_needed(due, update)[0] < needed:
                return False
        return self._switch(Decision(update, due, {name: evidence[name] for name in due}), update, moments, {})

    def _share_and_needed(self, due: Ranks, update: int) -> tuple[float, float]:
        """The share that is due of what could still be factorised, and the share that a switch needs; see `enough`."""
        switches_left = max(self.options.lowrank_switches - self._num_switches, 1)
        updates_left = max(1 - update / self.span.last_update, 0.0)
        needed = enough(self.options.lowrank_at_once, switches_left, updates_left)
        return share_of_due(due, self._ranks, self.costs), needed

    def _due_as_chosen_now(self, verdicts: Mapping[str, Verdict], update: int) -> tuple[Ranks, Calibration]:
        """kfac: what is due at ranks chosen by the current weights. These ranks also hold for later refreshes."""
        moments = self._choose(update)
        wanted = self._wanted or {}
        at_these = {
            name: replace(one, rank=rank, settled=one.settled and is_near(rank, one.rank))
            for name, one in verdicts.items()
            if (rank := wanted.get(name))
        }
        return decide(at_these, self._ranks, self.costs), moments

    def _switch(self, decision: Decision, done: int, moments: Calibration, about: dict[str, Any]) -> bool:
        """Factorise the layers of a decision, or in a dry run measure what that would give; returns whether it did.

        `done`: updates made so far; `moments`: of the current weights, if known.
        """
        found, failure = self._on_first(lambda: self._made(decision, moments))
        if found is None:
            return self._leave_whole(decision.update, failure)
        made, before, after = found
        is_dry = self.options.lowrank_dry_run
        if not is_dry:
            more: dict[str, Any] = {"moments": self.options.lowrank_moments, "decay": self.options.lowrank_decay}
            prepared, failure = self._on_each(lambda: prepare(*self._of_run, made, num_updates=done, **more))
            if prepared is None:
                return self._leave_whole(decision.update, failure)
            about["change"] = prepared.put().numbers()
            self.rebuild()
        was = {name: self._ranks.get(name) for name in decision.ranks}
        self._ranks |= decision.ranks
        self._num_switches += 1
        self.settling.forget(decision.ranks)
        self._tell(decision, was, before, after, about)
        return not is_dry

    def _made(self, decision: Decision, moments: Calibration) -> tuple[dict[str, Made], Measured, Measured]:
        """On the first rank: all tensors of a switch (none in a dry run), and the model measured before and after.

        In a dry run both measurements include the layers that would be factorised already.
        """
        factors, is_dry = self.planner.factors(self.model, decision.ranks, moments), self.options.lowrank_dry_run
        earlier = self.planner.factors(self.model, self._ranks, moments) if is_dry and self._ranks else {}
        before, after = (self.planner.measure(self.model, one) for one in (earlier, earlier | factors))
        if is_dry:
            return {}, before, after
        model, ema, optimizer, _ = self._of_run
        return work_out(model, ema, optimizer, factors, moments=self.options.lowrank_moments), before, after

    @property
    def _of_run(self) -> tuple[nn.Module, nn.Module | None, Optimizer, Any]:
        return self.model, self.ema.module if self.ema else None, self.optimizer, self.scheduler

    def _on_each(self, work: Callable[[], T]) -> tuple[T | None, str]:
        """What every rank makes for itself; or, if one of them fails, None on every rank, with the reason."""
        made, failure = None, ""
        try:
            made = work()
        except Exception as error:
            failure = _why(error)
        if failure := _first_of(self.world.gather(failure)):
            return None, failure
        return made, ""

    def _on_first(self, work: Callable[[], T], send: Callable[[T], Any] = lambda made: made) -> tuple[T | None, str]:
        """What the first rank makes, or None with the reason; other ranks get what `send` returns for it."""
        made, failure = None, ""
        if self.world.is_first:
            try:
                made = work()
            except Exception as error:  # whatever it is, training goes on with the current layers
                failure = _why(error)
        sent, failure = self.world.from_first((None if made is None else send(made), failure))
        return (made if self.world.is_first else sent), failure

    def _leave_whole(self, update: int, why: str) -> bool:
        line = f"warning: no layer is factorised at update {update}: {why.rstrip('.')}. Training goes on unchanged."
        self._events.append(Event(update, {"event": "refused", "why": why}, line))
        return False

    def _tell(
        self,
        decision: Decision,
        was: Mapping[str, int | None],
        before: Measured,
        after: Measured,
        about: dict[str, Any],
    ) -> None:
        is_dry, switches = self.options.lowrank_dry_run, self.options.lowrank_switches
        values = {
            "event": "dry-run" if is_dry else "switch",
            **about,
            "ranks": decision.ranks,
            "ranks_before": dict(was),
            **{f"{name}_before": value for name, value in before._asdict().items()},
            **after._asdict(),
            "share": self.costs.count(self._ranks) / self.costs.count({}),
            "layers": decision.evidence,
        }
        earlier = len(self._ranks.keys() - {name for name, rank in was.items() if rank is None}) if is_dry else 0
        self._events.append(Event(decision.update, values, _in_words(decision, was, before, after, is_dry, earlier)))
        if self._num_switches == switches and not self.schedule:
            line = f"low rank: this was switch {switches} of --lowrank-switches {switches}; layers stay as they are now"
            self._events.append(Event(decision.update, {"event": "used-up", "switches": switches}, line))


def _first_of(failures: Sequence[str]) -> str:
    """The failure of the lowest rank that has one; empty if none has."""
    return next((f"rank {n}: {why}" if n else why for n, why in enumerate(failures) if why), "")


def _failure_of(looks: Sequence[tuple[int, str]], update: int) -> str:
    """Why a rank has not judged the refresh of `update`; `looks`: each rank's latest refresh and its failure."""
    return _first_of([why or ("" if seen >= update else "nothing was seen of it") for seen, why in looks])


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".rstrip(": ")


def _in_words(
    decision: Decision,
    was: Mapping[str, int | None],
    before: Measured,
    after: Measured,
    is_dry: bool,
    earlier: int,
) -> str:
    """Lines of up to 80 characters; `earlier`: in a dry run, how many layers would be factorised already."""
    beside = f"\n  (with the {earlier} of earlier dry switches factorised)" if earlier else ""
    flops = ""
    if before.flops is not None and after.flops is not None:
        flops = f"{before.flops / 1e9:.3g} -> {after.flops / 1e9:.3g} GFLOP per image, "
    old = "full rank" if any(rank is None for rank in was.values()) else _span([rank or 0 for rank in was.values()])
    return (
        f"low rank{' (dry run)' if is_dry else ''} at update {decision.update}: {len(decision.ranks)} layers "
        f"{'would go ' if is_dry else ''}from {old} to {_span(list(decision.ranks.values()))}\n"
        f"  {before.parameters / 1e6:.3g} -> {after.parameters / 1e6:.3g} M parameters, {flops}"
        f"loss {before.loss:.4f} -> {after.loss:.4f}{beside}"
    )


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return f"rank {low}" if low == high else f"ranks {low} to {high}"
