"""ST-GCN: against its formula, any tree's partition, checkpoints, resume, predictions."""
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.checkpoints import ConfigError, load_checkpoint, save_checkpoint
from stf.stgcn import STGCN, normalise_partition, spatial_partition
from stf.train import Config
from test_networks import DOG, clips, stirred
from test_skeleton import make, trees
from test_train import equal, go, interruptible, pressing  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("one_thread")


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
    net = STGCN(5, DOG, channels, 2, **sizes).double()
    for unit in net.units:  # the network rounds Λ to float32, which is not the question here
        unit.gcn.A.copy_(torch.tensor(normalise_partition(spatial_partition(DOG))))
    x = clips(stirred(net).train(training), 3, T)
    expected = by_formula(copy.deepcopy(net), x, training)
    assert expected.std() > 0.01 and (net(x) - expected).abs().max() < 1e-10


@settings(max_examples=60, deadline=None)
@given(trees(12), st.data())
def test_partition_of_any_tree(parents, data):
    tree, V = make(parents), len(parents) + 1
    centre = data.draw(st.integers(0, V - 1))
    A = spatial_partition(tree, centre)
    assert np.array_equal(A.sum(0), np.eye(V) + tree.adjacency())  # each neighbour once
    assert np.array_equal(A[1], A[2].T)
    inward = A[1].sum(1)  # one neighbour is nearer
    assert inward[centre] == 0 and (np.delete(inward, centre) == 1).all()
    hat = normalise_partition(A)
    assert np.isfinite(hat).all() and hat.max(initial=0) < 1 and ((hat > 0) == (A > 0)).all()


# ---- checkpoints, trainings, predictions


def test_round_trip_of_every_size(tmp_path):
    sizes = dict(widths=(4, 6, 8), layers=(1, 2, 1), temporal_kernel=3, dropout=0.25, centre="tail")
    net = stirred(STGCN(5, DOG, 4, 3, **sizes)).eval()
    facts = dict(classes=list("abcde"), stream="joint", preprocess="paper", length=8)
    save_checkpoint(tmp_path / "weights", net, facts)
    again, header = load_checkpoint(tmp_path)
    assert type(again) is STGCN and header["model"] == "stf.stgcn:STGCN" and again.centre == 3
    assert torch.equal(again(clips(net)), net(clips(net)))


OPTIONS = dict(model="stgcn", widths=(4, 6, 8), epochs=2, milestones=(1,), stf_epochs=1,
               stf_milestones=())  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return go(tmp_path_factory.mktemp("run") / "run", **OPTIONS)


def test_resume_is_exact_with_dropout(trained, tmp_path, interruptible):  # noqa: F811
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "run", pressing(4), **OPTIONS)
    assert trained.config.dropout > 0 and equal(go(tmp_path / "run", **OPTIONS), trained)


def test_second_stages(trained, tmp_path):
    for losses in ("e", "dc"):
        c = trained.config.second_stage(losses).replace(folder=str(tmp_path / losses))
        assert set(losses) <= set(go(c).history.columns)
    with pytest.raises(ConfigError, match="'stgcn' has no β"):  # before a folder is claimed
        trained.config.second_stage("g")
    c = trained.config.replace(folder=str(tmp_path / "wide"), init=str(trained.folder))
    with pytest.raises(ConfigError, match="widths"):
        go(c.replace(widths=(4, 6, 10)))
    assert Config(model="stgcn", widths=(64, 128, 256)).widths == (64, 128, 256)  # not by six
