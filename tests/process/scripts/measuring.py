"""The measuring half of an agent: says its port, then answers each line of stdin (peer and limit) with what it measured."""

from __future__ import annotations

import asyncio
import sys

from stormjib_health.confirm.transfer import Server, measure
from stormjib_runtime import codec


async def main(token: str) -> None:
    server = Server(token)
    await server.start()
    print(server.port, flush=True)
    stdin = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    while line := await stdin.readline():
        peer, limit = line.decode().split()
        print(codec.encode(await measure(peer, token, float(limit))).decode(), flush=True)
    await server.close()


asyncio.run(main(sys.argv[1]))
