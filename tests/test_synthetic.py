"Synthetic clips: bodies, a known answer, genuine files, bytes that depend on the config alone."

import hashlib
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.clips import open_clips
from stf.people import make_person
from stf.skeleton import SKELETONS
from stf.synthetic import (ACTIONS, SyntheticConfig, example_clips, perform, read_action_masks,
                           record, write_synthetic)  # fmt: skip

NTU, CLEAN = SKELETONS["ntu25"], SyntheticConfig(noise=0, occlusion=0, false_bodies=0)
ONE = SyntheticConfig(actions=(23,), subjects=(1,), cameras=(1,))


def bone_lengths(joints):
    ends = [(joints[..., i, :], joints[..., j, :]) for i, j in NTU.bones]
    return np.stack([np.linalg.norm(a - b, axis=-1) for a, b in ends], -1)


def at(joints, *names):
    return [joints[..., NTU.index(n), :] for n in names]


def far(a, b):
    return np.linalg.norm(a - b, axis=-1)


def write(folder, config, **changes):
    return write_synthetic(folder, replace(config, **changes), progress=False)


# ---- bodies


def test_performances_move_as_people_do():
    "Lengths of real clips (36 to 147 frames, median 67), speeds without jumps, feet on the floor."
    lengths = []
    for key in product(ACTIONS, (1, 3, 7, 11), (1, 2)):
        joints = perform(*key, seed=3).joints
        assert joints.shape == (ACTIONS[key[0]].people, joints.shape[1], 25, 3)
        lengths.append(joints.shape[1])
        speed = far(joints[:, 1:], joints[:, :-1]) * 30
        assert speed[..., [5, 9]].max() < 14 and speed[..., [0, 1, 20, 2, 3]].max() < 5, key
        assert speed.max() < 30, key
        feet = np.stack(at(joints[..., 1:2], "left foot", "right foot"))
        assert feet.min() > 0 and (feet.min(0).max() > 0.08) == (key[0] in (26, 27)), key
    assert min(lengths) >= 25 and max(lengths) <= 200 and 50 <= np.median(lengths) <= 90


def test_hands_meet_and_touch_and_a_shoe_comes_off_backwards():
    for p in range(1, 9):
        assert far(*perform(58, p).joints[:, :, NTU.index("right hand")]).min() < 0.2
        for action, joint in ((44, "head"), (47, "neck")):
            body = perform(action, p).joints[0]
            left, right, goal = at(body, "left hand", "right hand", joint)
            assert min(far(left, goal).min(), far(right, goal).min()) < 0.2, (action, p)
    on, off = (perform(a, 1, style=0.0).joints[0] for a in (16, 17))
    hands = lambda x: np.stack(at(x, "left wrist", "right wrist"), 1) - x[:, :1]
    path = lambda x: hands(x)[np.linspace(0, len(x) - 1, 40).round().astype(int)]
    forwards, backwards = (np.abs(path(on) - way).mean() for way in (path(off), path(off)[::-1]))
    assert backwards < 0.04 < forwards


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(ACTIONS)), st.integers(1, 999), st.integers(1, 9),
       st.integers(0, 10**6), st.floats(0, 2))  # fmt: skip
def test_any_performance_is_a_body(action, subject, repetition, seed, style):
    joints = perform(action, subject, repetition, seed, style).joints
    assert np.isfinite(joints).all() and np.ptp(bone_lengths(joints), axis=1).max() < 1e-9
    assert joints[..., 1].min() > -0.05 and joints[..., 1].max() < 3.2


def test_motion_is_the_one_that_the_shipped_weights_were_trained_on():
    "To a micrometre, since the last bits of a sine differ between processors."
    found = hashlib.sha256()
    for a in ACTIONS:
        for args in ((1,), (5, 2), (8, 1, 3, 0.5), (40, 3, 17, 2.0)):
            joints = np.round(1e6 * perform(a, *args).joints).astype("<i8")
            found.update(f"{a} {args} {joints.shape}".encode() + joints.tobytes())
    known = "ac458862bf78cb76f5f23e91cc63af6926617a1cd1e3e5d326e4d43fcd164d3a"
    assert found.hexdigest() == known


# ---- the known answer


