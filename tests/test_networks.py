"""Backbone, STF modules, focus, losses: against the public network, other graphs, each other."""
import copy
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import stf.backbone
from stf.backbone import MSG3D, MultiScaleTemporalConv, frozen_norms, fuse, load_msg3d
from stf.backbone import use_checkpointing
from stf.focus import grad_cam, margin, min_max, module_focus
from stf.losses import LossWeights, STFLoss
from stf.skeleton import SKELETONS, Skeleton
from stf.stf_module import STFNet
from stf.stgcn import STGCN

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = Path(os.environ.get("STF_REFERENCE", ROOT.parent / "shared" / "reference"))
SMALL = dict(widths=(12, 24, 48), gcn_scales=4, g3d_scales=3)
NTU, OPENPOSE = SKELETONS["ntu25"], SKELETONS["openpose18"]
DOG = Skeleton("dog", ("nose", "neck", "hip", "tail"), ((0, 1), (2, 1), (3, 2)), 1, (0, 1, 2))
FOUR = torch.arange(4)


def golden_state(net):
    state = net.state_dict()
    for j, name in enumerate(sorted(k for k in state if not k.endswith("num_batches_tracked"))):
        shape = state[name].shape
        w = np.random.RandomState(j).uniform(-1, 1, math.prod(shape)).reshape(shape)
        if name.endswith("A_res"):
            w = 0.01 * w
        elif name.endswith("running_var"):
            w = 1 + 0.5 * w**2
        elif name.endswith(("running_mean", "bias")):
            w = 0.1 * w
        else:
            w = 1 + 0.1 * w if w.ndim == 1 else w * np.sqrt(6 / (w.size / w.shape[0]))
        state[name] = torch.tensor(w)
    return state


