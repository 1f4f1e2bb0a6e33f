"""Backbone, STF modules, focus and losses: against the published network, other graphs and sizes, and each other."""
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

from stf.backbone import MSG3D, MultiScaleTemporalConv, frozen_norms, fuse, load_msg3d, use_checkpointing
from stf.focus import grad_cam, margin, min_max, module_focus
from stf.losses import LossWeights, STFLoss, map_distance, mask_input
from stf.skeleton import SKELETONS, Skeleton
from stf.checkpoints import load_checkpoint, save_checkpoint
from stf.stf_module import STFNet, adjacency_statistics
from stf.stgcn import STGCN

REFERENCE = Path(os.environ.get("STF_REFERENCE", Path(__file__).resolve().parent.parent.parent / "shared" / "reference"))
SMALL = dict(widths=(12, 24, 48), gcn_scales=4, g3d_scales=3)
NTU = SKELETONS["ntu25"]


def golden_state(net):
    state = net.state_dict()
    for j, name in enumerate(sorted(k for k in state if not k.endswith("num_batches_tracked"))):
        w = np.random.RandomState(j).uniform(-1, 1, math.prod(state[name].shape)).reshape(state[name].shape)
        if name.endswith("A_res"):
            w = 0.01 * w
        elif name.endswith("running_var"):
            w = 1 + 0.5 * w**2
        elif name.endswith(("running_mean", "bias")):
            w = 0.1 * w
        elif w.ndim == 1:
            w = 1 + 0.1 * w
        else:
            w = w * np.sqrt(6 / (w.size / w.shape[0]))
        state[name] = torch.tensor(w)
    return state


def clips(n=4, C=4, T=16, V=25, M=2, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, C, T, V, M, generator=g, dtype=dtype)
    if C == 4:
        x[:, 3] = 1
    return x


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = STFNet(6, NTU, in_channels=4, **SMALL)
    for module in net.stf:
        torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.05)
    return net


def test_golden_logits():
    path = REFERENCE / "msg3d_golden.json"
    if not path.is_file():
        pytest.skip(f"no golden logits at {path}; set STF_REFERENCE to the folder that has them")
    golden = torch.tensor(json.loads(path.read_text())["logits"], dtype=torch.float64)
    net = MSG3D(60, NTU).double().eval()
    load_msg3d(net, golden_state(net))
    x = torch.tensor(np.random.RandomState(1032).standard_normal((2, 3, 32, 25, 2)))
    with torch.no_grad():
        assert (net(x) - golden).abs().max() < 1e-5


def test_parameter_and_tensor_counts():
    count = lambda classes: sum(p.numel() for p in MSG3D(classes, NTU).parameters())
    assert count(60) == 3_194_595 and count(120) == 3_217_695
    assert len(MSG3D(60, NTU).state_dict()) == 810


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("bodies", [1, 2, 3])
def test_odd_lengths_and_bodies(T, bodies):
    net = STFNet(5, SKELETONS["openpose18"], 3, bodies, **SMALL).eval()
    f = net.features(clips(2, 3, T, 18, bodies))
    halved = math.ceil(math.ceil(T / 2) / 2)
    assert f.last.shape == (2, bodies, 48, halved, 18)
    assert net.head(f.last).shape == (2, 5)


def test_own_skeleton_of_one_to_a_few_joints():
    dog = Skeleton("dog", ("nose", "neck", "hip", "tail"), ((0, 1), (2, 1), (3, 2)), centre=1, height=(0, 1, 2))
    net = STFNet(3, dog, 4, 1, **SMALL)
    terms = STFLoss(net)(clips(3, 4, 9, 4, 1), torch.tensor([0, 1, 2]))
    assert torch.isfinite(terms["loss"])


def test_wrong_input_is_named():
    with pytest.raises(ValueError, match=r"C,V,M = \(4, 25, 2\), got \(3, 25, 2\)"):
        STFNet(6, NTU, in_channels=4, **SMALL)(clips(C=3))
    with pytest.raises(ValueError, match="divisible by 6"):
        MSG3D(6, NTU, widths=(10, 20, 40))


