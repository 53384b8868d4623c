"""What a user can put right, told apart from what we got wrong."""


class UserError(ValueError):
    """A mistake the user can mend: its message is one or two plain sentences naming the thing and the remedy.

    The command line prints the message and exits with code 2, without a traceback. Our own mistakes are
    assertions and whatever Python raises; they keep their traceback and exit with code 1.
    """


def nearest(word: str, words: list[str]) -> str:
    """' Did you mean WORD?' for the closest of `words`, or '' where none is close."""
    import difflib

    match = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f" Did you mean {match[0]}?" if match else ""


def choose(what: str, name: str, table: list[str]) -> str:
    """`name` if it is in `table`, else a UserError that lists the choices and names the nearest."""
    if name not in table:
        raise UserError(f"{what} {name!r} is not known.{nearest(name, table)} Choices: {', '.join(table)}.")
    return name
