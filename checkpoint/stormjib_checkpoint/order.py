"""Which samples a step takes: a pure function of (seed, step), whatever the world size. Integers only: the same on every machine.

Position p of the job's endless stream lies in block p // B, B being the sum of the sources' weights; inside a block a keyed
permutation of [0, B) says which source it draws from. So every block holds every source as often as its weight says, and
how often each was drawn before a position is known without walking there. Draw d of a source of n samples lies in its epoch
d // n; inside an epoch a keyed permutation of [0, n) says which sample it is. So the state of the data is one integer for
each source, and no world size loses a sample or takes one twice.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from math import gcd, isqrt
from typing import TYPE_CHECKING

from stormjib_checkpoint.errors import FormatError
from stormjib_checkpoint.records import Json, build

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

VERSION = 2
ROUNDS = 8
PERMUTATION = f"feistel-{ROUNDS}"
MOST_WEIGHT = 4096
"""Of all sources together: a block is walked once, to know what it draws."""
MOST_BATCH = 1 << 24
"""That is believed of a stored cursor: whoever audits it lists the samples of a step."""
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIXTURE = 1 << 32
"""Key of the permutations of blocks; those of the sources' own are their numbers."""


def mix(x: int) -> int:
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
        base = mix(mix(seed & _MASK) + epoch & _MASK)
        return Permutation(n, tuple(mix(base + k * _GOLDEN & _MASK) for k in range(1, ROUNDS + 1)))

    def __call__(self, index: int) -> int:
        side = isqrt(self.n - 1) + 1
        while True:
            left, right = divmod(index, side)
            for key in self.keys:
                left, right = right, (left + mix(right + key & _MASK)) % side
            index = left * side + right
            if index < self.n:
                return index


@dataclass(frozen=True)
class Source:
    """`n` samples that can be read at any index, and how often they are drawn beside the other sources."""

    name: str
    n: int
    weight: int = 1

    def __post_init__(self) -> None:
        if min(self.n, self.weight) < 1:
            raise FormatError(
                f"source {self.name} has n = {self.n}, weight = {self.weight}; wanted at least 1"
            )


@dataclass(frozen=True)
class Micro:
    """A step's batch as `per_step` numbered logical micro-batches of `size` samples."""

    size: int
    per_step: int

    def __post_init__(self) -> None:
        if min(self.size, self.per_step) < 1:
            raise FormatError(f"lmb has size = {self.size}, per_step = {self.per_step}; wanted at least 1")

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.size * self.per_step


@dataclass(frozen=True)
class Order:
    """The order of the samples of a run. Draw d of source k of S has the id (epoch * n + index) * S + k, so that no id comes
    twice in a run. Raises FormatError where the sources cannot be mixed."""

    sources: tuple[Source, ...]
    lmb: Micro
    seed: int

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names or len(set(names)) != len(names):
            raise FormatError(f"sources are {names}; wanted one at least, and each name once")
        if sum(self.weights) > MOST_WEIGHT:
            told = ", ".join(f"{source.name}: {source.weight}" for source in self.sources)
            raise FormatError(f"weights of the sources ({told}) sum to more than {MOST_WEIGHT}; round them")

    @cached_property
    def weights(self) -> tuple[int, ...]:
        """Of the sources, without a common divisor."""
        common = gcd(*(source.weight for source in self.sources))
        return tuple(source.weight // common for source in self.sources)

    def ids(self, step: int, numbers: Iterable[int] | None = None) -> list[int]:
        """Sample ids of step `step` (steps count from 1), or of these of its micro-batches."""
        first, size = (step - 1) * self.lmb.batch, self.lmb.size
        chosen = range(self.lmb.per_step) if numbers is None else numbers
        return [self.at(first + number * size + i) for number in chosen for i in range(size)]

    def at(self, position: int) -> int:
        """The sample id of a position."""
        block, slot = divmod(position, sum(self.weights))
        which, nth = self._block(block)[slot]
        source = self.sources[which]
        epoch, index = divmod(block * self.weights[which] + nth, source.n)
        permutation = _permutation(source.n, self.seed ^ mix(which), epoch)
        return (epoch * source.n + permutation(index)) * len(self.sources) + which

    def place(self, sample: int) -> tuple[int, int]:
        """The source of a sample id, and the index in it."""
        drawn, which = divmod(sample, len(self.sources))
        return which, drawn % self.sources[which].n

    def taken(self, position: int) -> tuple[int, ...]:
        """How often each source is drawn from before a position."""
        block, rest = divmod(position, sum(self.weights))
        begun = [which for which, _ in self._block(block)[:rest]]
        return tuple(block * weight + begun.count(which) for which, weight in enumerate(self.weights))

    def _block(self, block: int) -> tuple[tuple[int, int], ...]:
        return _block(self.weights, self.seed, block) if len(self.weights) > 1 else _ALONE

    def cursor(self, step: int) -> dict[str, Json]:
        """Where the stream stands after step `step`, for a checkpoint."""
        position = step * self.lmb.batch
        taken = self.taken(position)
        return {
            "v": VERSION,
            "next": position,
            "seed": self.seed,
            "perm": PERMUTATION,
            "lmb": asdict(self.lmb),
            "sources": [
                asdict(source) | {"taken": count} for source, count in zip(self.sources, taken, strict=True)
            ],
        }

    @staticmethod
    def of_cursor(cursor: Mapping[str, Json], step: int) -> Order:
        """The order that wrote this cursor after `step`. Raises FormatError where it is of another kind, or where its counts are
        not those of its own order."""
        version = cursor.get("v")
        if version != VERSION or cursor.get("perm") != PERMUTATION:
            raise FormatError(
                f"the cursor of step {step} is of version {version} and permutation {cursor.get('perm')}; "
                f"this version of stormjib reads {VERSION} and {PERMUTATION} only"
            )
        read = build(_Cursor, cursor, f"the cursor of step {step}")
        if read.lmb.batch > MOST_BATCH:
            raise FormatError(
                f"the cursor of step {step} has {read.lmb}: more than {MOST_BATCH} samples in a step"
            )
        sources = tuple(Source(each.name, each.n, each.weight) for each in read.sources)
        order = Order(sources, read.lmb, read.seed)
        if order.cursor(step) != cursor:
            raise FormatError(
                f"the cursor of step {step} has {cursor}, but its own order says {order.cursor(step)}"
            )
        return order


@dataclass(frozen=True)
class _Drawn:
    name: str
    n: int
    weight: int
    taken: int


@dataclass(frozen=True)
class _Cursor:
    next: int
    seed: int
    lmb: Micro
    sources: tuple[_Drawn, ...]


@lru_cache(maxsize=64)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation.of(n, seed, epoch)


_ALONE = ((0, 0),)
"""The block of a source that is not mixed."""


@lru_cache(maxsize=4)
def _block(weights: Sequence[int], seed: int, block: int) -> tuple[tuple[int, int], ...]:
    """For each slot of a block the source that it draws from, and how often that was drawn before in this block."""
    ends = [*accumulate(weights)]
    permutation = Permutation.of(ends[-1], seed ^ mix(_MIXTURE), block)
    drawn = [0] * len(weights)
    slots = []
    for slot in range(ends[-1]):
        value = permutation(slot)
        which = next(i for i, end in enumerate(ends) if value < end)
        slots.append((which, drawn[which]))
        drawn[which] += 1
    return tuple(slots)