def test_fresh_stf_is_its_baseline():
    torch.manual_seed(1)
    baseline = MSG3D(60, NTU).double()
    baseline.load_state_dict(golden_state(baseline))
    stf = load_msg3d(STFNet(60, NTU).double(), baseline.state_dict())
    x = clips(2, 3, 30, dtype=torch.float64)
    with torch.no_grad():
        assert (baseline.eval()(x) - stf.eval()(x)).abs().max() < 1e-12


@pytest.mark.parametrize("wrong, message", [
    (lambda s: {k: v for k, v in s.items() if k != "tcn1.branches.2.3.conv.weight"}, r"1 missing \['tcn1.branches.2.3.conv.weight'\]"),
    (lambda s: {**s, "extra": torch.ones(1)}, r"1 unknown \['extra'\]"),
    (lambda s: {**s, "fc.weight": torch.ones(7, 48)}, "number of classes"),
    (lambda s: {"state_dict": s}, "flat dictionary"),
])  # fmt: skip
def test_wrong_checkpoints_are_named(wrong, message):
    net = MSG3D(6, NTU, **SMALL)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_msg3d(net, wrong(before))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # and nothing was half loaded


@pytest.mark.parametrize("channels, shape", [(3, (12, 9, 1, 1)), (4, (12,)), (4, (12, 12)), (4, (5, 12, 1, 1))])
def test_weights_of_another_shape_are_named_as_they_are(channels, shape):
    net = MSG3D(6, NTU, in_channels=channels, **SMALL)
    state = {**net.state_dict(), "sgcn1.0.mlp.layers.0.weight": torch.zeros(shape)}
    with pytest.raises(ValueError, match=re.escape(f"the checkpoint has {shape}")):
        load_msg3d(net, state)


def test_one_norm_that_is_frozen_by_hand_moves_nothing(net):
    norm = net.train().tcn1.branches[2][1].eval()
    before = norm.running_mean.clone()
    net(clips())
    assert torch.equal(norm.running_mean, before) and net.tcn1.branches[1][1].running_mean.abs().sum() > 0


def test_windows_from_an_iterator():
    net = MSG3D(6, NTU, windows=iter((3, 5)), **SMALL)
    assert net.windows == (3, 5) and len(net.gcn3d1.gcn3d) == 2


def test_state_dict_round_trip_and_copies(net):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.tcn2.branches[0][0].weight.add_(1)
    assert not torch.equal(net.state_dict()["tcn2.branches.0.0.weight"], twin.state_dict()["tcn2.branches.0.0.weight"])
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin.eval()(clips()), net.eval()(clips()))


def test_missing_branch_is_reported_by_its_public_name(net):
    state = net.state_dict()
    del state["tcn2.branches.3.1.running_var"]
    with pytest.raises(RuntimeError, match="tcn2.branches.3.1.running_var"):
        net.load_state_dict(state)


def test_saved_network_rebuilds_itself(tmp_path, net):
    save_checkpoint(tmp_path / "weights", net, dict(classes=list("abcdef"), stream="joint", preprocess="paper", length=8))
    again, header = load_checkpoint(tmp_path)
    assert header["classes"] == list("abcdef") and isinstance(again, STFNet)
    assert torch.equal(again(clips()), net.eval()(clips()))
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0broken!!")
    with pytest.raises(ValueError, match="weights.safetensors"):
        load_checkpoint(tmp_path)


def test_operations_within_the_papers_tenth():
    from torch.utils.flop_counter import FlopCounterMode

    def operations(net, C):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(torch.zeros(1, C, 300, 25, 2))
        return counter.get_total_flops()

    for C in (3, 4):
        assert operations(STFNet(60, NTU, C), C) <= 1.10 * operations(MSG3D(60, NTU, C), C)


# ---- focus ----

