"""Text to token shards, in several processes.

A process is `python -m quire.data.encode TOKENIZER`: it reads a span a line on standard input, writes that shard, and
answers with lines of its own. It imports no torch, and ends with its input when the process that started it is gone.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

import quire
from quire import files
from quire.data.documents import Documents
from quire.data.shards import Shard, token_type
from quire.devices import usable_cores
from quire.errors import UserError
from quire.tokenizers import Tokenizer, load_tokenizer
from quire.tokenizers.tokenizer import Unknown

PROCESSES = 8  # at most: each takes some 60 MB
STEP = 1 << 20  # characters whose tokens are written at once

# text, index, first, last: the documents; begin, end: the span; folder, name: of the shard; unknown: as for encoding
Job = dict[str, Any]
OnText = Callable[[int], object]  # told of characters encoded since it was last told


def stream(
    tokenizer: Tokenizer, pieces: Iterable[tuple[bool, str]], unknown: Unknown = "error"
) -> Iterator[np.ndarray]:
    """[separator] document [separator] document ..., in parts; `pieces` as Documents gives them."""
    separator = np.array([tokenizer.separator], dtype=np.int32)
    for begins, text in pieces:
        if begins:
            yield separator
        yield (tokenizer.encode_array if begins else tokenizer.encode_more)(text, unknown)


def encode_shard(tokenizer: Tokenizer, job: Job, on_text: OnText) -> Shard:
    """Write the shard of a span of text: NAME.bin and NAME.starts; gives its entry in the index."""
    documents = Documents(Path(job["text"]), Path(job["index"]), job["first"], job["last"])
    unknown: Unknown = job["unknown"]
    path, kind = Path(job["folder"]) / job["name"], token_type(tokenizer.vocabulary_size)
    starts: array[int] = array("q")
    tokens = size = checksum = 0

    def write(new: Path) -> None:
        nonlocal tokens, size, checksum
        separator, length = np.array([tokenizer.separator], dtype=np.int32), 0
        held: list[np.ndarray] = []
        with open(new, "wb") as file:

            def flush() -> None:
                nonlocal checksum
                data = np.concatenate(held).astype(kind).tobytes()
                file.write(data)
                checksum = zlib.crc32(data, checksum)
                on_text(length)

            for begins, text in documents.pieces(tuple(job["begin"]), tuple(job["end"])):
                if begins:
                    starts.append(tokens)
                    tokens += 1
                    held.append(separator)
                ids = (tokenizer.encode_array if begins else tokenizer.encode_more)(text, unknown)
                size += len((text if unknown == "error" else tokenizer.decode(ids)).encode())
                held.append(ids)
                tokens += len(ids)
                length += len(text)
                if length >= STEP:
                    flush()
                    held, length = [], 0
            if held:
                flush()

    files.write_by(path.with_name(path.name + ".bin"), write)
    places = np.array(starts, dtype="<i8").tobytes()
    files.write_bytes(path.with_name(path.name + ".starts"), places)
    return {
        "name": job["name"],
        "tokens": tokens,
        "documents": len(starts),
        "bytes": size,
        "crc32": {".bin": f"{checksum:08x}", ".starts": files.crc32(places)},
        "text": [list(job["begin"]), list(job["end"])],
    }


def encode_shards(
    tokenizer: Tokenizer, saved: Path, jobs: list[Job], on_text: OnText, on_shard: Callable[[Shard], object]
) -> None:
    """Write the shards of `jobs`, in as many processes as there are cores; a text of one shard is encoded in this one.

    `saved` is the tokenizer's file. `on_shard` is told of each that is finished, in whatever order.
    """
    ours = type(tokenizer).__module__.startswith("quire.")  # one of the user's making is known to this process only
    processes = min(usable_cores(), len(jobs) - 1, PROCESSES) if ours else 1  # the held-out text is little work
    if processes < 2:
        for job in jobs:
            on_shard(encode_shard(tokenizer, job, on_text))
        return
    lock = threading.Lock()
    waiting = iter(jobs)
    workers = [_start(saved) for _ in range(processes)]

    def serve(worker: "subprocess.Popen[str]") -> None:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            for answer in _ask(worker, job):
                with lock:
                    on_shard(answer["shard"]) if "shard" in answer else on_text(answer["characters"])

    pool = ThreadPoolExecutor(processes)
    try:
        for done in [pool.submit(serve, worker) for worker in workers]:
            done.result()
    finally:
        for worker in workers:
            worker.kill()
        pool.shutdown()
        for worker in workers:
            worker.communicate()


def _start(saved: Path) -> "subprocess.Popen[str]":
    root = str(Path(quire.__file__).parents[1])
    places = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "quire.data.encode", str(saved)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, encoding="utf-8", env={**os.environ, **threads, "PYTHONPATH": places},
    )  # fmt: skip


def _ask(worker: "subprocess.Popen[str]", job: Job) -> Iterator[dict[str, Any]]:
    """Send a job, and give the answers up to the one with the shard."""
    assert worker.stdin is not None and worker.stdout is not None
    answer: dict[str, Any] = {}
    try:
        print(json.dumps(job), file=worker.stdin, flush=True)
        while "shard" not in answer:
            answer = json.loads(worker.stdout.readline() or "{}")
            if "mistake" in answer:
                raise UserError(answer["mistake"])
            if "failed" in answer:
                raise OSError(*answer["failed"])
            if not answer:
                break
            yield answer
    except BrokenPipeError:
        answer = {}
    if not answer:
        raise UserError(
            f"A process that encoded the text ended (exit code {worker.wait()}), perhaps for lack of memory."
            " Try again: what is finished is kept."
        )


def main() -> None:
    """Serve as one of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    lines: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # at once: another call may be about to write the same shard

    def tell(**answer: Any) -> None:
        try:
            print(json.dumps(answer), flush=True)
        except BrokenPipeError:
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    tokenizer = load_tokenizer(sys.argv[1])
    while True:
        job = json.loads(lines.get())
        try:
            tell(shard=encode_shard(tokenizer, job, lambda done: tell(characters=done)))
        except UserError as error:
            tell(mistake=str(error))
        except OSError as error:
            tell(failed=[error.errno, error.strerror, error.filename and str(error.filename)])


if __name__ == "__main__":
    main()
