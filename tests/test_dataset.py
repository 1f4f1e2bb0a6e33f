"Stores and batches: what the notebooks 13 and 14 can't show: real files, damage, kills, random clips against the naive words."

import gc
import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.augment import Augment
from stf.batches import STREAMS, in_channels, link_slots, make_batch, pack_clip, pack_clips, unpack_clip
from stf.clips import Clip, ClipError, open_clips
from stf.dataset import ClipStore, StoreError, fraction, protocol_side, validation_split
from stf.skeleton import SKELETONS, Skeleton

REAL = Path(os.environ.get("STF_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "real-data"))
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"real recordings are not at {REAL}")
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


def build(clips, folder, **more):
    return ClipStore.build(clips, folder, progress=False, **more)


# ---------------------------------------------------------------- batches against a slow, separate reading of the same words


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


@needs_real
def test_golden_pair_through_a_store(tmp_path):
    from stf.clips import read_ntu

    golden = np.load(REAL / "ntu-msg3d-npy/golden_pairs.npz")
    clips = [read_ntu(p) for p in sorted((REAL / "ntu-raw/skeletons").glob("*.skeleton"))]
    store = build(clips, tmp_path / "s")
    for stream in ("joint", "bone"):
        at = [store.names.index(str(n)[:20]) for n in golden[stream + "_names"]]
        x, _ = store.batch(at, stream, "msg3d")
        assert np.abs(x.numpy() - golden[stream]).max() < 1e-5
    x, _ = store.batch(range(len(store)))
    assert x.shape == (18, 4, 300, 25, 2) and x.isfinite().all() and x.abs().max() < 20


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


def test_batch_of_a_clip_does_not_depend_on_its_neighbours():
    clips = some(9)
    for preprocess in ("paper", "msg3d"):
        together = make_batch(clips, preprocess=preprocess, length=11).x
        for i, c in enumerate(clips):
            assert torch.equal(together[i], make_batch(c, preprocess=preprocess, length=11).x[0])


def test_channels_and_dtype():
    flat = clip(skeleton=FLAT, C=2)
    assert in_channels(pack_clips([flat])) == 3 and in_channels(flat, "msg3d") == 3
    assert in_channels(3) == 4 and in_channels(3, "msg3d") == 3
    x, y = make_batch(clip(), dtype=torch.float64, length=3)
    assert x.dtype == torch.float64 and y.dtype == torch.int64
    with pytest.raises(ValueError, match="openpose18"):
        make_batch(flat, preprocess="msg3d")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"stream": "bones"}, "choose one of"), ({"preprocess": "ntu"}, "choose one of"), ({"length": 0}, "length must be"),
        ({"num_bodies": 1.5}, "num_bodies must be"), ({"indices": []}, "at least one"), ({"indices": [0.5]}, "indices must be"),
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


def test_places_of_tracks_never_overlap():
    rng = np.random.default_rng(0)
    for _ in range(200):
        spans = np.sort(rng.integers(0, 20, (6, 2)), 1)
        spans[:, 1] -= spans[:, 0]
        slots = link_slots(spans)
        taken = [(slots[m], t) for m, (a, n) in enumerate(spans) for t in range(a, a + n)]
        assert len(taken) == len(set(taken))


@settings(max_examples=50, deadline=None)
@given(random_clip())
def test_rows_give_a_clip_back(c):
    joints, visible = unpack_clip(pack_clips([c]), 0)
    assert np.array_equal(joints, c.joints) and np.array_equal(visible, c.visible)


# ---------------------------------------------------------------- protocols


@pytest.fixture(scope="session")
def label_lists():
    if not REAL.exists():
        pytest.skip(f"real recordings are not at {REAL}")
    lists = {}
    with tarfile.open(REAL / "ntu-labels/ntu_split_labels.tar.xz") as tar:
        for member in tar:
            if member.isfile():
                names, labels = pickle.loads(tar.extractfile(member).read())  # our own reference file
                lists[tuple(Path(member.name).parts[-3:-1]) + (Path(member.name).name.split("_")[0],)] = (
                    [n[:20] for n in names],
                    labels,
                )
    return lists