@pytest.mark.parametrize("gap", [0.0, 5.0, 12.0])
def test_focus_is_the_probabilitys_gradient(gap):
    torch.manual_seed(0)
    net = MSG3D(7, SKELETONS["openpose18"], **SMALL).double().eval()
    f = net.features(clips(3, 3, 12, 18, dtype=torch.float64))
    classes = torch.tensor([2, 0, 5])
    with torch.no_grad():
        net.fc.bias[2] += gap - margin(net.head(f.last), torch.tensor([2, 2, 2]))[0]
    last = f.last.detach().requires_grad_()
    p = net.head(last).softmax(1)[range(3), classes]
    grad, = torch.autograd.grad(p.sum(), last)
    exact = min_max(F.relu((grad.mean((3, 4), keepdim=True) * last).sum(2)), f.present)
    assert (grad_cam(f, net.head, classes) - exact).abs().max() < 1e-8


def test_focus_when_the_probability_rounds_to_one(net):
    net = net.eval()
    f = net.features(clips())
    near, inside = grad_cam(f, net.head, torch.zeros(4, dtype=torch.long)), module_focus(net, f, torch.zeros(4, dtype=torch.long))
    with torch.no_grad():
        net.fc.bias[0] += 50
    assert (net.head(f.last).softmax(1)[:, 0] == 1).all()
    far = grad_cam(f, net.head, torch.zeros(4, dtype=torch.long))
    assert far.isfinite().all() and (far - near).abs().max() < 1e-3
    confident = module_focus(net, f, torch.zeros(4, dtype=torch.long))
    assert all(q.isfinite().all() and (q - inside[name]).abs().max() < 1e-3 for name, q in confident.items())
    assert max(q.max() for q in confident.values()) == 1


def test_absent_body_changes_no_focus(net):
    f = net.eval().features(clips())
    present = torch.tensor([[True, False]] * 4)
    other = f.last.clone()
    other[:, 1] = other[:, 1].roll(1, 2).flip(3)  # the same mean, so the same scores
    a, b = (grad_cam(h, net.head, torch.arange(4), present=present) for h in (f.last, other))
    assert torch.allclose(a, b, atol=1e-5) and (a[:, 1] == 0).all()


def test_modules_focus_is_the_clips_own(net):
    net = net.double().train()
    f = net.features(clips(5, dtype=torch.float64))
    whole = module_focus(net, f, torch.arange(5))
    part = f._replace(maps={k: h[1:3] for k, h in f.maps.items()}, present=f.present[1:3])
    for name, q in module_focus(net, part, torch.arange(1, 3)).items():
        assert (q - whole[name][1:3]).abs().max() < 1e-12


def test_module_focus_leaves_no_gradient_behind(net):
    module_focus(net, net.features(clips()), torch.arange(4))
    assert all(p.grad is None for p in net.parameters())


def test_inference_has_focus_too(net):
    with torch.no_grad():
        f = net.eval().features(clips())
        foci = module_focus(net, f, torch.arange(4), names=("block2",))
    assert foci["block2"].shape == (4, 2, 8, 25) and not foci["block2"].requires_grad


# ---- losses ----

def test_each_option_runs_and_differs(net):
    net, x, y = net.double().eval(), clips(dtype=torch.float64), torch.arange(4)
    value = lambda **kw: STFLoss(net, LossWeights(0, 1, 1, 0), **kw)(x, y)
    base, logit, blocks, rms = value(), value(score="logit"), value(coherence="blocks"), value(norm="rms")
    assert base["d"] != logit["d"] and base["c"] != blocks["c"]
    frames = 4 * 25
    assert torch.isclose(base["d"] / rms["d"], torch.tensor((1875 / frames * 2 * frames) ** 0.5, dtype=torch.float64))
    for wrong in (dict(score="x"), dict(coherence="x"), dict(norm="x")):
        with pytest.raises(ValueError, match="must be"):
            value(**wrong)


def test_guide_detaches_the_higher_module(net):
    x, y = clips(), torch.arange(4)
    grads = []
    for guide in (False, True):
        net.zero_grad()
        STFLoss(net.eval(), LossWeights(0, 0, 1, 0), guide=guide)(x, y)["c"].backward()
        grads.append(net.tcn3.branches[0][0].weight.grad.clone())
    assert not torch.allclose(*grads)


