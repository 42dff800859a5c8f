"""The ring: what comes out is what went in, each record once, whatever a rank writes into its file."""

from __future__ import annotations

import os
import struct
import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stormjib_health.records import layout
from stormjib_health.records.layout import CallRecord, PhaseRecord, RingError, StepRecord
from stormjib_health.records.ring import MAX_LOST, MAX_READ, Reader, Recorder, ring_path
from stormjib_health.wire import Doubt, Finding, Kind, Phase

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SLOTS = 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return ring_path(tmp_path, 3)


@pytest.fixture
def recorder(path: Path) -> Iterator[Recorder]:
    recorder = Recorder.create(path, SLOTS)
    yield recorder
    recorder.close()


@pytest.fixture
def reader(path: Path, recorder: Recorder) -> Iterator[Reader]:
    reader = Reader.open(path)
    yield reader
    reader.close()


def test_a_call_lies_in_its_slot_as_the_contract_says(path: Path, recorder: Recorder) -> None:
    before = time.monotonic_ns()
    recorder.lane(5).call(Kind.SEND, peer=2, size=4096, signature=77)
    data = path.read_bytes()
    assert len(data) == 4096 + SLOTS * 64
    assert data[:8] == b"STJBRING"
    assert struct.unpack_from("<q", data, 64) == (1,)
    fields = struct.unpack_from("<BBHiIiQQQQQII", data, 4096)
    assert fields[:7] == (1, 10, 5, -1, 0, 2, 1)
    assert before <= fields[7] <= time.monotonic_ns()
    assert fields[8:] == (0, 0, 4096, 77, 1)


def test_a_light_record_says_nothing_of_what_its_slot_held_before(recorder: Recorder, reader: Reader) -> None:
    lane = recorder.lane(5)
    for _ in range(SLOTS):
        lane.call(Kind.SEND, peer=2, size=7, signature=8, started=9, done=layout.PENDING)
    reader.read()
    recorder.finished(4)
    lane.turn()
    before = time.monotonic_ns()
    lane.light(Kind.ALL_GATHER)
    call = reader.read().records[-1]
    assert isinstance(call, CallRecord)
    assert before <= call.issued_ns <= time.monotonic_ns()
    assert call == CallRecord(5, Kind.ALL_GATHER, 1, 4, 0, -1, call.issued_ns, 0, 0, 0, 0, False)
    lane.call(Kind.BARRIER)
    assert lane.number == 2


def test_numbers_grow_for_collectives_and_for_each_peer_and_direction_apart(
    recorder: Recorder, reader: Reader
) -> None:
    one, other = recorder.lane(0), recorder.lane(1)
    for lane, kind in ((one, Kind.ALL_REDUCE), (other, Kind.BARRIER)):
        lane.call(kind)
    for kind, peer in ((Kind.SEND, 3), (Kind.RECV, 3), (Kind.SEND, 3), (Kind.SEND, 4)):
        one.call(kind, peer)
    one.call(Kind.ALL_GATHER)
    seen = [
        (r.group, r.kind, r.number, r.position) for r in reader.read().records if isinstance(r, CallRecord)
    ]
    assert seen == [
        (0, Kind.ALL_REDUCE, 1, 0),
        (1, Kind.BARRIER, 1, 0),
        (0, Kind.SEND, 1, 1),
        (0, Kind.RECV, 1, 2),
        (0, Kind.SEND, 2, 3),
        (0, Kind.SEND, 1, 4),
        (0, Kind.ALL_GATHER, 2, 5),
    ]


def test_a_step_starts_the_positions_again_and_says_its_calls(recorder: Recorder, reader: Reader) -> None:
    lane = recorder.lane(0)
    lane.call(Kind.ALL_REDUCE)
    recorder.phase = Phase.OPTIMIZER
    lane.call(Kind.ALL_REDUCE)
    recorder.finished(1)
    assert lane.turn() == 2
    lane.call(Kind.ALL_REDUCE)
    recorder.finished(2)
    assert lane.turn() == 1
    records = reader.read().records
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [(step.step, step.calls) for step in steps] == [(1, 2), (2, 1)]
    assert steps[0].duration_ns == 0
    assert steps[1].duration_ns == steps[1].at_ns - steps[0].at_ns > 0
    calls = [record for record in records if isinstance(record, CallRecord)]
    assert [(call.step, call.position, call.number) for call in calls] == [(-1, 0, 1), (-1, 1, 2), (1, 0, 3)]
    assert [record.phase for record in records if isinstance(record, PhaseRecord)] == [Phase.OPTIMIZER]


