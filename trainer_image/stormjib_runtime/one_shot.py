"""Runs one short process of this job and takes what it says: a check, whose answer is one line."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stormjib_runtime.errors import CheckError, ZygoteError
from stormjib_runtime.output import LastLines
from stormjib_runtime.processes import kill

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stormjib_runtime.output import Outputs
    from stormjib_runtime.ranks import Launch

MAX_SAID = 16 * 1024


@dataclass(frozen=True)
class Said:
    """How the process ended, what it wrote to stdout, and its last lines on stderr."""

    exit: int
    out: bytes
    errors: str


async def run_one(
    launch: Launch, words: Sequence[str], env: Mapping[str, str], outputs: Outputs, name: str, limit_s: float
) -> Said:
    """Run `words` (what follows `torchrun`) to the end; stderr goes into the log as well.

    Raises CheckError where it cannot start, is not done in `limit_s`, or says more than MAX_SAID bytes. It is not left
    running, whatever happens.
    """
    ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    lines = LastLines()
    tap = outputs.pipe(f"[{name}] ", lines, error=True)
    out = os.memfd_create(name)  # a file needs nobody who reads while it is written
    pid = 0
    try:
        async with asyncio.timeout(limit_s):
            pid = await launch(words, env, out, tap.writer, lambda code: _tell(ended, code))
            code = await ended
        tap.read()
        return Said(code, _content(out, name), lines.text)
    except TimeoutError:
        raise CheckError(f"{name} was not done in {limit_s:.2f} s") from None
    except (OSError, ZygoteError) as error:
        raise CheckError(f"{name} cannot start: {error}") from error
    finally:
        if pid and not ended.done():
            kill(pid)
        os.close(out)
        tap.started()  # the pipe ends with the process, and the tap with the pipe


def _tell(ended: asyncio.Future[int], code: int) -> None:
    if not ended.done():
        ended.set_result(code)


def _content(file: int, name: str) -> bytes:
    data = os.pread(file, MAX_SAID + 1, 0)
    if len(data) > MAX_SAID:
        raise CheckError(f"{name} said more than {MAX_SAID} bytes")
    return data
