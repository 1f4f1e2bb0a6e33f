"""Training: configurations, checkpoints whole at every moment, exact resume after kill -9 and Ctrl-C, determinism, NaN."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import stf.train as train
from safetensors.torch import save as to_bytes
from stf.backbone import MSG3D
from stf.clips import Clip, class_names
from stf.train import BENCHMARKS, OTHERS
from stf.dataset import ClipStore
from stf.skeleton import SKELETONS, Skeleton
from stf.train import (Config, ConfigError, Run, epoch_batches, learning_rate, load_checkpoint, make_header, presets,
                       run, run_stf, save_checkpoint, start_from)

pytestmark = pytest.mark.usefixtures("one_thread")
HAND = Skeleton("hand", ("wrist", "palm", "tip"), ((1, 0), (2, 1)), centre=0, height=(0, 1, 2))


class TinyStore:
    "Twenty clips of a three-joint hand in memory; three classes that can be told apart."

    def __init__(self, n=20, channels=4, seed=0):
        self.names, self.labels = [f"clip{i}" for i in range(n)], np.arange(n) % 3
        self.classes, self.skeleton, self.channels = ["up", "down", "still"], HAND, channels
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(n, channels, 8, 3, 1)).astype(np.float32)
        self.x[:, 1] += (self.labels[:, None, None, None] - 1) * np.linspace(0, 2, 8)[:, None, None]

    def __len__(self):
        return len(self.names)

    def split(self, protocol):
        return np.arange(0, 14), np.arange(14, len(self))

    def batch(self, indices, stream="joint", preprocess="paper", length=8, num_bodies=1, device=None, dtype=torch.float32):
        x = torch.from_numpy(self.x[np.asarray(indices)]).to(device=device, dtype=dtype)
        return x, torch.as_tensor(self.labels[np.asarray(indices)], device=device)


def tiny(folder, **changes):
    base = dict(name="tiny", folder=str(folder), data="nowhere", widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,), length=8,
                num_bodies=1, batch_size=5, epochs=3, milestones=(2,), device="cpu")  # fmt: skip
    return Config(**{**base, **changes})


def weights(folder):
    return load_checkpoint(folder)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- configurations


def test_every_preset_is_a_config_and_survives_json():
    assert len(presets()) == len(set(presets())) == 3 * 2 * (len(BENCHMARKS) + len(OTHERS)) and len(BENCHMARKS) == 5
    for name in presets():
        config = Config.preset(name)
        assert Config.from_json(config.to_json()) == config and config.name == name


@pytest.mark.parametrize("name, lr, epochs, milestones, stage_lr", [
    ("ntu60-xsub-joint", 0.05, 50, (20, 35, 45), 1e-3), ("ntu60-xview-bone", 0.05, 50, (20, 35, 45), 1e-3),
    ("ntu120-xsub-bone", 0.05, 60, (20, 35, 50), 5e-4), ("ntu120-xset-joint", 0.05, 60, (20, 35, 50), 5e-4),
    ("kinetics-joint", 0.05, 65, (25, 40, 55), 1e-4), ("kinetics-bone", 0.05, 65, (25, 40, 55), 1e-4)])  # fmt: skip
def test_paper_presets(name, lr, epochs, milestones, stage_lr):
    base, e, dcg = (Config.preset(name + tail) for tail in ("", "-stf-e", "-stf-dcg"))
    assert (base.lr, base.epochs, base.milestones, base.batch_size, base.weight_decay, base.length) == (lr, epochs, milestones, 32, 5e-4, 300)
    assert base.momentum == 0.9 and base.nesterov and base.stream == name.rsplit("-", 1)[1] and base.model == "msg3d"
    for stage in (e, dcg):
        assert stage.lr == stage_lr and stage.model == "stf" and stage.init == str(base.run_folder)
        assert (stage.lambda_e, stage.lambda_d, stage.lambda_c, stage.lambda_g) == (0.01, 0.1, 0.1, 0.01)
    assert asdict(e.loss_weights) == dict(e=0.01, d=0, c=0, g=0) and asdict(dcg.loss_weights) == dict(e=0, d=0.1, c=0.1, g=0.01)
    assert asdict(base.loss_weights) == dict(e=0, d=0, c=0, g=0)


@pytest.mark.parametrize("make, message", [
    (lambda: Config(batchsize=3), "batch_size"), (lambda: Config().replace(ephocs=3), "epochs"),
    (lambda: Config.preset("ntu60-xsub-joints"), "ntu60-xsub-joint"), (lambda: Config.preset("ntu60-xsub-joint", strem="bone"), "stream"),
    (lambda: Config.from_json('{"version": 1, "widhts": [6]}'), "widths"), (lambda: Config.from_json('{"version": 2}'), "version 2"),
    (lambda: Config(stream="bones"), "'bone'"), (lambda: Config(model="sft"), "'stf'"), (lambda: Config(epochs=0), "epochs must be at least 1"),
    (lambda: Config(lr=-1), "lr must not be negative"), (lambda: Config(lr=float("nan")), "lr must be of type float"),
    (lambda: Config(seed=1.5), "seed must be of type int"), (lambda: Config(widths=(6, 6.5)), "widths must be a list of whole numbers"),
    (lambda: Config(losses="x", model="stf"), "unknown: x"), (lambda: Config(validation=1.0), "validation is a share"),
    (lambda: Config(lambda_g=0.1, losses="g"), "needs model='stf'"), (lambda: Config(nesterov=1), "nesterov must be of type bool"),
    (lambda: Config(widths=(6, 6)), "three"), (lambda: Config(windows=(2,)), "odd"), (lambda: Config(momentum=0.0), "nesterov"),
])  # fmt: skip
def test_config_errors_say_what_to_write_instead(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_learning_rate_and_order_are_functions_of_the_epoch():
    config = Config(lr=0.05, milestones=(2, 4))
    assert np.allclose([learning_rate(config, e) for e in range(6)], [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    for n in (1, 5, 31, 32, 33, 70):
        batches = epoch_batches(np.arange(100, 100 + n), 32, seed=1, epoch=2)
        assert sorted(np.concatenate(batches)) == list(range(100, 100 + n)) and max(map(len, batches)) <= 32
        assert max(map(len, batches)) - min(map(len, batches)) <= 1


# ---- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    r = run(tiny(tmp_path_factory.mktemp("whole") / "r"), TinyStore(), progress=False)
    torch.set_num_threads(threads)
    return r


def test_run_is_deterministic_by_seed_and_leaves_the_global_generator_alone(tmp_path, whole):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = run(tiny(tmp_path / "a"), TinyStore(), progress=False)
    assert torch.equal(before, torch.get_rng_state())
    other = run(tiny(tmp_path / "b", seed=1), TinyStore(), progress=False)
    assert same(weights(again.folder), weights(whole.folder)) and not same(weights(other.folder), weights(whole.folder))
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)
    assert again.top1 == whole.top1 and np.array_equal(again.scores.probabilities, whole.scores.probabilities)


def test_run_record(whole):
    assert list(whole.history["epoch"]) == [1, 2, 3] and np.allclose(whole.history["lr"], [0.05, 0.05, 0.005])
    assert whole.scores.names == [f"clip{i}" for i in range(14, 20)]
    env = whole.record["environment"]
    assert env["torch"] == torch.__version__ and env["threads"] == 1 and env["device"] == "cpu"
    assert "test_top1" not in whole.history  # the test split is scored once, at the end
    net, header = load_checkpoint(whole.folder)
    assert not net.training and header["classes"] == ["up", "down", "still"] and header["epoch"] == 3
    assert header["skeleton"]["name"] == "hand" and header["config"]["epochs"] == 3 and header["stream"] == "joint"
    assert any((whole.folder / "tensorboard").iterdir())


def test_finished_run_is_returned_at_once_and_another_config_is_refused(whole, monkeypatch):
    monkeypatch.setattr(train, "begin", lambda *a: pytest.fail("trained again"))
    again = run(whole.config, progress=False)  # the store does not even exist
    assert again.top1 == whole.top1 and same(weights(again.folder), weights(whole.folder))
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        run(whole.config.replace(lr=0.01), progress=False)
    assert Run.load(whole.folder).config == whole.config


def test_a_run_is_known_by_its_data_not_by_where_they_lie(tmp_path, whole):
    config = tiny(tmp_path / "d", epochs=1)
    first = run(config, TinyStore(), progress=False)
    assert run(config.replace(data="moved/nowhere"), TinyStore(), progress=False).top1 == first.top1
    with pytest.raises(ConfigError, match="on other data"):
        run(config, TinyStore(n=21), progress=False)
    stage = config.replace(model="stf", losses="", init=str(first.folder))
    assert not train.same_config(stage, stage.replace(init=f"elsewhere/{first.folder.name}"))
    assert train.same_config(stage, stage.replace(init="elsewhere/other")) == ["init"]


def test_validation_clips_leave_the_training_set(tmp_path):
    store = TinyStore()
    config = tiny(tmp_path / "v", validation=0.3, evaluate_every=2, epochs=2)
    fit, val, test = train.splits(store, config)
    assert sorted([*fit, *val]) == list(range(14)) and len(val) == 5 and list(test) == list(range(14, 20))
    history = run(config, store, progress=False).history
    assert history["val_top1"].notna().all() and history["test_top1"].isna().tolist() == [True, False]


def test_weights_only_checkpoint_can_be_replaced_and_read(tmp_path, whole):
    net, header = load_checkpoint(whole.folder)
    save_checkpoint(tmp_path / "w", net, header)
    save_checkpoint(tmp_path / "w", net, header)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w"] and [p.name for p in (tmp_path / "w").iterdir()] == ["weights.safetensors"]
    assert same(weights(tmp_path / "w"), weights(whole.folder))


@pytest.mark.parametrize("spoil, error, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:100]), ValueError, "weights.safetensors: not a readable"),
    (lambda p: p.write_bytes(to_bytes({"a": torch.zeros(1)})), ValueError, "header format None"),
    (lambda p: p.write_bytes(to_bytes({"a": torch.zeros(1)}, {"format": "7"})), ValueError, "header format 7"),
])  # fmt: skip
def test_spoilt_checkpoints_are_refused(tmp_path, whole, spoil, error, message):
    net, header = load_checkpoint(whole.folder)
    save_checkpoint(tmp_path / "w", net, header)
    spoil(tmp_path / "w" / "weights.safetensors")
    with pytest.raises(error, match=message):
        load_checkpoint(tmp_path / "w")


# ---- the second stage


def test_stf_starts_from_every_tensor_of_the_baseline(tmp_path, whole):
    stage = tiny(tmp_path / "s", name="s", model="stf", losses="", init=str(whole.folder))
    header = make_header(stage, TinyStore())
    torch.manual_seed(5)
    fresh = train.build_network(header).state_dict()
    net = start_from(train.build_network(header), whole.folder, header)
    base = weights(whole.folder)
    own = [k for k in net.state_dict() if k.startswith("stf.")]
    assert own and all(torch.equal(v, net.state_dict()[k]) for k, v in base.items()) and set(net.state_dict()) == set(base) | set(own)
    assert set(fresh) == set(net.state_dict())
    x = TinyStore().batch([0, 1, 2])[0].double()
    plain = load_checkpoint(whole.folder)[0].double()
    torch.testing.assert_close(net.double().eval()(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change, message", [
    (dict(stream="bone"), "its stream is 'joint', this training's 'bone'"), (dict(gcn_scales=3), "its gcn_scales is 2"),
    (dict(preprocess="msg3d"), "its preprocess")])  # fmt: skip
def test_a_baseline_of_something_else_is_refused(tmp_path, whole, change, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny(tmp_path / "s", model="stf", init=str(whole.folder), **change), TinyStore(), progress=False)


def test_an_stf_network_is_no_start_for_msg3d(tmp_path):
    stf = run(tiny(tmp_path / "s", model="stf", losses="", epochs=1), TinyStore(), progress=False)
    with pytest.raises(ConfigError, match=r"unknown \['stf\."):
        run(tiny(tmp_path / "m", init=str(stf.folder)), TinyStore(), progress=False)
    run(tiny(tmp_path / "t", model="stf", losses="", epochs=1, init=str(stf.folder)), TinyStore(), progress=False)


def test_run_stf_chains_and_averages(tmp_path):
    config = tiny(tmp_path / "m", epochs=2, stf_epochs=1, stf_lr=1e-3)
    both = run_stf(config, TinyStore(), progress=False)
    e, dcg = both.runs["Le"], both.runs["M4"]
    assert e.config.init == dcg.config.init == str(both.runs["M1"].folder)
    assert {"ce", "e"} <= set(e.history) and {"ce", "d", "c", "g"} <= set(dcg.history) and "e" not in dcg.history
    assert np.allclose(both.scores.probabilities, (e.scores.probabilities + dcg.scores.probabilities) / 2)


# ---- what goes wrong


def test_nan_names_the_clips_and_leaves_the_last_checkpoint(tmp_path):
    store, config = TinyStore(), tiny(tmp_path / "n")
    bad = epoch_batches(np.arange(14), 5, config.seed, 1)[1][0]  # a clip of epoch 2, step 2
    config1 = config.replace(epochs=1)
    good = run(config1.replace(folder=str(tmp_path / "good")), store, progress=False)

    class Spoilt(TinyStore):
        calls = 0

        def batch(self, indices, **options):
            x, y = super().batch(indices, **options)
            Spoilt.calls += 1
            return (x * float("nan") if Spoilt.calls > 3 and bad in indices else x), y

    with pytest.raises(FloatingPointError, match=rf"epoch 2, step 2: .*Clips of this step: .*clip{bad}\b"):
        run(config, Spoilt(), progress=False)
    assert same(weights(config.run_folder), weights(good.folder))
    assert same(weights(run(config, store, progress=False).folder), weights(run(tiny(tmp_path / "w"), store, progress=False).folder))


@pytest.fixture
def interruptible():
    """A process started in the background may ignore Ctrl-C; this one listens."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_the_step_and_resumes_exactly(tmp_path, whole, capsys, interruptible):
    class Pressing(TinyStore):
        calls = 0

        def batch(self, indices, **options):
            Pressing.calls += list(indices) != [0]  # the header looks at one clip
            if list(indices) != [0] and Pressing.calls in (2, 6):
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices, **options)

    config = tiny(tmp_path / "c")
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1 of 3, nothing is lost"):
        run(config, Pressing(), progress=False)
    state = json.loads((config.run_folder / "checkpoint" / "state.json").read_text())
    assert state["epoch"] == 0 and state["step"] == 2
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2"):
        run(config, Pressing(), progress=False)
    again = run(config, TinyStore(), progress=False)
    assert same(weights(again.folder), weights(whole.folder))
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_works_outside_the_main_thread(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tiny(tmp_path / "t"), TinyStore(), progress=False)))
    thread.start(), thread.join()
    assert same(weights(results[0].folder), weights(whole.folder))


