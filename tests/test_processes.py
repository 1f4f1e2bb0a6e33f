"""Several processes: the gradients of one process that accumulates, every clip scored once, one writer, errors everywhere."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this file is also the program that the processes run

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import psutil  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate import notebook_launcher  # noqa: E402
from test_train import TinyStore, same, tiny, weights  # noqa: E402

from stf.experiments import ablation  # noqa: E402
from stf.stf_module import NETWORKS, STFNet  # noqa: E402
from stf.train import (ConfigError, Run, begin, epoch_batches, in_first, load_checkpoint, make_accelerator, only_one, run,  # noqa: E402
                       running_statistics, train_step, training_mode)  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")
SELECTIONS = ["", "e", "d", "c", "g", "edcg"]


def steps_of(losses, accumulate=1, **changes):
    "Gradients, weights and running statistics of two steps of seven and six clips, in float64."
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        config = tiny("unused", model="stf", losses=losses, accumulate=accumulate, batch_size=7, lambda_e=1.0, lambda_g=0.1, **changes)
        t = begin(config, TinyStore(20), make_accelerator("cpu"))
        gradients = {}
        with training_mode(t):
            for i, indices in enumerate(epoch_batches(np.arange(13), 7, 0, 0)):
                train_step(t, indices)
                gradients.update({f"{i} {name}": p.grad.clone() for name, p in t.net.named_parameters() if p.requires_grad})
        return {"gradients": gradients, "weights": {k: v.clone() for k, v in t.net.named_parameters()}, "sums": t.sums,
                "statistics": [b.clone() for b in running_statistics(t.net)]}  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)


class Failing(TinyStore):
    def batch(self, indices, **options):
        x, y = super().batch(indices, **options)
        return (x * np.nan if 3 in indices and len(indices) > 1 else x), y


def whole_run(folder, **changes):
    return tiny(folder, model="stf", batch_size=6, epochs=2, validation=0.3, keep_best="ce", ema=0.9, **changes)


def program(folder):
    "What each process does."
    rank = int(os.environ["RANK"])
    told = {"terms": {losses: steps_of(losses) for losses in SELECTIONS}}
    r = run(whole_run(folder / "r"), TinyStore(21), progress=False)
    told["top1"], told["names"] = r.top1, r.scores.names
    again = run(whole_run(folder / "r"), TinyStore(21), progress=False)  # a second one in the same processes: finished already
    told["again"] = again.top1
    a = make_accelerator("cpu")
    told["errors"] = []
    for work in (
        lambda: run(whole_run(folder / "r", lr=0.3), TinyStore(21), progress=False),
        lambda: run(tiny(folder / "n", batch_size=14), Failing(), progress=False),
        lambda: run(tiny(folder / "f", accumulate=4), TinyStore(), progress=False),
        lambda: in_first(a, lambda: 1 / 0),
    ):
        try:
            work()
        except Exception as e:
            told["errors"].append(f"{type(e).__name__}: {e}")
    torch.save(told, folder / f"told{rank}.pt")


def launch(*args, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if args[0] != "notebook" else []
    return subprocess.Popen([sys.executable, *launcher, __file__, *map(str, args)], env={**os.environ, "OMP_NUM_THREADS": "1"},
                            start_new_session=True, **options)  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    "What two processes told, and the folder in which they worked; test workers share it."
    base = tmp_path_factory.getbasetemp()
    with only_one((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two") as folder:
        if not (folder / "told1.pt").exists():
            process = launch("program", folder, stderr=subprocess.PIPE, text=True)
            errors = process.communicate(timeout=300)[1]
            assert process.returncode == 0, errors[-3000:]
    return [torch.load(folder / f"told{rank}.pt", weights_only=False) for rank in (0, 1)], folder


@pytest.mark.parametrize("losses", SELECTIONS)
def test_two_processes_are_one_that_accumulates(two, losses):
    one = steps_of(losses, accumulate=2)
    for told in two[0]:
        many = told["terms"][losses]
        assert many["gradients"].keys() == one["gradients"].keys()
        for part in ("gradients", "weights"):
            for name, value in one[part].items():
                torch.testing.assert_close(many[part][name], value, rtol=1e-10, atol=1e-10, msg=lambda m: f"{part} {name}: {m}")
        assert many["sums"] == pytest.approx(one["sums"], rel=1e-10)
    for a, b in zip(two[0][0]["terms"][losses]["statistics"], one["statistics"]):  # those of the first process
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("losses", SELECTIONS)
def test_every_parameter_has_a_gradient_whatever_the_terms(losses):
    "Or sharing gradients would wait for the missing ones."
    taken = steps_of(losses)
    assert {name.split(" ", 1)[1] for name in taken["gradients"]} == set(taken["weights"])


def test_parts_are_weighted_by_their_clips():
    "Unequal parts: without batch norm the parts' gradient is the whole batch's."
    whole, parts = (steps_of("", accumulate=a, **frozen) for frozen in [FROZEN] for a in (1, 3))
    for name, value in whole["gradients"].items():
        torch.testing.assert_close(parts["gradients"][name], value, rtol=1e-9, atol=1e-12)


FROZEN = {}  # filled by the fixture below: a start whose head alone is trained, so that batch norm is not in play


@pytest.fixture(autouse=True, scope="module")
def frozen(tmp_path_factory, one_thread):
    r = run(tiny(tmp_path_factory.mktemp("f") / "start", model="stf", losses="", epochs=1), TinyStore(), progress=False)
    FROZEN.update(init=str(r.folder), train_only="head")


def test_scores_are_complete_and_in_order_in_every_process(two):
    told, folder = two
    r = Run.load(folder / "r")
    expected = TinyStore(21).names[14:]
    assert r.scores.names == expected and all(t["names"] == expected and t["top1"] == t["again"] == r.top1 for t in told)
    net = r.network()
    x, y = TinyStore(21).batch(np.arange(14, 21))
    np.testing.assert_allclose(r.scores.probabilities, net(x).softmax(1).detach().numpy(), atol=1e-6)
    assert r.record["environment"]["processes"] == 2


def test_history_and_best_are_those_of_one_process_with_two_parts(two, tmp_path):
    r, one = Run.load(two[1] / "r"), run(whole_run(tmp_path / "one", accumulate=2), TinyStore(21), progress=False)
    pd.testing.assert_frame_equal(r.history, one.history, rtol=1e-3, atol=1e-3)
    assert r.record["best"]["epoch"] == one.record["best"]["epoch"] == load_checkpoint(r.folder / "best")[1]["epoch"]


def test_errors_are_told_in_every_process(two):
    for told in two[0]:
        claimed, broken, parts, first = told["errors"]
        assert claimed.startswith("ConfigError") and "lr 0.05 (now 0.3)" in claimed
        assert broken.startswith("FloatingPointError") and "clip3" in broken
        assert parts.startswith("ConfigError") and "can't be cut into 8 parts" in parts
        assert "ZeroDivisionError: division by zero" in first


def long_run(folder):
    return tiny(folder, model="stf", losses="ed", batch_size=6, epochs=6, save_every=1, ema=0.9)


def wait_for_saves(process, folder, n):
    "Wait until a run has written n more checkpoints; False if it ends before."
    written = lambda: {p.stat().st_mtime_ns for p in folder.glob("checkpoint/state.json")}
    seen, count = written(), 0
    while count < n and process.poll() is None:
        try:
            now = written()
        except FileNotFoundError:  # just stepped aside
            continue
        count, seen = count + bool(now - seen), seen | now
        time.sleep(0.01)
    return process.poll() is None


def kill_all(pid, rng):
    "Kill a launcher and its processes, or the launcher alone, whose processes must end by themselves."
    parent = psutil.Process(pid)
    children = parent.children(recursive=True)
    for process in [parent, *(children if rng.random() < 0.5 else [])]:
        process.kill()
    left = psutil.wait_procs(children, timeout=20)[1]
    for process in left:
        process.kill()
    assert not left, "a process went on without its launcher"


@pytest.mark.slow
def test_two_processes_killed_at_random_moments_end_with_the_same_weights(tmp_path):
    assert launch("long", tmp_path / "whole").wait(timeout=300) == 0
    rng, kills, folder = np.random.default_rng(0), 0, tmp_path / "killed"
    while True:
        process = launch("long", folder)
        if kills == 4 or not wait_for_saves(process, folder, rng.integers(1, 5)):
            break
        time.sleep(rng.uniform(0, 0.2))
        kill_all(process.pid, rng)
        process.wait()
        kills += 1
        load_checkpoint(folder)  # whole at any moment
    assert process.wait(timeout=300) == 0 and kills
    assert same(weights(folder), weights(tmp_path / "whole"))
    pd.testing.assert_frame_equal(Run.load(folder).history, Run.load(tmp_path / "whole").history, check_exact=True)


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_after_the_same_step(tmp_path):
    folder = tmp_path / "r"
    process = launch("patient", folder, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (folder / "checkpoint" / "state.json").exists() and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and both processes
    errors = process.communicate(timeout=120)[1]
    assert process.returncode != 0 and "nothing is lost" in errors
    state = json.loads((folder / "checkpoint" / "state.json").read_text())
    assert state["processes"] == 2 and 0 < state["epoch"] + state["step"] < 1000


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


def test_a_network_of_ones_own_is_trained_saved_and_resumed(tmp_path):
    "Entered in NETWORKS, nothing else."

    class Own(STFNet):
        hparams = (*STFNet.hparams,)

    NETWORKS["own"] = Own
    try:
        r = run(tiny(tmp_path / "o", model="own", losses="d", epochs=1), TinyStore(), progress=False)
        assert type(r.network()) is Own and "d" in r.history
        stage = r.config.second_stage("dc")
        assert stage.model == "own" and run(stage.replace(epochs=1), TinyStore(), progress=False).history["c"].notna().all()
    finally:
        del NETWORKS["own"]
    with pytest.raises(ConfigError, match="model 'own' is unknown"):
        tiny(tmp_path, model="own")
    with pytest.raises(ValueError, match="'own' is not known"):
        load_checkpoint(r.folder)


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
    assert asdict(tiny(where))
