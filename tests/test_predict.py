"""Prediction: wrong input of every kind, folders with broken files, fusion, focus on the recording's own frames, streams."""
import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from stf.backbone import MSG3D, Features
from stf.clips import Clip, ClipError, open_clips, save_clip
from stf.dataset import ClipStore, make_batch
from stf.evaluate import average, predict_scores
from stf.focus import module_focus
from stf.preparation import prepare
from stf.predict import (MismatchError, Prediction, Predictor, Stream, open_network, place_focus, predict,
                         predict_all, predict_command, shipped_checkpoints, text_bar)
from stf.skeleton import SKELETONS, Skeleton
from stf.checkpoints import CheckpointError, read_header, save_checkpoint
from stf.stf_module import STFNet
from stf.stgcn import STGCN
from stf.synthetic import SyntheticConfig, write_synthetic

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = dict(widths=(6, 6, 6), gcn_scales=2, g3d_scales=2, windows=(3,), num_bodies=2)
FACTS = dict(classes=["sitting down", "clapping", "hand waving", "handshaking"], stream="joint", preprocess="paper", length=16)
HAND = Skeleton("hand", ("wrist", "palm", "tip"), ((1, 0), (2, 1)), centre=0, height=(0, 1, 2))


def network(folder, seed=0, kind=MSG3D, skeleton=SKELETONS["ntu25"], channels=4, clips=None, **facts):
    "An untrained checkpoint whose answers differ from clip to clip."
    torch.manual_seed(seed)
    facts = {**FACTS, **facts}
    net = kind(len(facts["classes"]), skeleton, in_channels=channels, **TINY)
    if clips:  # centred features, and a head that tells these clips apart
        with torch.no_grad():
            x = make_batch(clips, stream=facts["stream"], preprocess=facts["preprocess"], length=facts["length"]).x
            pooled = net.eval().features(x).last.mean((1, 3, 4))
            net.fc.weight.div_((pooled @ net.fc.weight.T).std(0).mean())
            net.fc.bias.copy_(-net.fc.weight @ pooled.mean(0))
    save_checkpoint(Path(folder) / "weights", net, facts)
    return str(folder)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    "Eight recordings, two of them of two people."
    folder = tmp_path_factory.mktemp("raw") / "raw"
    write_synthetic(folder, SyntheticConfig(actions=(8, 10, 23, 58), subjects=(3, 6), cameras=(2,)), progress=False)
    return folder


@pytest.fixture(scope="module")
def people(raw):
    return list(open_clips(raw))


@pytest.fixture(scope="module")
def nets(tmp_path_factory, people):
    folder = tmp_path_factory.mktemp("nets")
    return {"joint": network(folder / "joint", clips=people), "bone": network(folder / "bone", 1, STFNet, clips=people, stream="bone", length=24),
            "msg3d": network(folder / "msg3d", 2, channels=3, clips=people, preprocess="msg3d", length=20)}  # fmt: skip


def random_clip(seed, V=25, C=3, M=2, T=20, gaps=True):
    rng = np.random.default_rng(seed)
    joints = rng.normal(size=(M, T, V, C)).astype(np.float32)
    visible = rng.uniform(0.2, 1, size=(M, T, V)).astype(np.float32)
    if gaps:
        away = rng.random((M, T)) < 0.2
        away[0, rng.integers(T)] = False
        joints[away], visible[away] = 0, 0
    return Clip(joints, visible, f"clip{seed}")


# where frames go, and back


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(25, 3, "paper", "spread"), (25, 3, "paper", "motion"), (25, 3, "msg3d", "spread"),
                                               (18, 2, "paper", "spread"), (18, 2, "msg3d", "spread")]),
       st.integers(1, 4), st.integers(1, 40), st.integers(1, 30))  # fmt: skip
def test_what_is_shown_is_what_the_input_holds(seed, kind, M, T, length):
    """If a frame or body is named wrongly, the input holds another posture there: distances between joints differ."""
    V, C, preset, rule = kind
    clip = random_clip(seed, V, C, M, T)
    x, body, frame = prepare(clip, length=length, preprocess=preset, num_bodies=2, bodies=rule)
    x = x[:C].transpose(3, 1, 2, 0).astype(np.float64)  # M,T,V,C
    assert np.array_equal(body >= 0, x.any((2, 3)))
    spans = lambda a: np.linalg.norm(a[..., 1:, :] - a[..., :1, :], axis=-1)
    here = body >= 0
    if here.any():  # long clips are sampled, and may be sampled where nobody is
        shown, stored = spans(x[here]), spans(clip.joints[body[here], frame[here]].astype(np.float64))
        scale = stored.sum() / shown.sum()  # the paper's preset divides by the height, one number a clip
        np.testing.assert_allclose(shown * scale, stored, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["paper", "msg3d"]), st.integers(1, 40), st.integers(1, 60))
