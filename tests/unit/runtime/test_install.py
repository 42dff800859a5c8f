"""What the init container copies runs on the standard library alone, in a Python that knows nothing of ours."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from stormjib_runtime.install import install

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("folder", "module"),
    [
        ("runtime", "stormjib_runtime.agent"),
        ("runtime", "stormjib_runtime.coordinator"),
        ("checkpoint", "stormjib_checkpoint.child"),
    ],
)
def test_installed_modules_need_the_standard_library_only(tmp_path: Path, folder: str, module: str) -> None:
    install(tmp_path)
    install(tmp_path)  # an init container may run twice
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path / folder)!r}); import {module}",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
