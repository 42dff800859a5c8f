"""Compiles the kernel of the checkpoint library where the package is built or installed; without a compiler its slow twin does the work.

Called by hatchling. The kernel knows nothing of Python, so one wheel fits every Python of a kind of machine.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "stormjib_checkpoint/digest"
FLAGS = ("-O3", "-std=c11", "-shared", "-fPIC")


class KernelHook(BuildHookInterface[Any]):
    """An editable install finds the library beside its source, a wheel carries it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build it. A wheel without it is one for all machines."""
        source = Path(self.root, "checkpoint", FOLDER, "kernel.c")
        library = source.with_suffix(".so")
        if not self._compiled(source, library) or version == "editable":
            return
        build_data["force_include"][str(library)] = f"{FOLDER}/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _compiled(self, source: Path, library: Path) -> bool:
        # Under another name first: a running process may have the old one mapped.
        fresh = library.with_name(f".{library.name}")
        command = [*shlex.split(os.environ.get("CC", "cc")), *FLAGS, "-o", str(fresh), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            why = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
            self.app.display_warning(f"{shlex.join(command)} failed, so digests of tensors are slow: {why}")
            library.unlink(missing_ok=True)  # one of another source would be worse than none
            return False
        fresh.replace(library)
        return True
