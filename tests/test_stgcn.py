"""ST-GCN: against a naive loop, odd shapes, the protocol of focus and losses, checkpoints, resume, prediction, errors."""
import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.focus import grad_cam, module_focus
from stf.losses import LossWeights, STFLoss
from stf.predict import predict
from stf.skeleton import SKELETONS, Skeleton
from stf.backbone import frozen_norms
from stf.checkpoints import load_checkpoint, save_checkpoint
from stf.stgcn import STGCN, normalise_partition, spatial_partition
from stf.synthetic import SyntheticConfig, write_synthetic
from stf.train import Config, ConfigError, Run, run

HAND = Skeleton("hand", ("wrist", "palm", "thumb", "tip"), ((1, 0), (2, 1), (3, 1)), centre="palm", height=(0, 1, 3))
BODIES = [HAND, SKELETONS["openpose18"], SKELETONS["kinect20"], SKELETONS["ntu25"]]
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
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, net.in_channels, T, net.skeleton.num_joints, net.num_bodies, generator=g, dtype=net.fc.weight.dtype)
    if net.in_channels == 4:
        x[:, 3] = 1
    return x


# ---- the network, against another way to write it


def naive_partition(skeleton):
    "{(group, listener, speaker): weight} by walking up the tree from every joint to the centre."
    neighbours = {v: set() for v in range(skeleton.num_joints)}
    for a, b in skeleton.bones:
        neighbours[a].add(b)
        neighbours[b].add(a)
    depth, row = {skeleton.centre: 0}, [skeleton.centre]
    for v in row:
        for u in neighbours[v] - set(depth):
            depth[u] = depth[v] + 1
            row.append(u)
    edges = {(0, v, v): 1 for v in depth}
    edges.update({(1 if depth[u] < depth[v] else 2, v, u): 1 for v in depth for u in neighbours[v]})
    heard, said = {}, {}
    for j, v, u in edges:
        heard[j, v] = heard.get((j, v), 0) + 1
        said[j, u] = said.get((j, u), 0) + 1
    return {(j, v, u): 1 / math.sqrt((heard[j, v] + 1e-3) * (said[j, u] + 1e-3)) for j, v, u in edges}


