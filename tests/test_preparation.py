"Preparation: real files, random clips against a slow reading of the same words, random variants."

import itertools
import os
import pickle
from pathlib import Path

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.clips import Clip, open_clips, read_kinetics, read_ntu
from stf.dataset import ClipStore, StoreError, make_batch
from stf.preparation import PRESETS, STREAMS, Augment, prepare
from stf.skeleton import SKELETONS, Skeleton

REAL = Path(__file__).resolve().parents[2] / "shared" / "real-data"
REAL = Path(os.environ.get("STF_REAL_DATA", REAL))
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"real recordings are not at {REAL}")
NTU, POSE = SKELETONS["ntu25"], SKELETONS["openpose18"]
ALL = Augment(rotate=30, scale=0.2, flip=0.5, crop=0.5, drop_joints=0.2, drop_bodies=0.3)
UNIFORM = Augment(rotate=30, flip=0.5, uniform=True, crop=0.7)
PARTS = ("hip", "chest", "head", "left hand", "right hand"), ((1, 0), (2, 1), (3, 1), (4, 1))
BODY = Skeleton("body", *PARTS, 0, (2, 1, 0), (0, 1), (4, 3))
FLAT = Skeleton("flat", *PARTS, 0, (2, 1, 0))
MIRROR = np.arange(25)
MIRROR[[*NTU.left, *NTU.right]] = [*NTU.right, *NTU.left]
close = lambda a, b, atol=1e-5: np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def clip(name="a", label=0, M=1, T=5, seed=0, skeleton=BODY, C=3, **more):
    joints = np.random.default_rng(seed).normal(size=(M, T, skeleton.num_joints, C))
    return Clip(joints, name=name, label=label, skeleton=skeleton, **more)


def some(n, **more):
    return [clip(f"clip {i}", i % 3, 1 + i % 2, 1 + i % 7, i, **more) for i in range(n)]


