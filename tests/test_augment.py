"Augmentation, time and preprocessed clips: what notebooks 12b and 13 can't show: random clips, both presets, both kinds of bodies."

import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.augment import USES, Augment, augment_joints, blend_frames, choose_frames, mirror_joints, random_numbers
from stf.batches import STREAMS, make_batch, pack_clips
from stf.clips import Clip, open_clips
from stf.dataset import ClipStore, StoreError
from stf.skeleton import SKELETONS, Skeleton

NTU, FLAT = SKELETONS["ntu25"], SKELETONS["openpose18"]
ALL = Augment(rotate=30, scale=0.2, flip=0.5, crop=0.5, drop_joints=0.2, drop_bodies=0.3)
UNIFORM = Augment(rotate=30, flip=0.5, uniform=True, crop=0.7)


def clip(seed=0, M=2, T=20, skeleton=NTU, C=3, name=None, gaps=True):
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


def some(n=6, **more):
    return [clip(i, 1 + i % 3, 3 + 11 * i, **more) for i in range(n)]


# ---------------------------------------------------------------- random numbers


def test_random_numbers_are_a_function_of_seed_clip_and_use():
    a = random_numbers((3, 4), range(50), "flip", 9)
    assert np.array_equal(a[[7, 3]], random_numbers((3, 4), [7, 3], "flip", 9))
    assert np.array_equal(a[:, :2], random_numbers((3, 4), range(50), "flip", 2))
    others = [random_numbers(s, range(50), u, 9) for s, u in (((3, 5), "flip"), ((4, 3), "flip"), (3, "flip"), ((3, 4), "crop"))]
    assert all(not np.isclose(a, b).any() for b in others) and (0 <= a).all() and (a < 1).all()
    assert len(set(USES)) == len(USES)


def test_random_numbers_stay_what_they_were():
    "A resumed training must draw what the first half would have drawn, under any version of numpy."
    known = random_numbers((0, 1), [7, 56_577], "rotate", 2)
    assert (known * 2**53).astype(np.int64).tolist() == KNOWN


KNOWN = [[8003000684090580, 1690031520436857], [6970632386416283, 8699534651967880]]


def test_the_choices_are_as_likely_as_they_say():
    x, w = torch.ones(4000, 2, 1, 5, 3), torch.ones(4000, 2, 1, 5)
    body = Skeleton("b", ("hip", "left hand", "right hand", "left foot", "right foot"), ((1, 0), (2, 0), (3, 0), (4, 0)), 0, (1, 0))
    flipped = augment_joints(x, w, body, Augment(flip=0.3), 0, range(4000))[0][:, 0, 0, 0, 0] < 0
    assert abs(flipped.float().mean() - 0.3) < 0.03
    kept = augment_joints(x, w, body, Augment(drop_joints=0.25), 0, range(4000))[1]
    assert abs(kept.mean() - 0.75) < 0.02
    kept = augment_joints(x, w, body, Augment(drop_bodies=0.4), 0, range(4000))[1][:, :, 0, 0].sum(1)
    assert kept.min() == 1 and abs((kept == 2).float().mean() - 0.36) < 0.03
    scale = augment_joints(x, w, body, Augment(scale=0.2), 0, range(4000))[0][:, 0, 0, 0]
    assert abs(scale.mean() - 1) < 0.01 and scale.min() > 0.8 and scale.max() < 1.2 and abs(np.corrcoef(scale.T.numpy())[0, 1]) < 0.05


def test_wrong_augmentations_are_named():
    for wrong, word in ((dict(rotate=-1), "rotate"), (dict(scale=1), "scale"), (dict(flip=2), "flip"), (dict(crop=0), "crop"),
                        (dict(crop_least=0), "crop_least"), (dict(drop_joints=1), "drop_joints"), (dict(rotate="17"), "rotate"),
                        (dict(flip=True), "flip"), (dict(rotate=float("nan")), "rotate")):  # fmt: skip
        with pytest.raises(ValueError, match=word):
            Augment(**wrong)
    with pytest.raises(ValueError, match="uniform"):
        make_batch(clip(), time="resize", augment=Augment(uniform=True), seed=0)
    with pytest.raises(ValueError, match="time 'stretch' is not known"):
        make_batch(clip(), time="stretch")
    with pytest.raises(ValueError, match="seed"):
        make_batch(clip(), augment=ALL)
    plain = Skeleton("plain", ("a", "b"), ((1, 0),), 0, (1, 0))
    with pytest.raises(ValueError, match="'plain' has none"):
        make_batch(clip(skeleton=plain), augment=Augment(flip=0.5), seed=0)


# ---------------------------------------------------------------- batches


