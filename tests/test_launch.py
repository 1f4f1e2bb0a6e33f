"""README's launch lines, word for word, in two CPU processes: accelerate launch, torchrun on one machine and on two, and the module alone."""
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.synthetic import SyntheticConfig, write_synthetic
from stf.train import Run

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
# the same run made small: what stands in README is the paper's network for 50 epochs
SHORT = shlex.split("--epochs 1 --length 12 --widths 6 6 6 --gcn-scales 2 --g3d-scales 2 --windows 3 --batch-size 4")


def lines(start):
    "Launch lines in README that begin so, without their comments."
    found = re.findall(rf"^({start} .*?-m stf\.cli train [^#\n]*)", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    return [line.strip() for line in found]


def start(command, cwd, **environment):
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(cwd), "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})


@pytest.fixture
def place(tmp_path):
    "A folder with a store, where the commands are typed."
    write_synthetic(tmp_path / "raw", SyntheticConfig(actions=(23, 44), subjects=(1, 2, 3, 4), cameras=(1,)), progress=False)
    ClipStore.build(open_clips(tmp_path / "raw"), tmp_path / "data" / "ntu60", progress=False)
    return tmp_path


def check(place, said, processes=2):
    "Trained by so many processes, every clip scored once, with the top-1 that one process measures on the weights."
    r = Run.load(place / "data" / "runs" / "ntu60-xsub-joint-seed0")
    assert r.record["environment"]["processes"] == processes and len(r.history) == 1
    store = ClipStore(place / "data" / "ntu60")
    _, test = store.split("xsub")
    x, y = store.batch(test, length=12)
    assert r.scores.names == [store.names[i] for i in test]
    assert np.isclose(r.top1, 100 * (r.network()(x).argmax(1) == y).float().mean())
    assert said.count(f"top-1 {r.top1:.2f} % of {len(test)} test clips") == 1  # the first process alone reports


def test_the_command_line_is_a_module(place):
    for words, code, text in ((["--version"], 0, "stf "), (["train", "no-such-preset"], 2, "there is no preset 'no-such-preset'")):
        process = start([sys.executable, "-m", "stf.cli", *words], place)
        said = "".join(process.communicate(timeout=100))
        assert process.returncode == code and text in said
    process = start([sys.executable, "-m", "stf.cli", "train", "ntu60-xsub-joint", *SHORT], place)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    check(place, said, processes=1)


def test_accelerate_launch(place):
    (line,) = lines("accelerate launch")
    machine = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2, "num_machines": 1,
               "machine_rank": 0, "main_process_port": 29541, "mixed_precision": "no"}  # fmt: skip
    (place / "accelerate").mkdir()
    (place / "accelerate" / "default_config.yaml").write_text(json.dumps(machine))  # what `accelerate config` writes for two GPUs; without CUDA both processes run on the CPU
    process = start([str(BIN / "accelerate"), *shlex.split(line)[1:], *SHORT], place)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    check(place, said)


def test_torchrun(place):
    line = next(line for line in lines("torchrun") if "--nnodes" not in line)
    process = start(shlex.split(line.replace("--nproc-per-node 8", "--nproc-per-node 2")) + SHORT, place)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    check(place, said)


def test_torchrun_on_two_machines(place):
    "Two launchers on this one, with a process each."
    line = next(line for line in lines("torchrun") if "--nnodes 2" in line)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = shlex.split(line.replace("--nproc-per-node 8", "--nproc-per-node 1").replace("host1:29500", f"127.0.0.1:{port}")) + SHORT
    both = [start(command, place) for _ in range(2)]
    told = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], told[0][1][-2000:] + told[1][1][-2000:]
    check(place, told[0][0] + told[1][0])
