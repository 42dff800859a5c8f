"""Copies of staged steps in another node's memory: whole and proved or not there, given and taken among ourselves only."""

from __future__ import annotations

import socket
import struct
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pytest

from fakes.staging import PIECE, PIECES, SIZE, SOON_S, content, held, records, stage, until
from stormjib_checkpoint import adopting, layout, room
from stormjib_checkpoint.adopting import adopt_copies
from stormjib_checkpoint.format import DataFile, RankFile
from stormjib_checkpoint.layout import GenerationId
from stormjib_checkpoint.left import Records, create_same
from stormjib_checkpoint.node_memory import Slot
from stormjib_checkpoint.opening import open_generation
from stormjib_checkpoint.peers import frames, giving
from stormjib_checkpoint.peers.frames import Hello, Kind, PeerRefused, Reply
from stormjib_checkpoint.peers.giving import Giver
from stormjib_checkpoint.peers.keeping import CONNECTIONS, Expected, Keeper
from stormjib_checkpoint.peers.lock import giver_lives
from stormjib_checkpoint.records import canonical, decode, encode, plain
from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKEN = "of this job"
ONE = GenerationId(1, 1)
GIVER = 3
"""The giver's slot."""


class Place:
    """A keeper on loopback, the folder of its copies, and the memory of a giver."""

    def __init__(self, folder: Path, key: bytes | None = None) -> None:
        self.memory, self.all_copies, self.key = folder / "memory", folder / "copies", key
        self.copies = self.all_copies / str(GIVER)
        self.said: list[str] = []
        self.copied: list[int] = []
        self.keeper = Keeper(self.all_copies, TOKEN, key, self.said.append)
        self.keeper.expect(Expected(ONE, (GIVER,), 2))
        self.givers: list[Giver] = []

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.keeper.port

    def give(self, token: str = TOKEN, generation: GenerationId = ONE, slot: int = GIVER) -> Giver:
        hello = Hello(generation, slot)
        self.givers.append(
            Giver(self.address, token, hello, self.memory, self.key, self.said.append, self.copied.append)
        )
        return self.givers[-1]

    def held(self) -> list[tuple[int, int]]:
        return held(self.copies, self.key)

    def close(self) -> None:
        for giver in self.givers:
            giver.stop()
        self.keeper.close()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with closing(Place(tmp_path)) as one:
        yield one


@pytest.fixture
def storage(tmp_path: Path) -> Local:
    one = Local(tmp_path / "job")
    open_generation(one, "1.1", "uid", ())
    return one


# --- what arrives ---------------------------------------------------------------------------------------------------


def test_what_is_staged_is_copied_byte_for_byte(place: Place) -> None:
    stage(place.memory, 5, 0)
    stage(place.memory, 5, 1, local_rank=1)
    place.give()
    until(lambda: place.held() == [(5, 0), (5, 1)])
    for name in ("0/0/data", "0/0/record.json", "0/0/train.json", "1/0/data", "1/0/record.json"):
        assert (place.copies / name).read_bytes() == (place.memory / name).read_bytes()
    until(lambda: place.copied == [5, 5])


def test_a_newer_step_takes_the_place_that_it_has_taken_at_its_giver(place: Place) -> None:
    stage(place.memory, 1)
    stage(place.memory, 2, number=1)
    place.give()
    until(lambda: place.held() == [(1, 0), (2, 0)])
    inode = (place.copies / "0/0/data").stat().st_ino
    stage(place.memory, 3)
    until(lambda: place.held() == [(2, 0), (3, 0)])
    assert (place.copies / "0/0/data").stat().st_ino == inode, "the memory is used again"


