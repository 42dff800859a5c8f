"""The process of an agent that gives and keeps copies: `python -m stormjib_checkpoint.peers MEMORY COPIES`, JSON lines in.

    {"token":"...","port":0}                                      once; the answer is {"port":41234}, where it listens
    {"generation":"1.3","slot":0,"host":"10.0.0.2","port":41234,"givers":[2],"processes":8}
                                                                  from now on, instead of what was said before;
                                                                  {"generation":"1.3","copied":120} for each part of a step
                                                                  that is whole there

`host` is an IP address; where it is empty, nothing is given. Ends when its input ends. Without torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from stormjib_checkpoint.errors import BadKey, FormatError
from stormjib_checkpoint.keys import from_environment
from stormjib_checkpoint.layout import GenerationId  # noqa: TC001 - records are built from their annotations
from stormjib_checkpoint.peers.frames import Hello
from stormjib_checkpoint.peers.giving import Giver
from stormjib_checkpoint.peers.keeping import Expected, Keeper
from stormjib_checkpoint.records import Json, build, parse

NICE = 19
"""Whatever trains on this node comes first."""


@dataclass(frozen=True)
class Listen:
    """The first line."""

    token: str
    port: int


@dataclass(frozen=True)
class Copying:
    """Each further line: who gives to whom in a generation."""

    generation: GenerationId
    slot: int
    host: str
    port: int
    givers: tuple[int, ...]
    processes: int


def serve(memory: Path, copies: Path, lines: IO[bytes], answers: IO[bytes]) -> None:
    """Do what the lines say until they end. Raises FormatError, BadKey, and OSError where it cannot listen."""
    listen: Listen = build(Listen, parse(lines.readline(), "first line"), "first line")
    key = from_environment()
    keeper = Keeper(copies, listen.token, key, _say, listen.port)

    def answer(line: Json) -> None:
        answers.write(json.dumps(line).encode() + b"\n")
        answers.flush()

    def told(generation: GenerationId, step: int) -> None:
        answer({"generation": str(generation), "copied": step})

    answer({"port": keeper.port})
    giver: Giver | None = None
    for line in lines:
        asked: Copying = build(Copying, parse(line, "line"), "line")
        if giver is not None:
            giver.stop()
        keeper.expect(Expected(asked.generation, asked.givers, asked.processes))
        hello = Hello(asked.generation, asked.slot)
        giver = (
            Giver(
                (asked.host, asked.port),
                listen.token,
                hello,
                memory,
                key,
                _say,
                partial(told, asked.generation),
            )
            if asked.host
            else None
        )
    if giver is not None:
        giver.stop()
    keeper.close()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m stormjib_checkpoint.peers MEMORY COPIES")
    os.setpriority(os.PRIO_PROCESS, 0, NICE)
    try:
        serve(Path(sys.argv[1]), Path(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
    except (FormatError, BadKey, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
