"""Checks of an agent: what it answers whatever the coordinator asks, the peer does, or the process says."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from stormjib_health.confirm.transfer import BURST_BYTES, BURSTS, Server, measuring_token
from stormjib_health.wire import Answer, Check, CheckKind
from stormjib_runtime import codec
from stormjib_runtime.checks import MAX_CHECKS, Checks
from stormjib_runtime.errors import ZygoteError
from stormjib_runtime.one_shot import MAX_SAID
from stormjib_runtime.output import Outputs
from stormjib_runtime.wire import RankState

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

FOUND = Answer(0, ok=True, seconds=0.005, cpu_s=0.004, digest="d", versions="v")


@dataclass
class Launcher:
    """Stands for the zygote: each launch says `out`, `err`, and ends with `exit`; None never ends."""

    out: bytes = codec.encode(FOUND)
    err: bytes = b""
    exit: int | None = 0
    error: Exception | None = None
    words: list[Sequence[str]] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def launch(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        exited: Callable[[int], None],
    ) -> int:
        if self.error is not None:
            raise self.error
        self.words.append(words)
        os.write(stdout, self.out)
        os.write(stderr, self.err)
        self.running += 1
        self.most = max(self.most, self.running)
        if self.exit is not None:
            asyncio.get_running_loop().call_later(0.01, self._end, exited, self.exit)
        return 0  # no process: nothing to kill

    def _end(self, exited: Callable[[int], None], code: int) -> None:
        self.running -= 1
        exited(code)


@pytest.fixture
def log() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


def make(log: int, launcher: Launcher, gpus: int = 0, ranks: Sequence[RankState] = ()) -> Checks:
    outputs = Outputs(asyncio.get_running_loop(), log, log)
    return Checks(launcher.launch, outputs, "secret", "127.0.0.1", gpus, lambda: ranks)


@pytest_asyncio.fixture
async def peer() -> AsyncIterator[str]:
    """The address of another agent's measuring server."""
    server = Server(measuring_token("secret"))
    await server.start()
    yield f"127.0.0.1:{server.port}"
    await server.close()


def compute(number: int = 1, rank: int = 0, limit_s: float = 1.0) -> Check:
    return Check(number, CheckKind.COMPUTE, rank=rank, limit_s=limit_s)


async def test_a_transfer_and_a_product_are_answered_in_order(log: int, peer: str) -> None:
    checks = make(log, Launcher())
    answers = await checks.run([compute(7), Check(8, CheckKind.TRANSFER, peer)])
    assert [answer.id for answer in answers] == [7, 8]
    assert (answers[0].digest, answers[0].cpu_s) == ("d", 0.004)
    assert answers[1].bytes == BURSTS * BURST_BYTES


async def test_two_agents_of_one_job_measure_each_other(log: int) -> None:
    one, two = make(log, Launcher()), make(log, Launcher())
    assert one.address == ""
    await one.start()
    await two.start()
    there = await one.run([Check(1, CheckKind.TRANSFER, two.address)])
    back = await two.run([Check(1, CheckKind.TRANSFER, one.address)])
    assert (there[0].ok, back[0].ok) == (True, True)
    await one.close()
    await two.close()
    assert not (await one.run([Check(1, CheckKind.TRANSFER, two.address)]))[0].ok


async def test_one_of_each_kind_at_a_time(log: int) -> None:
    launcher = Launcher()
    checks = make(log, launcher)
    first, second = await asyncio.gather(
        checks.run([compute(1), compute(2)]), checks.run([compute(3), compute(4)])
    )
    assert [answer.id for answer in (*first, *second)] == [1, 2, 3, 4]
    assert launcher.most == 1
    assert len(launcher.words) == 4


async def test_more_than_an_agent_takes_is_refused_one_by_one(log: int) -> None:
    launcher = Launcher()
    answers = await make(log, launcher).run([compute(number) for number in range(MAX_CHECKS + 2)])
    assert [answer.id for answer in answers] == list(range(MAX_CHECKS + 2))
    assert [answer.ok for answer in answers] == [True] * MAX_CHECKS + [False] * 2
    assert len(launcher.words) == MAX_CHECKS


@pytest.mark.parametrize(
    ("launcher", "text"),
    [
        (Launcher(error=ZygoteError("gone")), "check cannot start: gone"),
        (Launcher(error=OSError(24, "Too many open files")), "check cannot start: [Errno 24]"),
        (Launcher(out=b"", exit=-9), "the product ended with -9: "),
        (Launcher(out=b"", err=b"no memory\n", exit=1), "the product ended with 1: no memory"),
        (Launcher(out=b""), "not JSON"),
        (Launcher(out=b"[]"), "Answer is []"),
        (Launcher(out=b'{"id": 0, "ok": "yes"}'), "Answer.ok is 'yes'"),
        (Launcher(out=b"x" * (MAX_SAID + 1)), f"check said more than {MAX_SAID} bytes"),
        (Launcher(exit=None), "check was not done in 0.20 s"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_goes_wrong_is_an_answer(log: int, launcher: Launcher, text: str) -> None:
    begin = time.monotonic()
    answers = await make(log, launcher).run([compute(limit_s=0.2)])
    assert time.monotonic() - begin < 0.5
    assert not answers[0].ok
    assert text in answers[0].text


@pytest.mark.parametrize("limit", [-1.0, 0.0, 1e300])
async def test_a_limit_of_any_size_is_obeyed(log: int, limit: float) -> None:
    answers = await make(log, Launcher()).run([compute(limit_s=limit)])
    assert answers[0].ok == (limit > 0)


async def test_a_gpu_is_measured_only_when_its_rank_has_ended(log: int) -> None:
    launcher = Launcher()
    checks = make(log, launcher, gpus=2, ranks=[RankState(4), RankState(5, exit=1)])
    alive, dead, elsewhere = await checks.run([compute(1, 4), compute(2, 5), compute(3, 6)])
    assert (alive.ok, alive.text) == (False, "rank 4 still runs on its GPU; ask again when it has ended")
    assert dead.ok
    assert (elsewhere.ok, elsewhere.text) == (False, "rank 6 is not here; ask again when it has ended")
    assert [words[-1] for words in launcher.words] == ["cuda:1"]


async def test_a_core_is_measured_beside_its_rank(log: int) -> None:
    launcher = Launcher()
    await make(log, launcher, ranks=[RankState(4)]).run([compute(1, 4)])
    assert launcher.words == [("-m", "stormjib_health.probe.compute", "--device", "cpu")]


async def test_cancelled_checks_hold_up_nobody(log: int) -> None:
    launcher = Launcher(exit=None)
    checks = make(log, launcher)
    task = asyncio.create_task(checks.run([compute(limit_s=9)]))
    while not launcher.running:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    launcher.exit = 0
    assert (await checks.run([compute(2)]))[0].ok
