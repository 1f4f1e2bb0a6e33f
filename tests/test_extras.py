"""ONNX files compute what PyTorch does, without it; the explorer shows any clip, or why not."""
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from stf.backbone import MSG3D
from stf.checkpoints import save_checkpoint, shipped_checkpoints
from stf.clips import Clip, open_clips, read_ntu
from stf.ctrgcn import CTRGCN, STFCTRGCN
from stf.dataset import ClipStore, make_batch
from stf.extras.explorer import Explanation, _png, explore
from stf.extras.onnx import OnnxNetwork, export_onnx
from stf.focus import grad_cam
from stf.predict import Predictor
from stf.skeleton import SKELETONS
from stf.stf_module import STFNet
from stf.synthetic import SyntheticConfig, write_synthetic

HEADER = dict(classes=["a", "b", "c"], stream="joint", preprocess="paper", length=40)


def network(cls, classes, skeleton="ntu25", **options):
    """A network with weights that make G_k matter, running statistics included."""
    torch.manual_seed(classes)
    sizes = dict(widths=(6, 12, 12), gcn_scales=3, g3d_scales=2, windows=(3,))
    sizes = sizes if issubclass(cls, MSG3D) else dict(widths=(8, 12, 12))
    net = cls(classes, SKELETONS[skeleton], **sizes, **options)
    for name, p in net.named_parameters():
        if name.endswith("mix_time.weight"):
            torch.nn.init.normal_(p, std=0.2)
    for _ in range(3):
        net.train()(torch.randn(4, net.in_channels, 20, net.skeleton.num_joints, net.num_bodies))
    return net.eval()


@pytest.mark.slow
@pytest.mark.parametrize("cls, classes, options", [
    (MSG3D, 7, {}),
    (STFNet, 3, dict(in_channels=4, num_bodies=1)),
    (STFNet, 120, dict(skeleton="openpose18")), (CTRGCN, 3, {}), (STFCTRGCN, 3, {}),
])  # fmt: skip
def test_onnx_equals_torch_on_other_clips_and_lengths(cls, classes, options, tmp_path):
    """A length, a number of clips or a G_k that became a constant; a changed network."""
    net = network(cls, classes, **options).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    file = OnnxNetwork(export_onnx(net, tmp_path / "net.onnx", adjacencies=cls.has_beta))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    assert file.facts["num_classes"] == len(file.classes) == classes
    assert file.skeleton == net.skeleton
    for clips, frames in ((1, 1), (1, 4), (4, 7), (2, 16), (3, 50), (1, 300)):
        x = torch.randn(clips, net.in_channels, frames, net.skeleton.num_joints, net.num_bodies)
        with torch.no_grad():
            f = net.features(x.double())
            logits = net.head(f.last)
            wanted = [logits, grad_cam(f, net.head, logits.argmax(1)), *f.dynamic]
        got = file(x.numpy())
        assert len(got) == len(wanted)
        for (name, g), w in zip(got.items(), wanted):
            error = np.abs(g - w.numpy()).max() / max(1, w.abs().max())
            assert g.shape == w.shape and error < 1e-4, name