def test_errors_before_training(tmp_path, monkeypatch):
    with pytest.raises(Exception, match="nowhere"):
        run(tiny(tmp_path / "x"), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA device"):
            run(tiny(tmp_path / "y", device="cuda"), TinyStore(), progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="several processes"):
        run(tiny(tmp_path / "z"), TinyStore(), progress=False)


VARIANTS = {
    "accumulate": dict(accumulate=2),
    "ema": dict(ema=0.9),
    "bf16": dict(precision="bf16"),
    "all": dict(model="stf", losses="ed", accumulate=2, ema=0.9, precision="bf16", clip_grad=1.0, schedule="cosine", warmup=1, control="random"),
}


SERVER = """
    import json, os, shutil, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import torch; torch.set_num_threads(1)
    from pathlib import Path
    import test_train as t
    for line in sys.stdin:
        folder, changes, kill_at = json.loads(line)
        pid = os.fork()
        if pid == 0:
            try:
                if kill_at:
                    t.die_at(kill_at)
                t.run(t.tiny(folder, **changes), t.TinyStore(), progress=False)
                os._exit(0)
            except BaseException as e:
                print(repr(e), file=sys.stderr)
                os._exit(1)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
"""


def die_at(n):
    "Kill this process before the n-th time that something reaches the disk or gets its name."
    calls = []

    def counted(real):
        def call(*args, **options):
            calls.append(real)
            if len(calls) == n:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return call

    for module, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (os, "unlink")]:
        setattr(module, name, counted(getattr(module, name)))