def test_phase_and_step_stand_in_the_header_too(recorder: Recorder, reader: Reader) -> None:
    recorder.phase = Phase.CHECKPOINT
    recorder.finished(41)
    recorder.lane(0).turn()
    for _ in range(3 * SLOTS):
        recorder.lane(0).call(Kind.BARRIER)
    state = reader.read().state
    assert (state.phase, state.step, state.count) == (Phase.CHECKPOINT, 41, 3 * SLOTS + 2)
    assert 0 < state.phase_ns <= state.step_ns <= time.monotonic_ns()


def test_a_pending_call_is_given_again_when_its_end_is_known(recorder: Recorder, reader: Reader) -> None:
    index = recorder.lane(0).call(Kind.ALL_REDUCE, done=layout.PENDING)
    (call,) = reader.read().records
    assert isinstance(call, CallRecord)
    assert call.pending
    assert call.done_ns == 0
    assert reader.read().ended == ()
    done = time.monotonic_ns()
    recorder.done(index, done)
    assert reader.read().ended == (call._replace(pending=False, done_ns=done),)
    assert reader.read().ended == ()
    recorder.done(recorder.lane(0).call(Kind.ALL_REDUCE, done=layout.PENDING), done + 10**9)
    assert [call.done_ns for call in reader.read().ended] == [done + 10**9], (
        "also where it was quicker than the reader"
    )


def test_an_end_that_comes_after_its_slot_went_to_another_call_changes_nothing(
    recorder: Recorder, reader: Reader
) -> None:
    index = recorder.lane(0).call(Kind.ALL_REDUCE, done=layout.PENDING)
    reader.read()
    for _ in range(SLOTS):
        recorder.lane(1).call(Kind.BARRIER)
    recorder.done(index, time.monotonic_ns())
    batch = reader.read()
    assert batch.ended == ()
    assert {record.done_ns for record in batch.records if isinstance(record, CallRecord)} == {0}


def test_a_finding_comes_out_as_it_went_in(recorder: Recorder, reader: Reader) -> None:
    finding = Finding(3, Doubt.DIGEST, 120, accused=2, value=1.5, typical=-0.25, votes=3)
    recorder.finding(finding)
    recorder.finding(Finding(3, Doubt.NOT_FINITE, 121, accused=3, value=float("nan")))
    assert reader.read().records == (finding, Finding(3, Doubt.NOT_FINITE, 121, accused=3, value=0.0))


