"""Finding binaries (the cluster's, a store for tests): the cache, else an official download, else `go build` from pinned modules.

A download without a pinned checksum is never used: what `PUBLISHED` does not list is built (`docs/decisions/` says why).
`python -m stormjib_local.tools` fetches or builds everything, so that it can be done ahead, in the background.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stormjib_local.errors import ToolMissing
from stormjib_local.processes import tail
from stormjib_local.projects import PUBLISHED, Project, Published, architecture, binaries, project_of

Say = Callable[[str], None]
MODULES = Path(__file__).resolve().parents[2] / "tools"
_CONNECT_SECONDS = 5


class Tools:
    """The cache of binaries, and the ways to fill it."""

    def __init__(
        self,
        cache: Path | None = None,
        modules: Path = MODULES,
        published: Mapping[tuple[str, str], Published] = PUBLISHED,
        say: Say = print,
    ) -> None:
        self.cache = cache or default_cache()
        self.others = [] if cache else _caches_of_caller()
        self.modules = modules
        self.published = published
        self.say = say
        self._unreachable = False

    def find(self, binary: str) -> Path:
        """The path of a binary, however long it takes to get there."""
        project = project_of(binary)
        path = self._place(project) / binary
        for known in (path, *(cache / path.relative_to(self.cache) for cache in self.others)):
            if known.exists():
                return known
        with self._locked(project):
            # Another process may have finished it while we waited for the lock.
            if not path.exists():
                self._obtain(project, binary, path)
        return path

    def _place(self, project: Project) -> Path:
        try:
            return self.cache / f"{project.name}-{project.digest(self.modules)}"
        except FileNotFoundError as error:
            raise ToolMissing(
                f"{error.filename} is missing: the local cluster needs a checkout of the repository, installed with "
                "`make setup`"
            ) from error

    def _obtain(self, project: Project, binary: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            made = Path(folder) / binary
            reason = self._download(binary, made)
            if reason:
                self._build(project, binary, made, reason)
            made.chmod(0o755)
            made.rename(path)

    def _download(self, binary: str, target: Path) -> str:
        """Empty if it worked, else why not."""
        published = self.published.get((binary, architecture()))
        if published is None:
            return "no download with a pinned checksum"
        if self._unreachable:
            return "no internet"
        self.say(f"{binary}: downloading {published.url}")
        try:
            content = fetch(published)
        except urllib.error.HTTPError as error:
            error.close()
            return f"download failed: HTTP {error.code}"
        except OSError as error:
            # One time-out is enough to know it for all.
            self._unreachable = True
            return f"download failed: {getattr(error, 'reason', error)}"
        target.write_bytes(content if not published.url.endswith(".tar.gz") else member(content, binary))
        return ""

    def _build(self, project: Project, binary: str, target: Path, reason: str) -> None:
        go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
        if go is None:
            raise ToolMissing(
                f"{binary}: {reason}, and there is no Go to build it with. Install Go 1.26 or newer (https://go.dev/dl), "
                f"or put the binary at {self._place(project) / binary}"
            )
        hint = f"; {project.hint}" if project.hint else ""
        self.say(f"{binary}: building from Go modules ({reason}{hint})")
        start = time.monotonic()
        done = subprocess.run(
            build_command(go, project, binary, target),
            cwd=self.modules / project.name,
            env=os.environ
            | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly -buildvcs=false"},
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise ToolMissing(
                f"{binary} does not build in {self.modules / project.name}:\n{tail(done.stdout, 20)}"
            )
        self.say(f"{binary}: built in {time.monotonic() - start:.0f} s")

    @contextmanager
    def _locked(self, project: Project) -> Iterator[None]:
        place = self._place(project)
        self.cache.mkdir(parents=True, exist_ok=True)
        with place.with_name(f"{place.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.say(f"{project.name}: another process is getting it ready, waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def build_command(go: str, project: Project, binary: str, target: Path) -> list[str]:
    """The compiler's command line."""
    tags = ["-tags", project.tags] if project.tags else []
    return [
        go,
        "build",
        "-trimpath",
        *tags,
        "-ldflags",
        project.ldflags,
        "-o",
        str(target),
        project.packages[binary],
    ]


def fetch(published: Published) -> bytes:
    """The published file, if it has the checksum that it must have."""
    with urllib.request.urlopen(published.url, timeout=_CONNECT_SECONDS) as answer:
        content: bytes = answer.read()
    kind, _, wanted = published.checksum.partition(":")
    found = hashlib.new(kind, content).hexdigest()
    if found != wanted:
        # Not a reason to build quietly: somebody changed a release, and a person should know.
        raise ToolMissing(f"{published.url} has {kind} {found}, and not {wanted}: refused")
    return content


def member(archive: bytes, binary: str) -> bytes:
    """The file called `binary` in a .tar.gz, wherever it lies in there."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for entry in tar:
            if entry.isfile() and Path(entry.name).name == binary:
                file = tar.extractfile(entry)
                if file is not None:
                    return file.read()
    raise ToolMissing(f"the downloaded archive holds no {binary}")


def default_cache() -> Path:
    """In the home folder, shared by all checkouts."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stormjib" / "tools"


def _caches_of_caller() -> list[Path]:
    """Under sudo, the home folder is root's; what the caller built is as good, but not ours to write to."""
    caller = os.environ.get("SUDO_USER")
    if not caller or os.geteuid() != 0:
        return []
    return [Path(f"~{caller}").expanduser() / ".cache" / "stormjib" / "tools"]


def main() -> int:
    """Fetch or build everything; prints where each binary is."""
    tools = Tools(say=lambda line: print(f"tools: {line}", file=sys.stderr, flush=True))
    try:
        for binary in binaries():
            print(tools.find(binary), flush=True)
    except ToolMissing as error:
        print(f"tools: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