def test_constant_focus_has_finite_gradient():
    a = torch.zeros(2, 1, 3, 4, requires_grad=True)
    map_distance(a, torch.zeros(2, 1, 3, 4)).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_clip_without_anybody(net):
    x = clips()
    x[1] = 0
    terms = STFLoss(net)(x, torch.arange(4))
    terms["loss"].backward()
    assert torch.isfinite(terms["loss"]) and all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_constant_mask_reaches_the_logits():
    """Batch statistics would undo a mask that is constant in time; running statistics must not."""
    torch.manual_seed(0)
    net = MSG3D(5, NTU, num_bodies=1, **SMALL).double()
    x = clips(8, 3, 16, M=1, dtype=torch.float64)
    q = torch.rand(25, dtype=torch.float64).expand(8, 1, 4, 25)
    with frozen_norms(net):
        moved = net(mask_input(x, q)) - net(x)
    assert moved.abs().max() > 1e-3


def test_frozen_norms_move_no_statistics_and_let_gradients_through(net):
    before = {k: v.clone() for k, v in net.state_dict().items() if "running" in k or "batches" in k}
    with frozen_norms(net.train()):
        out = net(clips())
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items()) and all(m.training for m in net.modules())
    assert torch.allclose(out, net.eval()(clips()), atol=1e-5)
    out.sum().backward()
    assert net.data_bn.weight.grad.abs().sum() > 0


def test_an_error_under_frozen_norms_leaves_training_mode(net):
    net.train()
    with pytest.raises(RuntimeError), frozen_norms(net):
        raise RuntimeError
    assert all(m.training for m in net.modules())


def test_prediction_before_training_in_the_same_process(net):
    "A constant that was made in inference mode may not be found again in training."
    with torch.inference_mode():
        net.eval()(clips(T=23))
    net.train()(clips(T=23)).sum().backward()


def test_hidden_joint_keeps_a_trained_network_bounded():
    torch.manual_seed(0)
    net = MSG3D(4, NTU, in_channels=4, **SMALL)
    x, y = clips(16), torch.arange(16) % 4
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(15):
        loss = F.cross_entropy(net(x), y)
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    hidden = x.clone()
    hidden[:, :, :, 7] = 0
    with torch.no_grad():
        seen, unseen = (net.eval().features(c).last.abs().max() for c in (x, hidden))
    assert unseen < 5 * seen


def test_adjacency_statistics_see_a_static_graph(net):
    present = torch.ones(3, 2, dtype=torch.bool)
    static = [torch.ones(3, 2, 3, 25, 25)] * 6
    assert all(r["spread"] < 1e-6 and r["ratio"] > 0 for r in adjacency_statistics(net, static, present))


def test_bf16_autocast_gives_finite_float32_focus(net):
    with torch.autocast("cpu", torch.bfloat16):
        terms = STFLoss(net)(clips(), torch.arange(4))
    terms["loss"].backward()
    assert terms["loss"].dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


# ---- the same function and gradients as in the public order, by checkpointing, fused, compiled ----

@pytest.fixture(scope="module")
def public():
    "The yardstick of the speed notebook: the public code's order of operations."
    import nbformat

    import stf.backbone

    space = dict(vars(stf.backbone), math=math)
    for cell in nbformat.read(Path(__file__).parent.parent / "nbs" / "53_speed.ipynb", 4).cells:
        if cell.cell_type == "code" and cell.source.startswith("def public_") and "public_cells" not in cell.source:
            exec(cell.source, space)
    return space["public_order"]


def public_gradients(public, net, x, y, **sizes):
    "Loss and gradients of the public order, by name."
    state = {k: v.clone() for k, v in net.state_dict().items()}
    leaves = {k: v.requires_grad_(v.is_floating_point() and "running" not in k) for k, v in state.items()}
    loss = F.cross_entropy(public(leaves, x, net.skeleton.adjacency(), training=net.training, **sizes), y)
    loss.backward()
    return loss.detach(), {k: v.grad for k, v in leaves.items() if v.requires_grad}


