"Preparation: what notebook 13 can't show: real files, random clips against a slow reading of the same words, random variants."

import os
import pickle
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.clips import Clip, open_clips
from stf.dataset import ClipStore, StoreError, make_batch
from stf.preparation import (STREAMS, Augment, Shown, blend, body_centre, in_channels, linked_bodies,
                             mirror_joints, prepare, resized_frames, scale)
from stf.skeleton import SKELETONS, Skeleton

REAL = Path(os.environ.get("STF_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "real-data"))
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"real recordings are not at {REAL}")
NTU, POSE = SKELETONS["ntu25"], SKELETONS["openpose18"]
ALL = Augment(rotate=30, scale=0.2, flip=0.5, crop=0.5, drop_joints=0.2, drop_bodies=0.3)
UNIFORM = Augment(rotate=30, flip=0.5, uniform=True, crop=0.7)
BODY = Skeleton(
    "body",
    ("hip", "chest", "head", "left hand", "right hand"),
    ((1, 0), (2, 1), (3, 1), (4, 1)),
    0,
    (2, 1, 0),
    (0, 1),
    (4, 3),
)
FLAT = Skeleton(
    "flat",
    ("hip", "chest", "head", "left hand", "right hand"),
    ((1, 0), (2, 1), (3, 1), (4, 1)),
    0,
    (2, 1, 0),
)


def clip(name="a", label=0, M=1, T=5, seed=0, skeleton=BODY, C=3, **more):
    rng = np.random.default_rng(seed)
    return Clip(
        rng.normal(size=(M, T, skeleton.num_joints, C)), name=name, label=label, skeleton=skeleton, **more
    )


def some(n, **more):
    return [clip(f"clip {i}", i % 3, 1 + i % 2, 1 + i % 7, i, **more) for i in range(n)]


# ---------------------------------------------------------------- against a slow, separate reading of the same words


@st.composite
def random_clip(draw, C=3, max_frames=12):
    M, T = draw(st.integers(1, 4)), draw(st.integers(1, max_frames))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    joints = rng.normal(size=(M, T, 5, C)).astype(np.float32)
    visible = (rng.random((M, T, 5)) > draw(st.sampled_from([0, 0.2, 0.9]))).astype(np.float32)
    if C == 2:
        visible *= rng.integers(1, 1000, visible.shape) / np.float32(1000)
    here = rng.random((M, T)) > draw(st.sampled_from([0, 0.3, 0.8]))
    here[rng.integers(M), rng.integers(T)] = True
    joints[~here], visible[~here] = 0, 0
    joints[visible == 0] = 0
    if not joints.any():
        joints[0, 0], visible[0, 0] = 1.5, 1
    return Clip(
        joints,
        visible,
        "random",
        0,
        skeleton=BODY if C == 3 else FLAT,
        tags={"listed": rng.permutation(M).tolist()},
    )


def naive_bodies(c, num_bodies):
    X, W = c.joints.astype(np.float64), c.visible.astype(np.float64)
    M, T = W.shape[:2]
    out = [np.zeros((num_bodies, T) + X.shape[2:]), np.zeros((num_bodies, T) + W.shape[2:])]
    if X.shape[-1] == 2:
        for t in range(T):
            for to, m in enumerate(
                sorted(range(M), key=lambda m: (-sum(c.visible[m, t].tolist()), c.tags["listed"][m]))[
                    :num_bodies
                ]
            ):
                out[0][to, t], out[1][to, t] = X[m, t], W[m, t]
        return out
    places = []  # of each place: list of (track, first, end)
    for m in range(M):
        seen = np.flatnonzero(X[m].any((1, 2)) | W[m].any(1))
        if len(seen):
            for place in places:
                if place[-1][2] <= seen[0]:
                    break
            else:
                places.append(place := [])
            place.append((m, seen[0], seen[-1] + 1))

    def spread(place):
        xs = np.concatenate(
            [X[m, t][None] for m, a, b in place for t in range(a, b) if X[m, t].any() or W[m, t].any()]
        )
        return sum(xs[..., c].std() for c in range(3))

    for to, place in enumerate(sorted(places, key=spread, reverse=True)[:num_bodies]):
        for m, a, b in place:
            out[0][to, a:b], out[1][to, a:b] = X[m, a:b], W[m, a:b]
    return out


def naive_paper(c, stream, length, num_bodies):
    X, W = naive_bodies(c, num_bodies)
    if X.shape[-1] == 2:
        X[..., 1] = -X[..., 1]
    T, s = X.shape[1], c.skeleton
    seen = [t for t in range(T) if W[0, t, s.centre] > 0]
    if seen:
        centre = np.array([X[0, min(seen, key=lambda u: (abs(u - t), u)), s.centre] for t in range(T)])
    else:
        points = [X[0, t, v] for t in range(T) for v in range(X.shape[2]) if W[0, t, v] > 0]
        centre = np.repeat(np.mean(points, 0)[None] if points else np.zeros((1, X.shape[-1])), T, 0)
    lengths = {}
    for a, b in zip(s.height, s.height[1:]):
        for t in range(T):
            if W[0, t, a] > 0 and W[0, t, b] > 0:
                lengths[a, b, t] = np.linalg.norm(X[0, t, a] - X[0, t, b])
    pairs = list(zip(s.height, s.height[1:]))
    whole = [
        sum(lengths[p + (t,)] for p in pairs) for t in range(T) if all(p + (t,) in lengths for p in pairs)
    ]
    each = [[x for (a, b, _), x in lengths.items() if (a, b) == p] for p in pairs]
    height = np.median(whole) if whole else sum(np.median(e) for e in each if e)
    X = (X - centre[None, :, None]) / (height if height > 1e-6 else 1) * (W > 0)[..., None]
    x, w = np.zeros((num_bodies, length) + X.shape[2:]), np.zeros((num_bodies, length) + W.shape[2:])
    for t in range(length):
        u = t % T if T <= length else int((2 * t + 1) * T / (2 * length))
        x[:, t], w[:, t] = X[:, u], W[:, u]
    if stream.startswith("bone"):
        p = s.parents
        x, w = x - x[:, :, p], np.minimum(w, w[:, :, p])
        x = x * (w > 0)[..., None]
    if stream.endswith("motion"):
        y, v = np.zeros_like(x), w.copy()
        y[:, :-1], v[:, :-1] = x[:, 1:] - x[:, :-1], np.minimum(w[:, :-1], w[:, 1:])
        x, w = y * (v > 0)[..., None], v
    return np.concatenate([x, w[..., None]], -1).transpose(3, 1, 2, 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_paper_batches_equal_the_naive_reading(data):
    C = data.draw(st.sampled_from([3, 3, 2]))
    clips = data.draw(st.lists(random_clip(C), min_size=1, max_size=4))
    stream, length, M = (
        data.draw(st.sampled_from(STREAMS)),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 3)),
    )
    x, _ = make_batch(clips, stream=stream, length=length, num_bodies=M)
    for got, c in zip(x.numpy(), clips):
        want = naive_paper(c, stream, length, M)
        scale = max(1, np.abs(want[:C]).max())  # a random height can be tiny
        np.testing.assert_allclose(got / scale, want / scale, atol=2e-6)


