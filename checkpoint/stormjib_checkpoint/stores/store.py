"""The storage protocol over an object store. Each client library is behind a `Client`; what is promised is made here.

Create-only: an object is put with `If-None-Match: *` and the token of its writer, so that a writer whose answer was lost on the way
finds its own token there and not a conflict. A multipart upload cannot be completed on a condition with every client: its writer
first creates a claim beside it (`.name.claim`), looks whether the name is free, and removes the claim when the object is there.

Durable: a store answers a put, or the end of an upload, when the object will last; nothing has to be synced.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import threading
import time
from typing import TYPE_CHECKING, Protocol

from stormjib_checkpoint.errors import AlreadyThere, StorageError
from stormjib_checkpoint.keys import checked
from stormjib_checkpoint.stores.refusals import taken

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from stormjib_checkpoint.storage import Chunk, NewFile, Opened

TOKEN = "stormjibwriter"
"""The metadata that says who wrote an object. Letters only: Azure takes no hyphen in a name, and some proxies no underscore."""
WRITERS = 8
"""Parts on their way at once; one connection alone reaches a small share of what a store can take."""
TRIES = 5
"""Puts that may collide with another one under way (HTTP 409: ask again) before that is an error."""
PAUSE_S = 0.1


class Upload(Protocol):
    """A multipart upload."""

    @property
    def whole(self) -> bool:
        """Whether all bytes of the file have been written."""

    def write(self, offset: int, data: memoryview) -> None:
        """As `NewFile.write`; the memory is free again on return."""

    def complete(self) -> None:
        """Have the object there. Only when `whole`."""

    def abort(self) -> None:
        """Have nothing there, and as far as the client can, nothing that costs money either. Raises nothing."""


class Client(Protocol):
    """What is needed of a client library. Keys are whole, without the bucket; errors are StorageErrors."""

    def put(self, key: str, data: bytes, token: str) -> bool:
        """Create an object with its writer's token; False where the name is taken, or another put of it is on its way."""

    def replace(self, key: str, data: bytes) -> None:
        """Put an object, whatever is there."""

    def owner(self, key: str) -> str | None:
        """The token of whoever wrote an object, "" where it has none; None where there is no object."""

    def size(self, key: str) -> int:
        """Raises NotThere."""

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; the object is known to be long enough."""

    def names(self, prefix: str) -> list[str]:
        """What comes after `prefix`, up to the next `/`, of all objects."""

    def delete(self, keys: list[str]) -> None:
        """Delete objects; one that is gone is fine."""

    def upload(self, key: str, size: int, token: str) -> Upload:
        """Begin a multipart upload."""

    def forget_uploads(self, prefix: str) -> None:
        """Abort the uploads of dead writers under `prefix`, where the client can find them."""


class _Object:
    def __init__(self, client: Client, key: str) -> None:
        self._client, self._key = client, key
        self.size = client.size(key)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        part = buffer[: max(0, self.size - offset)]
        if part:
            self._client.read_into(self._key, offset, part)
        return len(part)


class Store:
    """A prefix of a bucket. `connect` makes the client, in the process that uses it and when it is first used."""

    writers = WRITERS
    request_bytes = 1024 * 1024

    def __init__(
        self, url: str, prefix: str, connect: Callable[[], Client], key: bytes | None = None
    ) -> None:
        """Raises BadKey."""
        self.root, self.key = url, checked(key)
        self._prefix = f"{prefix}/" if prefix else ""
        self._connect = connect
        self._made: Client | None = None
        self._lock = threading.Lock()

    @property
    def _client(self) -> Client:
        _refuse_forked(self.root)
        with self._lock:
            if self._made is None:
                self._made = self._connect()
            return self._made

    @contextlib.contextmanager
    def new(self, path: str, size: int) -> Iterator[NewFile]:
        key, token = self._key(path), secrets.token_hex(8)
        upload: Upload | None = None
        claim = self._claim(path, token)
        try:
            if self._client.owner(key) is not None:
                raise taken(self._at(path))
            upload = self._client.upload(key, size, token)
            yield upload
            if not upload.whole:
                raise StorageError(
                    self._at(path), f"fewer than its {size} bytes were written", "Write them all."
                )
        except BaseException:
            if upload is not None:
                upload.abort()
            self._discard(claim)
            raise
        self._complete(upload, key, token)
        self._discard(claim)

    def create(self, path: str, chunks: Iterable[Chunk]) -> None:
        self._create(path, b"".join(chunks), secrets.token_hex(8))

    def replace(self, path: str, data: bytes) -> None:
        self._client.replace(self._key(path), data)

    def read(self, path: str, limit: int) -> bytes:
        with self.open(path) as file:
            if file.size > limit:
                problem = f"{file.size} bytes; at most {limit} are read"
                raise StorageError(self._at(path), problem, "It is not a file of ours.")
            data = bytearray(file.size)
            file.read_into(0, memoryview(data))
            return bytes(data)

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[Opened]:
        yield _Object(self._client, self._key(path))

    def past_cache(self) -> Store:
        return self  # every read is a request

    def names(self, folder: str) -> list[str]:
        return [name for name in self._all_names(folder) if not name.startswith(".")]

    def remove(self, folder: str, names: Iterable[str]) -> None:
        keys = [self._key(f"{folder}/{name}") for name in names]
        if keys:
            self._client.delete(keys)

    def remove_folder(self, folder: str) -> None:
        self.remove(folder, [name for name in self._all_names(folder) if name.startswith(".")])
        self._client.forget_uploads(f"{self._key(folder)}/")

    def probe(self) -> None:
        """Create and delete a tiny object. Raises StorageError where that cannot be done."""
        name = f".probe-{secrets.token_hex(8)}"
        self.create(name, [b"stormjib"])
        self._client.delete([self._key(name)])

    def _create(self, path: str, data: bytes, token: str) -> None:
        key = self._key(path)
        for _ in range(TRIES):
            try:
                if self._client.put(key, data, token):
                    return
            except StorageError:
                if not self._is_ours(key, token):
                    raise
                return  # it was done, and the answer was lost on the way
            owner = self._client.owner(key)
            if owner == token:
                return  # so it was here, and the client has asked again
            if owner is not None:
                raise taken(self._at(path))
            time.sleep(PAUSE_S)
        problem = f"none of {TRIES} puts came through, and nobody's object is there"
        raise StorageError(
            self._at(path), problem, "Try again; if it stays so, look at the store's conditional puts."
        )

    def _claim(self, path: str, token: str) -> str:
        folder, _, name = path.rpartition("/")
        claim = f"{folder}/.{name}.claim" if folder else f".{name}.claim"
        try:
            self._create(claim, b"", token)
        except AlreadyThere as error:
            raise taken(self._at(path)) from error
        return claim

    def _complete(self, upload: Upload, key: str, token: str) -> None:
        """Where this fails and nothing can be seen, the claim stays: the store may still complete the upload."""
        try:
            upload.complete()
        except StorageError:
            if not self._is_ours(key, token):
                raise

    def _is_ours(self, key: str, token: str) -> bool:
        try:
            return self._client.owner(key) == token
        except StorageError:
            return False

    def _discard(self, claim: str) -> None:
        with contextlib.suppress(StorageError):
            self._client.delete([self._key(claim)])

    def _all_names(self, folder: str) -> list[str]:
        prefix = f"{self._key(folder)}/" if folder else self._prefix
        return sorted(self._client.names(prefix))

    def _key(self, path: str) -> str:
        if not path or any(part in ("", ".", "..") or "\0" in part for part in path.split("/")):
            raise ValueError(f"{path!r} is no path below a root")
        return self._prefix + path

    def _at(self, path: str) -> str:
        return f"{self.root}/{path}"


_used_in: int | None = None


def _refuse_forked(url: str) -> None:
    """The threads of a client do not outlive a fork: without this the child would hang."""
    global _used_in
    if _used_in is None:
        _used_in = os.getpid()
    if _used_in != os.getpid():
        raise StorageError(
            url,
            f"process {_used_in} used a store, and forked this one",
            "Fork before a store is first used, or start the process anew (spawn).",
        )
