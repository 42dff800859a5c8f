"""Copying a step that lies on a GPU: all of it is asked for at once, on a stream of its own, and the host does not wait for it.

Whoever is about to change the state makes the stream wait that changes it (`Fetching.hold`). So an optimizer's step is queued behind the
copy, and the host goes on to queue the next forward.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple, Self

import torch

from stormjib_checkpoint.engine import memory
from stormjib_checkpoint.hashing import Hashing, Memory
from stormjib_checkpoint.tensors import copyable, on_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stormjib_checkpoint.engine.arena import Arena
    from stormjib_checkpoint.image import Image
    from stormjib_checkpoint.writer import Staged

Marks = dict[torch.device, torch.cuda.Event]


def on_device(tensor: torch.Tensor) -> bool:
    """Whether it lies where its bytes have to be fetched from."""
    return tensor.is_cuda


def marks(tensors: Sequence[torch.Tensor]) -> Marks:
    """Where the current stream of each device stands now; empty where all lies on the host."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    devices = {tensor.device for tensor in filter(on_device, tensors)}
    return {device: _marked(torch.cuda.current_stream(device)) for device in devices}


def _marked(stream: torch.cuda.Stream) -> torch.cuda.Event:
    # Blocking: whoever waits for it sleeps, and does not spin on a processor that training wants.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    stream.record_event(event)
    return event


class Lane:
    """The stream of one device on which steps are copied."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, mark: torch.cuda.Event) -> None:
        """What is asked from now on happens after `mark`."""
        self._stream.wait_event(mark)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """What this thread asks of the device goes this way."""
        with torch.cuda.stream(self._stream):
            yield

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Ask for a copy to the host."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """Passed when all is done that was asked so far."""
        return _marked(self._stream)

    def hold(self, mark: torch.cuda.Event) -> None:
        """What this thread asks of the device from now on happens after `mark`."""
        torch.cuda.current_stream(self.device).wait_event(mark)


class Lanes:
    """One lane a device, made when the first step comes from it."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}

    def of(self, device: torch.device) -> Lane:
        """The lane of a device."""
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]


class _Piece(NamedTuple):
    number: int
    marks: list[torch.cuda.Event]


class Fetching:
    """A file on its way into the arena where parts of it lie on devices. For one thread, but for `hold`.

    A context: pieces that were not handed over when it ends are given back, once nothing is written into them any more.
    """

    def __init__(
        self,
        file: Image,
        locals_: Sequence[torch.Tensor],
        arena: Arena,
        staged: Callable[[int], None],
        lanes: Mapping[torch.device, Lane],
    ) -> None:
        """As for `staging.Copying`; `lanes` has one for each device."""
        self._arena, self._staged, self._hashing = arena, staged, Hashing(file, arena.piece_bytes)
        self._sources = [torch.frombuffer(bytearray(file.head), dtype=torch.uint8), *locals_]
        self._starts = [0, *file.starts]
        self._lanes = lanes
        self._target = torch.frombuffer(arena.view, dtype=torch.uint8)
        self._bytes: tuple[int, torch.Tensor] | None = None
        self._kept: list[torch.Tensor] = []
        self._asked: list[_Piece] = []
        self._last: list[tuple[Lane, torch.cuda.Event]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lane in self._lanes.values() if self._asked else ():
            lane.mark().synchronize()
        for piece in self._asked:
            self._arena.free(piece.number)

    def ask(self) -> None:
        """Copy what lies on the host, and ask for all else; waits only for pieces that the save before has not written yet."""
        with torch.no_grad(), ExitStack() as entered:
            for lane in self._lanes.values():
                entered.enter_context(lane.entered())
            for piece in range(self._hashing.pieces):
                self._arena.take(piece)
                self._asked.append(_Piece(piece, []))
                self._put(piece)
                self._asked[-1].marks.extend(lane.mark() for lane in self._lanes.values())
            self._last = [(lane, lane.mark()) for lane in self._lanes.values()]

    def hold(self) -> None:
        """After `ask`: what the calling thread asks of the devices from now on waits until all is copied. The caller does not."""
        for lane, mark in self._last:
            lane.hold(mark)

    def finish(self) -> Staged:
        """Hash piece by piece, as they come, and hand them over."""
        while self._asked:
            piece = self._asked[0]
            for mark in piece.marks:
                mark.synchronize()
            for _ in self._hashing.blocks(piece.number, Memory(self._arena.view, self._arena.address)):
                pass  # it has come
            self._staged(piece.number)
            del self._asked[0]
        return self._hashing.staged()

    def _put(self, piece: int) -> None:
        for number, at, upto in self._hashing.spans(piece):
            source, skipped = self._source(number), at - self._starts[number]
            if on_device(source):
                part = source[skipped : skipped + upto - at]
                self._lanes[source.device].copy(self._target[at:upto], part)
            else:
                memory.copy(self._arena.address + at, source.data_ptr() + skipped, upto - at)

    def _source(self, number: int) -> torch.Tensor:
        """A part as a row of bytes where it lies."""
        if self._bytes is None or self._bytes[0] != number:
            tensor = self._sources[number]
            plain = (
                copyable(tensor).contiguous().resolve_conj().resolve_neg()
                if on_device(tensor)
                else on_host(tensor)
            )
            self._bytes = (number, plain.reshape(-1).view(torch.uint8))
            if plain.data_ptr() != tensor.data_ptr():
                self._kept.append(plain)  # the device reads it later
        return self._bytes[1]