def public_steps(frames, length=300, num_bodies=2, centre=0, spine=(0, 1), shoulders=(4, 3)):
    "The public preparation from lists of bodies as a file gives them: frames[t] = [(V,3), …]."
    V = frames[0][0].shape[0] if frames[0] else next(b for f in frames for b in f).shape[0]
    D = np.zeros((4, len(frames), V, 3))
    for t, f in enumerate(frames):
        for m, body in enumerate(f[:4]):
            D[m, t] = body
    energy = []
    for body in D:
        there = body[body.any((1, 2))]
        energy.append(there.std((0, 1)).sum() if len(there) else -1)
    D = D[np.argsort(energy, kind="stable")[::-1][:num_bodies]]
    s = np.zeros((num_bodies, length, V, 3), np.float32)
    for to, body in enumerate(D):
        there = body.any((1, 2))
        if there.any():
            body = body[there] if not there[0] else body[: np.flatnonzero(there)[-1] + 1]
            s[to] = body[np.arange(length) % len(body)]
    c = s[0, :, centre].copy()
    s = (s - c[None, :, None]) * (s.sum(-1) != 0)[..., None]
    for (a, b), axis in ((spine, 2), (shoulders[::-1], 0)):
        v, e = (s[0, 0, b] - s[0, 0, a]).astype(np.float64), np.eye(3)[axis]
        turn = np.cross(v, e)
        if np.abs(turn).sum() > 1e-6:
            angle, turn = np.arccos(np.clip(v @ e / np.linalg.norm(v), -1, 1)), turn / np.linalg.norm(turn)
            K = np.cross(np.eye(3), turn)
            s = (s @ (np.eye(3) + np.sin(angle) * K + (1 - np.cos(angle)) * K @ K).T).astype(np.float32)
    return s.transpose(3, 1, 2, 0)


