"""Output of ranks: whole lines with `[rank]` in front, and the last ones kept for the message of a fault."""

from __future__ import annotations

import os
import select
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

LAST_LINES = 20
LAST_BYTES = 1024
MAX_LINE = 64 * 1024
"""A longer line is broken here, so that a rank cannot fill the agent's memory with one line."""
CHUNK = 64 * 1024
HIGH_WATER = 256 * 1024
"""Above this much unwritten output the ranks' pipes are left alone."""


class Lines:
    """Cuts one stream into lines, each with `prefix`, and remembers the last ones. Pure: bytes in, bytes out."""

    def __init__(self, prefix: bytes, last: LastLines) -> None:
        self._prefix = prefix
        self._last = last
        self._open = b""

    def feed(self, data: bytes) -> bytes:
        """The lines that `data` completes, ready to be written."""
        *whole, self._open = (self._open + data).split(b"\n")
        if len(self._open) > MAX_LINE:
            whole.append(self._open)
            self._open = b""
        return b"".join(map(self._line, whole))

    def end(self) -> bytes:
        """What the stream left without a newline, as a line."""
        rest, self._open = self._open, b""
        return self._line(rest) if rest else b""

    def _line(self, line: bytes) -> bytes:
        self._last.add(line)
        return self._prefix + line + b"\n"


class LastLines:
    """The last lines of one rank, stdout and stderr in the order in which they came."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=LAST_LINES)

    def add(self, line: bytes) -> None:
        self._lines.append(line[-LAST_BYTES:])

    @property
    def text(self) -> str:
        """At most LAST_BYTES bytes: the end matters, for a traceback says what happened in its last line."""
        return b"\n".join(self._lines)[-LAST_BYTES:].decode(errors="replace").strip("\n")


class Sink:
    """Writes to one descriptor without ever blocking the event loop: a full log pipe must not silence the agent.

    The descriptor may be shared with others (a terminal), so it is not made non-blocking. Instead it is asked first:
    a pipe that polls writable takes PIPE_BUF bytes at once.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._waiting: deque[bytes] = deque()
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLOUT)
        self.waiting_bytes = 0

    def put(self, data: bytes) -> bool:
        """Take `data`; whether all that was taken so far is written."""
        if data:
            self._waiting.append(data)
            self.waiting_bytes += len(data)
        return self.flush()

    def flush(self) -> bool:
        """Write what can be written now; whether nothing is left."""
        while self._waiting and self._poll.poll(0):
            head = self._waiting.popleft()
            written = self._write(head[: select.PIPE_BUF], len(head))
            self.waiting_bytes -= written
            if written < len(head):
                self._waiting.appendleft(head[written:])
        return not self._waiting

    def drain(self) -> None:
        """Write all that is left, however long that takes: the end of the process."""
        while not self.flush():
            self._poll.poll()

    def _write(self, piece: bytes, whole: int) -> int:
        try:
            return os.write(self.descriptor, piece)
        except OSError:
            return whole  # nobody reads any more: training goes on without its log


class Outputs:
    """Reads the pipes of children, line by line, into the agent's own stdout and stderr."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stdout: int = 1, stderr: int = 2) -> None:
        self._loop = loop
        self._sinks = (Sink(stdout), Sink(stderr))
        self._taps: set[Tap] = set()
        self._paused = False

    def pipe(self, prefix: str, last: LastLines, *, error: bool = False) -> Tap:
        """A new pipe whose lines appear with `prefix`. Give `writer` to a child, then call `Tap.started`."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        tap = Tap(self, Lines(prefix.encode(), last), self._sinks[error], reader, writer)
        self._taps.add(tap)
        if not self._paused:
            self._loop.add_reader(reader, tap.read)
        return tap

    def say(self, text: str) -> None:
        """A line of the agent's own, on stderr."""
        self._put(self._sinks[1], f"stormjib: {text}\n".encode())

    def drain(self) -> None:
        """Write all that was taken: the end of the process."""
        for sink in self._sinks:
            sink.drain()

    def _put(self, sink: Sink, data: bytes) -> None:
        if not sink.put(data):
            self._loop.add_writer(sink.descriptor, self._writable, sink)
            if sink.waiting_bytes > HIGH_WATER and not self._paused:
                self._pause()

    def _writable(self, sink: Sink) -> None:
        if not sink.flush():
            return
        self._loop.remove_writer(sink.descriptor)
        if self._paused and not any(sink.waiting_bytes for sink in self._sinks):
            self._paused = False
            for tap in self._taps:
                self._loop.add_reader(tap.reader, tap.read)

    def _pause(self) -> None:
        """Nobody reads our log: ranks shall block on their pipes, as they would without us, and memory stay small."""
        self._paused = True
        for tap in self._taps:
            self._loop.remove_reader(tap.reader)


class Tap:
    """One pipe between a child and the sinks."""

    def __init__(self, outputs: Outputs, lines: Lines, sink: Sink, reader: int, writer: int) -> None:
        self._outputs = outputs
        self._lines = lines
        self._sink = sink
        self.reader = reader
        self.writer = writer

    def started(self) -> None:
        """The child has its copy of `writer`: drop ours, so that the pipe ends with the child."""
        os.close(self.writer)

    def read(self) -> None:
        """Take what is there now."""
        while self.reader >= 0:
            try:
                data = os.read(self.reader, CHUNK)
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            self._outputs._put(self._sink, self._lines.feed(data))

    def close(self) -> None:
        """Stop listening. What came without a newline is written as a line."""
        if self.reader < 0:
            return
        self._outputs._loop.remove_reader(self.reader)
        self._outputs._taps.discard(self)
        os.close(self.reader)
        self.reader = -1
        self._outputs._put(self._sink, self._lines.end())
