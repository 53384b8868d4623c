"""Ctrl-C and SIGTERM: noted, so that the loop can save and leave between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from quire import processes


class Stopped(Exception):
    """Training was stopped by a signal after saving; `exit_code` is 130 for Ctrl-C and 143 for SIGTERM."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class Signals:
    """While entered, `received` is the first signal that came (else 0); a second Ctrl-C interrupts at once.

    Under torchrun nothing more than the first is heeded: what reaches a process there reaches torchrun too, which then
    sends it again. Nor is any heeded after an error: torchrun asks all to end when one has, and this one does.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT and not processes.launched():
            raise KeyboardInterrupt
        self.received = self.received or number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if error is not None and processes.launched() else handler)
