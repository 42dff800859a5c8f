"""What shall be, from what is: sentences about one pass."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fakes.job import (
    IP,
    UID,
    after,
    change_pod,
    coordinator,
    entry,
    generation,
    heard,
    made,
    now,
    reason,
    running,
    seen,
    slot_pod,
    started,
    state,
    with_spec,
    with_status,
    without,
)
from stormjib_operator.decide import decide
from stormjib_operator.observed import FOREIGN, Link, Problem, Refusal, ServiceSeen
from stormjib_runtime.wire import (
    AgentPhase,
    Cause,
    Fault,
    GenerationId,
    JobPhase,
    ResumePoint,
    StorageFinding,
)

# --- start ------------------------------------------------------------------------------------------------------------


def test_the_first_pass_keeps_the_template_and_makes_no_pod() -> None:
    decision = decide(seen(), now())
    assert made(decision) == ["j-token-3f0c2a4e", "j-3f0c2a4e-1"]
    assert decision.status.template == "j-3f0c2a4e-1"
    assert decision.again_s == 0.0


def test_numbers_are_in_the_status_before_pods_are_made() -> None:
    first = seen()
    second = after(first, decide(first, now()))
    decision = decide(second, now())
    assert made(decision) == []  # the Service has no address yet
    assert [each["kind"] for each in decision.apply] == ["Service", "NetworkPolicy"]
    assert [(entry.slot, entry.attempt) for entry in decision.status.slots] == [(0, 1), (1, 2), (2, 3)]
    assert (decision.status.attempts, decision.status.incarnation) == (3, 1)


def test_pods_come_as_coordinator_then_members_then_spares() -> None:
    current = seen()
    for _ in range(2):
        current = after(current, decide(current, now()))
    decision = decide(current, now())
    assert [[each["metadata"]["name"] for each in wave] for wave in decision.create] == [
        ["j-coord-1"],
        ["j-0-1", "j-1-2"],
        ["j-2-3"],
    ]


def test_a_settled_job_needs_nothing() -> None:
    current = running()
    decision = decide(current, now(2))
    assert (decision.delete, decision.apply, made(decision), decision.events) == ((), (), [], ())
    assert decision.status == current.job.status


def test_a_job_that_is_being_deleted_is_left_alone() -> None:
    current = running()
    decision = decide(replace(current, job=replace(current.job, deleting=True)), now(2))
    assert decision.status == current.job.status
    assert (decision.delete, made(decision), decision.bounds) == ((), [], None)


def test_spares_are_held_back_while_the_members_come_up() -> None:
    current = heard(started(), generation=None, phase=JobPhase.WAITING)
    early, late = decide(current, now(5)), decide(current, now(31))
    assert early.bounds is not None
    assert late.bounds is not None
    assert early.bounds.excluded == ("uid-j-2-3",)
    assert late.bounds.excluded == ()


def test_a_name_of_a_deleted_job_is_waited_for_and_a_pods_name_is_skipped() -> None:
    first = seen()
    old = slot_pod(started(), 1)
    first = replace(
        first,
        foreign=(replace(old, uid="old", attempt=9),),
        service=ServiceSeen("", FOREIGN),
        policy_applied=FOREIGN,
    )
    second = after(first, decide(first, now()))
    decision = decide(second, now())
    assert [entry.attempt for entry in decision.status.slots] == [10, 11, 12]
    assert decision.apply == ()
    assert decision.again_s == pytest.approx(0.3)


# --- slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "deleted"),
    [
        ({"phase": "Failed"}, True),
        ({"phase": "Succeeded"}, True),
        ({"deleting": True}, False),
    ],
)
def test_a_slot_whose_pod_ends_gets_the_next_attempt_at_once(
    change: dict[str, object], deleted: bool
) -> None:
    current = running()
    broken = change_pod(current, slot_pod(current, 2), **change)
    decision = decide(heard(broken), now(3))
    assert made(decision) == ["j-2-4"]
    assert [pod.name for pod in decision.delete] == (["j-2-3"] if deleted else [])
    assert decision.status.attempts == 4


def test_a_slot_whose_pod_is_gone_gets_the_next_attempt() -> None:
    current = running()
    assert made(decide(heard(without(current, slot_pod(current, 1))), now(3))) == ["j-1-4"]


def test_a_pod_that_was_never_made_is_made_under_the_same_name() -> None:
    current = running()
    slots = (*current.job.status.slots[:2], current.job.status.slots[2].model_copy(update={"pod_uid": ""}))
    lost = without(with_status(current, slots=slots), slot_pod(current, 2))
    assert made(decide(heard(lost), now(3))) == ["j-2-3"]


def test_a_silent_agent_is_replaced_only_when_it_does_not_train() -> None:
    current = running()
    views = state(current).agents
    silent = tuple(replace(view, silent_s=12.0) for view in views)
    decision = decide(heard(current, agents=silent), now(3))
    assert made(decision) == ["j-2-4"]  # slot 2 is the spare; 0 and 1 are silent too, but train
    assert [(pod.name, pod.uid) for pod in decision.delete] == [("j-2-3", "uid-j-2-3")]


def test_a_member_that_is_drained_keeps_its_registration_until_it_has_left() -> None:
    current = running()
    drained = change_pod(current, slot_pod(current, 1), deleting=True)
    first = decide(heard(drained), now(3))
    assert made(first) == ["j-1-4"]
    both = after(drained, first)
    leaving = decide(heard(both), now(3))
    assert leaving.bounds is not None
    assert leaving.bounds.slots["1"] == "uid-j-1-2"
    gone = heard(both, generation=generation(2, slots=(0, 2)))
    left = decide(gone, now(4))
    assert left.bounds is not None
    assert left.bounds.slots["1"] == "uid-j-1-2"  # it still has to hear that it may go
    ready = heard(change_pod(both, slot_pod(both, 1), started=True), generation=generation(2, slots=(0, 2)))
    taken = decide(ready, now(5))
    assert taken.bounds is not None
    assert taken.bounds.slots["1"] == "uid-j-1-4"


def test_a_pod_that_a_node_refuses_is_not_replaced_a_hundred_times_a_second() -> None:
    current = running()
    refused = change_pod(current, slot_pod(current, 2), phase="Failed", started=False)
    early, late = decide(heard(refused), now(1)), decide(heard(refused), now(11))
    assert made(early) == []
    assert early.again_s == pytest.approx(9.0)
    assert made(late) == ["j-2-4"]


def test_more_nodes_are_new_slots_and_fewer_take_only_slots_that_do_not_train() -> None:
    current = running()
    more = with_spec(current, nodes={"replicas": 3, "spares": 1})
    assert made(decide(heard(more), now(3))) == ["j-3-4"]
    fewer = with_spec(current, nodes={"replicas": 1, "spares": 0})
    decision = decide(heard(fewer), now(3))
    assert [pod.name for pod in decision.delete] == ["j-2-3"]  # 0 and 1 still train
    going = heard(change_pod(after(fewer, replace(decision, delete=())), slot_pod(current, 2), deleting=True))
    assert decide(going, now(3)).bounds.slots["2"] == "uid-j-2-3"  # type: ignore[union-attr]  # hears that it may go
    left = heard(after(fewer, decision), generation=generation(2, slots=(0,), cause=Cause.SHRINK))
    assert [pod.name for pod in decide(left, now(4)).delete] == ["j-1-2"]


def test_nothing_is_taken_away_while_nobody_can_say_who_trains() -> None:
    fewer = with_spec(running(), nodes={"replicas": 1, "spares": 0})
    assert decide(replace(fewer, link=Link()), now(3)).delete == ()
    assert decide(heard(fewer, generation=None, phase=JobPhase.WAITING), now(3)).delete == ()


# --- coordinator ------------------------------------------------------------------------------------------------------


def test_a_lost_coordinator_is_replaced_away_from_its_node_in_the_same_pass() -> None:
    current = running()
    lost = replace(current, link=Link(coordinator(current).uid, state(current), lost=True, silent_s=3.2))
    decision = decide(lost, now(3))
    assert made(decision) == ["j-coord-2"]
    assert [pod.name for pod in decision.delete] == ["j-coord-1"]
    (pod,) = decision.create[0]
    (term,) = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    assert term == {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-2"]}]}
    (service,) = decision.apply
    assert service["spec"]["selector"]["stormjib.io/incarnation"] == "2"
    assert service["spec"]["clusterIP"] == IP
    assert [event.reason for event in decision.events] == ["CoordinatorReplaced"]
    assert decision.bounds is not None
    assert decision.bounds.incarnation == 2


@pytest.mark.parametrize("change", [{"deleting": True}, {"phase": "Failed"}, {"phase": "Succeeded"}])
def test_a_coordinator_whose_pod_ends_is_replaced(change: dict[str, object]) -> None:
    current = running()
    assert "j-coord-2" in made(decide(change_pod(current, coordinator(current), **change), now(3)))


def test_a_coordinator_that_is_gone_is_replaced_and_its_ranks_go_on() -> None:
    current = running()
    decision = decide(replace(without(current, coordinator(current)), link=Link()), now(3))
    assert made(decision) == ["j-coord-2"]
    assert reason(decision.status, "Running") == "Unknown/CoordinatorLost"
    assert decision.status.nodes == current.job.status.nodes


def test_a_coordinator_whose_container_restarts_is_waited_for() -> None:
    current = running()
    down = change_pod(current, coordinator(current), ready=False)
    uid = coordinator(current).uid
    assert made(decide(replace(down, link=Link(uid, state(current), silent_s=8.0)), now(9))) == []
    assert made(decide(replace(down, link=Link(uid, state(current), silent_s=31.0)), now(32))) == [
        "j-coord-2"
    ]


def test_a_coordinator_that_has_only_the_avoided_node_gets_it_in_the_end() -> None:
    current = running()
    lost = replace(current, link=Link(coordinator(current).uid, state(current), lost=True))
    second = after(lost, decide(lost, now(3)))
    waiting = change_pod(second, coordinator(second), created=now(3).seconds)
    waiting = change_pod(waiting, coordinator(waiting), problem=Problem("Unschedulable", "no node"))
    assert made(decide(waiting, now(10))) == []
    decision = decide(waiting, now(19))
    assert made(decision) == ["j-coord-3"]
    assert "nodeAffinity" not in decision.create[0][0]["spec"]["affinity"]


def test_a_new_coordinator_that_knows_nothing_yet_changes_no_condition() -> None:
    current = running()
    lost = replace(current, link=Link(coordinator(current).uid, state(current), lost=True))
    second = after(lost, decide(lost, now(3)))
    fresh = change_pod(
        second, coordinator(second), phase="Running", ready=True, ip="10.1.0.9", created=now(4).seconds
    )
    decision = decide(heard(fresh, generation=None, phase=JobPhase.WAITING, agents=()), now(5))
    assert reason(decision.status, "Degraded") == "False/FullSize"
    assert decision.status.nodes.active == 2


def test_checkpoints_of_a_deleted_job_raise_the_incarnation_before_the_first_generation() -> None:
    current = started()
    found = StorageFinding(GenerationId(4, 9), "another-uid")
    decision = decide(heard(current, generation=None, phase=JobPhase.WAITING, storage=found), now(2))
    assert decision.bounds is not None
    assert decision.bounds.incarnation == 5
    assert made(decision) == []  # the pod stays; only its number grows
    assert decision.status.coordinator.incarnation == 1


def test_checkpoints_below_ours_or_found_too_late_raise_nothing() -> None:
    current = started()
    below = StorageFinding(GenerationId(0, 9), "another-uid")
    late = StorageFinding(GenerationId(4, 9), "another-uid")
    for change in ({"storage": below, "generation": None}, {"storage": late}):
        assert decide(heard(current, **change), now(2)).status.incarnation == 1


# --- budget -----------------------------------------------------------------------------------------------------------


def test_history_is_counted_once_however_often_it_is_seen() -> None:
    current = running(recovery={"maxRestarts": 5})
    history = (entry(2), entry(3, Cause.AGENT_SILENT), entry(4, Cause.LEAVE))
    told = heard(current, history=history, generation=generation(4))
    first = decide(told, now(5))
    assert first.status.generation == "1.4"
    assert (first.status.restarts.total, first.status.restarts.counted) == (2, 1)
    assert first.bounds is not None
    assert (first.bounds.restarts_left, first.bounds.counted_above) == (4, GenerationId(1, 4))
    assert [event.reason for event in first.events] == ["RankExit", "AgentSilent", "Leave"]
    again = decide(after(told, first), now(6))
    assert again.status.restarts == first.status.restarts
    assert again.events == ()


def test_only_the_last_ten_faults_are_kept_newest_first() -> None:
    current = running()
    history = tuple(entry(number, message=f"fault {number}") for number in range(2, 16))
    faults = decide(heard(current, history=history, generation=generation(15)), now(5)).status.faults
    assert [fault.generation for fault in faults] == [f"1.{n}" for n in range(15, 5, -1)]
    assert (faults[0].node_name, faults[0].rank, faults[0].message) == ("node-1", 3, "fault 15")


# --- ends -------------------------------------------------------------------------------------------------------------


def test_a_complete_job_is_told_to_finish_and_then_loses_coordinator_and_spare() -> None:
    current = running()
    done = heard(current, phase=JobPhase.COMPLETE)
    first = decide(done, now(60))
    assert reason(first.status, "Complete") == "True/Complete"
    assert first.bounds is not None
    assert first.bounds.finish
    assert first.delete == ()
    ended = after(done, first)
    for slot in (0, 1):
        ended = change_pod(ended, slot_pod(ended, slot), phase="Succeeded")
    last = decide(ended, now(62))
    assert sorted(pod.name for pod in last.delete) == ["j-2-3", "j-coord-1"]
    assert decide(after(ended, last), now(63)).delete == ()
    assert reason(last.status, "Running") == "False/Complete"


def test_agents_that_do_not_finish_are_removed_after_a_while() -> None:
    current = running()
    done = heard(current, phase=JobPhase.COMPLETE)
    ended = after(done, decide(done, now(10)))
    stuck = replace(ended, link=Link())
    assert decide(stuck, now(20)).delete == ()
    assert len(decide(stuck, now(41)).delete) == 4


def test_a_spent_budget_is_failed_with_the_ranks_last_words() -> None:
    current = running(recovery={"maxRestarts": 1})
    fault = Fault(Cause.RANK_EXIT, slot=0, rank=1, message="exit 1\nModuleNotFoundError: no module")
    told = heard(current, phase=JobPhase.EXHAUSTED, history=(entry(2),), last_fault=fault)
    decision = decide(told, now(9))
    failed = decision.status.condition("Failed")
    assert failed is not None
    assert failed.reason == "RestartBudgetSpent"
    assert failed.message.startswith(
        "1 of 1 restarts are spent; the last fault was RankExit of rank 1: exit 1"
    )
    assert "ModuleNotFoundError" in failed.message
    assert decision.status.completion_time == now(9).text
    assert [event.reason for event in decision.events if event.warning][-1] == "RestartBudgetSpent"


def test_nothing_is_replaced_after_the_end() -> None:
    current = running()
    done = heard(current, phase=JobPhase.COMPLETE)
    ended = after(done, decide(done, now(10)))
    gone = replace(without(ended, coordinator(ended)), link=Link())
    assert made(decide(gone, now(11))) == []


# --- suspend ----------------------------------------------------------------------------------------------------------


def test_a_suspended_job_saves_first_and_then_gives_its_nodes_back() -> None:
    current = with_spec(running(), suspend=True)
    first = decide(heard(current, phase=JobPhase.STOPPING), now(5))
    assert first.bounds is not None
    assert first.bounds.suspend
    assert first.delete == ()
    saved = decide(heard(after(current, first), phase=JobPhase.SUSPENDED), now(6))
    assert len(saved.delete) == 4
    empty = replace(after(current, first), pods=(), link=Link())
    held = decide(empty, now(7))
    assert reason(held.status, "Suspended") == "True/Suspended"
    assert (held.status.slots, held.status.template) == ((), "")


def test_a_resumed_job_gets_new_numbers_and_a_new_template() -> None:
    current = with_spec(running(), suspend=True)
    empty = replace(current, pods=(), link=Link())
    held = after(empty, decide(empty, now(5)))
    resumed = replace(with_spec(held, suspend=False), rendered=None)
    resumed = after(resumed, decide(resumed, now(6)))
    assert resumed.job.status.template == "j-3f0c2a4e-3"
    decision = decide(resumed, now(6))
    assert made(decision) == ["j-coord-2", "j-0-4", "j-1-5", "j-2-6"]
    assert reason(decision.status, "Suspended") == "False/NotSuspended"


def test_a_suspension_that_is_taken_back_is_carried_through_first() -> None:
    current = with_spec(running(), suspend=True)
    begun = after(current, decide(heard(current), now(5)))
    back = with_spec(begun, suspend=False)
    decision = decide(heard(back), now(6))
    assert decision.bounds is not None
    assert decision.bounds.suspend


def test_a_suspension_that_nobody_answers_ends_after_the_grace_period() -> None:
    current = with_spec(running(), suspend=True)
    begun = replace(after(current, decide(heard(current), now(5))), link=Link())
    assert decide(begun, now(64)).delete == ()
    assert len(decide(begun, now(66)).delete) == 4


def test_a_job_that_is_made_suspended_makes_nothing() -> None:
    decision = decide(seen(suspend=True), now())
    assert made(decision) == []
    assert reason(decision.status, "Suspended") == "True/Suspended"


# --- what a person reads ----------------------------------------------------------------------------------------------


def test_a_refused_pod_is_a_condition_in_the_servers_words_and_is_asked_for_later() -> None:
    current = running()
    words = 'pods "j-2-4" is forbidden: exceeded quota: small'
    refusal = {"Pod j-2-4": Refusal(403, words, retry_at=now(5).seconds, delay=2.0)}
    broken = replace(change_pod(current, slot_pod(current, 2), phase="Failed"), refusals=refusal)
    first = decide(heard(broken), now(3))
    assert made(first) == []
    assert reason(first.status, "Scheduled") == "False/CreateRefused"
    assert words in first.status.condition("Scheduled").message  # type: ignore[union-attr]
    assert made(decide(heard(broken), now(5))) == ["j-2-4"]


def test_progress_alone_is_written_every_ten_seconds() -> None:
    current = running()
    assert current.job.status.progress.step == 40
    assert decide(heard(current, step=41), now(5)).status.progress.step == 40
    assert decide(heard(current, step=90), now(12)).status.progress.step == 90


def test_the_end_writes_the_last_step_at_once() -> None:
    current = running()
    assert decide(heard(current, step=41, phase=JobPhase.COMPLETE), now(2)).status.progress.step == 41


def test_a_script_that_tells_no_step_is_running_once_its_ranks_run() -> None:
    current = started()
    silent = heard(current, phase=JobPhase.STARTING, step=-1, loss=None)
    assert reason(decide(silent, now(5)).status, "Running") == "True/Running"
    preparing = tuple(replace(view, phase=AgentPhase.PREPARED) for view in state(current).agents)
    early = heard(current, phase=JobPhase.STARTING, agents=preparing)
    assert reason(decide(early, now(5)).status, "Running") == "False/Starting"


def test_fewer_nodes_than_wanted_is_degraded() -> None:
    current = running()
    shrunk = heard(current, generation=generation(2, slots=(0,)))
    decision = decide(shrunk, now(5))
    assert reason(decision.status, "Degraded") == "True/FewerNodes"
    assert decision.status.nodes.summary == "1/2+1"


def test_a_committed_step_is_shown_and_makes_checkpoints_healthy() -> None:
    current = running()
    assert reason(current.job.status, "CheckpointHealthy") == "Unknown/NoneYet"
    point = ResumePoint(20, GenerationId(1, 1), "d")
    told = heard(current, committed=point)
    decision = decide(told, now(5))
    assert decision.status.checkpoint.last_committed_step == 20
    assert reason(decision.status, "CheckpointHealthy") == "True/Committed"
    newer = heard(after(told, decision), committed=replace(point, step=40))
    assert (
        decide(newer, now(9)).status.checkpoint.last_committed_step == 20
    )  # with the progress, every ten seconds
    assert decide(newer, now(12)).status.checkpoint.last_committed_step == 40


def test_a_storage_that_cannot_be_opened_is_said() -> None:
    current = running()
    history = (entry(2, Cause.PREPARE_FAILED, "read-only file system"),)
    idle = tuple(replace(view, phase=AgentPhase.IDLE) for view in state(current).agents)
    told = heard(current, history=history, generation=generation(2), phase=JobPhase.STARTING, agents=idle)
    decision = decide(told, now(5))
    assert reason(decision.status, "CheckpointHealthy") == "False/StorageFailed"
    assert reason(decision.status, "Recovering") == "True/PrepareFailed"


def test_what_agents_say_becomes_events_once() -> None:
    current = heard(running(), events=("slot 1: ZygoteUnfit: libcuda has a context", "hello"))
    events = decide(current, now(5)).events
    assert [(event.reason, event.message, event.once) for event in events] == [
        ("ZygoteUnfit", "slot 1: libcuda has a context", True),
        ("Notice", "hello", True),
    ]


def test_every_known_condition_is_there_from_the_first_pass() -> None:
    kinds = [condition.type for condition in decide(seen(), now()).status.conditions]
    assert kinds == [
        "Suspended",
        "Scheduled",
        "Running",
        "Degraded",
        "Recovering",
        "CheckpointHealthy",
        "Complete",
        "Failed",
    ]


def test_a_condition_keeps_its_time_while_its_status_stays() -> None:
    current = running()
    later = decide(heard(current, committed=ResumePoint(20, GenerationId(1, 1), "d")), now(30)).status
    assert later.condition("Running").last_transition_time == now(1).text  # type: ignore[union-attr]
    assert later.condition("CheckpointHealthy").last_transition_time == now(30).text  # type: ignore[union-attr]


def test_the_same_input_gives_the_same_answer() -> None:
    current = heard(running())
    assert decide(current, now(5)) == decide(current, now(5))
    assert UID in repr(current.job)
    assert "oooo" not in repr(current)  # tokens stay out of logs
