"""Training: configurations, one checkpoint file whole at every moment, exact resume after kill -9 and Ctrl-C, determinism, NaN."""
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
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from safetensors.torch import save as to_bytes

import stf.train as train
from stf import cli
from stf.preparation import Augment
from stf.backbone import MSG3D
from stf.checkpoints import CheckpointError, ConfigError, load_checkpoint, publish, read_header, save_checkpoint, start_from
from stf.clips import Clip, class_names
from stf.dataset import ClipStore, epoch_batches
from stf.evaluate import top_k
from stf.process import in_use, make_accelerator
from stf.skeleton import SKELETONS, Skeleton
from stf.stf_module import STFNet
from stf.train import BENCHMARKS, OTHERS, Config, Run, Training, import_msg3d, learning_rate, presets, run, run_stf

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
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


class Pressing(TinyStore):
    "Sends a signal to its own process while the n-th batch of each count in `at` is made."

    def __init__(self, *at, what=signal.SIGINT, of=None):
        super().__init__()
        self.at, self.what, self.of, self.calls = at, what, of, 0

    def __getattr__(self, name):
        return getattr(self.__dict__["of"], name)

    def batch(self, indices, **options):
        self.calls += list(indices) != [0]  # the header looks at one clip
        if list(indices) != [0] and self.calls in self.at:
            os.kill(os.getpid(), self.what)
        return (self.of or super()).batch(indices, **options)


def tiny(folder, **changes):
    base = dict(name="tiny", folder=str(folder), data="nowhere", widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,), length=8,
                num_bodies=1, batch_size=5, epochs=3, milestones=(2,), device="cpu")  # fmt: skip
    return Config(**{**base, **changes})


