"""Prediction: wrong input of every kind, broken files, fusion, focus on the clip's own frames."""
import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.modules.batchnorm import _BatchNorm

from stf.backbone import MSG3D, Features
from stf.checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from stf.cli import main
from stf.clips import Clip, ClipError, open_clips, save_clip
from stf.dataset import ClipStore, make_batch
from stf.evaluate import average, predict_scores
from stf.focus import module_focus
from stf.predict import (MismatchError, Prediction, Predictor, place_focus, predict, predict_all,
                         predict_command)
from stf.preparation import prepare
from stf.skeleton import SKELETONS, Skeleton
from stf.stf_module import STFNet
from stf.stgcn import STGCN
from stf.synthetic import SyntheticConfig, write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,), num_bodies=2)
CLASSES = ["sitting down", "clapping", "hand waving", "handshaking"]
FACTS = dict(classes=CLASSES, stream="joint", preprocess="paper", length=16)
HAND = Skeleton("hand", ("wrist", "palm", "tip"), ((1, 0), (2, 1)), centre=0, height=(0, 1, 2))


def network(folder, seed=0, kind=MSG3D, skeleton=SKELETONS["ntu25"], channels=4, clips=None,
            **facts):
    "An untrained checkpoint whose probabilities differ from clip to clip."
    torch.manual_seed(seed)
    facts = {**FACTS, **facts}
    net = kind(len(facts["classes"]), skeleton, in_channels=channels, **TINY)
    if clips:  # centred features, and a head that tells these clips apart
        with torch.no_grad():
            options = {k: facts[k] for k in ("stream", "preprocess", "length")}
            pooled = net.eval().features(make_batch(clips, **options).x).last.mean((1, 3, 4))
            net.fc.weight.div_((pooled @ net.fc.weight.T).std(0).mean())
            net.fc.bias.copy_(-net.fc.weight @ pooled.mean(0))
    save_checkpoint(Path(folder) / "weights", net, facts)
    return str(folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "Eight recordings, two of them of two people."
    folder = tmp_path_factory.mktemp("raw") / "raw"
    some = SyntheticConfig(actions=(8, 10, 23, 58), subjects=(3, 6), cameras=(2,))
    write_synthetic(folder, some, progress=False)
    return folder


@pytest.fixture(scope="module")
def people(raw):
    return list(open_clips(raw))


@pytest.fixture(scope="module")
def nets(tmp_path_factory, people):
    at = tmp_path_factory.mktemp("nets")
    return {"joint": network(at / "joint", clips=people),
            "bone": network(at / "bone", 1, STFNet, clips=people, stream="bone", length=24),
            "msg3d": network(at / "msg3d", 2, channels=3, clips=people, preprocess="msg3d",
                             length=20)}


def random_clip(seed, V=25, C=3, M=2, T=20, gaps=True):
    rng = np.random.default_rng(seed)
    joints = rng.normal(size=(M, T, V, C)).astype(np.float32)
    visible = rng.uniform(0.2, 1, size=(M, T, V)).astype(np.float32)
    if gaps:
        away = rng.random((M, T)) < 0.2
        away[0, rng.integers(T)] = False
        joints[away], visible[away] = 0, 0
    return Clip(joints, visible, f"clip{seed}")


# focus on the clip's own bodies and frames


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["paper", "msg3d"]), st.integers(1, 40),
       st.integers(1, 60))
def test_focus_comes_back_to_its_body_and_frame(seed, preset, T, length):
    """A focus that is the number of body and frame comes back as that number."""
    clip = random_clip(seed, T=T)
    _, body, frame = prepare(clip, preprocess=preset, length=length)
    number = np.where(body >= 0, 1 + 1000 * body + frame, 1e6)
    back = place_focus(np.repeat(number[..., None], 25, axis=2), body, frame, clip.present)
    assert back.shape == (2, T, 25) and (back[~clip.present] == 0).all() and back.max() < 1e6
    for m, t in np.argwhere(clip.present):
        if ((body == m) & (frame == t)).any():
            assert back[m, t, 0] == 1 + 1000 * m + t


