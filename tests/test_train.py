"""Training: configurations, runs, checkpoints, exact resuming after kills and signals, errors."""
import errno
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import asdict, fields
from functools import partial
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
from stf.backbone import MSG3D
from stf.checkpoints import (CheckpointError, ConfigError, load_checkpoint,
                             read_header, save_checkpoint)
from stf.clips import Clip, class_names
from stf.dataset import Batches, ClipStore
from stf.evaluate import Scores, top_k
from stf.preparation import Augment
from stf.process import in_use, one_accelerator
from stf.skeleton import SKELETONS, Skeleton
from stf.stf_module import STFNet
from stf.train import (Config, Run, Training, dose, import_msg3d, learning_rate, presets, run,
                       run_stf)

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
HAND = Skeleton("hand", ("wrist", "palm", "tip"), ((1, 0), (2, 1)), centre=0, height=(0, 1, 2))


class TinyStore:
    """Twenty clips of a three-joint hand in memory, of three classes that can be told apart.

    `hook(n, indices, x)` is called while the n-th batch is made; what it returns replaces x.
    """

    def __init__(self, n=20, hook=lambda n, indices, x: None):
        self.names, self.labels = [f"clip{i}" for i in range(n)], np.arange(n) % 3
        self.classes, self.skeleton, self.hook, self.calls = ["up", "down", "still"], HAND, hook, 0
        rng, rise = np.random.default_rng(0), np.linspace(0, 2, 8)[:, None, None]
        self.x = rng.normal(size=(n, 4, 8, 3, 1)).astype(np.float32)
        self.x[:, 1] += (self.labels[:, None, None, None] - 1) * rise

    def __len__(self):
        return len(self.names)

    def split(self, protocol):
        return np.arange(0, 14), np.arange(14, len(self))

    def batch(self, indices, device=None, dtype=torch.float32, **options):
        x = torch.from_numpy(self.x[np.asarray(indices)]).to(device=device, dtype=dtype)
        if len(indices) > 1:  # the header looks at one clip
            self.calls += 1
            changed = self.hook(self.calls, list(indices), x)
            x = x if changed is None else changed
        return x, torch.as_tensor(self.labels[np.asarray(indices)], device=device)


def pressing(*at, what=signal.SIGINT):
    "A store that sends a signal to its process while certain batches are made."
    return TinyStore(hook=lambda n, indices, x: os.kill(os.getpid(), what) if n in at else None)


def spoilt(clip, after=0):
    "A store one clip of which is NaN, after some batches."
    return TinyStore(hook=lambda n, i, x: x * torch.nan if n > after and clip in i else None)


def hungry(error, after=0):
    "A store of which batches of five clips don't fit, after some batches."
    def hook(n, indices, x):
        if n > after and len(indices) == 5:
            raise error

    return TinyStore(hook=hook)


def tiny(folder, **changes):
    base = dict(name="tiny", folder=str(folder), data="nowhere", widths=(6, 6, 6), gcn_scales=2,
                g3d_scales=2, windows=(3,), length=8, num_bodies=1, batch_size=5, epochs=3,
                milestones=(2,), device="cpu")
    return Config(**{**base, **changes})


def go(folder, store=None, **changes):
    "A tiny run, or that of a configuration."
    config = folder if isinstance(folder, Config) else tiny(folder, **changes)
    return run(config, store or TinyStore(), progress=False)


def weights(folder):
    return load_checkpoint(folder)[0].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def equal(a, b):
    "Whether two runs have the same weights and history, to the last bit."
    pd.testing.assert_frame_equal(a.history, b.history, check_exact=True)
    return same(weights(a.folder), weights(b.folder))


def rewrite(file, header, tensors=None):
    save_file(tensors or load_file(file), file, {k: json.dumps(v) for k, v in header.items()})


@pytest.fixture
def interruptible():
    "A process started in the background may ignore Ctrl-C; this one doesn't."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


# ---- configurations


@pytest.mark.parametrize("names, epochs, milestones, stage_lr", [
    (("ntu60-xsub-joint", "ntu60-xview-bone"), 50, (20, 35, 45), 1e-3),
    (("ntu120-xsub-bone", "ntu120-xset-joint"), 60, (20, 35, 50), 5e-4),
    (("kinetics-joint", "kinetics-bone"), 65, (25, 40, 55), 1e-4)])
def test_presets_are_the_papers(names, epochs, milestones, stage_lr):
    paper = dict(batch_size=32, weight_decay=5e-4, momentum=0.9, length=300, epochs=epochs,
                 milestones=milestones, lambda_e=0.01, lambda_d=0.1, lambda_c=0.1, lambda_g=0.01)
    assert len(presets()) == len(set(presets())) == 60  # each as test_first_edition has it
    for name in names:
        base, e, dcg = (Config.preset(name + tail) for tail in ("", "-stf-e", "-stf-dcg"))
        for c in (base, e, dcg):
            assert Config.from_json(c.to_json()) == c
            assert paper.items() <= vars(c).items() and c.stream == name.rsplit("-", 1)[1]
        assert (base.lr, base.model) == (0.05, "msg3d")
        assert asdict(base.loss_weights) == dict(e=0, d=0, c=0, g=0)
        for c in (e, dcg):
            assert (c.lr, c.model, c.init) == (stage_lr, "stf", str(base.run_folder))
        assert asdict(e.loss_weights) == dict(e=0.01, d=0, c=0, g=0)
        assert asdict(dcg.loss_weights) == dict(e=0, d=0.1, c=0.1, g=0.01)
        assert Config.preset(name, name="own").name == "own"


