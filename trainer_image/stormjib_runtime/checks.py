"""What an agent measures when its coordinator asks: a path to another agent, or the device of a rank.

It holds the agent's measuring server too, because a path has two ends.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from stormjib_health.confirm.transfer import Server, measure, measuring_token
from stormjib_health.wire import Answer, Check, CheckKind
from stormjib_runtime import codec
from stormjib_runtime.environment import join_address
from stormjib_runtime.errors import CheckError
from stormjib_runtime.one_shot import MAX_SAID, run_one

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stormjib_runtime.output import Outputs
    from stormjib_runtime.ranks import Launch
    from stormjib_runtime.wire import RankState

COMPUTE = ("-m", "stormjib_health.probe.compute")
COMPUTE_LIMIT_S = 10.0
"""A fork of the zygote takes a fifth of a second; a start by exec imports torch first."""
MAX_CHECKS = 16
"""Of one request: what a coordinator asks beyond that is not measured."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


class Checks:
    """Runs checks, one of each kind at a time: two at once would measure each other."""

    def __init__(
        self,
        launch: Launch,
        outputs: Outputs,
        secret: str,
        host: str,
        gpus: int,
        ranks: Callable[[], Sequence[RankState]],
    ) -> None:
        """`secret` is the token of the job's agents, `host` this agent's address, `ranks` tells the local ranks in order."""
        self._launch = launch
        self._outputs = outputs
        self._token = measuring_token(secret)
        self._host = host
        self._gpus = gpus
        self._ranks = ranks
        self._server = Server(self._token)
        self._turns = {kind: asyncio.Lock() for kind in CheckKind}

    async def start(self) -> None:
        """Start the measuring server. Raises OSError where it cannot listen."""
        await self._server.start()

    async def close(self) -> None:
        """Stop it."""
        await self._server.close()

    @property
    def address(self) -> str:
        """`host:port` of the measuring server; empty while there is none."""
        return join_address(self._host, self._server.port) if self._server.port else ""

    async def run(self, checks: Sequence[Check]) -> list[Answer]:
        """Every check's answer, in the order of the checks. Cancel it when the generation ends."""
        taken = await asyncio.gather(*(self._one(check) for check in checks[:MAX_CHECKS]))
        text = f"more than {MAX_CHECKS} checks at once"
        return [*taken, *(Answer(check.id, ok=False, text=text) for check in checks[MAX_CHECKS:])]

    async def _one(self, check: Check) -> Answer:
        async with self._turns[check.kind]:
            if check.kind is CheckKind.TRANSFER:
                answer = await measure(check.peer, self._token, check.limit_s)
            else:
                answer = await self._compute(check)
        return replace(answer, id=check.id)

    async def _compute(self, check: Check) -> Answer:
        limit_s = max(0.0, min(check.limit_s, COMPUTE_LIMIT_S))
        try:
            words = (*COMPUTE, "--device", self._device(check.rank))
            said = await run_one(self._launch, words, ONE_THREAD, self._outputs, "check", limit_s)
            if said.exit:
                raise CheckError(f"the product ended with {said.exit}: {said.errors}"[:512])
            return codec.decode(Answer, said.out, limit=MAX_SAID)
        except (CheckError, codec.DecodeError) as error:
            return Answer(check.id, ok=False, text=str(error))

    def _device(self, rank: int) -> str:
        """A GPU is measured only when its rank has ended: until then memory and time on it are the rank's."""
        if not self._gpus:
            return "cpu"
        here = {state.rank: (local, state.exit) for local, state in enumerate(self._ranks())}
        local, ended = here.get(rank, (0, None))
        if ended is None:
            why = "still runs on its GPU" if rank in here else "is not here"
            raise CheckError(f"rank {rank} {why}; ask again when it has ended")
        return f"cuda:{local % self._gpus}"
