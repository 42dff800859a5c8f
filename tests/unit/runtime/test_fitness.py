"""What an agent makes of its preflight."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from stormjib_health.confirm.transfer import Server, measuring_token
from stormjib_runtime import codec
from stormjib_runtime.fitness import WORDS, Fitness
from stormjib_runtime.output import Outputs
from stormjib_runtime.preflight import Measured, Preflight

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    from stormjib_runtime.launching import Launching

FIT = Preflight(True, (Measured("memory", 7.0),), "fit: memory 7 GB/s")
UNFIT = Preflight(False, (Measured("memory", 0.01),), "memory 0.01 GB/s is slow: any node does 0.1")


class FakeLaunching:
    """Its only process says `out` and ends with `exit`, once `warm` is set."""

    def __init__(self, out: bytes, code: int) -> None:
        self.out = out
        self.code = code
        self.warm = asyncio.Event()
        self.words: list[Sequence[str]] = []

    async def known(self) -> None:
        await self.warm.wait()

    async def launch(
        self,
        words: Sequence[str],
        env: Mapping[str, str],
        stdout: int,
        stderr: int,
        exited: Callable[[int], None],
    ) -> int:
        self.words.append(words)
        os.write(stdout, self.out)
        os.write(stderr, b"last words\n")
        asyncio.get_running_loop().call_soon(exited, self.code)
        return 0


class Case:
    """A `Fitness`, and what it told."""

    def __init__(self, log: int, out: bytes = b"", code: int = 0, *, wanted: bool = True) -> None:
        self.launching = FakeLaunching(out, code)
        self.events: list[str] = []
        self.changes = 0
        outputs = Outputs(asyncio.get_running_loop(), log, log)
        launching: Launching = self.launching  # type: ignore[assignment]
        self.peers: list[str] = []
        self.fitness = Fitness(
            wanted, launching, outputs, self._changed, self.events.append, "secret", lambda: self.peers
        )

    def _changed(self) -> None:
        self.changes += 1

    async def run(self) -> Fitness:
        self.launching.warm.set()
        await self.fitness.find_out()
        return self.fitness


@pytest_asyncio.fixture
async def server() -> AsyncIterator[str]:
    """Another agent's measuring server."""
    one = Server(measuring_token("secret"))
    await one.start()
    yield f"127.0.0.1:{one.port}"
    await one.close()


@pytest.fixture
def log() -> Iterator[int]:
    descriptor = os.open(os.devnull, os.O_WRONLY)
    yield descriptor
    os.close(descriptor)


async def test_a_fit_node_joins_and_makes_no_event(log: int) -> None:
    case = Case(log, codec.encode(FIT))
    assert not case.fitness.fit
    fitness = await case.run()
    assert (fitness.fit, fitness.why, case.events, case.changes) == (True, "", [], 1)
    assert case.launching.words == [WORDS]


async def test_an_unfit_node_does_not_join_and_says_why(log: int) -> None:
    case = Case(log, codec.encode(UNFIT), 1)
    fitness = await case.run()
    assert (fitness.fit, fitness.why, case.changes) == (False, UNFIT.why, 1)
    assert case.events == [f"PreflightFailed: {UNFIT.why}"]


async def test_where_none_is_wanted_none_is_run(log: int) -> None:
    case = Case(log, wanted=False)
    assert case.fitness.fit
    await case.fitness.find_out()  # does not even wait for the zygote
    assert case.launching.words == []
    assert case.changes == 0


@pytest.mark.parametrize(
    ("out", "code", "text"),
    [
        (b"", -9, "it ended with -9: last words"),
        (b"", 1, "it ended with 1"),
        (b"Traceback", 1, "not JSON"),
        (b'{"ok": false}', 1, "Preflight lacks"),
    ],
)
async def test_one_that_could_not_be_run_blames_nobody(log: int, out: bytes, code: int, text: str) -> None:
    case = Case(log, out, code)
    fitness = await case.run()
    assert (fitness.fit, fitness.why) == (True, "")
    assert len(case.events) == 1
    assert case.events[0].startswith("PreflightNotRun: ")
    assert text in case.events[0]


async def test_it_waits_for_the_zygote_without_a_limit(log: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stormjib_runtime.fitness.LIMIT_S", 0.05)
    case = Case(log, codec.encode(FIT))
    task = asyncio.create_task(case.fitness.find_out())
    done, _ = await asyncio.wait([task], timeout=0.2)
    assert not done
    await case.run()
    await task
    assert case.fitness.fit


NOBODY = "127.0.0.1:1"
"""Nothing listens there."""


async def test_one_path_that_is_well_is_enough(log: int, server: str) -> None:
    case = Case(log, codec.encode(FIT))
    case.peers = [NOBODY, server]
    fitness = await case.run()
    assert (fitness.fit, case.events) == (True, [])


async def test_one_bad_path_may_be_the_other_ends_fault(log: int) -> None:
    case = Case(log, codec.encode(FIT))
    case.peers = [NOBODY]
    assert (await case.run()).fit


async def test_a_node_that_reaches_no_peer_is_unfit(log: int) -> None:
    case = Case(log, codec.encode(FIT))
    case.peers = [NOBODY, "127.0.0.1:2"]
    fitness = await case.run()
    assert not fitness.fit
    assert fitness.why.startswith("pair: connection to 127.0.0.1:1 failed")
    assert "(to 127.0.0.1:2)" in fitness.why
    assert case.events == [f"PreflightFailed: {fitness.why}"]


async def test_peers_that_turn_away_say_nothing_of_the_node(log: int) -> None:
    other = Server(measuring_token("of another job"))
    await other.start()
    case = Case(log, codec.encode(FIT))
    case.peers = [f"127.0.0.1:{other.port}"] * 2
    assert (await case.run()).fit
    await other.close()


async def test_a_peer_that_was_only_busy_clears_the_node(log: int, server: str) -> None:
    case = Case(log, codec.encode(FIT))
    rounds = iter([[NOBODY, NOBODY], [server]])
    case.fitness._peers = lambda: next(rounds)
    assert (await case.run()).fit
    assert list(rounds) == []