@pytest.mark.parametrize("wrong, message", [
    (dict(batchsize=3), "batch_size"), (dict(stream="bones"), "'bone'"),
    (dict(model="sft"), "'stf'"), (dict(precision="fp8"), "did you mean 'fp16'"),
    (dict(schedule="cosin"), "did you mean 'cosine'"), (dict(augment={"spin": 1}), "augment must"),
    (dict(lr=10**400), "lr must be of type float"), (dict(lr=-1), "lr must be of type float ≥ 0"),
    (dict(lr=torch.nan), "lr must be of type"), (dict(lr=True), "lr must be of type float"),
    (dict(lr="0.1"), "lr must be of type"), (dict(seed=1.5), "seed must be of type int"),
    (dict(widths=(6, 6.5)), "widths must be of type int"), (dict(guide=1), "guide must be of type"),
    (dict(classes="abc"), "classes must be of type tuple"), (dict(classes=("a",)), "two or more"),
    (dict(widths=(6, 6)), "three"), (dict(windows=(2,)), "odd"), (dict(epochs=0), "at least 1"),
    (dict(length=10**5), "length · num_bodies must be at most 30000"),
    (dict(accumulate=0), "accumulate must be at least"), (dict(dropout=1.0), "dropout is a share"),
    (dict(validation=1.0), "validation is a"), (dict(fraction=0.0), "fraction is a share"),
    (dict(losses="ee", model="stf"), "each term once"),
    (dict(losses="x", model="stf"), "letters of 'edcg'"), (dict(losses="g"), "needs model='stf'"),
    (dict(losses="g", model="ctrgcn"), "needs model='stf-ctrgcn': 'ctrgcn' has no β"),
    (dict(model="stf", g3d_scales=1), "gcn_scales and g3d_scales must be at least 2, got 1"),
    (dict(precision="fp16", device="cpu"), "on the CPU use bf16"),
    (dict(warmup=50), "warmup must be below"), (dict(keep_best="ce"), "needs validation clips"),
    (dict(keep_best="loss", validation=0.1), "keep_best 'loss' is unknown"),
    (dict(train_only="head"), "needs a trained network"),
    (dict(bodies="motion", preprocess="msg3d"), "is for preprocess='paper'"),
    (lambda: Config().replace(ephocs=3), "epochs"),
    (lambda: Config.preset("ntu60-xsub-joints"), "ntu60-xsub-joint"),
    (lambda: Config.preset("ntu60-xsub-joint", strem="bone"), "stream"),
    (lambda: Config.from_json('{"version": 1, "widhts": [6]}'), "widths"),
    (lambda: Config.from_json('{"version": 2}'), "version=2"),
    (lambda: Config.from_json('{"ema": 0.9}'), "ema=0.9 has no meaning"),
])
def test_config_errors_say_what_to_write_instead(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong() if callable(wrong) else Config(**wrong)


def test_values_come_in_any_form_of_their_type():
    config = Config(lr=np.float32(0.5), seed=np.int64(3), widths=[6, np.int32(12), 18],
                    init=Path("a/run"), guide=np.bool_(True))
    assert config == Config(lr=0.5, seed=3, widths=(6, 12, 18), init="a/run", guide=True)
    assert type(config.lr) is float and json.loads(config.to_json())["seed"] == 3


def test_configurations_of_old_runs_are_read():
    records = [json.loads(p.read_text()) for p in (ROOT / "data" / "results").rglob("*.json")]
    held = [r["config"] for r in records if isinstance(r, dict) and "config" in r]
    known = {f.name for f in fields(Config)}
    assert len(held) > 100
    for values in held:
        config = Config.from_json(json.dumps(values))
        for k in known & values.keys() - {"augment"}:
            assert getattr(config, k) == (tuple(v) if isinstance(v := values[k], list) else v)
    old = json.dumps({"aug_rotate": 17.0, "aug_crop": 0.5, "aug_flip": 0.0, "nesterov": True})
    assert Config.from_json(old) == Config(augment=Augment(rotate=17.0, crop=0.5))
    read = dict(norm_g="frobenius", modules_g="mean", beta_kernel="3x1")  # what was not an option
    assert Config.from_json('{"norm": "frobenius"}') == Config(norm="frobenius", **read)


def test_learning_rate_is_a_function_of_the_epoch():
    rates = [learning_rate(Config(lr=0.05, milestones=(2, 4)), e) for e in range(6)]
    assert np.allclose(rates, [0.05, 0.05, 0.005, 0.005, 0.0005, 0.0005])
    cosine = Config(lr=0.1, epochs=15, schedule="cosine", warmup=5)
    rates = [learning_rate(cosine, e) for e in (0, 4, 5, 10)]
    assert np.allclose(rates, [0.02, 0.1, 0.1, 0.05]) and 0 < learning_rate(cosine, 14) < 0.003
    assert dose(cosine, 33, 2) == 2 * (learning_rate(cosine, 0) + learning_rate(cosine, 1))
    assert dose(cosine, 33) == dose(cosine, 33, cosine.epochs)  # steps of 32 clips: two an epoch


# ---- runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread):
    return go(tmp_path_factory.mktemp("whole") / "r")


def test_run_is_deterministic_by_seed_and_leaves_the_global_generator_alone(tmp_path, whole):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = go(tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state()) and equal(again, whole)
    assert again.top1 == whole.top1
    assert np.array_equal(again.scores.probabilities, whole.scores.probabilities)
    for changes in (dict(seed=1), dict(order=1)):
        other = go(tmp_path / str(changes), **changes)
        assert not same(weights(other.folder), weights(whole.folder))


def test_run_record(whole):
    assert list(whole.history["epoch"]) == [1, 2, 3]
    assert np.allclose(whole.history["lr"], [0.05, 0.05, 0.005])
    assert whole.scores.names == [f"clip{i}" for i in range(14, 20)]
    env = whole.record["environment"]
    assert (env["torch"], env["threads"], env["device"]) == (torch.__version__, 1, "cpu")
    assert len(env["commit"]) >= 40
    net, header = load_checkpoint(whole.folder)
    expected = dict(classes=["up", "down", "still"], epoch=3, model="stf.backbone:MSG3D",
                    stream="joint", config=json.loads(json.dumps(asdict(whole.config))))
    assert not net.training and header["skeleton"]["name"] == "hand"
    assert {k: header[k] for k in expected} == expected
    files = {"checkpoint.safetensors", "config.json", "run.json", "scores.npz"}
    assert {p.name for p in whole.folder.iterdir()} - {".lock"} == files  # kept or not
    p = net(TinyStore().batch(np.arange(14, 20))[0]).softmax(1).detach()
    np.testing.assert_allclose(whole.scores.probabilities, p, atol=1e-6)


def test_finished_run_is_returned_and_another_config_or_store_refused(whole, monkeypatch):
    monkeypatch.setattr(train, "Training", lambda *a: pytest.fail("trained again"))
    for changes in (dict(), dict(stf_lr=0.5, stf_epochs=7, stf_milestones=(1,)), dict(losses=""),
                    dict(lambda_d=0.7, norm="rms", guide=True), dict(data="moved/nowhere")):
        again = run(whole.config.replace(**changes), progress=False)  # the store does not exist
        assert again.top1 == whole.top1 and equal(again, whole)
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        run(whole.config.replace(lr=0.01), progress=False)
    with pytest.raises(ConfigError, match="on other data"):
        go(whole.config, TinyStore(n=21))
    assert Run.load(whole.folder).config == whole.config


def test_a_second_stage_is_known_by_its_losses_and_its_start(whole):
    stage = whole.config.second_stage("d")
    publisher, other, moved = (stage.replace(init=f"{name}/weights.safetensors".strip("/"))
                               for name in ("publisher", "other", "moved/publisher"))
    for a, b, differ in (
            (stage, stage.replace(norm="frobenius", lambda_c=0.7), ["norm"]),
            (stage, stage.replace(lambda_d=0.7), ["lambda_d"]),
            (stage, stage.replace(losses="dc"), ["losses"]),
            (stage, stage.replace(init=f"elsewhere/{Path(stage.init).name}"), []),
            (stage, stage.replace(init="elsewhere/other"), ["init"]),
            (publisher, other, ["init"]), (publisher, moved, [])):
        assert train.same_config(a, b) == differ


def test_fraction_and_validation_are_of_the_training_clips(tmp_path):
    def parts(**changes):
        with one_accelerator("cpu") as a:
            t = Training(tiny(tmp_path, **changes), TinyStore(), a)
        return t.train, t.val, t.test

    fit, val, test = parts(validation=0.3)
    assert sorted([*fit, *val]) == list(range(14)) and len(val) == 5
    assert list(test) == list(range(14, 20)) and len(parts(fraction=0.5)[0]) == 7
    even = parts(fraction=0.4, stratified=True)[0]
    assert np.bincount(TinyStore().labels[even]).tolist() == [2, 2, 2]


def test_a_tracker_is_written(tmp_path):
    pytest.importorskip("tensorboard")
    r = go(tmp_path / "t", tracker="tensorboard", epochs=2)
    assert list((r.folder / "tensorboard").rglob("events*"))
    with pytest.raises(ConfigError, match="pip install wandb"):
        go(tmp_path / "w", tracker="wandb")


@pytest.mark.parametrize("by, column", [("accuracy", "val_top1"), ("ce", "val_ce")])
def test_best_epoch_is_chosen_on_validation_clips(tmp_path, monkeypatch, by, column):
    values = iter([40.0, 60.0, 60.0, 50.0])
    told = lambda scores, k=1: next(values) if len(scores) == 5 else 7.0
    monkeypatch.setattr(train, "top_k", told)
    r = go(tmp_path / "b", validation=0.3, keep_best=by, epochs=4)
    best = (r.history[column].idxmax() if by == "accuracy" else r.history[column].idxmin()) + 1
    assert r.record["best"]["epoch"] == best == load_checkpoint(r.folder / "best")[1]["epoch"]
    assert load_checkpoint(r.folder)[1]["epoch"] == 4 and r.top1 == 7  # of the last epoch
    assert r.record["clips"] == [9, 5, 6]
    assert same(r.network(best=True).state_dict(), weights(r.folder / "best"))
    if by == "ce":
        with one_accelerator("cpu") as a:
            x, y = TinyStore().batch(Training(r.config, TinyStore(), a).val)
        ce = torch.nn.functional.cross_entropy(r.network(best=True)(x), y).item()
        assert ce == pytest.approx(r.history["val_ce"].min(), rel=1e-4)


# ---- runs of the first edition


@pytest.fixture
def first_edition(tmp_path, whole):
    "A run's folder as the first edition wrote it."
    folder = tmp_path / "old"
    (folder / "checkpoint").mkdir(parents=True)
    net, header = load_checkpoint(whole.folder)
    header = {k: v for k, v in header.items() if k not in ("state", "data")}
    rewrite(folder / "checkpoint" / "weights.safetensors",
            {**header, "format": 1, "model": "msg3d"}, net.state_dict())
    for name in ("run.json", "scores.npz"):
        shutil.copy(whole.folder / name, folder)
    gone = dict(nesterov=True, decay=0.1, ema=0.0, sync_bn=False, evaluate_every=0, aug_crop=1.0)
    values = json.loads(whole.config.to_json())
    del values["augment"], values["tracker"]
    (folder / "config.json").write_text(json.dumps({**values, **gone, "folder": str(folder)}))
    return folder


def test_a_run_of_the_first_edition_is_read_and_started_from(first_edition, whole, tmp_path):
    old = Run.load(first_edition)
    assert old.top1 == whole.top1 == go(old.config).top1 and old.config.lr == 0.05
    assert same(old.network().state_dict(), weights(whole.folder))
    stage = dict(model="stf", losses="", epochs=1, init=str(first_edition))
    assert go(tmp_path / "s", **stage).history["ce"].notna().all()
    (first_edition / "run.json").unlink()
    with pytest.raises(ConfigError, match="earlier stf can't go on"):
        go(first_edition)


# ---- checkpoints


def test_checkpoint_is_replaced_read_and_published(tmp_path, whole):
    net, header = load_checkpoint(whole.folder)
    for _ in range(2):
        save_checkpoint(tmp_path / "w", net, header)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    for name in ("w", "w.safetensors"):
        assert same(weights(tmp_path / name), net.state_dict())
    small = save_checkpoint(tmp_path / "p" / "weights", net, header, half=True)
    assert {v.dtype for v in load_file(small).values()} == {torch.float16, torch.int64}
    assert load_file(small).keys() == net.state_dict().keys() and "state" not in read_header(small)
    assert load_checkpoint(tmp_path / "p")[1]["classes"] == header["classes"]
    other = go(tmp_path / "w", epochs=1)  # a folder goes before a file of its name
    assert same(weights(tmp_path / "w"), other.network().state_dict())


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n"


@pytest.mark.parametrize("spoil, message", [
    (lambda p: p.write_bytes(p.read_bytes()[:100]), "w.safetensors: no header of stf can be read"),
    (lambda p: p.write_bytes(to_bytes({"a": torch.zeros(1)})), "header format None"),
    (lambda p: p.write_bytes(to_bytes({}, {"format": "pt"})), "no header of stf .*; take one that"),
    (lambda p: p.write_bytes(POINTER), "w.safetensors: a Git LFS pointer.*; `git lfs pull`"),
    (dict(format=7), "header format 7"), (dict(classes=["a"]), "3 outputs, but 1 class names"),
    (dict(stream="hands"), "stream 'hands' is unknown"), (dict(bodies=[]), "bodies .. is unknown"),
    (dict(length=0), "from 1 to 30000; take one that `stf train`"),
    (dict(length=10**12), "length 1000000000000 .* from 1 to 30000"),
    (dict(length="long"), "lacks length"), (dict(classes=[1, 2, 3]), "classes are not names"),
    (dict(preprocess="msg3d"), "no input of 4 channels"),
    (dict(skeleton={}), "its skeleton is invalid: .*missing 5"),
    (dict(widths=3), "make no network"),
    (dict(widths=[6, 6, 12]), "make no network: Error.*size mismatch"),
    *((sizes, "weights are too few for these sizes") for sizes in (  # gigabytes, or hours
        dict(widths=[60_000] * 3), dict(windows=[1001]), dict(gcn_scales=10**9),
        dict(g3d_scales=10**9), dict(model="stgcn", layers=[10**9] * 3),
        dict(model="stgcn", temporal_kernel=10**7 + 1))),
    (dict(model="torch.nn:Linear"), "no network 'torch.nn:Linear'"),
    (dict(model="posixpath:join"), "no network 'posixpath:join'"),
    (dict(model="antigravity:fly"), "import antigravity first"),
])
def test_spoilt_checkpoints_are_refused(tmp_path, whole, spoil, message):
    file = save_checkpoint(tmp_path / "w", *load_checkpoint(whole.folder))
    spoil(file) if callable(spoil) else rewrite(file, {**read_header(file), **spoil})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "w")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("text, message", [
    (b"PK", "x.pt: a file of PyTorch; `stf import-msg3d`"), (POINTER, "x.pt: a Git LFS pointer")])
