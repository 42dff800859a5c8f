"""Output of ranks: lines stay whole, the last ones are kept, and a log that nobody reads blocks nobody but the ranks."""

from __future__ import annotations

import asyncio
import os

from hypothesis import given
from hypothesis import strategies as st

from stormjib_runtime.output import HIGH_WATER, LAST_BYTES, MAX_LINE, LastLines, Lines, Outputs, Sink


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=20)), st.data())
def test_lines_stay_whole_however_they_arrive(lines: list[str], data: st.DataObject) -> None:
    stream = "".join(f"{line}\n" for line in lines).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    one, written = Lines(b"[3] ", LastLines()), b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        written += one.feed(stream[start:end])
    assert written.decode() == "".join(f"[3] {line}\n" for line in lines)
    assert one.end() == b""


def test_what_is_left_without_a_newline_becomes_a_line() -> None:
    one = Lines(b"[0] ", LastLines())
    assert one.feed(b"a\nb") == b"[0] a\n"
    assert (one.end(), one.end()) == (b"[0] b\n", b"")


def test_an_endless_line_is_broken() -> None:
    one = Lines(b"", LastLines())
    written = one.feed(b"x" * (MAX_LINE + 1))
    assert written == b"x" * (MAX_LINE + 1) + b"\n"


def test_last_lines_are_bounded_in_number_and_size() -> None:
    last = LastLines()
    for number in range(100):
        last.add(f"line {number}".encode())
    assert last.text.splitlines()[0] == "line 80"
    assert last.text.splitlines()[-1] == "line 99"
    last.add("é".encode() * 5000)
    assert len(last.text.encode()) <= LAST_BYTES + 3  # a character cut in half is shown as a replacement
    assert last.text.endswith("é")


def test_a_sink_never_blocks_and_loses_nothing() -> None:
    reader, writer = os.pipe()
    sink, data = Sink(writer), os.urandom(300_000)
    assert not sink.put(data)
    taken = b""
    while sink.waiting_bytes:
        taken += os.read(reader, 65536)
        sink.flush()
    os.close(writer)
    while rest := os.read(reader, 65536):
        taken += rest
    os.close(reader)
    assert taken == data


def test_a_sink_whose_reader_has_gone_swallows() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert Sink(writer).put(b"x" * 100_000)
    os.close(writer)


async def test_ranks_wait_while_nobody_reads_the_log_and_go_on_after() -> None:
    reader, writer = os.pipe()
    outputs = Outputs(asyncio.get_running_loop(), writer, writer)
    tap = outputs.pipe("[0] ", LastLines())
    os.set_blocking(tap.writer, False)
    line, put = b"y" * 1023 + b"\n", 0

    async def write_until_blocked(limit: int) -> int:
        """Lines that the pipe took until it stayed full."""
        count = idle = 0
        while idle < 20 and count < limit:
            try:
                os.write(tap.writer, line)
                count, idle = count + 1, 0
            except BlockingIOError:
                idle += 1
                await asyncio.sleep(0.001)
        return count

    put = await write_until_blocked(10_000)
    assert HIGH_WATER // 1024 <= put < 2000, (
        "the rank's pipe filled up because the agent stopped taking lines"
    )
    tap.started()
    taken = 0
    os.set_blocking(reader, False)
    async with asyncio.timeout(10):
        while taken < put * (1024 + 4):
            try:
                taken += len(os.read(reader, 1 << 16))
            except BlockingIOError:
                await asyncio.sleep(0.001)
    assert taken == put * (1024 + 4)
    tap.close()
    os.close(reader)
    os.close(writer)
