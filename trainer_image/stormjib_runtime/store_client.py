"""Starts the store of a generation and hears its port."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from stormjib_runtime.errors import StoreError
from stormjib_runtime.output import LastLines

if TYPE_CHECKING:
    from stormjib_runtime.output import Outputs
    from stormjib_runtime.ranks import Launch

WORDS = ("-m", "stormjib_runtime.store")
START_S = 60.0
"""By exec it imports torch first, which takes seconds on a busy machine."""


async def start_store(launch: Launch, outputs: Outputs) -> int:
    """The port of a new store. Raises StoreError with the last lines of one that did not come up."""
    loop = asyncio.get_running_loop()
    said: asyncio.Future[bytes] = loop.create_future()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    lines = LastLines()
    tap = outputs.pipe("[store] ", lines, error=True)
    loop.add_reader(reader, _first_line, reader, said)
    try:
        await launch(WORDS, {}, writer, tap.writer, lambda code: tap.close())
        os.close(writer)
        writer = -1
        tap.started()
        async with asyncio.timeout(START_S):
            line = await said
    except TimeoutError:
        raise StoreError(f"the store did not come up in {START_S:.0f} s: {lines.text}") from None
    finally:
        loop.remove_reader(reader)
        os.close(reader)
        if writer >= 0:
            os.close(writer)
            tap.started()
    if not line.strip().isdigit():
        raise StoreError(f"the store did not come up: {lines.text or 'it said no port'}")
    return int(line)


def _first_line(reader: int, said: asyncio.Future[bytes]) -> None:
    """The line is short and written in one piece, so it is read in one; nothing is the end of the pipe."""
    data = os.read(reader, 64)
    asyncio.get_running_loop().remove_reader(reader)
    if not said.done():
        said.set_result(data)
