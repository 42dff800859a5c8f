"""Finding binaries: cache, then download, then build, in this order, once for all processes."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from stormjib_local.errors import ToolMissing
from stormjib_local.projects import PROJECTS, PUBLISHED, Published, architecture, binaries
from stormjib_local.tools import MODULES, Tools, build_command

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HELM = next(project for project in PROJECTS if project.name == "helm")
PROGRAM = b"#!/bin/sh\necho downloaded\n"


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Go whose only talent is to write down that it was called, and to make what it was asked for."""
    folder = tmp_path / "go"
    folder.mkdir()
    calls = folder / "calls"
    calls.write_text("")
    program = folder / "go"
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        f"open({str(calls)!r}, 'a').write(os.getcwd() + ' ' + ' '.join(sys.argv[1:]) + '\\n')\n"
        "open(sys.argv[sys.argv.index('-o') + 1], 'w').write('#!/bin/sh\\necho built\\n')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return calls


@pytest.fixture
def server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Publishes what a test puts into the dictionary."""
    files: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = files.get(self.path.lstrip("/"))
            self.send_response(404 if content is None else 200)
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", files
        running.shutdown()
        thread.join()


def _tools(tmp_path: Path, published: Published | None = None) -> tuple[Tools, list[str]]:
    said: list[str] = []
    table = {} if published is None else {("helm", architecture()): published}
    return Tools(tmp_path / "cache", MODULES, table, said.append), said


def _runs(path: Path) -> str:
    return subprocess.run([path], check=True, capture_output=True, text=True).stdout.strip()


def _packed() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        entry = tarfile.TarInfo("linux/helm")
        entry.size = len(PROGRAM)
        tar.addfile(entry, io.BytesIO(PROGRAM))
    return buffer.getvalue()


def test_without_a_download_it_is_built_once(tmp_path: Path, compiler: Path) -> None:
    finder, said = _tools(tmp_path)
    path = finder.find("helm")
    assert _runs(path) == "built"
    assert finder.find("helm") == path
    assert len(compiler.read_text().splitlines()) == 1
    assert any("building from Go modules (no download with a pinned checksum" in line for line in said)


def test_a_second_checkout_finds_what_the_first_one_built(tmp_path: Path, compiler: Path) -> None:
    first, _ = _tools(tmp_path)
    second, said = _tools(tmp_path)
    built = first.find("helm")
    assert second.find("helm") == built
    assert said == []


def test_other_modules_or_flags_are_other_binaries(tmp_path: Path) -> None:
    copy = tmp_path / "tools" / "helm"
    copy.mkdir(parents=True)
    for file in ("go.mod", "go.sum"):
        (copy / file).write_bytes((MODULES / "helm" / file).read_bytes())
    before = HELM.digest(MODULES)
    assert HELM.digest(tmp_path / "tools") == before
    assert replace(HELM, ldflags="-s").digest(MODULES) != before
    with (copy / "go.sum").open("a") as file_:
        file_.write("x")
    assert HELM.digest(tmp_path / "tools") != before


@pytest.mark.parametrize("name", ["helm", "helm.tar.gz"])
def test_a_download_comes_before_a_build(
    tmp_path: Path, compiler: Path, server: tuple[str, dict[str, bytes]], name: str
) -> None:
    address, files = server
    files[name] = _packed() if name.endswith("gz") else PROGRAM
    checksum = f"sha256:{hashlib.sha256(files[name]).hexdigest()}"
    finder, _ = _tools(tmp_path, Published(f"{address}/{name}", checksum))
    assert _runs(finder.find("helm")) == "downloaded"
    assert compiler.read_text() == ""


def test_a_wrong_checksum_is_refused_and_leaves_nothing(
    tmp_path: Path, compiler: Path, server: tuple[str, dict[str, bytes]]
) -> None:
    address, files = server
    files["helm"] = PROGRAM + b"# and more\n"
    finder, _ = _tools(
        tmp_path, Published(f"{address}/helm", f"sha256:{hashlib.sha256(PROGRAM).hexdigest()}")
    )
    with pytest.raises(ToolMissing, match="refused"):
        finder.find("helm")
    assert [
        path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"
    ] == []
    assert compiler.read_text() == ""


@pytest.mark.parametrize("gone", ["http://127.0.0.1:1/helm", None])
def test_a_download_that_fails_is_built_instead(
    tmp_path: Path, compiler: Path, server: tuple[str, dict[str, bytes]], gone: str | None
) -> None:
    finder, said = _tools(tmp_path, Published(gone or f"{server[0]}/nothing", "sha256:0"))
    assert _runs(finder.find("helm")) == "built"
    assert any("building from Go modules (download failed" in line for line in said)


def test_two_at_once_build_once(tmp_path: Path, compiler: Path) -> None:
    first, _ = _tools(tmp_path)
    second, said = _tools(tmp_path)
    place = first.cache / f"helm-{HELM.digest(MODULES)}"
    first.cache.mkdir()
    with place.with_name(f"{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(target=second.find, args=("helm",))
        waiting.start()
        while not said:
            waiting.join(0.01)
        # What the one that holds the lock does meanwhile:
        place.mkdir()
        (place / "helm").write_bytes(PROGRAM)
    waiting.join()
    assert "another process" in said[0]
    assert compiler.read_text() == ""


def test_without_go_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ToolMissing, match=r"Install Go 1\.26"):
        _tools(tmp_path)[0].find("helm")


def test_a_build_that_fails_shows_its_last_lines_and_leaves_nothing(tmp_path: Path, compiler: Path) -> None:
    (compiler.parent / "go").write_text("#!/bin/sh\necho no such module\nexit 1\n")
    with pytest.raises(ToolMissing, match="no such module"):
        _tools(tmp_path)[0].find("helm")
    assert not list((tmp_path / "cache").rglob("helm"))


def test_outside_a_checkout_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="needs a checkout"):
        Tools(tmp_path / "cache", tmp_path / "nowhere", {}).find("etcd")


def test_an_unknown_tool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match="none of our tools"):
        _tools(tmp_path)[0].find("docker")


def test_kubernetes_is_built_with_a_version_that_kubectl_can_read(tmp_path: Path) -> None:
    project = next(project for project in PROJECTS if project.name == "k8s")
    command = build_command("go", project, "kubelet", tmp_path / "kubelet")
    assert command[-1] == "k8s.io/kubernetes/cmd/kubelet"
    flags = command[command.index("-ldflags") + 1]
    for place in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        assert f"-X {place}.gitVersion=v1.36.2" in flags


def test_every_published_file_is_pinned_and_one_of_ours() -> None:
    sizes = {"sha256": 64, "sha512": 128}
    for (binary, _), published in PUBLISHED.items():
        kind, _, checksum = published.checksum.partition(":")
        assert binary in binaries()
        assert len(checksum) == sizes[kind]
        assert published.url.startswith("https://")