def test_what_was_overwritten_counts_as_lost(recorder: Recorder, reader: Reader) -> None:
    lane = recorder.lane(0)
    for _ in range(5 * SLOTS):
        lane.call(Kind.ALL_REDUCE)
    batch = reader.read()
    assert batch.lost + len(batch.records) == 5 * SLOTS
    last = batch.records[-1]
    assert isinstance(last, CallRecord)
    assert last.number == 5 * SLOTS
    lane.call(Kind.ALL_REDUCE)
    assert (reader.read().lost, len(batch.records) > SLOTS // 2) == (0, True)


def test_a_flood_is_read_in_bounded_work(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path / "0.ring", 4 * MAX_READ)
    reader = Reader.open(tmp_path / "0.ring")
    lane = recorder.lane(0)
    for _ in range(2 * MAX_READ):
        lane.call(Kind.ALL_REDUCE)
    batch = reader.read()
    assert (len(batch.records), batch.lost) == (MAX_READ, MAX_READ)
    reader.close()
    recorder.close()


def test_a_ring_opened_again_goes_on_where_it_was(path: Path, recorder: Recorder, reader: Reader) -> None:
    recorder.finished(7)
    recorder.lane(0).turn()
    again = Recorder.open(path)
    again.lane(0).call(Kind.ALL_REDUCE)
    again.close()
    call = reader.read().records[-1]
    assert isinstance(call, CallRecord)
    assert call.step == 7


def test_a_reader_beside_two_writing_threads_sees_each_record_once_and_whole(tmp_path: Path) -> None:
    recorder = Recorder.create(tmp_path / "0.ring")
    reader = Reader.open(tmp_path / "0.ring")
    each = 20_000

    def write(group: int) -> None:
        lane = recorder.lane(group)
        for number in range(each):
            if number % 2:
                lane.light(Kind.BROADCAST)
            else:
                lane.call(Kind.BROADCAST, size=number + 1, signature=number + 1)

    threads = [threading.Thread(target=write, args=(group,)) for group in (0, 1)]
    seen: list[CallRecord] = []
    lost = 0
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or reader.read().records:
        batch = reader.read()
        seen.extend(record for record in batch.records if isinstance(record, CallRecord))
        lost += batch.lost
    for thread in threads:
        thread.join()
    assert len({(call.group, call.number) for call in seen}) == len(seen) <= 2 * each - lost
    assert all(call.number == call.bytes == call.signature for call in seen if call.number % 2)
    reader.close()
    recorder.close()


def test_the_step_can_be_followed_where_another_writes_it(recorder: Recorder, reader: Reader) -> None:
    step, step_ns = memoryview(bytearray(8)).cast("q"), memoryview(bytearray(8)).cast("q")
    step[0] = -1
    recorder.follow(step, step_ns)
    lane = recorder.lane(0)
    step[0], step_ns[0] = 12, 99
    lane.turn()
    recorder.lane(1).turn()  # of another group: the step is recorded once
    steps = [record for record in reader.read().records if isinstance(record, StepRecord)]
    assert steps == [StepRecord(12, 99, 0, 0)]


def test_the_first_step_ends_the_start(recorder: Recorder, reader: Reader) -> None:
    recorder.phase = Phase.START
    recorder.finished(1)
    recorder.lane(0).turn()
    assert reader.read().state.phase is Phase.STEP


def test_what_a_forked_child_records_goes_nowhere(recorder: Recorder, reader: Reader) -> None:
    lane = recorder.lane(0)
    pid = os.fork()
    if pid == 0:
        recorder.detach()
        lane.call(Kind.ALL_REDUCE)
        os._exit(0)
    os.waitpid(pid, 0)
    assert reader.read().records == ()
    lane.call(Kind.BARRIER)
    assert len(reader.read().records) == 1


@pytest.mark.parametrize("slots", [0, 8, 48, 1 << 21])
def test_slots_are_a_power_of_two_within_bounds(path: Path, slots: int) -> None:
    with pytest.raises(RingError, match="power of two"):
        Recorder.create(path, slots)


@pytest.mark.parametrize("size", [0, 4095, 4096, 4096 + 63])
def test_another_file_is_no_ring(path: Path, size: int) -> None:
    path.write_bytes(b"\0" * size)
    with pytest.raises(RingError, match="no ring"):
        Reader.open(path)
    with pytest.raises(RingError, match="no ring"):
        Recorder.open(path)


def test_a_group_beyond_the_bound_has_no_lane(recorder: Recorder) -> None:
    with pytest.raises(ValueError, match="group 1024"):
        recorder.lane(layout.MAX_GROUPS)


def test_a_rank_that_truncates_its_ring_harms_nobody(path: Path, recorder: Recorder, reader: Reader) -> None:
    recorder.lane(0).call(Kind.ALL_REDUCE)
    for size in (4096 + 32, 100, 0):
        os.truncate(path, size)
        assert reader.read().records == ()


def words(*which: int) -> st.SearchStrategy[int]:
    return st.sampled_from(which) | st.integers(0, 255)


@settings(max_examples=300)
@given(
    body=st.binary(min_size=0, max_size=16 * 64),
    kinds=st.lists(st.tuples(words(1, 2, 3, 4, 5), words(1, 2, 10), st.booleans()), min_size=16, max_size=16),
    counts=st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 64), min_size=1, max_size=4),
    header=st.binary(min_size=32, max_size=32),
)
def test_garbage_never_breaks_the_reader_and_gives_bounded_values(
    tmp_path_factory: pytest.TempPathFactory,
    body: bytes,
    kinds: list[tuple[int, int, bool]],
    counts: list[int],
    header: bytes,
) -> None:
    path = tmp_path_factory.mktemp("ring") / "0.ring"
    Recorder.create(path, 16).close()
    reader = Reader.open(path)
    descriptor = os.open(path, os.O_RDWR)
    os.pwrite(descriptor, body, 4096)
    for slot, (type_, kind, stamped) in enumerate(kinds):
        os.pwrite(descriptor, bytes((type_, kind)), 4096 + slot * 64)
        if stamped:
            os.pwrite(descriptor, struct.pack("<I", slot + 1), 4096 + slot * 64 + 60)
    os.pwrite(descriptor, header, 128)
    for count in counts:
        os.pwrite(descriptor, struct.pack("<q", count), 64)
        batch = reader.read()
        assert 0 <= batch.lost <= MAX_LOST
        assert len(batch.records) <= 16
        for record in (*batch.records, *batch.ended):
            check(record)
        assert isinstance(batch.state.phase, Phase)
        assert min(batch.state.phase_ns, batch.state.step_ns, batch.state.step + 1, batch.state.count) >= 0
    os.close(descriptor)
    reader.close()


def check(record: layout.Record) -> None:
    """Every field is inside the bounds that it states."""
    if isinstance(record, CallRecord):
        assert isinstance(record.kind, Kind)
        assert 0 <= record.group < layout.MAX_GROUPS
        assert record.number >= 1
        assert -1 <= record.peer < layout.MAX_RANK
        assert record.step >= -1
        for later in (record.started_ns, record.done_ns):
            assert later == 0 or later >= record.issued_ns
    elif isinstance(record, PhaseRecord):
        assert isinstance(record.phase, Phase)
    elif isinstance(record, StepRecord):
        assert 0 <= record.duration_ns <= record.at_ns
    else:
        assert record.kind in list(Doubt)
        assert record.value == record.value
        assert -1 <= record.accused < layout.MAX_RANK