def test_weights_of_pytorch_are_named(tmp_path, text, message):
    (tmp_path / "x.pt").write_bytes(text)
    for path in (tmp_path, tmp_path / "x.pt"):
        with pytest.raises(CheckpointError, match=message):
            read_header(path)
    (tmp_path / "clip.skeleton").touch()
    with pytest.raises(FileNotFoundError, match="import-msg3d"):  # but perhaps recordings
        read_header(tmp_path)


def test_random_damage_of_a_header_is_named(tmp_path, whole):
    "A byte is replaced, or the file is cut: it is loaded, or refused by name."
    file = save_checkpoint(tmp_path / "w", *load_checkpoint(whole.folder))
    data, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(400):
        at = int(rng.integers(8 + int.from_bytes(data[:8], "little")))
        rest = rng.bytes(1) + data[at + 1 :] if rng.random() < 0.8 else b""
        file.write_bytes(data[:at] + rest)
        try:
            load_checkpoint(file)
        except CheckpointError as e:
            refused += str(file) in str(e) or pytest.fail(f"names no file: {e}")
    assert refused > 100


@pytest.mark.parametrize("spoil", [
    lambda header, tensors: header.pop("state"),
    lambda header, tensors: header["state"].pop("step"),
    lambda header, tensors: header.update(state=5),
    lambda header, tensors: header["state"].update(epoch="2"),
    lambda header, tensors: tensors.pop("state/3"),
    lambda header, tensors: tensors.update({"state/3": torch.zeros(7)})])