def test_the_newest_step_is_given_first(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for local_rank, step in enumerate((4, 6)):
        stage(place.memory, step, 1, local_rank=local_rank)
        stage(place.memory, step + 1, 1, local_rank=local_rank, number=1)
    told: list[int] = []
    tell = Slot.tell

    def note(slot: Slot, said: Records) -> None:
        tell(slot, said)
        told.append(next(step for step in range(10) if records(step, 1).rank == said.rank))

    monkeypatch.setattr(Slot, "tell", note)
    place.give()
    until(lambda: len(told) == 4)
    assert told == [7, 6, 5, 4]


def test_what_is_there_already_is_not_sent_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a connection that broke."""
    stage(place.memory, 5)
    giver = place.give()
    until(lambda: place.held() == [(5, 0)])
    giver.stop()
    until(lambda: not giver_lives(place.copies))
    sent: list[Kind] = []
    head = frames.head

    def noted(kind: Kind, size: int) -> bytes:
        sent.append(kind)
        return head(kind, size)

    monkeypatch.setattr(frames, "head", noted)
    place.give()
    until(lambda: Kind.ALIVE in sent)
    assert sent == [Kind.HELLO, Kind.PLACE, Kind.TRAIN, Kind.RECORD, Kind.ALIVE]


def test_steps_of_another_generation_are_not_given(place: Place) -> None:
    stage(place.memory, 4, generation="1.0")
    stage(place.memory, 5, number=1)
    place.give()
    until(lambda: place.held() == [(5, 0)])
    assert not (place.copies / "0/0").exists()


def test_a_key_is_asked_for(tmp_path: Path) -> None:
    """Signed with ours it is kept; signed with another, or not at all, it is not even given."""
    with closing(Place(tmp_path, b"k" * 32)) as place:
        stage(place.memory, 1, 1, key=b"x" * 32)
        stage(place.memory, 2, 1, number=1, key=place.key)
        place.give()
        until(lambda: place.held() == [(2, 1)])
        assert not (place.copies / "0/0").exists()


# --- what is not whole ----------------------------------------------------------------------------------------------


class Raw:
    """A giver of which each frame is the test's."""

    def __init__(self, place: Place, token: str = TOKEN) -> None:
        self.connection = socket.create_connection(("127.0.0.1", place.keeper.port), SOON_S)
        frames.greet(self.connection, token)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(self, kind: Kind, data: bytes = b"") -> Reply:
        return frames.send(self.connection, kind, data)

    def hello(self, generation: str = "1.1", slot: int = GIVER) -> Reply:
        return self.send(Kind.HELLO, canonical({"generation": generation, "slot": slot}))

    def begin(self, step: int, rank: int = 0, number: int = 0) -> Reply:
        said = records(step, rank)
        self.send(Kind.PLACE, canonical({"local_rank": 0, "number": number}))
        if said.train is not None:
            self.send(Kind.TRAIN, said.train)
        return self.send(Kind.RECORD, said.rank)

    def piece(self, step: int, at: int, rank: int = 0) -> Reply:
        return self.send(Kind.PIECE, content(step, rank)[at * PIECE : (at + 1) * PIECE])


@pytest.mark.parametrize("pieces", range(PIECES + 1))
def test_a_giver_that_dies_at_any_piece_leaves_the_step_before(
    place: Place, storage: Local, pieces: int
) -> None:
    """Before its record is taken nothing has changed; after it the older step of that place is gone, and the other place's is not."""
    with Raw(place) as raw:
        raw.hello()
        for step in (1, 2):
            assert raw.begin(step, number=step % 2) is Reply.OK
            assert [raw.piece(step, at) for at in range(PIECES)] == [Reply.OK] * PIECES
        assert place.held() == [(1, 0), (2, 0)]
        raw.begin(3, number=1)
        for at in range(pieces):
            assert raw.piece(3, at) is Reply.OK
    until(lambda: not giver_lives(place.copies))
    whole = ((2, 0), (3, 0)) if pieces == PIECES else ((2, 0),)
    assert tuple(place.held()) == whole
    assert adopt_copies(storage, place.all_copies) == (whole, ())


@pytest.mark.parametrize("torn", range(PIECES))
def test_a_piece_that_is_not_what_its_record_says_ends_the_copy_and_no_more(place: Place, torn: int) -> None:
    """The rank has taken its slot again, or memory is damaged: the next step is copied as ever."""
    with Raw(place) as raw:
        raw.hello()
        raw.begin(1)
        for at in range(torn):
            assert raw.piece(1, at) is Reply.OK
        assert raw.piece(2, torn) is Reply.TORN
        assert place.held() == []
        assert raw.begin(2) is Reply.OK
        assert [raw.piece(2, at) for at in range(PIECES)] == [Reply.OK] * PIECES
        assert place.held() == [(2, 0)]


def test_a_giver_whose_memory_is_damaged_goes_on_with_the_next_step(place: Place) -> None:
    slot = stage(place.memory, 1)
    data = bytearray(slot.data.read_bytes())
    data[PIECE + 3] ^= 1
    slot.data.write_bytes(data)
    place.give()
    until(lambda: giver_lives(place.copies))
    stage(place.memory, 2, number=1)
    until(lambda: place.held() == [(2, 0)])
    until(lambda: place.copied == [2])


def test_where_there_is_no_memory_nothing_is_taken_and_it_is_said(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "free", lambda: SIZE)
    stage(place.memory, 1)
    place.give()
    until(lambda: place.said)
    assert place.said == [f"127.0.0.1 port {place.keeper.port} has no memory for step 1 of rank 0"]
    assert not (place.copies / "0/0/data").exists()


# --- who is let in --------------------------------------------------------------------------------------------------

_OTHER = canonical({"generation": "1.2", "slot": GIVER})
_STRANGER = canonical({"generation": "1.1", "slot": GIVER + 1})
HOSTILE: dict[str, tuple[list[tuple[int, bytes]], int]] = {
    "another generation": ([(Kind.HELLO, _OTHER)], 0),
    "a slot that is not expected": ([(Kind.HELLO, _STRANGER)], 0),
    "no greeting": ([(Kind.ALIVE, b"")], 0),
    "a greeting that is no JSON": ([(Kind.HELLO, b"\x80\x04K\x01.")], 0),
    "a slot that is a path": ([(Kind.HELLO, canonical({"generation": "1.1", "slot": "../../x"}))], 0),
    "an unknown kind": ([(77, b"")], 1),
    "too long a frame": ([(Kind.PLACE, b" " * 5000)], 1),
    "an ALIVE with something in it": ([(Kind.ALIVE, b"x")], 1),
    "a second greeting": ([(Kind.HELLO, canonical(plain(Hello(ONE, GIVER))))], 1),
    "a rank too many": ([(Kind.PLACE, canonical({"local_rank": 2, "number": 0}))], 1),
    "a slot too many": ([(Kind.PLACE, canonical({"local_rank": 0, "number": 2}))], 1),
    "a place below zero": ([(Kind.PLACE, canonical({"local_rank": -1, "number": 0}))], 1),
    "a record without a place": ([(Kind.RECORD, records(1, 1).rank)], 1),
    "a piece without a record": ([(Kind.PIECE, b"x" * PIECE)], 1),
}  # fmt: skip
PLACED = (int(Kind.PLACE), canonical({"local_rank": 0, "number": 0}))
HOSTILE |= {
    "a record that is no JSON": ([PLACED, (Kind.RECORD, b"{}{}")], 1),
    "a record of another generation": ([PLACED, (Kind.RECORD, records(1, 1, "1.2").rank)], 1),
    "rank 0 without train.json": ([PLACED, (Kind.RECORD, records(1, 0).rank)], 1),
    "a short piece": ([PLACED, (Kind.RECORD, records(1, 1).rank), (Kind.PIECE, b"x" * 100)], 1),
    "a long piece": ([PLACED, (Kind.RECORD, records(1, 1).rank), (Kind.PIECE, b"x" * (PIECE + 1))], 1),
    "two records": ([PLACED, (Kind.RECORD, records(1, 1).rank), (Kind.RECORD, records(2, 1).rank)], 1),
    "a piece too many": (
        [PLACED, (Kind.RECORD, records(1, 1).rank)]
        + [(Kind.PIECE, content(1, 1)[at * PIECE : (at + 1) * PIECE]) for at in range(PIECES)]
        + [(Kind.PIECE, b"x" * PIECE)],
        1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_not_the_protocol_ends_the_connection_and_changes_nothing(place: Place, what: str) -> None:
    said, greeted = HOSTILE[what]
    with Raw(place) as raw:
        if greeted:
            raw.hello()
        for number, data in said[:-1]:
            assert raw.send(Kind(number), data) is Reply.OK
        number, data = said[-1]
        raw.connection.sendall(struct.pack("!BI", number, len(data)) + data)
        with pytest.raises((PeerRefused, ConnectionResetError)):
            frames.reply_to(raw.connection)
    until(lambda: not giver_lives(place.copies))
    assert place.held() == ([(1, 1)] if what == "a piece too many" else [])
    place.give()  # the keeper is as it was
    stage(place.memory, 9, 1, number=1)
    until(lambda: (9, 1) in place.held())


def test_a_record_that_asks_for_more_memory_than_there_is_gets_none(place: Place) -> None:
    said = decode(RankFile, records(1, 1).rank, "record")
    huge = replace(said, data=DataFile(1 << 40, 1 << 30, ("0" * 16,) * 1024))
    with Raw(place) as raw:
        raw.hello()
        raw.send(Kind(PLACED[0]), PLACED[1])
        assert raw.send(Kind.RECORD, encode(huge)) is Reply.FULL
    assert not (place.copies / "0/0/data").exists()


def test_who_does_not_know_the_token_is_told_nothing(place: Place) -> None:
    """Not even a proof that could be shown to somebody else."""
    with stranger(place) as connection:
        assert len(frames.read(connection, len(frames.NAME) + 32)) > 32
        connection.sendall(b"r" * 32 + b"p" * 32)
        assert ended(connection)
    assert not place.copies.exists()


def test_who_says_nothing_does_not_stay(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "GREET_S", 0.2)
    with stranger(place) as connection:
        frames.read(connection, len(frames.NAME) + 32)
        assert ended(connection)


def stranger(place: Place) -> socket.socket:
    return socket.create_connection(("127.0.0.1", place.keeper.port), SOON_S)


def ended(connection: socket.socket) -> bool:
    """The other side hangs up and has said nothing more."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def test_nothing_is_given_to_who_does_not_know_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keeper's address is somebody else's by now: it answers, and gets no byte of a step."""
    monkeypatch.setattr(giving, "LASTS_S", 0.0)
    stage(tmp_path / "memory", 1)
    said: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        giver = Giver(
            ("127.0.0.1", port), TOKEN, Hello(ONE, 0), tmp_path / "memory", None, said.append, print
        )
        connection, _ = other.accept()
        with connection:
            connection.settimeout(SOON_S)
            connection.sendall(frames.NAME + b"r" * 32)
            assert len(frames.read(connection, 64)) == 64
            connection.sendall(b"p" * 32)
            assert connection.recv(1) == b"", "it has hung up"
        until(lambda: said)
        giver.stop()
    assert said == [
        f"no copies go to 127.0.0.1 port {port}: who listens there does not know this job's token"
    ]


def test_strangers_keep_no_giver_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many they are and however long they may stay."""
    monkeypatch.setattr(frames, "GREET_S", 60.0)
    strangers = [stranger(place) for _ in range(2 * CONNECTIONS)]
    stage(place.memory, 1)
    place.give()
    until(lambda: place.held() == [(1, 0)])
    for one in strangers:
        one.close()


def test_a_giver_that_says_nothing_is_taken_for_dead(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "SILENT_S", 0.2)
    with Raw(place) as raw:
        raw.hello()
        assert giver_lives(place.copies)
        until(lambda: not giver_lives(place.copies), 5)


def test_a_living_giver_with_nothing_to_give_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "SILENT_S", 0.5)
    monkeypatch.setattr(frames, "ALIVE_S", 0.05)
    heard = threading.Semaphore(0)
    receive = frames.receive

    def listening(connection: socket.socket) -> tuple[Kind, int]:
        kind, size = receive(connection)
        if kind is Kind.ALIVE:
            heard.release()
        return kind, size

    monkeypatch.setattr(frames, "receive", listening)
    place.give()
    for _ in range(15):
        assert heard.acquire(timeout=SOON_S)
    assert giver_lives(place.copies)
    assert place.said == []


def test_a_new_generation_sends_the_old_one_away(place: Place) -> None:
    """Whoever gives steps of the one before is a zombie; what is kept of slots that give no more goes."""
    stage(place.memory, 1)
    place.give()
    until(lambda: place.held() == [(1, 0)])
    place.keeper.expect(Expected(GenerationId(1, 2), (GIVER + 1,), 2))
    until(lambda: not place.copies.exists() or not giver_lives(place.copies))
    stage(place.memory, 2, generation="1.2")
    place.give(generation=GenerationId(1, 2), slot=GIVER + 1)
    until(lambda: held(place.all_copies / str(GIVER + 1)) == [(2, 0)])
    assert not place.copies.exists()


# --- a node is lost -------------------------------------------------------------------------------------------------


def written(storage: Local, step: int, rank: int) -> bool:
    folder = Path(storage.root) / layout.folder(step, ONE)
    return (folder / layout.rank_json(rank)).exists()


def test_the_steps_of_a_lost_node_are_finished_from_their_copies(tmp_path: Path, storage: Local) -> None:
    stage(tmp_path / "copies" / "3", 7, 0)
    stage(tmp_path / "copies" / "3", 7, 1, local_rank=1)
    assert adopt_copies(storage, tmp_path / "copies") == (((7, 0), (7, 1)), ())
    data = Path(storage.root) / layout.folder(7, ONE) / layout.rank_data(1)
    assert data.read_bytes() == content(7, 1)
    assert adopt_copies(storage, tmp_path / "copies") == ((), ())


def test_a_copy_that_is_damaged_is_told_and_left_alone(tmp_path: Path, storage: Local) -> None:
    slot = stage(tmp_path / "copies" / "3", 7, 1)
    data = bytearray(slot.data.read_bytes())
    data[2 * PIECE + 3] ^= 1
    slot.data.write_bytes(data)
    adopted = adopt_copies(storage, tmp_path / "copies")
    assert adopted.parts == ()
    assert "not those that were staged" in adopted.notes[0]
    assert not written(storage, 7, 1)


@contextmanager
def living(place: Place) -> Iterator[None]:
    """A giver that is connected and gives nothing."""
    with Raw(place) as raw:
        raw.hello()
        stop = threading.Event()

        def alive() -> None:
            while not stop.wait(0.1):
                raw.send(Kind.ALIVE)

        thread = threading.Thread(target=alive)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_a_giver_that_lives_finishes_its_steps_itself(
    place: Place, storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its copies are looked at until it has, and not written a second time."""
    stage(place.copies, 7, 1)
    looked = 0

    def leave_on_the_third_look(_seconds: float) -> None:
        nonlocal looked
        looked += 1
        if looked == 3:
            path = f"{layout.folder(7, ONE)}/{layout.rank_json(1)}"
            create_same(storage, path, records(7, 1).rank)

    monkeypatch.setattr("stormjib_checkpoint.adopting.time.sleep", leave_on_the_third_look)
    with living(place):
        assert adopt_copies(storage, place.all_copies) == ((), ())
    assert looked == 3


def test_a_giver_that_lives_and_does_not_finish_is_not_waited_for_long(
    place: Place, storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adopting, "GIVER_S", 0.3)
    stage(place.copies, 7, 1)
    with living(place):
        assert adopt_copies(storage, place.all_copies).parts == ((7, 1),)


def test_nothing_is_waited_for_where_nothing_is_wanted(
    place: Place, storage: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stormjib_checkpoint.adopting.time.sleep", lambda _: pytest.fail("it waits"))
    stage(place.copies, 7, 1, generation="1.0")
    with living(place):
        assert adopt_copies(storage, place.all_copies) == ((), ())