@needs_real
@pytest.mark.parametrize(
    "data, protocol", [("ntu", "xsub"), ("ntu", "xview"), ("ntu120", "xsub"), ("ntu120", "xset")]
)
def test_standard_splits_name_for_name(label_lists, data, protocol, tmp_path):
    (train, train_labels), (val, val_labels) = (
        label_lists[data, protocol, side] for side in ("train", "val")
    )
    names = sorted(train + val)
    if protocol == "xview":  # once through a store, with the official list applied
        from stf.clips import ntu_missing_skeletons

        one = np.ones((1, 1, 25, 3), np.float32)
        clips = (
            Clip(one, name=n, label=int(n[17:]) - 1)
            for n in sorted(names + [n for n in ntu_missing_skeletons() if n < "S018"])
        )
        store = build(clips, tmp_path / "s")
        assert store.names == names and len(store.skipped) == 302
        sides = [[store.names[i] for i in side] for side in store.split(protocol)]
        label = dict(zip(train + val, train_labels + val_labels))
        assert all(store.labels[i] == label[n] for i, n in enumerate(store.names))
    else:
        from stf.clips import parse_ntu_name

        sides = [
            [n for n in names if protocol_side(parse_ntu_name(n), protocol) == side]
            for side in ("train", "test")
        ]
    assert sides == [sorted(train), sorted(val)]


def test_stored_split_comes_first_and_unknown_ones_list_what_there_is(tmp_path):
    clips = [
        clip(f"S001C001P00{i}R001A001", split={"xsub": "test" if i % 2 else "train", "own": "train"})
        for i in range(1, 5)
    ]
    store = build(clips, tmp_path / "s")
    assert [s.tolist() for s in store.split("Cross-Subject")] == [[1, 3], [0, 2]]
    assert [s.tolist() for s in store.split("own")] == [[0, 1, 2, 3], []]
    assert [s.tolist() for s in store.split("x-view")] == [[], [0, 1, 2, 3]]
    with pytest.raises(StoreError, match="knows own, xsub, x-view, x-set"):
        store.split("xmoon")
    with pytest.raises(StoreError, match="put your own in Clip.split"):
        build(some(3), tmp_path / "t").split("xsub")


def test_ucla_views():
    assert protocol_side({"action": 1, "subject": 2, "take": 3, "view": 3}, "xview") == "test"
    assert protocol_side({"action": 1, "subject": 2, "take": 3, "camera": 2}, "x-view") == "train"
    assert protocol_side({"action": 1, "subject": 2, "take": 3, "view": 2}, "x-sub") is None


def test_validation_and_fraction(tmp_path):
    store = build(
        [clip(f"S001C001P{s:03d}R{r:03d}A001", r % 4) for s in range(1, 9) for r in range(1, 11)],
        tmp_path / "s",
    )
    train, _ = store.split("xsub")
    a, b = validation_split(store, train, seed=3)
    assert sorted([*a, *b]) == train.tolist() and len(b) == 10 and len({store.names[i][9:12] for i in b}) == 1
    assert np.array_equal(b, validation_split(store, train, seed=3)[1])
    assert len({tuple(validation_split(store, train, seed=s)[1]) for s in range(20)}) > 1
    with pytest.raises(StoreError, match="same 'camera'"):
        validation_split(store, train, by="camera")
    with pytest.raises(StoreError, match="no tag 'hat'"):
        validation_split(store, train, by="hat")
    small, large = (
        fraction(store, train, 0.1, 5, stratified=True),
        fraction(store, train, 0.5, 5, stratified=True),
    )
    assert set(small) <= set(large) and set(store.labels[small]) == set(store.labels[train])
    assert len(fraction(store, train, 0.25)) == 13 and len(fraction(store, train, 1)) == len(train)


