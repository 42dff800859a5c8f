"""Ends in the way that its argument names."""

import atexit
import os
import sys
import threading
import time


def late() -> None:
    time.sleep(0.05)
    print("a thread ended")


def fail() -> None:
    try:
        os.environ["STORMJIB_NO_SUCH_NAME"]
    except KeyError as error:
        raise ValueError("a message of two\nlines") from error


atexit.register(print, "at exit")
how = sys.argv[1]
if how == "return":
    threading.Thread(target=late).start()
elif how == "text":
    sys.exit("text as exit code")
elif how == "none":
    raise SystemExit(None)
elif how == "number":
    sys.exit(7)
elif how == "error":
    fail()
elif how == "interrupt":
    raise KeyboardInterrupt
elif how == "hook":
    sys.excepthook = lambda kind, error, trace: print("hook:", kind.__name__, error, trace is None)
    fail()
elif how == "broken_hook":
    sys.excepthook = lambda kind, error, trace: 1 // 0
    fail()
elif how == "atexit":
    atexit.register(fail)
elif how == "at_once":
    print("a whole line, not flushed")
    os._exit(5)
elif how == "signal":
    os.kill(os.getpid(), 9)
elif how == "group":
    raise ExceptionGroup("several", [ValueError("one"), TypeError("two")])
