"""The C core: under address and undefined-behaviour sanitizers, without leaks, and beside the reference.

exercise_core.py is what it has to do there.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from quire.tokenizers import core

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "quire" / "tokenizers" / "_core.c"
EXERCISE = Path(__file__).with_name("exercise_core.py")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's loader and /proc")


def run(*words: str, **environment: str) -> str:
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *words], env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def compiler() -> str:
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if not found or not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        pytest.skip("there is no C compiler, or no Python.h")
    return found


def build(out: Path, *options: str) -> Path:
    include = sysconfig.get_paths()["include"]
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{include}", *options]
    subprocess.run([compiler(), *flags, str(SOURCE), "-o", str(out)], check=True, capture_output=True, text=True)
    return out


def sanitizer(name: str) -> str:
    """The path of one of the compiler's runtime libraries."""
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_file():
        pytest.skip(f"the compiler has no {name}")
    return found


def test_the_core_reads_and_writes_only_what_is_its_own(tmp_path):
    """Long pieces go through windows of 100 bytes, so that most of them need several."""
    options = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    options.append("-DWINDOW=100")
    libraries = f"{sanitizer('libasan.so')} {sanitizer('libstdc++.so.6')}"
    shown = run(
        str(EXERCISE),
        str(build(tmp_path / "_core.so", *options)),
        LD_PRELOAD=libraries,
        PYTHONMALLOC="malloc",  # so that the sanitizer knows the ends of Python's own bytes
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1",
    )
    assert "the same as the reference" in shown


def test_the_sanitizers_are_at_work(tmp_path):
    """A core with a fault put in is caught."""
    source = SOURCE.read_text(encoding="utf-8")
    assert source.count("malloc(length * sizeof *l->row)") == 1
    (tmp_path / "bad.c").write_text(source.replace("malloc(length * sizeof *l->row)", "malloc(length)"))
    out = tmp_path / "_core.so"
    flags = ["-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", "-fsanitize=address", "-o", str(out)]
    subprocess.run([compiler(), *flags, str(tmp_path / "bad.c")], check=True, capture_output=True)
    with pytest.raises(AssertionError, match="AddressSanitizer"):
        run(
            str(EXERCISE),
            str(out),
            LD_PRELOAD=f"{sanitizer('libasan.so')} {sanitizer('libstdc++.so.6')}",
            PYTHONMALLOC="malloc",
            ASAN_OPTIONS="detect_leaks=0",
        )


LIVES = """
import os
import numpy as np
from quire.tokenizers import core
from quire.tokenizers.byte_bpe import from_merges

text = b" ".join(b"%d abc" % number for number in range(3000)) + b"ab" * 5000

def life():
    pairs = core.learn([text, text], "gpt2", 100, threads=2)
    tokenizer = from_merges(pairs, "gpt2")
    tokenizer.whole[b"zzz"] = 5
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(text)) == text
    core.fast.split(text, core.character_classes(), 1)
    for wrong, *rest in ((core.fast.count, b"", 0, 9), (core.fast.encode, np.empty(len(text), np.int32))):
        try:
            wrong(tokenizer, text, *rest)
        except ValueError:
            pass

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

for _ in range(15):
    life()
before = resident()
for _ in range(60):
    life()
print(resident() - before)
"""


@pytest.mark.skipif(core.fast is None, reason="the C core is not compiled")
def test_memory_does_not_grow_with_counters_and_encoders():
    """Sixty times about a megabyte: what was kept of it would be seen."""
    assert int(run("-c", LIVES, MALLOC_ARENA_MAX="1")) < 8 << 20
