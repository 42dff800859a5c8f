"""Hosts the TCPStore of one generation: `python -m stormjib_runtime.store` prints its port and serves until killed.

Outside every rank, because the store must outlive the rank that fails; on a port of the kernel's choice, because two
generations may be alive at once. It holds nothing that cannot be rebuilt.
"""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Serve one store on every address of this host, and say where on the first line of stdout."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    sys.stdout.write(f"{store.port}\n")
    sys.stdout.flush()
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
