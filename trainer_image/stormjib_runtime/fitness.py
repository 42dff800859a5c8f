"""Whether this agent's node may join: what its preflight says, once, before the first generation.

The preflight is a fork of the zygote, because it needs torch. So it begins when the zygote is there, and a healthy start is later by what
it takes: some tenths of a second, and the import of torch where there is no zygote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stormjib_runtime import codec
from stormjib_runtime.checks import ONE_THREAD
from stormjib_runtime.errors import CheckError
from stormjib_runtime.one_shot import MAX_SAID, run_one
from stormjib_runtime.preflight import Preflight, judge, measure_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stormjib_runtime.launching import Launching
    from stormjib_runtime.output import Outputs

WORDS = ("-m", "stormjib_runtime.preflight", "--json")
LIMIT_S = 60.0
"""Most of it for an import of torch on a machine where every slot does that at once."""


PEERS = 2
"""One bad path may be the other end's; a node is to blame when no peer can be reached well."""
ROUNDS = 3
"""When all slots start at once, a peer may be too busy to answer in time."""


class Fitness:
    """`fit` once the node may join; `why` says what is wrong with it, if anything is."""

    def __init__(
        self,
        wanted: bool,
        launching: Launching,
        outputs: Outputs,
        changed: Callable[[], None],
        event: Callable[[str], None],
        secret: str,
        peers: Callable[[], Sequence[str]],
    ) -> None:
        """`secret` is the token of the job's agents, `peers` tells the measuring servers that are known by now."""
        self.fit = not wanted
        self.why = ""
        self._launching = launching
        self._outputs = outputs
        self._changed = changed
        self._event = event
        self._secret = secret
        self._peers = peers

    async def find_out(self) -> None:
        """Run the preflight, where it is wanted. One that cannot be run says nothing about the node: it joins, and an
        event tells why nobody looked."""
        if self.fit:
            return
        try:
            result = await self._run()
        except (CheckError, codec.DecodeError) as error:
            self._event(f"PreflightNotRun: {error}")
        else:
            self.why = (await self._paths() if result.ok else result.why)[:1024]
            if not self.why:
                self._outputs.say(f"preflight: {result.why}")
        if self.why:
            self._event(f"PreflightFailed: {self.why}")
        self.fit = not self.why
        self._changed()

    async def _run(self) -> Preflight:
        await self._launching.known()
        said = await run_one(self._launching.launch, WORDS, ONE_THREAD, self._outputs, "preflight", LIMIT_S)
        if not said.out:
            raise CheckError(f"it ended with {said.exit}: {said.errors}")
        return codec.decode(Preflight, said.out, limit=MAX_SAID)

    async def _paths(self) -> str:
        """What is wrong with the paths from here; empty where one is well, or where too few peers are known to tell.
        Measured from here, because only the agent knows its peers."""
        for _ in range(ROUNDS):
            bad: list[str] = []
            for peer in self._peers()[:PEERS]:
                measured = await measure_pair(peer, self._secret)
                if measured.skipped:
                    continue
                result = judge((measured,))
                if result.ok:
                    self._outputs.say(f"preflight: to {peer} {result.why}")
                    return ""
                bad.append(f"{result.why} (to {peer})")
            if len(bad) < PEERS:
                return ""
        return "; ".join(bad)
