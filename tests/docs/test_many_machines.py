"""The commands of docs/many-machines.md, and README's that call torchrun, as far as one machine goes: two of torchrun's
nodes on it, a folder in place of a bucket, and SLURM's commands played by stand-ins."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import quire

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="they are lines for a Unix shell")

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "many-machines.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^```sh\n(.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
README = re.findall(r"^torchrun .*?(?= *#|$)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
TWO_MACHINES = next(command for command in COMMANDS if "--nnodes 2" in command)
SCRIPT = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SMALL = "--steps 12 --model.layers 1 --model.heads 2 --model.context-length 16 --model.embedding-size 16"
SMALL += " --batch-size 2 --sample-tokens 0 --device cpu --preset gpt-mini"
ENDLESS = "--steps 100000 --evaluation-interval 50000"
SLURM = {"SLURM_JOB_NODELIST": "node[0-1]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "1"}
STAND_INS = {
    # Two tasks, as on two machines; what reaches srun it passes on to them, and the larger of their codes is its own.
    "srun": '#!/bin/sh\n"$@" & one=$!\n"$@" & two=$!\necho $one $two > tasks\ntrap "kill -TERM $one $two" TERM\n'
    + 2 * "wait $one; first=$?; wait $two; second=$?\n"
    + "exit $((first > second ? first : second))\n",
    "scontrol": '#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> requeued\necho localhost\necho node1\n',
    "torchrun": f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n',
    "quire": f'#!/bin/sh\nexec {sys.executable} -m quire "$@"\n',
}


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with texts, and programs that stand for a cluster's."""
    (tmp_path / "book.txt").write_text("the owl calls upon a night and speaks to none\n" * 60)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("a bear goes over the hill to see what it can see\n" * 60)
    (tmp_path / "bin").mkdir()
    for name, script in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(script)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def started(line: str, folder: Path, desk: Path, **more: str) -> "subprocess.Popen[str]":
    """A line for the shell, started in a folder of this desk."""
    path = f"{desk / 'bin'}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(Path(quire.__file__).parents[1]), "QUIRE_CACHE": str(desk / "cache")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **own, **more}
    pipe = subprocess.PIPE
    return subprocess.Popen(["bash", "-ec", line], cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def lines_of(run: Path) -> list[str]:
    log = run / "metrics.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def small(command: str) -> str:
    """A command whose model is small, whose machines are this one, and whose devices are cores."""
    command = command.replace("--steps 200", SMALL).replace("--minutes 5", SMALL).replace("s3://bucket", "bucket")
    command = command.replace("node0:", "localhost:").replace(":29500", f":{free_port()}")
    return command.replace("--nproc-per-node 8", "--nproc-per-node 1")


@pytest.mark.parametrize("command", dict.fromkeys([*COMMANDS, *README]))
def test_every_command_does_what_it_says(desk, command):
    nodes, line = 2 if command == TWO_MACHINES else 1, small(command)
    doing = [started(line, desk, desk) for _ in range(nodes)]
    said = [process.communicate(timeout=240) for process in doing]
    assert [process.returncode for process in doing] == [0] * nodes, said
    if "doctor" in command:
        assert said[0][0].count("parameters the same in all processes") == 9
        assert said[0][0].endswith("They agree: to 1e-05.\n")
        return
    run = desk / re.search(r"--run (\S+)", command)[1]
    assert json.loads(lines_of(run)[-1])["step"] == 12
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2


def test_machines_that_share_no_folder_are_told(desk):
    (desk / "other").mkdir()
    line = small(TWO_MACHINES)
    doing = [started(line, folder, desk) for folder in (desk, desk / "other")]
    said = "".join(process.communicate(timeout=240)[1] for process in doing)
    assert len(re.findall(r"quire: Process 1 on \S+ does not see runs/book, which process 0 has made", said)) == 1, said
    assert not (desk / "runs" / "book").exists()  # the next try finds the name free


# ---- SLURM's job --------------------------------------------------------------------------------------------------


def job(desk: Path, starts: int = 0) -> "subprocess.Popen[str]":
    """The page's script, as SLURM runs it; a training that does not end by itself."""
    (desk / "train.sh").write_text(small(SCRIPT[0]).replace("--steps 12", ENDLESS))
    return started("exec bash train.sh", desk, desk, **SLURM, SLURM_RESTART_COUNT=str(starts))


def until_it_trains(job: "subprocess.Popen[str]", run: Path, first: str = "Training ") -> str:
    """What a job says until it has said the `first` words, and two further lines of metrics are there."""
    said = ""
    for line in job.stderr:
        said += line
        if first in line:
            break
    before = len(lines_of(run))
    while len(lines_of(run)) < before + 2:
        assert job.poll() is None, said
    return said


def test_the_job_trains_and_put_into_the_queue_again_resumes(desk):
    """On two nodes; stopped by SIGTERM to the script alone, as SLURM does before the end of its time."""
    run, stopped = desk / "runs" / "book", []
    for starts, first in enumerate(("Training ", "resumes at step")):
        doing = job(desk, starts)
        said = until_it_trains(doing, run, first)
        doing.terminate()
        said += doing.communicate(timeout=120)[1]
        assert "Stopped at step" in said and said.count("quire resume") == 1, said
        stopped.append(int(re.search(r"Stopped at step (\d+) and saved", said)[1]))
    assert 0 < stopped[0] < stopped[1]
    assert (desk / "requeued").read_text().split() == ["7", "7"]
    assert json.loads((run / "manifest.json").read_text())["world_size"] == 2


def test_a_job_whose_tasks_are_preempted_saves_and_leaves_the_queue_to_slurm(desk):
    doing = job(desk)
    said = until_it_trains(doing, desk / "runs" / "book")
    for task in (desk / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    said += doing.communicate(timeout=120)[1]
    assert "Stopped at step" in said and doing.returncode == 1, said
    assert not (desk / "requeued").exists()


def test_a_job_that_fails_is_said_to_have_failed(desk):
    (desk / "book.txt").unlink()
    doing = job(desk)
    said = doing.communicate(timeout=240)[1]
    assert "named 'book.txt'" in said and doing.returncode == 1
    assert not (desk / "requeued").exists()
