"""Every operation of the file system below a checkpoint's root goes through `Files`: shown once by a trace of all system calls.

On this the tests rest that fail, stop or forget single operations.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

import pytest

from fakes.agents import SCRIPTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(300)

STRACE = shutil.which("strace")
MARK = re.compile(r'"/stormjib-port/([a-z_/]+)"')
SYSTEM_CALLS = {
    "sync": "fsync",
    "link": "link(at)?",
    "rename": "rename(at2?)?",
    "forget": "fadvise64(_64)?",
    "unlink": "unlink(at)?",
    "rmdir": "rmdir|unlinkat",
    "reserve": "fallocate",
    "truncate": "ftruncate",
    "write_at": "pwrite64",
    "read_into": "preadv2?",
    "open_new": "openat",
    "open_new_direct": "openat",
    "open_to_read": "openat",
}
"""Calls of the port, and the system call that each makes for it at least once; its name differs between processors."""


class Seen(NamedTuple):
    """A system call below the root, and the call of the port within which it came; empty where there was none."""

    name: str
    within: str
    line: str


def traced(folder: Path, root: Path) -> list[Path]:
    """Run the script; what each of its threads asked of the kernel, by thread."""
    assert STRACE is not None
    command = [STRACE, "-ff", "-y", "-qq", "-e", "trace=%file,%desc", "-o", str(folder / "trace")]
    script = [sys.executable, "-u", str(SCRIPTS / "ported.py"), str(root)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SCRIPTS.parents[1]), *sys.path])}
    done = subprocess.run(
        [*command, *script], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return sorted(folder.glob("trace.*"))


def below(root: Path, lines: Iterator[str]) -> Iterator[Seen]:
    """What one thread did below the root, or to the root itself."""
    within = ""
    for line in lines:
        name = line.partition("(")[0]
        found = MARK.search(line)
        if found is not None:
            within = found[1].removeprefix("enter/").replace("leave", "")
        elif str(root) in line and name != "execve":
            yield Seen(name, within, line)


@pytest.mark.skipif(
    STRACE is None, reason="strace is not installed; `make setup` installs it on Debian and Ubuntu"
)
def test_nothing_goes_past_the_port(tmp_path: Path) -> None:
    may_trace = subprocess.run([str(STRACE), "-o", "/dev/null", "true"], capture_output=True, check=False)
    if may_trace.returncode != 0:
        pytest.skip(f"this machine lets nobody trace: {may_trace.stderr.decode()}")
    root = tmp_path / "team" / "job"
    seen: list[Seen] = []
    calls: Counter[str] = Counter()
    for path in traced(tmp_path, root):
        lines = path.read_text(errors="replace").splitlines()
        calls.update(word[1] for line in lines if (word := re.search(r'"/stormjib-port/enter/(\w+)"', line)))
        seen += below(root, iter(lines))
    assert [one.line for one in seen if not one.within] == []
    assert "getdents64" in [one.name for one in seen if one.within == "past"], "what goes past is seen"
    for call, name in SYSTEM_CALLS.items():
        asked = [one for one in seen if one.within == call and re.fullmatch(name, one.name)]
        assert len(asked) >= calls[call] > 0, call