def noisy(seed=0, M=2, T=20, skeleton=NTU, gaps=True):
    "Bodies of noise; with gaps, missing joints, one that comes late, and in any order of the file."
    rng, flat = np.random.default_rng(seed), skeleton in (POSE, FLAT)
    joints = rng.normal(size=(M, T, skeleton.num_joints, 3 - flat)).astype(np.float32) + 3
    joints /= 8 if flat else 1  # parts of the image
    visible = np.ones(joints.shape[:3], np.float32)
    if gaps:
        visible[rng.random(visible.shape) < rng.choice([0, 0.1, 0.9])] = 0
        visible[rng.random((M, T)) < rng.choice([0, 0.3, 0.8])] = 0
        visible[-1, : T // 4] = 0
        visible[0, rng.integers(T)] = 1
    if flat:
        visible *= rng.integers(1, 1000, visible.shape) / np.float32(1000)
    joints[visible == 0] = 0
    tags = {"listed": rng.permutation(M).tolist()}
    return Clip(joints, visible, f"clip {seed}", seed % 3, skeleton=skeleton, tags=tags)


def noises(*skeletons, T=12):
    "Any clip of noise with one of these skeletons."
    sizes = st.integers(0, 10**6), st.integers(1, 4), st.integers(1, T)
    return st.builds(noisy, *sizes, st.sampled_from(skeletons))


def many(skeleton=NTU):
    return [noisy(i, 1 + i % 3, 3 + 11 * i, skeleton) for i in range(6)]


# ---- against a slow, separate reading of the same words


def naive_bodies(c, num_bodies):
    X, W = c.joints.astype(np.float64), c.visible.astype(np.float64)
    M, T = W.shape[:2]
    out = [np.zeros((num_bodies, T) + X.shape[2:]), np.zeros((num_bodies, T) + W.shape[2:])]
    if X.shape[-1] == 2:
        for t in range(T):
            rank = lambda m: (-sum(c.visible[m, t].tolist()), c.tags["listed"][m])
            for to, m in enumerate(sorted(range(M), key=rank)[:num_bodies]):
                out[0][to, t], out[1][to, t] = X[m, t], W[m, t]
        return out
    places = []  # of each place: {frame: body}
    for m in range(M):
        frames = [t for t in range(T) if X[m, t].any() or W[m, t].any()]
        if frames:
            free = [place for place in places if max(place) < frames[0]]
            places += [] if free else [{}]
            (free or places[-1:])[0].update(dict.fromkeys(frames, m))
    spread = lambda place: np.stack([X[m, t] for t, m in place.items()]).std((0, 1)).sum()
    for to, place in enumerate(sorted(places, key=spread, reverse=True)[:num_bodies]):
        for t, m in place.items():
            out[0][to, t], out[1][to, t] = X[m, t], W[m, t]
    return out


def naive_gaps(c):
    "The clip without empty ends; an empty frame within is the nearest one with somebody."
    seen = [t for t in range(c.joints.shape[1]) if (c.visible[:, t] > 0).any()]
    near = [min(seen, key=lambda u: (abs(u - t), u)) for t in range(seen[0], seen[-1] + 1)]
    own = dict(joints=c.joints[:, near], visible=c.visible[:, near])
    return SimpleNamespace(skeleton=c.skeleton, tags=c.tags, **own)


def naive_paper(c, stream, length, num_bodies):
    c = naive_gaps(c)
    X, W = naive_bodies(c, num_bodies)
    if X.shape[-1] == 2:
        X[..., 1] = -X[..., 1]
    T, s = X.shape[1], c.skeleton
    seen = [t for t in range(T) if W[0, t, s.centre] > 0]
    if seen:
        nearest = [min(seen, key=lambda u: (abs(u - t), u)) for t in range(T)]
        centre = X[0, nearest, s.centre]
    else:
        points = X[0][W[0] > 0]
        centre = np.tile(points.mean(0) if len(points) else np.zeros(X.shape[-1]), (T, 1))
    a, b = s.height[:-1], s.height[1:]
    both = (W[0][:, a] > 0) & (W[0][:, b] > 0)
    length_of = np.linalg.norm(X[0][:, a] - X[0][:, b], axis=2)
    each = [np.median(length_of[both[:, i], i]) for i in range(len(a)) if both[:, i].any()]
    whole = both.all(1)
    height = np.median(length_of[whole].sum(1)) if whole.any() else sum(each)
    X = (X - centre[None, :, None]) / (height if height > 1e-6 else 1) * (W > 0)[..., None]
    at = [t % T if T <= length else int((2 * t + 1) * T / (2 * length)) for t in range(length)]
    x, w = X[:, at], W[:, at]
    if stream.startswith("bone"):
        p = s.parents
        x, w = x - x[:, :, p], np.minimum(w, w[:, :, p])
        x = x * (w > 0)[..., None]
    if stream.endswith("motion"):
        y, v = np.zeros_like(x), w.copy()
        y[:, :-1], v[:, :-1] = x[:, 1:] - x[:, :-1], np.minimum(w[:, :-1], w[:, 1:])
        x, w = y * (v > 0)[..., None], v
    return np.concatenate([x, w[..., None]], -1).transpose(3, 1, 2, 0)


@settings(max_examples=200, deadline=None)
@given(noises(BODY, BODY, FLAT), st.sampled_from(STREAMS), st.integers(1, 20), st.integers(1, 3))
def test_paper_batches_equal_the_naive_reading(c, stream, length, M):
    got = make_batch(c, stream=stream, length=length, num_bodies=M).x[0].numpy()
    want = naive_paper(c, stream, length, M)
    scale = max(1, np.abs(want[:-1]).max())  # a random height can be tiny
    close(got / scale, want / scale, 2e-6)


def public_steps(frames, length=300, num_bodies=2, centre=0, spine=(0, 1), shoulders=(4, 3)):
    "The public preparation from lists of bodies as a file gives them: frames[t] = [(V,3), …]."
    V = next(body for f in frames for body in f).shape[0]
    D = np.zeros((4, len(frames), V, 3))
    for t, f in enumerate(frames):
        for m, body in enumerate(f[:4]):
            D[m, t] = body
    there = [body[body.any((1, 2))] for body in D]
    energy = [x.std((0, 1)).sum() if len(x) else -1 for x in there]
    D = D[np.argsort(energy, kind="stable")[::-1][:num_bodies]]
    s = np.zeros((num_bodies, length, V, 3), np.float32)
    for to, body in enumerate(D):
        there = body.any((1, 2))
        if there.any():
            body = body[there] if not there[0] else body[: np.flatnonzero(there)[-1] + 1]
            s[to] = body[np.arange(length) % len(body)]
    s = (s - s[:1, :, centre, None].copy()) * (s.sum(-1) != 0)[..., None]
    for (a, b), axis in ((spine, 2), (shoulders[::-1], 0)):
        v, e = (s[0, 0, b] - s[0, 0, a]).astype(np.float64), np.eye(3)[axis]
        turn = np.cross(v, e)
        if np.abs(turn).sum() > 1e-6:
            angle = np.arccos(np.clip(v @ e / np.linalg.norm(v), -1, 1))
            K = np.cross(np.eye(3), turn / np.linalg.norm(turn))
            R = np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K
            s = (s @ R.T).astype(np.float32)
    return s.transpose(3, 1, 2, 0)


@settings(max_examples=100, deadline=None)
@given(noises(BODY), st.integers(12, 30), st.integers(1, 2))
def test_msg3d_batches_equal_the_public_steps(c, length, M):
    bodies = c.joints[np.argsort(c.tags["listed"])].swapaxes(0, 1)
    want = public_steps([[body for body in frame if body.any()] for frame in bodies], length, M)
    got = make_batch(c, preprocess="msg3d", length=length, num_bodies=M).x[0].numpy()
    close(got, want, 2e-4 if np.abs(want).max() > 20 else 2e-5)


def read_lines(path):
    "Bodies of each frame of a .skeleton file, in the file's order."
    lines = iter(Path(path).read_text().splitlines())
    row = lambda: next(lines).split()[:3]
    body = lambda: (next(lines), np.array([row() for _ in range(int(next(lines)))], float))[1]
    return [[body() for _ in range(int(next(lines)))] for _ in range(int(next(lines)))]


@needs_real
def test_msg3d_is_the_public_preprocessing():
    "The steps on all raw files (one lists a late body first), and what the public code wrote."
    files = {path.stem: path for path in sorted((REAL / "ntu-raw/skeletons").glob("*.skeleton"))}
    for path in files.values():
        want = public_steps(read_lines(path), centre=1, spine=(0, 1), shoulders=(8, 4))
        close(prepare(read_ntu(path), preprocess="msg3d").x, want)
    golden = np.load(REAL / "ntu-msg3d-npy/golden_pairs.npz")
    for stream in ("joint", "bone"):
        clips = [read_ntu(files[str(name)[:20]]) for name in golden[stream + "_names"]]
        close(make_batch(clips, stream=stream, preprocess="msg3d").x, golden[stream])
    pair = REAL / "kinetics-skeleton/pairs/bqfirst"
    x = prepare(read_kinetics(pair / "open_pose_skeleton.json"), preprocess="msg3d").x
    close(x[None], np.load(pair / "test_data_joint.npy"))


# ---- the options


def test_absent_bodies_and_single_frames():
    x, y = make_batch([clip(M=1), clip(M=2)], length=7, dtype=torch.float64)
    assert (x == 0).flatten(1, 3).all(1).tolist() == [[False, True], [False, False]]
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    assert not prepare(clip(M=1), preprocess="msg3d", num_bodies=3, length=7).x[..., 1:].any()
    x = prepare(clip(T=1), stream="joint-motion", length=6).x
    assert not x[:3].any() and (x[3, ..., 0] == 1).all()
    assert prepare(clip(T=9), stream="bone-motion", length=1).x.shape == (4, 1, 5, 2)
    long = noisy(T=60_000, M=1, skeleton=BODY)  # missing centres need no frames × frames numbers
    assert prepare(long, length=9).x.any()


PLAIN = Skeleton("plain", ("a", "b"), ((1, 0),), 0, (1, 0))
WRONG = [
    (dict(stream="bones"), "choose one of"), (dict(preprocess="ntu"), "choose one of"),
    (dict(length=0), "length must be"), (dict(num_bodies=1.5), "num_bodies must be"),
    (dict(time="stretch"), "time 'stretch'"), (dict(bodies="tallest"), "choose one of"),
    (dict(bodies=["spread"]), "choose one of"), (dict(augment=True), "must be an Augment"),
    (dict(augment={"flip": 1}), "must be an Augment"), (dict(augment=ALL), "seed"),
    (dict(preprocess="msg3d", bodies="motion"), "is for preset 'paper'"),
    (dict(time="resize", augment=Augment(uniform=True), seed=0), "uniform"),
    (dict(clip=clip(skeleton=FLAT, C=2), preprocess="msg3d"), "openpose18"),
    (dict(clip=clip(skeleton=FLAT), preprocess="msg3d"), "doesn't name"),
    (dict(clip=clip(skeleton=FLAT, C=2), preprocess="first-frame"), "bodies in 3D"),
    (dict(clip=clip(skeleton=PLAIN), augment=Augment(flip=0.5), seed=0), "'plain' has none"),
    (dict(clip=Clip(np.ones((1, 3, 7, 3)))), "needs a skeleton"),
    (dict(clip=Clip(np.ones((1, 3, 25, 4)))), "2 or 3 coordinates"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_wrong_options_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        prepare(**{"clip": clip(), **wrong})


def test_wrong_augmentations_are_named():
    for wrong in (
        dict(rotate=-1), dict(scale=1), dict(flip=2), dict(crop=0), dict(crop_least=0),
        dict(uniform="no"), dict(drop_joints=1), dict(rotate="17"), dict(flip=True),
        dict(rotate=float("nan")), dict(rotate_about="xx"), dict(rotate_about=""),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{[*wrong][0]} must be"):
            Augment(**wrong)
    assert Augment(rotate=np.float64(10)) == Augment(rotate=10)


def test_rules_for_choosing_bodies():
    T, rng = 30, np.random.default_rng(0)
    body = np.array([[0, 0, 0], [0, 1, 0], [0, 1.6, 0], [0.5, 1, 0], [-0.5, 1, 0]], float)
    furniture = body * (4, 0.2, 1) + rng.normal(0, 0.3, (T, 5, 3))  # wide, and it jitters
    person = body + 0.1 * np.sin(np.arange(T) / 3)[:, None, None]
    late = np.zeros((T, 5, 3))
    late[10:16] = body * 3 + np.arange(6)[:, None, None]  # large, fast, and gone soon
    c = Clip(np.stack([furniture, person, late]), name="three", label=0, skeleton=BODY)
    for rule, there in (("spread", [6, 30, 30]), ("presence", [30, 30, 6]), ("motion", [6, 30, 30]),
                        ("denoise", [30, 0, 0])):  # fmt: skip
        x = prepare(c, length=T, bodies=rule, num_bodies=3).x[3].max(1)  # (T,M)
        assert x.sum(0).tolist() == there, rule
    alone = Clip(furniture[None], name="alone", skeleton=BODY)
    assert prepare(alone, bodies="denoise", length=5).x.any()  # one body always stays


@settings(max_examples=60, deadline=None)
@given(noises(BODY, T=30), st.integers(1, 40), st.integers(1, 3),
       st.sampled_from(PRESETS), st.sampled_from(["repeat", "resize"]))  # fmt: skip
def test_the_input_shows_the_body_and_frame_that_it_names(c, length, M, preprocess, time):
    p = prepare(c, preprocess=preprocess, length=length, num_bodies=M, time=time)
    assert p.body.shape == p.frame.shape == (M, length) and p.body.max() < len(c.joints)
    assert 0 <= p.frame.min() and p.frame.max() < c.joints.shape[1]
    there = p.body >= 0
    assert c.present[p.body[there], p.frame[there]].all()
    if preprocess == "paper" and time == "repeat":
        seen = c.visible[p.body, p.frame] * there[..., None]
        assert np.array_equal(p.x[3].transpose(2, 0, 1), seen)


# ---- random variants


@pytest.mark.parametrize("skeleton, preprocess", [
    *itertools.product((NTU, POSE), ("paper", "msg3d")), (NTU, "first-frame"),
    (SKELETONS["blazepose33"], "first-frame")])  # which names no spine, and nothing is turned
def test_a_clip_is_the_same_in_any_batch_and_off_means_untouched(preprocess, skeleton):
    clips = many(skeleton)
    common = dict(stream="bone", preprocess=preprocess, length=25)
    for time, augment in (("resize", ALL), ("repeat", ALL), ("repeat", UNIFORM), ("resize", None)):
        options = dict(common, time=time, augment=augment, seed=(1, 2))
        whole = make_batch(clips, **options).x
        assert torch.isfinite(whole).all()
        for cut in ([0, 1, 2], [5], [4, 3]):
            part = make_batch([clips[i] for i in cut], numbers=cut, **options).x
            assert torch.equal(part, whole[cut])
        if augment:
            assert not torch.equal(make_batch(clips, **{**options, "seed": (1, 3)}).x, whole)
    for off in (Augment(), Augment(crop_least=9)):
        x = make_batch(clips, augment=off, **common).x
        assert not off and torch.equal(x, make_batch(clips, **common).x)


def test_a_variant_stays_what_it_was():
    "A resumed training draws what the first half would have drawn, under any version of numpy."
    augment = Augment(rotate=30, crop=0.5, scale=0.1)
    x = prepare(noisy(1, gaps=False), length=4, num_bodies=1, augment=augment, seed=(0, 1, 7)).x
    assert np.round(x[:3, 2, 6, 0] * 1e4).astype(int).tolist() == [81, 171, 867]


def test_variants_have_the_given_probabilities_and_sizes():
    names = ("hip", "left hand", "right hand", "left foot", "right foot")
    body = Skeleton("b", names, ((1, 0), (2, 0), (3, 0), (4, 0)), 0, (1, 0))
    c, plain = (clip(M=2, T=1, skeleton=body), prepare(clip(M=2, T=1, skeleton=body), length=1).x)
    variant = lambda augment, i: prepare(c, length=1, augment=augment, seed=(0, 1, i)).x[:, 0]
    draw = lambda **options: np.stack([variant(Augment(**options), i) for i in range(3000)])
    assert abs((draw(flip=0.3)[:, 0, 2, 0] != plain[0, 0, 2, 0]).mean() - 0.3) < 0.03
    assert abs(draw(drop_joints=0.25)[:, 3].mean() - 0.75) < 0.02
    kept = draw(drop_bodies=0.4)[:, 3, 0].sum(1)
    assert kept.min() == 1 and abs((kept == 2).mean() - 0.36) < 0.03
    factors = draw(scale=0.2)[:, :3, 2, 0] / plain[:3, 0, 2, 0]
    assert abs(factors.mean() - 1) < 0.01 and factors.min() > 0.8 and factors.max() < 1.2
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.06


def test_turning_mirroring_bones_and_motion():
    "Lengths stay, a mirror image is one, and bones and motion are made of the varied joints."
    clips, (child, parent) = many(), np.array(NTU.bones).T
    plain = make_batch(clips, length=20).x
    turned = make_batch(clips, length=20, augment=Augment(rotate=90), seed=1).x
    length = lambda x: (x[:, :3, :, child] - x[:, :3, :, parent]).norm(dim=1)
    close(length(turned), length(plain), 1e-4)
    assert torch.equal(turned[:, 3], plain[:, 3]) and not torch.equal(turned, plain)
    mirror = plain[:, :, :, MIRROR] * torch.tensor([-1.0, 1, 1, 1]).view(4, 1, 1, 1)
    flipped = make_batch(clips, length=20, augment=Augment(flip=1), seed=1).x
    assert torch.equal(flipped, mirror)
    augment = Augment(rotate=40, scale=0.2, flip=0.5, crop=0.5)
    options = dict(length=20, augment=augment, seed=(0, 1), time="resize")
    clips = [noisy(i, gaps=False) for i in range(4)]
    x = {s: make_batch(clips, stream=s, **options).x[:, :3] for s in STREAMS}
    close(x["bone"], x["joint"] - x["joint"][:, :, :, NTU.parents])
    for s in ("joint", "bone"):
        close(x[s + "-motion"], torch.cat([x[s][:, :, 1:], x[s][:, :, -1:]], 2) - x[s])


# ---- time


def frames_of(n, T, seed=0, time="repeat", **options):
    "(T,) frames of a clip of n that a variant shows."
    c = Clip(np.ones((1, n, 25, 3)), name="c")
    return prepare(c, length=T, time=time, augment=Augment(**options), seed=seed).frame[0]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 100), st.floats(0.05, 1), st.booleans(),
       st.integers(0, 99))  # fmt: skip
def test_frames_are_in_order_and_in_the_clip(n, T, crop, uniform, seed):
    f = frames_of(n, T, seed, crop=crop, uniform=uniform)
    assert f.shape == (T,) and 0 <= f.min() and f.max() < n
    step = np.diff(f)
    assert (step != 0).all() or len(set(f)) == 1  # never a frame twice in a row, but the only one
    assert (step < 0).sum() <= T // max(1, int(crop * n)) + 1  # back only where it begins again
    f = frames_of(n, T, seed, "resize", crop=crop)
    assert (np.diff(f) >= 0).all() and f.max() < n


def test_crops_have_the_given_lengths():
    cropped = lambda n, **more: np.stack(
        [frames_of(n, 64, i, "resize", crop=0.5, **more) for i in range(600)])
    f = cropped(100)
    lengths = f[:, -1] - f[:, 0]
    assert 45 <= lengths.min() < 55 and lengths.max() > 94 and abs(lengths.mean() - 74) < 3
    assert f[:, 0].max() > 38 and (f[:, -1] > 94).mean() > 0.1
    f = cropped(50, crop_least=64)
    assert (f[:, 0] == 0).all() and (f[:, -1] == 49).all()


@pytest.mark.parametrize("time", ["repeat", "resize"])
@pytest.mark.parametrize("preprocess", PRESETS)
def test_a_crop_without_a_body_takes_frames_with_one(preprocess, time):
    "Five frames at the start, five at the end: no variant is a label beside an empty input."
    joints = np.zeros((1, 100, 5, 3), np.float32)
    joints[0, :5] = joints[0, -5:] = np.random.default_rng(0).normal(size=(5, 3))
    options = dict(preprocess=preprocess, time=time, augment=Augment(crop=0.2), length=16)
    for e in range(40):
        made = prepare(Clip(joints, skeleton=BODY), seed=(0, e), num_bodies=1, **options)
        assert made.x.any() and {*made.frame[made.body >= 0]} <= {*range(5), *range(95, 100)}


def test_turns_about_one_axis_leave_its_coordinate():
    c, options = clip(T=9), dict(length=9, num_bodies=1, preprocess="first-frame", seed=3)
    plain = prepare(c, **options).x
    for k, axis in enumerate("xyz"):
        turned = prepare(c, augment=Augment(rotate=80, rotate_about=axis), **options).x
        close(turned[k], plain[k])
        assert np.abs(turned - plain).max() > 0.1
        close(np.linalg.norm(turned, axis=0), np.linalg.norm(plain, axis=0))


def test_first_frame_moves_a_clip_as_a_whole():
    "Every body, at whichever frames: minus where the main one's centre was in frame 0."
    c = clip(M=2, T=20)
    for augment in (None, Augment(crop=0.3), Augment(uniform=True)):
        options = dict(preprocess="first-frame", length=15, augment=augment, seed=1)
        x, body, frame = prepare(c, **options)
        wanted = c.joints[body, frame] - c.joints[body[0, 0], 0, c.skeleton.centre]
        close(x, wanted.transpose(3, 1, 2, 0))


def test_resizing_is_linear_interpolation_but_for_missing_joints():
    c, options = noisy(3, 1, 30, gaps=False), dict(num_bodies=1, time="resize")
    x, whole = (make_batch(c, length=T, **options).x[0, :3, ..., 0].mT for T in (50, 30))
    close(x, torch.nn.functional.interpolate(whole, size=50, mode="linear", align_corners=False))
    still = np.repeat(c.joints[:, :1], 2, 1)
    visible = np.ones((1, 2, 25))
    still[0, 1, 7] = visible[0, 1, 7] = 0  # a hand that is lost
    x = prepare(Clip(still, visible), length=8, **options).x[:, :, 7, 0]
    assert x[3].tolist() == [1] * 4 + [0] * 4 and not x[:, 4:].any()
    close(x[:, :4], x[:, :1].repeat(4, 1))


@pytest.mark.parametrize("skeleton", [BODY, FLAT])
def test_resizing_never_mixes_two_people(skeleton):
    "Two who stand still and change slots (2D: by scores; 3D: one leaves, another comes)."
    C = 2 if skeleton is FLAT else 3
    pose = np.random.default_rng(0).random((5, C))
    joints, visible = np.zeros((2, 4, 5, C)), np.ones((2, 4, 5))
    joints[0], joints[1] = pose, pose + 3
    if C == 2:
        visible[0, 1::2] = visible[1, ::2] = 0.9
    else:
        joints[0, 2:] = visible[0, 2:] = joints[1, :2] = visible[1, :2] = 0
    c = Clip(joints, visible, skeleton=skeleton)
    x, still = prepare(c, length=8, time="resize").x[:C], prepare(c, length=4).x[:C]
    alike = np.isclose(x[:, :, None], still[:, None], atol=1e-5).all((0, 3))  # (8,4,M)
    assert alike.any(1).all()


def test_msg3d_turns_by_the_clips_first_pose_whatever_is_cropped():
    c, options = noisy(5, 2, 40, gaps=False), dict(augment=Augment(crop=0.5), seed=1)
    plain, frames = prepare(c, preprocess="msg3d", length=40).x, frames_of(40, 40, 1, crop=0.5)
    close(prepare(c, preprocess="msg3d", length=40, **options).x, plain[:, frames], 1e-6)


def test_preprocessed_arrays_are_taken_as_they_are(tmp_path):
    "Recordings → msg3d arrays in the public form → a store → msg3d batches: the same numbers."
    clips = [noisy(i, 2, 20 + i, gaps=False) for i in range(4)]
    made = {s: make_batch(clips, stream=s, preprocess="msg3d").x for s in ("joint", "bone")}
    np.save(tmp_path / "val_data_joint.npy", made["joint"])
    with open(tmp_path / "val_label.pkl", "wb") as f:
        pickle.dump(([c.name for c in clips], [c.label for c in clips]), f, protocol=2)
    store = ClipStore.build(open_clips(tmp_path), tmp_path / "store", progress=False)
    again = ClipStore.build(store, tmp_path / "again", progress=False)
    assert store.header["preprocessed"] == again.header["preprocessed"] == "msg3d"
    for stream, x in made.items():
        assert torch.equal(store.batch(stream=stream, preprocess="msg3d").x, x)
    half = store.batch(preprocess="msg3d", length=150).x
    assert torch.equal(half, made["joint"][:, :, 1::2]), "sampled evenly from the 300"
    with pytest.raises(ValueError, match="preprocessed by 'msg3d' before.*use preprocess='msg3d'"):
        store.batch([0])
    with pytest.raises(StoreError, match="are of two kinds"):
        ClipStore.build([store[0], noisy(9, 1)], tmp_path / "mixed", progress=False)
