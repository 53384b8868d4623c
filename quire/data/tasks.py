"""Tasks of pairs that need no download, and whose answers can be checked. To add one: a function, and a line in TASKS.

A task draws pairs from its own seeded generator and keeps one for each key: by the key a pair that is held out differs
from every pair that is trained on, in more than its spelling where that would give the answer away.
"""

import random
import string
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import date, timedelta

Draw = Callable[[random.Random], tuple[str, str, Hashable]]  # source, target, key

SEED = 1337
LONGEST = 10  # symbols
DIGITS = 3  # of the numbers: to 999
FIRST_DAY, DAYS = date(1900, 1, 1), 73_049  # up to 2099
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """How pairs are drawn, and how many."""

    draw: Draw
    count: int

    def pairs(self) -> list[tuple[str, str]]:
        """The same pairs at every call, no two with one key, shuffled; the last tenth of them is held out."""
        generator, found = random.Random(SEED), dict[Hashable, tuple[str, str]]()
        while len(found) < self.count:
            source, target, key = self.draw(generator)
            found.setdefault(key, (source, target))
        pairs = list(found.values())
        generator.shuffle(pairs)  # the rare ones, of which there are few, came first
        return pairs


def _symbols(generator: random.Random) -> str:
    return "".join(generator.choices(string.ascii_lowercase, k=generator.randint(1, LONGEST)))


def copy(generator: random.Random) -> tuple[str, str, Hashable]:
    """1 to 10 letters, and the same again."""
    source = _symbols(generator)
    return source, source, source


def reverse(generator: random.Random) -> tuple[str, str, Hashable]:
    """1 to 10 letters, and the same from the last to the first."""
    source = _symbols(generator)
    return source, source[::-1], source


def sort(generator: random.Random) -> tuple[str, str, Hashable]:
    """1 to 10 letters, and the same in the alphabet's order. Two orders of the same letters are one key."""
    source = _symbols(generator)
    target = "".join(sorted(source))
    return source, target, target


def _number(generator: random.Random) -> int:
    """A number to 999, of one to three digits equally often: else nine of ten would have three."""
    return generator.randint(0, int("9" * generator.randint(1, DIGITS)))


def addition(generator: random.Random) -> tuple[str, str, Hashable]:
    """Two numbers to 999, and their sum. 3+5 and 5+3 are one key."""
    a, b = _number(generator), _number(generator)
    return f"{a}+{b}", f"{a + b}", (min(a, b), max(a, b))


def subtraction(generator: random.Random) -> tuple[str, str, Hashable]:
    """Two numbers to 999, the larger first, and their difference."""
    small, large = sorted((_number(generator), _number(generator)))
    return f"{large}-{small}", f"{large - small}", (small, large)


def dates(generator: random.Random) -> tuple[str, str, Hashable]:
    """A day from 1900 to 2099 in one of five spellings, and as ISO 8601 has it. Spellings of a day are one key."""
    day = FIRST_DAY + timedelta(days=generator.randrange(DAYS))
    month, year = MONTHS[day.month - 1], day.year
    source = generator.choice([
        f"{month} {day.day}, {year}",
        f"{day.day} {month} {year}",
        f"{day.day} {month[:3]} {year}",
        f"{day.month}/{day.day}/{year}",
        f"{day.day:02}.{day.month:02}.{year}",
    ])  # fmt: skip
    return source, day.isoformat(), day


TASKS: dict[str, Task] = {
    "copy": Task(copy, 20_000),
    "reverse": Task(reverse, 40_000),
    "sort": Task(sort, 40_000),
    "addition": Task(addition, 100_000),
    "subtraction": Task(subtraction, 100_000),
    "dates": Task(dates, 40_000),
}
