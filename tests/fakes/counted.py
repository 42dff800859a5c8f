"""A storage that counts what is read of its data files."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from stormjib_checkpoint.storage import Local

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stormjib_checkpoint.files import Files
    from stormjib_checkpoint.storage import Opened


class Counted(Local):
    """As Local; `bytes_read` are the bytes, `requests` the calls, and `opened` how often one was opened, of data files only."""

    def __init__(self, root: str, files: Files, request_bytes: int = Local.request_bytes) -> None:
        super().__init__(root, files)
        self.request_bytes = request_bytes
        self.bytes_read = self.requests = self.opened = 0

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        with super().open(path) as file:
            is_data = path.endswith(".safetensors")
            self.opened += is_data
            yield _File(file, self) if is_data else file


class _File:
    def __init__(self, file: Opened, counts: Counted) -> None:
        self._file, self._counts, self.size = file, counts, file.size

    def read_into(self, offset: int, buffer: memoryview) -> int:
        self._counts.bytes_read += len(buffer)
        self._counts.requests += 1
        return self._file.read_into(offset, buffer)
