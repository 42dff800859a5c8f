"""Records of real ranks over Gloo, against a count by torch's profiler, which knows nothing of them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from fakes import gloo, probed
from fakes.agents import SCRIPTS
from fakes.warm import Warm
from stormjib_health.records import stack
from stormjib_health.records.groups import GroupsReader, groups_path
from stormjib_health.records.layout import CallRecord, StepRecord
from stormjib_health.records.ring import Reader, Recorder, ring_path
from stormjib_health.wire import Kind, Phase
from stormjib_runtime.page import Page
from stormjib_runtime.wire import Env, GenerationId

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.timeout(120)


def run(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """What each of two ranks has counted."""
    gloo.run(2, folder, probed.counted, folder, scenario)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_function_of_a_plain_script(tmp_path: Path) -> None:
    first, second = run(tmp_path, "plain")
    common = {
        "ALL_REDUCE": 2, "REDUCE": 1, "REDUCE_SCATTER": 1, "GATHER": 1, "SCATTER": 1, "ALL_TO_ALL": 1, "BARRIER": 1,
        "ALL_GATHER": 4, "BROADCAST": 3,
    }  # fmt: skip
    assert first["kinds"] == {**common, "SEND": 2, "RECV": 1}
    assert second["kinds"] == {**common, "SEND": 1, "RECV": 2}
    assert first["names"] == ["default_pg:0"]


@pytest.mark.parametrize(
    ("scenario", "kinds"),
    [
        ("ddp", {"ALL_REDUCE", "BROADCAST"}),
        ("fsdp", {"ALL_GATHER", "REDUCE_SCATTER", "ALL_REDUCE"}),
        ("tensor_parallel", {"ALL_REDUCE"}),
        ("functional", {"ALL_REDUCE", "ALL_GATHER", "REDUCE_SCATTER"}),
        ("compiled", {"ALL_REDUCE"}),
    ],
)
def test_every_call_of_all_ranks_alike(tmp_path: Path, scenario: str, kinds: set[str]) -> None:
    first, second = run(tmp_path, scenario)
    assert set(first["kinds"]) == kinds
    assert sum(first["kinds"].values()) >= 3
    assert first["groups"] == second["groups"], "keys and counts are equal on all ranks"
    assert ("COMPILE" in first["phases"]) == (scenario == "compiled")
    assert ("OPTIMIZER" in first["phases"]) == (scenario in ("ddp", "fsdp", "tensor_parallel"))


def test_sends_and_receives_of_a_pipeline(tmp_path: Path) -> None:
    first, second = run(tmp_path, "pipeline")
    assert first["kinds"]["SEND"] == second["kinds"]["RECV"] >= 8
    assert first["kinds"]["RECV"] == second["kinds"]["SEND"] >= 8
    assert first["groups"].keys() == second["groups"].keys()


def test_groups_that_are_made_later(tmp_path: Path) -> None:
    first, second = run(tmp_path, "later")
    assert first["kinds"] == {"ALL_REDUCE": 4, "BARRIER": 1, **splits(first)}
    assert second["kinds"] == {"ALL_REDUCE": 3, "BARRIER": 1, **splits(second)}
    shared = first["groups"].keys() & second["groups"].keys()
    assert all(first["groups"][key] == second["groups"][key] for key in shared)
    assert len(first["groups"].keys() - shared) == 2, "the one of rank 0 alone, and its own"
    assert any("split" in name for name in first["names"])


def splits(counted: dict[str, Any]) -> dict[str, int]:
    return {kind: n for kind, n in counted["kinds"].items() if kind == "OTHER"}


def test_with_a_torch_without_hooks_plain_functions_are_seen(tmp_path: Path) -> None:
    gloo.run(2, tmp_path, probed.wrapped, tmp_path)


def test_what_is_read_and_timed_of_a_step_and_who_waits(tmp_path: Path) -> None:
    """Rank 1 comes 5 ms late to one collective of each step: rank 0 is seen to wait for it, and it for nobody."""
    gloo.run(2, tmp_path, probed.steps, tmp_path)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["signatures"] == second["signatures"]
    assert first["waits"].keys() == second["waits"].keys()
    late = [first["waits"][number] - second["waits"][number] for number in first["waits"]]
    assert statistics.median(late) > 0.003


def test_phases_that_torch_shows_and_a_script_says(tmp_path: Path) -> None:
    gloo.run(1, tmp_path, probed.phases, tmp_path)


def test_a_probe_that_fails_stops_no_call_and_keeps_no_group(tmp_path: Path) -> None:
    gloo.run(2, tmp_path, probed.harmless, tmp_path)


async def test_a_fork_of_the_zygote_is_recorded_without_its_script_s_help(tmp_path: Path) -> None:
    script = str(SCRIPTS / "recorded.py")
    env = {Env.PAGE_DIR.value: str(tmp_path), "LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    page = Page.create(tmp_path / "0", GenerationId(1, 1))
    async with Warm(tmp_path) as warm:
        without = await warm.fork(script, **env)
        assert without.exit == 0
        assert "calls are not recorded: " in without.err
        Recorder.create(ring_path(tmp_path, 0)).close()
        page.step = -1
        stuck = asyncio.create_task(warm.fork(script, "stuck", **env))
        pid = await until(lambda: rank_of(warm.zygote.pid))
        reader, groups = Reader.open(ring_path(tmp_path, 0)), GroupsReader(groups_path(tmp_path, 0))
        await until(lambda: page.step == 3 and "stuck" in (tmp_path / "out-2").read_text())
        check(reader, groups)
        assert stack.ask(pid, stack.stack_path(tmp_path, 0))
        await until(lambda: "in stuck" in stack.read(stack.stack_path(tmp_path, 0)))
        os.kill(pid, signal.SIGKILL)
        assert (await stuck).exit == -signal.SIGKILL
    reader.close()
    page.close()


def check(reader: Reader, groups: GroupsReader) -> None:
    batch = reader.read()
    groups.read()
    calls = [record for record in batch.records if isinstance(record, CallRecord)]
    named = [
        (getattr(groups.group(call.group), "name", ""), call.kind, call.step, call.position) for call in calls
    ]
    steps = [("default_pg:0", Kind.ALL_REDUCE, step, at) for step in (-1, 1, 2) for at in (0, 1)]
    assert named == [*steps, ("undefined:1", Kind.BARRIER, 3, 0)]
    assert [record.step for record in batch.records if isinstance(record, StepRecord)] == [1, 2, 3]
    assert batch.state.phase is Phase.STEP


def rank_of(zygote: int) -> int:
    """The rank that a zygote has forked, once it is named so."""
    children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
    named = [int(pid) for pid in children if Path(f"/proc/{pid}/comm").read_text() == "rank0\n"]
    return named[0] if named else 0


T = TypeVar("T")


async def until(value: Callable[[], T]) -> T:
    """Wait until it is true, at most half a minute."""
    async with asyncio.timeout(30):
        while not (found := value()):
            await asyncio.sleep(0.01)
        return found
