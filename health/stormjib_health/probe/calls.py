"""The watcher of one group: torch calls it before and after each call, on the rank's own thread.

Almost always it writes one light record: sequence, time, kind, position. Bytes and signature are read from the tensors
once per position of the step, in every 32nd step, and in the step after one whose count of calls was new. The end is taken at a
few positions of the step only, because it costs a future.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stormjib_health.probe.details import of_tensors
from stormjib_health.probe.plan import MAX_READ, TIMED, Plan
from stormjib_health.records.layout import PENDING
from stormjib_health.wire import Kind

if TYPE_CHECKING:
    from stormjib_health.probe.groups import Watch
    from stormjib_health.records.ring import Lane

_SEND = int(Kind.SEND)


Hear = Callable[[str, Callable[[Any], None] | None], None]
"""(name of the group, what torch is to call after each call on it) -> None."""


class Calls:
    """One group's watcher. Holds its name, never the group; raises nothing into a call, because its peers would hang."""

    def __init__(self, watch: Watch, name: str, kinds: Any, hear: Hear) -> None:
        """`kinds[args.name]` is the number of a `wire.Kind`; `hear` has `after` called after the next call, or no more."""
        self._watch = watch
        self._kinds = kinds
        self._name = name
        self._hear = hear
        self._lane: Lane | None = None
        self._ranks: tuple[int, ...] = ()
        self._clock = watch.recorder.clock
        self._off = False
        self._plan = Plan()
        self._read_from = 0
        self._timed: frozenset[int] = frozenset()
        self._near: frozenset[int] = frozenset()
        """Positions that are timed, and those after them."""
        self._heard = False
        self._waiting: tuple[int, int] | None = None
        """op_id and index of a call whose work is to be followed."""

    def before(self, args: Any) -> None:
        """torch's pre-hook."""
        try:
            lane = self._lane
            if lane is None or lane.step != self._clock[0]:
                lane = self._turn()
                if lane is None:
                    return
            kind = self._kinds[args.name]
            if lane.position >= self._read_from or lane.position in self._near:
                self._closely(lane, kind, args)
            elif kind < _SEND:
                lane.light(kind)
            else:
                lane.call(kind, self._peer(args.root))
        except Exception as error:  # noqa: BLE001  whatever it is, the call goes on: its peers wait for this rank
            self._give_up(error)

    def after(self, args: Any) -> None:
        """torch's post-hook: the call is issued, and its work is there."""
        if self._waiting is None:
            return
        try:
            op_id, index = self._waiting
            self._waiting = None
            if args.op_id == op_id:  # else the call has failed before it was issued
                self._watch.ends.follow(index, args.work)
        except Exception as error:  # noqa: BLE001  as above
            self._give_up(error)

    def _closely(self, lane: Lane, kind: int, args: Any) -> None:
        """Read the tensors, and follow the call to its end, as far as it is this position's turn."""
        position = lane.position
        size = signature = 0
        if self._read_from <= position < MAX_READ:
            size, signature = of_tensors(Kind(kind), args.input_tensors, args.output_tensors)
            self._plan.saw(position, kind)
        elif position >= MAX_READ:
            self._read_from = sys.maxsize  # until the next step, which may never come
        started, done = self._ends(kind, args) if position in self._timed else (0, 0)
        self._listen(bool(done))
        if kind < _SEND and not (signature or done):  # here only to hear of calls no more
            lane.light(kind)
            return
        index = lane.call(
            kind, self._peer(args.root) if kind >= _SEND else -1, size, signature, started, done
        )
        if done:
            self._waiting = args.op_id, index

    def _ends(self, kind: int, args: Any) -> tuple[int, int]:
        """Which of start and end will be filled in."""
        if kind not in TIMED:
            return 0, 0
        if not (args.input_tensors or args.output_tensors)[0].is_cuda:
            return 0, PENDING
        return (PENDING, PENDING) if self._watch.ends.begin() else (0, 0)

    def _listen(self, on: bool) -> None:
        """A post-hook costs every call: it is there for the timed ones only."""
        if on or self._heard:
            self._heard = on
            self._hear(self._name, self.after if on else None)

    def _turn(self) -> Lane | None:
        """Before the first call of the group, and before its first in a step."""
        lane = self._lane
        if lane is None and not self._off:
            lane, self._ranks = self._watch.lane(self._name)
            self._lane, self._off = lane, lane is None
        if lane is not None and lane.step != self._clock[0]:
            calls = lane.turn()
            self._read_from, self._timed = self._plan.next(calls, lane.step)
            self._near = self._timed | {position + 1 for position in self._timed}
        return lane

    def _peer(self, root: int) -> int:
        return self._ranks[root] if 0 <= root < len(self._ranks) else -1

    def _give_up(self, error: Exception) -> None:
        """Record nothing of this group from now on: half of its calls would look like a desync."""
        self._lane, self._off = None, True
        print(f"stormjib: calls of group {self._name} are not recorded: {error!r}", file=sys.stderr)