def test_frames_between_sampled_ones_have_focus(nets, people):
    """500 frames into 16: without interpolation 484 frames would have none."""
    times = np.linspace(0, people[2].joints.shape[1] - 1, 500).round().astype(int)
    p = predict(Clip(people[2].joints[:1, times], name="slow"), nets["joint"])
    assert p.focus.shape == (1, 500, 25) and (p.focus.sum((0, 2)) > 0).mean() > 0.5
    assert np.abs(np.diff(p.focus, axis=1)).max() < 0.2  # and no comb of zeros in between


def test_absent_and_third_bodies_have_no_focus(nets, people):
    two = people[-1].joints[:2, :30].copy()
    two[0, 3:5], two[1, 10:20] = 0, 0
    child = two[:1] * 0.01  # the smallest spread: not shown to the network
    child[:, :2] = 0
    clip = Clip(np.concatenate([two, child]), name="three")
    q = predict(clip, [nets["joint"], nets["bone"]]).focus
    assert q.shape == (3, 30, 25) and q.dtype == np.float32 and 0 <= q.min() and q.max() <= 1
    assert (q[~clip.present] == 0).all() and (q[2] == 0).all() and q[:2].any()


# probabilities


def test_predictions_are_those_of_evaluation_and_averages_of_probabilities(nets, raw, tmp_path):
    """Not to the last bit: fusing batch norms rounds otherwise, which these heads magnify."""
    store, scores = ClipStore.build(open_clips(raw), tmp_path / "store", progress=False), []
    for name in ("joint", "bone"):
        net, header = load_checkpoint(nets[name])
        options = {k: header[k] for k in ("stream", "preprocess", "length", "num_bodies")}
        scores.append(predict_scores(net, store, range(8), progress=False, **options))
        alone = [p.probabilities for p in predict_all(raw, nets[name])]
        np.testing.assert_allclose(alone, scores[-1].probabilities, atol=2e-4)
    both = list(predict_all(raw, [nets["joint"], nets["bone"]]))
    by_hand = average(*scores).probabilities
    np.testing.assert_allclose([p.probabilities for p in both], by_hand, atol=2e-4)
    assert np.ptp(by_hand, axis=0).max() > 0.05  # the test would see clips mixed up
    assert [p.name for p in both] == store.names
    labels = {p.name[-4:]: p.label for p in both}
    assert labels == dict(zip(("A008", "A010", "A023", "A058"), CLASSES))


def test_predictions_do_not_depend_on_batch_size(nets, raw):
    """Three preparations averaged; the shipped networks (trained: clips differ) more exactly."""
    for nets, atol in (([nets[k] for k in nets], 1e-2), (None, 1e-3)):
        predictor = Predictor(nets)
        one, *others = ([*predict_all(raw, predictor, n, focus=True)] for n in (1, 3, 8))
        for a, b in (pair for other in others for pair in zip(one, other)):
            assert a.name == b.name and a.about == b.about
            np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)
            np.testing.assert_allclose(a.focus, b.focus, atol=atol)


class Plain(torch.nn.Module):
    "A backbone of one's own, whose batch norm can't be fused."

    hparams = ("num_classes", "in_channels", "num_bodies")

    def __init__(self, num_classes, skeleton, in_channels=4, num_bodies=2):
        super().__init__()
        self.num_classes, self.skeleton = num_classes, skeleton
        self.in_channels, self.num_bodies = in_channels, num_bodies
        self.conv, self.norm = torch.nn.Conv2d(in_channels, 6, 1), torch.nn.BatchNorm2d(6)
        self.fc = torch.nn.Linear(6, num_classes)

    def features(self, x):
        N, C, T, V, M = x.shape
        last = self.norm(self.conv(x.permute(0, 4, 1, 2, 3).reshape(N * M, C, T, V))).relu()
        return Features(last.view(N, M, 6, T, V), {}, (x != 0).any(1).any(1).any(1))

    def head(self, last):
        return self.fc(last.mean((1, 3, 4)))


