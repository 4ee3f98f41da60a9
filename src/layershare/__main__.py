"""The command `layershare` and `python -m layershare`, which can be stopped from the first import on."""

import os
import signal
import sys
import time
from threading import Thread
from types import FrameType

CONTINUED = ("run", "compress", "calibrate", "heal")
"""Verbs that go on where they were stopped."""
GRACE = 2.0
"""Seconds to clear up in. Then the process ends, whatever it is in the middle of: a run may be killed anywhere."""

_received: list[int] = []


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with one sentence and exit code 130 or 143."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _stop)
    # Python calls `_stop` only between two of its own instructions, so not within a long operation of torch's.
    signal.set_wakeup_fd(writer)
    Thread(target=_insist, args=(reader,), daemon=True).start()
    try:
        from layershare.cli import main as command_line

        command_line()
    finally:
        if _received:
            _end()


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind, once; what fails on the way because of that is of no interest."""
    if not _received:
        _received.append(number)
        sys.unraisablehook = lambda _: None
        raise SystemExit(128 + number)


def _insist(reader: int) -> None:
    """End the process a while after the first signal, if it is still there."""
    number = os.read(reader, 1)[0]
    time.sleep(GRACE)
    _received[:] = [number]
    _end()


def _end() -> None:
    """Say that the process was stopped, and end it, threads and all."""
    sentence = "Stopped; the same command continues." if sys.argv[1:2] and sys.argv[1] in CONTINUED else "Stopped."
    show_cursor = "\x1b[?25h" if os.isatty(2) else ""  # progress bars hide it
    os.write(2, f"{show_cursor}{sentence}\n".encode())
    os._exit(128 + _received[0])


if __name__ == "__main__":
    main()