DOG = Skeleton("dog", ("nose", "neck", "hip", "tail"), ((0, 1), (2, 1), (3, 2)), centre=1, height=(0, 1, 2))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("skeleton, T, M", [(DOG, 1, 1), (DOG, 2, 3), (DOG, 7, 2), (SKELETONS["openpose18"], 7, 1), (NTU, 13, 2)], ids=lambda a: getattr(a, "name", a))
def test_gradients_of_the_public_order(public, checkpointing, skeleton, T, M):
    "All parameters, float64: a wrong tap, a lost edge of time, a wrong part of the batch."
    torch.manual_seed(0)
    sizes = dict(windows=(3, 5), gcn_scales=4, g3d_scales=3)
    net = use_checkpointing(MSG3D(3, skeleton, 3, M, (12, 24, 48), **sizes).double().train(), checkpointing)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.randn_like(p), alpha=0.1 if "A_res" in name else 0.02)
        for m in net.modules():
            if hasattr(m, "A"):
                m.A.copy_(m.A.float())  # as the public code rounds it
    x, y = clips(3, 3, T, skeleton.num_joints, M, torch.float64), torch.tensor([0, 1, 2])
    loss, wanted = public_gradients(public, net, x, y, **sizes)
    ours = F.cross_entropy(net(x), y)
    ours.backward()
    assert abs(ours - loss) < 1e-9
    scale = max(g.abs().max() for g in wanted.values())
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-7, atol=1e-9 * float(scale.detach()), msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_number(net, training):
    "With a clip's own graph: every term of the objective, its gradients and the running statistics, which move once."
    x, y, found = clips(5, dtype=torch.float64), torch.arange(5), []
    for on in (False, True):
        twin = use_checkpointing(copy.deepcopy(net).double().train(training), on)
        terms = STFLoss(twin)(x, y)
        terms["loss"].backward()
        found.append([terms[k] for k in ("ce", "e", "d", "c", "g")] + [p.grad for p in twin.parameters()] + [b.double() for b in twin.buffers()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_maps_survive_the_backward_pass(net):
    "In-place steps may not touch what a focus reads afterwards."
    f = net.double().train().features(clips(dtype=torch.float64))
    before = {k: v.detach().clone() for k, v in f.maps.items()}
    F.cross_entropy(net.head(f.last), torch.arange(4)).backward(retain_graph=True)
    module_focus(net, f, torch.arange(4))
    F.cross_entropy(net.head(f.last), torch.arange(4)).backward()
    assert all(torch.equal(f.maps[k], v) for k, v in before.items())


def squared_gradient(f, x, y):
    "Squared norm of the input's gradient: to differentiate it is to differentiate f twice."
    x = x.clone().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(f(x), y), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_second_derivative_is_that_of_the_public_order(public, training, checkpointing):
    torch.manual_seed(0)
    sizes = dict(windows=(3, 5), gcn_scales=4, g3d_scales=3)
    net = use_checkpointing(MSG3D(3, DOG, 3, 2, (12, 24, 48), **sizes).double().train(training), checkpointing)
    for m in net.modules():
        if hasattr(m, "A"):
            m.A.copy_(m.A.float())
    x, y, state = clips(3, 3, 9, 4, dtype=torch.float64), torch.arange(3), {k: v.clone() for k, v in net.state_dict().items()}
    leaves = {k: v.requires_grad_(v.is_floating_point() and "running" not in k) for k, v in state.items()}
    squared_gradient(lambda x: public(leaves, x, DOG.adjacency(), training=training, **sizes), x, y).backward()
    squared_gradient(net, x, y).backward()
    scale = max(float(v.grad.abs().max()) for v in leaves.values() if v.grad is not None)
    for name, p in net.named_parameters():
        wanted = leaves[name].grad if leaves[name].grad is not None else torch.zeros_like(p)
        found = p.grad if p.grad is not None else torch.zeros_like(p)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9 * scale, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_second_derivative_with_a_clips_own_graph(net, checkpointing):
    "Against finite differences, in evaluation mode (where few ReLUs open in so short a step)."
    net = use_checkpointing(net.double().eval(), checkpointing)
    x, y = clips(3, T=9, dtype=torch.float64), torch.arange(3)
    for name in ("sgcn1.0.A_res", "gcn3d2.gcn3d.0.gcn3d.1.mlp.layers.0.weight", "tcn3.branches.2.3.conv.weight", "stf.2.alpha.mix_time.weight"):
        net.zero_grad()
        squared_gradient(net, x, y).backward()
        p = net.get_parameter(name)
        direction = torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(0))
        expected, step, values = (p.grad * direction).sum().item(), 1e-7, []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * step * direction)
            values.append(squared_gradient(net, x, y).item())
            with torch.no_grad():
                p.sub_(sign * step * direction)
        assert abs((values[0] - values[1]) / (2 * step) - expected) < 1e-3 * max(abs(expected), 1e-6), name


