"""The kernel's answers about sockets: recorded ones, hostile ones, and this kernel's own."""

from __future__ import annotations

import os
import socket
import struct
from contextlib import closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stormjib_health.sampler.sockets import Parsed, Socket, Sockets, SocketsError, address, ask, parse

RECORDED = Path(__file__).parent / "recorded"
DUMP, END = (bytes.fromhex(part) for part in (RECORDED / "sock_diag_dump.hex").read_text().split("\n\n")[:2])
GONE = bytes.fromhex((RECORDED / "sock_diag_gone.hex").read_text())


def by_end() -> dict[str, Socket]:
    return {one.local: one for one in parse(DUMP).sockets}


def test_a_recorded_dump_gives_both_families_with_their_counts() -> None:
    found = by_end()
    assert len(found) == 7
    client, server = found["127.0.0.2:41399"], found["127.0.0.1:5001"]
    assert (client.family, client.remote, client.sent, client.received) == (2, "127.0.0.1:5001", 1000, 0)
    assert (server.remote, server.sent, server.received, server.unread) == ("127.0.0.2:41399", 0, 1000, 0)
    assert (client.backoff, client.unacked, client.unsent, client.retransmitted) == (0, 0, 0, 0)
    assert client.window == 70_656
    assert client.rto_us >= 200_000
    assert 0 < client.rtt_us < 1000
    assert client.last_ack_ms < 1000
    sixth = found["[::1]:5000"]
    assert (sixth.family, sixth.remote, sixth.sent) == (10, "[::1]:45563", 10)


def test_both_ends_name_a_connection_alike_although_one_is_in_ipv6_form() -> None:
    found = by_end()
    client, server = found["127.0.0.3:38393"], found["127.0.0.1:5000"]
    assert (client.family, server.family) == (2, 10)
    assert (client.local, client.remote) == (server.remote, server.local)
    assert server.unread == 96


def test_the_end_of_a_dump_and_a_refusal() -> None:
    assert parse(END) == Parsed([], done=True)
    assert parse(GONE) == Parsed([], error=2)


def test_what_no_process_holds_or_is_not_established_is_left_out() -> None:
    changed = bytearray(DUMP)
    changed[16 + 1] = 8  # CLOSE_WAIT
    assert len(parse(bytes(changed)).sockets) == 6
    changed = bytearray(DUMP)
    changed[16 + 68 : 16 + 72] = bytes(4)  # accepted by nobody yet
    assert len(parse(bytes(changed)).sockets) == 6


def test_a_kernel_without_the_newer_counts_is_left_out() -> None:
    (length,) = struct.unpack_from("=I", DUMP)
    info = struct.pack("=HH", 4 + 192, 2) + bytes(192)
    message = struct.pack("=I", 16 + 72 + len(info)) + DUMP[4 : 16 + 72] + info
    assert parse(DUMP[:length]).sockets
    assert parse(message) == Parsed([])


@pytest.mark.parametrize(
    "data",
    [
        b"\0",
        DUMP[:15],
        DUMP[:100],
        struct.pack("=IHHII", 15, 20, 0, 0, 0),
        struct.pack("=IHHII", 1 << 31, 20, 0, 0, 0),
        struct.pack("=IHHII", 16, 20, 0, 0, 0),
        struct.pack("=IHHII", 18, 2, 0, 0, 0) + b"xx",
        struct.pack("=I", 16 + 72 + 4) + DUMP[4 : 16 + 72] + struct.pack("=HH", 3, 2),
        struct.pack("=I", 16 + 72 + 4) + DUMP[4 : 16 + 72] + struct.pack("=HH", 0xFFFF, 2),
    ],
)
def test_malformed_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(SocketsError):
        parse(data)


@given(st.binary(max_size=512))
def test_nothing_but_its_own_error_comes_out_of_any_bytes(data: bytes) -> None:
    with suppress(SocketsError):
        assert isinstance(parse(data), Parsed)


@given(st.lists(st.tuples(st.integers(0, len(DUMP) - 1), st.integers(0, 255)), max_size=8))
def test_nor_out_of_a_damaged_answer(changes: list[tuple[int, int]]) -> None:
    data = bytearray(DUMP)
    for at, value in changes:
        data[at] = value
    with suppress(SocketsError):
        assert all(one.local and one.remote for one in parse(bytes(data)).sockets)


def test_addresses() -> None:
    port = (29500).to_bytes(2, "big")
    assert address(socket.AF_INET, bytes([10, 77, 0, 12]) + bytes(12), port) == "10.77.0.12:29500"
    mapped = bytes(10) + b"\xff\xff" + bytes([10, 77, 0, 12])
    assert address(socket.AF_INET6, mapped, port) == "10.77.0.12:29500"
    assert address(socket.AF_INET6, bytes(15) + b"\1", port) == "[::1]:29500"


@pytest.mark.parametrize(
    ("listen", "connect"), [("127.0.0.1", "127.0.0.1"), ("::1", "::1"), ("::", "127.0.0.1")]
)
def test_this_kernel_tells_of_a_connection_until_it_ends(listen: str, connect: str) -> None:
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    with (
        closing(Sockets()) as kernel,
        socket.create_server((listen, 0), family=family, dualstack_ipv6=listen == "::") as server,
        socket.create_connection((connect, server.getsockname()[1])) as client,
    ):
        accepted = server.accept()[0]
        with accepted:
            client.sendall(b"x" * 1000)
            inodes = {os.fstat(side.fileno()).st_ino for side in (client, accepted)}
            known = [one for one in kernel.dump() if one.inode in inodes]
            assert sorted(one.sent for one in known) == [0, 1000]
            assert {one.local for one in known} == {one.remote for one in known}
            client.sendall(b"x" * 50)
            assert sorted(one.unread for one in kernel.look(known)) == [0, 1050]
        assert kernel.look(known) == []
        stale = known[0]._replace(identity=known[0].identity[:-1] + b"\x7f")
        assert kernel.look([stale, *known]) == []


def test_more_connections_than_one_batch_of_questions() -> None:
    with closing(Sockets()) as kernel, socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        ends = []
        for _ in range(100):
            client = socket.create_connection(server.getsockname())
            ends += [client, server.accept()[0]]
        inodes = {os.fstat(end.fileno()).st_ino for end in ends}
        known = [one for one in kernel.dump() if one.inode in inodes]
        assert len(known) == 200
        assert {one.inode for one in kernel.look(known)} == inodes
        for end in ends:
            end.close()


def test_a_refused_question_leaves_no_answer_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        closing(Sockets()) as kernel,
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        known = [one for one in kernel.dump() if one.inode == os.fstat(client.fileno()).st_ino]
        bad = known[0]._replace(family=77)
        with pytest.raises(SocketsError):
            kernel.look([bad, *known])
        assert [one.inode for one in kernel.look(known)] == [known[0].inode]


def test_a_question_names_the_connection_whole() -> None:
    one = parse(DUMP).sockets[0]
    assert one.identity in ask(one)
    assert len(ask(one)) == 16 + 56