def test_focus_comes_home(seed, preset, T, length):
    """A focus that is each place's own number of body and frame comes back as that number; 0 where nobody is."""
    clip = random_clip(seed, T=T)
    _, body, frame = prepare(clip, preprocess=preset, length=length)
    number = np.where(body >= 0, 1 + 1000 * body + frame, 1e6)
    q = np.repeat(number[..., None], 25, axis=2).astype(np.float64)
    back = place_focus(q, body, frame, clip.present)
    assert back.shape == (2, T, 25) and (back[~clip.present] == 0).all() and back.max() < 1e6
    for m, t in np.argwhere(clip.present):
        if ((body == m) & (frame == t)).any():
            assert back[m, t, 0] == 1 + 1000 * m + t


def test_long_clips_have_focus_on_frames_between_sampled_ones(nets, people):
    """500 frames into 16: without filling, 484 frames would show no focus at all."""
    one = people[2]
    clip = Clip(one.joints[:1, np.linspace(0, one.joints.shape[1] - 1, 500).round().astype(int)], name="slow")
    p = predict(clip, nets["joint"])
    assert p.focus.shape == (1, 500, 25) and p.focus.max() > 0
    assert (p.focus.sum((0, 2)) > 0).mean() > 0.5
    assert np.abs(np.diff(p.focus, axis=1)).max() < 0.2  # and no comb of zeros in between


def test_absent_and_third_bodies_have_no_focus(nets, people):
    two = people[-1].joints[:2, :30].copy()
    two[0, 3:5], two[1, 10:20] = 0, 0
    child = two[:1] * 0.01  # the smallest spread: not shown to the network
    child[:, :2] = 0
    clip = Clip(np.concatenate([two, child]), name="three")
    p = predict(clip, [nets["joint"], nets["bone"]])
    assert p.focus.shape == (3, 30, 25) and p.focus.dtype == np.float32 and 0 <= p.focus.min() and p.focus.max() <= 1
    assert (p.focus[~clip.present] == 0).all() and (p.focus[2] == 0).all() and p.focus[:2].any()


# answers


def test_same_as_evaluation_and_fusion_by_hand(nets, raw, tmp_path):
    """J+B: each network gets its own stream and length, and probabilities (not logits) are averaged.

    Not to the last bit: predict folds batch norm away, which rounds otherwise, and the heads of these networks magnify that.
    """
    store = ClipStore.build(open_clips(raw), tmp_path / "store", progress=False)
    scores = []
    for name in ("joint", "bone"):
        n = open_network(nets[name])
        s = predict_scores(n.net, store, range(len(store)), n.stream, n.preprocess, n.length, n.num_bodies, progress=False)
        scores.append(s)
        alone = [p.probabilities for p in predict_all(raw, nets[name])]
        np.testing.assert_allclose(alone, s.probabilities, atol=2e-4)
    both = list(predict_all(raw, [nets["joint"], nets["bone"]]))
    by_hand = (scores[0].probabilities.astype(float) + scores[1].probabilities) / 2
    np.testing.assert_allclose([p.probabilities for p in both], by_hand, atol=2e-4)
    np.testing.assert_allclose(by_hand, average(*scores).probabilities)
    assert np.ptp(by_hand, axis=0).max() > 0.05  # the test would see clips mixed up
    assert [p.name for p in both] == store.names


def test_answers_do_not_depend_on_batch_size(nets, raw):
    "Three preparations averaged; and the focus of trained networks (in fresh ones, whose clips hardly differ, rounding shows)."
    for ask, trained in ((Predictor([nets["joint"], nets["bone"], nets["msg3d"]]), False), (Predictor(shipped_checkpoints()), True)):
        runs = [list(predict_all(raw, ask, batch_size=n, focus=True)) for n in (1, 3, 8)]
        for run in runs[1:]:
            for a, b in zip(runs[0], run):
                assert a.name == b.name and a.about == b.about
                np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-4)
                np.testing.assert_allclose(a.focus, b.focus, atol=1e-3 if trained else 1e-2)


