"""The house keeps its own rules: source roots stay plain folders, images import without each other's dependencies."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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


PARTS = (
    "stormjib_checkpoint.engine",
    "stormjib_checkpoint.dcp",
    "stormjib_checkpoint.torchtitan",
    "stormjib_checkpoint.commands",
)


def test_the_checkpoint_library_works_with_what_its_extra_installs() -> None:
    """All that `pip install stormjib[checkpoint]` does not ask for is hidden, our other packages too; then a step is saved and loaded."""
    found = packages_distributions()
    wanted = installed_by("stormjib[checkpoint]")
    hidden = [
        name
        for name, owners in found.items()
        if not wanted & {canonical(owner) for owner in owners} and name.isidentifier()
    ]
    ours = ["operator", "health", "runtime", "trainer", "fault", "local"]
    hidden += [f"stormjib_{name}" for name in ours]
    assert {"kopf", "kubernetes", "safetensors", "prometheus_client", "stormjib_runtime"} <= set(hidden)
    script = f"""
import sys, tempfile
sys.modules.update(dict.fromkeys({hidden!r}))
import {", ".join(PARTS)}
import torch
from stormjib_checkpoint.engine import Engine
with tempfile.TemporaryDirectory() as root:
    for number in range(2):
        engine, state = Engine(root), {{"w": torch.full((3,), 1.0 - number)}}
        engine.load(state)
        engine.async_save(state, step=number)
        engine.close()
    assert state["w"].tolist() == [1, 1, 1]
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 0, done.stderr


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed_by(asked: str, seen: set[str] | None = None) -> set[str]:
    """Names of all distributions that a requirement brings, by what is installed here."""
    seen = set() if seen is None else seen
    requirement = Requirement(asked)
    key = f"{canonical(requirement.name)}[{','.join(sorted(requirement.extras))}]"
    if key in seen:
        return seen
    seen |= {key, canonical(requirement.name)}
    try:
        needs = requires(requirement.name) or []
    except PackageNotFoundError:  # of another platform
        return seen
    for text in needs:
        need = Requirement(text)
        extras = requirement.extras or {""}
        if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
            installed_by(text.partition(";")[0], seen)
    return seen


def test_locked_requirements_hold_hashes_and_no_address() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "--hash=sha256:" in text
        assert not re.search(r"https?://|--index-url|--find-links", text), f"{path.name} names a registry"