def test_a_damaged_training_state_is_named(tmp_path, spoil, interruptible):
    config = tiny(tmp_path / "r")
    with pytest.raises(KeyboardInterrupt):
        go(config, pressing(5))
    file = config.run_folder / "checkpoint.safetensors"
    header, tensors = read_header(file), load_file(file)
    spoil(header, tensors)
    rewrite(file, header, tensors)
    with pytest.raises(CheckpointError, match="its training state is damaged"):
        go(config)
    rewrite(file, {**header, "config": 5})
    with pytest.raises(ConfigError, match="r holds no configuration that can be read"):
        go(config)


@pytest.mark.parametrize("name, texts, message", [
    ("config.json", ("{", "[]", "null", '{"widths": null}', '{"augment": {"flip": 7}}'),
     "config.json: not a configuration"),
    ("run.json", ("", "{}", "null", "[]"), "run.json: a damaged record"),
    ("scores.npz", ("",), "scores.npz: not a file of scores")])
def test_a_damaged_record_is_named(tmp_path, whole, name, texts, message):
    shutil.copytree(whole.folder, tmp_path / "r")
    for text in texts:
        (tmp_path / "r" / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            Run.load(tmp_path / "r")


class Own(STFNet):
    "A network of a user's own: nothing is registered anywhere."


def test_a_network_of_ones_own_is_trained_and_saved(tmp_path):
    model = f"{__name__}:Own"
    r = go(tmp_path / "o", model=model, losses="d", epochs=1)
    assert type(r.network()) is Own and "d" in r.history and read_header(r.folder)["model"] == model
    stage = r.config.second_stage("dc").replace(epochs=1)
    assert stage.model == model and go(stage).history["c"].notna().all()
    with pytest.raises(ConfigError, match="no network 'own'"):
        tiny(tmp_path, model="own")

    class Hidden(STFNet):
        pass

    hidden = Hidden(3, HAND, in_channels=4, num_bodies=1, widths=(6, 6, 6))
    with pytest.raises(ConfigError, match="Hidden"):  # could never be loaded again
        save_checkpoint(tmp_path / "h", hidden, read_header(r.folder))


# ---- the second stage


@pytest.mark.parametrize("change, message", [
    (dict(stream="bone"), "its stream is joint, this training's bone"),
    (dict(gcn_scales=3), "its gcn_scales is 2"), (dict(preprocess="msg3d"), "its preprocess")])
def test_a_baseline_of_something_else_is_refused(tmp_path, whole, change, message):
    with pytest.raises(ConfigError, match=message):
        go(tmp_path / "s", model="stf", init=str(whole.folder), **change)


def test_run_stf_chains_and_averages(tmp_path):
    config = tiny(tmp_path / "m", epochs=2, stf_epochs=1, stf_lr=1e-3)
    both = run_stf(config, TinyStore(), progress=False)
    e, dcg = both.runs["Le"], both.runs["M4"]
    assert e.config.init == dcg.config.init == str(both.runs["M1"].folder)
    assert {"ce", "e"} <= set(e.history) and "e" not in dcg.history
    assert {"ce", "d", "c", "g", "g_ratio", "g_spread"} <= set(dcg.history)
    mean = (e.scores.probabilities + dcg.scores.probabilities) / 2
    assert np.allclose(both.scores.probabilities, mean) and both.top1 == top_k(both.scores)
    with pytest.raises(ConfigError, match="starts with a baseline .*not stf"):
        run_stf(dcg.config, TinyStore(), progress=False)
    with pytest.raises(ConfigError, match="its network is STFNet, this training's MSG3D"):
        go(tmp_path / "x", init=str(e.folder))
    go(tmp_path / "t", model="stf", losses="", epochs=1, init=str(e.folder))


def test_only_the_head_is_trained_and_other_classes_get_a_fresh_one(tmp_path, whole):
    other, before = TinyStore(), weights(whole.folder)
    other.classes, other.labels = ["left", "right"], np.arange(20) % 2
    changes = dict(init=str(whole.folder), epochs=1, lr=0.5)
    with pytest.raises(ConfigError, match="its classes is"):
        go(tmp_path / "a", other, **changes)
    for name, store, shape in (("b", other, (2, 6)), ("c", TinyStore(), (3, 6))):
        run = go(tmp_path / name, store, train_only="head", checkpointing=name == "c", **changes)
        after = weights(run.folder)
        assert all(torch.equal(before[k], after[k]) for k in before if not k.startswith("fc."))
        assert after["fc.weight"].shape == shape
        assert not torch.equal(after["fc.weight"][:2], before["fc.weight"][:2])


# ---- what goes wrong


def test_nan_names_the_clips_and_leaves_the_last_checkpoint(tmp_path, whole):
    batches = Batches(TinyStore(), np.arange(14), 5)
    batches.set_epoch(1)
    bad = batches.steps[1][0]  # a clip of epoch 2, step 2
    good = go(tmp_path / "good", epochs=1)
    with pytest.raises(FloatingPointError, match=rf"epoch 2, step 2: .*this step: .*clip{bad}\b"):
        go(tmp_path / "n", spoilt(bad, after=3))
    assert same(weights(tmp_path / "n"), weights(good.folder)) and equal(go(tmp_path / "n"), whole)


def test_fp16_may_leave_out_steps_but_not_for_ever(tmp_path):
    with one_accelerator("cpu") as a:
        t = Training(tiny(tmp_path / "x"), TinyStore(), a)
    scale, total = [4.0], torch.tensor([1.0, 0.5], dtype=torch.float64)
    t.accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale[0]),
                                    reduce=lambda v: v)
    step = lambda loss, norm: t.count([0, 1], ["loss", "ce"], total * loss, norm, False)
    step(1.0, float("inf")), step(1.0, 2.0)
    with pytest.raises(FloatingPointError, match="clip0, clip1"):
        step(float("nan"), 1.0)
    scale[0] = 0.5  # it overflows without being scaled
    with pytest.raises(FloatingPointError, match="gradient norm inf"):
        step(1.0, float("inf"))
    assert t.state["sums"]["clips"] == 4 and t.state["step"] == 2