@settings(max_examples=100, deadline=None)
@given(random_clip(), st.integers(12, 30), st.integers(1, 2))
def test_msg3d_batches_equal_the_public_steps(c, length, M):
    listed = np.argsort(c.tags["listed"])
    frames = [[c.joints[m, t] for m in listed if c.joints[m, t].any()] for t in range(c.joints.shape[1])]
    if not any(frames):
        return
    want = public_steps(frames, length, M)
    got = make_batch(c, preprocess="msg3d", length=length, num_bodies=M).x[0].numpy()
    np.testing.assert_allclose(got, want, atol=2e-4 if np.abs(want).max() > 20 else 2e-5)


def read_lines(path):
    "Bodies of each frame of a .skeleton file, in the file's order."
    lines, frames = iter(Path(path).read_text().splitlines()), []
    for _ in range(int(next(lines))):
        frames.append([])
        for _ in range(int(next(lines))):
            next(lines)
            frames[-1].append(np.array([next(lines).split()[:3] for _ in range(int(next(lines)))], float))
    return frames


@needs_real
def test_msg3d_equals_the_public_steps_on_all_raw_files():
    from stf.clips import read_ntu

    for path in sorted((REAL / "ntu-raw/skeletons").glob("*.skeleton")):  # one of them lists a late body first
        want = public_steps(read_lines(path), centre=1, spine=(0, 1), shoulders=(8, 4))
        got = make_batch(read_ntu(path), preprocess="msg3d").x[0].numpy()
        np.testing.assert_allclose(got, want, atol=1e-5, err_msg=path.name)


@needs_real
def test_golden_pairs_of_the_public_preprocessing():
    from stf.clips import read_kinetics, read_ntu

    golden = np.load(REAL / "ntu-msg3d-npy/golden_pairs.npz")
    for stream in ("joint", "bone"):
        clips = [
            read_ntu(REAL / f"ntu-raw/skeletons/{str(n)[:20]}.skeleton") for n in golden[stream + "_names"]
        ]
        x, _ = make_batch(clips, stream=stream, preprocess="msg3d")
        assert np.abs(x.numpy() - golden[stream]).max() < 1e-5
    pair = REAL / "kinetics-skeleton/pairs/bqfirst"
    x, _ = make_batch(read_kinetics(pair / "open_pose_skeleton.json"), preprocess="msg3d")
    assert np.abs(x.numpy() - np.load(pair / "test_data_joint.npy")).max() < 1e-5


def test_absent_body_is_all_zero_and_one_body_is_enough():
    x, _ = make_batch([clip(M=1), clip(M=2)], length=7)
    absent = (x == 0).flatten(1, 3).all(1)
    assert absent.tolist() == [[False, True], [False, False]]
    assert make_batch(clip(M=3), num_bodies=1, length=7).x.shape == (1, 4, 7, 5, 1)
    assert make_batch(clip(M=1), preprocess="msg3d", num_bodies=3, length=7).x[..., 1:].abs().sum() == 0


def test_one_frame_clips_and_one_frame_batches():
    x, _ = make_batch([clip(T=1), clip(T=9)], stream="joint-motion", length=6)
    assert x[0, :3].abs().sum() == 0 and (x[0, 3, :, :, 0] == 1).all()
    assert make_batch([clip(T=1), clip(T=9)], stream="bone-motion", length=1).x.shape == (2, 4, 1, 5, 2)


