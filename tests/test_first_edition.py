"""What the first edition (commit 772dc6e) computed, kept in tests/fixtures: it is computed still.

A fixture changes only where a change is decided; `python tests/test_first_edition.py NAME` writes
one anew. (clips.npz and formats.zip are inputs, which that commit's version of this file made.)
"""
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from stf.checkpoints import load_checkpoint
from stf.clips import Clip, open_clips
from stf.dataset import make_batch
from stf.experiments import CONTRASTS, gains, load_records, table5
from stf.focus import grad_cam, module_focus
from stf.losses import LossWeights, STFLoss
from stf.predict import predict_all
from stf.skeleton import SKELETONS
from stf.train import Config, presets

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = Path(__file__).resolve().parent / "fixtures"
SHIPPED = {name: FIXTURES / "weights" / f"synthetic-{name}" for name in ("m1", "m4", "le")}
DROPPED = ("ema", "sync-bn", "nesterov", "decay", "evaluate-every", "aug-")  # now --augment


def stored_clips():
    "Forty synthetic recordings of new people: all actions, every second frame, to 4 mm."
    with np.load(FIXTURES / "clips.npz") as f:
        stored = {k: f[k] for k in f.files}
    clips, at = [], 0
    facts = (stored[k].tolist() for k in ("names", "labels", "bodies", "frames"))
    for name, label, M, T in zip(*facts):
        size = M * T * 25
        steps = stored["steps"][3 * at : 3 * (at + size)].reshape(M, 25, 3, T)
        joints = (np.cumsum(steps, axis=3) * 0.004).transpose(0, 3, 1, 2)
        visible = stored["visible"][at : at + size].reshape(M, T, 25)
        clips.append(Clip(joints, visible, name, label, SKELETONS["ntu25"]))
        at += size
    return clips