def test_a_run_whose_steps_were_all_left_out_goes_on(tmp_path):
    "fp16's first steps may overflow: stopped then, its checkpoint has no momentum. Others must."
    with one_accelerator("cpu") as a:
        t = Training(tiny(tmp_path / "x"), TinyStore(), a)
        t.state["step"] = 1
        t.save()
        with pytest.raises(CheckpointError, match="its training state is damaged"):
            Training(t.config, TinyStore(), a).load()
        a.scaler = SimpleNamespace(state_dict=lambda: {"scale": 8.0}, load_state_dict=lambda s: s)
        t.save()
        assert Training(t.config, TinyStore(), a).load().state["step"] == 1


def test_ctrl_c_saves_the_step_and_resumes_exactly(tmp_path, whole, interruptible):
    config, store = tiny(tmp_path / "c"), pressing(2, 6)
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 1 of 3, nothing is lost"):
        go(config, store)
    state = read_header(config.run_folder)["state"]
    assert state["epoch"] == 0 and state["step"] in (1, 2)  # the loader makes the next batch ahead
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2"):
        go(config, store)
    assert equal(go(config), whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("stopped", [False, True])
def test_each_epoch_has_its_own_order_and_variants(tmp_path, interruptible, stopped):
    """An accelerator's loader sets its dataset's epoch, too: once, each pass was the first one, the
    same batches and random variants again."""
    seen, config = [], tiny(tmp_path / "e", augment=Augment(rotate=17.0), accumulate=2)

    class Seen(TinyStore):
        def batch(self, indices, seed=None, **options):
            seen.extend([] if seed is None else [(tuple(seed), *map(int, indices))])
            return super().batch(indices, **options)

    if stopped:
        with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2"):
            go(config, Seen(hook=pressing(10).hook))
        seen.clear()
    go(config, Seen())
    batches = Batches(TinyStore(), np.arange(14), 5, 2, 0, config.augment)
    wanted = []
    for epoch in range(3):
        batches.set_epoch(epoch)
        wanted += [((0, epoch), *part.tolist()) for part in batches.micro]
    assert seen == wanted[len(wanted) - len(seen):]  # six micro-batches an epoch
    assert 6 < len(seen) < 12 if stopped else len(seen) == 18


def test_a_signal_while_the_test_clips_are_scored_is_not_lost(tmp_path, interruptible):
    config = tiny(tmp_path / "r", epochs=1)
    with pytest.raises(KeyboardInterrupt, match="everything is saved"):
        run_stf(config, pressing(4), progress=False)
    assert Run.load(config.run_folder) and not config.second_stage("dcg").run_folder.exists()


def test_one_training_at_a_time_in_a_process_and_in_a_folder(tmp_path, whole):
    config, results = tiny(tmp_path / "u"), []
    with pytest.raises(RuntimeError, match="one training at a time"):
        go(config, TinyStore(hook=lambda *batch: go(tmp_path / "inner")))
    with in_use(config.run_folder), pytest.raises(BlockingIOError, match="is at work in"):
        go(config)
    thread = threading.Thread(target=lambda: results.append(go(config)))  # not in the main one
    thread.start(), thread.join()
    assert equal(results[0], whole)


def test_errors_before_training(tmp_path):
    with pytest.raises(Exception, match="nowhere"):
        run(tiny(tmp_path / "x"), progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device"):
            go(tmp_path / "y", device="cuda")
    unlabelled = TinyStore()
    unlabelled.labels = np.where(np.arange(20) == 5, -1, unlabelled.labels)
    alike = TinyStore()
    alike.labels, alike.classes = alike.labels * 0, ["up"]
    for store, changes, message in (
            (unlabelled, {}, "'clip5' is a training clip"),
            (alike, {}, "nowhere: only one class, 'up': nothing to learn"),
            (None, dict(validation=0.99), "takes 14 of the 14"),
            (None, dict(validation=0.05, keep_best="ce"), "takes 0 of the 14"),
            (None, dict(accumulate=8), "can't be cut into 8 parts")):
        with pytest.raises(ValueError, match=message):
            go(tmp_path / "u", store, **changes)
    with pytest.raises(RuntimeError, match="^something else$"):
        go(tmp_path / "o", hungry(RuntimeError("something else")))
    other = go(tmp_path / "o", batch_size=3, lr=0.01, epochs=1)  # before the first checkpoint
    assert other.config.lr == 0.01


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, whole, monkeypatch):
    calls, real = [], os.fsync

    def fsync(f):
        calls.append(f)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(f)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="no room left on the disk of .*d: make room"):
        go(tmp_path / "d")
    monkeypatch.undo()
    assert not list((tmp_path / "d").glob("*.new")) and load_checkpoint(tmp_path / "d")
    assert equal(go(tmp_path / "d"), whole)


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_parts(tmp_path, whole):
    config, advice = tiny(tmp_path / "o"), "batch_size=5, accumulate=1.*larger accumulate"
    with pytest.raises(MemoryError, match=advice):
        go(config, hungry(MemoryError(), 4))
    with pytest.raises(ConfigError, match="lr 0.05 .now 0.01."):
        go(config.replace(lr=0.01))
    r = go(config.replace(accumulate=2), hungry(MemoryError()))
    assert r.record["changes"] == [{"epoch": 1, "step": 0, "accumulate": [1, 2]}]
    assert r.history.iloc[0].equals(whole.history.iloc[0])
    assert not r.history.equals(whole.history) and r.config.accumulate == 2
    with pytest.raises(ConfigError, match="accumulate 2 .now 1."):  # finished
        go(config)