@pytest.mark.slow
def test_onnx_file_that_differs_is_not_kept_and_an_old_one_stays(tmp_path):
    net, path = network(MSG3D, 2, num_bodies=1), tmp_path / "net.onnx"
    path.write_text("yesterday's file")
    with pytest.raises(ValueError, match="differs from PyTorch"):
        export_onnx(net, path, focus=False, tolerance=-1.0)
    assert path.read_text() == "yesterday's file" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_from_checkpoint_and_raw_file_to_prediction_without_torch(tmp_path):
    """The msg3d preset turns bodies by a spine, which the recording's own layout doesn't name."""
    net, options = network(STFNet, 3), dict(stream="bone", length=32, preprocess="msg3d")
    save_checkpoint(tmp_path / "run" / "weights", net, {**HEADER, **options})
    path = export_onnx(tmp_path / "run", tmp_path / "net.onnx")
    people = SyntheticConfig(actions=(23,), subjects=(1,), cameras=(1,))
    file = write_synthetic(tmp_path / "raw", people, progress=False)[0]
    code = f"""
import sys; sys.modules["torch"] = None
from dataclasses import replace
from stf.clips import read_ntu
from stf.extras.onnx import OnnxNetwork
clip = read_ntu({str(file)!r})
clip = replace(clip, skeleton=replace(clip.skeleton, name="own", spine=None, shoulders=None))
found = OnnxNetwork({str(path)!r}).predict(clip)
print(*found["probabilities"], *found["focus"].shape)"""
    found = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    with torch.no_grad():
        p = net(make_batch(read_ntu(file), **options).x).softmax(1)[0]
    np.testing.assert_allclose(np.float64(found), [*p, 2, 8, 25], atol=1e-4)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    people = SyntheticConfig(actions=(7, 44, 58), subjects=(27,), cameras=(1, 3))
    write_synthetic(folder, people, progress=False)
    return folder


@pytest.fixture(scope="module")
def predictor():
    return Predictor(shipped_checkpoints(), "cpu")


def walk(T=20, V=25, bodies=1):
    steps = np.random.default_rng(0).normal(size=(bodies, T, V, 3))
    return (steps.cumsum(1) * 0.02 + 0.5).astype(np.float32)


def left(e, **changes):
    state = dict(frame=0, body=0, module=5, k=1, azimuth=0, elevation=10, links=False)
    e.draw_frame(figure := Figure(dpi=40), **state | changes)
    return figure, _png(figure)


def test_bodies_that_are_no_input_and_empty_frames(predictor):
    """A third body has no β and no G, one that comes late β 0 before; a frame without anybody."""
    joints = walk(bodies=3, T=30)
    joints[2, 5:], joints[1, :10], joints[:, 12] = 0, 0, 0
    e = Explanation(Clip(joints, name="three"), predictor)
    assert e.bodies == [0, 1] and not any(G[2].any() for G in e.dynamic)
    for beta in e.beta:
        assert not beta[2].any() and not beta[1, :10].any() and beta[1, 10:].any()
    changes = dict(frame=12), dict(frame=29), dict(body=1), dict(azimuth=90), dict(elevation=-30)
    assert len({left(e, **change)[1] for change in ({}, *changes)}) == 6
    assert len(left(e, links=True)[0].axes[0].patches) == 15
    points = next(p for c in left(e)[0].axes[0].collections if len(p := c.get_offsets()) == 50)
    assert np.corrcoef(points[:, 1], joints[[0, 2], 0, :, 1].ravel())[0, 1] > 0.9  # feet below
    Explanation(Clip(walk(T=1), name="one frame"), predictor).draw()


def test_flat_people(tmp_path):
    """2D: nothing to turn, y grows downwards, 18 joints, two scales of G in half of the modules."""
    save_checkpoint(tmp_path / "weights", network(STFNet, 3, "openpose18"), HEADER)
    joints = np.random.default_rng(0).uniform(size=(1, 15, 18, 2)).astype("f4")
    e = Explanation(Clip(joints, joints[..., 0], "flat"), Predictor(tmp_path, "cpu"))
    (figure, picture), (_, turned) = left(e), left(e, azimuth=70)
    assert len(e.static) == 6 and len(e.static[0]) == 2 and e.scales == 1 and picture == turned
    points = next(p for c in figure.axes[0].collections if len(p := c.get_offsets()) == 18)
    assert np.corrcoef(points[:, 1], joints[0, 0, :, 1])[0, 1] < -0.99


def test_ten_modules(tmp_path):
    """Each block of CTR-GCN has one; the names of six were built in."""
    pytest.importorskip("ipywidgets")
    net = network(STFCTRGCN, 3, in_channels=4)
    save_checkpoint(tmp_path / "weights", net, HEADER)
    predictor = Predictor(tmp_path, "cpu")
    e = Explanation(Clip(walk(), name="one"), predictor)
    assert e.modules[9] == "10: block 10" and len(e.beta) == len(e.dynamic) == 10
    np.testing.assert_allclose(e.static[6], net.units[6].gcn.A.detach())
    assert len(e.draw(module=10).subfigs[1].axes) >= 13
    with pytest.raises(ValueError, match="module must be from 1 to 10, got 11"):
        e.draw(module=11)
    shown = explore([e.clip], tmp_path / "weights")
    assert [value for _, value in shown.controls["module"].options] == [*range(1, 11)]


