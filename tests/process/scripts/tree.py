"""A rank with a family: a forked worker, a spawned one, a daemon in a session of its own, a file on /dev/shm."""

import multiprocessing
import os
import signal
import sys
import time


def work(name: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # One write: `print` makes four where PYTHONUNBUFFERED is set, and the family shares one pipe.
    os.write(1, f"{name} {os.getpid()}\n".encode())
    time.sleep(600)


def daemon() -> None:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            work("daemon")
        os._exit(0)


if __name__ == "__main__":
    with open(f"/dev/shm/torch_{os.getpid()}_7", "w") as left:
        left.write("left behind")
    multiprocessing.get_context("fork").Process(target=work, args=("fork",), daemon=True).start()
    multiprocessing.get_context("spawn").Process(target=work, args=("spawn",), daemon=True).start()
    daemon()
    work(f"rank {sys.argv[1:]}")