@pytest.fixture
def child():
    "Starts a run in a process of its own, kills it after a delay or at some write (or lets it end); (exit status, seconds)."
    if not hasattr(os, "fork"):
        pytest.skip("needs fork to start processes quickly")
    here = Path(__file__).resolve().parent
    code = textwrap.dedent(SERVER).format(tests=str(here), root=str(here.parent))
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(folder, changes, delay=None, kill_at=0):
        server.stdin.write(json.dumps([str(folder), changes, kill_at]) + "\n"), server.stdin.flush()
        pid, started = int(server.stdout.readline()), time.perf_counter()
        if delay is not None:
            time.sleep(delay)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        status = int(server.stdout.readline())
        return status, time.perf_counter() - started

    yield start
    server.stdin.close()
    assert server.wait(timeout=20) == 0


def is_whole(folder):
    "A checkpoint, if there is one, can be read at any moment."
    if (folder / "checkpoint").exists() or (folder / "checkpoint.old").exists():
        load_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(save_every=1), dict(save_every=1, validation=0.3, keep_best="ce", **VARIANTS["all"])], ids=["epochs", "steps", "all"])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, child, changes):
    rng, kills, finished = np.random.default_rng(len(changes)), 0, 0
    status, alone = child(tmp_path / "timed", changes)
    whole = Run.load(tmp_path / "timed")
    assert status == 0
    while kills < 7:
        folder, here_kills = tmp_path / f"r{finished}", 0
        while True:
            patient = here_kills > 5  # let it end, so that the ends are compared several times
            status, took = child(folder, changes, None if patient else rng.uniform(0.02, 0.6 * alone))
            if status == 0:
                alone = min(alone, took)
                break
            assert status == signal.SIGKILL, f"died of something else: status {status}"
            kills, here_kills = kills + 1, here_kills + 1
            is_whole(folder)
        finished += 1
        assert same(weights(folder), weights(whole.folder))
        assert not changes.get("keep_best") or same(weights(folder / "best"), weights(whole.folder / "best"))
        pd.testing.assert_frame_equal(Run.load(folder).history, whole.history, check_exact=True)