def limbs(mask):
    "Whole arms and legs that act at any time in a mask (T,25), and what else does."
    names, found = {NTU.joints[v] for v in np.flatnonzero(mask.any(0))}, set()
    for limb, joints in (("arm", ("elbow", "wrist", "hand", "hand tip", "thumb")),
                         ("leg", ("knee", "ankle", "foot"))):  # fmt: skip
        for side in ("left", "right"):
            if (whole := {f"{side} {j}" for j in joints}) <= names:
                found, names = found | {f"{side} {limb}"}, names - whole
    return found | names


ARMS, LEGS = {"left arm", "right arm"}, {"left leg", "right leg"}
SHOE = [ARMS | {leg} for leg in LEGS]
HIPS, SEAT = {"spine base", "left hip", "right hip"}, {"left knee", "right knee"}
ONE_ARM = [{"left arm"}, {"right arm"}]
LIMBS = {  # action: sets of limbs of the first body, one of which acts
    6: [{a, "spine mid", "spine shoulder"} for a in ARMS], 7: ONE_ARM, 8: [HIPS | SEAT],
    9: [HIPS | SEAT], 10: [ARMS], 16: SHOE, 17: SHOE, 23: ONE_ARM,
    24: [{leg} for leg in LEGS], 26: [{leg} for leg in LEGS], 27: [HIPS | LEGS],
    31: ONE_ARM, 44: [*ONE_ARM, ARMS], 47: [*ONE_ARM, ARMS], 50: ONE_ARM, 52: [*ONE_ARM, ARMS],
    55: [ARMS], 58: [{"right arm"}], 59: [LEGS], 60: [LEGS],
}  # fmt: skip


@pytest.mark.parametrize("action", ACTIONS)
def test_acting_limbs_are_those_that_one_would_name(action):
    "And they move more than the rest: away from the spine, or the pelvis with them."
    for subject in range(1, 9):
        joints, mask = perform(action, subject)
        assert mask.shape == joints.shape[:3] and mask.dtype == bool
        first, *second = (limbs(m) for m in mask)
        assert not mask[:, 0].any() and (action == 6 or not mask[:, -1].any())  # at rest
        assert first in LIMBS[action], (action, first)
        assert second in ([], [first if action in (55, 58, 59, 60) else set()]), action
        for body, m in zip(joints, mask):
            if not m.any():
                continue
            if action in (8, 9, 26, 27, 59, 60):
                speed = np.linalg.norm(np.gradient(body[:, 0], axis=0), axis=-1)
                assert speed[m.any(1)].mean() > 2.5 * speed[~m.any(1)].mean(), subject
            else:
                away = far(body - body[:, :1], body[:1] - body[:1, :1])
                others = m.any(1, keepdims=True) & ~m
                factor = 1.2 if action in (6, 16, 17) else 2.0  # who bows moves the head, too
                assert away[m].mean() > factor * away[others].mean(), subject


def test_a_kick_acts_at_its_height_and_a_touch_while_it_is_held():
    for p in range(1, 9):
        (kick, *_), (mask, *_) = perform(24, p)
        feet = np.stack(at(kick, "left foot", "right foot"), 1)[..., 1]
        t, side = np.unravel_index(feet.argmax(), feet.shape)
        assert mask[t, NTU.index(("left foot", "right foot")[side])], p
        (body, *_), (mask, *_) = perform(44, p)
        for hand in ("left hand", "right hand"):
            near, acts = far(*at(body, hand, "head")) < 0.19, mask[:, NTU.index(hand)]
            assert acts.any() == near.any() and (not near.any() or acts[near].mean() > 0.7), p


def test_left_handers_act_with_their_left():
    left = [p for p in range(1, 60) if make_person(np.random.default_rng([0, 1, p])).hand < 0]
    sides = [limbs(perform(23, p).acting[0]) for p in left]
    assert sides.count({"left arm"}) > 0.7 * len(left) > 3 and len(left) < 18
    assert make_person(np.random.default_rng(0), style=0).hand == 1