def test_a_crop_in_which_nobody_is_takes_frames_with_somebody():
    """Someone who comes for five frames, goes, and comes back at the end: no variant is a label beside an empty input."""
    joints = np.zeros((1, 100, 5, 3), np.float32)
    joints[0, :5] = joints[0, -5:] = np.random.default_rng(0).normal(size=(5, 3))
    gone = Clip(joints, skeleton=BODY)
    for e in range(40):
        for time in ("repeat", "resize"):
            for preprocess in ("paper", "msg3d"):
                made = prepare(gone, preprocess=preprocess, time=time, augment=Augment(crop=0.2), seed=(0, e), length=16, num_bodies=1)
                assert made.x.any() and set(made.frame[made.body >= 0]) <= {*range(5), *range(95, 100)}


def test_batch_of_a_clip_does_not_depend_on_its_neighbours():
    clips = some(9)
    for preprocess in ("paper", "msg3d"):
        together = make_batch(clips, preprocess=preprocess, length=11).x
        for i, c in enumerate(clips):
            assert torch.equal(together[i], make_batch(c, preprocess=preprocess, length=11).x[0])


def test_channels_and_dtype():
    flat = clip(skeleton=FLAT, C=2)
    assert in_channels(2) == 3 and in_channels(2, "msg3d") == 3
    assert in_channels(3) == 4 and in_channels(3, "msg3d") == 3
    x, y = make_batch(clip(), dtype=torch.float64, length=3)
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    with pytest.raises(ValueError, match="openpose18"):
        make_batch(flat, preprocess="msg3d")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stream": "bones"}, "choose one of"), ({"preprocess": "ntu"}, "choose one of"), ({"length": 0}, "length must be"),
        ({"num_bodies": 1.5}, "num_bodies must be"), ({"time": "stretch"}, "time 'stretch' is not known"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_batch([clip()], **arguments)


def test_rules_for_choosing_bodies():
    T = 30
    rng, body = (
        np.random.default_rng(0),
        np.array([[0, 0, 0], [0, 1, 0], [0, 1.6, 0], [0.5, 1, 0], [-0.5, 1, 0]], float),
    )
    furniture = body * (4, 0.2, 1) + rng.normal(0, 0.3, (T, 5, 3))  # wide, and it jitters
    person = body + 0.1 * np.sin(np.arange(T) / 3)[:, None, None]
    late = np.zeros((T, 5, 3))
    late[10:16] = body * 3 + np.arange(6)[:, None, None]  # large, fast, and gone soon
    c = Clip(np.stack([furniture, person, late]), name="three", label=0, skeleton=BODY)
    there = {}
    for rule in ("spread", "presence", "motion", "denoise"):
        x = make_batch(c, length=T, bodies=rule, num_bodies=3).x[0, 3].amax(1)  # (T,M)
        there[rule] = [int(n) for n in x.sum(0)]
    assert there == {
        "spread": [6, 30, 30],
        "presence": [30, 30, 6],
        "motion": [6, 30, 30],
        "denoise": [30, 0, 0],
    }
    alone = Clip(furniture[None], name="alone", label=0, skeleton=BODY)
    assert make_batch(alone, bodies="denoise", length=5).x.any()  # somebody always stays
    with pytest.raises(ValueError, match="for preset 'paper'"):
        make_batch(c, preprocess="msg3d", bodies="motion")
    with pytest.raises(ValueError, match="choose one of spread"):
        make_batch(c, bodies="tallest")


def test_places_of_bodies_never_overlap_and_every_body_has_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        first = rng.integers(0, 20, 6)
        present = np.array([(a <= np.arange(30)) & (np.arange(30) < a + n) for a, n in zip(first, rng.integers(1, 10, 6))])
        table = linked_bodies(present)
        for m, row in enumerate(present):
            places, t = np.nonzero(table == m)
            assert len(set(places)) == 1 and np.array_equal(t, np.flatnonzero(row))


@settings(max_examples=60, deadline=None)
@given(random_clip(max_frames=30), st.integers(1, 40), st.integers(1, 3), st.sampled_from(["paper", "msg3d"]), st.sampled_from(["repeat", "resize"]))
def test_the_input_shows_the_body_and_frame_that_it_says(c, length, M, preprocess, time):
    "A body's first joint carries its number and frame: what is prepared must be told by `body` and `frame`."
    p = prepare(c, preprocess=preprocess, length=length, num_bodies=M, time=time)
    assert p.body.shape == p.frame.shape == (M, length) and p.body.max() < len(c.joints) and 0 <= p.frame.min() and p.frame.max() < c.joints.shape[1]
    there = p.body >= 0
    assert c.present[p.body[there], p.frame[there]].all()  # who is said to be there is there
    if preprocess == "paper" and time == "repeat":
        seen = c.visible[p.body, p.frame] * there[..., None]
        assert np.array_equal(p.x[3].transpose(2, 0, 1), seen)


# ---------------------------------------------------------------- random variants


def noisy(seed=0, M=2, T=20, skeleton=NTU, C=3, name=None, gaps=True):
    "Bodies of noise, with gaps, missing joints, and a body that comes late."
    rng = np.random.default_rng(seed)
    joints = rng.normal(size=(M, T, skeleton.num_joints, C)).astype(np.float32) + 3
    visible = np.ones(joints.shape[:3], np.float32)
    if gaps and T > 6:
        visible[-1, : T // 4] = 0
        visible[:, T // 2] = 0
        visible[rng.random(visible.shape) < 0.1] = 0
        visible[0, 0, 0] = 1
    if C == 2:
        visible *= rng.random(visible.shape).astype(np.float32) * 0.5 + 0.5
    joints[visible == 0] = 0
    return Clip(joints, visible, name or f"clip {seed}", seed % 3, skeleton=skeleton)


def many(n=6, **more):
    return [noisy(i, 1 + i % 3, 3 + 11 * i, **more) for i in range(n)]


def test_the_choices_are_as_likely_as_they_say():
    body = Skeleton("b", ("hip", "left hand", "right hand", "left foot", "right foot"), ((1, 0), (2, 0), (3, 0), (4, 0)), 0, (1, 0))
    c = Clip(np.random.default_rng(0).normal(size=(2, 1, 5, 3)), name="c", skeleton=body)
    draw = lambda augment: np.stack([prepare(c, length=1, augment=augment, seed=(0, 1, i)).x for i in range(3000)])  # (n,4,1,5,2)
    plain = prepare(c, length=1).x
    flipped = (draw(Augment(flip=0.3))[:, 0, 0, 2, 0] != plain[0, 0, 2, 0]).mean()
    assert abs(flipped - 0.3) < 0.03
    assert abs(draw(Augment(drop_joints=0.25))[:, 3].mean() - 0.75) < 0.02
    kept = draw(Augment(drop_bodies=0.4))[:, 3, 0, 0].sum(1)
    assert kept.min() == 1 and abs((kept == 2).mean() - 0.36) < 0.03
    x, rng = np.ones((1, 1, 1, 3), np.float32), np.random.default_rng(0)
    factors = np.stack([scale(x, 0.2, rng)[0, 0, 0] for _ in range(3000)])
    assert abs(factors.mean() - 1) < 0.01 and factors.min() > 0.8 and factors.max() < 1.2
    assert abs(np.corrcoef(factors.T)[0, 1]) < 0.06


def test_a_variant_stays_what_it_was():
    "A resumed training must draw what the first half would have drawn, under any version of numpy."
    x = prepare(noisy(1, gaps=False), length=4, num_bodies=1, augment=Augment(rotate=30, crop=0.5, scale=0.1), seed=(0, 1, 7)).x
    assert np.round(x[:3, 2, 6, 0] * 1e4).astype(int).tolist() == KNOWN


KNOWN = [81, 171, 867]


def test_wrong_augmentations_are_named():
    for wrong, word in ((dict(rotate=-1), "rotate"), (dict(scale=1), "scale"), (dict(flip=2), "flip"), (dict(crop=0), "crop"),
                        (dict(crop_least=0), "crop_least"), (dict(drop_joints=1), "drop_joints"), (dict(rotate="17"), "rotate"),
                        (dict(flip=True), "flip"), (dict(rotate=float("nan")), "rotate")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Augment(**wrong)
    with pytest.raises(ValueError, match="uniform"):
        make_batch(noisy(), time="resize", augment=Augment(uniform=True), seed=0)
    with pytest.raises(ValueError, match="seed"):
        make_batch(noisy(), augment=ALL)
    plain = Skeleton("plain", ("a", "b"), ((1, 0),), 0, (1, 0))
    with pytest.raises(ValueError, match="'plain' has none"):
        make_batch(noisy(skeleton=plain), augment=Augment(flip=0.5), seed=0)


@pytest.mark.parametrize("preprocess", ["paper", "msg3d"])
@pytest.mark.parametrize("skeleton", [NTU, POSE])
def test_off_means_untouched(preprocess, skeleton):
    clips = many(skeleton=skeleton, C=3 if skeleton is NTU else 2)
    for stream in STREAMS:
        plain = make_batch(clips, stream=stream, preprocess=preprocess, length=25).x
        assert torch.equal(plain, make_batch(clips, stream=stream, preprocess=preprocess, length=25, augment=Augment(), seed=None).x)
        least = Augment(crop_least=9)
        assert not least and torch.equal(plain, make_batch(clips, stream=stream, preprocess=preprocess, length=25, augment=least).x)


@pytest.mark.parametrize("preprocess", ["paper", "msg3d"])
@pytest.mark.parametrize("skeleton", [NTU, POSE])
@pytest.mark.parametrize("time,augment", [("resize", ALL), ("repeat", ALL), ("repeat", UNIFORM), ("resize", None)])
def test_a_clip_is_the_same_in_any_batch(preprocess, skeleton, time, augment):
    clips = many(skeleton=skeleton, C=3 if skeleton is NTU else 2)
    options = dict(stream="bone", preprocess=preprocess, length=25, time=time, augment=augment, seed=(1, 2))
    whole = make_batch(clips, **options).x
    assert torch.isfinite(whole).all()
    for cut in ([0, 1, 2], [5], [4, 3]):
        assert torch.equal(make_batch([clips[i] for i in cut], numbers=cut, **options).x, whole[cut])
    if augment:
        assert not torch.equal(make_batch(clips, **{**options, "seed": (1, 3)}).x, whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 60), st.integers(1, 70), st.sampled_from(["repeat", "resize"]))
def test_what_is_missing_stays_missing(seed, M, T, length, time):
    c = noisy(seed, M, T)
    augment = Augment(rotate=20, scale=0.1, flip=0.5, drop_joints=0.3, drop_bodies=0.5, crop=0.6)
    options = dict(length=length, num_bodies=M, time=time, seed=seed)
    plain = make_batch(c, augment=Augment(crop=0.6), **options).x[0]
    x = make_batch(c, augment=augment, **options).x[0]  # (C,T,V,M)
    assert set(x[3].unique().tolist()) <= {0.0, 1.0} and (x[:3].abs().sum(0)[x[3] == 0] == 0).all()
    assert (x[3] > 0).any() == (plain[3] > 0).any(), "somebody stays, if somebody was there"
    gone = plain[3][:, mirror_joints(NTU)].maximum(plain[3]) == 0  # neither the joint nor its mirror image
    assert (x[3][gone] == 0).all()


def test_rotation_keeps_lengths_and_flip_its_own_inverse():
    clips = many(skeleton=NTU)
    child, parent = np.array(NTU.bones).T
    plain = make_batch(clips, length=20).x
    turned = make_batch(clips, length=20, augment=Augment(rotate=90), seed=1).x
    length = lambda x: (x[:, :3, :, child] - x[:, :3, :, parent]).norm(dim=1)
    torch.testing.assert_close(length(turned), length(plain), atol=1e-5, rtol=1e-5)
    assert torch.equal(turned[:, 3], plain[:, 3])
    flipped = make_batch(clips, length=20, augment=Augment(flip=1), seed=1).x
    mirror = plain[:, :, :, mirror_joints(NTU)].clone()
    mirror[:, 0] *= -1
    assert torch.equal(flipped, mirror)


def test_bones_and_motion_are_taken_from_the_varied_joints():
    clips = [noisy(i, gaps=False) for i in range(4)]
    options = dict(length=20, augment=Augment(rotate=40, scale=0.2, flip=0.5, crop=0.5), seed=(0, 1), time="resize")
    x = {s: make_batch(clips, stream=s, **options).x[:, :3] for s in STREAMS}
    bone = x["joint"] - x["joint"][:, :, :, NTU.parents]
    torch.testing.assert_close(x["bone"], bone, atol=1e-6, rtol=0)
    for s in ("joint", "bone"):
        after = torch.cat([x[s][:, :, 1:], x[s][:, :, -1:]], 2)
        torch.testing.assert_close(x[s + "-motion"], after - x[s], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- time


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 100), st.floats(0.05, 1), st.booleans(), st.integers(0, 99))
def test_frames_are_in_order_and_in_the_clip(n, T, crop, uniform, seed):
    c = Clip(np.ones((1, n, 25, 3)), name="c")
    f = prepare(c, length=T, num_bodies=1, augment=Augment(crop=crop, uniform=uniform), seed=seed).frame[0]
    assert f.shape == (T,) and 0 <= f.min() and f.max() < n
    step = np.diff(f)
    assert (step != 0).all() or len(set(f)) == 1  # never the same frame twice in a row, unless it is the only one
    assert (step < 0).sum() <= T // max(1, int(crop * n)) + 1  # falls back only where a repetition begins
    f = prepare(c, length=T, num_bodies=1, time="resize", augment=Augment(crop=crop), seed=seed).frame[0]
    assert (np.diff(f) >= 0).all() and f.max() < n
    (first, second), share = resized_frames(n, T)
    assert (second - first <= 1).all() and 0 <= share.min() and share.max() < 1 and second.max() < n


def test_crops_are_as_long_as_they_say():
    c = Clip(np.ones((1, 100, 25, 3)), name="c")
    cropped = lambda clip, **more: np.stack([prepare(clip, length=64, num_bodies=1, time="resize", augment=Augment(crop=0.5, **more), seed=i).frame[0] for i in range(600)])
    f = cropped(c)
    lengths = f[:, -1] - f[:, 0]
    assert 45 <= lengths.min() < 55 and lengths.max() > 94 and abs(lengths.mean() - 74) < 3
    assert f[:, 0].max() > 38 and (f[:, -1] > 94).mean() > 0.1
    f = cropped(Clip(np.ones((1, 50, 25, 3)), name="short"), crop_least=64)
    assert (f[:, 0] == 0).all() and (f[:, -1] == 49).all()


def test_resize_of_a_whole_clip_is_linear_interpolation():
    c = noisy(3, 1, 30, gaps=False)
    x = make_batch(c, length=50, num_bodies=1, time="resize").x[0, :3, :, :, 0]
    whole = make_batch(c, length=30, num_bodies=1).x[0, :3, :, :, 0]
    wanted = torch.nn.functional.interpolate(whole.permute(0, 2, 1), size=50, mode="linear", align_corners=False).permute(0, 2, 1)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)


def test_interpolation_never_mixes_in_a_missing_joint():
    x = np.repeat(np.float32([5, 0, 0, 7]).reshape(1, 4, 1, 1), 3, 3)  # frames 5, –; then –, 7
    place = np.zeros((1, 4), int)
    for share in (0.2, 0.5, 0.8):
        y, v, _, _ = blend(Shown(x, x.any(3).astype(np.float32), place, place), np.full(2, share, np.float32))
        assert y[0, 0, 0].tolist() == ([5.0] * 3 if share <= 0.5 else [0.0] * 3)
        assert y[0, 1, 0].tolist() == ([0.0] * 3 if share <= 0.5 else [7.0] * 3)
        assert np.array_equal(v > 0, y.any(3))


@pytest.mark.parametrize("C", [2, 3])
def test_resizing_never_mixes_two_people(C):
    """Two who stand still and change slots from frame to frame (2D: by their scores; 3D: one leaves, another comes): no joint is between them."""
    name = "openpose18" if C == 2 else "ntu25"
    V = SKELETONS[name].num_joints
    pose = np.random.default_rng(0).random((V, C))
    joints, visible = np.zeros((2, 4, V, C)), np.ones((2, 4, V))
    joints[0], joints[1] = pose, pose + 3
    if C == 2:
        visible[0, 1::2], visible[1, ::2] = 0.9, 0.9
    else:
        joints[0, 2:], visible[0, 2:], joints[1, :2], visible[1, :2] = 0, 0, 0, 0
    clip = Clip(joints, visible, skeleton=SKELETONS[name])
    x = prepare(clip, length=8, time="resize").x
    still = prepare(clip, length=4).x
    for m in range(2):
        for t in range(8):
            assert np.isclose(x[:C, t, :, m], still[:C, :, :, m].transpose(1, 0, 2), atol=1e-5).all((1, 2)).any()


def test_a_missing_centre_needs_no_memory():
    """Frames × frames numbers would take 74 GB for the longest clip that the readers allow."""
    T = 60_000
    visible = np.ones((1, T, 17))
    visible[0, 7, 0] = visible[0, 20:23, 0] = 0
    joints = np.random.default_rng(0).random((1, T, 17, 2)).astype(np.float32)
    x = prepare(Clip(joints, visible), length=T, num_bodies=1).x
    assert np.isfinite(x).all()
    seen = np.flatnonzero(visible[0, :40, 0])
    nearest = seen[np.abs(np.arange(40)[:, None] - seen).argmin(1)]
    centre = body_centre(joints[0, :40], visible[0, :40].astype(np.float32), 0)
    np.testing.assert_array_equal(centre, joints[0, nearest, 0])


@pytest.mark.parametrize("wrong", [dict(augment=True), dict(augment={"flip": 1}), dict(bodies=["spread"]), dict(length=0)])
def test_options_of_the_wrong_type_are_named(wrong):
    with pytest.raises(ValueError):
        prepare(Clip(np.ones((1, 3, 25, 3))), **wrong)
    for clip in (Clip(np.ones((1, 3, 7, 3))), Clip(np.ones((1, 3, 25, 4)))):
        with pytest.raises(ValueError, match="needs a skeleton and 2 or 3 coordinates"):
            prepare(clip)
    assert Augment(rotate=np.float64(10)) == Augment(rotate=10)
    with pytest.raises(ValueError, match="uniform must be"):
        Augment(uniform="no")


def test_msg3d_turns_alike_whatever_time_shows():
    "The pose that sets the rotation is the clip's, not the crop's: same frames, same numbers."
    c = noisy(5, 2, 40)
    plain = prepare(c, preprocess="msg3d", length=40).x
    cropped = prepare(c, preprocess="msg3d", length=40, augment=Augment(crop=0.5), seed=1)
    whole = prepare(Clip(np.ones((1, 40, 25, 3)), name="c"), length=40, num_bodies=1, augment=Augment(crop=0.5), seed=1).frame[0]
    np.testing.assert_allclose(cropped.x, plain[:, whole], atol=1e-6)


# ---------------------------------------------------------------- preprocessed before


def test_preprocessed_arrays_are_taken_as_they_are(tmp_path):
    "Recordings → msg3d arrays in the public form → open_clips → a store → msg3d batches: the same numbers, in any stream."
    clips = [noisy(i, 2, 20 + i, gaps=False) for i in range(4)]
    made = {s: make_batch(clips, stream=s, preprocess="msg3d").x.numpy() for s in ("joint", "bone")}
    np.save(tmp_path / "val_data_joint.npy", made["joint"])
    with open(tmp_path / "val_label.pkl", "wb") as f:
        pickle.dump(([c.name for c in clips], [c.label for c in clips]), f, protocol=2)
    store = ClipStore.build(open_clips(tmp_path), tmp_path / "store", progress=False)
    assert store.header["preprocessed"] == "msg3d"
    for stream, x in made.items():
        assert np.array_equal(store.batch(range(4), stream, "msg3d").x.numpy(), x)
    half = store.batch(range(4), "joint", "msg3d", length=150).x.numpy()
    assert np.array_equal(half, made["joint"][:, :, 1::2]), "sampled evenly from the 300"
    with pytest.raises(ValueError, match="preprocessed by 'msg3d' before.*'paper' can't be made.*use preprocess='msg3d'"):
        store.batch([0])
    assert torch.equal(store.subset([2]).batch([0], "joint", "msg3d").x, store.batch([2], "joint", "msg3d").x)
    with pytest.raises(StoreError, match="are of two kinds"):
        ClipStore.build([store[0], noisy(9, 1)], tmp_path / "mixed", progress=False)
    again = ClipStore.build(store, tmp_path / "again", progress=False)
    assert again.header["preprocessed"] == "msg3d"


def test_config_fields_have_defaults_that_mean_off():
    assert not Augment(**{f.name: f.default for f in fields(Augment)})


