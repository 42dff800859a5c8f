"""Which samples a step takes, and which of them a rank: a pure function of (seed, step), whatever the world size.

Position p of the job's endless stream lies in epoch p // N; inside an epoch a keyed permutation of [0, N) says which
sample it is. So the state of the data is one integer, any position is found without walking there, and no world size
loses a sample or takes one twice. Integers only: the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

ROUNDS = 8
_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finalizer of splitmix64: every bit of x moves every bit of the result."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


@dataclass(frozen=True)
class Permutation:
    """A keyed permutation of [0, n) with O(1) access: a Feistel network over side * side >= n, and whoever lands
    outside [0, n) goes round again (cycle walking). The square is so tight that hardly anybody does."""

    n: int
    keys: tuple[int, ...]

    @staticmethod
    def of(n: int, seed: int, epoch: int) -> Permutation:
        """The permutation of this epoch of this seed."""
        base = _mix(_mix(seed & _MASK) + epoch & _MASK)
        return Permutation(
            n, tuple(_mix(base + k * 0x9E3779B97F4A7C15 & _MASK) for k in range(1, ROUNDS + 1))
        )

    def __call__(self, index: int) -> int:
        side = isqrt(self.n - 1) + 1
        while True:
            left, right = divmod(index, side)
            for key in self.keys:
                left, right = right, (left + _mix(right + key & _MASK)) % side
            index = left * side + right
            if index < self.n:
                return index


@dataclass(frozen=True)
class Order:
    """The order of the samples of a run. A sample id is epoch * n + index, so that no id comes twice in a run."""

    n: int
    batch: int
    seed: int

    def ids(self, step: int, part: range | None = None) -> list[int]:
        """Sample ids of step `step` (steps count from 1), or of a part of its batch."""
        first = (step - 1) * self.batch
        return [self._id(first + j) for j in (range(self.batch) if part is None else part)]

    def _id(self, position: int) -> int:
        epoch, index = divmod(position, self.n)
        return epoch * self.n + _permutation(self.n, self.seed, epoch)(index)

    def cursor(self, step: int) -> dict[str, int | str]:
        """Where the stream stands after step `step`, for a checkpoint."""
        return {
            "v": 1,
            "next": step * self.batch,
            "n": self.n,
            "seed": self.seed,
            "perm": f"feistel-{ROUNDS}",
        }


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation.of(n, seed, epoch)


def share(total: int, rank: int, world: int) -> range:
    """The contiguous part of range(total) that a rank takes. Parts differ by at most one and may be empty."""
    return range(total * rank // world, total * (rank + 1) // world)