def test_masks_and_recordings_survive_writing_and_reading(tmp_path):
    "With left-handers, false bodies, and missing ones that come in another order."
    config = SyntheticConfig(subjects=(1, 2, 3), cameras=(1, 3), false_bodies=0.6,
                             missing_bodies=0.6, seed=1, setup=7)  # fmt: skip
    write(tmp_path, config)
    clips, swapped, false = list(open_clips(tmp_path)), 0, 0
    for clip, mask in zip(clips, read_action_masks(tmp_path, clips)):
        action, subject, camera = (clip.tags[k] for k in ("action", "subject", "camera"))
        seen, done = record(action, subject, 1, camera, config), perform(action, subject, 1, 1)
        order = [seen.ids.index(int(b)) for b in clip.tags["bodies"]]
        joints = (seen.joints * seen.present[..., None, None])[order]
        np.testing.assert_allclose(clip.joints, joints, atol=1e-5)
        assert clip.tags["setup"] == 7 and clip.label == action - 1
        np.testing.assert_array_equal(mask, (seen.acting & seen.present[..., None])[order])
        M = len(done.acting)  # a false body carries nothing
        assert np.array_equal(seen.acting[:M], done.acting) and not seen.acting[M:].any()
        swapped, false = swapped + (order == [1, 0]), false + (M < len(order))
    assert len(clips) == 120 and swapped > 1 and false > 10


@pytest.mark.parametrize("old, new", [
    ("right wrist", "tail"), ("A023,7", "A023,8"), (",right", ",1000,right"), ("A023,", "A024,"),
    ("\n", "\n\n"),
])  # fmt: skip
def test_a_table_that_does_not_fit_is_refused(tmp_path, old, new):
    write(tmp_path, ONE)
    table, clip = tmp_path / "action_joints.csv", open_clips(tmp_path)[0]
    table.write_text(table.read_text().replace(old, new))
    if old == "\n":
        assert read_action_masks(tmp_path, [clip])[0].any()
    else:
        with pytest.raises(ValueError, match=f"action_joints.csv.*{clip.name}"):
            read_action_masks(tmp_path, [clip])


def test_the_examples_carry_the_same_answer():
    examples, actions = example_clips(), (10, 23, 24, 44, 47, 58)
    names = sorted((p, r, a) for a in actions for p in range(1, 13) for r in (1, 2))
    for (p, r, a), joints in zip(names, examples.joints):
        mask = perform(a, p, r).acting.any(1)
        assert np.array_equal(joints[: len(mask)], mask) and not joints[len(mask) :].any()


# ---- cameras and sensor


def test_cameras_are_rigid_and_stand_around_the_room():
    "Hips stand across the view of the camera faced, at 45 degrees for camera 1, 90 for the other."
    for repetition, front in ((1, 3), (2, 2)):
        angles = {c: [] for c in (1, 2, 3)}
        for p, c in product(range(1, 9), angles):
            seen, world = record(31, p, repetition, c, CLEAN).joints, perform(31, p, repetition)
            right, left, head, foot = at(seen, "right hip", "left hip", "head", "left foot")
            across = (right - left)[0, 0]
            angles[c].append(np.degrees(np.arctan2(abs(across[2]), across[0])))
            assert np.allclose(bone_lengths(seen), bone_lengths(world.joints), atol=1e-12)
            assert 2.0 < seen[..., 2].min() and seen[..., 2].max() < 5.0
            assert (head[..., 1] > foot[..., 1] + 1).all()
        mean = {c: np.mean(a) for c, a in angles.items()}
        assert mean[front] < 20 and 30 < mean[1] < 60 and mean[5 - front] > 70


def test_sensor_statistics():
    "Rates of real files: 12 % of joints inferred, few lost, hands worse than the spine."
    clips = [record(a, p, 1, c) for a in ACTIONS for p in (1, 2, 3) for c in (1, 2, 3)]
    state = np.concatenate([s.state[s.present] for s in clips])
    assert 0.07 < (state == 1).mean() < 0.16 and 0 < (state == 0).mean() < 0.01
    assert (state[:, [7, 11]] == 1).mean() > 10 * (state[:, [0, 1, 20]] == 1).mean()
    exact = record(31, 1, config=CLEAN)
    assert (exact.state == 2).all() and exact.present.all()
    noisy = replace(CLEAN, noise=1.0)
    error = [record(31, p, config=noisy).joints[0] - record(31, p, config=CLEAN).joints[0]
             for p in range(1, 7)]  # fmt: skip
    error = np.std(np.concatenate(error), axis=(0, 2))
    assert error[7] > 2 * error[1] and error[1] < 0.012 < error[21]


