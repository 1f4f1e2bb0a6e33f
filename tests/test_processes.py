"""Several processes: the gradients of one that accumulates, complete scores, kills, launchers."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this file is also the program of the processes

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import notebook_launcher  # noqa: E402
from test_train import TinyStore, equal, go, interruptible, pressing, tiny  # noqa: E402, F401

from stf.checkpoints import ConfigError, load_checkpoint, read_header  # noqa: E402
from stf.experiments import ablation  # noqa: E402
from stf.process import one_accelerator  # noqa: E402
from stf.train import Run, Training, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
# losses: whether running statistics are held fixed
SELECTIONS = {"": False, "d": False, "g": False, "dg": False, "e": True, "c": True, "edcg": True}
STAGE = dict(model="stf", batch_size=6)
LONG = dict(**STAGE, losses="ed", epochs=6, save_every=1)


class Thirteen(TinyStore):
    "Steps of seven and six clips: odd ones."

    def split(self, protocol):
        return np.arange(13), np.arange(13, len(self))


def steps_of(losses, accumulate=1, batch_size=7, fixed=False):
    "Gradients, weights and sums of an epoch of two steps, in float64."
    torch.set_default_dtype(torch.float64)
    config = tiny("unused", model="stf", losses=losses, accumulate=accumulate,
                  batch_size=batch_size, lambda_e=1.0, lambda_g=0.1)
    try:
        with one_accelerator("cpu", "float32", accumulate) as a:
            t, gradients, clip = Training(config, Thirteen(), a), [], a.clip_grad_norm_
            for m in t.net.modules():
                if fixed and isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                    m.momentum = 0.0
            a.clip_grad_norm_ = lambda p, most: (
                gradients.append([q.grad.clone() for q in p]) or clip(p, most))
            t.train_epoch(progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    weights = [p.detach().clone() for p in t.net.parameters()]
    return {"gradients": gradients, "weights": weights, "sums": t.state["sums"]}


def program(folder):
    "What each of two processes does."
    told = {losses: steps_of(losses, fixed=fixed) for losses, fixed in SELECTIONS.items()}
    config = tiny(folder / "r", **STAGE, epochs=2, validation=0.3, keep_best="ce")
    told["runs"] = [go(config, TinyStore(21)), go(config, TinyStore(21))]  # once again: finished
    try:
        go(config.replace(lr=0.3), TinyStore(21))
    except ConfigError as e:
        told["error"] = str(e)
    torch.save(told, folder / f"told{os.environ['RANK']}.pt")


def launch(*args, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *(launcher if args[0] != "notebook" else []), __file__]
    return subprocess.Popen([*command, *map(str, args)], start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes computed, and the folder in which they worked."
    folder = tmp_path_factory.mktemp("two")
    process = launch("program", folder, stderr=subprocess.PIPE, text=True)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"told{rank}.pt", weights_only=False) for rank in (0, 1)], folder


@pytest.mark.parametrize("losses", SELECTIONS)
def test_two_processes_are_one_that_accumulates(two, losses):
    one = steps_of(losses, accumulate=2, fixed=SELECTIONS[losses])
    flat = lambda t: [*sum(t["gradients"], []), *t["weights"]]
    assert len(one["gradients"]) == 2
    for many in (told[losses] for told in two[0]):
        for a, b in zip(flat(many), flat(one), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert many["sums"] == pytest.approx(one["sums"], rel=1e-10)


def test_micro_batches_are_weighted_by_their_clips(monkeypatch):
    "Unequal parts of 13 clips, without batch norm: the parts' gradient is the whole batch's."
    frozen = lambda self, mode=True: torch.nn.Module.train(self, False)
    monkeypatch.setattr("stf.stf_module.STFNet.train", frozen)
    whole, parts = (steps_of("d", accumulate=a, batch_size=13)["gradients"][0] for a in (1, 3))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_scores_are_complete_and_in_order_in_every_process(two):
    told, folder = two
    r, expected = Run.load(folder / "r"), TinyStore(21).names[14:]
    assert all(s.scores.names == expected and s.top1 == r.top1 for t in told for s in t["runs"])
    p = r.network()(TinyStore(21).batch(np.arange(14, 21))[0]).softmax(1).detach()
    np.testing.assert_allclose(r.scores.probabilities, p, atol=1e-6)
    assert r.record["environment"]["processes"] == 2
    assert all("lr 0.05 (now 0.3)" in t["error"] for t in told)
    assert r.record["best"]["epoch"] == read_header(r.folder / "best")["epoch"]


def test_a_run_begun_by_one_process_goes_on_in_two(tmp_path, interruptible):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "r", pressing(8), **LONG)
    assert launch("long", tmp_path / "r").wait(timeout=600) == 0
    r = Run.load(tmp_path / "r")
    assert len(r.history) == 6 and [c["processes"] for c in r.record["changes"]] == [[1, 2]]


def wait_for_saves(process, file, n):
    "Wait until a run has written n more checkpoints; False if it ends before."
    changed = lambda: file.stat().st_mtime_ns if file.exists() else 0
    last, count = changed(), 0
    while count < n and process.poll() is None:
        count, last = count + (changed() != last), changed()
        time.sleep(0.01)
    return process.poll() is None


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_end_with_the_same_weights(tmp_path):
    assert launch("long", tmp_path / "whole").wait(timeout=600) == 0
    rng, kills, folder = np.random.default_rng(0), 0, tmp_path / "killed"
    while True:
        process = launch("long", folder)
        saves = rng.integers(1, 5)
        if kills == 4 or not wait_for_saves(process, folder / "checkpoint.safetensors", saves):
            break
        time.sleep(rng.uniform(0, 0.2))
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
        kills += 1
        load_checkpoint(folder)  # whole at any moment
    assert process.wait(timeout=600) == 0 and kills
    assert equal(Run.load(folder), Run.load(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_two_processes_after_the_same_step(tmp_path, stop):
    folder = tmp_path / "r"
    process = launch("patient", folder, stderr=subprocess.PIPE, text=True)
    assert wait_for_saves(process, folder / "checkpoint.safetensors", 1)
    if stop == signal.SIGINT:  # a terminal's Ctrl-C goes to the launcher and both processes
        os.killpg(process.pid, stop)
    else:  # a scheduler's to the launcher
        process.send_signal(stop)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode != 0 and "nothing is lost" in errors
    state = read_header(folder)["state"]
    assert 0 < state["epoch"] + state["step"] < 1000


@pytest.mark.slow
def test_started_from_a_notebook(tmp_path):
    "After a training in the same kernel: the launcher needs a process without an accelerator."
    assert launch("notebook", tmp_path).wait(timeout=600) == 0
    assert Run.load(tmp_path / "r").record["environment"]["processes"] == 2


def test_records_are_not_made_by_several_processes_of_a_launcher(tmp_path, monkeypatch):
    "Each of them would write; `run` alone shares a training."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun or accelerate launch"):
        ablation(tiny(tmp_path / "r"), rows=("M1",), results=tmp_path, store=TinyStore())
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "program":
        program(where)
    elif what == "notebook":
        go(where / "before", epochs=1)
        config = tiny(where / "r", epochs=1)
        notebook_launcher(run, (config, TinyStore(), False), num_processes=2)
    else:
        go(where, **(LONG if what == "long" else dict(epochs=1000, milestones=())))
