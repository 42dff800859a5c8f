"""The program of a pod's sandbox: it holds the pod's namespaces and does nothing.

Too small for a compiler, which a machine may lack. It ignores SIGCHLD, so the kernel itself reaps what a pod with a
shared process namespace leaves behind, and then waits for ever:

    rt_sigaction(SIGCHLD, {SIG_IGN}, NULL, 8); for (;;) pause();
"""

from __future__ import annotations

import struct

from stormjib_local.errors import BadRequest

_BASE = 0x400000
_HEADERS = 64 + 56
# struct sigaction of the kernel: handler = SIG_IGN, then flags, restorer and mask, all zero.
_ACTION = struct.pack("<4Q", 1, 0, 0, 0)

_AMD64 = bytes.fromhex(
    "b80d000000"  # mov eax, 13 (rt_sigaction)
    "bf11000000"  # mov edi, 17 (SIGCHLD)
    "488d3513000000"  # lea rsi, [rip + 19] (the action, behind the code)
    "31d2"  # xor edx, edx
    "41ba08000000"  # mov r10d, 8
    "0f05"  # syscall
    "b822000000"  # again: mov eax, 34 (pause)
    "0f05"  # syscall
    "ebf7"  # jmp again
)
_ARM64 = struct.pack(
    "<13I",
    0xD28010C8,  # mov x8, 134 (rt_sigaction)
    0xD2800220,  # mov x0, 17 (SIGCHLD)
    0x10000161,  # adr x1, . + 44 (the action, behind the code)
    0xD2800002,  # mov x2, 0
    0xD2800103,  # mov x3, 8
    0xD4000001,  # svc 0
    0xD2800928,  # again: mov x8, 73 (ppoll)
    0xD2800000,  # mov x0, 0
    0xD2800001,  # mov x1, 0
    0xD2800002,  # mov x2, 0
    0xD2800003,  # mov x3, 0
    0xD4000001,  # svc 0
    0x17FFFFFA,  # b again
)
_CODE = {"amd64": (62, _AMD64), "arm64": (183, _ARM64)}


def program(architecture: str) -> bytes:
    """A static executable for the processor (Go's word for it)."""
    if architecture not in _CODE:
        raise BadRequest(f"the local cluster runs on {' and '.join(_CODE)}, not on {architecture}")
    machine, code = _CODE[architecture]
    size = _HEADERS + len(code) + len(_ACTION)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", identity, 2, machine, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )
    # One segment, readable and executable: the whole file.
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code + _ACTION