def naive_logits(net, x, training):
    "ST-GCN by its equations, from the tensors of a state dictionary."
    p, (N, C, _, V, M) = net.state_dict(), x.shape

    def bn(name, h, axes):  # h with channels second
        shape = [1, -1] + [1] * (h.ndim - 2)
        mean, var = (h.mean(axes), h.var(axes, unbiased=False)) if training else (p[f"{name}.running_mean"], p[f"{name}.running_var"])
        h = (h - mean.view(shape)) / (var.view(shape) + 1e-5).sqrt()
        return h * p[f"{name}.weight"].view(shape) + p[f"{name}.bias"].view(shape)

    c = 3 if C == 4 else C
    bodies = torch.stack([x[n, ..., m] for n in range(N) for m in range(M)])  # N·M,C,T,V
    flat = torch.stack([bodies[:, k, :, v] for v in range(V) for k in range(c)], 1)  # joint-major features
    flat = bn("data_bn", flat, (0, 2))
    h = torch.stack([torch.stack([flat[:, v * c + k] for v in range(V)], -1) for k in range(c)], 1)
    h = torch.cat([h, bodies[:, c:]], 1)
    edges, i = naive_partition(net.skeleton), 0
    for block, (O, count) in enumerate(zip(net.widths, net.layers)):
        for first in range(count):
            stride, at, inside = 2 if block and not first else 1, f"units.{i}", h.shape[1]
            W = p[f"{at}.gcn.conv.weight"].view(O, 3, inside)
            columns = [p[f"{at}.gcn.conv.bias"].view(1, O, 1).expand(len(h), O, h.shape[2]).clone() for _ in range(V)]
            for (j, v, u), weight in edges.items():
                spoken = torch.einsum("oc,bct->bot", W[:, j], h[..., u])
                columns[v] = columns[v] + weight * p[f"{at}.gcn.importance"][v, u] * spoken
            y = bn(f"{at}.gcn_bn", torch.stack(columns, -1), (0, 2, 3)).clamp(min=0)
            K, weight = net.temporal_kernel, p[f"{at}.tcn.weight"]
            frames = []
            for t in range(0, h.shape[2], stride):
                total = p[f"{at}.tcn.bias"].view(1, O, 1).expand(len(h), O, V).clone()
                for k in range(K):
                    if 0 <= t + k - K // 2 < h.shape[2]:
                        total = total + torch.einsum("oc,bcv->bov", weight[:, :, k, 0], y[:, :, t + k - K // 2])
                frames.append(total)
            y, residual = bn(f"{at}.tcn_bn", torch.stack(frames, 2), (0, 2, 3)), h
            if stride > 1 or inside != O:
                residual = torch.einsum("oc,bctv->botv", p[f"{at}.residual.conv.weight"][:, :, 0, 0], h[:, :, ::stride])
                residual = bn(f"{at}.residual.bn", residual + p[f"{at}.residual.conv.bias"].view(1, O, 1, 1), (0, 2, 3))
            h, i = (y + residual).clamp(min=0), i + 1
    pooled = h.flatten(2).mean(2).view(N, M, -1).mean(1)
    return pooled @ p["fc.weight"].T + p["fc.bias"]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels, T", [(3, 7), (4, 8)])
def test_equals_the_naive_network(training, channels, T):
    net = STGCN(5, HAND, channels, 2, widths=(4, 6, 8), layers=(2, 1, 2), temporal_kernel=5, dropout=0.0).double()
    for unit in net.units:  # the network rounds Λ to float32, which is not the question here
        unit.gcn.A.copy_(torch.tensor(normalise_partition(spatial_partition(HAND))))
    stirred(net).train(training)
    x = clips(3, net, T)
    expected = naive_logits(net, x, training)
    assert expected.std() > 0.01 and (net(x) - expected).abs().max() < 1e-10


def test_parameter_count_is_that_of_the_published_network():
    count = lambda **sizes: sum(p.numel() for p in STGCN(60, SKELETONS["ntu25"], **sizes).parameters())
    unit = lambda C, O, down=False: 625 + 3 * C * O + O + 2 * O + 9 * O * O + O + 2 * O + (C != O or down) * (C * O + O + 2 * O)
    ten = [(3, 64), *[(64, 64)] * 3, (64, 128), *[(128, 128)] * 2, (128, 256), *[(256, 256)] * 2]
    assert count() == 2 * 75 + sum(unit(*u) for u in ten) + 256 * 60 + 60
    assert abs(count() / 3.1e6 - 1) < 0.01


# ---- the partition


@st.composite
def trees(draw):
    V = draw(st.integers(1, 12))
    bones = tuple((v, draw(st.integers(0, v - 1))) for v in range(1, V))
    return Skeleton("tree", tuple(f"j{v}" for v in range(V)), bones, centre=draw(st.integers(0, V - 1)), height=(0,))


@settings(max_examples=60, deadline=None)
@given(trees())
def test_partition_of_any_tree(tree):
    A, V = spatial_partition(tree), tree.num_joints
    assert np.array_equal(A.sum(0), np.eye(V) + tree.adjacency())  # each neighbour once
    assert np.array_equal(A[1], A[2].T)
    inward = A[1].sum(1)
    assert inward[tree.centre] == 0 and (np.delete(inward, tree.centre) == 1).all()  # one neighbour is nearer
    hat = normalise_partition(A)
    assert np.isfinite(hat).all() and hat.max(initial=0) < 1 and ((hat > 0) == (A > 0)).all()


def test_the_centre_is_a_choice():
    ntu = SKELETONS["ntu25"]
    away = spatial_partition(ntu, "left hand")
    assert away[1][ntu.index("left hand")].sum() == 0 and away[2][ntu.index("left hand"), ntu.index("left wrist")] == 1
    assert not np.array_equal(away, spatial_partition(ntu))


# ---- shapes and the protocol


@pytest.mark.parametrize("skeleton", BODIES, ids=lambda s: s.name)
@pytest.mark.parametrize("T, bodies", [(1, 1), (1, 3), (7, 2), (8, 3)])
def test_odd_shapes(skeleton, T, bodies):
    torch.manual_seed(T)
    net = STGCN(4, skeleton, 3, bodies, **TINY)
    x = clips(4, net, T)
    f = net.features(x)
    half, quarter = -(-T // 2), -(-(-(-T // 2)) // 2)
    V = skeleton.num_joints
    assert {k: tuple(m.shape) for k, m in f.maps.items()} == {
        "block1": (4, bodies, 4, T, V), "block2": (4, bodies, 6, half, V), "block3": (4, bodies, 8, quarter, V)}  # fmt: skip
    terms = STFLoss(net, LossWeights(g=0))(x, torch.arange(4))
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"]) and all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_the_protocol_on_trained_statistics():
    net = stirred(STGCN(5, HAND, 4, 2, **TINY).double()).train()
    x = clips(6, net)
    x[:3, ..., 1] = 0
    evaluated = net.eval().features(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_norms(net.train()):
        running = net.features(x)
    assert torch.equal(evaluated.last, running.last)  # no dropout, no batch statistics
    for name in evaluated.maps:
        assert (net.forward_from({name: evaluated.maps[name]}) - evaluated.last).abs().max() < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert evaluated.present.tolist() == [[True, False]] * 3 + [[True, True]] * 3
    classes = torch.arange(6) % 5
    Q = grad_cam(evaluated, net.head, classes)
    assert (module_focus(net, evaluated, classes, ("block3",))["block3"] - Q).abs().max() < 1e-9
    assert (Q[:3, 1] == 0).all() and (module_focus(net, evaluated, classes, ("block2",))["block2"][:3, 1] == 0).all()


def test_dropout_acts_in_training_and_only_there():
    net = STGCN(5, HAND, 3, 1, **TINY)
    x = clips(4, net)
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))
    nothing = STGCN(5, HAND, 3, 1, dropout=0.0, **TINY)
    assert torch.equal(nothing(x), nothing(x))


def test_bodies_are_treated_alike():
    "Swapped bodies give the same answer, and swapped foci."
    net = stirred(STGCN(5, HAND, 3, 2, **TINY).double()).eval()
    x, classes = clips(3, net), torch.tensor([0, 1, 2])
    swapped = x.flip(-1)
    assert (net(x) - net(swapped)).abs().max() < 1e-12
    foci = [grad_cam(net.features(each), net.head, classes) for each in (x, swapped)]
    assert (foci[0] - foci[1].flip(1)).abs().max() < 1e-9


def test_visibility_goes_around_the_data_norm():
    net = stirred(STGCN(5, HAND, 4, 1, **TINY)).eval()
    x = clips(2, net)
    h = net.normalise_input(x)
    assert torch.equal(h[:, 3], x[:, 3, ..., 0]) and net.data_bn.num_features == 4 * 3
    hidden = x.clone()
    hidden[:, 3] = 0
    assert not torch.equal(net(x), net(hidden))


def test_losses_leave_cross_entropy_alone_and_guide_stops_the_gradient():
    net = STGCN(5, HAND, 3, 1, dropout=0.0, **TINY).double()
    x, y = clips(5, net), torch.arange(5)
    terms = STFLoss(net, LossWeights(g=0))(x, y)
    assert terms["ce"] == torch.nn.functional.cross_entropy(net(x), y) and set(terms) == {"loss", "ce", "e", "d", "c", "logits"}
    assert (terms["loss"] - terms["ce"] - 0.01 * terms["e"] - 0.1 * terms["d"] - 0.1 * terms["c"]).abs() < 1e-12
    grads = []
    for guide in (False, True):
        net.zero_grad()
        STFLoss(net.eval(), LossWeights(0, 0, 1, 0), guide=guide)(x, y)["c"].backward()
        grads.append(net.fc.weight.grad.clone())
    assert not torch.equal(*grads)
    assert STFLoss(net, LossWeights(g=0), coherence="blocks").names == ("block2", "block3")


def test_under_autocast():
    net = STGCN(5, HAND, 3, 1, **TINY)
    x, y = clips(5, net), torch.arange(5)
    with torch.autocast("cpu", torch.bfloat16):
        terms = STFLoss(net, LossWeights(g=0))(x, y)
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.slow
def test_compiled_gradients_of_every_term_are_the_eager_ones():
    torch.manual_seed(0)
    eager = stirred(STGCN(5, HAND, 3, 1, dropout=0.0, **TINY))
    x, y, compiled = clips(6, eager), torch.arange(6) % 5, copy.deepcopy(eager)
    compiled.features = torch.compile(compiled.features)
    for term in "edc":
        grads = []
        for net in (eager, compiled):
            net.zero_grad()
            STFLoss(net, LossWeights(**{**dict(e=0, d=0, c=0, g=0), term: 1}))(x, y)[term].backward()
            grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
        assert grads[0].abs().max() > 1e-3 and (grads[0] - grads[1]).abs().max() < 1e-4 * grads[0].abs().max(), term


# ---- checkpoints, trainings, predictions


def test_round_trip_of_every_size(tmp_path):
    sizes = dict(widths=(4, 6, 8), layers=(1, 2, 1), temporal_kernel=3, dropout=0.25, centre="tip")
    net = stirred(STGCN(5, HAND, 4, 3, **sizes)).eval()
    save_checkpoint(tmp_path / "weights", net, dict(classes=list("abcde"), stream="joint", preprocess="paper", length=8))
    again, header = load_checkpoint(tmp_path)
    x = clips(2, net)
    assert type(again) is STGCN and torch.equal(again(x), net(x)) and header["model"] == "stf.stgcn:STGCN"
    assert {k: getattr(again, k) for k in STGCN.hparams} == {k: getattr(net, k) for k in STGCN.hparams} and again.centre == 3


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_synthetic(folder, SyntheticConfig(actions=(8, 10, 23), subjects=(1, 2, 3), cameras=(2, 3)), progress=False)
    return folder


@pytest.fixture(scope="module")
def store(raw, tmp_path_factory):
    return ClipStore.build(open_clips(raw), tmp_path_factory.mktemp("store") / "store", progress=False)


def config(folder, **changes):
    base = dict(name="tiny", folder=str(folder), data="nowhere", model="stgcn", widths=(4, 6, 8), length=8, num_bodies=1, batch_size=5,
                epochs=2, milestones=(1,), stf_epochs=1, stf_milestones=(), device="cpu", save_every=1)  # fmt: skip
    return Config(**{**base, **changes})


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    return run(config(tmp_path_factory.mktemp("run") / "run"), store, progress=False)


def test_resume_is_exact_with_dropout(store, trained, tmp_path, monkeypatch):
    "Stopped in the middle of an epoch: the same coins are tossed afterwards."
    calls, features = [], STGCN.features

    def stop(self, x):
        calls.append(self.training)
        if calls.count(True) == 4:
            raise RuntimeError("power cut")
        return features(self, x)

    c = config(tmp_path / "run")
    monkeypatch.setattr(STGCN, "features", stop)
    with pytest.raises(RuntimeError, match="power cut"):
        run(c, store, progress=False)
    monkeypatch.setattr(STGCN, "features", features)
    resumed = run(c, store, progress=False)
    a, b = trained.network().state_dict(), resumed.network().state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert np.array_equal(trained.scores.probabilities, resumed.scores.probabilities)


def test_second_stages(store, trained, tmp_path):
    seen = {}
    for losses in ("", "e", "dc"):
        c = trained.config.second_stage(losses).replace(folder=str(tmp_path / f"stage-{losses}"))
        assert c.model == "stgcn" and c.lr == c.stf_lr
        seen[losses] = set(run(c, store, progress=False).history.columns)
    assert {"e"} <= seen["e"] - seen[""] and {"d", "c"} <= seen["dc"] - seen[""]
    with pytest.raises(ConfigError, match="'stgcn' has no β"):  # before a folder is claimed
        run(trained.config.second_stage("g").replace(folder=str(tmp_path / "g")), store, progress=False)
    assert not (tmp_path / "g").exists()


def test_start_from_another_network_is_refused(store, trained, tmp_path):
    with pytest.raises(ConfigError, match="dropout|widths"):
        run(trained.config.replace(folder=str(tmp_path / "wide"), init=str(trained.folder), widths=(4, 6, 10)), store, progress=False)
    with pytest.raises(ConfigError, match="can't start from"):
        run(trained.config.replace(folder=str(tmp_path / "msg3d"), init=str(trained.folder), model="msg3d", widths=(6, 6, 6)), store, progress=False)


def test_widths_need_not_be_multiples_of_six():
    assert Config(model="stgcn", widths=(64, 128, 256)).widths == (64, 128, 256)
    with pytest.raises(ConfigError, match="multiples of 6"):
        Config(model="msg3d", widths=(64, 128, 256))


def test_prediction_with_focus(raw, trained):
    path = sorted(raw.glob("*.skeleton"))[0]
    p = predict(path, trained.folder)
    assert len(p.probabilities) == 3 and p.focus.shape[2] == 25 and 0 <= p.focus.min() and p.focus.max() <= 1
    assert p.focus.shape[1] == p.clip.joints.shape[1] and abs(p.probabilities.sum() - 1) < 1e-6


def test_command_line(raw, trained, store, tmp_path, capsys):
    from stf.cli import call

    shutil.copytree(trained.folder, tmp_path / "run")
    call(["train", str(tmp_path / "run"), "--data", str(store.folder)])  # finished: it says so
    assert "top-1" in capsys.readouterr().out
    c = trained.config.replace(name="fresh", folder=str(tmp_path / "fresh"), data=str(store.folder), model="msg3d", widths=(6, 6, 6), epochs=1)
    (tmp_path / "fresh.json").write_text(c.to_json())
    call(["train", str(tmp_path / "fresh.json"), "--model", "stgcn", "--widths", "4", "6", "8", "--dropout", "0.2"])
    assert Run.load(tmp_path / "fresh").network().dropout == 0.2
    path = sorted(raw.glob("*.skeleton"))[0]
    capsys.readouterr()
    call(["predict", str(path), "--checkpoint", str(tmp_path / "fresh"), "--json", "-"])
    assert len(json.loads(capsys.readouterr().out)) > 0


# ---- errors


@pytest.mark.parametrize("sizes, message", [
    (dict(widths=(8, 16)), "widths must be three"), (dict(widths=(8, 16, 0)), "widths must be three"), (dict(widths=(8, 16, 2.5)), "widths must be three"),
    (dict(layers=(4, 3, 3, 1)), "layers must be three"), (dict(layers=(4, 0, 3)), "layers must be three"),
    (dict(temporal_kernel=8), "odd number"), (dict(temporal_kernel=0), "odd number"), (dict(dropout=1.0), "dropout"), (dict(dropout=-0.1), "dropout"),
    (dict(centre="elbow"), "no joint 'elbow'"), (dict(centre=4), "no joint 4"),
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