def clips(n=4, C=4, T=16, V=25, M=2, dtype=torch.float32):
    x = torch.randn(n, C, T, V, M, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if C == 4:
        x[:, 3] = 1
    return x


def grads(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def finite(terms, net):
    terms["loss"].backward()
    return terms["loss"].isfinite() and all(g.isfinite().all() for g in grads(net).values())


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = STFNet(6, NTU, in_channels=4, **SMALL)
    for module in net.stf:
        torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.05)
    return net


# ---- the public network, its weights and its sizes


def test_golden_logits_and_a_fresh_stf_network():
    net = MSG3D(60, NTU).double().eval()
    assert sum(p.numel() for p in net.parameters()) == 3_194_595 and len(net.state_dict()) == 810
    load_msg3d(net, golden_state(net))
    x = torch.tensor(np.random.RandomState(1032).standard_normal((2, 3, 32, 25, 2)))
    with torch.no_grad():
        logits, path = net(x), REFERENCE / "msg3d_golden.json"
        fresh = load_msg3d(STFNet(60, NTU).double(), net.state_dict()).eval()
        assert (fresh(x) - logits).abs().max() < 1e-12
    if not path.is_file():
        pytest.skip(f"no golden logits at {path}; set STF_REFERENCE to the folder that has them")
    golden = torch.tensor(json.loads(path.read_text())["logits"], dtype=torch.float64)
    assert (logits - golden).abs().max() < 1e-5


@pytest.mark.parametrize("T", [1, 2, 7, 33])
@pytest.mark.parametrize("skeleton, M", [(OPENPOSE, 1), (OPENPOSE, 2), (DOG, 3)])
def test_odd_lengths_bodies_and_skeletons(T, skeleton, M):
    net = STFNet(5, skeleton, 3, M, windows=iter((3, 5)), **SMALL)
    x = clips(3, 3, T, skeleton.num_joints, M)
    halved = math.ceil(math.ceil(T / 2) / 2)
    assert net.eval().features(x).last.shape == (3, M, 48, halved, skeleton.num_joints)
    assert net(x[:0]).shape == (0, 5) and finite(STFLoss(net)(x, FOUR[:3]), net)


@pytest.mark.parametrize("wrong, message", [
    (lambda s: {k: v for k, v in s.items() if k != "tcn1.branches.2.3.conv.weight"},
     r"1 missing \['tcn1.branches.2.3.conv.weight'\]"),
    (lambda s: {**s, "extra": torch.ones(1)}, r"1 unknown \['extra'\]"),
    (lambda s: {**s, "fc.weight": torch.ones(7, 48)}, "number of classes"),
    (lambda s: {"state_dict": s}, "flat dictionary"),
    *((lambda s, shape=shape: {**s, "sgcn1.0.mlp.layers.0.weight": torch.zeros(shape)},
       re.escape(f"the checkpoint has {shape}")) for shape in ((12,), (12, 12), (5, 12, 1, 1))),
])  # fmt: skip
@pytest.mark.parametrize("channels", [3, 4])
def test_wrong_checkpoints_and_input_are_named(wrong, message, channels):
    net = MSG3D(6, NTU, channels, **SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_msg3d(net, wrong(before))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # none half loaded
    with pytest.raises(ValueError, match=r"C,V,M = \(\d, 25, 2\), got \(2, 25, 2\)"):
        net(clips(C=2))
    with pytest.raises(ValueError, match="divisible by 6"):
        MSG3D(6, NTU, widths=(10, 20, 40))


# ---- focus and losses


@pytest.mark.parametrize("gap", [0.0, 5.0, 12.0])
def test_focus_is_the_probabilitys_gradient(gap):
    torch.manual_seed(0)
    net = MSG3D(7, OPENPOSE, **SMALL).double().eval()
    f, classes = net.features(clips(3, 3, 12, 18, dtype=torch.float64)), torch.tensor([2, 0, 5])
    with torch.no_grad():
        net.fc.bias[2] += gap - margin(net.head(f.last), torch.tensor([2, 2, 2]))[0]
    last = f.last.detach().requires_grad_()
    p = net.head(last).softmax(1)[range(3), classes]
    grad, = torch.autograd.grad(p.sum(), last)
    exact = min_max(F.relu((grad.mean((3, 4), keepdim=True) * last).sum(2)), f.present)
    assert (grad_cam(f, net.head, classes) - exact).abs().max() < 1e-8


def test_focus_when_the_probability_rounds_to_one(net):
    with torch.no_grad():  # inference has foci, too
        f, zero = net.eval().features(clips()), torch.zeros(4, dtype=torch.long)
        foci = lambda: {**module_focus(net, f, zero), "last": grad_cam(f, net.head, zero)}
        near = foci()
        net.fc.bias[0] += 50
        far = foci()
    assert (net.head(f.last).softmax(1)[:, 0] == 1).all() and far["last"].max() == 1
    assert all(q.isfinite().all() and (q - near[k]).abs().max() < 1e-3 for k, q in far.items())
    assert not grads(net) and not far["sgcn3"].requires_grad


def test_each_option_runs_and_differs(net):
    net, x = net.double().eval(), clips(dtype=torch.float64)
    value = lambda **kw: STFLoss(net, LossWeights(0, 1, 1, 0), **kw)(x, FOUR)
    base, rms = value(), value(norm="rms")
    assert base["d"] != value(score="logit")["d"] and base["c"] != value(coherence="blocks")["c"]
    assert torch.isclose(base["d"] / rms["d"], torch.tensor(1875 * 2, dtype=torch.float64).sqrt())
    for wrong in (dict(score="x"), dict(coherence="x"), dict(norm="x")):
        with pytest.raises(ValueError, match="must be"):
            value(**wrong)


@pytest.mark.parametrize("model", ["stf", "stgcn"])
def test_losses_of_an_empty_clip_under_autocast_and_guided(net, model):
    net, seen = net if model == "stf" else STGCN(6, NTU, 4, widths=(8, 16, 32)), []
    x, weights = clips(), LossWeights(g=0.01 * net.has_beta)
    x[1] = 0  # nobody
    with torch.autocast("cpu", torch.bfloat16):
        terms = STFLoss(net, weights)(x, FOUR)
    assert finite(terms, net) and terms["loss"].dtype == torch.float32
    terms = STFLoss(net.eval(), weights)(x, FOUR)
    total = terms["ce"] + sum(getattr(weights, k) * terms[k] for k in "edcg" if k in terms)
    assert torch.isclose(terms["loss"], total) and terms["ce"] == F.cross_entropy(net(x), FOUR)
    for guide in (False, True):  # which stops the gradient of the higher map
        net.zero_grad()
        STFLoss(net, LossWeights(0, 0, 1, 0), guide=guide)(clips(), FOUR)["c"].backward()
        seen.append(torch.cat([g.flatten() for g in grads(net).values()]))
    assert seen[0].shape != seen[1].shape or not torch.allclose(*seen)


def test_frozen_norms(net):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with frozen_norms(net.train()):
        out = net(clips())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    with pytest.raises(RuntimeError), frozen_norms(net):
        raise RuntimeError
    assert all(m.training for m in net.modules())
    assert torch.allclose(out, net.eval()(clips()), atol=1e-5)
    out.sum().backward()
    assert net.data_bn.weight.grad.abs().sum() > 0


# ---- the same function and gradients as in the public order, by checkpointing, fused, compiled


@pytest.fixture(scope="module")
def public():
    "The yardstick of the speed notebook: the public code's order of operations."
    space = dict(vars(stf.backbone), math=math)
    for cell in json.loads((ROOT / "nbs" / "53_speed.ipynb").read_text())["cells"]:
        source = "".join(cell["source"])
        if source.startswith("def public_") and "public_cells" not in source:
            exec(source, space)
    return space["public_order"]


def squared_gradient(f, x, y):
    "Squared norm of the input's gradient: to differentiate it is to differentiate f twice."
    x = x.clone().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(f(x), y), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss, skeleton, T, M, training", [
    ("first", DOG, 1, 1, True), ("first", DOG, 7, 3, True), ("first", NTU, 13, 2, True),
    ("second", DOG, 9, 2, True), ("second", DOG, 9, 2, False)])  # fmt: skip
