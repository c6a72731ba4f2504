"""Signals that ask a command to leave: it saves first, and its exit status is 128 + the signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["Signals", "Stopped"]

ASKING = ("SIGTERM", "SIGINT", "SIGHUP")  # a system may lack the last


class Stopped(KeyboardInterrupt):
    """A signal has asked the command to leave.

    number: of the signal.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(message)
        self.number = number


class Signals:
    """Whether a signal has asked this process to leave.

    While :meth:`heeded`, the signals raise :class:`Stopped` at once; within :meth:`waiting` they are only noted, until
    :meth:`leave_if_asked`. A second SIGINT raises at once anywhere.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._waits = False

    def _come(self, number: int, frame: FrameType | None) -> None:
        again = self.asked is not None and number == signal.SIGINT
        self.asked = number
        if again or not self._waits:
            raise Stopped(number)

    def leave_if_asked(self) -> None:
        """Raise :class:`Stopped` if a signal has come."""
        if self.asked is not None:
            raise Stopped(self.asked)

    @contextmanager
    def heeded(self) -> Iterator[Signals]:
        """The signals come here; afterwards the handlers are those from before.

        A signal that the process ignores, as under nohup or in the background of a script, stays ignored. Handlers
        belong to the main thread: elsewhere nothing is changed.
        """
        before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in ASKING if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler is not None and handler is not signal.SIG_IGN:  # None: not one of Python's
                    before[number] = signal.signal(number, self._come)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Note signals; one that has not been acted on by the end of the block is acted on there."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        self.leave_if_asked()