def test_false_and_missing_bodies_can_be_had():
    certain = SyntheticConfig(false_bodies=1.0, missing_bodies=1.0)
    false = [record(10, p, config=certain).present for p in range(1, 9)]
    assert all(len(p) == 2 and p[0].all() and p[1].any() for p in false)
    assert not all(p[1].all() for p in false)
    for p in range(1, 9):
        present = record(58, p, config=certain).present
        assert not present.all() and present.any(0).all() and present.any(1).all()
    assert len(record(10, 1, config=CLEAN).joints) == 1


# ---- files


def test_text_is_ntus(tmp_path):
    "Read by an independent reader: IDs, 25 rows of 12 in each body, pixels of a pinhole."
    config = SyntheticConfig((58,), (3,), cameras=(1,), missing_bodies=1.0)
    (path,), seen = write(tmp_path, config), record(58, 3, 1, 1, config)
    assert path.read_text().endswith("\n")
    lines = iter(path.read_text().splitlines())
    assert int(next(lines)) == seen.present.shape[1]
    for t, there in enumerate(seen.present.T):
        assert int(next(lines)) == there.sum()
        for m in np.flatnonzero(there):
            head = next(lines).split()
            assert len(head) == 10 and head[0] == str(seen.ids[m]) and next(lines) == "25"
            rows = np.array([next(lines).split() for _ in range(25)], float)  # (25,12)
            np.testing.assert_allclose(rows[:, :3], seen.joints[m, t], atol=1e-5)
            np.testing.assert_array_equal(rows[:, 11], seen.state[m, t])
            tracked = rows[:, 11] > 0
            u = 258.0 + 366.0 * rows[tracked, 0] / rows[tracked, 2]
            np.testing.assert_allclose(rows[tracked, 3], u, atol=0.02)
            assert (rows[tracked, 3:5] > 0).all() and (rows[~tracked, :7] == 0).all()
    assert next(lines, None) is None and {*seen.present.sum(0)} == {1, 2}


def test_same_bytes_twice_in_a_subset_and_in_parts(tmp_path):
    whole = SyntheticConfig(actions=(7, 10, 55), subjects=(1, 3), seed=5)
    files = lambda name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
    write(tmp_path / "a", whole)
    np.random.seed(1)
    for part in ((7,), (10, 55), (7,)):  # the rows of others are kept in the table
        write(tmp_path / "b", whole, actions=part)
    write(tmp_path / "c", whole, actions=(55, 10), subjects=(3,), cameras=(2,))
    (other,) = write(tmp_path / "d", ONE, actions=(10,), subjects=(3,), cameras=(2,), seed=6)
    a, b, c = map(files, "abc")
    assert len(a) == 19 and a == b and len({*a.values()}) == 19  # nothing half-written stays
    assert other.read_bytes() != a[other.name]
    rows = c.pop("action_joints.csv").splitlines()
    assert {*rows} < {*a.pop("action_joints.csv").splitlines()} and c.items() < a.items()
    lengths = {name[8:]: text.split(b"\n")[0] for name, text in a.items()}  # but for the camera
    assert all(text.startswith(lengths[name[8:]] + b"\n") for name, text in a.items())


@pytest.mark.parametrize("wrong, message", [
    (dict(actions=(1,)), "actions must be"), (dict(actions=()), "actions must be"),
    (dict(cameras=(4,)), "cameras must be"), (dict(subjects=(1, 1)), "subjects must be"),
    (dict(subjects=(0,)), "subjects must be"), (dict(noise=-1), "noise must be"),
    (dict(style=float("nan")), "style must be"), (dict(setup=0), "setup must be"),
    (dict(seed=-1), "seed"),
])  # fmt: skip
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**wrong)
    with pytest.raises(ValueError, match="no action 2"):
        perform(2, 1)
    with pytest.raises(ValueError, match="camera must be"):
        record(31, 1, camera=0)
