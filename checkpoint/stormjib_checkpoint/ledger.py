"""The ledger: which sample ids each rank fed to the model in each step, kept for ever, and its audit: what the ranks say that
they fed, beside what the order in the cursors of committed steps says they should have.

A segment `ledger/g2.7/00001101-00001200.jsonl` is written before the manifest of step 1200, which holds its digest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from stormjib_checkpoint import layout
from stormjib_checkpoint.errors import DamagedCheckpoint, FormatError, MissingCheckpoint, NotThere
from stormjib_checkpoint.format import MAX_SMALL_FILE, LedgerLine, LedgerRef
from stormjib_checkpoint.history import Span, committed, generations, history
from stormjib_checkpoint.order import Order
from stormjib_checkpoint.records import build, canonical, parse, plain, sha256
from stormjib_checkpoint.step import CommittedStep

if TYPE_CHECKING:
    from stormjib_checkpoint.format import ResumePoint
    from stormjib_checkpoint.layout import GenerationId
    from stormjib_checkpoint.storage import Storage

Samples = Mapping[int, Sequence[int]]
"""step -> sample ids of one rank, in the order in which it fed them."""


def segment(ranks: Sequence[Samples], above: int, upto: int) -> tuple[LedgerRef, bytes] | None:
    """The segment of the steps in (above, upto] from what each rank fed; None where no rank counts samples. Pure."""
    steps = sorted({step for samples in ranks for step in samples if above < step <= upto})
    if not steps:
        return None
    lines = [LedgerLine(step, tuple(tuple(samples.get(step, ())) for samples in ranks)) for step in steps]
    data = b"".join(canonical(plain(line)) for line in lines)
    return LedgerRef(steps[0], upto, sha256(data)), data


@dataclass(frozen=True)
class Difference:
    """How the samples of one step differ from the plan."""

    step: int
    missing: tuple[int, ...]
    extra: tuple[int, ...]
    """Fed, but not planned for this step, or fed more often than planned."""


@dataclass(frozen=True)
class Audit:
    """The samples of every step along the history of the highest generation."""

    last: int
    """The newest committed step; -1 where there is none. Nothing after it counts."""
    steps: Mapping[int, tuple[tuple[int, ...], ...]]
    """step -> ids by rank."""
    problems: tuple[str, ...]
    """Segments and cursors that are damaged or contradict each other."""
    order: Order | None = None
    """What the samples of each step should be, as the newest committed step says; None where no cursor of ours says it."""

    def ids(self, step: int) -> list[int]:
        """The sample ids of a step, sorted."""
        return sorted(i for rank in self.steps.get(step, ()) for i in rank)

    def gaps(self) -> list[int]:
        """Steps without a line, between the first one written down and the newest committed one."""
        return [step for step in range(min(self.steps, default=0), self.last + 1) if step not in self.steps]

    def differences(self, plan: Callable[[int], Iterable[int]], first: int = 1) -> list[Difference]:
        """Each step from `first` to the newest committed one whose samples are not those of the plan."""
        found = (
            _difference(step, Counter(plan(step)), Counter(self.ids(step)))
            for step in range(first, self.last + 1)
        )
        return [difference for difference in found if difference is not None]

    def unplanned(self) -> list[Difference]:
        """Each step from the first whose samples are not those of `order`; none where there is no order. No difference proves
        that the union has no gap and no sample twice, because the order has none."""
        return self.differences(self.order.ids) if self.order is not None else []

    def reshapes(self) -> int:
        """How often the number of ranks changed from one step to the next."""
        return sum(len(a) != len(b) for a, b in pairwise(self.steps.values()))

    def twice(self) -> list[int]:
        """Ids that were fed more than once over the whole history. For plans that never repeat one."""
        count = Counter(i for ranks in self.steps.values() for rank in ranks for i in rank)
        return sorted(i for i, times in count.items() if times > 1)


def _difference(step: int, wanted: Counter[int], fed: Counter[int]) -> Difference | None:
    missing, extra = wanted - fed, fed - wanted
    if not missing and not extra:
        return None
    return Difference(step, tuple(sorted(missing.elements())), tuple(sorted(extra.elements())))


def audit(storage: Storage) -> Audit:
    """Read the ledger along the history of the highest generation. What a zombie wrote down is not in it."""
    known = generations(storage)
    if not known:
        return Audit(-1, {}, ())
    points = committed(storage, known[-1])
    last = points[0].step if points else -1
    digests = _digests(storage, points)
    steps: dict[int, tuple[tuple[int, ...], ...]] = {}
    problems: list[str] = []
    for span in history(storage, known[-1]):
        upto = last if span.upto is None else min(span.upto, last)
        _read_span(storage, Span(span.generation, span.above, upto), digests, steps, problems)
    order = _order(storage, points, problems)
    return Audit(last, dict(sorted(steps.items())), tuple(problems), order)


def _order(storage: Storage, points: Iterable[ResumePoint], problems: list[str]) -> Order | None:
    """The order in the cursors of these steps, newest first: the same in all of them, or it is a problem."""
    newest: tuple[int, Order] | None = None
    for point in points:
        try:
            cursor = CommittedStep(storage, point).train().train.get("cursor")
            if not (isinstance(cursor, dict) and "perm" in cursor):
                continue  # a script's own, or none
            order = Order.of_cursor(cursor, point.step)
        except (DamagedCheckpoint, FormatError, MissingCheckpoint) as error:
            problems.append(str(error))
            continue
        newest = newest or (point.step, order)
        if newest[1] != order:
            problems.append(f"step {point.step} was fed by {order}, step {newest[0]} by {newest[1]}")
    return newest[1] if newest is not None else None


def _digests(storage: Storage, points: Iterable[tuple[int, str, str]]) -> dict[str, str]:
    """Path -> digest of the segments whose manifests are still there (retention deletes manifests, never segments)."""
    found = {}
    for point in points:
        manifest = CommittedStep(storage, point).manifest
        if manifest.ledger is not None:
            path = layout.ledger_file(manifest.generation, manifest.ledger.first, manifest.ledger.last)
            found[path] = manifest.ledger.sha256
    return found


def _read_span(
    storage: Storage,
    span: Span,
    digests: Mapping[str, str],
    steps: dict[int, tuple[tuple[int, ...], ...]],
    problems: list[str],
) -> None:
    for path in _segments(storage, span.generation):
        try:
            data = storage.read(path, MAX_SMALL_FILE)
            lines = read_lines(data, path)
        except (FormatError, NotThere) as error:
            problems.append(str(error))
            continue
        if digests.get(path) not in (None, sha256(data)):
            problems.append(f"{path} does not have the SHA-256 that its manifest says")
        for line in lines:
            if not span.holds(line.step):
                continue
            if steps.setdefault(line.step, line.ranks) != line.ranks:
                problems.append(f"{path}: step {line.step} differs from another segment of {span.generation}")


def _segments(storage: Storage, generation: GenerationId) -> list[str]:
    bounds = (layout.parse_ledger(name) for name in storage.names(layout.ledger_folder(generation)))
    return [
        layout.ledger_file(generation, *pair) for pair in sorted(pair for pair in bounds if pair is not None)
    ]


def read_lines(data: bytes, where: str) -> list[LedgerLine]:
    """The lines of a segment. Raises FormatError."""
    rows = data.split(b"\n")
    if rows.pop() != b"":
        raise FormatError(f"{where} does not end with a whole line")
    return [
        build(LedgerLine, parse(row, f"{where}:{i + 1}"), f"{where}:{i + 1}") for i, row in enumerate(rows)
    ]