class Plain(torch.nn.Module):
    "A backbone of one's own, which knows nothing of folding."

    hparams = ("num_classes", "in_channels", "num_bodies")

    def __init__(self, num_classes, skeleton, in_channels=4, num_bodies=2):
        super().__init__()
        self.num_classes, self.skeleton, self.in_channels, self.num_bodies = num_classes, skeleton, in_channels, num_bodies
        self.conv, self.norm, self.fc = torch.nn.Conv2d(in_channels, 6, 1), torch.nn.BatchNorm2d(6), torch.nn.Linear(6, num_classes)

    def features(self, x):
        N, C, T, V, M = x.shape
        last = self.norm(self.conv(x.permute(0, 4, 1, 2, 3).reshape(N * M, C, T, V))).relu().view(N, M, 6, T, V)
        return Features(last, {}, (x != 0).any(1).any(1).any(1))

    def head(self, last):
        return self.fc(last.mean((1, 3, 4)))


@pytest.mark.parametrize("kind", [MSG3D, STFNet, STGCN, Plain])
def test_networks_are_folded_to_be_asked_and_answer_the_same(kind, raw, tmp_path):
    """Trained statistics, not fresh ones, under which forgetting a batch norm would hardly show; also a backbone that can't be folded."""
    sizes = {MSG3D: TINY, STFNet: TINY, STGCN: dict(widths=(4, 6, 8), layers=(1, 1, 1)), Plain: {}}[kind]
    torch.manual_seed(0)
    net = kind(4, SKELETONS["ntu25"], in_channels=4, **sizes)
    for m in net.modules():
        if isinstance(m, torch.nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 2), (m.weight.data, -1.5, 1.5), (m.bias.data, -0.5, 0.5)):
                tensor.uniform_(low, high)
    save_checkpoint(tmp_path / "net" / "weights", net, FACTS)
    ask, saved = Predictor(tmp_path / "net", "cpu"), Predictor(tmp_path / "net", "cpu")
    saved.networks = [open_network(tmp_path / "net")]
    norms = [sum(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in p.networks[0].net.modules()) for p in (ask, saved)]
    assert norms[0] < norms[1] if kind in (MSG3D, STFNet) else norms[0] == norms[1]
    for a, b in zip(*(list(predict_all(raw, p, focus=True)) for p in (ask, saved))):
        np.testing.assert_allclose(a.probabilities, b.probabilities, atol=1e-5)
        np.testing.assert_allclose(a.focus, b.focus, atol=1e-3)
    if issubclass(kind, MSG3D):  # Q by autograd, through the folded network
        x = make_batch(list(open_clips(raw)), length=16).x
        foci, same = (module_focus(p.networks[0].net, p.networks[0].net.features(x), torch.arange(8) % 4) for p in (ask, saved))
        for name in foci:
            torch.testing.assert_close(foci[name], same[name], atol=1e-3, rtol=0)
    whole = saved.networks[0].net.state_dict()  # what open_network gives can be saved and trained
    assert whole.keys() == net.state_dict().keys() and all(torch.equal(whole[k], v) for k, v in net.state_dict().items())


def test_focus_can_be_asked_for_another_class(nets, raw):
    file = sorted(raw.iterdir())[0]
    p = predict(file, nets["joint"])
    other = next(c for c in p.classes if c != p.action)
    q = predict(file, nets["joint"], about=other)
    assert (p.about, q.about) == (p.action, other) and q.action == p.action and not np.allclose(p.focus, q.focus)
    with pytest.raises(ValueError, match="none of the 4 classes"):
        predict(file, nets["joint"], about="flying")


def test_prediction_tells_label_and_ranking():
    p = Prediction("x", ["a", "b", "c"], np.array([0.2, 0.5, 0.3]), label="c")
    assert p.action == "b" and p.correct is False and [c for c, _ in p.top(2)] == ["b", "c"] and len(p.top(9)) == 3
    assert Prediction("x", ["a"], np.ones(1), label="elsewhere").correct is None
    assert p.frame()["probability"].tolist() == [0.5, 0.3, 0.2]
    assert "wrong: it is 'c'" in p.text() and "█" not in p.text(plain=True)


def test_labels_are_the_recordings_own(nets, raw):
    labels = {p.name[-4:]: p.label for p in predict_all(raw, nets["joint"])}
    assert labels == {"A008": "sitting down", "A010": "clapping", "A023": "hand waving", "A058": "handshaking"}


