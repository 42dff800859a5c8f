"""A rank runs as under `python script.py`: each command is run by python itself and in a fork, and must not differ."""

from __future__ import annotations

import json
import shutil
import zipfile
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from fakes.agents import SCRIPTS
from fakes.warm import Warm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def warm(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Warm]:
    async with Warm(tmp_path_factory.mktemp("warm")) as one:
        yield one


@pytest.mark.parametrize(
    "how",
    [
        "return",
        "text",
        "none",
        "number",
        "error",
        "interrupt",
        "hook",
        "atexit",
        "at_once",
        "signal",
        "group",
        "broken_hook",
    ],
)
async def test_a_fork_ends_as_python_does(warm: Warm, how: str) -> None:
    ours = await warm.fork(str(SCRIPTS / "ends.py"), how)
    theirs = await warm.python(str(SCRIPTS / "ends.py"), how)
    assert ours == theirs


async def test_what_a_script_leaves_open_is_finalised_at_its_end(warm: Warm, tmp_path: Path) -> None:
    ours = await warm.fork(str(SCRIPTS / "leaves.py"), str(tmp_path / "ours"))
    assert ours == await warm.python(str(SCRIPTS / "leaves.py"), str(tmp_path / "theirs"))
    assert ours.err == "finalised a global\n"
    assert (tmp_path / "ours").read_text() == "written at exit"


async def test_a_script_sees_what_it_sees_under_python(warm: Warm) -> None:
    ours = await warm.fork(str(SCRIPTS / "facts.py"), "--flag", "a b")
    theirs = await warm.python(str(SCRIPTS / "facts.py"), "--flag", "a b")
    assert ours == theirs
    assert "hello" in ours.out


async def test_a_link_to_a_script_puts_the_real_folder_first(warm: Warm, tmp_path: Path) -> None:
    link = tmp_path / "link.py"
    link.symlink_to(SCRIPTS / "facts.py")
    assert await warm.fork(str(link)) == await warm.python(str(link))


async def test_a_folder_and_an_archive_run(warm: Warm, tmp_path: Path) -> None:
    folder, archive = tmp_path / "folder", tmp_path / "archive.zip"
    folder.mkdir()
    shutil.copy(SCRIPTS / "facts.py", folder / "__main__.py")
    with zipfile.ZipFile(archive, "w") as file:
        file.write(SCRIPTS / "facts.py", "__main__.py")
    for path in (folder, archive):
        ours, theirs = await warm.fork(str(path), "x"), await warm.python(str(path), "x")
        assert ours == theirs


@pytest.mark.parametrize("words", [["-m", "package"], ["-m", "package", "fail"], ["-m", "package.missing"]])
async def test_a_module_runs(warm: Warm, words: list[str]) -> None:
    ours, theirs = await warm.fork(*words), await warm.python(*words)
    assert ours == theirs


async def test_what_cannot_be_run_is_said_as_python_says_it(warm: Warm, tmp_path: Path) -> None:
    shutil.copy(SCRIPTS / "broken.txt", tmp_path / "broken.py")
    for path in (tmp_path / "broken.py", tmp_path / "missing.py", tmp_path):
        ours, theirs = await warm.fork(str(path)), await warm.python(str(path))
        assert ours == theirs
        assert ours.exit != 0


@pytest.mark.parametrize("method", ["fork", "spawn"])
async def test_workers_of_a_data_loader_run(warm: Warm, method: str) -> None:
    done = await warm.fork(str(SCRIPTS / "loaders.py"), method)
    assert (done.exit, done.out) == (0, f"{method} [[0, 1, 4, 9], [16, 25, 36, 49]]\n"), done.err


async def test_forks_share_no_randomness_and_obey_their_thread_number(warm: Warm) -> None:
    path = str(SCRIPTS / "seeds.py")
    one = json.loads((await warm.fork(path)).out)
    two = json.loads((await warm.fork(path, OMP_NUM_THREADS="3,1")).out)
    assert [name for name in ("random", "numpy", "key", "name", "uuid") if one[name] == two[name]] == []
    assert one["torch"] == two["torch"]  # torch's own seed is a constant, in every process
    assert (one["threads"], two["threads"]) == (1, 3)
    assert one["session"]
    assert one["token"] is None
