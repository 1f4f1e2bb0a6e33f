"""Genuine recordings, end to end: read, drawn, classified, fitted."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from stf.clips import ClipError, open_clips, read_ntu  # noqa: E402
from stf.dataset import ClipStore  # noqa: E402
from stf.plot import draw_strip  # noqa: E402
from stf.checkpoints import load_checkpoint  # noqa: E402
from stf.stf_module import STFNet  # noqa: E402

WEIGHTS = Path(__file__).resolve().parent.parent / "data" / "weights"


@pytest.fixture(scope="module")
def ntu_store(real_data, tmp_path_factory):
    return ClipStore.build(
        open_clips(real_data / "ntu-raw" / "skeletons"),
        tmp_path_factory.mktemp("ntu") / "store",
        progress=False,
    )


@pytest.mark.parametrize("name", ["synthetic-m1", "synthetic-m4", "synthetic-le"])
def test_raw_files_are_classified_by_the_shipped_networks(ntu_store, name):
    """Its answers mean little (it knows twenty synthetic actions); that it answers, finitely,
    is the point."""
    net, header = load_checkpoint(WEIGHTS / name)
    options = ("stream", "preprocess", "length", "num_bodies")
    x, _ = ntu_store.batch(range(len(ntu_store)), **{k: header[k] for k in options})
    with torch.no_grad():
        p = net(x).softmax(1)
    assert p.shape == (len(ntu_store), len(header["classes"])) and torch.isfinite(p).all()


def test_raw_files_are_drawn(ntu_store):
    for i in range(len(ntu_store)):
        clip = ntu_store[i]
        ax = draw_strip(clip.joints, clip.skeleton, visible=clip.visible, frames=5)
        ax.figure.canvas.draw()
        plt.close(ax.figure)


def test_truncated_files_are_refused_by_name_and_line(real_data):
    for path in sorted((real_data / "ntu-raw" / "truncated").glob("*.skeleton")):
        with pytest.raises(ClipError, match=rf"{path.name}.*line \d+"):
            read_ntu(path)


def fit(store, labels, steps=440):
    "Accuracy on the training clips themselves (main body only) after some steps."
    torch.manual_seed(0)
    net = STFNet(
        len(store.classes),
        store.skeleton,
        3,
        1,
        widths=(24, 48, 96),
        gcn_scales=4,
        g3d_scales=4,
        windows=(3,),
    )
    x = store.batch(range(len(store)), preprocess="msg3d", length=32, num_bodies=1).x
    labels = torch.as_tensor(labels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, 1.5 * (1 - step / steps))
        batch = torch.randperm(len(x), generator=order)[:16]
        loss = F.cross_entropy(net(x[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return (net.eval()(x).argmax(1) == labels).float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("shuffled", [False, True])
def test_ntu120_files_can_be_fitted(real_data, tmp_path, shuffled):
    """A smoke test of capacity and plumbing: 116 clips of 29 classes are learned by heart, and
    so are wrong labels."""
    store = ClipStore.build(
        open_clips(real_data / "ntu120-raw" / "ntu120_116.tar.xz"),
        tmp_path / "store",
        progress=False,
    )
    assert len(store) == 116 and len(store.classes) == 29
    labels = np.random.default_rng(0).permutation(store.labels) if shuffled else store.labels
    accuracy = fit(store, labels)
    print(f"{'shuffled' if shuffled else 'true'} labels: {accuracy:.1%}")
    assert accuracy >= 0.95