@given(st.floats(-1, 2), st.integers(1, 40), st.booleans())
def test_bars_have_their_width(part, width, plain):
    assert len(text_bar(part, width, plain)) == width


def test_out_of_memory_halves_the_batch(nets, monkeypatch):
    ask, sizes = Predictor(nets["joint"]), []
    real = Predictor._compute

    def small(self, clips, focus, about):
        sizes.append(len(clips))
        if len(clips) > 2:
            raise torch.OutOfMemoryError("full")
        return real(self, clips, focus, about)

    clips = [random_clip(i) for i in range(5)]
    expected = [p.probabilities for p in ask(clips, focus=False)]
    monkeypatch.setattr(Predictor, "_compute", small)
    got = ask(clips, focus=False)
    assert [p.name for p in got] == [c.name for c in clips] and max(sizes) == 5
    np.testing.assert_allclose([p.probabilities for p in got], expected, atol=1e-4)


def test_ones_own_skeleton(nets, tmp_path):
    """A network for a hand of three joints reads plain files that don't name their skeleton."""
    net = network(tmp_path / "hand", skeleton=HAND)
    np.savez(tmp_path / "wave.npz", joints=np.random.default_rng(0).normal(size=(12, 3, 3)).astype(np.float32))
    p = predict(tmp_path / "wave.npz", net)
    assert p.focus.shape == (1, 12, 3) and p.clip.skeleton.name == "hand"
    with pytest.raises(MismatchError, match="unnamed, 3 joints.*'ntu25', 25 joints"):
        predict(tmp_path / "wave.npz", nets["joint"])


def test_preprocessed_clips_need_the_network_of_their_preset(nets):
    clip = random_clip(0, gaps=False)
    clip.tags["preprocessed"] = "msg3d"
    assert np.isfinite(predict(clip, nets["msg3d"]).probabilities).all()
    with pytest.raises(MismatchError, match="preprocessed already"):
        predict(clip, nets["joint"])


def test_two_dimensional_clips_are_refused_by_networks_for_three(nets):
    """For both presets: under msg3d, 2D and 3D make the same number of channels."""
    flat = Clip(random_clip(0).joints[..., :2], name="flat")
    for name in ("joint", "msg3d"):
        with pytest.raises(MismatchError, match="2 coordinates"):
            predict(flat, nets[name])


# checkpoints


@pytest.mark.parametrize("change, said", [
    (dict(stream="hands"), "stream 'hands' is unknown"), (dict(preprocess="raw"), "preprocess 'raw' is unknown"),
    (dict(length=0), "length .* at least 1"), (dict(preprocess="msg3d"), "no input of 4 channels"), (dict(format=99), "format 99"),
])  # fmt: skip
def test_headers_that_make_no_sense_are_refused(tmp_path, change, said):
    network(tmp_path / "net")
    file = tmp_path / "net" / "weights.safetensors"
    save_file(load_file(file), file, {k: json.dumps(v) for k, v in {**read_header(file), **change}.items()})
    with pytest.raises(CheckpointError, match=said):
        open_network(tmp_path / "net")


def test_damaged_weights_are_refused_wherever_they_are_damaged(nets, tmp_path):
    data = (Path(nets["joint"]) / "weights.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    start = 8 + int.from_bytes(data[:8], "little")  # the numbers begin here; a changed number is still a number
    for k in range(40):
        broken = data[: rng.integers(len(data))] if k % 2 else bytearray(data)
        if not k % 2:
            broken[rng.integers(start)] ^= 1 << rng.integers(8)
        (tmp_path / "weights.safetensors").write_bytes(broken)
        try:
            open_network(tmp_path)  # a letter of a class name may change unnoticed
        except CheckpointError as e:
            assert str(tmp_path) in str(e)
        else:
            assert not k % 2


def test_weights_that_diverged_are_refused(tmp_path):
    net = MSG3D(4, SKELETONS["ntu25"], in_channels=4, **TINY)
    net.fc.weight.data[0, 0] = float("nan")
    save_checkpoint(tmp_path / "weights", net, FACTS)
    with pytest.raises(CheckpointError, match="not finite"):
        open_network(tmp_path)


# the command


def command(capsys, *args, **options):
    "(exit code, stdout, stderr) of the command."
    try:
        predict_command(*args, **options)
        code = 0
    except SystemExit as e:
        code = e.code
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def wrong(nets, raw, tmp_path, monkeypatch):
    "A folder with everything that is wrong."
    monkeypatch.chdir(tmp_path)
    one = sorted(raw.iterdir())[0]
    shutil.copy(one, "good.skeleton")
    shutil.copytree(raw, "many")
    Path("empty").mkdir()
    Path("notes.txt").write_text("remember the milk\n")
    Path("cut.skeleton").write_bytes(one.read_bytes()[:3000])
    Path("nobody.skeleton").write_text("3\n0\n0\n0\n")
    save_clip(random_clip(0, V=20, M=1), "other.npz")
    Path("cut.npz").write_bytes(Path("other.npz").read_bytes()[:400])
    network(tmp_path / "classes", classes=["sitting down", "clapping", "jumping", "handshaking"])
    network(tmp_path / "hand", skeleton=HAND)
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "weights.safetensors").write_bytes(b"\x10" + b"\0" * 7 + b"not a header at all")
    Path("file").write_text("")
    Path("half.json").write_text('{"data": [')
    Path("fake.zip").write_bytes(b"PK\3\4 and no more")
    return nets


