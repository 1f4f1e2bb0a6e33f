"""What the first edition (commit 772dc6e) computed, kept in tests/fixtures: later editions compute the same.

`python tests/test_first_edition.py --write` wrote the fixtures, on that commit. A fixture changes only where a change is decided.
"""
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from stf.clips import Clip, open_clips
from stf.dataset import make_batch
from stf.experiments import CONTRASTS, gains, load_records, table5
from stf.focus import grad_cam, module_focus
from stf.losses import LossWeights, STFLoss
from stf.predict import predict_all
from stf.skeleton import SKELETONS
from stf.checkpoints import load_checkpoint
from stf.train import Config, presets

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
SHIPPED = {name: ROOT / "data" / "weights" / f"synthetic-{name}" for name in ("m1", "m4", "le")}
TERMS = {"M1": "", "STF-CE": "", "M4": "dcg", "Le": "e"}
COMMANDS = ("demo", "prepare", "train", "evaluate", "ablation", "scarce", "shift", "table2", "predict", "export", "import-msg3d", "info")


def stored_clips():
    "Forty synthetic recordings of people that the shipped networks haven't seen: all twenty actions, every second frame, to 4 mm."
    with np.load(FIXTURES / "clips.npz") as f:
        stored = {k: f[k] for k in f.files}
    clips, at = [], 0
    for name, label, M, T in zip(*(stored[k].tolist() for k in ("names", "labels", "bodies", "frames"))):
        size = M * T * 25
        steps = stored["steps"][3 * at : 3 * (at + size)].reshape(M, 25, 3, T)
        joints = (np.cumsum(steps, axis=3) * 0.004).transpose(0, 3, 1, 2)
        visible = stored["visible"][at : at + size].reshape(M, T, 25)
        clips.append(Clip(joints, visible, name, label, SKELETONS["ntu25"]))
        at += size
    return clips