# ---- killed


ALL = dict(model="stf", losses="ed", accumulate=2, precision="bf16", clip_grad=1.0,
           schedule="cosine", warmup=1, control="random")
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

    for name in ("fsync", "rename", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))


def work(folder, changes, kill_at):
    torch.set_num_threads(1)
    if kill_at:
        die_at(kill_at)
    go(folder, **changes)


def child(folder, changes, delay=None, kill_at=0):
    "A run in a process of its own, killed after a delay or at some write; its exit code."
    forks = multiprocessing.get_context("forkserver")  # which imports this module once
    forks.set_forkserver_preload([__name__])
    process = forks.Process(target=work, args=(folder, changes, kill_at))
    process.start(), process.join(delay), process.kill(), process.join()
    return process.exitcode


def killed(status, folder):
    "Whether the run was killed; then its checkpoint, if there is one, can be read."
    assert status in (0, -signal.SIGKILL), f"died of something else: status {status}"
    if status and (folder / "checkpoint.safetensors").exists():
        load_checkpoint(folder)
    return status != 0


@pytest.mark.slow
@pytest.mark.parametrize("changes", [
    dict(), dict(save_every=1), dict(save_every=1, validation=0.3, keep_best="ce", **ALL)])
def test_killed_at_random_moments_a_run_ends_with_the_same_weights(tmp_path, changes):
    rng, kills, n = np.random.default_rng(len(changes)), 0, 0
    assert child(tmp_path / "first", changes) == 0  # which starts the server
    began = time.perf_counter()
    assert child(tmp_path / "whole", changes) == 0
    alone, whole = time.perf_counter() - began, Run.load(tmp_path / "whole")
    while kills < 10:
        n, here, folder = n + 1, 0, tmp_path / f"r{n}"
        while killed(child(folder, changes, rng.uniform(0.1, 0.6) * alone), folder):
            here += 1
            if here > 5:  # several runs shall end
                assert child(folder, changes) == 0
                break
        kills += here
        assert equal(Run.load(folder), whole)
        best = [weights(f / "best") for f in (folder, whole.folder) if changes.get("keep_best")]
        assert not best or same(*best)


@pytest.mark.slow
def test_killed_at_each_write_a_run_ends_with_the_same_weights(tmp_path):
    changes, moment = dict(epochs=2, milestones=[1], validation=0.3, keep_best="ce"), 0
    assert child(tmp_path / "whole", changes) == 0
    while True:
        moment, folder = moment + 1, tmp_path / f"r{moment + 1}"
        if not killed(child(folder, changes, kill_at=moment), folder):
            break  # it made fewer writes than that
        if moment % 3:  # every third one is also taken to its end
            continue
        assert child(folder, changes) == 0 and not list(folder.glob("*.new"))
        for part in ("", "best"):
            assert same(weights(folder / part), weights(tmp_path / "whole" / part)), moment
    assert moment > 12


# ---- precision, micro-batches


@pytest.mark.parametrize("changes", [
    dict(precision="bf16"), ALL, pytest.param(dict(accumulate=2), marks=pytest.mark.slow)])
