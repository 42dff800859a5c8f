"""The engine under a storm: deaths, cuts, returns, lost and late messages, coordinators that crash. What always holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fakes.runtime import JOB, FakeAgent, World, bounds, on_lost, on_report
from stormjib_runtime import kept
from stormjib_runtime.orders import order_for
from stormjib_runtime.state import Refused, Running
from stormjib_runtime.wire import AgentPhase, Cause, Generation, GenerationId, JobPhase, Order, Report

SLOTS = st.integers(0, 3)
BEAT_S = 1.0
TICK_S = 0.25


class Storm(RuleBasedStateMachine):
    """Four slots, two or three members, and everything that can go wrong with them."""

    @initialize(replicas=st.integers(1, 3), minimum=st.integers(1, 2), restarts=st.integers(0, 6))
    def begin(self, replicas: int, minimum: int, restarts: int) -> None:
        slots = {str(slot): f"pod-{slot}" for slot in range(4)}
        given = bounds(replicas, min(minimum, replicas), slots=slots, restarts_left=restarts)
        self.world = World(given)
        self.world.settle()
        self.frozen_out: set[int] = set()
        """Cut off from the coordinator and from their peers: nothing steps with them."""
        self.reports: list[Report] = []
        self.orders: list[tuple[int, Order]] = []
        self.told: dict[GenerationId, Generation] = {}
        self.disturbed = 0
        self.starts = 1
        self.pods = 0
        self.begun: dict[GenerationId, Generation] = {}
        self.note()
        if self.world.state.generation is not None:
            self.told[self.world.state.current] = self.world.state.generation

    # --- messages ---------------------------------------------------------------------------------------------------

    def say(self, slot: int, *, answered: bool = True) -> None:
        agent = self.world.agents[slot]
        if not agent.alive or slot in self.world.cut:
            return
        report = agent.report()
        self.reports.append(report)
        try:
            self.world.state = on_report(self.world.state, report, self.world.now)
        except Refused:
            return
        self.note()
        order = order_for(self.world.state, slot)
        self.orders.append((slot, order))
        if order.generation is not None:
            known = self.told.setdefault(order.generation.id, order.generation)
            assert known == order.generation, "one number, two generations"
        if answered:
            agent.obey(order)

    def note(self) -> None:
        """As the shell does after each change: keep what must last; remember what was begun, under which bounds."""
        self.record = kept.keep(self.world.state, self.starts)
        held = self.world.state.bounds
        for entry in self.world.state.history:
            new = entry.generation
            if new.id in self.begun or held is None:
                continue
            assert new.id > max(self.begun, default=GenerationId(0, 0)), "numbers only grow"
            assert held.min_replicas <= len(new.members) <= held.replicas
            assert not held.sizes or len(new.members) in held.sizes
            assert len({m.slot for m in new.members}) == len(new.members)
            assert all(held.slots[str(m.slot)] == m.pod_uid for m in new.members)
            self.check_ranks_kept(new)
            self.begun[new.id] = new

    def check_ranks_kept(self, new: Generation) -> None:
        before = self.begun.get(new.parent) if new.parent else None
        if before is None or new.cause in (Cause.START, Cause.RESUME):
            return
        old = [m.slot for m in before.members if m.slot in {n.slot for n in new.members}]
        assert old == [m.slot for m in new.members if m.slot in old], "those who stay keep their order"
        if len(old) == len(before.members) - 1 and len(new.members) == len(before.members):
            moved = [
                m.slot
                for m in before.members
                if new.node_rank(m.slot) not in (None, before.node_rank(m.slot))
            ]
            assert moved == [], "a spare takes the rank of the lost one, the others keep theirs"

    @rule(slot=SLOTS, answered=st.booleans())
    def heartbeat(self, slot: int, answered: bool) -> None:
        self.say(slot, answered=answered)

    @precondition(lambda self: self.reports)
    @rule(data=st.data())
    def late_report(self, data: st.DataObject) -> None:
        """A report that was long on its way, or comes twice."""
        report = data.draw(st.sampled_from(self.reports[-12:]))
        current = self.world.agents[report.slot]
        if report.slot in self.world.cut or (report.agent == current.number and not current.alive):
            return  # it would prove a life that has ended; only a message of the dead does that
        try:
            self.world.state = on_report(self.world.state, report, self.world.now)
        except Refused:
            return
        self.note()

    @precondition(lambda self: self.orders)
    @rule(data=st.data())
    def late_order(self, data: st.DataObject) -> None:
        slot, order = data.draw(st.sampled_from(self.orders[-12:]))
        if self.world.agents[slot].alive and order.version <= self.world.agents[slot].version:
            self.world.agents[slot].obey(order)

    # --- faults -----------------------------------------------------------------------------------------------------

    @rule(slot=SLOTS, local=st.integers(0, 1), code=st.sampled_from([-9, 1, 83]))
    def rank_exits(self, slot: int, local: int, code: int) -> None:
        agent = self.world.agents[slot]
        if agent.ranks and agent.ranks[local].exit is None:
            agent.rank(local, exit=code)
            self.disturbed += 1

    @rule(slot=SLOTS, local=st.integers(0, 1))
    def rank_freezes(self, slot: int, local: int) -> None:
        if self.world.agents[slot].ranks:
            self.world.agents[slot].rank(local, process="T")
            self.disturbed += 1

    @rule(slot=SLOTS, seen=st.booleans())
    def container_dies(self, slot: int, seen: bool) -> None:
        agent = self.world.agents[slot]
        if agent.alive:
            agent.alive = False
            self.disturbed += 1
            if seen and slot not in self.world.cut:
                self.world.state = on_lost(self.world.state, slot, agent.number, self.world.now)
                self.note()

    @rule(slot=SLOTS)
    def container_returns(self, slot: int) -> None:
        agent = self.world.agents[slot]
        if not agent.alive and not agent.leaving:
            agent.restart()
            self.disturbed += 1
            self.say(slot)

    @rule(slot=SLOTS, peers_too=st.booleans())
    def link_cut(self, slot: int, peers_too: bool) -> None:
        self.world.cut.add(slot)
        self.disturbed += 1
        if peers_too:
            self.frozen_out.add(slot)

    @rule(slot=SLOTS)
    def link_heals(self, slot: int) -> None:
        if slot in self.world.cut:
            self.disturbed += 1
        self.world.cut.discard(slot)
        self.frozen_out.discard(slot)

    @rule(slot=SLOTS)
    def connection_resets(self, slot: int) -> None:
        """The agent lives and asks again at once."""
        agent = self.world.agents[slot]
        if agent.alive and slot not in self.world.cut:
            self.world.state = on_lost(self.world.state, slot, agent.number, self.world.now)
            self.note()
            self.disturbed += 1
            self.say(slot)

    # --- plans ------------------------------------------------------------------------------------------------------

    @rule(slot=SLOTS)
    def leaves(self, slot: int) -> None:
        if self.world.agents[slot].alive:
            self.world.agents[slot].leaving = True
            self.disturbed += 1
            self.say(slot)

    @rule(slot=SLOTS)
    def pod_replaced(self, slot: int) -> None:
        """The operator puts a new pod in a slot whose old one is gone."""
        if self.world.agents[slot].alive or self.world.state.bounds is None:
            return
        self.pods += 1
        self.disturbed += 2
        self.world.agents[slot] = FakeAgent(slot, pod_uid=f"pod-{slot}-{self.pods}")
        self.change(slots={**self.world.state.bounds.slots, str(slot): self.world.agents[slot].pod_uid})

    @rule(replicas=st.integers(1, 3), even=st.booleans())
    def resized(self, replicas: int, even: bool) -> None:
        """Without every second size, or with all of them."""
        self.disturbed += 1
        held = self.world.state.bounds
        if held is not None:
            least = min(held.min_replicas, replicas)
            sizes = tuple(range(replicas, least - 1, -2)[::-1]) if even else ()
            self.change(replicas=replicas, min_replicas=sizes[0] if sizes else least, sizes=sizes)

    @rule()
    def suspended_or_resumed(self) -> None:
        self.disturbed += 1
        if self.world.state.bounds is not None:
            self.change(suspend=not self.world.state.bounds.suspend)

    def change(self, **change: Any) -> None:
        self.world.change(**change)
        self.note()

    # --- the coordinator --------------------------------------------------------------------------------------------

    @rule()
    def coordinator_restarts(self) -> None:
        self.disturbed += 1
        self.world.state = kept.revive(self.record, self.world.now)
        self.starts += 1
        self.note()

    @rule()
    def coordinator_is_replaced(self) -> None:
        held = self.world.state.bounds
        if held is None:
            return
        self.disturbed += 1
        counted = [e for e in self.world.state.history if e.counted and e.generation.id > held.counted_above]
        current = max(self.world.state.current, held.counted_above)
        self.world.state = kept.fresh(JOB, held.incarnation + 1, self.world.now)
        self.world.set_bounds(
            replace(
                held,
                version=held.version + 1,
                incarnation=held.incarnation + 1,
                restarts_left=held.restarts_left - len(counted),
                counted_above=current,
            )
        )
        self.note()

    # --- time -------------------------------------------------------------------------------------------------------

    def healthy(self) -> bool:
        """Whether the newest generation can step: everybody is there, runs it, and no rank is gone or stopped."""
        generation = max(self.told.values(), key=lambda one: one.id, default=None)
        if generation is None:
            return False
        for member in generation.members:
            agent = self.world.agents[member.slot]
            whole = agent.alive and agent.number == member.agent and agent.slot not in self.frozen_out
            if not whole or agent.generation != generation or agent.phase is not AgentPhase.RUNNING:
                return False
            if any(rank.exit is not None or rank.process == "T" for rank in agent.ranks):
                return False
        return True

    @rule(seconds=st.sampled_from([0.25, 1.0, 4.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        begun = len(self.begun)
        quiet = self.nothing_planned()
        for _ in range(round(seconds / TICK_S)):
            quiet = quiet and self.healthy()
            self.tick()
        if quiet:
            assert len(self.begun) == begun, "something was restarted while all advanced"

    def nothing_planned(self) -> bool:
        stage, held = self.world.state.stage, self.world.state.bounds
        if not isinstance(stage, Running) or stage.stop is not None or held is None or held.suspend:
            return False
        members = self.world.state.members
        known = all(self.world.state.agent(m) is not None for m in members)
        losing = any(self.world.agents[m.slot].leaving for m in members)
        told = any(m.slot not in self.world.cut for m in members)  # or nobody could know that all advance
        return known and told and not losing and len(members) == held.replicas and not self.pending()

    def pending(self) -> bool:
        """Whether a report on its way already holds a fault."""
        return any(
            agent.lost_at is not None
            or any(r.exit is not None or r.process == "T" for r in agent.report.ranks)
            for agent in self.world.state.agents.values()
        )

    def tick(self) -> None:
        self.world.now += TICK_S
        stepping = self.healthy()
        self.world.tick()
        self.note()
        for slot, agent in self.world.agents.items():
            agent.age(TICK_S)
            if stepping and agent.phase is AgentPhase.RUNNING and slot not in self.frozen_out:
                agent.step(agent.ranks[0].step + 2 if agent.ranks else 0)
            if (self.world.now / BEAT_S).is_integer():
                self.say(slot)

    # --- what always holds ------------------------------------------------------------------------------------------

    @invariant()
    def agents_never_go_back(self) -> None:
        for agent in self.world.agents.values() if hasattr(self, "world") else ():
            ids = [GenerationId.parse(one) for one in agent.ran]
            assert ids == sorted(set(ids))

    @invariant()
    def the_budget_is_never_exceeded(self) -> None:
        if hasattr(self, "world") and self.world.state.bounds is not None:
            held = self.world.state.bounds
            counted = sum(
                e.counted and e.generation.id > held.counted_above for e in self.world.state.history
            )
            assert counted <= max(held.restarts_left, 0)

    @invariant()
    def one_cause_one_generation(self) -> None:
        if hasattr(self, "begun"):
            assert len(self.begun) <= 1 + self.disturbed

    def teardown(self) -> None:
        """Whatever happened: once everybody is well again, the job runs, or has a reason not to."""
        if not hasattr(self, "world"):
            return
        self.world.cut.clear()
        self.frozen_out.clear()
        for slot, agent in list(self.world.agents.items()):
            if agent.leaving:
                agent.alive = False
                self.pod_replaced(slot)
            elif not agent.alive:
                agent.restart()
        held = self.world.state.bounds
        if held is not None and held.suspend:
            self.change(suspend=False)
        for _ in range(round(400 / TICK_S)):
            self.tick()
            if self.world.job().phase in (JobPhase.RUNNING, JobPhase.EXHAUSTED):
                break
        assert self.world.job().phase in (JobPhase.RUNNING, JobPhase.EXHAUSTED), self.world.state.stage


TestStorm = Storm.TestCase
TestStorm.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[
        Phase.explicit,
        Phase.reuse,
        Phase.generate,
        Phase.shrink,
    ],  # `explain` traces every line: too slow
)