@pytest.mark.parametrize("kind, sizes", [(MSG3D, TINY), (STFNet, TINY), (Plain, {}),
                                         (STGCN, dict(widths=(4, 6, 8), layers=(1, 1, 1)))])
def test_fused_networks_are_the_same_function(kind, sizes, raw, people, tmp_path):
    """Trained statistics, not fresh ones, under which a forgotten batch norm would hardly show."""
    torch.manual_seed(0)
    net = kind(4, SKELETONS["ntu25"], in_channels=4, **sizes)
    norms = lambda net: [m for m in net.modules() if isinstance(m, _BatchNorm)]
    for m in norms(net):
        for tensor, low, high in ((m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 2),
                                  (m.weight.data, -1.5, 1.5), (m.bias.data, -0.5, 0.5)):
            tensor.uniform_(low, high)
    save_checkpoint(tmp_path / "net", net, FACTS)
    fused, saved = Predictor(tmp_path / "net", "cpu"), Predictor(tmp_path / "net", "cpu")
    saved.networks = [saved.networks[0]._replace(net=net.eval())]
    pair = [p.networks[0].net for p in (fused, saved)]
    assert (len(norms(pair[0])) < len(norms(net))) == (kind in (MSG3D, STFNet))
    for a, b in zip(*(list(predict_all(raw, p, focus=True)) for p in (fused, saved))):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
        np.testing.assert_allclose(a.focus, b.focus, atol=1e-3)
    if issubclass(kind, MSG3D):  # Q by autograd, through the fused network
        x = make_batch(people, length=16).x
        foci = [module_focus(n, n.features(x), torch.arange(8) % 4) for n in pair]
        for name in foci[0]:
            torch.testing.assert_close(foci[0][name], foci[1][name], atol=1e-3, rtol=0)


def test_focus_for_another_class(nets, raw):
    file = sorted(raw.iterdir())[0]
    p = predict(file, nets["joint"])
    other = next(c for c in p.classes if c != p.action)
    q = predict(file, nets["joint"], about=other)
    assert (p.about, q.about, q.action) == (p.action, other, p.action)
    assert not np.allclose(p.focus, q.focus)
    with pytest.raises(ValueError, match="none of the 4 classes"):
        predict(file, nets["joint"], about="flying")


def test_label_ranking_and_text(monkeypatch):
    p = Prediction("x", ["a", "b", "c"], np.array([0.2, 0.5, 0.3]), label="c")
    assert p.action == "b" and p.correct is False and len(p.top(9)) == 3
    assert [c for c, _ in p.top(2)] == ["b", "c"] and p.text(1).count("\n") == 0
    assert "wrong: it is 'c'" in p.text() and p.text().count("█") == 3 + 8 + 5
    assert Prediction("x", ["a"], np.ones(1), label="elsewhere").correct is None
    assert Prediction("x", ["a"], np.ones(1)).text().startswith("x\n")
    code_page = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")  # has no block characters
    monkeypatch.setattr("sys.stdout", code_page)
    assert "█" not in p.text() and "########" in p.text()


def test_out_of_memory_halves_the_batch(nets, monkeypatch):
    predictor, sizes, real = Predictor(nets["joint"]), [], Predictor._predict

    def small(self, clips, *options):
        sizes.append(len(clips))
        if len(clips) > 2:
            raise torch.OutOfMemoryError("full")
        return real(self, clips, *options)

    clips = [random_clip(i) for i in range(5)]
    expected = [p.probabilities for p in predictor(clips, focus=False)]
    monkeypatch.setattr(Predictor, "_predict", small)
    found = predictor(clips, focus=False)
    assert [p.name for p in found] == [c.name for c in clips] and max(sizes) == 5
    np.testing.assert_allclose([p.probabilities for p in found], expected, atol=1e-4)


