"""Which layout the nodes that are left shall train in: pure, standard library only, so the operator may ask it.

Every allowed number of nodes is tried with every allowed pipeline and tensor degree. What does not fit is rejected with its reason; of what
is left, the one with the most steps in the time ahead wins, the way there included. Another tensor or pipeline degree must gain 5 percent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import product
from math import ceil, log2
from typing import TYPE_CHECKING, NamedTuple

from stormjib_checkpoint.sizing import Layout, memory_bytes, with_copies

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_checkpoint.sizing import Model

GAIN = 0.05
"""What another tensor or pipeline degree must gain over keeping them: it moves nearly all of the state."""


@dataclass(frozen=True)
class Machine:
    """What the ranks run on, and how often they break."""

    memory_bytes: int
    """Of one rank."""
    micro_batch_s: float = 1.0
    """For one micro-batch in the whole model, on one rank."""
    tp_loss: float = 0.05
    """Share of the time that each doubling of the tensor degree loses to communication."""
    peer_bytes_per_s: float = 1e9
    """Into one rank, from the memory of others."""
    store_bytes_per_s: float = 2e8
    """Into one rank, from the storage."""
    restart_s: float = 2.0
    """From the loss to the first byte that is moved."""
    lost_s: float = 0.0
    """Training that a fault undoes."""
    mtbf_s: float = 3600.0
    """Between two faults of the job."""
    measured: Mapping[Layout, float] = field(default_factory=dict)
    """Seconds of a step where they are known; they replace the estimate."""


@dataclass(frozen=True)
class Limits:
    """What the user allows."""

    sizes: tuple[int, ...]
    """Numbers of nodes: `nodes.allowedReplicas`."""
    pp: tuple[int, ...] = (1,)
    tp: tuple[int, ...] = (1,)
    replicate: int = 1
    """Wanted; the most are taken that divide the data ranks, are not above it and leave room in the memory."""
    horizon_s: float = 3600.0
    """How far ahead a decision looks."""


class Standing(NamedTuple):
    """What there was: a layout, and the ranks of it that live, in the order of their ranks to be. None: a rank that is new."""

    layout: Layout
    kept: tuple[int | None, ...]


class Action(StrEnum):
    """What is to be done."""

    STAY = "Stay"
    WAIT = "Wait"  # for a spare
    SHRINK = "Shrink"
    GROW = "Grow"
    RESHAPE = "Reshape"  # another tensor or pipeline degree


class Transition(NamedTuple):
    """What the way to a layout costs: bytes by source over all ranks, and seconds for the slowest one."""

    own: int
    peers: int
    store: int
    seconds: float


class Fit(NamedTuple):
    """A layout that there is room for."""

    nodes: int
    layout: Layout
    memory_bytes: int
    """Of the fullest rank."""


class Scored(NamedTuple):
    """A layout that fits, and what it brings."""

    nodes: int
    layout: Layout
    memory_bytes: int
    """Of the fullest rank."""
    step_s: float
    transition: Transition
    goodput: float
    """Steps in a second over the time ahead."""


class Rejected(NamedTuple):
    """A candidate and why it was not taken. `layout` has no data degree where the candidate fell before it had one."""

    nodes: int
    layout: Layout
    reason: str


class Choice(NamedTuple):
    """The answer. `best` is None where nothing fits."""

    action: Action
    best: Scored | None
    rejected: tuple[Rejected, ...]


def choose(
    model: Model,
    machine: Machine,
    limits: Limits,
    nodes: Sequence[int],
    before: Standing | None = None,
    spare_s: float | None = None,
) -> Choice:
    """The best layout on `nodes`, the ranks of each node that lives. `spare_s`: when a node would come that makes `before` whole again.

    Equal input gives the equal answer. Raises nothing: where no candidate fits, `best` is None and every reason is told.
    """
    fits, misfits = fitting(model, machine, limits, nodes)
    if not fits:
        return Choice(Action.WAIT, None, misfits)
    scored = [_scored(model, machine, limits, one, before) for one in fits]
    best = _settled(scored, before)
    rejected = [
        *misfits,
        *(Rejected(one.nodes, one.layout, _why_not(one, best)) for one in scored if one != best),
    ]
    if (
        before is not None
        and spare_s is not None
        and _waiting_pays(model, machine, limits, best, before, spare_s)
    ):
        rejected.append(Rejected(best.nodes, best.layout, f"a spare in {spare_s:g} s brings more"))
        return Choice(Action.WAIT, best, tuple(rejected))
    return Choice(_action(best.layout, before), best, tuple(rejected))


def table(
    model: Model, machine: Machine, limits: Limits, nodes: Sequence[int], losses: int
) -> tuple[Choice, ...]:
    """The answers for all of `nodes`, and after the loss of the smallest 1 … `losses` of them: made before anything breaks."""
    nodes = sorted(nodes, reverse=True)
    whole = choose(model, machine, limits, nodes)
    if whole.best is None:
        return (whole,)
    layout = whole.best.layout
    rows = [whole]
    for lost in range(1, min(losses, len(nodes) - 1) + 1):
        left = nodes[: len(nodes) - lost]
        standing = Standing(layout, tuple(range(min(sum(left), layout.world))))
        rows.append(choose(model, machine, limits, left, standing))
    return tuple(rows)


# --- what fits --------------------------------------------------------------------------------------------------------


def step_seconds(model: Model, machine: Machine, layout: Layout) -> float:
    """Measured, or estimated: micro-batches that do not divide evenly, bubbles of the pipeline and tensor exchange cost time."""
    if layout in machine.measured:
        return machine.measured[layout]
    rounds = ceil(model.micro_batches / layout.data)
    useful: float = (1 - machine.tp_loss) ** log2(layout.tp)
    one = machine.micro_batch_s / (layout.pp * layout.tp * useful)
    return (rounds + layout.pp - 1) * one


def fitting(
    model: Model, machine: Machine, limits: Limits, nodes: Sequence[int]
) -> tuple[tuple[Fit, ...], tuple[Rejected, ...]]:
    """What can be laid out and has room, and why the rest cannot or has not. `nodes`: the ranks of each that lives.

    Of each size, pipeline and tensor degree the layout with the most copies of a shard that there is room for.
    """
    nodes = sorted(nodes, reverse=True)
    degrees = product(sorted(set(limits.sizes), reverse=True), sorted(set(limits.pp)), sorted(set(limits.tp)))
    tried = [_tried(model, machine, limits, Layout(pp=pp, tp=tp), size, nodes) for size, pp, tp in degrees]
    fits = tuple(one for one in tried if isinstance(one, Fit))
    return fits, tuple(one for one in tried if isinstance(one, Rejected))


def _tried(
    model: Model, machine: Machine, limits: Limits, degrees: Layout, size: int, nodes: Sequence[int]
) -> Fit | Rejected:
    reason = _misfit(model, size, degrees.pp, degrees.tp, nodes)
    if reason is not None:
        return Rejected(size, degrees, reason)
    for layout in with_copies(size * nodes[size - 1], degrees.pp, degrees.tp, limits.replicate):
        need = memory_bytes(model, layout)
        if need <= machine.memory_bytes:
            return Fit(size, layout, need)
    return Rejected(
        size, layout, f"needs {size_text(need)} a rank, and there are {size_text(machine.memory_bytes)}"
    )


def _misfit(model: Model, size: int, pp: int, tp: int, nodes: Sequence[int]) -> str | None:
    """Why a candidate cannot be laid out at all; `nodes` are largest first."""
    if size > len(nodes):
        return f"{len(nodes)} of them live"
    ranks = nodes[size - 1]  # of each: all ranks of a layout have equal parts to do
    if pp > model.layers:
        return f"{model.layers} layers do not fill {pp} stages"
    if ranks % tp:
        return f"tensor groups of {tp} do not fit into nodes of {ranks} ranks, and must not span two"
    if tp > model.heads or (model.heads % tp and not model.uneven_heads):
        return f"{model.heads} heads do not divide by {tp}"
    if (size * ranks) % (pp * tp):
        return f"{size * ranks} ranks do not divide by {pp} stages of {tp}"
    return None


def size_text(size: int) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{ceil(size / 2**20)} MiB"


# --- what it brings ---------------------------------------------------------------------------------------------------


def _scored(
    model: Model,
    machine: Machine,
    limits: Limits,
    fit: Fit,
    before: Standing | None,
) -> Scored:
    step_s = step_seconds(model, machine, fit.layout)
    move = transition(model, machine, before, fit.layout)
    steady = max(0.0, 1 - (machine.restart_s + machine.lost_s) / machine.mtbf_s) / step_s
    goodput = steady * max(0.0, 1 - move.seconds / limits.horizon_s)
    return Scored(*fit, step_s, move, goodput)


def transition(model: Model, machine: Machine, before: Standing | None, layout: Layout) -> Transition:
    """What each rank of `layout` must get: nothing that it has itself; from peers what a living rank has; the rest from the storage.

    The state counts as one box, cut by stages, by tensor ranks and by shards, so the bytes are those of a load plan for evenly cut
    tensors. Without `before` all comes from the storage.
    """
    size = model.stored_bytes
    if before is not None and before == Standing(layout, tuple(range(layout.world))):
        return Transition(size * layout.replicate, 0, 0, 0.0)
    needs = _needs(before, layout)
    own, peers, store = (round(sum(one[source] for one in needs) * size) for source in range(3))
    slowest = max(
        need.peers / machine.peer_bytes_per_s + need.store / machine.store_bytes_per_s for need in needs
    )
    return Transition(own, peers, store, machine.restart_s + slowest * size)


class _Need(NamedTuple):
    """What a rank needs, in shares of the whole state: what it has itself, what peers have, and what nobody has."""

    own: float
    peers: float
    store: float


def _needs(before: Standing | None, layout: Layout) -> list[_Need]:
    part = 1 / (layout.pp * layout.tp * layout.shard)
    if before is None:
        return [_Need(0.0, 0.0, part)] * layout.world
    gone = _gone(before, layout)
    needs = []
    for rank in range(layout.world):
        cell = _cell(layout, rank)
        old = before.kept[rank] if rank < len(before.kept) else None
        own = 0.0 if old is None else _shared(before.layout, _cell(before.layout, old), layout, cell)
        store = gone.get(cell, 0.0)
        needs.append(_Need(own, max(0.0, part - own - store), store))
    return needs


Cell = tuple[int, int, int]
"""Which part of the state: stage, tensor rank, shard."""


def _cell(layout: Layout, rank: int) -> Cell:
    """What a rank holds. Ranks count tensor ranks first, then shards, replicas, stages."""
    rest, tp = divmod(rank, layout.tp)
    rest, shard = divmod(rest, layout.shard)
    return rest // layout.replicate, tp, shard


def _cuts(layout: Layout) -> Cell:
    return layout.pp, layout.tp, layout.shard


def _gone(before: Standing, layout: Layout) -> dict[Cell, float]:
    """How much of each part of `layout` no living rank has."""
    alive = {_cell(before.layout, rank) for rank in before.kept if rank is not None}
    found: dict[Cell, float] = {}
    for lost in {_cell(before.layout, rank) for rank in range(before.layout.world)} - alive:
        sides = zip(lost, _cuts(before.layout), _cuts(layout), strict=True)
        # Along each axis: the parts of the new cut that the old one's part reaches into.
        meeting = [range(at * new // old, -(-(at + 1) * new // old)) for at, old, new in sides]
        for stage, tp, shard in product(*meeting):
            cell = (stage, tp, shard)
            found[cell] = found.get(cell, 0.0) + _shared(before.layout, lost, layout, cell)
    return found


def _shared(one: Layout, a: Cell, other: Layout, b: Cell) -> float:
    """The share of the state that lies in both parts."""
    share = 1.0
    for i, cut, j, other_cut in zip(a, _cuts(one), b, _cuts(other), strict=True):
        share *= max(0.0, min((i + 1) / cut, (j + 1) / other_cut) - max(i / cut, j / other_cut))
    return share


# --- which one --------------------------------------------------------------------------------------------------------


def _settled(fitting: Sequence[Scored], before: Standing | None) -> Scored:
    """The best, unless one that keeps the tensor and pipeline degree is nearly as good."""
    best = max(fitting, key=_rank)
    alike = [one for one in fitting if before is not None and _degrees(one.layout) == _degrees(before.layout)]
    if not alike:
        return best
    kept = max(alike, key=_rank)
    return best if best.goodput > kept.goodput * (1 + GAIN) else kept


def _rank(one: Scored) -> tuple[float, int, int, int]:
    """Goodput, then what is simpler and moves less."""
    return (one.goodput, -one.layout.pp, -one.layout.tp, -one.nodes)


def _degrees(layout: Layout) -> tuple[int, int]:
    return layout.pp, layout.tp


def _why_not(one: Scored, best: Scored) -> str:
    if one.goodput > best.goodput:
        gain = one.goodput / best.goodput - 1
        return (
            f"gains {gain:.1%} over {best.layout}, and another tensor or pipeline degree must gain {GAIN:.0%}"
        )
    return f"brings {one.goodput:.4g} steps/s, {best.layout} on {best.nodes} nodes {best.goodput:.4g}"


def _waiting_pays(
    model: Model, machine: Machine, limits: Limits, best: Scored, before: Standing, spare_s: float
) -> bool:
    """Whether standing still until the spare comes brings more steps than going on smaller and growing when it comes."""
    smaller = Standing(best.layout, tuple(range(best.layout.world)))
    filled = transition(model, machine, before, before.layout).seconds
    grown = transition(model, machine, smaller, before.layout).seconds
    whole_s = step_seconds(model, machine, before.layout)
    began = best.transition.seconds
    waiting = (limits.horizon_s - spare_s - filled) / whole_s
    going_on = (spare_s - began) / best.step_s if spare_s > began else 0.0
    return waiting > going_on + (limits.horizon_s - max(spare_s, began) - grown) / whole_s


def _action(layout: Layout, before: Standing | None) -> Action:
    if before is None or layout == before.layout:
        return Action.STAY
    if _degrees(layout) != _degrees(before.layout):
        return Action.RESHAPE
    return Action.GROW if layout.world > before.layout.world else Action.SHRINK
