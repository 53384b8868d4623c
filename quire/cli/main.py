"""`quire COMMAND ...`: finds the command, and turns mistakes into sentences and exit codes."""

import time

BEGAN = time.time()  # before anything slow is imported: --minutes counts from here

import errno  # noqa: E402
import io  # noqa: E402
import sys  # noqa: E402
from importlib import import_module  # noqa: E402

from quire import processes  # noqa: E402

COMMANDS = {
    "train": "train a model on text: quire train book.txt --minutes 5",
    "resume": "continue a run exactly where it stopped, or train a finished one further",
    "finetune": "train a run's model on other text, in a new run: quire finetune RUN TEXT --minutes 2",
    "prepare": "write a text's tokens into a folder or to an address: quire prepare TEXT --out s3://bucket/book",
    "plan": "what a training would take and give, before any of it is spent: quire plan book.txt --minutes 5",
    "generate": "let a run's model write",
    "evaluate": "measure a run's model on its held-out text, or on another",
    "plot": "draw the loss curves of runs into a PNG",
    "attention": "draw what each head attends to, as pictures and a page: quire attention RUN --prompt TEXT",
    "look": "a model's parts, the norms of its weights and gradients, a token's neighbours",
    "gradients": "step through a forward and backward pass, each layer's gradient checked",
    "import": "make a run of another program's model: quire import FILE, or smollm2-135m-instruct",
    "export": "write a run's model for another program: quire export RUN --to gguf --out FILE",
    "tokenizer": "train a tokenizer, encode and decode with one, compare several on a text",
    "runs": "list the runs below a folder",
    "models": "list the kinds of model and their presets: parameters, memory, arithmetic",
    "corpora": "list the texts known by name",
    "doctor": "what this machine has, and what is missing",
}
TOGETHER = ("train", "resume", "finetune", "doctor")  # what several processes, started by torchrun, do together

HELP = f"""Quire trains a language model of your own on text of your own, on the machine you have.

usage: quire COMMAND ...

{chr(10).join(f"  {name:11}{text}" for name, text in COMMANDS.items())}

`quire COMMAND --help` tells more. A first model: quire train (on Shakespeare), or quire train YOUR.txt
"""


def main() -> None:
    """Run the command in sys.argv, its output in UTF-8 wherever it goes.

    Exit codes: 0 done, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM, 1 our fault.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(call(sys.argv[1:]))


def call(arguments: list[str]) -> int:
    """Run one command line and give its exit code."""
    if not processes.leads() and {"-h", "--help", "help", "--version"} & set(arguments):
        return 0  # the first process says it
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from quire import __version__

        print(f"quire {__version__}")
        return 0
    debug = "--debug" in arguments
    try:
        return run(arguments[0], [word for word in arguments[1:] if word != "--debug"])
    except SystemExit as error:  # the flag parser has said what was wrong, or shown its help
        return error.code if isinstance(error.code, int) else 2
    except BrokenPipeError:  # the reader of our output, `head` perhaps, has gone
        import os

        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BaseException as error:
        if debug and not isinstance(error, KeyboardInterrupt):
            raise
        return explain(error)


def run(command: str, words: list[str]) -> int:
    """Import the command's file and run it."""
    from quire.errors import UserError, nearest

    if command not in COMMANDS:
        raise UserError(f"There is no command {command!r}.{nearest(command, list(COMMANDS))} See quire --help.")
    if processes.world_size() > 1 and command not in TOGETHER:
        raise UserError(f"quire {command} runs in one process: call it without torchrun.")
    return import_module(f"quire.cli.{command}").run(words) or 0


def explain(error: BaseException) -> int:
    """Say what went wrong; the exit code. What is nobody's mistake but ours is raised again."""
    from quire.devices import out_of_memory
    from quire.errors import UserError

    if isinstance(error, KeyboardInterrupt):
        return told("Interrupted.", 130)
    if isinstance(error, UserError):
        return told(f"quire: {error}", 2)
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        full = error.errno in (errno.ENOSPC, errno.EIO)
        remedy = " What was saved before is whole; make room and try again." if full else ""
        return told(f"quire: {error.strerror}{where}.{remedy}", 2)
    if out_of_memory(error):
        return told(
            "quire: Out of memory. Take a smaller --batch-size with more --accumulation-steps, a shorter"
            " --model.context-length, or a smaller --model.embedding-size.",
            2,
        )
    if isinstance(code := getattr(error, "exit_code", None), int):  # training's Stopped, which comes to all, and Lost
        return code if code > 128 and not processes.leads() else told(str(error), code)
    raise error


def told(sentence: str, code: int) -> int:
    """Print a sentence on standard error; of several processes that would say the same, one does."""
    if processes.first_to_say(sentence):
        print(sentence, file=sys.stderr, flush=True)
    if code == 2:
        processes.end(sentence.removeprefix("quire: "))
    return code