def sample(x):
    "A tensor by its shape, sums, and about a hundred of its entries."
    x = np.asarray(x.detach() if torch.is_tensor(x) else x, dtype=np.float64)
    return np.concatenate([x.shape, [x.sum(), np.square(x).sum()], x.ravel()[:: x.size // 100 | 1]])


def batches():
    "Each preset, stream and length: NTU, Kinetics, NW-UCLA files; clips of one and two bodies."
    clips, out = stored_clips(), {}
    with zipfile.ZipFile(FIXTURES / "formats.zip") as z, tempfile.TemporaryDirectory() as folder:
        z.extractall(folder)
        sets = {k: list(open_clips(Path(folder) / k)) for k in ("ntu", "kinetics", "ucla")}
    sets["stored"] = [clips[i] for i in (0, 13, 15, 17)]
    for kind, some in sets.items():
        for preset in ("paper", "msg3d"):
            for stream in ("joint", "bone", "joint-motion", "bone-motion"):
                for T, M in ((24, 2), (75, 1), (300, 2)):
                    options = dict(stream=stream, preprocess=preset, length=T, num_bodies=M)
                    out[f"{kind}/{preset}/{stream}/{T}x{M}"] = sample(make_batch(some, **options).x)
    return out


def shipped(name):
    "A shipped network in double precision."
    return load_checkpoint(SHIPPED[name])[0].double()


def eight():
    "A batch of eight stored clips."
    return make_batch(stored_clips()[::5], length=32, dtype=torch.float64)


def foci():
    "Q of the top two classes at the last layer under both scores, and inside the network."
    (x, _), out = eight(), {}
    for name in SHIPPED:
        net = shipped(name)
        with torch.no_grad():
            f = net.features(x)
            logits = net.head(f.last)
        out[f"{name}/logits"] = logits
        for rank, classes in zip(("first", "second"), logits.topk(2).indices.t()):
            for score in ("probability", "logit"):
                out[f"{name}/{rank}/{score}"] = grad_cam(f, net.head, classes, score)
        for maps in (("sgcn3", "gcn3d3"), ("block2",)):
            focus = module_focus(net, f, logits.argmax(1), maps)
            out.update({f"{name}/{k}": q for k, q in focus.items()})
        if name != "m1":
            for what, values in (("beta", f.beta), ("G", f.dynamic)):
                out.update({f"{name}/{what}{i}": v for i, v in enumerate(values)})
    return {k: sample(v) for k, v in out.items()}


FIRST = dict(norm="frobenius", norm_g="frobenius", modules_g="mean")  # the first edition's readings
OPTIONS = {"logit": dict(score="logit"), "rms": dict(norm="rms", norm_g="rms"),
           "guide": dict(guide=True), "blocks": dict(coherence="blocks"),
           "coordinates": dict(mask="coordinates"), "shuffled": dict(control="shuffled")}


def losses():
    "Losses and norms of their gradients: each network in both modes; M4 under every option."
    (x, y), out = eight(), {}
    cases = [(name, training, "") for name in SHIPPED for training in (False, True)]
    for name, training, option in cases + [("m4", False, option) for option in OPTIONS]:
        net = shipped(name).train(training)
        weights = LossWeights(e=1, d=1, c=1, g=float(name != "m1"))
        terms = STFLoss(net, weights, **FIRST | OPTIONS.get(option, {}))(x[::2], y[::2])
        for k in [k for k in ("ce", "e", "d", "c", "g") if k in terms]:
            grads = torch.autograd.grad(terms[k], list(net.parameters()), retain_graph=True,
                                        allow_unused=True)
            size = torch.stack([g.norm() for g in grads if g is not None]).norm()
            key = f"{name}/{'train' if training else 'eval'}/{option}/{k}"
            out[key] = np.array([terms[k].item(), size.item()])
    return out


def traces():
    "The loss and its terms in ten steps of M1, STF-CE, M4 and Le, from stored weights."
    clips, out = stored_clips(), {}
    for row, start, terms in (("M1", "m1", ""), ("STF-CE", "m4", ""), ("M4", "m4", "dcg"),
                              ("Le", "le", "e")):
        net = shipped(start).train()
        model = "msg3d" if row == "M1" else "stf"
        config = Config.preset("synthetic", model=model, losses=terms)
        objective = STFLoss(net, config.loss_weights, **FIRST)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=config.momentum,
                                    nesterov=True, weight_decay=config.weight_decay)
        for step in range(10):
            x, y = make_batch(clips[step % 5 :: 5], length=32, dtype=torch.float64)
            optimizer.zero_grad()
            values = objective(x, y)
            values["loss"].backward()
            optimizer.step()
            out[f"{row}/{step}"] = np.array([values[k].item() for k in ("loss", "ce", *terms)])
    return out


def predictions():
    "Probabilities of M4 and Le together for the forty clips, and the focus."
    answers = predict_all(stored_clips(), [SHIPPED["m4"], SHIPPED["le"]], device="cpu", focus=True)
    return {a.name: np.concatenate([a.probabilities, sample(a.focus)]) for a in answers}


def tables():
    "Table 5 and the gains, from the records."
    folder = ROOT / "data" / "results" / "first"
    records = load_records(folder, experiment="ablation", name="ucla-small")
    new = {"M1+M1", "M4-frobenius", "M4-3x1", "M2-guide", "Ld-logit", "Ld-overlap",
           "Ld-overlap-logit", "Le-1", "Le-1-random", "Le-1-running", "Le-score", "Le-detached"}
    known = {q: pair for q, pair in CONTRASTS.items() if not new & {*pair}}
    known["reading: rms, not Frobenius?"] = "M4-rms", "M4"
    numbers = gains(records, known)[["seeds", "gain", "std"]].astype(float)
    marks = ["L_c", "L_d", "L_Gk", "L_e", "ucla-small dose"]
    wide = table5(records).drop(columns=marks).astype(float)
    named = (("table5", wide), ("gain", numbers))
    return {f"{k}/{row}": t.loc[row].to_numpy() for k, t in named for row in t.index}


ARRAYS = {f.__name__: f for f in (batches, foci, losses, traces, predictions, tables)}


@pytest.fixture(scope="module", autouse=True)
def _quiet(one_thread):
    pass


def body_height(x, visible, chain):
    "A body's height in the first edition's rounding: torch sums in another order than numpy."
    seen, points = visible[:, chain] > 0, torch.from_numpy(x[:, chain])
    whole = (seen[:, 1:] & seen[:, :-1]).all(1)
    return float(np.median((points[:, 1:] - points[:, :-1]).norm(dim=2)[whole].sum(1).numpy()))


@pytest.mark.parametrize("name", ARRAYS)
def test_numbers(name, monkeypatch):
    "Doubles to 1e-8, float32 (batches, predictions) to 1e-5, of the largest of each array."
    with np.load(FIXTURES / f"{name}.npz") as f:
        parts = np.split(f["values"], np.cumsum(f["sizes"])[:-1])
        stored = dict(zip(f["keys"].tolist(), parts))
    if name in ("foci", "losses", "traces"):
        monkeypatch.setattr("stf.preparation._body_height", body_height)
    if name == "batches":  # which left frames without anybody in
        all_frames = lambda clip: (clip, np.arange(clip.joints.shape[1]))
        monkeypatch.setattr("stf.preparation._without_gaps", all_frames)
    computed, tolerance = ARRAYS[name](), 1e-5 if name in ("batches", "predictions") else 1e-8
    assert computed.keys() == stored.keys()
    for key, wanted in stored.items():
        near = tolerance * max(1e-3, np.abs(wanted).max())
        np.testing.assert_allclose(computed[key], wanted, tolerance, near, err_msg=key)


def test_presets_are_the_first_editions():
    """Read as old configurations: what was dropped since is ignored at its default, and what is new
    means what it was; only the readings, the small sets' second stages and the recipe of
    Northwestern-UCLA have changed."""
    stored = json.loads((FIXTURES / "configs.json").read_text())
    default, read = stored.pop(""), dict(**FIRST, beta_kernel="3x1")
    assert Config.from_json(json.dumps(default)) == Config(**read)
    assert list(stored) == [name for name in presets() if not name.startswith("ucla-half")]
    for name, values in stored.items():
        now, second = Config.preset(name, **read), ("stf_lr", "stf_epochs", "stf_milestones")
        recipe = name.startswith("ucla") and "augmented" not in name
        new = second if recipe or name.startswith("synthetic") else ()
        new += ("lr", "epochs", "milestones") if new and "-stf-" in name else ()
        new += ("epochs", "milestones", "preprocess", "time", "augment") if recipe else ()
        decided = {k: getattr(now, k) for k in new}
        assert Config.from_json(json.dumps({**default, **values})).replace(**decided) == now


def test_options_are_the_first_editions():
    "Each command has its options still; it may have new ones."
    for command, wanted in json.loads((FIXTURES / "options.json").read_text()).items():
        done = subprocess.run([sys.executable, "-m", "stf.cli", command, "--help"], cwd=ROOT,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        kept = {o for o in wanted if not re.sub("^--(no-)?", "", o).startswith(DROPPED)}
        assert kept <= set(re.findall(r"--[a-z][a-z0-9-]*", done.stdout)), command


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        arrays = ARRAYS[name]()
        np.savez_compressed(FIXTURES / f"{name}.npz", keys=list(arrays),
                            sizes=[len(a) for a in arrays.values()],
                            values=np.concatenate(list(arrays.values())))
