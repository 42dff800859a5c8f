"""A rank without torch: a ring of TCP connections, and obedience to the fault laboratory. Quick to start."""

import ctypes
import os
import socket
import struct
import sys
import time
from pathlib import Path

from stormjib_fault.rank import Obedient

folder, rank, own, following = Path(sys.argv[1]), int(os.environ["RANK"]), sys.argv[2], sys.argv[3]
PORT, SIZE, STEP_S = 5000, 32 << 10, 0.02
listener = socket.create_server((own, PORT))
while True:
    try:
        right = socket.create_connection((following, PORT), 5)
        break
    except ConnectionRefusedError:
        time.sleep(0.01)  # it is not up yet, and nobody can tell
left, _ = listener.accept()
right.settimeout(None)
memory = (ctypes.c_float * 4096)()
trace = open(folder / f"trace-{os.getpid()}", "wb", buffering=0)  # noqa: SIM115  open as long as the rank lives
faults = Obedient(folder, rank)
number = 0
while True:
    number += 1
    began = time.monotonic()
    faults.step(number)
    end = time.monotonic() + STEP_S
    while time.monotonic() < end:
        time.sleep(0.002)
    for name in ("parameter", "gradient"):
        faults.change(name, ctypes.addressof(memory), ctypes.sizeof(memory))
    worked = time.monotonic() - began
    faults.before(0)
    inside = faults.stops_inside()
    right.sendall(bytes(SIZE))
    if inside:
        faults.after(0)
    left_over = SIZE
    while left_over:
        data = left.recv(left_over)
        if not data:
            raise ConnectionError("the rank before is gone")
        left_over -= len(data)
    trace.write(struct.pack("<dff", time.monotonic(), time.monotonic() - began, worked))
    (folder / f"step-{rank}").write_text(str(number))
