"""The command line as a module, and README's launch line, word for word, in two CPU processes."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.synthetic import SyntheticConfig, write_synthetic
from stf.train import Run

ROOT = Path(__file__).resolve().parent.parent
# the same run made small: what stands in README is the paper's network for 50 epochs
SHORT = "--epochs 1 --length 12 --widths 6 6 6 --gcn-scales 2 --g3d-scales 2 --windows 3 --batch-size 4"


def launch(command, cwd, **environment):
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def test_the_command_line_is_a_module(tmp_path):
    done = launch([sys.executable, "-m", "stf.cli", "--version"], tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("stf ")
    done = launch([sys.executable, "-m", "stf.cli", "train", "no-such-preset"], tmp_path)
    assert done.returncode == 2 and "there is no preset 'no-such-preset'" in done.stderr


def test_readmes_launch_line_trains_in_two_processes(tmp_path):
    line, = re.findall(r"`(accelerate launch -m stf\.cli train [^`]*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    write_synthetic(tmp_path / "raw", SyntheticConfig(actions=(23, 44), subjects=(1, 2, 3, 4), cameras=(1,)), progress=False)
    ClipStore.build(open_clips(tmp_path / "raw"), tmp_path / "data" / "ntu60", progress=False)
    machine = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "use_cpu": False, "num_processes": 2, "num_machines": 1,
               "machine_rank": 0, "main_process_port": 29541, "mixed_precision": "no"}  # fmt: skip
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").write_text(json.dumps(machine))  # what `accelerate config` writes for two GPUs; without CUDA both processes run on the CPU
    bin = Path(sys.executable).parent
    done = launch([str(bin / "accelerate"), *shlex.split(line)[1:], *shlex.split(SHORT)], tmp_path, HF_HOME=str(tmp_path), CUDA_VISIBLE_DEVICES="", PATH=f"{bin}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr[-3000:]
    r = Run.load(tmp_path / "data" / "runs" / "ntu60-xsub-joint-seed0")
    assert r.record["environment"]["processes"] == 2 and len(r.history) == 1
    store = ClipStore(tmp_path / "data" / "ntu60")
    _, test = store.split("xsub")
    x, y = store.batch(test, length=12)
    assert r.scores.names == [store.names[i] for i in test]
    assert np.isclose(r.top1, 100 * (r.network()(x).argmax(1) == y).float().mean())  # what one process measures on its weights
