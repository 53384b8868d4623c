"""Progress: a bar on a terminal, plain lines elsewhere, nothing for what is quick."""

import io

import pytest
from rich.console import Console

from quire import progress


class Time:
    """A clock that the test turns."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    turned = Time()
    monkeypatch.setattr(progress, "time", turned)
    return turned


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 100 columns is sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=100, highlight=False)
    monkeypatch.setattr(progress, "console", lambda: console)
    return sent


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> None:
    """No terminal."""
    console = Console(file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(progress, "console", lambda: console)


def work(time: Time, seconds: int, begin: float = 0.0) -> None:
    """So many seconds of work, told of once a second."""
    with progress.bar("owl") as show:
        for second in range(seconds + 1):
            show(begin + (1 - begin) * second / seconds, step=second * 10, held_out="1.5")
            time.now += 1


def test_lines_where_there_is_no_terminal(time: Time, piped: None, capsys: pytest.CaptureFixture[str]) -> None:
    work(time, 40)
    assert capsys.readouterr().err.splitlines() == [
        "owl  25%  step 100, held out 1.5, 0:30 left",
        "owl  50%  step 200, held out 1.5, 0:20 left",
        "owl  75%  step 300, held out 1.5, 0:10 left",
        "owl 100%  step 400, held out 1.5, 0:00 left",
    ]


def test_few_lines_for_what_is_quick(time: Time, piped: None, capsys: pytest.CaptureFixture[str]) -> None:
    work(time, 9)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(time: Time, terminal: io.StringIO) -> None:
    work(time, 8)
    shown = terminal.getvalue()
    assert "owl" in shown and "━" in shown and "step 80, held out 1.5, 0:00 left" in shown


def test_a_narrow_terminal_gets_one_line(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=40, highlight=False)
    monkeypatch.setattr(progress, "console", lambda: console)
    work(time, 8)
    assert "owl" in sent.getvalue()
    assert sent.getvalue().count("\x1b[1A") <= 1, "to redraw several lines it would go up each time"


def test_no_bar_under_two_seconds(time: Time, terminal: io.StringIO) -> None:
    with progress.bar("owl") as show:
        for share in (0, 0.5, 1):
            show(share, step=1)
            time.now += 0.9
    assert terminal.getvalue() == ""


def test_the_time_left_of_a_resumed_run_counts_from_where_it_resumed(
    time: Time, piped: None, capsys: pytest.CaptureFixture[str]
) -> None:
    work(time, 20, begin=0.8)
    assert "0:10 left" in capsys.readouterr().err.splitlines()[0]


def test_the_bar_is_taken_down_when_work_fails(time: Time, terminal: io.StringIO) -> None:
    with pytest.raises(ZeroDivisionError), progress.bar("owl") as show:
        for second in range(5):
            show(second / 10)
            time.now += 1
        raise ZeroDivisionError
    assert terminal.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()  # the cursor is back


@pytest.mark.parametrize(
    "seconds, shown", [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")]
)
def test_clock(seconds: float, shown: str) -> None:
    assert progress.clock(seconds) == shown


def test_say_shows_brackets_as_they_are_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    progress.console.cache_clear()
    long = "a sentence with [bold]brackets[/bold] and a path /a/b " * 10
    progress.say(long, "bold")
    assert capsys.readouterr().err == long + "\n"
    progress.console.cache_clear()
