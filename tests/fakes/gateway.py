"""A real S3 server (versitygw) on this machine, and two things in front of it that can fail: toxiproxy, and a proxy that answers itself."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from typing import TYPE_CHECKING, Any

from stormjib_local.tools import Tools

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEY, SECRET = "stormjib-test", "wJalrXUtnFEMI-K7MDENG"
START_S = 20.0


def environment(address: str) -> dict[str, str]:
    """What a client needs to find the server at `host:port`."""
    return {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_METADATA_ENDPOINT": "http://127.0.0.1:1",
    }


class Gateway:
    """versitygw with its buckets in a folder."""

    def __init__(self, folder: Path, address: str) -> None:
        self.address = address
        self._folder = folder
        self._numbers = count(1)

    def bucket(self) -> str:
        """The name of a new one."""
        name = f"bucket-{next(self._numbers)}"
        (self._folder / name).mkdir()
        return name

    def unfinished(self, bucket: str) -> list[Path]:
        """What uploads have left behind that are neither complete nor aborted."""
        return [path for path in (self._folder / bucket / ".sgwtmp").rglob("*") if path.is_file()]


@contextlib.contextmanager
def gateway(folder: Path, host: str = "127.0.0.1") -> Iterator[Gateway]:
    """A running one at an address of this machine. Builds it where that has not been done."""
    for name in ("buckets", "sidecar"):
        (folder / name).mkdir()
    address = f"{host}:{_free_port(host)}"
    words = [Tools().find("versitygw"), "--quiet", "--port", address]
    words += ["posix", "--sidecar", folder / "sidecar", folder / "buckets"]
    env = {**os.environ, "ROOT_ACCESS_KEY": KEY, "ROOT_SECRET_KEY": SECRET}
    with _running(words, address, folder / "gateway.log", env):
        yield Gateway(folder / "buckets", address)


class Toxics:
    """toxiproxy with one proxy, to `upstream`."""

    def __init__(self, api: str, upstream: str) -> None:
        self.address = f"127.0.0.1:{_free_port()}"
        self._api = f"http://{api}"
        self._ask("POST", "/proxies", {"name": "s3", "listen": self.address, "upstream": upstream})

    def add(self, kind: str, **attributes: int) -> None:
        """To what clients send from now on, by connections old and new."""
        self._ask(
            "POST",
            "/proxies/s3/toxics",
            {"name": kind, "type": kind, "stream": "upstream", "attributes": attributes},
        )

    def clear(self) -> None:
        self._ask("POST", "/reset", {})

    def received(self) -> int:
        """Bytes that clients have sent through it."""
        with urllib.request.urlopen(f"{self._api}/metrics", timeout=START_S) as answer:
            found = re.findall(rb'received_bytes_total\{direction="upstream".*\} ([0-9.e+]+)', answer.read())
        return sum(int(float(number)) for number in found)

    def _ask(self, method: str, path: str, body: dict[str, Any]) -> None:
        request = urllib.request.Request(self._api + path, json.dumps(body).encode(), method=method)
        urllib.request.urlopen(request, timeout=START_S).close()


@contextlib.contextmanager
def toxics(folder: Path, upstream: str) -> Iterator[Toxics]:
    """A running one in front of `upstream`."""
    port = _free_port()
    words = [Tools().find("toxiproxy"), "-host", "127.0.0.1", "-port", str(port), "-proxy-metrics"]
    with _running(words, f"127.0.0.1:{port}", folder / "toxiproxy.log", dict(os.environ)):
        yield Toxics(f"127.0.0.1:{port}", upstream)


class Moody:
    """A proxy that answers some requests itself, with an error of S3; the others it passes on, conditional ones one after the other."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream
        self.fired = 0
        self.conditional = threading.Lock()
        self._lock = threading.Lock()
        self._rule: tuple[re.Pattern[str], int, str, int] | None = None

    def answer(self, request: str, status: int, code: str, times: int = 1_000_000) -> None:
        """From now on, to requests such as `PUT /b/k?partNumber=2`, the first `times` of those that match."""
        self._rule, self.fired = (re.compile(request), status, code, times), 0

    def clear(self) -> None:
        self._rule = None

    def refuses(self, request: str) -> tuple[int, str] | None:
        """Status and code for a request that is not passed on."""
        with self._lock:
            if self._rule is None or self.fired >= self._rule[3] or not self._rule[0].search(request):
                return None
            self.fired += 1
            return self._rule[1], self._rule[2]


@contextlib.contextmanager
def moody(upstream: str) -> Iterator[tuple[Moody, str]]:
    """A running one, and its address."""
    proxy = Moody(upstream)
    handler = type("Handler", (_Handler,), {"proxy": proxy})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy, f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body at once: between two packets the other side may wait
    proxy: Moody

    def handle_expect_100(self) -> bool:
        super().handle_expect_100()
        self.wfile.flush()
        return True

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        refused = self.proxy.refuses(f"{self.command} {self.path}")
        if refused is None:
            with self.proxy.conditional if self.headers.get("If-None-Match") else contextlib.nullcontext():
                self._pass_on(body)
        else:
            text = f"<?xml version='1.0'?><Error><Code>{refused[1]}</Code><Message>{self.headers['Authorization']}</Message></Error>"
            self._reply(refused[0], [], text.encode())

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

    def _pass_on(self, body: bytes) -> None:
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=START_S)
        headers = {
            name: value for name, value in self.headers.items() if name not in ("Connection", "Expect")
        }
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            kept = [
                item
                for item in answer.getheaders()
                if item[0].lower() not in ("connection", "date", "server")
            ]
            self._reply(answer.status, kept, answer.read())

    def _reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if not any(name.lower() == "content-length" for name, _ in headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def _running(words: list[Any], address: str, log: Path, env: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen([str(word) for word in words], stdout=output, stderr=output, env=env)
    try:
        _wait_for(address, process, log)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection((host, int(port)), 1).close()
            return
        time.sleep(0.02)
    raise RuntimeError(f"nothing listens on {address}:\n{log.read_text()}")


def _free_port(host: str = "127.0.0.1") -> int:
    with socket.create_server((host, 0)) as taken:
        port: int = taken.getsockname()[1]
        return port