WRONG = {
    "no such path": (dict(path="nowhere"), 2, "nowhere: no such file or folder"),
    "empty folder": (dict(path="empty"), 2, "no recordings found here"),
    "text file": (dict(path="notes.txt"), 2, "notes.txt: no recordings found here"),
    "cut off": (dict(path="cut.skeleton"), 1, "it was cut off"),
    "cut off archive": (dict(path="cut.npz"), 1, "cut.npz"),
    "half a JSON file": (dict(path="half.json"), 1, "half.json: "),
    "no archive": (dict(path="fake.zip"), 1, "fake.zip: no .zip archive, or a damaged one"),
    "nobody there": (dict(path="nobody.skeleton"), 1, "no body in any frame"),
    "wrong skeleton": (dict(path="other.npz"), 2, "'kinect20', 20 joints, but checkpoint"),
    "no checkpoint": (dict(checkpoint=("absent",)), 2, "checkpoint absent: there is no such file or folder"),
    "folder without weights": (dict(checkpoint=("empty",)), 2, "checkpoint empty: holds no .safetensors file"),
    "corrupt checkpoint": (dict(checkpoint=("corrupt",)), 2, "corrupt/weights.safetensors: not a readable safetensors file"),
    "other classes": (dict(checkpoint=("JOINT", "classes")), 2, "number 2 is 'hand waving' and 'jumping'"),
    "other skeletons": (dict(checkpoint=("JOINT", "hand")), 2, "different skeletons ('ntu25', 25 joints and 'hand', 3 joints)"),
    "unknown ending": (dict(animate="out.avi"), 2, "ends in .gif, .html or .mp4"),
    "one file for many": (dict(path="many", animate="out.gif"), 2, "there are 8 recordings: name a folder"),
    "no folder for output": (dict(json="no/such/out.json"), 2, "--json no/such/out.json: there is no folder"),
    "output is a folder": (dict(csv="empty"), 2, "--csv empty is a folder"),
    "animation in a file": (dict(animate="file"), 2, "without a known ending"),
    "two outputs on the terminal": (dict(json="-", csv="-"), 2, "can't both"),
    "no such device": (dict(device="warp"), 2, "device 'warp' is not there"),
    "no batch": (dict(batch_size=0), 2, "at least 1"),
    "unknown skeleton": (dict(skeleton="octopus"), 2, "'octopus' is not known"),
}


def test_checkpoint_is_named_in_any_way(wrong, monkeypatch):
    """'.' has no name to which something could be added, nor has the folder of a bare weights.safetensors."""
    monkeypatch.chdir(wrong["joint"])
    names = [open_network(c).name for c in (".", "weights.safetensors", f"../{Path(wrong['joint']).name}", Path.cwd())]
    assert len(names) == 4


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_gets_one_sentence_and_its_exit_code(wrong, capsys, what):
    options, expected, said = WRONG[what]
    options = {"path": "good.skeleton", "checkpoint": ("JOINT",), **options}
    options["checkpoint"] = tuple(wrong["joint"] if c == "JOINT" else c for c in options["checkpoint"])
    before = sorted(Path().rglob("*"))
    code, out, err = command(capsys, **options)
    assert code == expected and said in err and out == ""
    assert err.count("\n") == 1 and err.startswith("stf predict: ") and len(err) < 400, err
    assert sorted(Path().rglob("*")) == before  # nothing half done is left


