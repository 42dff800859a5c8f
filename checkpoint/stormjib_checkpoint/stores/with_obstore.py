"""Object stores by obstore: the client whose costs are small. S3 and what speaks like it, Google's and Azure's.

Memory: parts are sent from the caller's memory, nothing is copied but the end of a file and what comes out of turn; a read holds its
bytes once more, one piece of 16 MiB as a rule.
"""

from __future__ import annotations

import contextlib
import queue
import re
import threading
import weakref
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from stormjib_checkpoint.errors import NotThere, StorageError
from stormjib_checkpoint.stores import refusals
from stormjib_checkpoint.stores.parts import Part, Parts, part_bytes
from stormjib_checkpoint.stores.refusals import Refusal
from stormjib_checkpoint.stores.store import TOKEN, WRITERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from obstore.store import ObjectStore


class Obstore:
    """`lends`: whether a part's memory is let go of when it is sent; the store in memory keeps it to the end."""

    def __init__(self, store: ObjectStore, url: str, *, lends: bool = True) -> None:
        self._store, self._url, self._lends = store, url, lends

    def put(self, key: str, data: bytes, token: str) -> bool:
        with self._told(key):
            try:
                obstore.put(self._store, key, data, mode="create", attributes={TOKEN: token})
            except AlreadyExistsError:
                return False
        return True

    def replace(self, key: str, data: bytes) -> None:
        with self._told(key):
            obstore.put(self._store, key, data, mode="overwrite")

    def owner(self, key: str) -> str | None:
        try:
            with self._told(key):
                found = obstore.get(self._store, key, options={"head": True}).attributes
        except NotThere:
            return None
        return str(found.get(TOKEN, ""))

    def size(self, key: str) -> int:
        with self._told(key):
            return obstore.head(self._store, key)["size"]

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        with self._told(key):
            buffer[:] = memoryview(obstore.get_range(self._store, key, start=offset, length=len(buffer)))

    def names(self, prefix: str) -> list[str]:
        with self._told(prefix):
            found = obstore.list_with_delimiter(self._store, prefix or None)
        paths = [*found["common_prefixes"], *(entry["path"] for entry in found["objects"])]
        return [path[len(prefix) :] for path in paths]

    def delete(self, keys: list[str]) -> None:
        with self._told(keys[0]):
            try:
                obstore.delete(self._store, keys)
            except FileNotFoundError:  # some stores tell, and leave the others where they are
                for key in keys:
                    with contextlib.suppress(FileNotFoundError):
                        obstore.delete(self._store, key)

    def upload(self, key: str, size: int, token: str) -> _Upload:
        return _Upload(self, key, size, token)

    def forget_uploads(self, prefix: str) -> None:
        """obstore cannot list them: a lifecycle rule of the bucket does it."""

    def send(self, key: str, parts: Iterator[memoryview], length: int, token: str) -> None:
        """Upload what the iterator gives, in parts of `length`; where it raises, the upload is aborted."""
        obstore.put(
            self._store,
            key,
            parts,
            use_multipart=True,
            chunk_size=length,
            max_concurrency=WRITERS,
            attributes={TOKEN: token},
        )

    @property
    def lends(self) -> bool:
        return self._lends

    def told(self, key: str, error: Exception) -> StorageError:
        return refusals.error(f"{self._url}/{key}", _refusal(error))

    @contextlib.contextmanager
    def _told(self, key: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise self.told(key, error) from None


class _Aborted(Exception):
    pass


class _Upload:
    """obstore takes a file as an iterator of parts, in order: a thread of its own feeds it from what the writers hand in.

    A writer's memory is lent: `write` returns when obstore has let go of it, which is when the part is sent, or the upload has
    failed. A part that comes before its turn is copied instead (its writer may be the one who has the part before), and so is a
    last one that is short, which obstore holds until the end.
    """

    def __init__(self, client: Obstore, key: str, size: int, token: str) -> None:
        self._client, self._key, self._token = client, key, token
        self._length = part_bytes(size)
        self._parts = Parts(size, self._length)
        self._changed = threading.Condition()
        self._ready: dict[int, memoryview] = {}
        self._sent = 0  # parts that obstore has taken
        self._unbroken = 0  # parts that are there without a gap, those included
        self._finishing = self._aborting = self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="stormjib-upload", daemon=True)
        self._thread.start()

    @property
    def whole(self) -> bool:
        return self._parts.whole

    def write(self, offset: int, data: memoryview) -> None:
        for part in self._parts.put(offset, data):
            self._hand(part)

    def complete(self) -> None:
        self._end(finishing=True)
        if self._failure is not None:
            raise self._failure

    def abort(self) -> None:
        self._end(finishing=False)

    def _end(self, *, finishing: bool) -> None:
        with self._changed:
            self._finishing, self._aborting = finishing, not finishing
            self._changed.notify_all()
        self._thread.join()

    def _hand(self, part: Part) -> None:
        gone: queue.SimpleQueue[None] = queue.SimpleQueue()
        with self._changed:
            self._check()
            in_turn = part.number == self._unbroken
            lent = part.borrowed and in_turn and self._lendable(part)
            watch = self._put(part, lent, gone)
            while self._unbroken in self._ready:
                self._unbroken += 1
            self._changed.notify_all()
            if in_turn and not lent:  # or they would pile up
                self._changed.wait_for(lambda: self._ended or self._sent > part.number)
        if lent:
            gone.get()
            del watch
        self._check()

    def _lendable(self, part: Part) -> bool:
        return self._client.lends and part.end - part.start == self._length

    def _put(self, part: Part, lent: bool, gone: queue.SimpleQueue[None]) -> weakref.ref[memoryview]:
        """Nobody but obstore may hold the view: when it dies, the memory is free."""
        view = part.source[part.start : part.end]
        if part.borrowed and not lent:
            view = memoryview(bytes(view))
        self._ready[part.number] = view
        return weakref.ref(view, lambda _: gone.put(None))

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            self._client.send(self._key, self._feed(), self._length, self._token)
        except _Aborted:
            pass
        except (BaseError, OSError) as error:
            self._failure = self._client.told(self._key, error)
        except BaseException as error:  # noqa: BLE001  whoever writes gets it
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._ready.clear()
                self._changed.notify_all()

    def _feed(self) -> Iterator[memoryview]:
        while (number := self._next()) is not None:
            yield self._ready.pop(number)

    def _next(self) -> int | None:
        with self._changed:
            self._changed.wait_for(lambda: self._finishing or self._aborting or self._sent in self._ready)
            if self._aborting:
                raise _Aborted
            if self._sent not in self._ready:
                return None
            self._sent += 1
            self._changed.notify_all()
            return self._sent - 1


_CODE = re.compile(r"<Code>(\w{1,64})</Code>")
_STATUS = re.compile(r"status code: (\d{3})")
_KIND = re.compile(r"kind: (Connect|Timeout|Interrupted|Decode|Request)\b")
_SAID = {"Connect": "no connection", "Timeout": "no answer in time"}


def _refusal(error: Exception) -> Refusal:
    """What obstore's text says, but never what the store has answered: that may hold what was signed."""
    text = str(error)
    code, status, kind = (found.search(text) for found in (_CODE, _STATUS, _KIND))
    if "latest/api/token" in text or "security-credentials" in text:
        return Refusal(
            refusals.NO_CREDENTIALS, text="there are none in the environment, and no identity of this machine"
        )
    if code or status:
        return Refusal(code[1] if code else "", int(status[1]) if status else 0)
    if isinstance(error, FileNotFoundError):
        return Refusal(status=404)
    if kind:
        return Refusal(text=_SAID.get(kind[1], "the connection broke"))
    return Refusal(text=text.partition("\n")[0].partition("<")[0][:200])
