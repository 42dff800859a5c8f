"""What an agent does next, as a table and as properties: pure, so every pair of state and order can be looked at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_runtime.agent_core import NOTHING, Act, Held, Me, Stage, StepTimes, accepts, decide, phase
from stormjib_runtime.wire import (
    PROTOCOL,
    AgentPhase,
    Cause,
    Do,
    Generation,
    GenerationId,
    Member,
    Order,
    Report,
)

ME = Me(slot=1, agent=2, pod_uid="pod-1")


def generation(number: int, *, agent: int = 2, slot: int = 1, pod_uid: str = "pod-1") -> Generation:
    members = (Member(0, 1, "pod-0", "10.0.0.1", 2), Member(slot, agent, pod_uid, "10.0.0.2", 2))
    return Generation(GenerationId(1, number), None, members, Cause.START)


def order(do: Do, of: Generation | None = None, *, end_leaving: bool = False) -> Order:
    return Order(PROTOCOL, 1, 5, do, of, end_leaving=end_leaving)


OLD, NEW = generation(3), generation(4)
RUNS_OLD = Held(OLD, Stage.RUNNING)


@pytest.mark.parametrize(
    ("held", "given_order", "acts"),
    [
        (NOTHING, order(Do.WAIT), ()),
        (NOTHING, order(Do.PREPARE, NEW), (Act.PREPARE,)),
        (NOTHING, order(Do.RUN, NEW), (Act.START,)),
        (NOTHING, order(Do.STOP, NEW), ()),
        (NOTHING, order(Do.STOP, NEW, end_leaving=True), (Act.EXIT,)),
        (NOTHING, order(Do.FINISH), (Act.EXIT,)),
        # a fault: old ranks end at once, whatever comes next
        (RUNS_OLD, order(Do.WAIT, NEW), (Act.END,)),
        (RUNS_OLD, order(Do.PREPARE, NEW), (Act.END, Act.PREPARE)),
        (RUNS_OLD, order(Do.RUN, NEW), (Act.END, Act.START)),
        (RUNS_OLD, order(Do.FINISH), (Act.END, Act.EXIT)),
        (Held(OLD, Stage.PREPARING), order(Do.PREPARE, NEW), (Act.END, Act.PREPARE)),
        (Held(OLD, Stage.FAILED), order(Do.PREPARE, NEW), (Act.END, Act.PREPARE)),
        (Held(OLD, Stage.FAILED), order(Do.WAIT), (Act.END,)),
        # the way of one generation
        (Held(NEW, Stage.PREPARED), order(Do.RUN, NEW), (Act.START,)),
        (Held(NEW, Stage.RUNNING), order(Do.STOP, NEW), (Act.STOP,)),
        (Held(NEW, Stage.STOPPING), order(Do.STOP, NEW), ()),
        (Held(NEW, Stage.STOPPING, ended=True), order(Do.STOP, NEW), (Act.SETTLE,)),
        (Held(NEW, Stage.STOPPED), order(Do.STOP, NEW), ()),
        (Held(NEW, Stage.STOPPED), order(Do.STOP, NEW, end_leaving=True), ()),  # not before that is heard
        (Held(NEW, Stage.RUNNING, ended=True), order(Do.STOP, NEW), (Act.STOP,)),
        (Held(NEW, Stage.PREPARED), order(Do.STOP, NEW), (Act.END,)),
        # an order of mine for what I run already
        (Held(NEW, Stage.RUNNING), order(Do.RUN, NEW), ()),
        (Held(NEW, Stage.RUNNING, ended=True), order(Do.RUN, NEW), ()),
        (Held(NEW, Stage.RUNNING), order(Do.PREPARE, NEW), ()),
        (Held(NEW, Stage.FAILED), order(Do.PREPARE, NEW), ()),
        # a generation without me, or with a former life of mine
        (RUNS_OLD, order(Do.RUN, generation(4, slot=2)), (Act.END,)),
        (NOTHING, order(Do.RUN, generation(4, agent=1)), ()),
        (NOTHING, order(Do.PREPARE, generation(4, pod_uid="before")), ()),
    ],
)
def test_what_follows_from_an_order(held: Held, given_order: Order, acts: tuple[Act, ...]) -> None:
    assert decide(ME, held, given_order, heard=None) == acts


def report(phase: AgentPhase) -> Report:
    return Report(PROTOCOL, "job", 1, 1, 2, "pod-1", "10.0.0.2", 2, phase, leaving=True)


def test_a_leaver_goes_once_the_coordinator_knows_that_it_holds_nothing() -> None:
    heard = report(AgentPhase.RUNNING)
    assert decide(ME, NOTHING, order(Do.WAIT), heard) == (Act.EXIT,)
    assert decide(ME, RUNS_OLD, order(Do.RUN, OLD), heard) == ()
    stop, stopped = order(Do.STOP, NEW, end_leaving=True), Held(NEW, Stage.STOPPED)
    assert decide(ME, stopped, stop, heard) == ()
    assert decide(ME, stopped, stop, report(AgentPhase.STOPPED)) == (Act.EXIT,)


AFTER = {
    Act.PREPARE: Stage.PREPARING,
    Act.START: Stage.STARTING,
    Act.STOP: Stage.STOPPING,
    Act.SETTLE: Stage.SETTLING,
}
HELD = st.builds(Held, st.sampled_from([OLD, NEW]), st.sampled_from(Stage), st.booleans())
ORDERS = st.builds(order, st.sampled_from(Do), st.sampled_from([OLD, NEW, None]))


@given(HELD, ORDERS)
def test_the_same_order_twice_changes_nothing(held: Held, given_order: Order) -> None:
    for act in decide(ME, held, given_order, heard=None):
        held = NOTHING if act is Act.END else Held(given_order.generation, AFTER.get(act, held.stage))
    again = decide(ME, held, given_order, heard=None)
    assert [act for act in again if act is not Act.EXIT] == []


@given(HELD, ORDERS)
def test_ranks_start_only_where_nothing_else_runs(held: Held, given_order: Order) -> None:
    acts = decide(ME, held, given_order, heard=None)
    if Act.START in acts or Act.PREPARE in acts:
        assert Act.END in acts or held.stage in (Stage.NONE, Stage.PREPARED)


def test_only_newer_orders_are_obeyed() -> None:
    given_order = Order(PROTOCOL, 3, 5, Do.WAIT)
    assert accepts(given_order, incarnation=3, version=5)
    assert accepts(given_order, incarnation=2, version=9)
    assert not accepts(given_order, incarnation=3, version=6)
    assert not accepts(given_order, incarnation=4, version=0)


def test_phases_as_reported() -> None:
    assert phase(NOTHING, ready=False) is AgentPhase.STARTING
    assert phase(NOTHING, ready=True) is AgentPhase.IDLE
    assert phase(Held(NEW, Stage.PREPARING), ready=True) is AgentPhase.IDLE
    assert phase(Held(NEW, Stage.STOPPING), ready=True) is AgentPhase.RUNNING
    assert phase(Held(NEW, Stage.STOPPED), ready=False) is AgentPhase.STOPPED


def test_the_median_step_time_comes_from_few_looks() -> None:
    times = StepTimes()
    assert times.sample(-1, 0) == 0.0
    assert times.sample(10, 1_000_000_000) == 0.0
    assert times.sample(15, 2_000_000_000) == pytest.approx(0.2)
    assert times.sample(15, 2_000_000_000) == pytest.approx(0.2)  # no step since
    times.sample(16, 9_000_000_000)  # one slow step
    assert times.sample(21, 10_000_000_000) == pytest.approx(0.2)


def test_a_clock_that_goes_back_counts_for_nothing() -> None:
    times = StepTimes()
    times.sample(5, 5_000_000_000)
    assert times.sample(6, 1) == 0.0
    assert times.sample(2, 9_000_000_000) == 0.0