@pytest.mark.slow
def test_killed_at_each_write_a_run_ends_with_the_same_weights(tmp_path, child):
    changes = dict(epochs=2, milestones=[1], validation=0.3, keep_best="ce")
    assert child(tmp_path / "whole", changes)[0] == 0
    whole, moment = weights(tmp_path / "whole"), 0
    while True:
        moment, folder = moment + 1, tmp_path / f"r{moment}"
        status, _ = child(folder, changes, kill_at=moment)
        if status == 0:
            break  # it made fewer writes than that
        assert status == signal.SIGKILL
        is_whole(folder)
        if moment % 3:  # every third one is also taken to its end
            continue
        assert child(folder, changes)[0] == 0
        assert same(weights(folder), whole) and not list(folder.glob("*.new")), f"killed at write {moment}"
        assert same(weights(folder / "best"), weights(tmp_path / "whole" / "best"))
    assert moment > 20


# ---- precision, parts, averages, schedules


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("bf16", "all") else pytest.mark.slow) for n in VARIANTS])
def test_every_variant_resumes_exactly(tmp_path, name, interruptible):
    class Pressing(TinyStore):
        calls = 0

        def batch(self, indices, **options):
            self.calls += 1
            if self.calls == 5:
                os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
            return super().batch(indices, **options)

    options = dict(epochs=2, milestones=(1,), **VARIANTS[name])
    first = run(tiny(tmp_path / "w", **options), TinyStore(), progress=False)
    config = tiny(tmp_path / "c", **options)
    with pytest.raises(KeyboardInterrupt, match="nothing is lost"):
        run(config, Pressing(), progress=False)
    again = run(config, TinyStore(), progress=False)
    assert same(weights(again.folder), weights(first.folder)) and again.history.equals(first.history)
    assert np.isfinite(first.history["loss"]).all() and all(v.dtype != torch.bfloat16 for v in weights(first.folder).values())


def test_moving_average_is_what_is_scored_and_kept(tmp_path):
    config = tiny(tmp_path / "e", ema=0.5, epochs=1)
    r = run(config, TinyStore(), progress=False)
    seen = {}
    with train.own_randomness():
        t = train.begin(config, TinyStore(), train.make_accelerator("cpu"))
        train.seed_epoch(t)
        mean = {k: v.clone() for k, v in t.net.named_parameters()}
        with train.training_mode(t):
            for step, indices in enumerate(epoch_batches(t.train, 5, 0, 0)):
                train.train_step(t, indices)
                d = min(0.5, (1 + step) / (10 + step))
                mean = {k: d * m + (1 - d) * v.detach() for (k, m), v in zip(mean.items(), t.net.parameters())}
    seen = dict(r.network().named_parameters())
    for k, m in mean.items():
        torch.testing.assert_close(seen[k].detach(), m.detach(), rtol=1e-5, atol=1e-7)
    x, _ = TinyStore().batch(np.arange(14, 20))
    np.testing.assert_allclose(r.scores.probabilities, r.network()(x).softmax(1).detach(), atol=1e-6)


def test_gradient_is_clipped(tmp_path):
    t = train.begin(tiny(tmp_path / "g", clip_grad=1e-3), TinyStore(), train.make_accelerator("cpu"))
    with train.training_mode(t):
        train.train_step(t, np.arange(5))
    norm = torch.nn.utils.get_total_norm([p.grad for p in t.net.parameters()])
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_schedules():
    cosine = Config(lr=0.1, epochs=15, schedule="cosine", warmup=5)
    assert np.allclose([learning_rate(cosine, e) for e in (0, 4, 5, 10)], [0.02, 0.1, 0.1, 0.05]) and 0 < learning_rate(cosine, 14) < 0.003
    assert learning_rate(Config(warmup=2), 0) == 0.025 and learning_rate(Config(warmup=2), 2) == 0.05


