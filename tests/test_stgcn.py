"""ST-GCN: against a naive loop, what focus and losses need, checkpoints, resume, errors."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.backbone import frozen_norms
from stf.checkpoints import load_checkpoint, save_checkpoint
from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.focus import grad_cam, module_focus
from stf.losses import LossWeights, STFLoss
from stf.predict import predict
from stf.skeleton import SKELETONS, Skeleton
from stf.stgcn import STGCN, normalise_partition, spatial_partition
from stf.synthetic import SyntheticConfig, write_synthetic
from stf.train import Config, ConfigError, run

HAND = Skeleton("hand", ("wrist", "palm", "thumb", "tip"), ((1, 0), (2, 1), (3, 1)),
                centre="palm", height=(0, 1, 3))  # fmt: skip
TINY = dict(widths=(4, 6, 8), layers=(1, 1, 1))


@pytest.fixture(scope="module", autouse=True)
def _quiet(one_thread):
    pass


def stirred(net, seed=0):
    "Every parameter and running statistic made different from its start."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=g)
            elif t.is_floating_point():
                t.add_(torch.rand(t.shape, generator=g, dtype=t.dtype) - 0.5, alpha=0.6)
    return net


def clips(n, net, T=8, seed=0):
    shape = (n, net.in_channels, T, net.skeleton.num_joints, net.num_bodies)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=net.fc.weight.dtype)
    if net.in_channels == 4:
        x[:, 3] = 1
    return x


# ---- the network, against another way to write it


def by_formula(net, x, training):
    "ST-GCN by its equations, from the tensors of a state dictionary."
    p, (N, C, _, V, M) = net.state_dict(), x.shape
    A = torch.tensor(normalise_partition(spatial_partition(net.skeleton)))
    at = lambda name: (p[f"{name}.weight"], p[f"{name}.bias"])
    norm = lambda name: (p[f"{name}.running_mean"], p[f"{name}.running_var"], *at(name), training)
    h, c = x.permute(0, 4, 1, 2, 3).flatten(0, 1), min(C, 3)
    flat = F.batch_norm(h[:, :c].permute(0, 3, 1, 2).flatten(1, 2), *norm("data_bn"))
    h, i = torch.cat([flat.unflatten(1, (V, c)).permute(0, 2, 3, 1), h[:, c:]], 1), 0
    for block, (O, count) in enumerate(zip(net.widths, net.layers)):
        for first in range(count):
            u, stride = f"units.{i}", 2 if block and not first else 1
            W, b = at(f"{u}.gcn.conv")
            graph = A * p[f"{u}.gcn.importance"]
            y = torch.einsum("ojc,jvu,bctu->botv", W.view(O, 3, -1), graph, h) + b.view(-1, 1, 1)
            y = F.batch_norm(y, *norm(f"{u}.gcn_bn")).clamp(min=0)
            y = F.conv2d(y, *at(f"{u}.tcn"), (stride, 1), (net.temporal_kernel // 2, 0))
            y = F.batch_norm(y, *norm(f"{u}.tcn_bn"))
            if stride > 1 or h.shape[1] != O:
                h = F.conv2d(h[:, :, ::stride], *at(f"{u}.residual.conv"))
                h = F.batch_norm(h, *norm(f"{u}.residual.bn"))
            h, i = (y + h).clamp(min=0), i + 1
    return F.linear(h.mean((2, 3)).view(N, M, -1).mean(1), *at("fc"))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels, T", [(3, 7), (4, 8)])
def test_equals_the_formula(training, channels, T):
    sizes = dict(widths=(4, 6, 8), layers=(2, 1, 2), temporal_kernel=5, dropout=0.0)
    net = STGCN(5, HAND, channels, 2, **sizes).double()
    for unit in net.units:  # the network rounds Λ to float32, which is not the question here
        unit.gcn.A.copy_(torch.tensor(normalise_partition(spatial_partition(HAND))))
    x = clips(3, stirred(net).train(training), T)
    expected = by_formula(copy.deepcopy(net), x, training)
    assert expected.std() > 0.01 and (net(x) - expected).abs().max() < 1e-10


def test_parameter_count_is_that_of_the_published_network():
    def unit(C, O, down=False):
        residual = (C * O + O + 2 * O) if C != O or down else 0
        return 625 + 3 * C * O + O + 2 * O + 9 * O * O + O + 2 * O + residual

    ten = [(3, 64), *[(64, 64)] * 3, (64, 128), *[(128, 128)] * 2, (128, 256), *[(256, 256)] * 2]
    found = sum(p.numel() for p in STGCN(60, SKELETONS["ntu25"]).parameters())
    assert found == 2 * 75 + sum(unit(*u) for u in ten) + 256 * 60 + 60
    assert abs(found / 3.1e6 - 1) < 0.01


@st.composite
def trees(draw):
    V = draw(st.integers(1, 12))
    bones, names = [(v, draw(st.integers(0, v - 1))) for v in range(1, V)], range(V)
    return Skeleton("tree", names, bones, centre=draw(st.integers(0, V - 1)), height=(0,))


@settings(max_examples=60, deadline=None)
@given(trees())
def test_partition_of_any_tree(tree):
    A, V = spatial_partition(tree), tree.num_joints
    assert np.array_equal(A.sum(0), np.eye(V) + tree.adjacency())  # each neighbour once
    assert np.array_equal(A[1], A[2].T)
    inward = A[1].sum(1)  # one neighbour is nearer
    assert inward[tree.centre] == 0 and (np.delete(inward, tree.centre) == 1).all()
    hat = normalise_partition(A)
    assert np.isfinite(hat).all() and hat.max(initial=0) < 1 and ((hat > 0) == (A > 0)).all()


# ---- what focus and losses need


@pytest.mark.parametrize("skeleton", [HAND, *SKELETONS.values()], ids=lambda s: s.name)
@pytest.mark.parametrize("T, bodies", [(1, 1), (7, 2), (8, 3)])
def test_odd_shapes(skeleton, T, bodies):
    torch.manual_seed(T)
    net, V = STGCN(4, skeleton, 3, bodies, **TINY), skeleton.num_joints
    x, half = clips(4, net, T), -(-T // 2)
    shapes = {"block1": (4, T), "block2": (6, half), "block3": (8, -(-half // 2))}
    shapes = {k: (4, bodies, C, t, V) for k, (C, t) in shapes.items()}
    assert {k: tuple(m.shape) for k, m in net.features(x).maps.items()} == shapes
    terms = STFLoss(net, LossWeights(g=0))(x, torch.arange(4))
    terms["loss"].backward()
    assert terms["loss"].isfinite() and all(p.grad.isfinite().all() for p in net.parameters())


def test_focus_and_maps_on_trained_statistics():
    net = stirred(STGCN(5, HAND, 4, 2, **TINY).double()).train()
    x, classes = clips(6, net), torch.arange(6) % 5
    x[:3, ..., 1] = 0
    f = net.eval().features(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_norms(net.train()):  # no dropout, no batch statistics
        assert torch.equal(f.last, net.features(x).last)
    assert all((net.forward_from({k: h}) - f.last).abs().max() < 1e-12 for k, h in f.maps.items())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert f.present.tolist() == [[True, False]] * 3 + [[True, True]] * 3
    q = grad_cam(f, net.head, classes)
    assert (module_focus(net, f, classes, ("block3",))["block3"] - q).abs().max() < 1e-9
    deeper = module_focus(net, f, classes, ("block2",))["block2"]
    assert (q[:3, 1] == 0).all() and (deeper[:3, 1] == 0).all()
    swapped = net.eval().features(x.flip(-1))  # bodies are treated alike
    assert (grad_cam(swapped, net.head, classes).flip(1) - q).abs().max() < 1e-9


def test_dropout_acts_in_training_and_only_there():
    net = STGCN(5, HAND, 3, 1, **TINY)
    x = clips(4, net)
    assert not torch.equal(net(x), net(x)) and torch.equal(net.eval()(x), net(x))


def test_visibility_goes_around_the_data_norm():
    net = stirred(STGCN(5, HAND, 4, 1, **TINY)).eval()
    x = clips(2, net)
    assert torch.equal(net.normalise_input(x)[:, 3], x[:, 3, ..., 0])
    hidden = x.clone()
    hidden[:, 3] = 0
    assert net.data_bn.num_features == 4 * 3 and not torch.equal(net(x), net(hidden))


# ---- checkpoints, trainings, predictions


def test_round_trip_of_every_size(tmp_path):
    sizes = dict(widths=(4, 6, 8), layers=(1, 2, 1), temporal_kernel=3, dropout=0.25, centre="tip")
    net = stirred(STGCN(5, HAND, 4, 3, **sizes)).eval()
    facts = dict(classes=list("abcde"), stream="joint", preprocess="paper", length=8)
    save_checkpoint(tmp_path / "weights", net, facts)
    again, header = load_checkpoint(tmp_path)
    assert type(again) is STGCN and header["model"] == "stf.stgcn:STGCN" and again.centre == 3
    assert torch.equal(again(clips(2, net)), net(clips(2, net)))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    people = SyntheticConfig(actions=(8, 10, 23), subjects=(1, 2, 3), cameras=(2, 3))
    write_synthetic(folder, people, progress=False)
    return ClipStore.build(open_clips(folder), folder / "store", progress=False)


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    c = Config(name="tiny", folder=str(tmp_path_factory.mktemp("run") / "run"), data="nowhere",
               model="stgcn", widths=(4, 6, 8), length=8, num_bodies=1, batch_size=5, epochs=2,
               milestones=(1,), stf_epochs=1, stf_milestones=(), device="cpu")  # fmt: skip
    return run(c, store, progress=False)


def test_resume_is_exact_with_dropout(store, trained, tmp_path, monkeypatch):
    calls, features = [], STGCN.features

    def stop(self, x):
        calls.append(self.training)
        if calls.count(True) == 4:
            raise RuntimeError("power cut")
        return features(self, x)

    c = trained.config.replace(folder=str(tmp_path / "run"))
    monkeypatch.setattr(STGCN, "features", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(c, store, progress=False)
    monkeypatch.setattr(STGCN, "features", features)
    a, b = (r.network().state_dict() for r in (trained, run(c, store, progress=False)))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_second_stages(store, trained, tmp_path):
    for losses in ("e", "dc"):
        c = trained.config.second_stage(losses).replace(folder=str(tmp_path / losses))
        assert set(losses) <= set(run(c, store, progress=False).history.columns)
    with pytest.raises(ConfigError, match="'stgcn' has no β"):  # before a folder is claimed
        trained.config.second_stage("g")
    c = trained.config.replace(folder=str(tmp_path / "wide"), init=str(trained.folder))
    with pytest.raises(ConfigError, match="widths"):
        run(c.replace(widths=(4, 6, 10)), store, progress=False)
    assert Config(model="stgcn", widths=(64, 128, 256)).widths == (64, 128, 256)  # not by six


def test_prediction_with_focus(store, trained):
    p = predict(sorted(store.folder.parent.glob("*.skeleton"))[0], trained.folder)
    assert p.focus.shape[1:] == p.clip.joints.shape[1:3] and abs(p.probabilities.sum() - 1) < 1e-6
    assert 0 <= p.focus.min() and p.focus.max() <= 1


# ---- errors


@pytest.mark.parametrize("sizes, message", [
    (dict(widths=(8, 16)), "widths must be three"), (dict(widths=(8, 16, 2.5)), "widths must be"),
    (dict(layers=(4, 0, 3)), "layers must be three"), (dict(temporal_kernel=8), "odd number"),
    (dict(temporal_kernel=0), "odd number"), (dict(dropout=1.0), "dropout"),
    (dict(dropout=-0.1), "dropout"), (dict(centre="elbow"), "no joint 'elbow'"),
])  # fmt: skip
def test_sizes_that_cannot_be(sizes, message):
    with pytest.raises(ValueError, match=message):
        STGCN(5, HAND, **sizes)


@pytest.mark.parametrize("shape", [(2, 3, 8, 25, 1), (2, 4, 8, 4, 1), (2, 3, 8, 4, 2)])
def test_input_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"C,V,M = \(3, 4, 1\)"):
        STGCN(5, HAND, 3, 1, **TINY)(torch.zeros(shape))


@pytest.mark.parametrize("names", [("sgcn3", "gcn3d3"), ("block2", "block3"), ("block4",), ()])
def test_maps_that_are_not_there(names):
    net = STGCN(5, HAND, 3, 1, **TINY)
    with pytest.raises(ValueError, match="the maps must be"):
        net.forward_from({name: torch.zeros(1, 1, 8, 2, 4) for name in names})
