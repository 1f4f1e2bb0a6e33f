"""ONNX: PyTorch's numbers on other clips, G_k and Q computed, no torch to run it."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stf.backbone import MSG3D
from stf.checkpoints import load_checkpoint, save_checkpoint
from stf.clips import read_ntu
from stf.dataset import make_batch
from stf.extras.onnx import OnnxNetwork, export_onnx
from stf.focus import grad_cam
from stf.skeleton import SKELETONS
from stf.stf_module import STFNet
from stf.synthetic import SyntheticConfig, write_synthetic

WEIGHTS = Path(__file__).resolve().parent.parent / "data" / "weights"


def network(cls, classes, skeleton="ntu25", **options):
    """A network with weights that make G_k matter, running statistics included."""
    torch.manual_seed(classes)
    sizes = dict(widths=(6, 12, 12), gcn_scales=3, g3d_scales=2, windows=(3,))
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
    (STFNet, 120, dict(skeleton="openpose18")),
])  # fmt: skip
def test_onnx_equals_torch_on_other_clips_and_lengths(cls, classes, options, tmp_path):
    """A length, a number of clips or a G_k that became a constant; a changed network."""
    net = network(cls, classes, **options).double()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    file = OnnxNetwork(export_onnx(net, tmp_path / "net.onnx", adjacencies=cls is STFNet))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and not net.training
    assert file.facts["num_classes"] == len(file.classes) == classes
    assert file.skeleton == net.skeleton
    for clips, frames in ((1, 1), (1, 4), (4, 7), (2, 16), (3, 50), (1, 300)):
        shape = (clips, net.in_channels, frames, net.skeleton.num_joints, net.num_bodies)
        x = torch.randn(shape, dtype=torch.float64)
        x *= torch.arange(1, clips + 1).view(-1, 1, 1, 1, 1)  # noise is like noise: sizes differ
        got = file(x.numpy())
        with torch.no_grad():
            f = net.features(x)
            logits = net.head(f.last)
            wanted = [logits, grad_cam(f, net.head, logits.argmax(1)), *f.dynamic]
        assert len(got) == len(wanted)
        for (name, g), w in zip(got.items(), wanted):
            error = np.abs(g - w.numpy()).max() / max(1, w.abs().max())
            assert g.shape == w.shape and error < 1e-4, name
        if clips > 1:  # each clip has a graph of its own: the very difference that PyTorch computes
            for i, G in enumerate(f.dynamic):
                between, own = np.subtract(*got[f"G{i + 1}"][:2]), (G[0] - G[1]).numpy()
                assert np.abs(between - own).max() < 0.02 * np.abs(own).max()


@pytest.mark.slow
def test_onnx_file_that_differs_is_not_kept_and_an_old_one_stays(tmp_path):
    net, path = network(MSG3D, 2, num_bodies=1), tmp_path / "net.onnx"
    path.write_text("yesterday's file")
    with pytest.raises(ValueError, match="no header|not an ONNX network"):
        OnnxNetwork(path)
    with pytest.raises(ValueError, match="differs from PyTorch"):
        export_onnx(net, path, focus=False, tolerance=-1.0)
    assert path.read_text() == "yesterday's file" and list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_checkpoint_to_prediction_without_torch(tmp_path):
    """A run's folder, the export, a raw file, a process in which torch can't be imported."""
    net = network(STFNet, 3, in_channels=4)
    header = dict(classes=["a", "b", "c"], stream="bone", preprocess="paper", length=32)
    save_checkpoint(tmp_path / "run" / "weights", net, header)
    path = export_onnx(tmp_path / "run", tmp_path / "net.onnx")
    people = SyntheticConfig(actions=(23,), subjects=(1,), cameras=(1,))
    file = write_synthetic(tmp_path / "raw", people, progress=False)[0]
    code = f"""
import sys, json
sys.modules["torch"] = None
from stf.clips import read_ntu
from stf.extras.onnx import OnnxNetwork
got = OnnxNetwork({str(path)!r}).predict(read_ntu({str(file)!r}))
print(json.dumps([got["probabilities"].tolist(), got["order"].tolist(), got["focus"].shape]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    probabilities, order, shape = json.loads(done.stdout)
    with torch.no_grad():
        p = net(make_batch(read_ntu(file), stream="bone", length=32).x).softmax(1)[0]
    np.testing.assert_allclose(probabilities, p, atol=1e-4)
    assert order == np.argsort(-p.numpy()).tolist() and shape == [2, 8, 25]


def test_shipped_headers_tell_how_the_input_is_made():
    for file in sorted(WEIGHTS.glob("*/weights.safetensors")):
        header = load_checkpoint(file.parent)[1]
        assert {"stream", "preprocess", "length", "num_bodies", "classes"} <= set(header)