@pytest.fixture
def drawn(monkeypatch):
    """Instead of pictures a list of what would be drawn: (clip name, arguments)."""
    pytest.importorskip("ipywidgets")
    calls = []
    for half in ("draw_frame", "draw_network"):
        monkeypatch.setattr(Explanation, half, lambda e, _, **s: calls.append((e.clip.name, s)))
    return calls


def test_controls(raw, predictor, drawn):
    """A slider that keeps the old maximum; a control that does nothing, or draws too much."""
    explorer = explore(str(raw), predictor)
    c = explorer.controls
    c["frame"].value = c["frame"].max
    for _, i in c["clip"].options[1:]:
        c["clip"].value = i
        assert c["frame"].max == explorer.explanation.clip.joints.shape[1] - 1
        assert c["frame"].value == 0
    steps = dict(frame=5, azimuth=90, elevation=-30, links=True)
    for name, value in (steps | dict(body=1, module=1, k=3)).items():
        drawn.clear()
        c[name].value = value
        assert all(state[name] == value for _, state in drawn)
        assert len(drawn) == (1 if name in steps else 2), name
    c["network"].value = 1
    c["about"].value = c["about"].options[1]
    assert explorer.explanation.prediction.about == c["about"].options[1]
    assert (c["frame"].value, c["body"].value) == (5, 1)  # it is the same clip
    c["after"].click()
    assert c["clip"].value == c["clip"].options[0][1]  # round to the first


def test_lists_by_class_and_of_wrong_predictions(raw, predictor, tmp_path, drawn):
    store = ClipStore.build(open_clips(raw), tmp_path / "store", progress=False)
    explorer = explore(str(tmp_path / "store"), predictor)
    c, touch = explorer.controls, "touch head (headache)"
    listed = lambda: [i for _, i in c["clip"].options]
    wrong = [i for i in range(6) if not predictor([store[i]])[0].correct]
    of = lambda name: np.flatnonzero(store.labels == store.classes.index(name)).tolist()
    assert len(listed()) == 6 and not set(of("throw")) & set(wrong)
    c["class"].value = touch
    assert listed() == of(touch)
    c["wrong"].value = True
    assert listed() == [i for i in of(touch) if i in wrong]
    before = len(drawn)
    c["class"].value = "throw"  # all are right: an empty list, a message, the picture stays
    assert not listed() and "none of these" in explorer.status.value and len(drawn) == before
    c["wrong"].value = False
    assert explorer.explanation.clip.class_name == "throw" and len(drawn) > before


def test_clips_that_cannot_be_shown_are_named(raw, predictor, tmp_path, drawn, monkeypatch):
    files = [tmp_path / path.name for path in sorted(raw.iterdir())]
    for file in files:
        file.write_bytes((raw / file.name).read_bytes()[: 500 if file == files[1] else None])
    explorer = explore(str(tmp_path), predictor)
    explorer.controls["after"].click()
    assert files[1].name in explorer.status.value and drawn[-1][0] == files[0].stem
    explorer.controls["after"].click()
    assert explorer.status.value == "" and drawn[-1][0] == files[2].stem
    explorer = explore([Clip(walk(V=20), name="kinect"), Clip(walk(), name="ours")], predictor)
    assert "'kinect20', 20 joints" in explorer._repr_mimebundle_()["text/plain"]
    explorer.controls["after"].click()
    assert explorer.controls["wrong"].disabled and drawn[-1][0] == "ours"  # there is no label
    with pytest.raises(ValueError, match="no clip to explore"):
        explore(iter(()), predictor)
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install ipywidgets"):
        explore(Clip(walk(), name="c"), predictor)
