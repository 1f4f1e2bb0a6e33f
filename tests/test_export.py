"""ONNX: the same function as PyTorch on other clips, lengths and class counts; G_k and the focus computed, not frozen; no torch at run time."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stf.backbone import MSG3D
from stf.clips import read_ntu
from stf.dataset import make_batch
from stf.export import Exported, export_onnx, onnx_difference
from stf.runtime import OnnxNetwork
from stf.skeleton import SKELETONS
from stf.checkpoints import load_checkpoint, save_checkpoint
from stf.stf_module import STFNet, time_cells
from stf.synthetic import SyntheticConfig, write_synthetic

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(widths=(6, 12, 12), gcn_scales=3, g3d_scales=2, windows=(3,))
OTHER_SIZES = ((1, 1), (1, 4), (4, 7), (2, 16), (3, 50), (1, 300))


def network(cls, classes, skeleton="ntu25", **sizes):
    "A network with weights that make G_k matter, running statistics included."
    torch.manual_seed(classes)
    net = cls(classes, SKELETONS[skeleton], **{**SMALL, **sizes})
    for name, p in net.named_parameters():
        if name.endswith("mix_time.weight"):
            torch.nn.init.normal_(p, std=0.2)
    for _ in range(3):
        net.train()(torch.randn(4, net.in_channels, 20, net.skeleton.num_joints, net.num_bodies))
    return net.eval()


def test_time_cells_by_hand():
    "Against numpy, for clips shorter and longer than the cells."
    for T in (1, 2, 15, 16, 17, 75, 300):
        for cells in (4, 16):
            edges, frame = np.linspace(0, T, cells + 1), np.arange(T)
            overlap = np.clip(np.minimum(edges[1:, None], frame + 1) - np.maximum(edges[:-1, None], frame), 0, None)
            assert np.abs(time_cells(T, cells).numpy() - overlap / overlap.sum(1, keepdims=True)).max() < 1e-12
            assert (time_cells(T, cells, torch.ones(1)) - time_cells(T, cells)).abs().max() < 1e-6


def test_wrapper_does_not_change_the_network_it_exports():
    net = network(STFNet, 3).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    logits, focus, *G = Exported(net, True, True)(torch.randn(2, 3, 12, 25, 2))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    assert len(G) == 6 and logits.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("cls, classes, options", [(MSG3D, 7, {}), (STFNet, 3, dict(in_channels=4, num_bodies=1)), (STFNet, 120, dict(skeleton="openpose18"))])
def test_parity_on_other_clips_lengths_and_class_counts(cls, classes, options, tmp_path):
    net = network(cls, classes, **options)
    path = export_onnx(net, tmp_path / "net.onnx", adjacencies=cls is STFNet)
    assert onnx_difference(path, net, OTHER_SIZES) < 1e-4
    out = OnnxNetwork(path)
    assert out.facts["num_classes"] == classes and len(out.classes) == classes and out.skeleton == net.skeleton
    x = np.random.RandomState(0).standard_normal((2, net.in_channels, 24, net.skeleton.num_joints, net.num_bodies)).astype(np.float32)
    x[1] *= 3  # noise is like noise: let the second clip be a larger one
    got = out(x)
    assert got["focus"].min() >= 0 and got["focus"].max() <= 1 and got["focus"].shape[:2] == (2, net.num_bodies)
    if cls is STFNet:  # two clips, two graphs; and a clip's graph doesn't depend on its neighbour
        with torch.no_grad():
            own = net.features(torch.from_numpy(x)).dynamic
        for i in range(6):
            between, wanted = np.subtract(*got[f"G{i + 1}"]), (own[i][0] - own[i][1]).numpy()
            assert np.abs(between - wanted).max() < 0.02 * np.abs(wanted).max()  # the very difference that PyTorch sees
            assert np.allclose(out(x[1:])[f"G{i + 1}"], got[f"G{i + 1}"][1:], atol=1e-4)


@pytest.mark.slow
def test_a_file_that_differs_is_not_kept_and_an_old_one_stays(tmp_path):
    net, path = network(MSG3D, 2, num_bodies=1), tmp_path / "net.onnx"
    path.write_text("the file of yesterday")
    with pytest.raises(ValueError, match="differs from PyTorch"):
        export_onnx(net, path, focus=False, tolerance=-1.0)
    assert path.read_text() == "the file of yesterday" and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.slow
def test_checkpoint_to_answer_without_torch(tmp_path):
    """The whole way: a checkpoint's folder, the command's function, a raw file, a process in which torch can't be imported."""
    net = network(STFNet, 3, in_channels=4)
    save_checkpoint(tmp_path / "run" / "weights", net, dict(classes=["a", "b", "c"], stream="bone", preprocess="paper", length=32))
    path = export_onnx(tmp_path / "run", tmp_path / "net.onnx")
    file = write_synthetic(tmp_path / "raw", SyntheticConfig(actions=(23,), subjects=(1,), cameras=(1,)), progress=False)[0]
    code = f"""
import sys, json
sys.modules["torch"] = None
from stf.clips import read_ntu
from stf.runtime import OnnxNetwork
answer = OnnxNetwork({str(path)!r}).ask(read_ntu({str(file)!r}))
print(json.dumps([answer["probabilities"].tolist(), answer["focus"].shape]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    probabilities, shape = json.loads(done.stdout)
    with torch.no_grad():
        expected = net(make_batch(read_ntu(file), stream="bone", length=32).x).softmax(1)[0]
    assert np.allclose(probabilities, expected, atol=1e-4) and shape == [2, 8, 25]


def test_shipped_networks_say_how_their_input_is_made():
    for folder in sorted((ROOT / "data" / "weights").iterdir()):
        if (folder / "weights.safetensors").exists():
            assert {"stream", "preprocess", "length", "num_bodies", "classes"} <= set(load_checkpoint(folder)[1])