def test_every_variant_resumes_exactly(tmp_path, changes, interruptible):
    options = dict(epochs=2, milestones=(1,), **changes)
    first = go(tmp_path / "w", **options)
    with pytest.raises(KeyboardInterrupt, match="nothing is lost"):  # SIGTERM: as a scheduler does
        go(tmp_path / "c", pressing(5, what=signal.SIGTERM), **options)
    assert equal(go(tmp_path / "c", **options), first) and np.isfinite(first.history["loss"]).all()
    assert all(v.dtype != torch.bfloat16 for v in weights(first.folder).values())


def test_gradient_is_clipped_and_momentum_may_be_none(tmp_path, monkeypatch):
    norms, real = [], torch.optim.SGD.step

    def step(self, *args):
        gradients = [p.grad for g in self.param_groups for p in g["params"]]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))
        return real(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    go(tmp_path / "g", clip_grad=1e-3, momentum=0.0, epochs=1)
    assert norms and np.allclose(norms, 1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs a C++ compiler")
def test_compiled_training_is_the_eager_one_and_resumes(tmp_path, interruptible):
    # parts of one size: one program; small steps: no chaos
    options = dict(model="stf", losses="dcg", epochs=2, milestones=(), lr=1e-4, batch_size=7)
    eager = go(tmp_path / "e", **options)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "c", pressing(3), compile=True, **options)
    compiled, other = (go(tmp_path / k, compile=True, **options) for k in ("c", "d"))
    assert same(weights(compiled.folder), weights(other.folder))
    pd.testing.assert_frame_equal(compiled.history, eager.history, rtol=1e-3, atol=1e-3)


def test_each_training_of_a_process_is_compiled(tmp_path, monkeypatch):
    "Dynamo compiles a function for 8 inputs of one process, then runs it as it is, with a warning."
    compile = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile)
    with torch._dynamo.config.patch(cache_size_limit=1, fail_on_cache_limit_hit=True):
        for width in (6, 12):
            go(tmp_path / f"{width}", compile=True, epochs=1, batch_size=7, widths=(6, 6, width))


def test_a_launcher_does_not_compile(monkeypatch):
    "Its configuration reaches us by the environment; the losses can't be compiled whole."
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with one_accelerator("cpu") as a:
        net = a.prepare(torch.nn.Linear(2, 2))
        assert type(net) is torch.nn.Linear


# ---- a real store


def recorded(folder, n, classes, skeleton):
    "A store of random clips, two thirds of them to train on."
    rng, made, V = np.random.default_rng(0), [], skeleton.num_joints
    for i in range(n):
        path = np.cumsum(rng.normal(0, 0.1, (1, int(rng.integers(5, 12)), V, 3)), axis=1)
        joints = path.astype(np.float32) + np.arange(V, dtype=np.float32)[:, None]
        made.append(Clip(joints, np.ones(joints.shape[:3], np.float32), f"c{i}",
                         label=i % len(classes), class_name=classes[i % len(classes)],
                         skeleton=skeleton, split={"mine": "train" if 3 * i < 2 * n else "test"}))
    return ClipStore.build(made, folder, progress=False)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    "A real store of thirty clips of three classes, of changing length."
    return recorded(tmp_path_factory.mktemp("clips") / "store", 30, "abc", HAND)


def test_some_classes_only(tmp_path, clips, monkeypatch):
    r = go(tmp_path / "s", clips, protocol="mine", classes=("c", "a"), epochs=1)
    assert r.record["clips"] == [13, 0, 7] and load_checkpoint(r.folder)[1]["classes"] == ["c", "a"]
    command = f"stf evaluate {r.folder}/checkpoint --store {clips.folder} --protocol mine --save"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(tmp_path / "scores.npz")])
    cli.main()
    scores = Scores.load(tmp_path / "scores.npz")  # in the network's order of classes
    assert scores.classes == r.scores.classes == ["c", "a"] and top_k(scores) == r.top1
    assert set(scores.names) == set(r.scores.names)
    with pytest.raises(ValueError, match="'d'"):
        go(tmp_path / "t", clips, protocol="mine", classes=("a", "d"))


def test_augmented_clips_resume_exactly(tmp_path, clips, interruptible, monkeypatch):
    augment, calls, real = {"rotate": 20.0, "crop": 0.5, "drop_joints": 0.2}, [], clips.batch
    options = dict(protocol="mine", augment=augment, accumulate=2, time="resize")
    first = go(tmp_path / "w", clips, **options)

    def batch(indices, **options):
        calls.append(len(calls) == 8 and os.kill(os.getpid(), signal.SIGINT))
        return real(indices, **options)

    monkeypatch.setattr(clips, "batch", batch)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "c", clips, **options)
    assert equal(go(tmp_path / "c", clips, **options), first)
    assert load_checkpoint(first.folder)[1]["time"] == "resize"


def test_the_choice_of_statistics_moves_later_passes_alone(tmp_path):
    def ends(losses, **changes):
        return [weights(go(tmp_path / f"{s}-{losses}", statistics=s, model="stf", losses=losses,
                           epochs=1, **changes).folder) for s in ("running", "batch")]

    a, b = ends("e", lambda_e=1.0)
    assert not torch.allclose(a["fc.weight"], b["fc.weight"], atol=1e-6)
    a, b = ends("")
    assert all(torch.allclose(a[k].double(), b[k].double(), rtol=1e-4, atol=1e-6) for k in a)


# ---- published weights


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    "A thin MS-G3D of NTU 60 in a file as the public code writes it, and the network."
    torch.manual_seed(0)
    sizes = dict(widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,))
    net = MSG3D(60, SKELETONS["ntu25"], **sizes).eval()
    file = tmp_path_factory.mktemp("public") / "ntu60-xsub-joint.pt"
    torch.save(net.state_dict(), file)
    return file, net


def changed(public, folder, change):
    state = {k: v.clone() for k, v in public[1].state_dict().items()}
    torch.save(change(state), folder / "spoilt.pt")
    return folder / "spoilt.pt"


def without(*ends):
    return lambda s: {k: v for k, v in s.items() if not k.startswith(ends) and not k.endswith(ends)}


