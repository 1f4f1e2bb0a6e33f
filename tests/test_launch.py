"""README's launch lines, word for word: accelerate, torchrun on one machine and two, the module."""
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
SHORT = ("--epochs 1 --length 12 --widths 6 6 6 --gcn-scales 2 --g3d-scales 2 --windows 3 "
         "--batch-size 4")
# what `accelerate config` writes for two GPUs; without CUDA both processes run on the CPU
MACHINE = dict(compute_environment="LOCAL_MACHINE", distributed_type="MULTI_GPU", use_cpu=False,
               num_processes=2, num_machines=1, machine_rank=0, main_process_port=29541,
               mixed_precision="no")


def line(pattern):
    "README's launch line that matches, without its comment."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(rf"^({pattern}-m stf\.cli train [^#\n]*)", text, re.M)
    return found.strip()


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    few = SyntheticConfig(actions=(23, 44), subjects=(1, 2, 3, 4), cameras=(1,))
    write_synthetic(folder, few, progress=False)
    return folder


@pytest.fixture
def start(raw, tmp_path):
    "Starts a command in a folder with a store."
    ClipStore.build(open_clips(raw), tmp_path / "data" / "ntu60", progress=False)
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(json.dumps(MACHINE))
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(tmp_path),
           "PATH": f"{BIN}:{os.environ['PATH']}"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return lambda command: subprocess.Popen(shlex.split(command), cwd=tmp_path,
                                            env={**os.environ, **own}, **pipes)


def check(folder, *started, processes=2):
    "Each clip is scored once, with the top-1 that one process measures; the first one reports."
    told = [process.communicate(timeout=600) for process in started]
    assert not any(process.returncode for process in started), [e[-2000:] for _, e in told]
    r = Run.load(folder / "data" / "runs" / "ntu60-xsub-joint-seed0")
    assert r.record["environment"]["processes"] == processes and len(r.history) == 1
    store = ClipStore(folder / "data" / "ntu60")
    _, test = store.split("xsub")
    x, y = store.batch(test, length=12)
    assert r.scores.names == [store.names[i] for i in test]
    assert np.isclose(r.top1, 100 * (r.network()(x).argmax(1) == y).float().mean())
    report = f"top-1 {r.top1:.2f} % of {len(test)} test clips"
    assert "".join(out for out, _ in told).count(report) == 1


def test_the_command_line_is_a_module(start, tmp_path):
    unknown = "there is no preset 'no-such-preset'"
    for words, code, text in (("--version", 0, "stf "), ("train no-such-preset", 2, unknown)):
        process = start(f"{sys.executable} -m stf.cli {words}")
        said = "".join(process.communicate(timeout=300))
        assert process.returncode == code and text in said
    module = start(f"{sys.executable} -m stf.cli train ntu60-xsub-joint {SHORT}")
    check(tmp_path, module, processes=1)


def test_accelerate_launch(start, tmp_path):
    check(tmp_path, start(f"{line('accelerate launch ')} {SHORT}"))


def test_torchrun(start, tmp_path):
    command = line(r"torchrun --nproc-per-node \d+ ")
    check(tmp_path, start(re.sub(r"per-node \d+", "per-node 2", command) + " " + SHORT))


def test_torchrun_on_two_machines(start, tmp_path):
    "Two launchers on this one, with a process each."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = line(r"torchrun --nnodes 2 .*").replace("host1:29500", f"127.0.0.1:{port}")
    command = re.sub(r"per-node \d+", "per-node 1", command) + " " + SHORT
    check(tmp_path, start(command), start(command))


@pytest.mark.slow
def test_the_measurements_of_a_gpu_in_small(tmp_path):
    "On a lent card minutes are few: a part must write each figure at once, and skip it next time."
    command = [sys.executable, ROOT / ".ci/gpu", "card", "inference", "full", "--rehearse",
               "--results", tmp_path / "gpu"]  # fmt: skip
    ask = lambda: subprocess.run(command, check=True, capture_output=True, text=True,
                                 env={**os.environ, "TMPDIR": str(tmp_path)})
    told = ask()
    held = {p.stem: json.loads(p.read_text())["figures"] for p in (tmp_path / "gpu").iterdir()}
    assert {k: len(v) for k, v in held.items()} == {"card": 4, "inference": 6, "full": 4}, told
    assert "nothing is lost" in held["full"]["M1, stopped"]["stopped"]
    assert len(held["full"]["M1, resumed"]["history"]) == 2
    assert all(0 <= f["waiting"] < 1 for f in held["full"].values())
    assert "Traceback" not in told.stderr and ask().stdout == ""