def test_gradients_of_the_public_order(public, checkpointing, loss, skeleton, T, M, training):
    "All parameters, float64: a wrong tap, a lost edge of time, a wrong part of the batch."
    torch.manual_seed(0)
    net = MSG3D(3, skeleton, 3, M, **SMALL).double().train(training)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if "A_res" in name else 0.02)
        for m in net.modules():
            if hasattr(m, "A"):
                m.A.copy_(m.A.float())  # as the public code rounds it
    x, y = clips(3, 3, T, skeleton.num_joints, M, torch.float64), torch.arange(3)
    p = {k: v.clone() for k, v in net.state_dict().items()}
    p = {k: v.requires_grad_(v.is_floating_point() and "running" not in k) for k, v in p.items()}
    options = dict(training=training, gcn_scales=4, g3d_scales=3)
    theirs = lambda x: public(p, x, skeleton.adjacency(), **options)
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
    x, found, called = clips(5, dtype=torch.float64), [], []
    for on in (False, True):
        twin = use_checkpointing(copy.deepcopy(net).double().train(training), on)
        terms = STFLoss(twin)(x, torch.arange(5))
        terms["loss"].backward()
        values = [terms[k].detach() for k in ("ce", "e", "d", "c", "g")]
        found.append([*values, *grads(twin).values(), *(b.double() for b in twin.buffers())])
        p = {k: (2 * v.detach()).requires_grad_() for k, v in twin.named_parameters()}
        torch.func.functional_call(twin, p, (x,)).square().sum().backward()
        called.append([v.grad for v in p.values() if v.grad is not None])
    for a, b in [*zip(*found), *zip(*called)]:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * (1 + float(a.abs().max())))


