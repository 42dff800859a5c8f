"""Which positions of a step are read and timed, step after step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stormjib_health.probe.plan import MAX_COUNTS, MAX_READ, READ_EVERY, Plan, timed
from stormjib_health.wire import Kind


class Run:
    """Steps of one group: tells which positions were read and timed."""

    def __init__(self) -> None:
        self.plan = Plan()
        self.read_from, self.timed = 0, frozenset[int]()

    def step(self, number: int, kinds: list[Kind]) -> tuple[list[int], list[int]]:
        read = [at for at in range(len(kinds)) if self.read_from <= at < MAX_READ]
        for at in read:
            self.plan.saw(at, kinds[at])
        timed = sorted(self.timed & set(range(len(kinds))))
        self.read_from, self.timed = self.plan.next(len(kinds), number)
        return read, timed


REDUCE, GATHER, SCATTER = Kind.ALL_REDUCE, Kind.ALL_GATHER, Kind.REDUCE_SCATTER


def test_a_steady_step_is_read_twice_and_then_every_32nd() -> None:
    run = Run()
    reads = [number for number in range(1, 100) if run.step(number, [REDUCE, GATHER])[0]]
    # Step 33 is the one that comes after the clock says 32.
    assert reads == [1, 2, 33, 65, 97]


def test_a_new_count_of_calls_has_the_next_step_read_and_a_new_position_is_read_at_once() -> None:
    run = Run()
    for number in range(1, 10):
        run.step(number, [REDUCE, REDUCE])
    assert run.step(10, [REDUCE, REDUCE, REDUCE, REDUCE])[0] == [2, 3]
    assert run.step(11, [REDUCE])[0] == [0]
    assert run.step(12, [REDUCE, REDUCE])[0] == [0, 1]
    assert run.step(13, [REDUCE, REDUCE])[0] == []
    assert run.step(14, [REDUCE])[0] == []


def test_first_last_and_one_after_the_other_between_are_timed() -> None:
    run = Run()
    kinds = [GATHER, SCATTER, GATHER, GATHER, Kind.SEND, GATHER, REDUCE]
    timed = [run.step(number, kinds)[1] for number in range(1, 6)]
    assert timed == [[], [0, 3, 6], [0, 5, 6], [0, 2, 6], [0, 3, 6]]


def test_a_step_that_never_ends_is_read_at_its_begin_only() -> None:
    run = Run()
    assert len(run.step(0, [REDUCE] * 5000)[0]) == MAX_READ


def test_counts_that_never_repeat_do_not_have_every_step_read_for_good() -> None:
    run = Run()
    reads = [
        bool(run.step(number, [SCATTER] * (3 * MAX_COUNTS - number))[0])
        for number in range(1, 3 * MAX_COUNTS)
    ]
    assert sum(reads[MAX_COUNTS + 1 :]) <= 2 * MAX_COUNTS // READ_EVERY + 1


@given(suited=st.lists(st.integers(0, 100), unique=True, max_size=12).map(sorted), first=st.integers(0, 1000))
def test_every_suited_position_is_timed_within_as_many_steps_as_there_are(
    suited: list[int], first: int
) -> None:
    choices = [timed(suited, step) for step in range(first, first + max(1, len(suited)))]
    assert all(len(choice) <= 3 for choice in choices)
    assert frozenset().union(*choices) == set(suited)
