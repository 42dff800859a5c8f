"""Prints all that a script can see of how it was started."""

import os
import signal
import sys
import threading

print("hello without a newline at once", end="")
print()
main = sys.modules["__main__"]
print(__name__, __file__, __package__, main.__spec__, type(main.__loader__).__name__, __doc__)
print(main.__dict__ is globals(), sorted(globals()))
print(sys.argv, sys.path[0], len(sys.path), os.getcwd())
print([word for word in sys.orig_argv[1:] if word != "-u"], sys.flags, sys.warnoptions)
print(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD))
print(signal.getsignal(signal.SIGPIPE), signal.pthread_sigmask(signal.SIG_BLOCK, []))
with open("/proc/self/status") as status:
    print([line for line in status if line.startswith(("SigBlk", "SigIgn", "SigCgt"))])
print(threading.active_count(), threading.current_thread().name, sorted(os.listdir("/proc/self/fd"), key=int))
print(sys.stdin.read() == "", sys.stdout.encoding, sys.stderr.encoding, sys.excepthook is sys.__excepthook__)
print("to stderr", file=sys.stderr)
