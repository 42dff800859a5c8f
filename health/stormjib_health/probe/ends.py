"""When a call has ended: told by the future of its work on the CPU, by events in the device's own stream on CUDA."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from stormjib_health.probe.device import DeviceEnds

if TYPE_CHECKING:
    from stormjib_health.records.ring import Recorder


class Ends:
    """Fills the end of pending calls in. Keeps no work, no tensor and no group."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._device: DeviceEnds | None = None

    def begin(self) -> bool:
        """Just before a call on CUDA is issued. False where it must not be timed."""
        if self._device is None:
            self._device = DeviceEnds(self._recorder)
        return self._device.begin()

    def follow(self, index: int, work: Any) -> None:
        """The call at `index` is issued. Without a work it is over."""
        if self._device is not None and self._device.began:
            self._device.follow(index, work)
        elif work is None:
            self._recorder.done(index, time.monotonic_ns())
        else:
            work.get_future().add_done_callback(partial(self._ended, index))

    def _ended(self, index: int, future: Any) -> None:
        """On the backend's thread, at the true time."""
        now = time.monotonic_ns()
        try:
            future.value()
        except RuntimeError:  # it has failed: there is no end that could be compared with another rank's
            return
        self._recorder.done(index, now)
