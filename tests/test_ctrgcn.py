"""CTR-GCN: any skeleton and depth, checkpoints, second stages, the focus measures' maps."""
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from stf.checkpoints import ConfigError, batch_options, load_checkpoint, save_checkpoint
from stf.ctrgcn import CTRGCN, STFCTRGCN
from stf.experiments import ROWS
from stf.faithfulness import beta_ceiling, focus_measures, randomisation_check
from stf.focus import focus_agreement, module_focus, resample_focus
from stf.losses import LossWeights, STFLoss
from stf.stf_module import adjacency_statistics
from stf.train import Config, same_config
from test_networks import DOG, clips, stirred
from test_train import TinyStore, equal, go, interruptible, pressing  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(widths=(8, 12, 16), layers=(1, 2, 1))


def naive_block(unit, x, G, stride):
    "A block by the paper's formula and figure, from its tensors alone."
    t = dict(unit.named_parameters()) | dict(unit.named_buffers())

    def conv(h, name, **options):
        return F.conv2d(h, t[f"{name}.weight"], t[f"{name}.bias"], **options)

    def norm(h, name):
        stats = (t[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(h, *stats)

    K, V = G.shape[1:3]
    psi, phi = conv(x, "gcn.relation").mean(2).unflatten(1, (2, K, -1)).unbind(1)
    q = torch.tanh(psi[..., None] - phi[..., None, :]).flatten(1, 2)  # (B,K·R,V,V), from j to i
    q = conv(q, "gcn.expand", groups=K).unflatten(1, (K, -1))
    R = (t["gcn.A"] + G).unsqueeze(2) + t["gcn.alpha"] * q
    Wx = conv(x, "gcn.transform").unflatten(1, (K, -1))
    h = norm(torch.einsum("bkoij,bkotj->boti", R, Wx), "bn")
    widens = x.shape[1] != h.shape[1]
    h = F.relu(h + (norm(conv(x, "gcn_residual.0"), "gcn_residual.1") if widens else x))
    first = [F.relu(norm(conv(h, f"tcn.branches.{k}.0"), f"tcn.branches.{k}.1")) for k in range(3)]
    outs = [norm(conv(first[k], f"tcn.branches.{k}.3.conv", stride=(stride, 1),
                      padding=(2 * (k + 1), 0), dilation=(k + 1, 1)), f"tcn.branches.{k}.3.bn")
            for k in range(2)]
    outs.append(norm(F.max_pool2d(first[2], (3, 1), (stride, 1), (1, 0)), "tcn.branches.2.4"))
    outs.append(norm(conv(h, "tcn.branches.3.0", stride=(stride, 1)), "tcn.branches.3.1"))
    around = x
    if widens or stride > 1:
        around = norm(conv(x, "residual.0", stride=(stride, 1)), "residual.1")
    return F.relu(torch.cat(outs, 1) + around)


def test_a_block_is_the_papers():
    """No test saw a missing ReLU, residual or dilation, nor a topology of another sign."""
    net = stirred(CTRGCN(5, DOG, 3, 2, **SIZES)).double().eval()
    for block, stride in ((3, 1), (2, 2), (4, 2)):
        unit, V = net.units[block - 1], DOG.num_joints
        nn.init.constant_(unit.gcn.alpha, 0.7)
        x = torch.randn(2, unit.gcn.transform.in_channels, 7, V, dtype=torch.float64)
        G = torch.randn(2, 3, V, V, dtype=torch.float64)
        assert (unit(x, G) - naive_block(unit, x, G, stride)).abs().max() < 1e-9, block
    assert net.units[0].residual is None and all(unit.residual for unit in net.units[1:])


def test_starts_with_the_bodys_graph():
    net = CTRGCN(5, DOG, 3, 2, **SIZES)
    assert all(unit.gcn.alpha == 0 for unit in net.units)
    rows = net.units[0].gcn.A.sum(2)  # the mean of the neighbours, or none
    assert (rows.isclose(torch.ones(())) | (rows == 0)).all() and (rows == 0).any()


def test_settings_of_other_networks():
    """M1-atmost was trained as M1, and reported as a reading with a gain of 0."""
    c = Config(**OPTIONS)
    for change in (dict(exact=False), dict(checkpointing=True)):
        with pytest.raises(ConfigError, match="needs model='msg3d' or 'stf'"):
            c.replace(**change)
    with pytest.raises(ConfigError, match="exact"):
        ROWS["M4-atmost"].configs(c, 0)
    with pytest.raises(ConfigError, match="widths must be three multiples of 4"):
        c.replace(widths=(6, 12, 18))
    assert same_config(c, c.replace(gcn_scales=5, beta_kernel="3x1", dropout=0.1)) == []
    stf = c.replace(model="stf-ctrgcn")
    assert same_config(stf, stf.replace(windows=(5,), beta_kernel="3x1")) == ["beta_kernel"]


@pytest.mark.parametrize("channels, T", [(3, 7), (4, 8)])
def test_continues_from_every_block(channels, T):
    """A wrong count of blocks would run some twice, or leave them out."""
    net = stirred(STFCTRGCN(5, DOG, channels, 2, **SIZES)).double().eval()
    f = net.features(clips(net, 3, T))
    assert sorted(f.maps) == ["block1", "block2", "block3", "block4"] and len(f.beta) == 4
    assert [h.shape[3] for h in f.maps.values()] == [T, (T + 1) // 2, (T + 1) // 2, (T + 3) // 4]
    for h in f.maps:
        assert (net.forward_from({h: f.maps[h]}) - f.last).abs().max() < 1e-10
    with pytest.raises(ValueError, match="the maps must be of one block .*block4'.*got"):
        net.forward_from({"block5": f.last})
    sizes = adjacency_statistics(net, f.dynamic, f.present)
    expected = f.dynamic[2].flatten(0, 1)[f.present.flatten()].square().mean(0).sum((1, 2)).sqrt()
    expected = (expected / net.units[2].gcn.A.square().sum((1, 2)).sqrt()).mean()
    assert len(sizes) == 4 and sizes[2]["ratio"] == pytest.approx(expected.item())


def test_the_measures_of_its_own_blocks(monkeypatch):
    """Of four blocks, the third was taken for the last: L_c compared the last focus with itself."""
    net = stirred(STFCTRGCN(5, DOG, 3, 2, **SIZES)).double().eval()
    f, classes = net.features(x := clips(net, 4, 16)), torch.tensor([0, 1, 2, 3])
    for coherence, names in net.coherence_modules.items():
        foci = STFLoss(net, LossWeights(g=0), coherence=coherence).module_foci(f, classes)
        wanted = (module_focus(net, f, classes, (name,))[name] for name in names)
        assert all((a - b).abs().max() < 1e-9 for a, b in zip(foci, wanted)), names
    assert (foci[0] - resample_focus(foci[1], foci[0].shape[2])).abs().max() > 0.1
    x, net = x.float(), net.float()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # cards that nothing here is on
    assert len(beta_ceiling(net, x, x, steps=2)) == 4
    with pytest.raises(ValueError, match="parts of MS-G3D, not of STFCTRGCN"):
        randomisation_check(net, {}, x)


def test_an_absent_body_and_the_order_of_bodies_change_nothing_else():
    net = stirred(CTRGCN(5, DOG, 3, 2, **SIZES)).double().eval()
    x = clips(net, 4, 8)
    maps = net.features(x).maps["block3"]
    alone = x.clone()
    alone[..., 1] = 0
    assert (net.features(alone).maps["block3"][:, 0] - maps[:, 0]).abs().max() < 1e-12


def test_round_trip_and_sizes(tmp_path):
    net = stirred(STFCTRGCN(5, DOG, 4, 3, **SIZES, beta_kernel="3x1")).eval()
    facts = dict(classes=list("abcde"), stream="joint", preprocess="paper", length=8)
    save_checkpoint(tmp_path / "weights", net, facts)
    again, header = load_checkpoint(tmp_path)
    assert type(again) is STFCTRGCN and header["model"] == "stf.ctrgcn:STFCTRGCN"
    assert torch.equal(again(clips(net)), net(clips(net)))
    for wrong in (dict(widths=(8, 12)), dict(widths=(8, 12, 15)), dict(layers=(4, 0, 3))):
        with pytest.raises(ValueError, match="multiples of 4"):
            CTRGCN(5, DOG, **wrong)


OPTIONS = dict(model="ctrgcn", widths=(8, 12, 16), epochs=2, milestones=(1,), stf_epochs=1,
               stf_milestones=())


def test_both_stages_and_resume(tmp_path, interruptible):  # noqa: F811
    """All four losses train it from its baseline; an interrupted training ends as a whole one."""
    whole = go(tmp_path / "whole", **OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "cut", pressing(4), **OPTIONS)
    assert equal(go(tmp_path / "cut", **OPTIONS), whole)
    c = whole.config.second_stage("edcg").replace(folder=str(tmp_path / "stf"))
    second = go(c)
    assert c.model == "stf-ctrgcn" and {*"edcg", "g_ratio"} <= {*second.history.columns}
    net, header = load_checkpoint(second.folder)
    assert all(m.alpha.mix_time.weight.abs().max() > 0 for m in net.stf)
    store, options = TinyStore(), batch_options(header)
    measured = focus_measures(net, store, [14, 15], options)  # L_c's maps: the last two blocks
    f = net.features(x := store.batch([14, 15], **options)[0])
    for measure, lower in (("modules 5, 6 agree", "block9"), ("blocks agree", "block7")):
        foci = [module_focus(net, f, net(x).argmax(1), (b,))[b] for b in (lower, "block10")]
        foci[1] = resample_focus(foci[1], foci[0].shape[2])
        agree = focus_agreement(*foci, f.present).detach().numpy()
        assert np.abs(measured[measure] - agree).max() < 1e-5
    assert f.maps["block7"].shape[3] > f.maps["block10"].shape[3]
    with pytest.raises(ConfigError, match="'ctrgcn' has no β"):
        Config(model="ctrgcn", losses="g", widths=(8, 12, 16))
