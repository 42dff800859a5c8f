"""The planner's answer: what goes into the bounds, what a person reads, and that nothing starts where nothing fits."""

from __future__ import annotations

from typing import Any

import pytest

from fakes.job import after, heard, made, now, reason, running, seen, with_spec
from stormjib_operator import bounds, planning
from stormjib_operator.decide import decide

MIB = 2**20
NODES = {"replicas": 4, "minReplicas": 1}
"""Of two ranks each."""


def model(memory: str = "1Gi", **change: Any) -> dict[str, Any]:
    """220 MiB of weights, gradients, optimizer and slack in one piece; two gathered layers take 0.9 MiB."""
    return {"parameters": 10 * MIB, "layers": 100, "memoryPerRank": memory} | change


def given(**spec: Any) -> Any:
    job = running(**spec)
    return bounds.derive(job, job.job.status, now(5))


def test_only_sizes_with_room_go_into_the_bounds() -> None:
    found = given(nodes=NODES, model=model("57Mi"))
    assert (found.sizes, found.min_replicas, found.replicas) == ((2, 3, 4), 2, 4)
    assert found.replicate == {"2": 1, "3": 1, "4": 1}


def test_of_the_sizes_that_the_user_names_the_others_are_not_looked_at() -> None:
    found = given(nodes={"replicas": 4, "allowedReplicas": [1, 2, 4]}, model=model("57Mi"))
    assert found.sizes == (2, 4)


def test_each_size_has_the_most_copies_that_divide_and_have_room() -> None:
    found = given(nodes=NODES, model=model(replicate=3))
    assert found.replicate == {"1": 2, "2": 2, "3": 3, "4": 2}
    tight = given(nodes=NODES, model=model("57Mi", replicate=3))
    assert tight.replicate == {"2": 1, "3": 1, "4": 2}


def test_without_a_model_nothing_is_planned() -> None:
    found = given(nodes=NODES)
    assert (found.sizes, found.replicate, found.min_replicas) == ((), {}, 1)
    assert reason(running(nodes=NODES).job.status, "Feasible") == "absent"


def test_the_condition_tells_every_size_and_the_reason_against_it() -> None:
    first = decide(seen(nodes={"replicas": 3, "minReplicas": 1}, model=model("57Mi")), now())
    condition = first.status.condition("Feasible")
    assert condition is not None
    assert reason(first.status, "Feasible") == "True/SomeFit"
    assert condition.message == (
        "not 1 node: needs 111 MiB a rank, and there are 57 MiB; "
        "3 nodes: dp1.fsdp6, 38 MiB a rank; 2 nodes: dp1.fsdp4, 56 MiB a rank"
    )
    assert [event.reason for event in first.events] == ["SomeFit"]
    again = decide(after(seen(nodes=NODES, model=model("57Mi")), first), now())
    assert again.events == ()
    assert reason(decide(seen(model=model()), now()).status, "Feasible") == "True/AllFit"


def test_where_nothing_fits_nothing_is_made_until_the_spec_changes() -> None:
    first = seen(nodes=NODES, model=model("1Mi"))
    decision = decide(first, now())
    assert (made(decision), decision.apply, decision.bounds, decision.again_s) == ([], (), None, None)
    assert reason(decision.status, "Feasible") == "False/NothingFits"
    assert reason(decision.status, "Running") == "False/NothingFits"
    assert [(event.reason, event.warning) for event in decision.events] == [("NothingFits", True)]
    assert "raise nodes.replicas or model.memoryPerRank" in decision.events[0].message
    mended = with_spec(after(first, decision), nodes=NODES, model=model())
    assert len(made(decide(mended, now(1)))) == 2


def test_a_job_that_trains_goes_on_within_the_users_sizes() -> None:
    changed = with_spec(running(nodes=NODES), nodes=NODES, model=model("1Mi"))
    decision = decide(heard(changed), now(3))
    assert decision.bounds is not None
    assert (decision.bounds.sizes, decision.bounds.replicas, decision.bounds.replicate) == ((), 4, {})
    assert decision.delete == ()
    assert reason(decision.status, "Feasible") == "False/NothingFits"
    assert reason(decision.status, "Running") == "True/Running"


@pytest.mark.parametrize(
    ("text", "size"), [("5", 5), ("7k", 7000), ("80G", 80 * 10**9), ("64Gi", 64 * 2**30), ("2Ki", 2048)]
)
def test_memory_is_a_quantity(text: str, size: int) -> None:
    spec = seen(model=model(text)).job.spec
    assert spec.model is not None
    assert spec.model.memory_bytes == size


@pytest.mark.parametrize("text", ["", "Gi", "0", "1.5Gi", "-1", "1gi", "1 Gi", "lots"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="memoryPerRank"):
        seen(model=model(text))


def test_the_largest_plan_fits_into_a_condition_and_into_a_pass() -> None:
    nodes = {"replicas": 4096, "minReplicas": 4033}
    largest = model("1Mi", parameters=2**53, replicate=4096)
    decision = decide(seen(nodes=nodes, model=largest), now())
    condition = decision.status.condition("Feasible")
    assert condition is not None
    assert len(condition.message) <= 4096
    found = planning.plan(seen(nodes=nodes, model=largest).job.spec)
    assert found is not None
    assert len(found.rejected) == 64
