"""The commands of docs/many-machines.md, as far as one machine goes: two of torchrun's nodes, and SLURM's commands
played by stand-ins."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import quire

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
SCRIPT = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SMALL = "--steps 12 --model.layers 1 --model.heads 2 --model.context-length 16 --model.embedding-size 16"
SMALL += " --batch-size 2 --sample-tokens 0 --device cpu --preset gpt-mini"
STAND_INS = {
    # Two tasks, as on two machines; what reaches srun it passes on to them.
    "srun": '#!/bin/sh\n"$@" & one=$!\n"$@" & two=$!\ntrap "kill -TERM $one $two" TERM\n' + 2 * "wait $one $two\n",
    "scontrol": '#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> requeued\necho localhost\necho node1\n',
    "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
}


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with a book, and programs that stand for a cluster's."""
    (tmp_path / "book.txt").write_text("the owl calls upon a night and speaks to none\n" * 60)
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(desk: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "PATH": f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(quire.__file__).parents[1]), "QUIRE_CACHE": str(desk / "cache"), **more}  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lines_of(run: Path) -> list[str]:
    log = run / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def small(command: str, port: int) -> str:
    """A command whose model is small, whose machines are this one, and whose devices are cores."""
    command = command.replace("--steps 200", SMALL).replace("node0:29500", f"localhost:{port}")
    return command.replace("--nproc-per-node 8", "--nproc-per-node 1").replace(":29500", f":{port}")


def test_every_command_of_the_page_is_one_that_is_tried():
    """Here or in tests/training/test_distributed.py, where one machine's torchrun is started, killed and compared."""
    assert [shlex.split(command)[0] for command in COMMANDS] == ["torchrun"] * 4 and len(SCRIPT) == 1
    assert "doctor --distributed" in COMMANDS[1] and "--max-restarts" in COMMANDS[2] and "--nnodes 2" in COMMANDS[3]
    flags = [word for word in shlex.split(COMMANDS[3]) if word.startswith("--")]
    assert set(flags) <= set(shlex.split(SCRIPT[0])) | {
        "--run",
        "--steps",
        "--parallel",
        "--optimizer",
        "--batch-size",
    }  # the job's, tried below


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_the_job_trains_and_put_into_the_queue_again_resumes(desk):
    """On two nodes; stopped by SIGTERM in the middle, as SLURM does two minutes before the end."""
    script = small(SCRIPT[0], free_port()).replace("--steps 12", "--steps 100000 --evaluation-interval 50000")
    (desk / "train.sh").write_text(script)
    slurm = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
    run, stopped = desk / "runs" / "book", []
    for number in range(2):
        job = subprocess.Popen(
            ["bash", "train.sh"], cwd=desk, env=environment(desk, **slurm, SLURM_RESTART_COUNT=str(number)),
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        said = ""
        for line in job.stderr:
            said += line
            if ("Training " if number == 0 else "resumes at step") in line:
                break
        before = len(lines_of(run))
        while len(lines_of(run)) < before + 2:
            assert job.poll() is None, said
        job.terminate()  # the script alone, as SLURM does
        said += job.communicate(timeout=120)[1]
        assert "Stopped at step" in said and said.count("quire resume") == 1, said
        stopped.append(int(re.search(r"Stopped at step (\d+) and saved", said)[1]))
    assert 0 < stopped[0] < stopped[1]
    assert (desk / "requeued").read_text().split() == ["7", "7"]
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2