# ---------------------------------------------------------------- the store


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def test_store_gives_clips_back_and_is_the_same_bytes_twice(tmp_path):
    clips = some(700, split={"mine": "train"}, tags={"bodies": ["7", "8"], "subject": 3})
    store, again = build(clips, tmp_path / "a"), build(iter(clips), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    store.verify()
    for c, back in zip(clips, store):
        assert np.array_equal(c.joints, back.joints) and np.array_equal(c.visible, back.visible)
        assert (c.name, c.label, c.tags, c.split, c.skeleton) == (
            back.name,
            back.label,
            back.tags,
            back.split,
            back.skeleton,
        )
    x = again.batch([5, 699, 5], "bone", length=9).x
    assert torch.equal(x, make_batch([clips[5], clips[699], clips[5]], stream="bone", length=9).x)
    assert torch.equal(x, again.to("cpu").batch([5, 699, 5], "bone", length=9).x)
    assert torch.equal(pickle.loads(pickle.dumps(store)).batch([5, 699, 5], "bone", length=9).x, x)


def test_compact_types_are_exact(tmp_path):
    rng = np.random.default_rng(0)
    thousandths = [
        Clip(
            (rng.integers(0, 1001, (1, 4, 18, 2)) / 1000),
            rng.integers(0, 1001, (1, 4, 18)) / 1000,
            f"k{i}",
            0,
        )
        for i in range(300)
    ]
    halves = [
        Clip(rng.normal(size=(1, 4, 25, 3)).astype(np.float16), name=f"h{i}", label=0) for i in range(3)
    ]
    for clips, types in ((thousandths, ["int16", "int16"]), (halves, ["float16", "uint8"])):
        store = build(clips, tmp_path / types[0])
        assert list(store.header["types"].values()) == types
        assert all(
            np.array_equal(c.joints, b.joints) and np.array_equal(c.visible, b.visible)
            for c, b in zip(clips, store)
        )
        assert torch.equal(store.batch(range(3), length=5).x, make_batch(clips[:3], length=5).x)
    last = Clip(
        np.full((1, 1, 18, 2), 1 / 3), name="third", label=0
    )  # one clip that is not exact decides for all
    assert build(thousandths + [last], tmp_path / "mixed").header["types"]["joints"] == "float32"


def test_classes(tmp_path):
    named = [clip("a", 4, class_name="jump"), clip("b", 2, class_name="run")]
    store = build(named, tmp_path / "a")
    assert store.classes == ["run", "jump"] and store.labels.tolist() == [1, 0] and store[0].label == 4
    store = build(named, tmp_path / "b", classes=["sit", "lie", "run", "walk", "jump"])
    assert store.labels.tolist() == [4, 2] and store.batch([0], length=3).y.tolist() == [4]
    with pytest.raises(StoreError, match="'a' has label 4, but classes has 2 names"):
        build(named, tmp_path / "c", classes=["run", "jump"])
    with pytest.raises(StoreError, match=r"classes\[4\] is 'run'"):
        build(named, tmp_path / "c", classes=["sit", "lie", "jump", "walk", "run"])
    with pytest.raises(StoreError, match="'jump' in clip 'a' and 'hop' in clip 'b'"):
        build([clip("a", 1, class_name="jump"), clip("b", 1, class_name="hop")], tmp_path / "c")
    with pytest.raises(StoreError, match="belongs to labels"):
        build([clip("a", 0, class_name="jump"), clip("b", 1, class_name="jump")], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_clips_that_do_not_fit_are_named(tmp_path):
    other = clip("other", skeleton=SKELETONS["kinect20"])
    far = [clip(f"c{i}") for i in range(300)]  # the odd one in another shard than the first
    for clips, message in (
        ([clip("same"), clip("same")], "'same'"), (far + [clip("c0")], "'c0'"), ([clip("a"), other], "'a' and 'other'"),
        (far + [other], "'c256' and 'other'"), ([clip("a", None)], "a: label: has no label"), ([], "no clip to store"),
        ([clip("a", skeleton=FLAT, C=2), clip("b", skeleton=FLAT, C=3)], "coordinates"),
        ([Clip(np.ones((1, 1, 7, 3)), name="seven", label=0)], "'seven' has no skeleton"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            build(clips, tmp_path / "s")
        assert list(tmp_path.iterdir()) == []


def test_a_clip_without_a_label_is_left_out_and_named(tmp_path):
    """As a recording that a label list forgot: it costs itself, not the build."""
    store = build([clip("a"), clip("forgotten", None), clip("b")], tmp_path / "s")
    assert list(store.names) == ["a", "b"] and list(store.refused["path"]) == ["forgotten"]
    assert "has no label" in store.refused["reason"][0]
    with pytest.raises(ClipError, match="forgotten"):
        build([clip("a"), clip("forgotten", None)], tmp_path / "t", strict=True)


class Reader:
    "Raises a ClipError for every third clip and goes on, as a reader of files does."

    def __init__(self, n):
        self.n, self.at = n, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.at == self.n:
            raise StopIteration
        self.at += 1
        if self.at % 3 == 0:
            raise ClipError(f"file{self.at}.skeleton", "line 2", "cut off")
        return clip(f"clip {self.at}")


def test_bad_files_are_collected(tmp_path):
    store = build(Reader(10), tmp_path / "s")
    assert len(store) == 7 and store.refused["path"].tolist() == [
        "file3.skeleton",
        "file6.skeleton",
        "file9.skeleton",
    ]
    with pytest.raises(ClipError, match="file3"):
        build(Reader(10), tmp_path / "t", strict=True)

    def generator():
        yield clip("a")
        raise ClipError("b", "line 1", "bad")

    with pytest.raises(
        ClipError, match="b: line 1: bad"
    ):  # a generator ends there: nothing may be lost in silence
        build(generator(), tmp_path / "t")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    with pytest.raises(StoreError, match="1 refused.*line 1: bad"):
        build([ClipError("b", "line 1", "bad")], tmp_path / "t")


def test_what_is_no_clip_is_said(tmp_path):
    with pytest.raises(StoreError, match="got a dict where a Clip should be"):
        build([clip("a"), {"joints": 1}], tmp_path / "s")
    missing = clip("raw/S001C002P005R002A008.skeleton")
    assert build([clip("a"), missing], tmp_path / "s").skipped == [missing.name]


def test_damage_is_found(tmp_path):
    store = build(some(20), tmp_path / "s")
    for name in store.header["files"]:
        whole = (tmp_path / "s" / name).read_bytes()
        (tmp_path / "s" / name).write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=f"{name}: has"):
            ClipStore(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(StoreError, match=f"{name}: its content has changed"):
            store.verify()
        (tmp_path / "s" / name).unlink()
        with pytest.raises(StoreError, match=f"{name}: is missing"):
            ClipStore(tmp_path / "s")
        (tmp_path / "s" / name).write_bytes(whole)
    header = (tmp_path / "s" / "header.json").read_bytes()
    rng = np.random.default_rng(0)
    for i in rng.integers(0, len(header), 200):
        (tmp_path / "s" / "header.json").write_bytes(
            header[:i] + bytes([header[i] ^ int(rng.integers(1, 256))]) + header[i + 1 :]
        )
        try:
            assert ClipStore(tmp_path / "s").header == store.header  # a blank changed into another
        except StoreError:
            pass
    later = json.loads(header)
    later["version"] = 99
    (tmp_path / "s" / "header.json").write_text(json.dumps(later))
    with pytest.raises(StoreError, match="version 99"):
        ClipStore(tmp_path / "s")


def test_existing_things_are_never_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="already exists"):
        build(some(3), ".")
    build(some(3), tmp_path / "s")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    for folder in ("s", "mine"):
        with pytest.raises(StoreError, match="already exists"):
            build(some(3), tmp_path / folder)
    with pytest.raises(StoreError, match="no store"):
        build(some(3), tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"
    assert len(build(some(5), tmp_path / "s", overwrite=True)) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "s"]


def slow_clips(n=600):
    for i in range(n):
        time.sleep(0.0005)
        yield clip(f"clip {i}", i % 3, T=1 + i % 9, seed=i)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_build_leaves_no_store_and_the_next_one_is_whole(tmp_path):
    target = tmp_path / "s"
    for wait in (0.01, 0.1, 0.2):
        child = multiprocessing.get_context("fork").Process(target=build, args=(slow_clips(), target))
        child.start()
        child.join(wait)
        child.kill()
        child.join()
        with pytest.raises(StoreError, match="no store here"):
            ClipStore(target)
    build(slow_clips(), target)
    build(slow_clips(), tmp_path / "t")
    assert files_of(target) == files_of(tmp_path / "t") and sorted(p.name for p in tmp_path.iterdir()) == [
        "s",
        "t",
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to act as a full disk")
def test_full_disk_is_said(tmp_path, monkeypatch):
    import stf.build as building

    real = open
    build(some(3), tmp_path / "other")
    monkeypatch.setattr(
        building,
        "open",
        lambda path, mode="r", *a: real("/dev/full", mode) if "w" in mode else real(path, mode, *a),
        raising=False,
    )
    with pytest.raises(StoreError, match="the build stopped.*No space left"):
        build(some(3), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def write_ntu(folder, n, bad=()):
    "n small NTU files of two frames; the bad ones are cut off."
    folder.mkdir()
    for i in range(n):
        rng, lines = np.random.default_rng(i), ["2"]
        for _ in range(2):
            lines += ["1", "72057594037931101 0 1 1 1 1 0 0.02 0.2 2", "25"]
            lines += [" ".join(f"{x:.6f}" for x in rng.normal(size=11)) + " 2" for _ in range(25)]
        text = "\n".join(lines[: 9 if i in bad else None]) + "\n"
        (
            folder
            / f"S002C{i % 3 + 1:03d}P{i % 40 + 1:03d}R{i // 40 % 99 + 1:03d}A{i // 3960 * 3 + i % 3 + 1:03d}.skeleton"
        ).write_text(text)
    return folder


FILES_BUILD = """
import sys
from stf.clips import open_clips
from stf.dataset import ClipStore
if __name__ == "__main__":
    source, folder, workers = sys.argv[1:]
    print("go", flush=True)
    ClipStore.build(open_clips(source), folder, progress=False, workers=int(workers))
"""


def test_files_are_built_the_same_in_any_number_of_processes(tmp_path):
    source = write_ntu(tmp_path / "raw", 200, bad=(5, 150))
    one = build(open_clips(source), tmp_path / "one")
    assert (
        len(one) == 198
        and "line 9" in one.refused["place"][0]
        and one.refused["path"][1].startswith(str(source))
    )
    build(open_clips(source), tmp_path / "two", workers=2)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert files_of(build(str(source), tmp_path / "three").folder) == files_of(tmp_path / "one")  # a path will do
    shutil.rmtree(tmp_path / "three")
    with pytest.raises(ClipError, match="line 9"):
        build(open_clips(source), tmp_path / "three", strict=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "raw", "two"]


def test_a_killed_build_of_files_goes_on_where_it_was(tmp_path, monkeypatch):
    import stf.build as building

    source = write_ntu(tmp_path / "raw", 200)
    whole = build(open_clips(source), tmp_path / "whole")
    saved, save = [], building.save_shard

    def power_cut(shard, path):
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(shard, path)
        saved.append(path.name)

    monkeypatch.setattr(building, "save_shard", power_cut)
    with pytest.raises(KeyboardInterrupt):
        build(open_clips(source), tmp_path / "s")
    assert (tmp_path / "s.partial").exists() and not (tmp_path / "s").exists()
    with pytest.raises(StoreError, match="an unfinished build lies in"):
        ClipStore(tmp_path / "s")
    monkeypatch.setattr(
        building, "save_shard", lambda shard, path: (saved.append(path.name), save(shard, path))
    )
    build(open_clips(source), tmp_path / "s")
    assert saved == [f"shard-{k:06d}" for k in range(4)]  # each was made once
    assert files_of(tmp_path / "s") == files_of(whole.folder) and not (tmp_path / "s.partial").exists()


def test_a_changed_input_starts_again(tmp_path, monkeypatch):
    import stf.build as building

    source = write_ntu(tmp_path / "raw", 100)
    monkeypatch.setattr(building, "join_shards", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(open_clips(source), tmp_path / "s")
    monkeypatch.undo()
    sorted(source.iterdir())[0].unlink()
    assert len(build(open_clips(source), tmp_path / "s")) == 99


def test_a_finished_build_of_the_same_files_is_opened(tmp_path):
    source = write_ntu(tmp_path / "raw", 70)
    build(open_clips(source), tmp_path / "s")
    before = (tmp_path / "s" / "header.json").stat().st_mtime_ns
    (tmp_path / "s.partial").mkdir()  # as if killed before it could clear away
    assert len(build(open_clips(source), tmp_path / "s")) == 70
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["raw", "s"]
        and (tmp_path / "s" / "header.json").stat().st_mtime_ns == before
    )
    for change in ({"classes": [str(i) for i in range(120)]}, {"skip": ["S002C001P001R001A001"]}):
        with pytest.raises(StoreError, match="already exists"):
            build(open_clips(source), tmp_path / "s", **change)
    os.utime(sorted(source.iterdir())[3])
    with pytest.raises(StoreError, match="already exists"):
        build(open_clips(source), tmp_path / "s")
    assert len(build(open_clips(source), tmp_path / "s", overwrite=True)) == 70


@pytest.mark.skipif(sys.platform == "win32", reason="builds are not locked on Windows")
def test_two_builds_of_one_store_do_not_meet(tmp_path):
    import fcntl

    (tmp_path / "s.partial").mkdir()
    with open(tmp_path / "s.partial" / "lock", "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another build"):
            build(some(3), tmp_path / "s")
    assert len(build(some(3), tmp_path / "s")) == 3


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_killed_at_random_moments_until_it_is_done(tmp_path):
    source, rng = write_ntu(tmp_path / "raw", 1500, bad=(7,)), np.random.default_rng(0)
    begin = time.time()
    whole = build(open_clips(source), tmp_path / "whole")
    once, kills = time.time() - begin, 0
    while True:
        child = multiprocessing.get_context("fork").Process(
            target=build, args=(open_clips(source), tmp_path / "s")
        )
        child.start()
        child.join(120 if kills >= 20 else rng.uniform(0, 0.2) * once)
        if child.exitcode is not None:
            break
        child.kill()
        child.join()
        kills += 1
        assert kills < 25
    assert child.exitcode == 0 and kills > 3 and files_of(tmp_path / "s") == files_of(whole.folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "s", "whole"]


@pytest.mark.slow
def test_killed_with_workers_and_no_worker_stays_behind(tmp_path):
    source = write_ntu(tmp_path / "raw", 1500)
    whole = build(open_clips(source), tmp_path / "whole")
    command = [sys.executable, "-c", FILES_BUILD, str(source), str(tmp_path / "s"), "2"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not list(tmp_path.glob("s.partial/shard-*[0-9]")):  # until the workers are at work
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(1)
    shards = sorted(tmp_path.glob("s.partial/*"))
    time.sleep(1)
    assert shards == sorted(tmp_path.glob("s.partial/*"))  # nobody goes on writing
    build(open_clips(source), tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(whole.folder)


def test_clip_keeps_its_rows_only(tmp_path):
    late = np.zeros((2, 100, 25, 3), np.float32)
    late[0], late[1, 40:45] = 1, 2
    tracks, joints, _ = pack_clip(Clip(late, name="late", label=0))
    assert tracks[:, :2].tolist() == [[0, 100], [40, 5]] and len(joints) == 105


# ---------------------------------------------------------------- views


def test_a_view_is_a_store_of_its_clips(tmp_path):
    clips = some(30, split={"mine": "train"}, class_name=None)
    store = build(clips, tmp_path / "s", classes=["run", "hop", "sit"])
    picks = np.array([20, 3, 3, 11])
    view = store.subset(picks)
    assert len(view) == 4 and view.names == [store.names[i] for i in picks] and view.classes == store.classes
    for i, n in enumerate(picks):
        assert np.array_equal(view[i].joints, clips[n].joints) and view[i].label == clips[n].label and view[i].split == {"mine": "train"}
    for stream in STREAMS:
        assert torch.equal(view.batch([3, 0], stream, length=9).x, store.batch([11, 20], stream, length=9).x)
    assert torch.equal(view.to("cpu").batch([3, 0], length=9).x, store.batch([11, 20], length=9).x)
    assert view._on_device.joints.shape[0] == sum(c.joints.shape[0] * c.joints.shape[1] for c in view)
    again = pickle.loads(pickle.dumps(view))
    assert again.header == view.header and torch.equal(again.batch([1], length=5).x, view.batch([1], length=5).x)
    inner = view.subset([2, 0])  # a view of a view
    assert inner.names == [store.names[3], store.names[20]] and np.array_equal(inner[1].joints, clips[20].joints)
    assert torch.equal(store.subset(np.arange(30) % 2 == 1).batch([0]).x, store.batch([1]).x)
    assert len({v.header["checksum"] for v in (store, view, inner, store.subset([3, 20, 3, 11]), store.subset(range(30)))}) == 5
    with pytest.raises(IndexError, match="from 0 to 29"):
        store.subset([30])


def test_class_subsets_and_label_maps(tmp_path):
    store = build(some(30, class_name=None), tmp_path / "s", classes=["run", "hop", "sit"])
    two = store.subset(classes=["sit", "run"])
    assert two.classes == ["sit", "run"] and len(two) == 20 and set(two.labels) == {0, 1}
    assert all(two[i].class_name == two.classes[two.labels[i]] and two[i].label == two.labels[i] for i in range(20))
    assert store.subset(classes="hop").classes == ["hop"] and two.subset(classes=[1]).classes == ["run"]
    assert store.subset(range(9), classes=["run"]).names == ["clip 0", "clip 3", "clip 6"]
    moved = store.relabel({"run": "moving", 1: "moving"})
    assert moved.classes == ["moving", "sit"] and np.bincount(moved.labels).tolist() == [20, 10]
    assert moved.classes == store.relabel(["moving", "moving", "sit"]).classes
    fixed = store.relabel({"hop": None}, classes=["lie", "sit", "run"])
    assert len(fixed) == 20 and fixed.classes == ["lie", "sit", "run"] and set(fixed.labels) == {1, 2}
    kept = build(moved, tmp_path / "moved")  # a view built into a store keeps its classes and their order
    assert kept.classes == moved.classes and np.array_equal(kept.labels, moved.labels)
    assert build(two, tmp_path / "two").classes == ["sit", "run"]
    train, val = validation_split(two, range(20), by="clip", part=0.2)
    assert len(train) == 16 and len(fraction(two, train, 0.5, stratified=True)) == 8
    for wrong, message in (
        (lambda: store.subset(classes=["ran"]), "no class 'ran'.*did you mean 'run'"), (lambda: store.subset(classes=[3]), "no class 3"),
        (lambda: store.subset(classes=["run", 0]), "named twice"), (lambda: store.relabel(["a"]), "each of the 3 classes"),
        (lambda: store.relabel({0: "x"}, classes=["y"]), "'x' is not in the given list"),
        (lambda: store.relabel([None, None, None]), "no clip is left"), (lambda: store.subset([0], classes=["hop"]), "no clip is left"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            wrong()


def test_a_store_is_an_input_of_open_clips(tmp_path):
    clips = some(100, tags={"subject": 3})
    store = build(clips, tmp_path / "s")
    opened = open_clips(tmp_path / "s")
    assert "a prepared store" in opened.summary and "100 clips" in opened.summary and len(opened) == 100
    assert np.array_equal(opened[7].joints, clips[7].joints) and opened[7].tags == {"subject": 3}
    assert pickle.loads(pickle.dumps(opened)).parse(7, opened.read(7)).name == "clip 7"  # as a worker process does it
    again = build(tmp_path / "s", tmp_path / "t")
    for name in ("joints.npy", "tracks.npy", "visible.npy", "names.json", "tags.jsonl"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()
    assert again.header["checksum"] == store.header["checksum"]
    (tmp_path / "s" / "tracks.npy").unlink()
    with pytest.raises(ClipError, match="tracks.npy: is missing"):
        open_clips(tmp_path / "s")


# ---------------------------------------------------------------- batches made ahead


def test_batches_made_ahead_are_those_of_batch(tmp_path):
    store = build(some(50), tmp_path / "s")
    groups = np.array_split(np.random.default_rng(0).permutation(50), 9)
    options = dict(stream="bone", length=20, augment=Augment(rotate=10, crop=0.5), seed=(1, 4))
    wanted = [store.batch(g, **options) for g in groups]
    before = threading.active_count()
    for prefetch in (0, 1, 2, 20):
        batches = store.batches(groups, prefetch, **options)
        assert len(batches) == 9
        got = list(batches)
        assert len(got) == 9 and all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(got, wanted))
    assert list(store.batches([])) == [] and threading.active_count() == before


def test_a_training_that_stops_stops_the_thread(tmp_path):
    store = build(some(50), tmp_path / "s")
    groups, before = [[i] for i in range(50)], threading.active_count()
    with store.batches(groups) as batches:
        next(batches)
    assert not batches.thread.is_alive() and list(batches) == []
    for _ in store.batches(groups):  # nobody holds the iterator after the loop
        break
    with pytest.raises(ZeroDivisionError):
        for _ in store.batches(groups):
            1 / 0
    sys.last_traceback = sys.last_value = None
    for _ in range(100):
        gc.collect()
        if threading.active_count() == before:
            break
        time.sleep(0.05)
    assert threading.active_count() == before


def test_an_error_in_the_thread_names_the_clips(tmp_path, monkeypatch):
    store = build(some(30), tmp_path / "s")
    real = store.batch

    def broken(indices, **options):
        if 12 in indices:
            raise OSError(5, "Input/output error", "joints.npy")
        return real(indices, **options)

    monkeypatch.setattr(store, "batch", broken)
    for prefetch in (0, 2):
        batches = store.batches(np.arange(30).reshape(3, 10), prefetch)
        next(batches)
        with pytest.raises(StoreError, match=r"batch 1 \(clips clip 10, clip 11, clip 12, clip 13, clip 14 and 5 others\): OSError.*joints.npy"):
            next(batches)
        assert list(batches) == []
    with pytest.raises(IndexError, match="from 0 to 29"):
        store.batches([[0], [30]])
    with pytest.raises(ValueError, match="prefetch"):
        store.batches([[0]], prefetch=-1)


# ---------------------------------------------------------------- full disks and odd places


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here to act as a full disk")
@pytest.mark.parametrize("full_at", ["shard-000002", "joints.npy", "header.json"])
def test_a_build_goes_on_after_the_disk_was_full(tmp_path, monkeypatch, full_at):
    import stf.build as building

    source, real = write_ntu(tmp_path / "raw", 200), open
    whole = build(open_clips(source), tmp_path / "whole")
    full = lambda path, mode="r", *a: real("/dev/full", mode) if "w" in mode and full_at in str(path) else real(path, mode, *a)
    monkeypatch.setattr(building, "open", full, raising=False)
    with pytest.raises(StoreError, match=r"No space left.*build again; what is finished is kept in .*s\.partial"):
        build(open_clips(source), tmp_path / "s")
    assert len(list((tmp_path / "s.partial").glob("shard-*[0-9]"))) >= 2 and not (tmp_path / "s").exists()
    monkeypatch.undo()
    build(open_clips(source), tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(whole.folder) and not (tmp_path / "s.partial").exists()


def test_a_short_write_says_how_much_room_there_is(tmp_path, monkeypatch):
    "numpy's own error for a full disk has neither a number nor a reason (found on a real one)."

    def short(*args, **more):
        raise OSError("16384 requested and 4096 written")

    monkeypatch.setattr(np, "save", short)
    with pytest.raises(StoreError, match="16384 requested and 4096 written .*MB are free there"):
        build(some(3), tmp_path / "s")


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="the build stopped at .*file"):
        build(some(3), tmp_path / "file" / "store")
    with pytest.raises(ClipError, match="nowhere"):
        build(str(tmp_path / "nowhere"), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_bad_recordings_among_good_ones_are_named(tmp_path):
    "Plain recordings of one's own: NaN, no frame, no body and the wrong visibility are refused one by one; other joints stop the build."
    raw = tmp_path / "raw"
    raw.mkdir()
    write = lambda name, joints, **more: np.savez(raw / f"{name}.npz", joints=joints.astype(np.float32), label=more.pop("label", 0), **more)
    for i in range(3):
        write(f"good{i}", np.ones((4, 25, 3)) * (i + 1), label=i % 2)
    nan = np.ones((4, 25, 3))
    nan[2, 7, 1] = np.nan
    write("nan", nan)
    write("none", np.ones((0, 25, 3)))
    write("empty", np.zeros((4, 25, 3)))
    write("seen", np.ones((4, 25, 3)), visible=np.full((4, 25), 2, np.float32))
    write("minus", np.ones((4, 25, 3)), label=-1)
    (raw / "text.npz").write_text("no archive")
    store = build(raw, tmp_path / "s")
    table = {Path(r.path).stem: f"{r.place}: {r.reason}" for r in store.refused.itertuples()}
    assert store.names == ["good0", "good1", "good2"] and sorted(table) == ["empty", "minus", "nan", "none", "seen", "text"]
    for name, said in (("nan", "frame 2, joint 7.*not a finite"), ("none", "none of them 0"), ("empty", "no body"), ("seen", "0..1"), ("minus", "label")):
        assert re.search(said, table[name]), table[name]
    write("kinect", np.ones((4, 20, 3)))
    with pytest.raises(StoreError, match="'good0' and 'kinect' differ in skeleton .ntu25 and kinect20."):
        build(raw, tmp_path / "t")
    (raw / "kinect.npz").unlink()
    with pytest.raises(StoreError, match="classes has 1 names"):
        build(open_clips(raw), tmp_path / "t", classes=["only"])
    assert not list(tmp_path.glob("t*"))


@pytest.mark.slow
def test_a_large_build_is_bounded_and_killed_again_and_again_ends_the_same(tmp_path):
    "6,000 simulated clips: memory far below their size; killed three times, twice with workers, the same bytes."
    code = ("import re, sys\nfrom stf.build import SimulatedClips\nfrom stf.dataset import ClipStore\n"
            "if __name__ == '__main__':\n"
            "    ClipStore.build(SimulatedClips(6000), sys.argv[1], skip=(), progress=False, workers=int(sys.argv[2]))\n"
            "    print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n")  # its own peak: ru_maxrss would count the parent's  # fmt: skip
    start = lambda name, workers: subprocess.Popen([sys.executable, "-c", code, str(tmp_path / name), str(workers)], stdout=subprocess.PIPE)
    whole = start("whole", 0)
    assert int(whole.communicate()[0]) < 600_000  # kB; the rows alone are 190 MB, torch's libraries the rest
    for shards, workers in ((20, 0), (50, 2), (80, 1)):
        process = start("s", workers)
        while len(list(tmp_path.glob("s.partial/shard-*[0-9]"))) < shards and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        time.sleep(0.5)
    assert start("s", 0).wait() == 0 and files_of(tmp_path / "s") == files_of(tmp_path / "whole")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_the_same_on_cuda(tmp_path):
    store = build(some(30), tmp_path / "s")
    for preprocess in ("paper", "msg3d"):
        for stream in STREAMS:
            here = store.to(None).batch(range(30), stream, preprocess, length=20).x
            sent = store.batch(range(30), stream, preprocess, length=20, device="cuda").x
            there = store.to("cuda").batch(range(30), stream, preprocess, length=20).x
            assert there.device.type == "cuda" and torch.equal(sent, there)
            torch.testing.assert_close(here, there.cpu(), atol=1e-5, rtol=1e-5)
