"""Ranks that load together without processes: threads, which meet at each call."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from stormjib_checkpoint.proof import MODULUS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class Member:
    """One of a group."""

    def __init__(self, member: int, size: int, table: list[Any], barrier: threading.Barrier) -> None:
        self.member, self.size = member, size
        self._table, self._barrier = table, barrier
        self.handed = 0
        """Bytes that others have sent to this one."""

    def _all(self, own: Any) -> list[Any]:
        self._table[self.member] = own
        self._barrier.wait(30)
        every = list(self._table)
        self._barrier.wait(30)
        return every

    def summed(self, numbers: Sequence[int]) -> list[int]:
        return [sum(row) % MODULUS for row in zip(*self._all(list(numbers)), strict=True)]

    def highest(self, numbers: Sequence[int]) -> list[int]:
        return [max(row) for row in zip(*self._all(list(numbers)), strict=True)]

    def gathered(self, numbers: Sequence[int]) -> list[list[int]]:
        return self._all(list(numbers))

    def swapped(self, outgoing: Sequence[bytes | bytearray], incoming: Sequence[int]) -> list[memoryview]:
        found = [bytearray(row[self.member]) for row in self._all([bytes(one) for one in outgoing])]
        assert [len(one) for one in found] == list(incoming)
        self.handed += sum(incoming)
        return [memoryview(one) for one in found]


def together(size: int, act: Callable[[Member], T]) -> list[T]:
    """What each member of a group makes of it, all at once."""
    table: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    members = [Member(number, size, table, barrier) for number in range(size)]

    def run(member: Member) -> T:
        try:
            return act(member)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        done = [pool.submit(run, member) for member in members]
        errors = [one.exception() for one in done]
    raised = [error for error in errors if error is not None]
    real = [error for error in raised if not isinstance(error, threading.BrokenBarrierError)]
    for error in (*real, *raised):
        raise error
    return [one.result() for one in done]
