"""The kernel is compiled where the package is installed, and a machine without a compiler still gets a package."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from hatchling.bridge.app import Application

from stormjib_checkpoint.digest import native

ROOT = Path(__file__).parents[3]
HOOK = ROOT / "tools" / "build_kernel.py"


def built(root: Path, version: str) -> dict[str, Any]:
    """What the hook says of a build of the package in `root`."""
    spec = importlib.util.spec_from_file_location("build_kernel", HOOK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    data: dict[str, Any] = {"force_include": {}, "pure_python": True}
    module.KernelHook(str(root), {}, None, None, "", "wheel", Application()).initialize(version, data)
    return data


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of the kernel's source, where a checkout would have it."""
    copy = tmp_path / "checkpoint/stormjib_checkpoint/digest/kernel.c"
    copy.parent.mkdir(parents=True)
    shutil.copy(native.LIBRARY.with_name("kernel.c"), copy)
    return copy


def test_a_wheel_carries_the_kernel_and_is_for_one_kind_of_machine(tmp_path: Path, source: Path) -> None:
    data = built(tmp_path, "standard")
    library = source.with_suffix(".so")
    assert data["force_include"] == {str(library): "stormjib_checkpoint/digest/kernel.so"}
    assert data["tag"].startswith("py3-none-linux_")
    assert not data["pure_python"]
    native.compiled(library)  # loads
    assert sorted(path.name for path in source.parent.iterdir()) == ["kernel.c", "kernel.so"]


def test_an_editable_install_has_it_beside_its_source(tmp_path: Path, source: Path) -> None:
    assert built(tmp_path, "editable") == {"force_include": {}, "pure_python": True}
    native.compiled(source.with_suffix(".so"))  # loads


@pytest.mark.parametrize("why", ["no compiler", "an error"])
def test_without_it_the_wheel_is_for_all_machines_and_an_old_one_is_not_left(
    tmp_path: Path,
    source: Path,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source.with_suffix(".so").write_bytes(b"old")
    if why == "no compiler":
        monkeypatch.setenv("CC", str(tmp_path / "cc"))
    else:
        source.write_text("int main(")
    assert built(tmp_path, "standard") == {"force_include": {}, "pure_python": True}
    assert not source.with_suffix(".so").exists()
    assert "digests of tensors are slow" in "".join(capsys.readouterr())