def sample(x):
    "A tensor by its shape, sums, and about a hundred of its entries."
    x = np.asarray(x, dtype=np.float64)
    return np.concatenate([x.shape, [x.sum(), np.square(x).sum()], x.ravel()[:: x.size // 100 | 1]])


def save(path, arrays):
    np.savez_compressed(path, keys=list(arrays), sizes=[len(a) for a in arrays.values()], values=np.concatenate(list(arrays.values())))


def load(path):
    with np.load(path) as f:
        return dict(zip(f["keys"].tolist(), np.split(f["values"], np.cumsum(f["sizes"])[:-1])))


def batches():
    "Batches of each preset, stream and length: recordings of NTU, Kinetics and NW-UCLA as files, and stored clips of one and two bodies."
    clips, out = stored_clips(), {}
    with zipfile.ZipFile(FIXTURES / "formats.zip") as z, tempfile.TemporaryDirectory() as folder:
        z.extractall(folder)
        sets = {kind: list(open_clips(Path(folder) / kind)) for kind in ("ntu", "kinetics", "ucla")}
    sets["stored"] = [clips[i] for i in (0, 13, 15, 17)]
    for kind, some in sets.items():
        for preset in ("paper", "msg3d"):
            for stream in ("joint", "bone", "joint-motion", "bone-motion"):
                for length, bodies in ((24, 2), (75, 1), (300, 2)):
                    out[f"{kind}/{preset}/{stream}/{length}x{bodies}"] = sample(make_batch(some, stream=stream, preprocess=preset, length=length, num_bodies=bodies).x)
    return out


def networks():
    "The shipped networks in double precision, and a batch of eight stored clips."
    nets = {name: load_checkpoint(path)[0].double() for name, path in SHIPPED.items()}
    x, y = make_batch(stored_clips()[::5], length=32, dtype=torch.float64)
    return nets, x, y


def foci():
    "Both foci: Q of the top two classes at the last layer under both scores, and inside the network."
    nets, x, _ = networks()
    out = {}
    for name, net in nets.items():
        with torch.no_grad():
            f = net.features(x)
            logits = net.head(f.last)
        out[f"{name}/logits"] = logits
        first, second = logits.topk(2).indices.t()
        for score in ("probability", "logit"):
            out[f"{name}/first/{score}"] = grad_cam(f, net.head, first, score)
            out[f"{name}/second/{score}"] = grad_cam(f, net.head, second, score)
        for maps in (("sgcn3", "gcn3d3"), ("block2",)):
            out.update({f"{name}/{k}": q for k, q in module_focus(net, f, first, maps).items()})
        if name != "m1":
            out.update({f"{name}/beta{i}": b.detach() for i, b in enumerate(f.beta)}, **{f"{name}/G{i}": g.detach() for i, g in enumerate(f.dynamic)})
    return {k: sample(v.detach()) for k, v in out.items()}


OPTIONS = {"logit": dict(score="logit"), "rms": dict(norm="rms"), "blocks": dict(coherence="blocks"), "guide": dict(guide=True),
           "coordinates": dict(mask="coordinates"), "shuffled": dict(control="shuffled")}  # fmt: skip


def losses():
    "Every loss and the norm of its gradient, by network, in evaluation and in training mode; every option, with M4's weights."
    nets, x, y = networks()
    cases = [(name, training, "") for name in nets for training in (False, True)] + [("m4", False, option) for option in OPTIONS]
    out = {}
    for name, training, option in cases:
        net, _ = load_checkpoint(SHIPPED[name])
        weights = LossWeights(e=1, d=1, c=1, g=float(name != "m1"))
        terms = STFLoss(net.double().train(training), weights, **OPTIONS.get(option, {}))(x[::2], y[::2])
        for k in [k for k in ("ce", "e", "d", "c", "g") if k in terms]:
            grads = torch.autograd.grad(terms[k], list(net.parameters()), retain_graph=True, allow_unused=True)
            size = torch.stack([g.norm() for g in grads if g is not None]).norm()
            out[f"{name}/{'train' if training else 'eval'}/{option}/{k}"] = np.array([terms[k].item(), size.item()])
    return out


def traces():
    "The loss and its terms in ten steps of M1, STF-CE, M4 and Le, from stored weights."
    clips, out = stored_clips(), {}
    for row, terms in TERMS.items():
        net = load_checkpoint(SHIPPED[{"M1": "m1", "Le": "le"}.get(row, "m4")])[0].double().train()
        config = Config.preset("synthetic", model="msg3d" if row == "M1" else "stf", losses=terms)
        objective = STFLoss(net, config.loss_weights)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=config.momentum, nesterov=True, weight_decay=config.weight_decay)
        for step in range(10):
            x, y = make_batch(clips[step % 5 :: 5], length=32, dtype=torch.float64)
            optimizer.zero_grad()
            values = objective(x, y)
            values["loss"].backward()
            optimizer.step()
            out[f"{row}/{step}"] = np.array([values[k].item() for k in ("loss", "ce", *terms)])
    return out


def predictions():
    "What the shipped networks together say about the forty clips, and the focus behind it."
    answers = predict_all(stored_clips(), device="cpu", focus=True)
    return {a.name: np.concatenate([a.probabilities, sample(a.focus)]) for a in answers}


def tables():
    "Table 5 and the intervals, from the records."
    records = load_records(ROOT / "data" / "results" / "first", experiment="ablation", name="ucla-small")
    by_contrast = gains(records, CONTRASTS)
    numbers = by_contrast[["seeds", "gain", "std", "low", "high"]].astype(float)
    wide = table5(records).drop(columns=["L_c", "L_d", "L_Gk", "L_e"]).astype(float)
    return {**{f"table5/{row}": wide.loc[row].to_numpy() for row in wide.index}, **{f"gain/{q}": numbers.loc[q].to_numpy() for q in numbers.index}}


def options():
    "The options of every command."
    out = {}
    for command in COMMANDS:
        done = subprocess.run([sys.executable, "-c", "from stf.cli import main; main()", command, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        out[command] = sorted(set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout)) - {"--help"})
    return out


ARRAYS = {f.__name__: f for f in (batches, foci, losses, traces, predictions, tables)}


@pytest.fixture(scope="module", autouse=True)
def _quiet(one_thread):
    pass


def body_height(x, visible, chain):
    "A body's height as the first edition rounded it: torch sums in another order than numpy, which is a last bit of float32."
    seen, points = visible[:, chain] > 0, torch.from_numpy(x[:, chain])
    whole = (seen[:, 1:] & seen[:, :-1]).all(1)
    return float(np.median((points[:, 1:] - points[:, :-1]).norm(dim=2)[whole].sum(1).numpy()))


@pytest.mark.parametrize("name", ARRAYS)
def test_numbers(name, monkeypatch):
    "Doubles to 1e-8, batches and predictions (which are float32) to 1e-5, of the largest value of each array."
    stored = load(FIXTURES / f"{name}.npz")
    if name in ("foci", "losses", "traces"):
        monkeypatch.setattr("stf.preparation.body_height", body_height)
    computed, tolerance = ARRAYS[name](), 1e-5 if name in ("batches", "predictions") else 1e-8
    assert computed.keys() == stored.keys()
    for key, wanted in stored.items():
        np.testing.assert_allclose(computed[key], wanted, rtol=tolerance, atol=tolerance * max(1e-3, np.abs(wanted).max()), err_msg=f"{name}: {key}")


def test_presets_are_the_first_editions():
    "Read as an old configuration: what was dropped since is ignored at its default, and an aug_… value is one of augment."
    stored = json.loads((FIXTURES / "configs.json").read_text())
    default = stored.pop("")
    assert Config.from_json(json.dumps(default)) == Config() and list(stored) == presets()
    for name, values in stored.items():
        assert Config.from_json(json.dumps({**default, **values})) == Config.preset(name)


DROPPED = ("ema", "sync-bn", "nesterov", "decay", "evaluate-every", "aug-")  # by decision; aug-… are --augment now


def test_options_are_the_first_editions():
    "A command may have got something new."
    computed = options()
    for command, wanted in json.loads((FIXTURES / "options.json").read_text()).items():
        kept = {o for o in wanted if not o.removeprefix("--").removeprefix("no-").startswith(DROPPED)}
        assert kept <= set(computed[command]), command


def write_inputs():
    "The stored clips, and a few recordings in the files of each format."
    from stf.synthetic import SyntheticConfig, write_synthetic

    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        write_synthetic(folder, SyntheticConfig(subjects=(27, 28), cameras=(1,)), progress=False)
        clips = list(open_clips(folder))
        ntu = {p.name: p.read_text() for name in ("S033C001P027R001A024", "S033C001P027R001A058") for p in [Path(folder) / f"{name}.skeleton"]}
    steps = [np.diff(np.round(c.joints[:, ::2] / 0.004).astype(np.int16), axis=1, prepend=0).transpose(0, 2, 3, 1).ravel() for c in clips]
    np.savez_compressed(FIXTURES / "clips.npz", names=[c.name for c in clips], labels=np.unique([c.label for c in clips], return_inverse=True)[1].astype(np.int16),
                        bodies=np.int16([len(c.joints) for c in clips]), frames=np.int16([c.joints[:, ::2].shape[1] for c in clips]),
                        steps=np.concatenate(steps), visible=np.concatenate([c.visible[:, ::2].astype(np.float16).ravel() for c in clips]))  # fmt: skip
    paths = lambda T, V, C: np.cumsum(rng.normal(0, 0.01, (T, V, C)), axis=0) + rng.normal(0, 0.3, (V, C))
    with zipfile.ZipFile(FIXTURES / "formats.zip", "w", zipfile.ZIP_DEFLATED) as z:
        for name, text in ntu.items():
            lines = text.split("\n")  # the first twelve frames
            ends, at = [], 1
            for _ in range(int(lines[0])):
                bodies, at = int(lines[at]), at + 1
                for _ in range(bodies):
                    at += 2 + int(lines[at + 1])
                ends.append(at)
            z.writestr(f"ntu/{name}.skeleton", "\n".join(["12", *lines[1 : ends[11]], ""]))
        for n, people in (("film1", 1), ("film2", 3)):
            xy, score = paths(30, 18 * people, 2) / 3 + 0.4, rng.random((30, 18 * people)).round(3)
            person = lambda t, m: {"pose": xy[t, 18 * m : 18 * m + 18].clip(0.001, 0.999).round(3).ravel().tolist(), "score": score[t, 18 * m : 18 * m + 18].tolist()}
            data = [{"frame_index": t + 1, "skeleton": [person(t, m) for m in range(people)] if t % 7 != 3 else []} for t in range(30)]
            z.writestr(f"kinetics/{n}.json", json.dumps({"data": data, "label": "yoga", "label_index": 399}))
        for n, label in (("a05_s03_e00_v02", 5), ("a02_s01_e01_v03", 2)):
            content = {"file_name": n, "skeletons": (paths(21, 20, 3) + [0, 0, 3]).round(4).tolist(), "label": label}
            z.writestr(f"ucla/{n}.json", json.dumps(content))


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    torch.set_num_threads(1)
    write_inputs()
    for name, compute in ARRAYS.items():
        save(FIXTURES / f"{name}.npz", compute())
    configs = {"": asdict(Config()), **{name: asdict(Config.preset(name)) for name in presets()}}
    for name, texts in (("configs", configs), ("options", options())):
        (FIXTURES / f"{name}.json").write_text(json.dumps(texts, indent=0) + "\n")