@pytest.mark.parametrize("make, message", [
    (lambda: Config(precision="fp8"), "did you mean 'fp16'"), (lambda: Config(precision="fp16", device="cpu"), "on the CPU use bf16"),
    (lambda: Config(accumulate=0), "accumulate must be at least 1"), (lambda: Config(ema=1.0), "ema is a decay"),
    (lambda: Config(warmup=50), "warmup must be shorter"), (lambda: Config(keep_best="ce"), "needs validation clips"),
    (lambda: Config(keep_best="loss", validation=0.1), "keep_best 'loss' is unknown"), (lambda: Config(fraction=0.0), "fraction is a share"),
    (lambda: Config(sync_bn=True, model="stf"), "no second derivative"), (lambda: Config(train_only="head"), "needs a trained network"),
    (lambda: Config(classes="abc"), "classes must be a list of names"), (lambda: Config(classes=("a",)), "at least two"),
    (lambda: Config(bodies="motion", preprocess="msg3d"), "is for preprocess='paper'"), (lambda: Config(aug_flip=2.0), "aug_flip must be"),
    (lambda: Config(acumulate=2), "did you mean 'accumulate'"), (lambda: Config(schedule="cosin"), "did you mean 'cosine'"),
    (lambda: Config.from_json("{"), "not the JSON"), (lambda: Config(dropout=1.0), "dropout is a share"),
])  # fmt: skip
def test_new_settings_are_checked(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_configurations_of_old_runs_are_read():
    import stf.stgcn  # noqa: F401  its records name its network

    root = Path(__file__).resolve().parent.parent / "data" / "results"
    records = [json.loads(p.read_text()) for p in root.rglob("*.json")]
    held = [r["config"] for r in records if isinstance(r, dict) and "config" in r]
    for values in held:
        config = Config.from_json(json.dumps(values))
        assert (config.precision, config.accumulate, config.ema, config.fraction, config.bodies) == ("float32", 1, 0.0, 1.0, "spread") or "accumulate" in values
    assert held


def test_a_config_is_printed_saved_and_loaded(tmp_path):
    config = Config.preset("kinetics-bone-stf-e", accumulate=4, classes=["abseiling", "archery"])
    assert Config.load(config.save(tmp_path / "c.json")) == config
    assert "* accumulate      4" in str(config) and "  batch_size      32" in str(config)


def test_all_names_come_with_a_star():
    names = {}
    exec("from stf.train import *", names)
    assert {"Config", "run", "run_stf", "preset", "presets", "second_stage", "load_checkpoint", "save_checkpoint", "publish", "import_msg3d"} <= set(names)


# ---- which clips, which layers


def test_fraction_is_of_the_training_clips(tmp_path):
    part, val, test = train.splits(TinyStore(), tiny(tmp_path, fraction=0.5))
    assert len(part) == 7 and set(part) < set(range(14)) and len(test) == 6
    of_class = np.bincount(TinyStore().labels[train.splits(TinyStore(), tiny(tmp_path, fraction=0.4, stratified=True))[0]])
    assert of_class.tolist() == [2, 2, 2]
    r = run(tiny(tmp_path / "f", fraction=0.5, epochs=1), TinyStore(), progress=False)
    assert r.record["clips"] == [7, 0, 6]


def test_only_the_head_is_trained_and_other_classes_get_a_fresh_one(tmp_path, whole):
    other = TinyStore()
    other.classes, other.labels = ["left", "right"], np.arange(20) % 2
    changes = dict(init=str(whole.folder), epochs=1)
    with pytest.raises(ConfigError, match="its classes is"):
        run(tiny(tmp_path / "a", **changes), other, progress=False)
    r = run(tiny(tmp_path / "b", train_only="head", lr=0.5, **changes), other, progress=False)
    before, after = weights(whole.folder), weights(r.folder)
    assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("fc."))
    assert after["fc.weight"].shape == (2, 6)
    kept = run(tiny(tmp_path / "c", train_only="head", lr=0.5, **changes), TinyStore(), progress=False)
    moved = weights(kept.folder)["fc.weight"]
    assert moved.shape == (3, 6) and not torch.equal(moved, before["fc.weight"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A real store of thirty clips of three classes, of changing length."
    rng, made = np.random.default_rng(0), []
    for i in range(30):
        joints = np.cumsum(rng.normal(0, 0.1, (1, int(rng.integers(5, 12)), 3, 3)), axis=1).astype(np.float32) + np.arange(3, dtype=np.float32)[:, None]
        made.append(Clip(joints, np.ones(joints.shape[:3], np.float32), f"c{i}", label=i % 3, class_name="abc"[i % 3], skeleton=HAND,
                         split={"mine": "train" if i < 20 else "test"}))  # fmt: skip
    return ClipStore.build(made, tmp_path_factory.mktemp("clips") / "store", progress=False)


def test_some_classes_only(tmp_path, clips):
    r = run(tiny(tmp_path / "s", protocol="mine", classes=("c", "a"), epochs=1), clips, progress=False)
    assert r.scores.classes == ["c", "a"] and r.record["clips"] == [13, 0, 7] and load_checkpoint(r.folder)[1]["classes"] == ["c", "a"]
    with pytest.raises(ValueError, match="'d'"):
        run(tiny(tmp_path / "t", protocol="mine", classes=("a", "d")), clips, progress=False)


def test_augmented_clips_resume_exactly_and_change_with_the_epoch(tmp_path, clips, interruptible):
    options = dict(protocol="mine", aug_rotate=20.0, aug_crop=0.5, aug_drop_joints=0.2, accumulate=2, time="resize")
    first = run(tiny(tmp_path / "w", **options), clips, progress=False)

    class Pressing:
        calls = 0

        def __getattr__(self, name):
            return getattr(clips, name)

        def batch(self, indices, **more):
            self.calls += 1
            if self.calls == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return clips.batch(indices, **more)

    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "c", **options), Pressing(), progress=False)
    again = run(tiny(tmp_path / "c", **options), clips, progress=False)
    assert same(weights(again.folder), weights(first.folder))
    assert load_checkpoint(first.folder)[1]["time"] == "resize"
    t = train.begin(tiny(tmp_path / "t", **options), clips, train.make_accelerator("cpu"))
    x = [t.batch([0, 1], **train.variants(t)).x]
    t.epoch = 1
    x += [t.batch([0, 1], **train.variants(t)).x, t.batch([0, 1]).x]
    assert not torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2])


