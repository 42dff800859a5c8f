"""`python3 -m stormjib_runtime.install DEST`: put runtime, health and checkpoint child where a pod of any image finds them.

An init container of our image runs it, on an emptyDir that the trainer's container mounts as well. The child goes into a folder
of its own, because the other two promise to need the standard library and torch only, and the child does not import
them. They are compiled here: the trainer's container may not write there, and compiling again in every rank costs more
than forking it. A Python of another version finds no bytecode with its tag, and compiles as ever.
"""

from __future__ import annotations

import compileall
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGES = {
    "stormjib_runtime": "runtime",
    "stormjib_health": "runtime",
    "stormjib_fault": "runtime",
    "stormjib_checkpoint": "checkpoint",
}
"""Package -> its folder below DEST."""


def install(destination: Path) -> None:
    """Copy each package into its folder below `destination`. Running it again replaces what is there."""
    for package, folder in PACKAGES.items():
        target = destination / folder / package
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(_source(package), target, ignore=shutil.ignore_patterns("__pycache__", "py.typed"))
        compileall.compile_dir(target, quiet=1)


def _source(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"stormjib_runtime.install: this image lacks {package}; install stormjib in it")
    return Path(spec.origin).parent


def main() -> None:
    """Entry point of the module."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python3 -m stormjib_runtime.install DEST")
    install(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
