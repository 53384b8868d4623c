"""Words and bars for the person at the terminal: a bar on a terminal, plain lines elsewhere, all on standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from quire import processes

Update = Callable[..., None]  # update(share done, 0 to 1, **figures to show)

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
QUIET_SECONDS = 2.0  # what is done sooner shows nothing


@cache
def console() -> Any:
    """The rich console on standard error: colours on a terminal only."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str, style: str = "") -> None:
    """One sentence to the person, as it is (no markup); of several processes one speaks."""
    if processes.leads():
        console().print(text, style=style or None, markup=False)


@contextmanager
def bar(label: str) -> Iterator[Update]:
    """A progress bar for a long piece of work; figures are shown behind it as NAME VALUE, with the time left."""
    if not processes.leads():
        yield lambda share, **figures: None
        return
    draw = _Bar(label) if console().is_terminal else _Lines(label)
    try:
        yield draw.update
    finally:
        draw.close()


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class _Lines:
    """A line every few seconds."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.began = self.shown = time.monotonic()
        self.start: float | None = None  # share done when first told: a resumed run does not begin at 0

    def text(self, share: float, figures: dict[str, Any]) -> str:
        now = time.monotonic()
        if self.start is None or share < self.start:
            self.start, self.began = share, now
        parts = [f"{name.replace('_', ' ')} {value}" for name, value in figures.items()]
        if share > self.start:
            parts.append(f"{clock((now - self.began) * (1 - share) / (share - self.start))} left")
        return ", ".join(parts)

    def update(self, share: float, **figures: Any) -> None:
        text = self.text(share, figures)
        if time.monotonic() - self.shown >= PLAIN_SECONDS:
            self.shown = time.monotonic()
            print(f"{self.label} {share:4.0%}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to take down."""


class _Bar(_Lines):
    """A bar that appears once the work has lasted longer than a moment."""

    def __init__(self, label: str) -> None:
        super().__init__(label)
        self.bar: Any = None

    def update(self, share: float, **figures: Any) -> None:
        text = self.text(share, figures)
        if self.bar is None and time.monotonic() - self.began >= QUIET_SECONDS:
            from rich.progress import BarColumn, Progress, TextColumn

            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TextColumn("{task.fields[text]}"),
            ]
            self.bar = Progress(*columns, console=console(), transient=True)
            self.task = self.bar.add_task(self.label, total=1.0, text=text)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.task, completed=share, text=text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
