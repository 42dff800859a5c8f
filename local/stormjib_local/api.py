"""A few lines of client for the API server, for the few objects that the cluster itself needs."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from typing import TYPE_CHECKING, Any

from stormjib_local.errors import ApiError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Json = dict[str, Any]


@dataclass(frozen=True)
class Api:
    """One user's way to one API server. `pki` holds ca.crt, <user>.crt and <user>.key."""

    server: str
    pki: Path
    user: str

    @cached_property
    def _context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.pki / "ca.crt"))
        context.load_cert_chain(self.pki / f"{self.user}.crt", self.pki / f"{self.user}.key")
        return context

    def get(self, path: str) -> Json:
        """One object, or a list."""
        with self._open("GET", path, None, 5) as answer:
            document: Json = json.load(answer)
            return document

    def post(self, path: str, body: Json) -> None:
        """Create; what exists already is left as it is."""
        try:
            with self._open("POST", path, body, 5):
                return
        except ApiError as error:
            if error.status != 409:
                raise

    def delete(self, path: str) -> None:
        """Delete; what is gone already is fine."""
        try:
            with self._open("DELETE", path, None, 5):
                return
        except ApiError as error:
            if error.status != 404:
                raise

    def watch(self, path: str, seconds: int) -> Iterator[Json]:
        """Changes, until the time is over."""
        with self._open("GET", f"{path}?watch=1&timeoutSeconds={seconds}", None, seconds + 5) as answer:
            try:
                for line in answer:
                    yield json.loads(line)
            except (OSError, HTTPException) as error:
                raise ApiError(f"{self.server}{path}: {error}") from error

    def ready(self) -> bool:
        """Does it serve?"""
        try:
            with self._open("GET", "/readyz", None, 2):
                return True
        except ApiError:
            return False

    def _open(self, method: str, path: str, body: Json | None, timeout: float) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server}{path}", data=data, method=method)
        request.add_header("Content-Type", "application/json")
        try:
            return self._opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            with error:
                raise ApiError(
                    f"{method} {path}: {error.read().decode(errors='replace')}", error.code
                ) from error
        except (OSError, HTTPException) as error:
            raise ApiError(f"{self.server}{path}: {error}") from error

    @cached_property
    def _opener(self) -> urllib.request.OpenerDirector:
        # Our addresses are this machine's own: a proxy from the environment must not see them.
        return urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=self._context)
        )
