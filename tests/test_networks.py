"""Backbones, STF modules, focus, losses: against the public network, other graphs, each other."""
import ast
import copy
import json
import math
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stf.backbone
from stf.backbone import (MSG3D, MultiScaleTemporalConv, batch_statistics, frozen_norms, load_msg3d,
                          use_checkpointing)  # fmt: skip
from stf.ctrgcn import CTRGCN, STFCTRGCN
from stf.focus import grad_cam, module_focus
from stf.losses import LossWeights, STFLoss
from stf.skeleton import SKELETONS, Skeleton
from stf.stf_module import STFNet
from stf.stgcn import STGCN

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("STF_REFERENCE", ROOT.parent / "shared" / "reference"))
SMALL = dict(widths=(12, 24, 48), gcn_scales=4, g3d_scales=3)
TINY = dict(widths=(4, 6, 8), layers=(1, 1, 1))
NTU, OPENPOSE = SKELETONS["ntu25"], SKELETONS["openpose18"]
DOG = Skeleton("dog", ("nose", "neck", "hip", "tail"), ((0, 1), (2, 1), (3, 2)), 1, (0, 1, 2))
FOUR = torch.arange(4)
each_network = pytest.mark.parametrize("make, sizes", [(STFNet, SMALL), (STGCN, TINY)])


def notebook(stem, *names):
    "The functions of a notebook's cells that are named so: yardsticks that it teaches."
    space = dict(vars(stf.backbone), math=math)
    for cell in json.loads((ROOT / "nbs" / f"{stem}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            found = [node for node in ast.parse("".join(cell["source"])).body
                     if isinstance(node, ast.FunctionDef) and node.name in names]
            exec(compile(ast.Module(found, []), stem, "exec"), space)
    return space


def clips(net, n=4, T=16):
    "(n,C,T,V,M) random coordinates, all of them visible, in the network's own shape and type."
    shape = (n, net.in_channels, T, net.skeleton.num_joints, net.num_bodies)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=g, dtype=net.fc.weight.dtype)
    x[:, 3:] = 1
    return x


def stirred(net, size=0.6, seed=0):
    "Every parameter and running statistic made different from its start."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in net.state_dict().items():
            if name.endswith("running_var"):
                t.uniform_(0.5, 1.5, generator=g)
            elif t.is_floating_point():
                t.add_(torch.rand(t.shape, generator=g, dtype=t.dtype) - 0.5, alpha=size)
    return net


def grads(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def finite(terms, net):
    terms["loss"].backward()
    return terms["loss"].isfinite() and all(g.isfinite().all() for g in grads(net).values())


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = STFNet(6, NTU, in_channels=4, windows=iter((3, 5)), **SMALL)  # any iterable
    for module in net.stf:
        torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.05)
    return net


def test_a_network_without_the_protocol_is_named():
    with pytest.raises(ValueError, match="Linear needs features and head"):
        STFLoss(torch.nn.Linear(2, 2))


# ---- the public network, its weights and its sizes


def test_golden_logits():
    path = REFERENCE / "msg3d_golden.json"
    if not path.is_file():
        pytest.skip(f"no golden logits at {path}; set STF_REFERENCE to the folder that has them")
    net = MSG3D(60, NTU).double().eval()
    load_msg3d(net, notebook("01_backbone", "golden_state")["golden_state"](net))
    x = torch.tensor(np.random.RandomState(1032).standard_normal((2, 3, 32, 25, 2)))
    golden = torch.tensor(json.loads(path.read_text())["logits"], dtype=torch.float64)
    with torch.no_grad():
        assert (net(x) - golden).abs().max() < 1e-5


@each_network
@pytest.mark.parametrize("name, T, M", [("dog", 1, 1), ("dog", 33, 3), ("openpose18", 2, 1),
                                        ("openpose18", 7, 2), ("coco17", 8, 3),
                                        ("kinect20", 7, 2), ("ntu25", 1, 2)])  # fmt: skip
