"""Start and end of a call on a CUDA device, by events in its streams. The only place that knows CUDA."""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from stormjib_health.records.ring import Recorder

_ANCHOR_S = 10.0
"""An event's time is a 32-bit float of milliseconds since the anchor: after ten seconds it still tells microseconds."""
_MOST = 64
_event: Any = torch.cuda.Event
_stream: Any = torch.cuda.Stream


@dataclass
class _Followed:
    index: int
    start: Any
    end: Any = None
    started: bool = False


class DeviceEnds:
    """Events round a few calls, looked at when the next one is timed: nothing waits for the device, and nothing is
    asked of it while a graph is captured."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._followed: deque[_Followed] = deque(maxlen=_MOST)
        self._anchor: Any = None
        self._anchor_ns = 0
        self._start: Any = None
        # Then a future of a work waits for the device on the host.
        self._off = os.environ.get("TORCH_NCCL_BLOCKING_WAIT", "0") == "1"

    @property
    def began(self) -> bool:
        """A call was begun and not followed yet."""
        return self._start is not None

    def begin(self) -> bool:
        """Just before the call: its stream has come so far when its inputs are ready."""
        self._start = None
        if self._off or torch.cuda.is_current_stream_capturing():
            return False
        self._look()
        self._set_anchor()
        self._start = _event(enable_timing=True)
        self._start.record()
        return True

    def follow(self, index: int, work: Any) -> None:
        """The call is issued. A callback of its future runs in a stream that waits for it; without a work the current
        stream does."""
        if self._start is None:
            return
        followed, self._start = _Followed(index, self._start), None
        self._followed.append(followed)
        if work is None:
            _record_end(followed)
        else:
            work.get_future().add_done_callback(lambda _: _record_end(followed))

    def _look(self) -> None:
        """Fill in what the device has reached by now."""
        while self._followed:
            first = self._followed[0]
            if not first.started and first.start.query():
                first.started = True
                self._recorder.started(first.index, self._time_ns(first.start))
            if first.end is None or not first.end.query():
                return
            self._recorder.done(first.index, self._time_ns(first.end))
            self._followed.popleft()

    def _set_anchor(self) -> None:
        """An event whose time is known on the host, in an idle stream: it is reached at once."""
        if self._followed or time.monotonic_ns() - self._anchor_ns < _ANCHOR_S * 1e9:
            return
        stream = _stream()
        self._anchor = _event(enable_timing=True)
        self._anchor.record(stream)
        self._anchor.synchronize()
        self._anchor_ns = time.monotonic_ns()

    def _time_ns(self, event: Any) -> int:
        if self._anchor is None:
            return 0
        return self._anchor_ns + int(self._anchor.elapsed_time(event) * 1e6)


def _record_end(followed: _Followed) -> None:
    end = _event(enable_timing=True)
    end.record()
    followed.end = end