# ---- best, disk, memory


def test_best_epoch_is_chosen_on_validation_clips_and_top1_is_the_last_ones(tmp_path, monkeypatch):
    values = iter([40.0, 60.0, 60.0, 50.0])
    monkeypatch.setattr(train, "top_k", lambda scores, k=1: next(values) if len(scores) == 5 else 7.0)
    r = run(tiny(tmp_path / "b", validation=0.3, keep_best="accuracy", epochs=4), TinyStore(), progress=False)
    assert r.record["best"] == {"epoch": 2, "value": 60.0}  # the first of equals
    header = load_checkpoint(r.folder / "best")[1]
    assert header["epoch"] == 2 and header["val_top1"] == 60.0 and load_checkpoint(r.folder)[1]["epoch"] == 4
    assert not same(weights(r.folder), weights(r.folder / "best")) and r.top1 == 7
    assert same(dict(r.network(best=True).state_dict()), weights(r.folder / "best"))


def test_best_by_cross_entropy(tmp_path):
    r = run(tiny(tmp_path / "b", validation=0.3, keep_best="ce", epochs=3), TinyStore(), progress=False)
    assert r.record["best"]["epoch"] == int(r.history["val_ce"].argmin()) + 1
    x, y = TinyStore().batch(train.splits(TinyStore(), r.config)[1])
    ce = torch.nn.functional.cross_entropy(r.network(best=True)(x), y)
    assert float(ce.detach()) == pytest.approx(r.history["val_ce"].min(), rel=1e-4)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, whole, monkeypatch):
    calls, real = [], os.fsync

    def fsync(f):
        calls.append(f)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(f)

    config = tiny(tmp_path / "d")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"no room left on the disk of .*d.*: make room, then start the same run again"):
        run(config, TinyStore(), progress=False)
    monkeypatch.undo()
    assert not list(config.run_folder.glob("*.new")) and load_checkpoint(config.run_folder)
    assert same(weights(run(config, TinyStore(), progress=False).folder), weights(whole.folder))


@pytest.fixture
def small_disk(tmp_path):
    "A disk of one megabyte."
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip("a small disk can be made by root on Linux only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk, whole):
    config = tiny(small_disk / "r", save_every=1)
    filler = small_disk / "filler"
    filler.write_bytes(b"0" * (shutil.disk_usage(small_disk).free - 60_000))
    with pytest.raises(OSError, match="make room"):
        run(config, TinyStore(), progress=False)
    filler.unlink()
    assert same(weights(run(config, TinyStore(), progress=False).folder), weights(whole.folder))


class Hungry(TinyStore):
    "More than four clips at a time don't fit, from the n-th batch on."

    def __init__(self, error, n=0):
        super().__init__()
        self.error, self.n = error, n

    def batch(self, indices, **options):
        self.n -= len(indices) > 1
        if self.n < 0 and 4 < len(indices) < 6:
            raise self.error
        return super().batch(indices, **options)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")])  # fmt: skip
def test_out_of_memory_says_what_to_change(tmp_path, error):
    config = tiny(tmp_path / "o")
    with pytest.raises(train.OutOfMemory, match=r"epoch 1, step 1: .* 5 clips of 8 frames .* accumulate=2 .*precision='bf16'.*batch_size=2"):
        run(config, Hungry(error), progress=False)


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_parts(tmp_path, whole):
    config = tiny(tmp_path / "o")
    with pytest.raises(train.OutOfMemory, match="epoch 2, step 2"):
        run(config, Hungry(MemoryError(), 4), progress=False)
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        run(config.replace(lr=0.01), TinyStore(), progress=False)
    r = run(config.replace(accumulate=2), Hungry(MemoryError()), progress=False)
    assert r.record["changes"] == [{"epoch": 1, "step": 0, "accumulate": [1, 2]}] and r.config.accumulate == 2
    assert r.history.iloc[0].equals(whole.history.iloc[0]) and not r.history.equals(whole.history)
    with pytest.raises(ConfigError, match="accumulate 2 .now 1."):  # a finished run is of one configuration
        run(config, TinyStore(), progress=False)


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="^something else$"):
        run(tiny(tmp_path / "o"), Hungry(RuntimeError("something else")), progress=False)


def test_before_the_first_checkpoint_anything_may_be_changed(tmp_path):
    config = tiny(tmp_path / "o")
    with pytest.raises(train.OutOfMemory):
        run(config, Hungry(MemoryError()), progress=False)
    assert run(config.replace(batch_size=3, lr=0.01, epochs=1), Hungry(MemoryError()), progress=False).config.lr == 0.01