def test_only_the_last_layer_trains(net):
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith("fc."))
    F.cross_entropy(use_checkpointing(net)(clips()), torch.arange(4)).backward()
    assert net.fc.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_fused_network_is_the_same(net, dtype, tolerance):
    net, x = net.to(dtype).train(), clips(dtype=dtype)
    with torch.no_grad():
        for _ in range(3):
            net(x)
            for p in net.parameters():
                p.add_(torch.randn_like(p), alpha=0.02)
        before = net.eval()(x)
        fused = fuse(net)
        assert (fused(x) - before).abs().max() < tolerance * max(1, float(before.abs().max()))
        assert torch.equal(net(x), before)  # the original is as it was
    focus, again = (module_focus(n, n.features(x), torch.arange(4)) for n in (fused, net))
    assert all((focus[k] - again[k]).abs().max() < 1e3 * tolerance for k in focus)


def test_bf16_autocast_is_close(net):
    x = clips()
    with torch.no_grad():
        exact = net.eval()(x)
        with torch.autocast("cpu", torch.bfloat16):
            f = net.features(x)
            logits = net.head(f.last)
    assert f.last.dtype == torch.bfloat16 and logits.isfinite().all()
    assert (logits - exact).abs().max() < 0.05 * (1 + exact.abs().max())
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(net(x).float(), torch.arange(4))
    loss.backward()
    rough = torch.cat([p.grad.flatten() for n, p in net.named_parameters() if not n.startswith("stf.")])
    net.zero_grad()
    F.cross_entropy(net(x), torch.arange(4)).backward()
    fine = torch.cat([p.grad.flatten() for n, p in net.named_parameters() if not n.startswith("stf.")])
    assert F.cosine_similarity(rough, fine, dim=0) > 0.95  # six seeds on one processor: 0.956 to 0.972


def needs_a_cpp_compiler():
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile on the CPU needs a C++ compiler")


@pytest.mark.slow
@pytest.mark.parametrize("backend, dtype, T, checkpointing", [("aot_eager", torch.float64, 9, True), ("inductor", torch.float32, 16, False)])
def test_compiled_gradient_of_each_term(backend, dtype, T, checkpointing):
    """torch.compile can't differentiate twice, and has lost such gradients silently: each term's must be there, and be eager's.

    The whole STFNet, by the part of the compiler that traces gradients, and by its own machine code.
    """
    if backend == "inductor":
        needs_a_cpp_compiler()
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = STFNet(3, DOG, 4, 1, (6, 12, 24), gcn_scales=3, g3d_scales=2, windows=(3,)).to(dtype).train()
    for module in net.stf:
        torch.nn.init.normal_(module.alpha.mix_time.weight, std=0.3)
    use_checkpointing(net, checkpointing)
    x, y, eager, gradients = clips(4, T=T, V=4, M=1, dtype=dtype), torch.arange(4) % 3, net.features, {}
    start = {k: v.clone() for k, v in net.state_dict().items()}
    for way, features in (("eager", eager), ("compiled", torch.compile(eager, backend=backend, dynamic=False))):
        net.features = features
        for term in ("ce", "e", "d", "c", "g"):
            net.zero_grad()
            net.load_state_dict(start)  # L_e sees the running statistics, which every pass moves
            weights = LossWeights(*(1.0 if k == term else 0.0 for k in "edcg"))
            STFLoss(net, weights, norm="rms")(x, y)[term].backward()
            gradients[way, term] = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    for term in ("ce", "e", "d", "c", "g"):
        ours, wanted = gradients["compiled", term], gradients["eager", term]
        assert ours.keys() >= wanted.keys()  # a compiled pass gives zeros where eager gives nothing
        size = max(float(g.abs().max()) for g in wanted.values())
        assert size > 1e-5, f"{term} has no gradient to compare"
        for name in ours:
            difference = float((ours[name] - wanted.get(name, 0)).abs().max())
            assert difference <= 1e-4 * size, f"{term}, {name}: {difference:.1e} of {size:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("layer, channels", [("gcn3d1", 4), ("gcn3d2", 6), ("tcn1", 6)])