def test_maps_survive_the_backward_pass(net):
    "In-place steps may not touch what a focus reads afterwards; nor inference what training reads."
    with torch.inference_mode():
        net.eval()(clips())
    f = net.train().features(clips())
    before = {k: v.detach().clone() for k, v in f.maps.items()}
    F.cross_entropy(net.head(f.last), FOUR).backward(retain_graph=True)
    module_focus(net, f, FOUR)
    F.cross_entropy(net.head(f.last), FOUR).backward()
    assert all(torch.equal(f.maps[k], v) for k, v in before.items())
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith("fc."))
    F.cross_entropy(use_checkpointing(net)(clips()), FOUR).backward()  # only the last layer trains


@pytest.mark.parametrize("name", ["sgcn1.0.A_res", "gcn3d2.gcn3d.0.gcn3d.1.mlp.layers.0.weight",
                                  "tcn3.branches.2.3.conv.weight", "stf.2.alpha.mix_time.weight"])
def test_second_derivative_with_a_clips_own_graph(net, name):
    "Against finite differences, in evaluation mode (few ReLUs open in so short a step)."
    net, x, step = use_checkpointing(net.double().eval()), clips(3, T=9, dtype=torch.float64), 1e-7
    value = lambda: squared_gradient(net, x, FOUR[:3])
    value().backward()
    p = net.get_parameter(name)
    way = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
    p.data.add_(step * way)
    ahead = value().item()
    p.data.sub_(2 * step * way)
    expected = (p.grad * way).sum().item()
    assert abs((ahead - value().item()) / (2 * step) - expected) < 1e-3 * max(abs(expected), 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fused_and_copied_networks_are_the_same(net, dtype, tolerance):
    net, x = net.to(dtype).train(), clips(dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            net(x)
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        before, fused, other = net.eval()(x), fuse(net), copy.deepcopy(net)
        assert (fused(x) - before).abs().max() < tolerance * max(1, float(before.abs().max()))
        assert torch.equal(net(x), before)  # the original is as it was
        turn = lambda v: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim > 1 else v
        other.load_state_dict({k: turn(v) for k, v in net.state_dict().items()}, assign=True)
        assert torch.allclose(other(x), before, rtol=1e-4, atol=1e-5)  # in another layout
    focus, again = (module_focus(n, n.features(x), FOUR) for n in (fused, net))
    assert all((focus[k] - again[k]).abs().max() < 1e3 * tolerance for k in focus)


def test_bf16_autocast_is_close(net):
    x, gradients = clips(), []
    with torch.no_grad():
        exact = net.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            f = net.features(x)
            assert (net.head(f.last) - exact).abs().max() < 0.05 * (1 + exact.abs().max())
    assert f.last.dtype == torch.bfloat16
    for enabled in (True, False):
        net.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(net(x).float(), FOUR)
        loss.backward()
        gradients.append(torch.cat([g.flatten() for n, g in grads(net).items() if "stf" not in n]))
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
    if model == "stf":
        net = STFNet(3, DOG, 4, 1, (6, 12, 24), gcn_scales=3, g3d_scales=2, windows=(3,)).to(dtype)
        for module in net.stf:
            torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.3)
    else:
        net = STGCN(3, DOG, 4, 1, widths=(4, 6, 8), layers=(1, 1, 1), dropout=0.0).to(dtype)
    use_checkpointing(net.train(), checkpointing)
    x, eager, found = clips(4, T=T, V=4, M=1, dtype=dtype), net.features, {}
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


@pytest.mark.parametrize("make", [MSG3D, STGCN])
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
    strided = x[:, :, ::2]
    y = torch.cat([*(branch(x) for branch in alone.branches[:5]), alone.branches[5](strided)], 1)
    assert (tcn(x) - F.relu(y + alone.residual(strided))).abs().max() < 1e-12
    for ours, wanted in zip(tcn.buffers(), alone.buffers()):
        assert (ours.double() - wanted.double()).abs().max() < 1e-12