def test_several_paths(wrong, capsys):
    """What a shell makes of *.skeleton: each is asked about, and one that holds no recording is named."""
    code, out, err = command(capsys, "good.skeleton", (wrong["joint"],), more=("many", "notes.txt", "cut.skeleton"))
    assert code == 1 and "9 answered, 2 failed" in out
    assert [line.split()[1].rstrip(":") for line in err.splitlines()] == ["notes.txt", "cut.skeleton"]
    code, out, err = command(capsys, "good.skeleton", (wrong["joint"],), more=("nowhere",))
    assert code == 2 and err == "stf predict: nowhere: no such file or folder\n" and out == ""
    code, out, err = command(capsys, "notes.txt", (wrong["joint"],), more=("empty",))
    assert code == 2 and err.count("no recordings found here") == 2


def test_a_hundred_files_with_five_bad_ones(nets, raw, tmp_path, capsys, monkeypatch):
    """95 answers, 5 names, exit code 1; the good answers are those of the files alone."""
    monkeypatch.chdir(tmp_path)
    Path("clips").mkdir()
    good = sorted(raw.iterdir())
    for k in range(100):
        shutil.copy(good[k % 8], f"clips/S033C001P{k + 1:03d}R001A0{good[k % 8].stem[-2:]}.skeleton")
    files = sorted(Path("clips").iterdir())
    spoil = {3: lambda b: b[:2000], 20: lambda b: b"", 41: lambda b: b.replace(b"\n25\n", b"\n24\n", 1), 77: lambda b: b"\x00\xff" * 500,
             99: lambda b: b"2\n0\n0\n"}  # fmt: skip
    for k, change in spoil.items():
        files[k].write_bytes(change(files[k].read_bytes()))
    code, out, err = command(capsys, "clips", (nets["joint"],), json="all.json", csv="all.csv", batch_size=16)
    assert code == 1 and "95 answered, 5 failed" in out and len(out.splitlines()) == 96
    named = [line.split()[1].rstrip(":") for line in err.splitlines()]
    assert named == [str(files[k]) for k in spoil]
    document = json.loads(Path("all.json").read_text())
    assert len(document["predictions"]) == 95 and [f["path"] for f in document["failed"]] == named
    alone = predict(files[50], nets["joint"])
    found = next(p for p in document["predictions"] if p["path"] == str(files[50]))
    assert found["predicted"] == alone.action and abs(found["probability"] - alone.probability) < 1e-5 and len(found["joint_focus"]) == 25
    table = list(csv.DictReader(open("all.csv", encoding="utf-8")))
    assert len(table) == 100 and sum(bool(row["error"]) for row in table) == 5
    assert all(abs(sum(float(row[c]) for c in FACTS["classes"]) - 1) < 1e-6 for row in table if not row["error"])


def test_only_the_document_goes_to_the_terminal(nets, raw, capsys):
    """`stf predict … --json - | jq` must get JSON and nothing else."""
    code, out, err = command(capsys, str(raw), (nets["joint"],), json="-")
    assert code == 0 and len(json.loads(out)["predictions"]) == 8 and "8 answered" in err
    code, out, err = command(capsys, str(raw), (nets["joint"],), csv="-")
    assert code == 0 and len(list(csv.DictReader(io.StringIO(out)))) == 8