def weights(folder):
    return load_checkpoint(folder)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def interruptible():
    """A process started in the background may ignore Ctrl-C; this one listens."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- configurations


def test_every_preset_is_a_config_and_survives_json():
    assert len(presets()) == len(set(presets())) == 3 * 2 * (len(BENCHMARKS) + len(OTHERS)) and len(BENCHMARKS) == 5
    for name in presets():
        config = Config.preset(name)
        assert Config.from_json(config.to_json()) == config and config.name == name
    assert Config.preset("synthetic", name="mine").name == "mine"


@pytest.mark.parametrize("name, lr, epochs, milestones, stage_lr", [
    ("ntu60-xsub-joint", 0.05, 50, (20, 35, 45), 1e-3), ("ntu60-xview-bone", 0.05, 50, (20, 35, 45), 1e-3),
    ("ntu120-xsub-bone", 0.05, 60, (20, 35, 50), 5e-4), ("ntu120-xset-joint", 0.05, 60, (20, 35, 50), 5e-4),
    ("kinetics-joint", 0.05, 65, (25, 40, 55), 1e-4), ("kinetics-bone", 0.05, 65, (25, 40, 55), 1e-4)])  # fmt: skip
def test_paper_presets(name, lr, epochs, milestones, stage_lr):
    base, e, dcg = (Config.preset(name + tail) for tail in ("", "-stf-e", "-stf-dcg"))
    assert (base.lr, base.epochs, base.milestones, base.batch_size, base.weight_decay, base.length) == (lr, epochs, milestones, 32, 5e-4, 300)
    assert base.momentum == 0.9 and base.stream == name.rsplit("-", 1)[1] and base.model == "msg3d"
    for stage in (e, dcg):
        assert (stage.lr, stage.epochs, stage.milestones) == (stage_lr, epochs, milestones)
        assert stage.model == "stf" and stage.init == str(base.run_folder)
        assert (stage.lambda_e, stage.lambda_d, stage.lambda_c, stage.lambda_g) == (0.01, 0.1, 0.1, 0.01)
    assert asdict(e.loss_weights) == dict(e=0.01, d=0, c=0, g=0) and asdict(dcg.loss_weights) == dict(e=0, d=0.1, c=0.1, g=0.01)
    assert asdict(base.loss_weights) == dict(e=0, d=0, c=0, g=0)


@pytest.mark.parametrize("make, message", [
    (lambda: Config(batchsize=3), "batch_size"), (lambda: Config().replace(ephocs=3), "epochs"),
    (lambda: Config.preset("ntu60-xsub-joints"), "ntu60-xsub-joint"), (lambda: Config.preset("ntu60-xsub-joint", strem="bone"), "stream"),
    (lambda: Config.from_json('{"version": 1, "widhts": [6]}'), "widths"), (lambda: Config.from_json('{"version": 2}'), "version=2"),
    (lambda: Config.from_json('{"ema": 0.9}'), "ema=0.9 has no meaning"), (lambda: Config(augment={"spin": 1}), "augment must be"),
    (lambda: Config(lr=10**400), "lr must be of type float"),
    (lambda: Config(stream="bones"), "'bone'"), (lambda: Config(model="sft"), "'stf'"), (lambda: Config(epochs=0), "epochs must be at least 1"),
    (lambda: Config(lr=-1), "lr must be of type float ≥ 0"), (lambda: Config(lr=float("nan")), "lr must be of type float"),
    (lambda: Config(lr=True), "lr must be of type float"), (lambda: Config(lr="0.1"), "lr must be of type float"),
    (lambda: Config(seed=1.5), "seed must be of type int"), (lambda: Config(widths=(6, 6.5)), "widths must be of type int"),
    (lambda: Config(losses="x", model="stf"), "letters of 'edcg'"), (lambda: Config(validation=1.0), "validation is a share"),
    (lambda: Config(losses="g"), "needs model='stf'"), (lambda: Config(guide=1), "guide must be of type bool"),
    (lambda: Config(widths=(6, 6)), "three"), (lambda: Config(windows=(2,)), "odd"), (lambda: Config(precision="fp8"), "did you mean 'fp16'"),
    (lambda: Config(precision="fp16", device="cpu"), "on the CPU use bf16"), (lambda: Config(accumulate=0), "accumulate must be at least 1"),
    (lambda: Config(warmup=50), "warmup must be below"), (lambda: Config(keep_best="ce"), "needs validation clips"),
    (lambda: Config(keep_best="loss", validation=0.1), "keep_best 'loss' is unknown"), (lambda: Config(fraction=0.0), "fraction is a share"),
    (lambda: Config(train_only="head"), "needs a trained network"), (lambda: Config(classes="abc"), "classes must be of type tuple"),
    (lambda: Config(classes=("a",)), "two or more"), (lambda: Config(bodies="motion", preprocess="msg3d"), "is for preprocess='paper'"),
    (lambda: Config(schedule="cosin"), "did you mean 'cosine'"), (lambda: Config(dropout=1.0), "dropout is a share"),
])  # fmt: skip
def test_config_errors_say_what_to_write_instead(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_variants_are_checked_where_they_are_made():
    with pytest.raises(ValueError, match="flip must be a number from 0 to 1"):
        Config(augment={"flip": 2.0})


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"widths": null}', '{"augment": {"flip": 7}}'])
def test_a_file_that_holds_no_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json: not a configuration"):
        Config.load(tmp_path / "config.json")


def test_values_come_in_any_form_of_their_type():
    config = Config(lr=np.float32(0.5), seed=np.int64(3), widths=[6, 12, np.int32(18)], init=Path("some/run"), guide=np.bool_(True), clip_grad=1)
    assert config == Config(lr=0.5, seed=3, widths=(6, 12, 18), init="some/run", guide=True, clip_grad=1.0)
    assert {type(getattr(config, k)) for k in ("lr", "clip_grad")} == {float} and json.loads(config.to_json())["seed"] == 3


def test_configurations_of_old_runs_are_read():
    held = [r["config"] for p in (ROOT / "data" / "results").rglob("*.json") if isinstance(r := json.loads(p.read_text()), dict) and "config" in r]
    assert len(held) > 100
    for values in held:
        config = Config.from_json(json.dumps(values))
        assert all(getattr(config, k) == (tuple(v) if isinstance(v, list) else v) for k, v in values.items() if k in {f.name for f in fields(Config)})
    old = {"version": 1, "aug_rotate": 17.0, "aug_crop": 0.5, "aug_flip": 0.0, "ema": 0.0, "nesterov": True}
    assert Config.from_json(json.dumps(old)) == Config(augment=Augment(rotate=17.0, crop=0.5))


def test_learning_rate_and_order_are_functions_of_the_epoch():
    config = Config(lr=0.05, milestones=(2, 4))
    assert np.allclose([learning_rate(config, e) for e in range(6)], [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    cosine = Config(lr=0.1, epochs=15, schedule="cosine", warmup=5)
    assert np.allclose([learning_rate(cosine, e) for e in (0, 4, 5, 10)], [0.02, 0.1, 0.1, 0.05]) and 0 < learning_rate(cosine, 14) < 0.003
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
    others = [run(tiny(tmp_path / k, **{k: 1}), TinyStore(), progress=False) for k in ("seed", "order")]
    assert same(weights(again.folder), weights(whole.folder)) and not any(same(weights(o.folder), weights(whole.folder)) for o in others)
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)
    assert again.top1 == whole.top1 and np.array_equal(again.scores.probabilities, whole.scores.probabilities)


def test_run_record(whole):
    assert list(whole.history["epoch"]) == [1, 2, 3] and np.allclose(whole.history["lr"], [0.05, 0.05, 0.005])
    assert whole.scores.names == [f"clip{i}" for i in range(14, 20)] and "test_top1" not in whole.history  # scored once, at the end
    env = whole.record["environment"]
    assert env["torch"] == torch.__version__ and env["threads"] == 1 and env["device"] == "cpu" and len(env["commit"]) >= 40
    net, header = load_checkpoint(whole.folder)
    assert not net.training and header["classes"] == ["up", "down", "still"] and header["epoch"] == 3 and header["model"] == "stf.backbone:MSG3D"
    assert header["skeleton"]["name"] == "hand" and header["config"]["epochs"] == 3 and header["stream"] == "joint"
    assert sorted(p.name for p in whole.folder.iterdir()) == ["checkpoint.safetensors", "config.json", "run.json", "scores.npz"]
    np.testing.assert_allclose(whole.scores.probabilities, net(TinyStore().batch(np.arange(14, 20))[0]).softmax(1).detach(), atol=1e-6)


def test_finished_run_is_returned_at_once_and_another_config_is_refused(whole, monkeypatch):
    monkeypatch.setattr(train, "Training", lambda *a: pytest.fail("trained again"))
    again = run(whole.config, progress=False)  # the store does not even exist
    assert again.top1 == whole.top1 and same(weights(again.folder), weights(whole.folder))
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        run(whole.config.replace(lr=0.01), progress=False)
    assert Run.load(whole.folder).config == whole.config


def test_a_baseline_is_the_same_run_whatever_is_set_for_its_second_stage(whole):
    for changes in (dict(stf_lr=0.5, stf_epochs=7, stf_milestones=(1,)), dict(lambda_d=0.7, norm="rms", guide=True), dict(losses="")):
        assert run(whole.config.replace(**changes), progress=False).top1 == whole.top1
    stage = whole.config.second_stage("d")
    assert train.same_config(stage, stage.replace(norm="rms", lambda_c=0.7)) == ["norm"]
    assert train.same_config(stage, stage.replace(lambda_d=0.7)) == ["losses"]


def test_a_run_is_known_by_its_data_not_by_where_they_lie(tmp_path, whole):
    config = tiny(tmp_path / "d", epochs=1)
    first = run(config, TinyStore(), progress=False)
    assert run(config.replace(data="moved/nowhere"), TinyStore(), progress=False).top1 == first.top1
    with pytest.raises(ConfigError, match="on other data"):
        run(config, TinyStore(n=21), progress=False)
    stage = config.replace(model="stf", losses="", init=str(first.folder))
    assert not train.same_config(stage, stage.replace(init=f"elsewhere/{first.folder.name}"))
    assert train.same_config(stage, stage.replace(init="elsewhere/other")) == ["init"]


def test_fraction_and_validation_are_of_the_training_clips(tmp_path):
    def parts(**changes):
        t = Training(tiny(tmp_path, **changes), TinyStore(), make_accelerator("cpu"))
        return t.train, t.val, t.test

    fit, val, test = parts(validation=0.3)
    assert sorted([*fit, *val]) == list(range(14)) and len(val) == 5 and list(test) == list(range(14, 20))
    assert len(parts(fraction=0.5)[0]) == 7 and np.bincount(TinyStore().labels[parts(fraction=0.4, stratified=True)[0]]).tolist() == [2, 2, 2]
    r = run(tiny(tmp_path / "v", validation=0.3, epochs=2), TinyStore(), progress=False)
    assert r.history["val_top1"].notna().all() and r.record["clips"] == [9, 5, 6]


def test_a_tracker_is_written_if_asked_for(tmp_path):
    pytest.importorskip("tensorboard")
    r = run(tiny(tmp_path / "t", tracker="tensorboard", epochs=2), TinyStore(), progress=False)
    assert list((r.folder / "tensorboard").rglob("events*"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        run(tiny(tmp_path / "w", tracker="wandb"), TinyStore(), progress=False)


# ---- runs and weights of the first edition


@pytest.fixture
def first_edition(tmp_path, whole):
    "A run's folder as the first edition wrote it."
    folder = tmp_path / "old"
    (folder / "checkpoint").mkdir(parents=True)
    net, header = load_checkpoint(whole.folder)
    header = {**{k: v for k, v in header.items() if k not in ("state", "data")}, "format": 1, "model": "msg3d"}
    save_file(net.state_dict(), folder / "checkpoint" / "weights.safetensors", {k: json.dumps(v) for k, v in header.items()})
    for name in ("run.json", "scores.npz"):
        shutil.copy(whole.folder / name, folder)
    gone = dict(nesterov=True, decay=0.1, ema=0.0, sync_bn=False, evaluate_every=0, aug_rotate=0.0, aug_crop=1.0, aug_uniform=False)
    values = {k: v for k, v in json.loads(whole.config.to_json()).items() if k not in ("augment", "tracker")}
    (folder / "config.json").write_text(json.dumps({**values, **gone, "folder": str(folder)}))
    return folder


def test_a_run_of_the_first_edition_is_read_and_started_from(first_edition, whole, tmp_path):
    old = Run.load(first_edition)
    assert old.top1 == whole.top1 and same(old.network().state_dict(), weights(whole.folder)) and old.config.lr == 0.05
    assert run(old.config, TinyStore(), progress=False).top1 == whole.top1
    stage = run(tiny(tmp_path / "s", model="stf", losses="", epochs=1, init=str(first_edition)), TinyStore(), progress=False)
    assert stage.history["ce"].notna().all()


def test_an_unfinished_run_of_the_first_edition_is_not_begun_again(first_edition):
    (first_edition / "run.json").unlink()
    with pytest.raises(ConfigError, match="earlier stf can't go on"):
        run(tiny(first_edition), TinyStore(), progress=False)


def test_shipped_weights_have_the_names_of_their_networks():
    for name, kind in (("m1", MSG3D), ("m4", STFNet), ("le", STFNet)):
        net, header = load_checkpoint(ROOT / "data" / "weights" / f"synthetic-{name}")
        assert type(net) is kind and header["format"] == 1 and len(header["classes"]) == 20


# ---- checkpoints


def test_weights_only_checkpoint_can_be_replaced_read_and_published(tmp_path, whole):
    net, header = load_checkpoint(whole.folder)
    for _ in range(2):
        save_checkpoint(tmp_path / "w", net, header)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.safetensors"]
    assert same(weights(tmp_path / "w"), weights(whole.folder)) and same(weights(tmp_path / "w.safetensors"), weights(whole.folder))
    small = publish(whole.folder, tmp_path / "p")
    assert "state" not in read_header(small) and {v.dtype for v in load_file(small).values()} == {torch.float16, torch.int64}
    assert not any(k.startswith("state/") for k in load_file(small)) and load_checkpoint(tmp_path / "p")[1]["classes"] == header["classes"]


def rewrite(file, **changes):
    "Other entries in the header of a checkpoint."
    header = {**read_header(file), **changes}
    save_file(load_file(file), file, {k: json.dumps(v) for k, v in header.items()})


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:100]), "w.safetensors: not a readable"),
    (lambda p: p.write_bytes(to_bytes({"a": torch.zeros(1)})), "header format None"),
    (lambda p: p.write_bytes(to_bytes({"a": torch.zeros(1)}, {"format": "7"})), "header format 7"),
    (lambda p: rewrite(p, classes=["a"]), "3 outputs, but 1 class names"), (lambda p: rewrite(p, stream="hands"), "stream 'hands' is unknown"),
    (lambda p: rewrite(p, length=0), "at least 1"), (lambda p: rewrite(p, length="long"), "lacks length"),
    (lambda p: rewrite(p, preprocess="msg3d"), "no input of 4 channels"), (lambda p: rewrite(p, skeleton={}), "weights and header disagree"),
    (lambda p: rewrite(p, widths=[6, 6, 12]), "weights and header disagree"), (lambda p: rewrite(p, widths=3), "weights and header disagree"),
    (lambda p: rewrite(p, model="torch.nn:Linear"), "no network 'torch.nn:Linear'"), (lambda p: rewrite(p, bodies=[]), "bodies .. is unknown"),
    (lambda p: rewrite(p, model="posixpath:join"), "no network 'posixpath:join'"), (lambda p: rewrite(p, model="antigravity:fly"), "import antigravity first"),
])  # fmt: skip
def test_spoilt_checkpoints_are_refused(tmp_path, whole, spoil, message):
    net, header = load_checkpoint(whole.folder)
    spoil(save_checkpoint(tmp_path / "w", net, header))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "w")
    assert "antigravity" not in sys.modules


class Own(STFNet):
    "A network of a user's own: nothing is registered anywhere."


def test_a_folder_goes_before_a_file_of_its_name(tmp_path, whole):
    other = run(tiny(tmp_path / "r", epochs=1), TinyStore(), progress=False)
    net, header = load_checkpoint(whole.folder)
    save_checkpoint(tmp_path / "r", net, header)  # r.safetensors, beside the run's folder r
    assert same(weights(tmp_path / "r"), other.network().state_dict()) and not same(weights(tmp_path / "r"), net.state_dict())


@pytest.mark.parametrize("spoil", [
    lambda header, tensors: header.pop("state"), lambda header, tensors: header["state"].pop("step"), lambda header, tensors: tensors.pop("state/3"),
    lambda header, tensors: tensors.update({"state/3": torch.zeros(7)}), lambda header, tensors: [tensors.pop(k) for k in [*tensors] if k.startswith("state/")],
])  # fmt: skip
def test_a_damaged_training_state_is_named(tmp_path, spoil, interruptible):
    config = tiny(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        run(config, Pressing(5), progress=False)
    file = config.run_folder / "checkpoint.safetensors"
    header, tensors = read_header(file), load_file(file)
    spoil(header, tensors)
    save_file(tensors, file, {k: json.dumps(v) for k, v in header.items()})
    with pytest.raises(CheckpointError, match="checkpoint.safetensors: its training state is damaged"):
        run(config, TinyStore(), progress=False)


def test_a_damaged_record_is_named(tmp_path, whole):
    shutil.copytree(whole.folder, tmp_path / "r")
    for text in ("", "{}", "null", "[]"):
        (tmp_path / "r" / "run.json").write_text(text)
        with pytest.raises(ConfigError, match="run.json: a damaged record"):
            Run.load(tmp_path / "r")
    (tmp_path / "r" / "scores.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="scores.npz: not a file of scores"):
        Run.load(tmp_path / "r")


def test_weights_of_another_file_are_another_start(whole):
    stage = whole.config.second_stage("d")
    a, b = (stage.replace(init=f"{name}/weights.safetensors") for name in ("publisher", "other"))
    assert train.same_config(a, b) == ["init"] and not train.same_config(a, a.replace(init="moved/publisher"))


def test_one_training_at_a_time_in_a_process(tmp_path, whole):
    class Nested(TinyStore):
        def batch(self, indices, **options):
            if len(indices) > 1:
                run(tiny(tmp_path / "inner"), TinyStore(), progress=False)
            return super().batch(indices, **options)

    with pytest.raises(RuntimeError, match="one training at a time"):
        run(tiny(tmp_path / "outer"), Nested(), progress=False)
    assert same(weights(run(tiny(tmp_path / "outer"), TinyStore(), progress=False).folder), weights(whole.folder))


def test_a_signal_while_the_test_clips_are_scored_is_not_lost(tmp_path, interruptible):
    config = tiny(tmp_path / "r", epochs=1)
    with pytest.raises(KeyboardInterrupt, match="finished and saved"):
        run_stf(config, Pressing(4), progress=False)
    assert Run.load(config.run_folder).top1 >= 0 and not config.second_stage("dcg").run_folder.exists()


def test_a_network_of_ones_own_is_trained_saved_and_resumed(tmp_path):
    model = f"{__name__}:Own"
    r = run(tiny(tmp_path / "o", model=model, losses="d", epochs=1), TinyStore(), progress=False)
    assert type(r.network()) is Own and "d" in r.history and read_header(r.folder)["model"] == model
    stage = r.config.second_stage("dc")
    assert stage.model == model and run(stage.replace(epochs=1), TinyStore(), progress=False).history["c"].notna().all()
    with pytest.raises(ConfigError, match="no network 'own'"):
        tiny(tmp_path, model="own")

    class Hidden(STFNet):
        pass

    with pytest.raises(ConfigError, match="Hidden"):  # could never be loaded again
        save_checkpoint(tmp_path / "h", Hidden(3, HAND, **{k: getattr(r.network(), k) for k in ("in_channels", "num_bodies", "widths")}),
                        dict(classes=list("abc"), stream="joint", preprocess="paper", length=8))  # fmt: skip


# ---- the second stage


def test_stf_starts_from_every_tensor_of_the_baseline(tmp_path, whole):
    stage = tiny(tmp_path / "s", name="s", model="stf", losses="", init=str(whole.folder))
    header = train.make_header(stage, TinyStore())
    net = start_from(train.build_network(header), whole.folder, header)
    base = weights(whole.folder)
    own = [k for k in net.state_dict() if k.startswith("stf.")]
    assert own and all(torch.equal(v, net.state_dict()[k]) for k, v in base.items()) and set(net.state_dict()) == set(base) | set(own)
    x = TinyStore().batch([0, 1, 2])[0].double()
    plain = load_checkpoint(whole.folder)[0].double()
    torch.testing.assert_close(net.double().eval()(x), plain(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("change, message", [
    (dict(stream="bone"), "its stream is joint, this training's bone"), (dict(gcn_scales=3), "its gcn_scales is 2"),
    (dict(preprocess="msg3d"), "its preprocess")])  # fmt: skip
def test_a_baseline_of_something_else_is_refused(tmp_path, whole, change, message):
    with pytest.raises(ConfigError, match=message):
        run(tiny(tmp_path / "s", model="stf", init=str(whole.folder), **change), TinyStore(channels=4), progress=False)


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
    assert {"ce", "e"} <= set(e.history) and {"ce", "d", "c", "g", "g_ratio", "g_spread"} <= set(dcg.history) and "e" not in dcg.history
    assert np.allclose(both.scores.probabilities, (e.scores.probabilities + dcg.scores.probabilities) / 2)
    with pytest.raises(ConfigError, match="starts with the baseline"):
        run_stf(dcg.config, TinyStore(), progress=False)


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


# ---- what goes wrong


def test_nan_names_the_clips_and_leaves_the_last_checkpoint(tmp_path):
    store, config = TinyStore(), tiny(tmp_path / "n")
    bad = epoch_batches(np.arange(14), 5, config.seed, 1)[1][0]  # a clip of epoch 2, step 2
    good = run(config.replace(epochs=1, folder=str(tmp_path / "good")), store, progress=False)

    class Spoilt(TinyStore):
        calls = 0

        def batch(self, indices, **options):
            x, y = super().batch(indices, **options)
            Spoilt.calls += 1
            return (x * float("nan") if Spoilt.calls > 4 and bad in indices else x), y

    with pytest.raises(FloatingPointError, match=rf"epoch 2, step 2: .*Clips of this step: .*clip{bad}\b"):
        run(config, Spoilt(), progress=False)
    assert same(weights(config.run_folder), weights(good.folder))
    assert same(weights(run(config, store, progress=False).folder), weights(run(tiny(tmp_path / "w"), store, progress=False).folder))


def test_fp16_may_leave_out_steps_but_not_for_ever(tmp_path):
    t = Training(tiny(tmp_path / "x"), TinyStore(), make_accelerator("cpu"))
    scale, total = [4.0], torch.tensor([1.0, 0.5], dtype=torch.float64)
    t.accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]), reduce=lambda v: v)
    step = lambda loss, norm: t.count([0, 1], ["loss", "ce"], total * loss, norm, False)
    step(1.0, float("inf")), step(1.0, 2.0)
    with pytest.raises(FloatingPointError, match="clip0, clip1"):
        step(float("nan"), 1.0)
    scale[0] = 0.5  # it overflows without being scaled
    with pytest.raises(FloatingPointError, match="gradient norm inf"):
        step(1.0, float("inf"))
    assert t.state["sums"]["clips"] == 4 and t.state["step"] == 2


def test_ctrl_c_saves_the_step_and_resumes_exactly(tmp_path, whole, interruptible):
    config, store = tiny(tmp_path / "c"), Pressing(2, 6)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1 of 3, nothing is lost"):
        run(config, store, progress=False)
    state = read_header(config.run_folder)["state"]
    assert state["epoch"] == 0 and state["step"] in (1, 2)  # the loader makes the next batch ahead
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2"):
        run(config, store, progress=False)
    again = run(config, TinyStore(), progress=False)
    assert same(weights(again.folder), weights(whole.folder))
    pd.testing.assert_frame_equal(again.history, whole.history, check_exact=True)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_run_works_outside_the_main_thread(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tiny(tmp_path / "t"), TinyStore(), progress=False)))
    thread.start(), thread.join()
    assert same(weights(results[0].folder), weights(whole.folder))


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, whole):
    config = tiny(tmp_path / "u")
    for broken in ("", "{", "null", "[1, 2, 3]", '["node", -1, 1.0]'):
        config.run_folder.mkdir(exist_ok=True)
        (config.run_folder / "running.json").write_text(broken)
        with in_use(config.run_folder):
            pass
    with in_use(config.run_folder), pytest.raises(BlockingIOError, match="is at work in"):
        run(config, TinyStore(), progress=False)
    assert same(weights(run(config, TinyStore(), progress=False).folder), weights(whole.folder))


def test_errors_before_training(tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        run(tiny(tmp_path / "x"), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            run(tiny(tmp_path / "y", device="cuda"), TinyStore(), progress=False)
    unlabelled = TinyStore()
    unlabelled.labels = np.where(np.arange(20) == 5, -1, unlabelled.labels)
    for store, changes, message in ((unlabelled, {}, "'clip5' is a training clip"), (TinyStore(), dict(validation=0.99), "takes 14 of the 14"),
                                      (TinyStore(), dict(validation=0.05, keep_best="ce"), "takes 0 of the 14")):
        with pytest.raises(ValueError, match=message):
            run(tiny(tmp_path / "u", **changes), store, progress=False)
    with pytest.raises(ValueError, match="can't be cut into 8 parts"):
        run(tiny(tmp_path / "z", accumulate=8), TinyStore(), progress=False)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, whole, monkeypatch):
    calls, real = [], os.fsync

    def fsync(f):
        calls.append(f)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(f)

    config = tiny(tmp_path / "d")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=r"no room left on the disk of .*d: make room, then start again"):
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
    with pytest.raises(MemoryError, match=r"batch_size=5, accumulate=1.*larger accumulate, with bf16 or checkpointing.*smaller batch_size"):
        run(tiny(tmp_path / "o"), Hungry(error), progress=False)


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_parts(tmp_path, whole):
    config = tiny(tmp_path / "o")
    with pytest.raises(MemoryError):
        run(config, Hungry(MemoryError(), 4), progress=False)
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        run(config.replace(lr=0.01), TinyStore(), progress=False)
    r = run(config.replace(accumulate=2), Hungry(MemoryError()), progress=False)
    assert r.record["changes"] == [{"epoch": 1, "step": 0, "accumulate": [1, 2]}] and r.config.accumulate == 2
    assert r.history.iloc[0].equals(whole.history.iloc[0]) and not r.history.equals(whole.history)
    with pytest.raises(ConfigError, match="accumulate 2 .now 1."):  # a finished run is of one configuration
        run(config, TinyStore(), progress=False)


def test_other_errors_pass_and_before_the_first_checkpoint_anything_may_be_changed(tmp_path):
    with pytest.raises(RuntimeError, match="^something else$"):
        run(tiny(tmp_path / "o"), Hungry(RuntimeError("something else")), progress=False)
    assert run(tiny(tmp_path / "o", batch_size=3, lr=0.01, epochs=1), TinyStore(), progress=False).config.lr == 0.01


# ---- killed


VARIANTS = {
    "accumulate": dict(accumulate=2),
    "bf16": dict(precision="bf16"),
    "all": dict(model="stf", losses="ed", accumulate=2, precision="bf16", clip_grad=1.0, schedule="cosine", warmup=1, control="random"),
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

    for module, name in [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink")]:
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
    return not (folder / "checkpoint.safetensors").exists() or load_checkpoint(folder)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [dict(), dict(save_every=1), dict(save_every=1, validation=0.3, keep_best="ce", **VARIANTS["all"])], ids=["epochs", "steps", "all"])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, child, changes):
    rng, kills, finished = np.random.default_rng(len(changes)), 0, 0
    status, alone = child(tmp_path / "timed", changes)
    whole = Run.load(tmp_path / "timed")
    assert status == 0
    while kills < 10:
        folder, here_kills = tmp_path / f"r{finished}", 0
        while True:
            patient = here_kills > 5  # let it end, so that the ends are compared several times
            status, took = child(folder, changes, None if patient else rng.uniform(0.02, 0.6 * alone))
            if status == 0:
                alone = min(alone, took)
                break
            assert status == signal.SIGKILL, f"died of something else: status {status}"
            kills, here_kills = kills + 1, here_kills + 1
            assert is_whole(folder)
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
        assert status == signal.SIGKILL and is_whole(folder)
        if moment % 3:  # every third one is also taken to its end
            continue
        assert child(folder, changes)[0] == 0
        assert same(weights(folder), whole) and not list(folder.glob("*.new")), f"killed at write {moment}"
        assert same(weights(folder / "best"), weights(tmp_path / "whole" / "best"))
    assert moment > 12


# ---- precision, micro-batches


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in ("bf16", "all") else pytest.mark.slow) for n in VARIANTS])
def test_every_variant_resumes_exactly(tmp_path, name, interruptible):
    options = dict(epochs=2, milestones=(1,), **VARIANTS[name])
    first = run(tiny(tmp_path / "w", **options), TinyStore(), progress=False)
    config = tiny(tmp_path / "c", **options)
    with pytest.raises(KeyboardInterrupt, match="nothing is lost"):
        run(config, Pressing(5, what=signal.SIGTERM), progress=False)  # as a scheduler does
    again = run(config, TinyStore(), progress=False)
    assert same(weights(again.folder), weights(first.folder)) and again.history.equals(first.history)
    assert np.isfinite(first.history["loss"]).all() and all(v.dtype != torch.bfloat16 for v in weights(first.folder).values())


def test_gradient_is_clipped_and_momentum_may_be_none(tmp_path, monkeypatch):
    norms, real = [], torch.optim.SGD.step

    def step(self, *args):
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for g in self.param_groups for p in g["params"]])))
        return real(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    r = run(tiny(tmp_path / "g", clip_grad=1e-3, momentum=0.0, epochs=1), TinyStore(), progress=False)
    assert norms and np.allclose(norms, 1e-3, rtol=1e-3) and len(r.history) == 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_training_is_the_eager_one_and_resumes(tmp_path, interruptible):
    options = dict(model="stf", losses="dcg", epochs=2, milestones=(), lr=1e-4, batch_size=7)  # parts of one size: one program; small steps: no chaos
    eager = run(tiny(tmp_path / "e", **options), TinyStore(), progress=False)
    config = tiny(tmp_path / "c", compile=True, **options)
    with pytest.raises(KeyboardInterrupt):
        run(config, Pressing(3), progress=False)
    compiled = run(config, TinyStore(), progress=False)
    other = run(config.replace(folder=str(tmp_path / "d")), TinyStore(), progress=False)
    assert same(weights(compiled.folder), weights(other.folder))
    pd.testing.assert_frame_equal(compiled.history, eager.history, rtol=1e-3, atol=1e-3)


# ---- a real store


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
    scores = cli._scores_of(r.folder / "checkpoint", clips.folder, "mine")  # stf evaluate … --store: in the network's order of classes
    assert scores.classes == ["c", "a"] and top_k(scores) == r.top1 and set(scores.names) == set(r.scores.names)
    with pytest.raises(ValueError, match="'d'"):
        run(tiny(tmp_path / "t", protocol="mine", classes=("a", "d")), clips, progress=False)


def test_augmented_clips_resume_exactly_and_change_with_the_epoch(tmp_path, clips, interruptible):
    options = dict(protocol="mine", augment={"rotate": 20.0, "crop": 0.5, "drop_joints": 0.2}, accumulate=2, time="resize")
    first = run(tiny(tmp_path / "w", **options), clips, progress=False)

    class Store(Pressing):
        def __init__(self):
            self.at, self.what, self.of, self.calls = (8,), signal.SIGINT, clips, 0

        def split(self, protocol):
            return clips.split(protocol)

    with pytest.raises(KeyboardInterrupt):
        run(tiny(tmp_path / "c", **options), Store(), progress=False)
    again = run(tiny(tmp_path / "c", **options), clips, progress=False)
    assert same(weights(again.folder), weights(first.folder)) and load_checkpoint(first.folder)[1]["time"] == "resize"
    batches = Training(tiny(tmp_path / "t", **options), clips, make_accelerator("cpu")).batches
    x = [batches.set_epoch(e) or dict(zip(np.concatenate(batches.micro).tolist(), torch.cat([batches[i][0] for i in range(len(batches))]))) for e in (0, 1)]
    assert not any(torch.equal(x[0][i], x[1][i]) for i in x[0])


# ---- best


def test_best_epoch_is_chosen_on_validation_clips_and_top1_is_the_last_ones(tmp_path, monkeypatch):
    values = iter([40.0, 60.0, 60.0, 50.0])
    monkeypatch.setattr(train, "top_k", lambda scores, k=1: next(values) if len(scores) == 5 else 7.0)
    r = run(tiny(tmp_path / "b", validation=0.3, keep_best="accuracy", epochs=4), TinyStore(), progress=False)
    assert r.record["best"] == {"epoch": 2, "value": 60.0}  # the first of equals
    assert load_checkpoint(r.folder / "best")[1]["epoch"] == 2 and load_checkpoint(r.folder)[1]["epoch"] == 4
    assert not same(weights(r.folder), weights(r.folder / "best")) and r.top1 == 7
    assert same(dict(r.network(best=True).state_dict()), weights(r.folder / "best"))


def test_best_by_cross_entropy(tmp_path):
    r = run(tiny(tmp_path / "b", validation=0.3, keep_best="ce", epochs=3), TinyStore(), progress=False)
    assert r.record["best"]["epoch"] == int(r.history["val_ce"].argmin()) + 1
    val = Training(r.config, TinyStore(), make_accelerator("cpu")).val
    ce = torch.nn.functional.cross_entropy(r.network(best=True)(TinyStore().batch(val)[0]), TinyStore().batch(val)[1])
    assert float(ce.detach()) == pytest.approx(r.history["val_ce"].min(), rel=1e-4)


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
    torch.save(change({k: v.clone() for k, v in net.state_dict().items()}), folder / "spoilt.pt")
    return folder / "spoilt.pt"


@pytest.mark.parametrize("change", [lambda s: s, lambda s: {f"module.{k}": v for k, v in s.items()}, lambda s: {"state_dict": s, "epoch": 3},
                                    lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")}])  # fmt: skip
def test_public_weights_are_imported(tmp_path, public, change):
    import_msg3d(spoilt(public, tmp_path, change), tmp_path / "ours", stream="bone")
    net, header = load_checkpoint(tmp_path / "ours")
    x = torch.randn(2, 3, 20, 25, 2)
    assert torch.equal(net(x), public[1](x))
    told = {k: header[k] for k in ("stream", "preprocess", "length", "in_channels", "num_bodies", "num_classes")}
    assert told == dict(stream="bone", preprocess="msg3d", length=300, in_channels=3, num_bodies=2, num_classes=60)
    assert header["classes"][:2] == ["drink water", "eat meal/snack"] and header["skeleton"]["name"] == "ntu25"


def without(*names):
    return lambda s: {k: v for k, v in s.items() if not k.startswith(names)}


@pytest.mark.parametrize("change, options, message", [
    (lambda s: s, dict(), "stream='joint' or 'bone'"), (lambda s: s, dict(stream="bones"), "did you mean 'bone'"),
    (lambda s: s, dict(stream="joint", classes=list("abc")), "60 outputs, but 3 class names"),
    (lambda s: s, dict(stream="joint", skeleton="kinect20"), "on 25 joints; skeletons with so many: .'ntu25'"),
    (lambda s: s, dict(stream="joint", skeleton=SKELETONS["kinect20"]), "on 25 joints"),
    (lambda s: s, dict(preset="ntu60-xsub-bone", stream="joint"), "stream 'joint', unlike preset"),
    (lambda s: s, dict(preset="ntu60-xsub-joint"), r"has widths \(6, 6, 6\), gcn_scales 2, .*unlike preset"),
    (lambda s: s, dict(preset="ntu120-xsub-joint"), "60 classes, unlike preset"),
    (lambda s: s, dict(preset="ntu60-xsub-joinr"), "did you mean 'ntu60-xsub-joint'"),
    (lambda s: {**s, "fc.weight": s["fc.weight"][:7], "fc.bias": s["fc.bias"][:7]}, dict(stream="joint"), "has 7 outputs: name them"),
    (without("fc."), dict(stream="joint"), "tensor 'fc.weight' is missing"), (without("sgcn1.0.A_res"), dict(stream="joint"), "'sgcn1.0.A_res' is missing"),
    (lambda s: {**s, "fc.weight": torch.tensor(1.0)}, dict(stream="joint"), r"'fc.weight' is \(\)"),
    (lambda s: {**s, "sgcn1.0.A_res": torch.zeros(0, 25)}, dict(stream="joint"), r"'sgcn1.0.A_res' is \(0, 25\)"),
    (without("tcn3.branches.2"), dict(stream="joint"), r"12 missing \['tcn3.branches.2|missing \['tcn3"),
    (lambda s: {**s, "stranger": torch.zeros(1)}, dict(stream="joint"), r"1 unknown \['stranger'\]"),
    (lambda s: {**s, "fc.bias": s["fc.bias"] * torch.nan}, dict(stream="joint"), "fc.bias and 0 other tensors hold numbers that are not finite"),
    (lambda s: {**s, "data_bn.weight": s["data_bn.weight"][:75]}, dict(stream="joint"), "data_bn"),
    (lambda s: [1, 2], dict(stream="joint"), "not a dictionary"), (lambda s: {"a": 1}, dict(stream="joint"), "not a dictionary"),
    (lambda s: {}, dict(stream="joint"), "not a dictionary"),
])  # fmt: skip
def test_each_way_of_being_wrong_has_its_own_words(tmp_path, public, change, options, message):
    with pytest.raises(ConfigError, match=message):
        import_msg3d(spoilt(public, tmp_path, change), tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


class Calls:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("write, message", [
    (lambda p: torch.save({"fc.weight": Calls()}, p), "refused: on loading it would call posix.system"),
    (lambda p: torch.save({"fc.weight": Calls()}, p, _use_new_zipfile_serialization=False), "refused: on loading it would call posix.system"),
    (lambda p: p.write_bytes(b"no pickle at all"), "not a file of tensors"), (lambda p: p.write_bytes(b""), "not a file of tensors"),
    (lambda p: None, r"x.pt: not a file of tensors.*FileNotFoundError")])  # fmt: skip
def test_hostile_and_broken_files_are_refused(tmp_path, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        import_msg3d(tmp_path / "x.pt", tmp_path / "ours", stream="joint")
    assert not (tmp_path / "harm").exists()


def test_a_truncated_file_is_refused(tmp_path, public):
    (tmp_path / "x.pt").write_bytes(public[0].read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        import_msg3d(tmp_path / "x.pt", tmp_path / "ours", stream="joint")


def test_the_second_stage_starts_from_public_weights(tmp_path, public):
    import_msg3d(public[0], tmp_path / "ours", stream="joint")
    rng, names = np.random.default_rng(0), class_names("ntu60")
    made = [Clip(rng.normal(0, 1, (1, 6, 25, 3)).astype(np.float32), np.ones((1, 6, 25), np.float32), f"c{i}", label=i, class_name=names[i],
                 split={"mine": "train" if i < 6 else "test"}) for i in range(10)]  # fmt: skip
    store = ClipStore.build(made, tmp_path / "store", classes=names, progress=False)
    config = tiny(tmp_path / "m", protocol="mine", preprocess="msg3d", num_bodies=2, gcn_scales=2, g3d_scales=2, stf_epochs=1, stf_lr=1e-4)
    r = run(config.second_stage("dcg").replace(init=str(tmp_path / "ours")), store, progress=False)
    assert r.history["g"].notna().all() and load_checkpoint(r.folder)[1]["in_channels"] == 3
    with pytest.raises(ConfigError, match="its preprocess is msg3d, this training's paper"):
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
    import_msg3d(tmp_path / "golden.pt", tmp_path / "ours", preset="ntu60-xsub-joint")
    x = torch.as_tensor(np.random.RandomState(1032).standard_normal((2, 3, 32, 25, 2)))
    logits = load_checkpoint(tmp_path / "ours")[0].double()(x).detach().numpy()
    np.testing.assert_allclose(logits, json.loads(golden.read_text())["logits"], atol=2e-3)  # a checkpoint is float32


# ---- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bf16", "fp16"])
def test_cuda_training_stops_and_goes_on(tmp_path, precision, clips, interruptible, monkeypatch):
    options = dict(device="cuda", precision=precision, model="stf", protocol="mine", accumulate=2, epochs=3)
    whole = run(tiny(tmp_path / "w", **options), clips, progress=False)
    assert np.isfinite(whole.history["loss"]).all() and whole.record["environment"]["device"] != "cpu"
    real, calls = Training.count, []

    def pressing(self, *args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "count", pressing)
        run(tiny(tmp_path / "c", **options), clips, progress=False)
    again = run(tiny(tmp_path / "c", **options), clips, progress=False)
    pd.testing.assert_frame_equal(again.history, whole.history, rtol=0.05, atol=0.05)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nan_on_cuda_names_the_clips_of_its_step(tmp_path):
    class Spoilt(TinyStore):
        def batch(self, indices, **options):
            x, y = super().batch(indices, **options)
            return (x * float("nan") if 3 in indices else x), y

    with pytest.raises(FloatingPointError, match=r"Clips of this step: .*\bclip3\b"):
        run(tiny(tmp_path / "n", device="cuda"), Spoilt(), progress=False)
