"""Long benchmarks in pieces: ``--minutes``, and going on with the same command."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType

from bilevel_at.errors import positive

NOT_DONE = 3
"""The exit status where time was up: ``while COMMAND; [ $? -eq 3 ]; do :; done`` repeats until it is done."""

ONCE_MORE = 20.0  # seconds; an interruption in the middle of a destructor is swallowed, so it comes again


def in_pieces(work: Callable[[], None], minutes: float | None) -> int:
    """Do the work, and stop it after so many minutes as Ctrl-C does.

    The work must keep what it has done as it goes: it is interrupted wherever it is, and may as well be killed.

    Args:
        work: goes on where it was stopped.
        minutes: of this piece; None for no limit.

    Returns:
        The exit status: 0 where the work came to its end, :data:`NOT_DONE` where time was up.

    Raises:
        InputError: if ``minutes`` is not positive.
    """
    if minutes is None:
        work()
        return 0
    positive("--minutes", minutes)
    up = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal up
        up = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60 * minutes, ONCE_MORE)
    try:
        work()
    except KeyboardInterrupt:
        if not up:
            raise
        signal.setitimer(signal.ITIMER_REAL, 0)
        print("not done: give the same command again", flush=True)
        return NOT_DONE
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return 0