def test_fp16_may_leave_out_steps_but_not_for_ever(tmp_path):
    t = train.begin(tiny(tmp_path / "x"), TinyStore(), train.make_accelerator("cpu"))
    t.accelerator = SimpleNamespace(scaler=object())
    ask = lambda loss, norm: train.check_finite(t, 1, [0, 1], ["right", "ce"], [1.0, loss], norm)
    for _ in range(5):
        ask(0.5, float("inf"))
    ask(0.5, 1.0)
    assert "left_out" not in t.sums
    with pytest.raises(FloatingPointError, match="clip0, clip1"):
        ask(float("nan"), 1.0)
    with pytest.raises(FloatingPointError, match="gradient norm inf"):
        for _ in range(train.PATIENCE):
            ask(0.5, float("inf"))


def test_numbers_that_come_a_step_late_still_stop_the_run(tmp_path):
    "As on a GPU: the step after has begun when the loss is looked at."
    t = train.begin(tiny(tmp_path / "x"), TinyStore(), train.make_accelerator("cpu"))
    event = SimpleNamespace(synchronize=lambda: None)
    good, bad = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([1.0, 0.0, 1.0, float("nan")])
    for step, values in [(1, good), (2, bad)]:
        t.noted.append((step, [step], ["right", "ce"], values, event))
    train.settle(t, keep=1)
    assert t.sums == {"clips": 1, "right": 1.0, "ce": 0.5}
    with pytest.raises(FloatingPointError, match="step 2: .*clip2"):
        t.save()
    assert not (t.config.run_folder / "checkpoint").exists()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_training_is_the_eager_one_and_resumes(tmp_path, interruptible):
    options = dict(model="stf", losses="dcg", epochs=2, milestones=(), lr=1e-4, batch_size=7)  # parts of one size: one program; small steps: no chaos
    eager = run(tiny(tmp_path / "e", **options), TinyStore(), progress=False)

    class Pressing(TinyStore):
        calls = 0

        def batch(self, indices, **more):
            self.calls += 1
            if self.calls == 3:
                os.kill(os.getpid(), signal.SIGINT)
            return super().batch(indices, **more)

    config = tiny(tmp_path / "c", compile=True, **options)
    with pytest.raises(KeyboardInterrupt):
        run(config, Pressing(), progress=False)
    compiled = run(config, TinyStore(), progress=False)
    other = run(config.replace(folder=str(tmp_path / "d")), TinyStore(), progress=False)
    assert same(weights(compiled.folder), weights(other.folder))
    pd.testing.assert_frame_equal(compiled.history, eager.history, rtol=1e-3, atol=1e-3)


# ---- published weights


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    "A thin MS-G3D of NTU 60 in a file as the public code writes it, and the network."
    torch.manual_seed(0)
    net = MSG3D(60, SKELETONS["ntu25"], widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,)).eval()
    file = tmp_path_factory.mktemp("public") / "ntu60-xsub-joint.pt"
    torch.save(net.state_dict(), file)
    return file, net


def spoilt(public, folder, change):
    file, net = public
    state = change({k: v.clone() for k, v in net.state_dict().items()})
    torch.save(state, folder / "spoilt.pt")
    return folder / "spoilt.pt"


@pytest.mark.parametrize("change", [lambda s: s, lambda s: {f"module.{k}": v for k, v in s.items()}, lambda s: {"state_dict": s, "epoch": 3},
                                    lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}])  # fmt: skip
def test_public_weights_are_imported(tmp_path, public, change):
    train.import_msg3d(spoilt(public, tmp_path, change), tmp_path / "ours", stream="bone")
    net, header = load_checkpoint(tmp_path / "ours")
    x = torch.randn(2, 3, 20, 25, 2)
    assert torch.equal(net(x), public[1](x))
    told = {k: header[k] for k in ("model", "stream", "preprocess", "length", "in_channels", "num_bodies", "num_classes")}
    assert told == dict(model="msg3d", stream="bone", preprocess="msg3d", length=300, in_channels=3, num_bodies=2, num_classes=60)
    assert header["classes"][:2] == ["drink water", "eat meal/snack"] and header["skeleton"]["name"] == "ntu25"


def without(*names):
    return lambda s: {k: v for k, v in s.items() if not k.startswith(names)}