def test_compiled_layers(layer, channels):
    "The compiler's own code, layer by layer: an overlapping view once made it write beyond its memory."
    needs_a_cpp_compiler()
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = MSG3D(3, DOG, 4, 1, widths=(6, 12, 24), gcn_scales=3, g3d_scales=2, windows=(3,)).train()
    layer = getattr(net, layer)
    x, results = torch.randn(4, channels, 9, 4, requires_grad=True), []
    for f in (layer, torch.compile(layer, dynamic=False)):
        net.zero_grad()
        f(x).square().sum().backward()
        results.append([x.grad.clone(), *(p.grad.clone() for p in layer.parameters())])
        x.grad = None
    scale = max(float(g.abs().max()) for g in results[0])
    for eager, compiled in zip(*results):
        assert (eager - compiled).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize("make", [lambda: MSG3D(3, DOG, 4, 1, widths=(6, 12, 24)), lambda: STGCN(3, DOG, 4, 1)], ids=["msg3d", "stgcn"])
def test_no_1x1_convolution_has_a_stride(make):
    "Its backward pass once wrote past its memory (oneDNN, AVX-512, few channels, an odd batch): a crash somewhere later."
    small = [m for m in make().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (1, 1)]
    assert small and all(m.stride == (1, 1) for m in small)


@pytest.mark.parametrize("change", [dict(eps=0.1), dict(momentum=0.0), dict(momentum=None), dict(track_running_stats=False)], ids=str)
@pytest.mark.parametrize("of", ["one", "all"])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norms_of_other_settings_are_what_they_are_alone(change, of, training):
    "Branches run side by side took every setting from the first norm: swa_utils.update_bn, which sets momentum to None, crashed."
    torch.manual_seed(0)
    tcn = MultiScaleTemporalConv(6, 12, stride=2).double().train(training)
    norms = [m for m in tcn.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms if of == "all" else norms[3:4]:
        for name, value in change.items():
            setattr(norm, name, value)
    alone, x = copy.deepcopy(tcn), torch.randn(3, 6, 7, 4, dtype=torch.float64)
    strided = x[:, :, ::2]
    y = torch.cat([*(branch(x) for branch in alone.branches[:5]), alone.branches[5](strided)], 1)
    y = F.relu(y + alone.residual(strided))
    assert (tcn(x) - y).abs().max() < 1e-12
    for (name, ours), wanted in zip(tcn.named_buffers(), alone.buffers()):
        assert (ours.double() - wanted.double()).abs().max() < 1e-12, name


def test_parameters_of_a_functional_call_get_the_gradients_also_with_checkpointing(net):
    "Products that are computed again in the backward pass once read the parameters that stood there by then."
    x, gradients = clips(2, V=net.skeleton.num_joints, M=net.num_bodies, C=net.in_channels), []
    for on in (False, True):
        use_checkpointing(net.eval(), on)
        p = {k: (2 * v.detach()).requires_grad_() for k, v in net.named_parameters()}
        torch.func.functional_call(net, p, (x,)).square().sum().backward()
        gradients.append(p)
    for name, p in gradients[0].items():
        q = gradients[1][name].grad
        assert (p.grad is None) == (q is None) and (q is None or (p.grad - q).abs().max() <= 1e-4 * (1e-12 + p.grad.abs().max())), name


def test_weights_in_another_layout_and_an_empty_batch(net):
    x = clips(2, V=net.skeleton.num_joints, M=net.num_bodies, C=net.in_channels)
    turned = {k: v.transpose(0, 1).contiguous().transpose(0, 1) if v.ndim > 1 else v for k, v in net.state_dict().items()}
    other = copy.deepcopy(net.eval())
    other.load_state_dict(turned, assign=True)
    with torch.no_grad():
        assert torch.allclose(other(x), net(x), atol=1e-5) and net(x[:0]).shape == (0, net.num_classes)
