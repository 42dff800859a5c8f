"""The environment of a rank, next to what torchrun's own code sets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stormjib_runtime import codec, torchrun
from stormjib_runtime.environment import base_environment, join_address, rank_environment, split_address
from stormjib_runtime.wire import Cause, Env, Generation, GenerationId, Member, ResumePoint

MEMBERS = (Member(2, 1, "pod-2", "10.0.0.3", 2), Member(0, 4, "pod-0", "10.0.0.1", 3))
GENERATION = Generation(GenerationId(2, 7), GenerationId(2, 6), MEMBERS, Cause.RANK_EXIT)
RESUME = ResumePoint(120, GenerationId(2, 6), "ab" * 32)
TORCHRUN = [
    "RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RESTART_COUNT",
    "TORCHELASTIC_MAX_RESTARTS",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_USE_AGENT_STORE",
]


def env_of(slot: int, local_rank: int) -> dict[str, str]:
    return rank_environment(
        GENERATION, slot, local_rank, "[fd00::3]:4711", RESUME, Path("/dev/shm/pages"), "job"
    )


def test_every_name_of_torchrun_is_there() -> None:
    ours = env_of(0, 0)
    assert [name for name in TORCHRUN if name not in ours] == []
    assert all(type(value) is str for value in ours.values())


def test_ranks_follow_the_order_of_members_not_of_slots() -> None:
    assert [env_of(2, 1)[name] for name in ("RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")] == ["1", "0", "2"]
    assert [env_of(0, 2)[name] for name in ("RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE")] == ["4", "1", "3"]
    assert env_of(0, 2)["WORLD_SIZE"] == "5"


def test_the_store_is_the_master() -> None:
    env = env_of(2, 0)
    assert (env["MASTER_ADDR"], env["MASTER_PORT"]) == ("fd00::3", "4711")
    assert env["TORCHELASTIC_USE_AGENT_STORE"] == "True"


def test_what_a_script_of_ours_reads() -> None:
    env = env_of(0, 1)
    assert (env[Env.GENERATION], env[Env.PAGE_DIR]) == ("2.7", "/dev/shm/pages")
    assert codec.decode(ResumePoint, env[Env.RESUME]) == RESUME


def test_the_planned_degree_reaches_ranks_and_torchrun() -> None:
    planned = replace(GENERATION, replicate=2)
    for generation, told in ((GENERATION, "0"), (planned, "2")):
        env = rank_environment(generation, 0, 0, "h:1", None, Path("/dev/shm/pages"), "job")
        assert env[Env.REPLICATE] == torchrun.environment(generation)[Env.REPLICATE] == told


def test_who_is_no_member_has_no_rank() -> None:
    with pytest.raises(ValueError, match="slot 1 is no member"):
        env_of(1, 0)


def test_the_base_keeps_what_is_set_and_drops_secrets() -> None:
    base = base_environment({"OMP_NUM_THREADS": "6", "HOME": "/x", Env.TOKEN: "a", Env.OPERATOR_TOKEN: "b"})
    assert (base["OMP_NUM_THREADS"], base["HOME"]) == ("6", "/x")
    assert Env.TOKEN not in base
    assert Env.OPERATOR_TOKEN not in base
    assert base_environment({})["OMP_NUM_THREADS"] == "1"
    assert base_environment({})["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


@pytest.mark.parametrize("address", [("10.0.0.1", 80), ("fd00::1", 80), ("localhost", 1)])
def test_addresses_go_both_ways(address: tuple[str, int]) -> None:
    host, port = split_address(join_address(*address))
    assert (host, int(port)) == address


def test_torchrun_gets_our_store_and_the_budget() -> None:
    argv = torchrun.argv(GENERATION, 0, "job", "10.0.0.3:4711", 2, ["-m", "trainer", "--x"])
    assert argv[1:3] == ["-m", "torch.distributed.run"]
    assert argv[-3:] == ["-m", "trainer", "--x"]
    assert {"--nnodes=2", "--nproc-per-node=3", "--max-restarts=2", "--rdzv-endpoint=10.0.0.3:4711"} <= set(
        argv
    )
    assert "--rdzv-id=job-2.7" in argv
    assert any(word.startswith("--rdzv-conf=is_host=false,") for word in argv)
