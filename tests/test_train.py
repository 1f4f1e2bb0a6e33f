"""Training: configurations, checkpoints whole at every moment, exact resume after kill -9 and Ctrl-C, determinism, NaN."""
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import stf.train as train
from safetensors.torch import save as to_bytes
from stf.skeleton import Skeleton
from stf.train import (Config, ConfigError, Run, epoch_batches, learning_rate, load_checkpoint, make_header, presets,
                       run, run_stf, save_checkpoint, start_from)

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


@pytest.fixture(autouse=True)
def one_thread_and_tiny_stores(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    assert len(presets()) == 3 * (10 + 6)
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


SERVER = """
    import os, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import torch; torch.set_num_threads(1)
    from pathlib import Path
    import test_train as t
    for line in sys.stdin:
        folder, save_every = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                t.run(t.tiny(folder, save_every=int(save_every)), t.TinyStore(), progress=False)
                os._exit(0)
            except BaseException as e:
                print(repr(e), file=sys.stderr)
                os._exit(1)
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start processes quickly")
@pytest.mark.parametrize("save_every", [0, 1])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, whole, save_every):
    here = Path(__file__).resolve().parent
    code = textwrap.dedent(SERVER).format(tests=str(here), root=str(here.parent))
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    rng, kills, finished = np.random.default_rng(save_every), 0, 0

    def child(folder, delay=None):
        "Start a run, kill it after a delay (or let it end); its exit status."
        server.stdin.write(f"{folder} {save_every}\n"), server.stdin.flush()
        pid, started = int(server.stdout.readline()), time.perf_counter()
        if delay is not None:
            time.sleep(delay)
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        status = int(server.stdout.readline())
        return status, time.perf_counter() - started

    status, alone = child(tmp_path / "timed")
    assert status == 0 and same(weights(tmp_path / "timed"), weights(whole.folder))
    while kills < 14:  # twice, for both ways to save
        folder, here_kills = tmp_path / f"r{finished}", 0
        while True:
            patient = here_kills > 5  # let it end, so that the ends are compared several times
            status, took = child(folder, None if patient else rng.uniform(0.02, 0.6 * alone))
            if status == 0:
                alone = min(alone, took)
                break
            assert status == signal.SIGKILL, f"died of something else: status {status}"
            kills, here_kills = kills + 1, here_kills + 1
            if (folder / "checkpoint").exists() or (folder / "checkpoint.old").exists():
                load_checkpoint(folder)  # whole at any moment
        finished += 1
        assert same(weights(folder), weights(whole.folder))
        pd.testing.assert_frame_equal(Run.load(folder).history, whole.history, check_exact=True)
    server.stdin.close()
    assert server.wait(timeout=20) == 0