def test_terminals_without_blocks_get_plain_bars(nets, raw, monkeypatch):
    """A Windows console of code page 1252 can't print block characters; a table must not end in a UnicodeEncodeError."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr("sys.stdout", stream)
    predict_command(str(sorted(raw.iterdir())[0]), (nets["joint"],))
    stream.flush()
    assert b"#" in stream.buffer.getvalue()


def test_as_typed(nets, raw, monkeypatch, capsys):
    """Through the `stf` command itself: several checkpoints after one option, and exit codes that reach the shell."""
    from stf.cli import main

    monkeypatch.setattr("sys.argv", ["stf", "predict", str(raw), "--checkpoint", nets["joint"], nets["bone"], "--json", "-"])
    main()
    assert json.loads(capsys.readouterr().out)["checkpoints"] == [nets["joint"], nets["bone"]]
    monkeypatch.setattr("sys.argv", ["stf", "predict", "nowhere", "--checkpoint", nets["joint"]])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2


def test_animations(nets, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("two").mkdir()
    for k in range(2):
        save_clip(Clip(random_clip(k, M=1, T=4, gaps=False).joints, name=f"a/b {k}"), f"two/{k}.npz")
    code, out, _ = command(capsys, "two/0.npz", (nets["joint"],), animate="one.html")
    assert code == 0 and "one.html" in out and Path("one.html").stat().st_size > 5000
    code, out, _ = command(capsys, "two", (nets["joint"],), animate="movies")
    assert code == 0 and sorted(p.name for p in Path("movies").iterdir()) == ["a_b_0.gif", "a_b_1.gif"]
    command(capsys, "two/0.npz", (nets["joint"],), animate="movies")
    assert Path("movies/a_b_0-1.gif").exists()  # nothing is overwritten


def test_a_folder_for_another_skeleton_is_refused_once(nets, tmp_path, capsys):
    """Not one line for each of a thousand files."""
    for k in range(5):
        save_clip(random_clip(k, V=20, M=1), tmp_path / f"{k}.npz")
    code, out, err = command(capsys, str(tmp_path), (nets["joint"],))
    assert code == 2 and out == "" and err.count("\n") == 1 and "and so for 4 others" in err


def test_a_mixed_folder_answers_what_it_can(nets, tmp_path, capsys):
    for k in range(3):
        save_clip(random_clip(k, V=20 if k == 1 else 25, M=1), tmp_path / f"{k}.npz")
    code, out, err = command(capsys, str(tmp_path), (nets["joint"],))
    assert code == 1 and "2 answered, 1 failed" in out and "1.npz: its skeleton is 'kinect20'" in err


def test_real_recordings_get_an_answer(nets, real_data):
    """Formats as they are in the wild: raw NTU files of one, two and more bodies; cut-off ones give errors that name them."""
    answers = list(predict_all(real_data / "ntu-raw" / "skeletons", [nets["joint"], nets["msg3d"]], focus=True))
    assert answers and all(isinstance(p, Prediction) for p in answers)
    for p in answers:
        assert np.isfinite(p.probabilities).all() and p.focus.shape == p.clip.joints.shape[:3] and (p.focus[~p.clip.present] == 0).all()
    assert all(isinstance(p, ClipError) for p in predict_all(real_data / "ntu-raw" / "truncated", nets["joint"]))


# streams


def test_stream_is_prediction_on_its_window(nets):
    clip, stream = random_clip(5, T=30, gaps=False), Stream(nets["joint"], window=12, every=5, focus=True)
    answers = {t: a for t in range(30) if (a := stream.push(clip.joints[:, t], clip.visible[:, t]))}
    assert list(answers) == [4, 9, 14, 19, 24, 29]
    for t in (4, 19):
        start = max(0, t - 11)
        whole = predict(Clip(clip.joints[:, start : t + 1], clip.visible[:, start : t + 1]), nets["joint"])
        np.testing.assert_allclose(answers[t].probabilities, whole.probabilities, atol=1e-6)
        np.testing.assert_allclose(answers[t].focus, whole.focus, atol=1e-5)


def test_stream_takes_people_as_they_come_and_go(nets):
    stream, rng = Stream(nets["joint"], window=4), np.random.default_rng(0)
    assert stream.push(np.zeros((0, 25, 3))) is None  # nobody
    assert stream.push(rng.normal(size=(25, 3))) is not None
    assert stream.push(rng.normal(size=(3, 25, 3))) is not None
    assert stream.push(rng.normal(size=(1, 25, 3))).clip is None
    for _ in range(3):
        assert stream.push(np.zeros((0, 25, 3))) is not None  # still in the window
    assert stream.push(np.zeros((0, 25, 3))) is None
    stream.reset()
    assert stream.clip() is None


def test_stream_refuses_what_is_no_frame(nets):
    stream = Stream(nets["joint"])
    for frame, error in ((np.zeros((20, 3)), "25 joints"), (np.full((25, 3), np.nan), "not finite"), (np.zeros((25, 4)), "2 or 3 coordinates")):
        with pytest.raises(ClipError, match=error):
            stream.push(frame)
    stream.push(np.ones((25, 3)))
    with pytest.raises(MismatchError, match="frames before"):
        stream.push(np.ones((25, 2)))
    with pytest.raises(ValueError, match="window must"):
        Stream(nets["joint"], window=0)