@pytest.mark.parametrize("change, options, message", [
    (lambda s: s, dict(), "stream='joint' or 'bone'"), (lambda s: s, dict(stream="bones"), "did you mean 'bone'"),
    (lambda s: s, dict(stream="joint", classes=list("abc")), r"60 outputs \(fc.weight\), but 3 class names"),
    (lambda s: s, dict(stream="joint", skeleton="kinect20"), "25 joints; skeleton 'kinect20' has 20"),
    (lambda s: s, dict(stream="joint", skeleton="ntu52"), "did you mean 'ntu25'"),
    (lambda s: s, dict(preset="ntu60-xsub-bone", stream="joint"), "is of the bone stream, not 'joint'"),
    (lambda s: s, dict(preset="ntu60-xsub-joint"), r"has widths \(6, 6, 6\), preset"),
    (lambda s: s, dict(preset="ntu60-xsub-joinr"), "did you mean 'ntu60-xsub-joint'"),
    (lambda s: {**s, "fc.weight": s["fc.weight"][:7], "fc.bias": s["fc.bias"][:7]}, dict(stream="joint"), "has 7 outputs; give their names"),
    (without("fc."), dict(stream="joint"), "tensor 'fc.weight' is missing"), (without("sgcn1.0.A_res"), dict(stream="joint"), "'sgcn1.0.A_res' is missing"),
    (without("tcn3.branches.2"), dict(stream="joint"), r"12 missing \['tcn3.branches.2|missing \['tcn3"),
    (lambda s: {**s, "stranger": torch.zeros(1)}, dict(stream="joint"), r"1 unknown \['stranger'\]"),
    (lambda s: {**s, "fc.bias": s["fc.bias"] * torch.nan}, dict(stream="joint"), "fc.bias and 0 other tensors hold numbers that are not finite"),
    (lambda s: {**s, "data_bn.weight": s["data_bn.weight"][:75]}, dict(stream="joint"), "data_bn"),
    (lambda s: [1, 2], dict(stream="joint"), "not a dictionary"), (lambda s: {"a": 1}, dict(stream="joint"), "not a dictionary"),
])  # fmt: skip
def test_each_way_of_being_wrong_has_its_own_words(tmp_path, public, change, options, message):
    with pytest.raises(ValueError, match=message):
        train.import_msg3d(spoilt(public, tmp_path, change), tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


class Calls:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("write, message", [
    (lambda p: torch.save({"fc.weight": Calls()}, p), "refused: on loading it would call posix.system"),
    (lambda p: torch.save({"fc.weight": Calls()}, p, _use_new_zipfile_serialization=False), "refused: on loading it would call posix.system"),
    (lambda p: p.write_bytes(b"no pickle at all"), "not a file of tensors"), (lambda p: p.write_bytes(b""), "not a file of tensors"),
    (lambda p: None, "no such file")])  # fmt: skip
def test_hostile_and_broken_files_are_refused(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        train.import_msg3d(tmp_path / "x.pt", tmp_path / "ours", stream="joint")
    assert not (tmp_path / "harm").exists()


def test_a_truncated_file_is_refused(tmp_path, public):
    (tmp_path / "x.pt").write_bytes(public[0].read_bytes()[:-5000])
    with pytest.raises(ValueError, match="not a file of tensors"):
        train.import_msg3d(tmp_path / "x.pt", tmp_path / "ours", stream="joint")


def test_the_second_stage_starts_from_public_weights(tmp_path, public):
    train.import_msg3d(public[0], tmp_path / "ours", stream="joint")
    rng, names = np.random.default_rng(0), class_names("ntu60")
    made = [Clip(rng.normal(0, 1, (1, 6, 25, 3)).astype(np.float32), np.ones((1, 6, 25), np.float32), f"c{i}", label=i, class_name=names[i],
                 split={"mine": "train" if i < 6 else "test"}) for i in range(10)]  # fmt: skip
    store = ClipStore.build(made, tmp_path / "store", classes=names, progress=False)
    config = tiny(tmp_path / "m", protocol="mine", preprocess="msg3d", num_bodies=2, gcn_scales=2, g3d_scales=2, stf_epochs=1, stf_lr=1e-4)
    r = run(config.second_stage("dcg").replace(init=str(tmp_path / "ours")), store, progress=False)
    assert r.history["g"].notna().all() and load_checkpoint(r.folder)[1]["in_channels"] == 3
    with pytest.raises(ConfigError, match="its preprocess is 'msg3d', this training's 'paper'"):
        run(config.second_stage("e").replace(init=str(tmp_path / "ours"), preprocess="paper"), store, progress=False)


def test_golden_logits_of_the_public_network_come_through_the_import(tmp_path, real_data):
    golden = real_data.parent / "reference" / "msg3d_golden.json"
    if not golden.exists():
        pytest.skip("no golden logits beside the real recordings")
    net = MSG3D(60, SKELETONS["ntu25"])
    state = net.double().state_dict()
    for j, name in enumerate(sorted(k for k in state if not k.endswith("num_batches_tracked"))):
        v = state[name]
        w = np.random.RandomState(j).uniform(-1, 1, v.numel()).reshape(v.shape)
        scale = {"A_res": 0.01 * w, "running_var": 1 + 0.5 * w**2, "running_mean": 0.1 * w, "bias": 0.1 * w}.get(name.rsplit(".", 1)[-1])
        scale = scale if scale is not None else 1 + 0.1 * w if v.dim() == 1 else w * np.sqrt(6 / (v.numel() / v.shape[0]))
        state[name] = torch.as_tensor(scale)
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "golden.pt")
    train.import_msg3d(tmp_path / "golden.pt", tmp_path / "ours", preset="ntu60-xsub-joint")
    x = torch.as_tensor(np.random.RandomState(1032).standard_normal((2, 3, 32, 25, 2)))
    logits = load_checkpoint(tmp_path / "ours")[0].double()(x).detach().numpy()
    np.testing.assert_allclose(logits, json.loads(golden.read_text())["logits"], atol=2e-3)  # a checkpoint is float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_cuda_training_stops_and_goes_on(tmp_path, precision, clips, interruptible):
    options = dict(device="cuda", precision=precision, model="stf", protocol="mine", ema=0.9, accumulate=2, epochs=3)
    whole = run(tiny(tmp_path / "w", **options), clips, progress=False)
    assert np.isfinite(whole.history["loss"]).all() and whole.record["environment"]["device"] != "cpu"
    real, calls = train.train_step, []

    def pressing(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", pressing)
        run(tiny(tmp_path / "c", **options), clips, progress=False)
    again = run(tiny(tmp_path / "c", **options), clips, progress=False)
    pd.testing.assert_frame_equal(again.history, whole.history, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nan_on_cuda_names_the_clips_of_its_step(tmp_path, clips):
    class Spoilt:
        def __getattr__(self, name):
            return getattr(clips, name)

        def batch(self, indices, **options):
            x, y = clips.batch(indices, **options)
            return (x * float("nan") if 3 in indices else x), y

    with pytest.raises(FloatingPointError, match=r"Clips of this step: .*\bc3\b"):
        run(tiny(tmp_path / "n", device="cuda", protocol="mine"), Spoilt(), progress=False)
