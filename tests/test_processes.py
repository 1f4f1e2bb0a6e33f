"""Several processes: the gradients of one process that accumulates, every clip scored once, kill and resume, launchers."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this file is also the program that the processes run

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import notebook_launcher  # noqa: E402
from test_train import Pressing, TinyStore, interruptible, same, tiny, weights  # noqa: E402, F401

from stf.checkpoints import ConfigError, load_checkpoint, read_header  # noqa: E402
from stf.experiments import ablation  # noqa: E402
from stf.process import make_accelerator  # noqa: E402
from stf.train import Run, Training, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
SELECTIONS = {"": False, "d": False, "g": False, "dg": False, "e": True, "c": True, "edcg": True}  # losses: whether buffers are fixed


class Thirteen(TinyStore):
    "Steps of seven and six clips: odd ones."

    def split(self, protocol):
        return np.arange(13), np.arange(13, len(self))


def steps_of(losses, accumulate=1, batch_size=7, fixed=False):
    "Gradients of each step, weights and sums after an epoch of two steps, in float64; fixed: running statistics stay as they are."
    torch.set_default_dtype(torch.float64)
    try:
        config = tiny("unused", model="stf", losses=losses, accumulate=accumulate, batch_size=batch_size, lambda_e=1.0, lambda_g=0.1)
        t = Training(config, Thirteen(), make_accelerator("cpu", accumulate=accumulate))
        for m in t.net.modules():
            if fixed and isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
                m.momentum = 0.0
        gradients, clip = [], t.accelerator.clip_grad_norm_
        t.accelerator.clip_grad_norm_ = lambda p, most: gradients.append([q.grad.clone() for q in p]) or clip(p, most)
        t.train_epoch(progress=False)
        return {"gradients": gradients, "weights": [p.detach().clone() for p in t.net.parameters()], "sums": t.state["sums"]}
    finally:
        torch.set_default_dtype(torch.float32)


def whole_run(folder, **changes):
    return tiny(folder, model="stf", batch_size=6, epochs=2, validation=0.3, keep_best="ce", **changes)


def program(folder):
    "What each process does."
    rank = int(os.environ["RANK"])
    told = {"terms": {losses: steps_of(losses, fixed=fixed) for losses, fixed in SELECTIONS.items()}}
    r = run(whole_run(folder / "r"), TinyStore(21), progress=False)
    told["top1"], told["names"] = r.top1, r.scores.names
    told["again"] = run(whole_run(folder / "r"), TinyStore(21), progress=False).top1  # finished already
    try:
        run(whole_run(folder / "r", lr=0.3), TinyStore(21), progress=False)
    except ConfigError as e:
        told["error"] = str(e)
    torch.save(told, folder / f"told{rank}.pt")


def launch(*args, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if args[0] != "notebook" else []
    return subprocess.Popen([sys.executable, *launcher, __file__, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            start_new_session=True, **options)  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes told, and the folder in which they worked."
    folder = tmp_path_factory.mktemp("two")
    process = launch("program", folder, stderr=subprocess.PIPE, text=True)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"told{rank}.pt", weights_only=False) for rank in (0, 1)], folder


@pytest.mark.parametrize("losses", SELECTIONS)
def test_two_processes_are_one_that_accumulates(two, losses):
    one = steps_of(losses, accumulate=2, fixed=SELECTIONS[losses])
    for told in two[0]:
        many = told["terms"][losses]
        assert len(many["gradients"]) == len(one["gradients"]) == 2
        for a, b in zip([*sum(many["gradients"], []), *many["weights"]], [*sum(one["gradients"], []), *one["weights"]]):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert many["sums"] == pytest.approx(one["sums"], rel=1e-10)


def test_micro_batches_are_weighted_by_their_clips(monkeypatch):
    "Unequal parts of 13 clips: without batch norm in the way, the parts' gradient is the whole batch's."
    frozen = lambda self, mode=True: torch.nn.Module.train(self, False)
    monkeypatch.setattr("stf.stf_module.STFNet.train", frozen)
    whole, parts = (steps_of("d", accumulate=a, batch_size=13)["gradients"][0] for a in (1, 3))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("losses", SELECTIONS)
def test_every_parameter_has_a_gradient_whatever_the_terms(losses):
    "Or sharing gradients would wait for the missing ones."
    taken = steps_of(losses)
    assert len(taken["gradients"][0]) == len(taken["weights"])


def test_scores_are_complete_and_in_order_in_every_process(two):
    told, folder = two
    r = Run.load(folder / "r")
    expected = TinyStore(21).names[14:]
    assert r.scores.names == expected and all(t["names"] == expected and t["top1"] == t["again"] == r.top1 for t in told)
    x, y = TinyStore(21).batch(np.arange(14, 21))
    np.testing.assert_allclose(r.scores.probabilities, r.network()(x).softmax(1).detach().numpy(), atol=1e-6)
    assert r.record["environment"]["processes"] == 2 and all("lr 0.05 (now 0.3)" in t["error"] for t in told)
    assert r.record["best"]["epoch"] == read_header(r.folder / "best")["epoch"]


def test_a_run_begun_by_one_process_goes_on_in_two(tmp_path, interruptible):  # noqa: F811
    "And its record says so."
    config = tiny(tmp_path / "r", model="stf", losses="ed", batch_size=6, epochs=6, save_every=1)
    with pytest.raises(KeyboardInterrupt):
        run(config, Pressing(8), progress=False)
    assert launch("long", tmp_path / "r").wait(timeout=300) == 0
    r = Run.load(tmp_path / "r")
    assert len(r.history) == 6 and [c["processes"] for c in r.record["changes"]] == [[1, 2]]


def long_run(folder):
    return tiny(folder, model="stf", losses="ed", batch_size=6, epochs=6, save_every=1)


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
    assert launch("long", tmp_path / "whole").wait(timeout=300) == 0
    rng, kills, folder = np.random.default_rng(0), 0, tmp_path / "killed"
    while True:
        process = launch("long", folder)
        if kills == 4 or not wait_for_saves(process, folder / "checkpoint.safetensors", rng.integers(1, 5)):
            break
        time.sleep(rng.uniform(0, 0.2))
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.wait()
        kills += 1
        load_checkpoint(folder)  # whole at any moment
    assert process.wait(timeout=300) == 0 and kills
    assert same(weights(folder), weights(tmp_path / "whole"))
    pd.testing.assert_frame_equal(Run.load(folder).history, Run.load(tmp_path / "whole").history, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_two_processes_after_the_same_step(tmp_path, stop):
    folder = tmp_path / "r"
    process = launch("patient", folder, stderr=subprocess.PIPE, text=True)
    assert wait_for_saves(process, folder / "checkpoint.safetensors", 1)
    # as a terminal's Ctrl-C does: the launcher and both processes; as a scheduler does: the launcher
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "nothing is lost" in errors
    state = read_header(folder)["state"]
    assert 0 < state["epoch"] + state["step"] < 1000


@pytest.mark.slow
def test_started_from_a_notebook(tmp_path):
    "After a training in the same kernel; accelerate's launcher refuses a process that still holds an accelerator."
    assert launch("notebook", tmp_path).wait(timeout=200) == 0
    assert Run.load(tmp_path / "r").record["environment"]["processes"] == 2


def test_records_are_not_made_by_several_processes_of_a_launcher(tmp_path, monkeypatch):
    "Each of them would write; `run` alone shares a training."
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without the launcher, in two terminals"):
        ablation(tiny(tmp_path / "r"), rows=("M1",), results=tmp_path, store=TinyStore(), progress=False)
    assert not list(tmp_path.iterdir())


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "program":
        program(where)
    elif what == "notebook":
        run(tiny(where / "before", epochs=1), TinyStore(), progress=False)
        notebook_launcher(run, (tiny(where / "r", epochs=1), TinyStore(), False), num_processes=2)
    elif what == "long":
        run(long_run(where), TinyStore(), progress=False)
    else:
        run(tiny(where, epochs=1000, milestones=()), TinyStore(), progress=False)