def test_odd_lengths_bodies_and_skeletons(make, sizes, name, T, M):
    torch.manual_seed(T)
    skeleton = SKELETONS.get(name, DOG)
    net = make(5, skeleton, 3, M, **sizes)
    x, half = clips(net, 3, T), -(-T // 2)
    expected = {f"block{b}": (3, M, net.widths[b - 1], frames, skeleton.num_joints)
                for b, frames in ((1, T), (2, half), (3, -(-half // 2)))}  # fmt: skip
    maps = net.features(x).maps
    assert {name: tuple(maps[name].shape) for name in expected} == expected
    assert finite(STFLoss(net, LossWeights(g=0.01 * net.has_beta))(x, FOUR[:3]), net)
    assert net.eval()(x[:0]).shape == (0, 5)


@pytest.mark.parametrize("wrong, message", [
    (lambda s: {**s, "extra": torch.ones(1)}, r"1 unknown \['extra'\]"),
    (lambda s: {"state_dict": s}, "flat dictionary"),
    *((lambda s, shape=shape: {**s, "sgcn1.0.mlp.layers.0.weight": torch.zeros(shape)},
       re.escape(f"the checkpoint has {shape}")) for shape in ((12,), (12, 12), (5, 12, 1, 1))),
])  # fmt: skip
@pytest.mark.parametrize("channels", [3, 4])
def test_wrong_checkpoints_are_named(wrong, message, channels):
    net = MSG3D(6, NTU, channels, **SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_msg3d(net, wrong(before))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # none half loaded


@pytest.mark.parametrize("make, sizes, message", [
    (MSG3D, dict(widths=(10, 20, 40)), "divisible by 6"),
    *((STGCN, {name: value}, message) for name, value, message in (
        ("widths", (8, 16), "widths must be three"), ("widths", (8, 16, 2.5), "widths must be"),
        ("layers", (4, 0, 3), "layers must be three"), ("temporal_kernel", 8, "odd number"),
        ("temporal_kernel", 0, "odd number"), ("dropout", 1.0, "dropout"),
        ("dropout", -0.1, "dropout"), ("centre", "elbow", "no joint 'elbow'"))),
])  # fmt: skip
def test_sizes_that_cannot_be(make, sizes, message):
    with pytest.raises(ValueError, match=message):
        make(5, DOG, **sizes)


@each_network
def test_input_and_maps_that_do_not_fit(make, sizes):
    net = make(5, DOG, 3, 1, **sizes)
    for shape in ((2, 3, 8, 25, 1), (2, 4, 8, 4, 1), (2, 3, 8, 4, 2)):
        with pytest.raises(ValueError, match=r"must have C,V,M = \(3, 4, 1\), got"):
            net(torch.zeros(shape))
    for names in (("sgcn3", "block3"), ("block2", "block3"), ("block4",), ("sgcn3",), ()):
        with pytest.raises(ValueError, match="the maps must be"):
            net.forward_from({name: torch.zeros(1, 1, 8, 2, 4) for name in names})


# ---- focus and losses


def test_focus_when_the_probability_rounds_to_one(net):
    with torch.no_grad():  # inference has foci, too
        f, zero = net.eval().features(clips(net)), torch.zeros(4, dtype=torch.long)
        foci = lambda: {**module_focus(net, f, zero), "last": grad_cam(f, net.head, zero)}
        near = foci()
        net.fc.bias[0] += 50
        far = foci()
    assert (net.head(f.last).softmax(1)[:, 0] == 1).all() and far["last"].max() == 1
    assert all(q.isfinite().all() and (q - near[k]).abs().max() < 1e-3 for k, q in far.items())
    assert not grads(net) and not far["sgcn3"].requires_grad


def test_each_option_runs_and_differs(net):
    x = clips(net.double().eval())
    value = lambda **kw: STFLoss(net, LossWeights(0, 1, 1, 0), **kw)(x, FOUR)
    base, literal, square = (value(norm=norm) for norm in ("rms", "frobenius", "mean-square"))
    assert base["d"] != value(score="logit")["d"] and base["c"] != value(coherence="blocks")["c"]
    assert torch.isclose(literal["d"] / base["d"], torch.tensor(1875 * 2.0).sqrt().double())
    assert base["d"].abs() > square["d"].abs() > 0
    assert 0 < value(divergence="overlap")["d"] < 1
    for wrong in (dict(score="x"), dict(coherence="x"), dict(norm="x"), dict(divergence="x")):
        with pytest.raises(ValueError, match="must be"):
            value(**wrong)


@pytest.mark.parametrize("make, more", [
    (STFNet, dict(widths=(6, 6, 6), gcn_scales=2, g3d_scales=2)),
    (STFCTRGCN, dict(widths=(8, 8, 8)))], ids=["MS-G3D", "CTR-GCN"])
@pytest.mark.parametrize("options", [
    {}, {"control": "shuffled"}, {"control": "random"}, {"coherence": "blocks", "guide": True},
    {"divergence": "overlap", "score": "logit", "exploration": "score"}], ids=str)
def test_a_step_takes_nothing_from_the_host(monkeypatch, make, more, options):
    """The device "meta" has no values. A tensor that stays on the CPU is an error there, as on a
    GPU; so is reading a value, for which a GPU would have to end what it does."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **_: nullcontext())  # not on "meta"
    net = use_checkpointing(make(60, NTU, 4, **more), "control" in options).to("meta")
    x = torch.empty(4, 4, 16, 25, 2, device="meta")
    loss = STFLoss(net, LossWeights(), **options)(x, torch.empty(4, dtype=int, device="meta"))
    loss["loss"].backward()
    assert {v.device.type for v in loss.values()} == {"meta"}


@each_network
def test_losses_of_an_empty_clip_under_autocast_and_guided(make, sizes):
    torch.manual_seed(0)
    net, seen = stirred(make(6, NTU, 4, **sizes), 0.1), []
    x, weights = clips(net), LossWeights(g=0.01 * net.has_beta)
    x[1] = 0  # nobody
    with torch.autocast("cpu", torch.bfloat16):
        terms = STFLoss(net, weights)(x, FOUR)
    assert finite(terms, net) and terms["loss"].dtype == torch.float32
    terms = STFLoss(net.eval(), weights)(x, FOUR)
    total = terms["ce"] + sum(getattr(weights, k) * terms[k] for k in "edcg" if k in terms)
    assert torch.isclose(terms["loss"], total) and terms["ce"] == F.cross_entropy(net(x), FOUR)
    for guide in (False, True):  # which stops the gradient of the higher map
        net.train().zero_grad()
        STFLoss(net, LossWeights(0, 0, 1, 0), guide=guide)(clips(net), FOUR)["c"].backward()
        seen.append(torch.cat([g.flatten() for g in grads(net).values()]))
    assert seen[0].shape != seen[1].shape or not torch.allclose(*seen)


@each_network
def test_passes_in_the_statistics_of_the_first(make, sizes):
    "They move nothing: afterwards the running statistics are those of one pass."
    other = stirred(make(5, DOG, 4, 2, **sizes).double(), 0.3).train()
    for layer in other.modules():
        layer.p = 0.0  # no dropout
    net = copy.deepcopy(other)
    x, buffers = clips(net, 6), dict(net.named_buffers())
    with batch_statistics(net):
        first = net(x)
        with frozen_norms(net):
            again, less = net(x), net(0.5 * x)
    (first + less).sum().backward()  # what the passes used was not changed after them
    assert 5 * (first - again).abs().max() < (first - less).abs().max()
    other(x)
    for name, value in other.named_buffers():
        assert net.get_buffer(name) is buffers[name]
        assert torch.allclose(buffers[name].double(), value.double(), rtol=1e-9), name


@each_network
def test_maps_and_foci_in_running_statistics(make, sizes):
    "Trained statistics, clips of one and of two bodies, with dropout in ST-GCN."
    torch.manual_seed(0)
    net = stirred(make(5, DOG, 4, 2, **sizes).double(), 0.3).train()
    x, classes = clips(net, 6), torch.arange(6) % 5
    x[:3, ..., 1] = 0
    f = net.eval().features(x)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_norms(net.train()):  # no dropout, no batch statistics
        frozen = net.features(x)
    assert (frozen.last - f.last).abs().max() < 1e-12
    pathways = [("sgcn3", "gcn3d3")] if make is STFNet else []
    for names in (("block1",), ("block2",), ("block3",), *pathways):
        assert (net.forward_from({k: f.maps[k] for k in names}) - f.last).abs().max() < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    with pytest.raises(RuntimeError), frozen_norms(net):
        raise RuntimeError
    assert all(m.training for m in net.modules())
    net.head(frozen.last).sum().backward()
    assert net.data_bn.weight.grad.abs().sum() > 0
    q = grad_cam(f, net.head, classes)
    assert (module_focus(net, f, classes, ("block3",))["block3"] - q).abs().max() < 1e-9
    deeper = module_focus(net, f, classes, ("block2",))["block2"]
    assert f.present.tolist() == [[True, False]] * 3 + [[True, True]] * 3
    assert (q[:3, 1] == 0).all() and (deeper[:3, 1] == 0).all()
    assert torch.equal(net(x), net(x)) == (make is STFNet)  # dropout acts in training alone


# ---- the same function and gradients as in the public order, by checkpointing, fused, compiled


def squared_gradient(f, x, y):
    "Squared norm of the input's gradient: to differentiate it is to differentiate f twice."
    x = x.clone().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(f(x), y), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss, skeleton, T, M, training", [
    ("first", DOG, 1, 1, True), ("first", DOG, 7, 3, True), ("first", NTU, 13, 2, True),
    ("second", DOG, 9, 2, True), ("second", DOG, 9, 2, False)])  # fmt: skip
def test_gradients_of_the_public_order(checkpointing, loss, skeleton, T, M, training):
    "All parameters, float64: a wrong tap, a lost edge of time, a wrong part of the batch."
    names = [f"public_{name}" for name in ("gcn", "g3d", "bn", "tcn", "graphs", "order")]
    public = notebook("53_speed", *names)
    torch.manual_seed(0)
    net = stirred(MSG3D(3, skeleton, 3, M, **SMALL).double(), 0.1).train(training)
    for m in net.modules():
        if hasattr(m, "A"):
            m.A.copy_(m.A.float())  # as the public code rounds it
    x, y = clips(net, 3, T), torch.arange(3)
    p = {k: v.clone() for k, v in net.state_dict().items()}
    p = {k: v.requires_grad_(v.is_floating_point() and "running" not in k) for k, v in p.items()}
    graphs = public["public_graphs"](skeleton.adjacency(), gcn_scales=4, g3d_scales=3)
    theirs = lambda x: public["public_order"](p, x, graphs, training=training)
    first = lambda f, x, y: F.cross_entropy(f(x), y)
    value = [{"first": first, "second": squared_gradient}[loss](f, x, y)
             for f in (theirs, use_checkpointing(net, checkpointing))]  # fmt: skip
    assert abs(value[0] - value[1]) < 1e-9
    value[0].backward(), value[1].backward()
    scale = max(float(v.grad.abs().max()) for v in p.values() if v.grad is not None)
    for name, q in net.named_parameters():
        wanted, found = (torch.zeros_like(q) if t.grad is None else t.grad for t in (p[name], q))
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * scale)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_number(net, training):
    "Every term, its gradients and the running statistics, which move once; and foreign parameters."
    found, called = [], []
    for on in (False, True):
        twin = use_checkpointing(copy.deepcopy(net).double().train(training), on)
        x = clips(twin, 5)
        terms = STFLoss(twin)(x, torch.arange(5))
        terms["loss"].backward()
        values = [terms[k].detach() for k in ("ce", "e", "d", "c", "g")]
        found.append([*values, *grads(twin).values(), *(b.double() for b in twin.buffers())])
        p = {k: (2 * v.detach()).requires_grad_() for k, v in twin.named_parameters()}
        torch.func.functional_call(twin, p, (x,)).square().sum().backward()
        called.append([v.grad for v in p.values() if v.grad is not None])
    for a, b in [*zip(*found), *zip(*called)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(a.abs().max())))


def test_checkpointing_keeps_less():
    net, x, found = MSG3D(60, NTU), torch.randn(1, 3, 20, 25, 2), {}
    parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
    for on in (False, True):
        seen = {}  # distinct memory kept for the backward pass
        pack = lambda t: seen.setdefault(t.untyped_storage().data_ptr(), t) is None or t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            use_checkpointing(net, on)(x)
        found[on] = sum(t.untyped_storage().nbytes() for k, t in seen.items()
                        if k not in parameters)  # fmt: skip
    assert found[True] < 0.7 * found[False]


def test_a_joint_that_training_never_saw_hidden(net):
    "The visibility goes around data_bn: its variance was zero, and the features would explode."
    x, y, net.data_bn.momentum = clips(net, 12), torch.arange(12) % 6, 1.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    hidden = x.clone()
    hidden[:, :, :, NTU.index("left hand")] = 0
    with torch.no_grad():
        seen, unseen = (net.eval().features(clip).last.abs().max() for clip in (x, hidden))
    assert unseen < 5 * seen


def test_weights_in_another_memory_layout_are_the_same(net):
    x, other = clips(net.eval()), copy.deepcopy(net)
    turn = lambda v: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim > 1 else v
    other.load_state_dict({k: turn(v) for k, v in net.state_dict().items()}, assign=True)
    with torch.no_grad():
        assert torch.allclose(other(x), net(x), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_is_close(net):
    x, logits, gradients = clips(net), [], []
    with torch.inference_mode():  # leaves nothing behind that a training can't use
        net.eval()(x)
    for enabled in (True, False):
        net.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            f = net.features(x)
            logits.append(net.head(f.last).float())
        assert (f.last.dtype == torch.bfloat16) == enabled
        F.cross_entropy(logits[-1], FOUR).backward()
        gradients.append(torch.cat([g.flatten() for n, g in grads(net).items() if "stf" not in n]))
    assert (logits[0] - logits[1]).abs().max() < 0.05 * (1 + logits[1].abs().max())
    assert F.cosine_similarity(*gradients, dim=0) > 0.95  # six seeds: 0.956 to 0.972


@pytest.mark.slow
@pytest.mark.parametrize("backend, dtype, T, checkpointing, model", [
    ("aot_eager", torch.float64, 9, True, "stf"), ("inductor", torch.float32, 16, False, "stf"),
    ("inductor", torch.float32, 16, False, "stgcn")])  # fmt: skip
def test_compiled_gradient_of_each_term(backend, dtype, T, checkpointing, model):
    "torch.compile can't differentiate twice, and has lost such gradients silently."
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = dict(widths=(6, 12, 24), gcn_scales=3, g3d_scales=2, windows=(3,))
    make = {"stf": lambda: STFNet(3, DOG, 4, 1, **sizes),
            "stgcn": lambda: STGCN(3, DOG, 4, 1, **TINY, dropout=0.0)}  # fmt: skip
    net = use_checkpointing(make[model]().to(dtype).train(), checkpointing)
    for module in getattr(net, "stf", ()):
        torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.3)
    x, eager, found = clips(net, 4, T), net.features, {}
    start = {k: v.clone() for k, v in net.state_dict().items()}
    terms = ("ce", "e", "d", "c", "g")[: 4 + net.has_beta]
    for features in (eager, torch.compile(eager, backend=backend, dynamic=False)):
        net.features = features
        for term in terms:
            net.zero_grad()
            net.load_state_dict(start)  # L_e sees the running statistics, which every pass moves
            weights = LossWeights(*(float(k == term) for k in "edcg"))
            STFLoss(net, weights, norm="rms")(x, FOUR % 3)[term].backward()
            gradients = {n: g.clone() for n, g in grads(net).items()}
            wanted = found.setdefault(term, gradients)  # a compiled pass may add zeros
            size = max(float(g.abs().max()) for g in wanted.values())
            assert size > 1e-5 and gradients.keys() >= wanted.keys(), term
            for name, g in gradients.items():
                assert (g - wanted.get(name, 0)).abs().max() <= 1e-4 * size, (term, name)


@pytest.mark.parametrize("make", [MSG3D, STGCN, CTRGCN])
def test_no_1x1_convolution_has_a_stride(make):
    "Its backward pass once wrote past its memory (oneDNN, AVX-512, few channels, an odd batch)."
    small = [m for m in make(3, DOG).modules() if getattr(m, "kernel_size", 0) == (1, 1)]
    assert small and all(m.stride == (1, 1) for m in small)


@pytest.mark.parametrize("change", [
    dict(eps=0.1), dict(momentum=0.0), dict(momentum=None), dict(track_running_stats=False),
    dict(training=False)], ids=str)  # fmt: skip
@pytest.mark.parametrize("of", [slice(3, 4), slice(None)], ids=["one", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_of_other_settings_are_what_they_are_alone(change, of, training):
    "Side by side all took the first one's settings: swa_utils.update_bn (momentum None) crashed."
    torch.manual_seed(0)
    tcn = MultiScaleTemporalConv(6, 12, stride=2).double().train(training)
    for norm in [m for m in tcn.modules() if isinstance(m, torch.nn.BatchNorm2d)][of]:
        vars(norm).update(change)
    alone, x = copy.deepcopy(tcn), torch.randn(3, 6, 7, 4, dtype=torch.float64)
    one_by_one = notebook("01_backbone", "one_by_one")["one_by_one"]
    assert (tcn(x) - one_by_one(alone, x)).abs().max() < 1e-12
    for ours, wanted in zip(tcn.buffers(), alone.buffers()):
        assert (ours.double() - wanted.double()).abs().max() < 1e-12