# what fits


def test_files_without_a_skeleton_have_the_networks(nets, tmp_path):
    net, rng = network(tmp_path / "hand", skeleton=HAND), np.random.default_rng(0)
    np.savez(tmp_path / "wave.npz", joints=rng.normal(size=(12, 3, 3)).astype(np.float32))
    p = predict(tmp_path / "wave.npz", net)
    assert p.focus.shape == (1, 12, 3) and p.clip.skeleton.name == "hand"
    with pytest.raises(MismatchError, match="wave.npz: .*unnamed, 3 joints.*'ntu25', 25 joints"):
        predict(tmp_path / "wave.npz", nets["joint"])


@pytest.mark.parametrize("change", [
    dict(joints=("palm", "wrist", "tip")), dict(bones=((1, 0), (2, 0))), dict(centre=1),
    dict(height=(0, 1)), dict(spine=(0, 1)), dict(shoulders=(1, 2))])
def test_layouts_are_compared_but_for_their_name(tmp_path, change):
    renamed, other = replace(HAND, name="paw"), replace(HAND, **change)
    nets = [network(tmp_path / s.name / str(i), skeleton=s)
            for i, s in enumerate((HAND, renamed, other))]
    with pytest.raises(CheckpointError, match="can't be averaged: skeletons"):
        Predictor([nets[0], nets[2]])
    both, clip = Predictor(nets[:2]), replace(random_clip(0, V=3, M=1), skeleton=renamed)
    assert both([clip])[0].clip.skeleton == HAND
    with pytest.raises(MismatchError, match="its skeleton is 'hand'"):
        both([replace(clip, skeleton=other)])


def test_coordinates_and_preprocessing_must_fit(nets):
    """2D and 3D make the same number of channels under msg3d."""
    flat, done = random_clip(0, C=2), random_clip(0, gaps=False)
    done.tags["preprocessed"] = "msg3d"
    assert np.isfinite(predict(done, nets["msg3d"]).probabilities).all()
    for clip, net, reason in ((done, "joint", "preprocessed already"),
                              (flat, "joint", "2 coordinates"), (flat, "msg3d", "2 coordinates")):
        with pytest.raises(MismatchError, match=reason):
            predict(clip, nets[net])


def test_weights_that_diverged_are_refused(tmp_path):
    net = MSG3D(4, SKELETONS["ntu25"], in_channels=4, **TINY)
    net.fc.weight.data[0, 0] = float("nan")
    save_checkpoint(tmp_path / "weights", net, FACTS)
    with pytest.raises(CheckpointError, match="not finite"):
        Predictor(tmp_path)


# the command


