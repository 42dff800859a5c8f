"""What saves have cost, of many ranks together and of the whole job over its generations. For metrics: nothing is decided by it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from stormjib_runtime.wire import Saving

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stormjib_runtime.wire import GenerationId, Report, ResumePoint

_ADDED = ("failures", "bytes")
"""Over ranks; of all else the slowest rank is what the job feels."""
_COUNTED = ("saves", "failures", "bytes", "lost_s")
"""They grow within a generation and begin at zero in the next one."""


def together(told: Iterable[Saving]) -> Saving:
    """Several ranks, or several agents, as one."""
    found = list(told)
    return Saving(
        **{
            field.name: (sum if field.name in _ADDED else max)(getattr(one, field.name) for one in found)
            for field in fields(Saving)
        }
    )


@dataclass
class _Slot:
    """What one slot has told."""

    newest: Saving
    generation: GenerationId
    before: Saving
    """Sums of its earlier generations."""


class Saves:
    """Follows the reports of all agents. A coordinator that comes new to a job counts from there."""

    def __init__(self) -> None:
        self._slots: dict[int, _Slot] = {}
        self._newest: ResumePoint | None = None
        self._committed_at = 0.0
        self._copied: dict[int, tuple[GenerationId, int]] = {}

    def heard(self, report: Report, now: float) -> None:
        """A report that was taken."""
        point = report.committed
        if point is not None and (self._newest is None or _order(point) > _order(self._newest)):
            self._newest, self._committed_at = point, now
        if report.copied >= 0 and report.generation is not None:
            self._copied[report.slot] = report.generation.id, report.copied
        if report.saving is not None and report.generation is not None:
            self._told(report.slot, report.generation.id, report.saving)

    def step(self) -> int | None:
        """The newest committed step that was told; None before the first."""
        return None if self._newest is None else self._newest.step

    def age_s(self, now: float) -> float | None:
        """Since it was told; None before the first."""
        return None if self._newest is None else now - self._committed_at

    def copied(self) -> int | None:
        """The newest step of which all slots that copy have copies; None where nothing is copied."""
        newest = max((generation for generation, _ in self._copied.values()), default=None)
        return min((step for generation, step in self._copied.values() if generation == newest), default=None)

    def sums(self) -> Saving | None:
        """Over all generations; what is no count is of the newest one. None where nobody saves."""
        if not self._slots:
            return None
        counted = together(_plus(slot.before, slot.newest) for slot in self._slots.values())
        current = max(slot.generation for slot in self._slots.values())
        newest = together(slot.newest for slot in self._slots.values() if slot.generation == current)
        return Saving(
            **{
                field.name: getattr(counted if field.name in _COUNTED else newest, field.name)
                for field in fields(Saving)
            }
        )

    def _told(self, number: int, generation: GenerationId, saving: Saving) -> None:
        slot = self._slots.get(number)
        if slot is None:
            self._slots[number] = _Slot(saving, generation, Saving())
        elif generation == slot.generation and _ended(saving) >= _ended(slot.newest):
            slot.newest = saving
        elif generation > slot.generation:
            self._slots[number] = _Slot(saving, generation, _plus(slot.before, slot.newest))


def _ended(saving: Saving) -> int:
    """A report that is late on its way has a smaller one."""
    return saving.saves + saving.failures


def _plus(one: Saving, other: Saving) -> Saving:
    return Saving(**{name: getattr(one, name) + getattr(other, name) for name in _COUNTED})


def _order(point: ResumePoint) -> tuple[GenerationId, int]:
    return point.generation, point.step