@pytest.mark.parametrize("change", [
    lambda s: s, lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": s, "epoch": 3}, without("num_batches_tracked")])
def test_public_weights_are_imported(tmp_path, public, change):
    import_msg3d(changed(public, tmp_path, change), tmp_path / "ours", stream="bone")
    net, header = load_checkpoint(tmp_path / "ours")
    x = torch.randn(2, 3, 20, 25, 2)
    assert torch.equal(net(x), public[1](x)) and header["skeleton"]["name"] == "ntu25"
    expected = dict(stream="bone", preprocess="msg3d", length=300, in_channels=3, num_bodies=2,
                    num_classes=60, classes=class_names("ntu60"))
    assert {k: header[k] for k in expected} == expected


@pytest.mark.parametrize("change, options, message", [
    (dict(), dict(stream=""), "stream='joint', or bone"),
    (dict(), dict(stream="bones"), "did you mean 'bone'"),
    (dict(), dict(classes=list("abc")), "60 outputs, but 3 class names"),
    (dict(), dict(skeleton="kinect20"), "on 25 joints; skeletons with so many: .'ntu25'"),
    (dict(), dict(skeleton=SKELETONS["kinect20"]), "on 25 joints"),
    (dict(), dict(preset="ntu60-xsub-bone"), "stream 'joint', unlike preset"),
    (dict(), dict(preset="ntu60-xsub-joint"), r"has widths \(6, 6, 6\), gcn_scales 2, .*unlike"),
    (dict(), dict(preset="ntu120-xsub-joint"), "60 classes, unlike preset"),
    (dict(), dict(preset="ntu60-xsub-joinr"), "did you mean 'ntu60-xsub-joint'"),
    ({"fc.weight": torch.ones(7, 6), "fc.bias": torch.ones(7)}, {}, "has 7 outputs: name them"),
    ({"fc.weight": torch.tensor(1.0)}, {}, r"'fc.weight' is \(\)"),
    ({"sgcn1.0.A_res": torch.zeros(0, 25)}, {}, r"'sgcn1.0.A_res' is \(0, 25\)"),
    ({"sgcn1.0.mlp.layers.0.weight": torch.ones(6, 8, 1, 1)}, {}, "has 4 input channels, public"),
    ({"stranger": torch.zeros(1)}, {}, r"1 unknown \['stranger'\]"),
    ({"fc.bias": torch.ones(60) * torch.nan}, {}, "fc.bias and 0 other tensors hold .* not finite"),
    ({"data_bn.weight": torch.ones(75)}, {}, "data_bn"),
    (without("fc."), {}, "tensor 'fc.weight' is missing"),
    (without("sgcn1.0.A_res"), {}, "'sgcn1.0.A_res' is missing"),
    (without("tcn3.branches.2"), {}, r"missing \['tcn3"),
    (lambda s: [1, 2], {}, "not a dictionary"), (lambda s: {"a": 1}, {}, "not a dictionary"),
    (lambda s: {}, {}, "not a dictionary"),
])
def test_each_way_of_being_wrong_has_its_own_words(tmp_path, public, change, options, message):
    file = changed(public, tmp_path, change if callable(change) else lambda s: {**s, **change})
    with pytest.raises(ConfigError, match=message):
        import_msg3d(file, tmp_path / "ours", **{"stream": "joint", **options})
    assert not (tmp_path / "ours").exists()


class Calls:
    def __reduce__(self):
        return os.system, ("touch harm",)


@pytest.mark.parametrize("write, message", [
    (lambda p, real: torch.save({"fc.weight": Calls()}, p), "it would call posix.system"),
    (lambda p, real: torch.save({"fc.weight": Calls()}, p, _use_new_zipfile_serialization=False),
     "refused: on loading it would call posix.system"),
    (lambda p, real: p.write_bytes(b"no pickle at all"), "not a file of tensors"),
    (lambda p, real: p.write_bytes(b""), "not a file of tensors"),
    (lambda p, real: p.write_bytes(POINTER), "x.pt: a Git LFS pointer"),
    (lambda p, real: p.write_bytes(real.read_bytes()[:-5000]), "not a file of tensors"),
    (lambda p, real: None, "x.pt: No such file or directory")])
def test_hostile_and_broken_files_are_refused(tmp_path, public, monkeypatch, write, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.pt", public[0])
    with pytest.raises(CheckpointError, match=message):
        import_msg3d(tmp_path / "x.pt", tmp_path / "ours", stream="joint")
    assert not (tmp_path / "harm").exists()


def test_the_second_stage_starts_from_public_weights(tmp_path, public):
    ours = str(import_msg3d(public[0], tmp_path / "ours", stream="joint").parent)
    store = recorded(tmp_path / "store", 60, class_names("ntu60"), SKELETONS["ntu25"])
    config = tiny(tmp_path / "m", protocol="mine", preprocess="msg3d", num_bodies=2, stf_epochs=1,
                  stf_lr=1e-4).second_stage("dcg").replace(init=ours)
    r = go(config, store)
    assert r.history["g"].notna().all() and load_checkpoint(r.folder)[1]["in_channels"] == 3
    with pytest.raises(ConfigError, match="its preprocess is msg3d, this training's paper"):
        go(config.replace(folder=str(tmp_path / "p"), preprocess="paper"), store)


# ---- CUDA


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("of", [
    dict(), dict(precision="bf16"), dict(precision="fp16"),
    dict(precision="bf16", compile=True, checkpointing=True)], ids=str)
def test_cuda_training_stops_and_goes_on(tmp_path, of, clips, interruptible, monkeypatch):
    options = dict(device="cuda", model="stf", protocol="mine", accumulate=2, **of)
    whole = go(tmp_path / "w", clips, **options)
    assert np.isfinite(whole.history["loss"]).all()
    assert whole.record["environment"]["device"] != "cpu"
    real, calls = Training.count, []

    def counting(self, *args):
        calls.append(len(calls) == 5 and os.kill(os.getpid(), signal.SIGINT))
        return real(self, *args)

    monkeypatch.setattr(Training, "count", counting)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "c", clips, **options)
    again = go(tmp_path / "c", clips, **options)
    near = {"train_top1": 15}  # sums differ from run to run, and two of 14 clips may go over
    for column, values in whole.history.items():
        np.testing.assert_allclose(again.history[column], values, 0.05, near.get(column, 0.05))
    with pytest.raises(FloatingPointError, match=r"Clips of this step: .*\bclip3\b"):
        go(tmp_path / "n", spoilt(3), device="cuda")
