"""A storage from what the user wrote: a folder, or the URL of a store. Client libraries are imported only for their URLs."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from stormjib_checkpoint.errors import StorageError
from stormjib_checkpoint.keys import from_environment
from stormjib_checkpoint.storage import Local, Storage
from stormjib_checkpoint.stores.store import Client, Store

if TYPE_CHECKING:
    from collections.abc import Mapping

PROBE_S = 20.0
"""How long the first look at a store may take, whatever its client is waiting for."""
NICE = 10
"""Of the client's threads, which it starts when it is first used: training goes first."""
_ENOUGH = {
    "s3": "Give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, both or neither, and an endpoint that is a URL.",
    "gs": "Give the whole JSON of a key in GOOGLE_SERVICE_ACCOUNT_KEY, or leave it out.",
    "az": "Give AZURE_STORAGE_ACCOUNT_NAME, a whole key or token, and an endpoint that is a URL.",
}
"""What a store's client cannot be made without."""
_OBSTORE = tuple(_ENOUGH)
_S3FS = "fsspec+s3"


@dataclass(frozen=True)
class Patience:
    """How long a request may take, and how long it is asked again, in seconds, before a save has failed."""

    request_s: float = 120.0
    again_s: float = 180.0


AT_START = Patience(5.0, 10.0)


def open_storage(
    root: str | os.PathLike[str],
    *,
    write: bool = True,
    patience: Patience = Patience(),
    options: Mapping[str, Any] | None = None,
) -> Storage:
    """The storage at a path or `file://` (a file system), `s3://`, `gs://`, `az://` (obstore) or `fsspec+s3://` (s3fs).

    A store is tried out: a tiny object is created and deleted, or without `write` names are listed. `options` go to the client as they
    are (`endpoint`, `region`, ...; for s3fs those of S3FileSystem); credentials come from the environment, the identity of the pod or
    machine, or from there. Raises StorageError, which names the URL and the fix, where the store is not there, refuses or does not
    answer, and where the URL is none; BadKey. Records are signed with the key that the environment names (`keys`).
    """
    text, key = os.fspath(root), from_environment()
    if "://" not in text:
        return Local(text, key=key)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return Local(unquote(parts.path), key=key)
    _refuse_odd(text)
    _try_out(_store(text, AT_START, options or {}, key), write)
    return _store(text, patience, options or {}, key)


def _store(url: str, patience: Patience, options: Mapping[str, Any], key: bytes | None) -> Store:
    parts = urlsplit(url)
    prefix = parts.path.strip("/")
    connect = _by_s3fs if parts.scheme == _S3FS else _by_obstore
    return Store(url.rstrip("/"), prefix, lambda: connect(parts.scheme, parts.netloc, patience, options), key)


def _by_obstore(scheme: str, bucket: str, patience: Patience, options: Mapping[str, Any]) -> Client:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        from stormjib_checkpoint.stores.with_obstore import Obstore
    except ImportError as error:
        raise _missing(f"{scheme}://{bucket}", "obstore") from error
    url = f"{scheme}://{bucket}"
    # The payload is not hashed for the signature: that costs four times the sending, and each piece has a hash of ours.
    config = {"unsigned_payload": True, **options} if scheme == "s3" else dict(options)
    client = {"timeout": timedelta(seconds=patience.request_s), "allow_http": _plain_http(options)}
    again = {"retry_timeout": timedelta(seconds=patience.again_s)}
    made: Any = from_url  # its overloads want the options of one kind of store
    try:
        return Obstore(made(url, config=config, client_options=client, retry_config=again), url)
    except BaseError:  # its own text shows what it could not read
        raise StorageError(
            url,
            "what the environment says of the store is not enough, or cannot be read",
            _ENOUGH[scheme],
        ) from None


def _by_s3fs(scheme: str, bucket: str, patience: Patience, options: Mapping[str, Any]) -> Client:
    try:
        from s3fs import S3FileSystem  # type: ignore[import-untyped]

        from stormjib_checkpoint.stores.with_s3fs import S3fs
    except ImportError as error:
        raise _missing(f"{scheme}://{bucket}", "s3fs") from error
    config = {
        "s3": {"payload_signing_enabled": False},
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
        "connect_timeout": min(patience.request_s, 5.0),
        "read_timeout": patience.request_s,
        "retries": {"mode": "standard", "total_max_attempts": _attempts(patience.again_s)},
    }
    system = S3FileSystem(config_kwargs=config, skip_instance_cache=True, use_listings_cache=False, **options)
    system.retries = 1  # botocore's are enough
    return S3fs(system, bucket)


def _attempts(again_s: float) -> int:
    """How often botocore may ask, so that the pauses between, each half of twice the one before and of 20 s at most, are that long."""
    number, paused = 1, 0.0
    while paused < again_s:
        paused += min(2.0 ** (number - 1), 20.0) / 2
        number += 1
    return number


def _plain_http(options: Mapping[str, Any]) -> bool:
    """Whether the endpoint that was named is one without TLS; nothing falls back to that by itself."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    endpoint = options.get("endpoint") or next(
        (os.environ[name] for name in names if os.environ.get(name)), ""
    )
    return str(endpoint).startswith("http://")


def _try_out(store: Store, write: bool) -> None:
    """In a thread, because a client may wait for longer than a start may take (for credentials of a machine that has none)."""
    failures: list[BaseException] = []
    done = threading.Event()

    def look() -> None:
        me = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, me, max(NICE, os.getpriority(os.PRIO_PROCESS, me)))
        try:
            store.probe() if write else store.names("")
        except BaseException as error:  # noqa: BLE001  raised below
            failures.append(error)
        done.set()

    threading.Thread(target=look, name="stormjib-probe", daemon=True).start()
    if not done.wait(PROBE_S):
        raise StorageError(
            store.root, f"no answer in {PROBE_S:.0f} s", "Look whether the store can be reached from here."
        )
    if failures:
        raise failures[0]


def _refuse_odd(url: str) -> None:
    parts = urlsplit(url)
    secret = "@" in parts.netloc or ":" in parts.netloc or bool(parts.query or parts.fragment)
    # A secret key may hold a slash, so that half of it looks like a path.
    shown = f"{parts.scheme}://" + ("..." if secret else parts.netloc + parts.path)
    if parts.scheme not in (*_OBSTORE, _S3FS):
        known = ", ".join(f"{scheme}://" for scheme in ("file", *_OBSTORE, _S3FS))
        fix = f"Name a folder, or a URL that begins with {known}."
        raise StorageError(shown, "no checkpoints can be kept there", fix)
    if secret:
        problem = "a checkpoint URL holds a bucket and a prefix, no credentials, port or query"
        raise StorageError(shown, problem, "Put what else the client needs into the environment.")
    prefix = parts.path.strip("/")
    if not parts.netloc or (prefix and any(part in ("", ".", "..") for part in prefix.split("/"))):
        problem = "no bucket, or an empty name in its path"
        raise StorageError(shown, problem, "Write it as s3://bucket/prefix.")


def _missing(url: str, package: str) -> StorageError:
    return StorageError(url, f"this needs {package}, which is not installed", "pip install 'stormjib[s3]'")