@pytest.mark.parametrize("preprocess", ["paper", "msg3d"])
@pytest.mark.parametrize("skeleton", [NTU, FLAT])
def test_off_means_untouched(preprocess, skeleton):
    clips = some(skeleton=skeleton, C=3 if skeleton is NTU else 2)
    for stream in STREAMS:
        plain = make_batch(clips, stream=stream, preprocess=preprocess, length=25).x
        assert torch.equal(plain, make_batch(clips, stream=stream, preprocess=preprocess, length=25, augment=Augment(), seed=None).x)
        least = Augment(crop_least=9)
        assert not least and torch.equal(plain, make_batch(clips, stream=stream, preprocess=preprocess, length=25, augment=least).x)


@pytest.mark.parametrize("preprocess", ["paper", "msg3d"])
@pytest.mark.parametrize("skeleton", [NTU, FLAT])
@pytest.mark.parametrize("time,augment", [("resize", ALL), ("repeat", ALL), ("repeat", UNIFORM), ("resize", None)])
def test_a_clip_is_the_same_in_any_batch(preprocess, skeleton, time, augment):
    clips = pack_clips(some(skeleton=skeleton, C=3 if skeleton is NTU else 2))
    options = dict(stream="bone", preprocess=preprocess, length=25, time=time, augment=augment, seed=(1, 2))
    whole = make_batch(clips, **options).x
    assert torch.isfinite(whole).all()
    for cut in ([0, 1, 2], [5], [4, 3]):
        assert torch.equal(make_batch(clips, cut, **options).x, whole[cut])
    if augment:
        assert not torch.equal(make_batch(clips, **{**options, "seed": (1, 3)}).x, whole)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 60), st.integers(1, 70), st.sampled_from(["repeat", "resize"]))
def test_what_is_missing_stays_missing(seed, M, T, length, time):
    c = clip(seed, M, T)
    augment = Augment(rotate=20, scale=0.1, flip=0.5, drop_joints=0.3, drop_bodies=0.5, crop=0.6)
    options = dict(length=length, num_bodies=M, time=time, seed=seed)
    plain = make_batch(c, augment=Augment(crop=0.6), **options).x[0]
    x = make_batch(c, augment=augment, **options).x[0]  # (C,T,V,M)
    assert set(x[3].unique().tolist()) <= {0.0, 1.0} and (x[:3].abs().sum(0)[x[3] == 0] == 0).all()
    assert (x[3] > 0).any() == (plain[3] > 0).any(), "somebody stays, if somebody was there"
    gone = plain[3][:, mirror_joints(NTU)].maximum(plain[3]) == 0  # neither the joint nor its mirror image
    assert (x[3][gone] == 0).all()


def test_rotation_keeps_lengths_and_flip_its_own_inverse():
    clips = some(skeleton=NTU)
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
    clips = [clip(i, gaps=False) for i in range(4)]
    options = dict(length=20, augment=Augment(rotate=40, scale=0.2, flip=0.5, crop=0.5), seed=(0, 1), time="resize")
    x = {s: make_batch(clips, stream=s, **options).x[:, :3] for s in STREAMS}
    bone = x["joint"] - x["joint"][:, :, :, NTU.parents]
    torch.testing.assert_close(x["bone"], bone, atol=1e-6, rtol=0)
    for s in ("joint", "bone"):
        after = torch.cat([x[s][:, :, 1:], x[s][:, :, -1:]], 2)
        torch.testing.assert_close(x[s + "-motion"], after - x[s], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- time


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 400), st.integers(1, 100), st.floats(0.05, 1), st.booleans(), st.integers(0, 99))
def test_frames_are_in_order_and_in_the_clip(n, T, crop, uniform, seed):
    augment = Augment(crop=crop, uniform=uniform)
    f = choose_frames([n], T, "repeat", augment, seed, [seed]).first[0]
    assert f.shape == (T,) and 0 <= f.min() and f.max() < n
    step = np.diff(f)
    assert ((step > 0) | (step < 0)).all() or n == 1 or len(set(f)) == 1  # never the same frame twice in a row, unless it is the only one
    assert (step < 0).sum() <= T // max(1, int(crop * n)) + 1  # falls back only where a repetition begins
    f = choose_frames([n], T, "resize", Augment(crop=crop), seed, [seed])
    place = f.first[0] + f.share[0]
    assert (np.diff(place) >= 0).all() and f.second.max() < n and (f.second - f.first <= 1).all()
    assert f.nearest.max() < n and 0 <= f.share.min() and f.share.max() < 1


def test_crops_are_as_long_as_they_say():
    f = choose_frames(np.full(3000, 100), 64, "resize", Augment(crop=0.5), 0, range(3000))
    lengths = (f.second[:, -1] - f.first[:, 0]).astype(float)
    assert 45 <= lengths.min() < 55 and lengths.max() > 95 and abs(lengths.mean() - 75) < 3
    assert f.first[:, 0].max() > 40 and (f.second[:, -1] > 95).mean() > 0.1
    f = choose_frames(np.full(100, 50), 64, "resize", Augment(crop=0.5, crop_least=64), 0, range(100))
    assert (f.first[:, 0] == 0).all() and (f.second[:, -1] == 49).all()


