"""The house keeps its own rules: source roots stay plain folders, images import without each other's dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("folder", ["operator", "checkpoint", "health", "trainer_image", "local", "bench"])
def test_a_source_root_is_never_a_package(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py shadows other modules"


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("stormjib_runtime.wire", ["torch", "numpy", "kubernetes", "kopf", "typer"]),
        ("stormjib_runtime.coordinator", ["torch", "numpy", "kubernetes", "kopf", "typer", "pydantic"]),
        ("stormjib_runtime.codec", ["torch", "numpy", "kubernetes", "kopf", "typer"]),
        ("stormjib_checkpoint.child", ["torch", "numpy", "xxhash", "kubernetes", "kopf", "typer", "rich"]),
        ("stormjib_checkpoint.verify", ["torch", "numpy", "kubernetes", "kopf", "typer", "rich"]),
    ],
)
def test_a_part_imports_without_what_its_image_lacks(module: str, without: list[str]) -> None:
    block = "".join(f"sys.modules[{name!r}] = None;" for name in without)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {block} import {module}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr


def test_the_checkpoint_child_runs_on_the_standard_library_alone() -> None:
    """`-S` leaves out site-packages: what a pod of any image has."""
    done = subprocess.run(
        [sys.executable, "-S", "-m", "stormjib_checkpoint.child", "/nonexistent"],
        check=False,
        cwd=ROOT / "checkpoint",
        input='{"id":1,"do":"scan"}\n',
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, '{"id":1,"storage":null}\n', "")


def test_locked_requirements_hold_hashes_and_no_address() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "--hash=sha256:" in text
        assert not re.search(r"https?://|--index-url|--find-links", text), f"{path.name} names a registry"