@pytest.fixture
def stf(tmp_path, monkeypatch, capsys):
    "(exit code, stdout, stderr) of `stf predict …` in an empty folder, as typed."
    monkeypatch.chdir(tmp_path)

    def typed(*words):
        monkeypatch.setattr("sys.argv", ["stf", "predict", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return typed


@pytest.fixture
def wrong(nets, raw, stf):
    "A folder with everything that is wrong."
    one = sorted(raw.iterdir())[0]
    shutil.copy(one, "good.skeleton")
    shutil.copytree(raw, "many")
    Path("empty").mkdir()
    Path("notes.txt").write_text("remember the milk\n")
    Path("cut.skeleton").write_bytes(one.read_bytes()[:3000])
    Path("nobody.skeleton").write_text("3\n0\n0\n0\n")
    save_clip(random_clip(0, V=20, M=1), "other.npz")
    Path("cut.npz").write_bytes(Path("other.npz").read_bytes()[:400])
    network("classes", classes=["sitting down", "clapping", "jumping", "handshaking"])
    network("hand", skeleton=HAND)
    Path("corrupt.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not a header at all")
    Path("file").write_text("")
    Path("half.json").write_text('{"data": [')
    Path("fake.zip").write_bytes(b"PK\3\4 and no more")
    return nets["joint"]


@pytest.mark.parametrize("words, expected, reason", [
    ("nowhere", 2, "nowhere: no such file or folder"),
    ("good.skeleton nowhere", 2, "nowhere: no such file or folder"),
    ("empty", 2, "no recordings found here"),
    ("notes.txt", 2, "notes.txt: no recordings found here"),
    ("cut.skeleton", 1, "it was cut off"),
    ("cut.npz", 1, "cut.npz"),
    ("half.json", 1, "half.json: "),
    ("fake.zip", 1, "fake.zip: the zip is cut off or damaged"),
    ("nobody.skeleton", 1, "no body in any frame"),
    ("other.npz", 2, "'kinect20', 20 joints; checkpoint"),
    ("good.skeleton --checkpoint absent", 2, "no checkpoint in absent"),
    ("good.skeleton --checkpoint empty", 2, "no checkpoint in empty: no .safetensors file"),
    ("good.skeleton --checkpoint corrupt", 2, "corrupt.safetensors: no header of stf can be read"),
    ("good.skeleton --checkpoint JOINT classes", 2, "class 2 is 'hand waving' and 'jumping'"),
    ("good.skeleton --checkpoint JOINT hand", 2, "'ntu25', 25 joints and 'hand', 3 joints"),
    ("good.skeleton --animate out.avi", 2, "ends in .gif, .html or .mp4"),
    ("good.skeleton --animate file", 2, "ends in .gif, .html or .mp4"),
    ("many --animate out.gif", 2, "one file for 8 recordings; name a folder"),
    ("good.skeleton --json no/such/out.json", 2, "--json no/such/out.json: no folder no/such"),
    ("good.skeleton --csv empty", 2, "--csv empty: is a folder"),
    ("good.skeleton --json - --csv -", 2, "can't both"),
    ("good.skeleton --device warp", 2, "device 'warp' is not there"),
    ("good.skeleton --batch-size 0", 2, "at least 1"),
    ("good.skeleton --skeleton octopus", 2, "no skeleton 'octopus'"),
])
def test_wrong_input_has_its_reason_and_exit_code(wrong, stf, words, expected, reason):
    words += "" if "--checkpoint" in words else " --checkpoint JOINT"
    before = sorted(Path().rglob("*"))
    code, out, err = stf(*(wrong if word == "JOINT" else word for word in words.split()))
    assert code == expected and reason in err and out == ""
    assert err.count("stf: ") + err.count("failed: ") == 1 and "Traceback" not in err
    assert sorted(Path().rglob("*")) == before  # nothing half done is left


def test_several_paths(wrong, stf):
    """What a shell makes of *: one that holds no recording is named and doesn't stop the rest."""
    words = ["good.skeleton", "many", "notes.txt", "cut.skeleton", "--checkpoint", wrong]
    code, out, err = stf(*words)
    assert code == 1 and "9 predicted, 2 failed" in out
    assert [line.split()[1].rstrip(":") for line in err.splitlines()] == words[2:4]
    code, out, err = stf("notes.txt", "empty", "--checkpoint", wrong)
    assert code == 2 and err.count("no recordings found here") == 2


def test_a_hundred_files_with_five_bad_ones(nets, raw, stf):
    """95 predictions, 5 names, exit code 1; a good one's prediction is that of its file alone."""
    good = sorted(raw.iterdir())
    Path("clips").mkdir()
    for k in range(100):
        name = f"S033C001P{k + 1:03d}R001A0{good[k % 8].stem[-2:]}.skeleton"
        shutil.copy(good[k % 8], f"clips/{name}")
    files = sorted(Path("clips").iterdir())
    spoil = {3: lambda b: b[:2000], 20: lambda b: b"", 77: lambda b: b"\x00\xff" * 500,
             41: lambda b: b.replace(b"\n25\n", b"\n24\n", 1), 99: lambda b: b"2\n0\n0\n"}
    for k, change in spoil.items():
        files[k].write_bytes(change(files[k].read_bytes()))
    code, out, err = stf("clips", "--checkpoint", nets["joint"], "--json", "all.json", "--csv",
                         "all.csv", "--batch-size", 16)
    assert code == 1 and "95 predicted, 5 failed" in out and len(out.splitlines()) == 96
    named = [line.split()[1].rstrip(":") for line in err.splitlines()]
    assert sorted(named) == sorted(str(files[k]) for k in spoil)
    document = json.loads(Path("all.json").read_text())
    assert [f["path"] for f in document["failed"]] == named
    found = {p["path"]: p for p in document["predictions"]}[str(files[50])]
    alone = predict(files[50], nets["joint"])
    assert found["predicted"] == alone.action and len(found["joint_focus"]) == 25
    assert found["probability"] == pytest.approx(alone.probability, abs=1e-5)
    table = list(csv.DictReader(open("all.csv", encoding="utf-8")))
    assert len(table) == 100 and sum(bool(row["error"]) for row in table) == 5
    assert all(abs(sum(float(r[c]) for c in CLASSES) - 1) < 1e-6 for r in table if not r["error"])


def test_only_the_document_goes_to_the_terminal(nets, raw, stf):
    """`stf predict … --json - | jq` must get JSON and nothing else."""
    both = ["--checkpoint", nets["joint"], nets["bone"]]
    code, out, err = stf(raw, *both, "--json", "-")
    document = json.loads(out)
    assert code == 0 and len(document["predictions"]) == 8 and "8 predicted" in err
    assert document["checkpoints"] == both[1:]
    code, out, err = stf(raw, *both, "--csv", "-")
    assert code == 0 and len(list(csv.DictReader(io.StringIO(out)))) == 8


def test_animations(nets, stf):
    Path("two").mkdir()
    for k in range(2):
        clip = Clip(random_clip(k, M=1, T=4, gaps=False).joints, name=f"a/b {k}")
        save_clip(clip, f"two/{k}.npz")
    joint = "--checkpoint", nets["joint"], "--animate"
    code, out, _ = stf("two/0.npz", *joint, "one.html")
    assert code == 0 and "one.html" in out and Path("one.html").stat().st_size > 5000
    assert stf("two", *joint, "movies")[0] == stf("two/0.npz", *joint, "movies")[0] == 0
    names = sorted(p.name for p in Path("movies").iterdir())
    assert names == ["a_b_0-1.gif", "a_b_0.gif", "a_b_1.gif"]  # nothing is overwritten


def test_another_skeleton_is_refused_once_or_named(nets, stf):
    """Not one line for each of a thousand files; but the others of a mixed folder go on."""
    for k in range(3):
        save_clip(random_clip(k, V=20, M=1), f"{k}.npz")
    code, out, err = stf(".", "--checkpoint", nets["joint"])
    assert code == 2 and out == "" and err.count("\n") == 1 and "and so for 2 others" in err
    save_clip(random_clip(0, M=1), "0.npz")
    code, out, err = stf(".", "--checkpoint", nets["joint"])
    assert code == 1 and "1 predicted, 2 failed" in out and "1.npz: its skeleton" in err


def test_the_command_is_a_function(nets, raw, capsys):
    predict_command(str(sorted(raw.iterdir())[0]), (nets["joint"],), top=2)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_real_recordings(nets, real_data):
    """Raw NTU files of one, two and more bodies; each cut-off one gives an error."""
    both, folder = [nets["joint"], nets["msg3d"]], real_data / "ntu-raw"
    found = list(predict_all(folder / "skeletons", both, focus=True))
    assert found and all(isinstance(p, Prediction) for p in found)
    for p in found:
        assert np.isfinite(p.probabilities).all() and p.focus.shape == p.clip.visible.shape
        assert (p.focus[~p.clip.present] == 0).all()
    cut = predict_all(folder / "truncated", nets["joint"])
    assert all(isinstance(p, ClipError) for p in cut)