def test_resize_of_a_whole_clip_is_linear_interpolation():
    c = clip(3, 1, 30, gaps=False)
    x = make_batch(c, length=50, num_bodies=1, time="resize").x[0, :3, :, :, 0]
    whole = make_batch(c, length=30, num_bodies=1).x[0, :3, :, :, 0]
    wanted = torch.nn.functional.interpolate(whole.permute(0, 2, 1), size=50, mode="linear", align_corners=False).permute(0, 2, 1)
    torch.testing.assert_close(x, wanted, atol=1e-5, rtol=0)


def test_interpolation_never_mixes_in_a_missing_joint():
    x = torch.tensor([5.0, 0, 0, 7]).view(1, 1, 4, 1, 1).repeat(1, 1, 1, 1, 3)  # frames 5, –; then –, 7
    w = (x != 0).any(-1).float()
    for share in (0.2, 0.5, 0.8):
        y, v = blend_frames(x, w, torch.full((1, 2), share))
        assert y[0, 0, 0, 0].tolist() == ([5.0] * 3 if share <= 0.5 else [0.0] * 3)
        assert y[0, 0, 1, 0].tolist() == ([0.0] * 3 if share <= 0.5 else [7.0] * 3)
        assert torch.equal(v > 0, (y != 0).any(-1))


def test_msg3d_turns_alike_whatever_time_shows():
    "The pose that sets the rotation is the clip's, not the crop's: same frames, same numbers."
    c = clip(5, 2, 40)
    plain = make_batch(c, preprocess="msg3d", length=40).x[0]
    cropped = make_batch(c, preprocess="msg3d", length=40, augment=Augment(crop=0.5), seed=1).x[0]
    f = choose_frames([40], 40, "repeat", Augment(crop=0.5), 1, [0]).first[0]
    torch.testing.assert_close(cropped, plain[:, f], atol=1e-6, rtol=0)


# ---------------------------------------------------------------- preprocessed before


def test_preprocessed_arrays_are_taken_as_they_are(tmp_path):
    "Recordings → msg3d arrays in the public form → open_clips → a store → msg3d batches: the same numbers, in any stream."
    clips = [clip(i, 2, 20 + i, gaps=False) for i in range(4)]
    made = {s: make_batch(clips, stream=s, preprocess="msg3d").x.numpy() for s in ("joint", "bone")}
    np.save(tmp_path / "val_data_joint.npy", made["joint"])
    with open(tmp_path / "val_label.pkl", "wb") as f:
        pickle.dump(([c.name for c in clips], [c.label for c in clips]), f, protocol=2)
    store = ClipStore.build(open_clips(tmp_path), tmp_path / "store", progress=False)
    assert store.header["preprocessed"] == "msg3d" and store.packed.preprocessed == "msg3d"
    for stream, x in made.items():
        assert np.array_equal(store.batch(range(4), stream, "msg3d").x.numpy(), x)
    half = store.batch(range(4), "joint", "msg3d", length=150).x.numpy()
    assert np.array_equal(half, made["joint"][:, :, 1::2]), "sampled evenly from the 300"
    with pytest.raises(ValueError, match="preprocessed by 'msg3d' before.*'paper' can't be made.*use preprocess='msg3d'"):
        store.batch([0])
    assert torch.equal(store.subset([2]).batch([0], "joint", "msg3d").x, store.batch([2], "joint", "msg3d").x)
    with pytest.raises(StoreError, match="differ in preprocessed"):
        ClipStore.build([store[0], clip(9, 1)], tmp_path / "mixed", progress=False)
    again = ClipStore.build(store, tmp_path / "again", progress=False)
    assert again.header["preprocessed"] == "msg3d"


def test_config_fields_have_defaults_that_mean_off():
    assert not Augment(**{f.name: f.default for f in fields(Augment)})


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_variants_are_the_same_on_cuda():
    clips = pack_clips(some())
    for preprocess in ("paper", "msg3d"):
        for time, augment in (("resize", ALL), ("repeat", UNIFORM)):
            options = dict(preprocess=preprocess, length=25, time=time, augment=augment, seed=(1, 2))
            here, there = make_batch(clips, **options).x, make_batch(clips, device="cuda", **options).x
            torch.testing.assert_close(here, there.cpu(), atol=1e-5, rtol=1e-5)
            assert torch.equal(here != 0, there.cpu() != 0)


def test_prediction_traces_resized_clips_to_the_nearer_frame():
    "A network trained on resized clips: its focus goes back to the frames that it was shown."
    from stf.predict import trace_rows

    packed = pack_clips([clip(1, 1, 10, gaps=False), clip(2, 1, 40, gaps=False)])
    for preprocess in ("paper", "msg3d"):
        rows = trace_rows(packed, preprocess, 20, 1, time="resize")
        assert rows[:, 0].tolist() == [
            choose_frames([10], 20, "resize").nearest[0].tolist(), (10 + choose_frames([40], 20, "resize").nearest[0]).tolist()
        ]  # fmt: skip
