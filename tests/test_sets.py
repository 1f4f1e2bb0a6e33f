"""Small Kinect sets: real recordings of two, files in the form of the others, damaged ones."""

import io
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from scipy.io import savemat

from stf.clips import Clip
from stf.files import ClipError, Files
from stf.sets import SETS, open_set
from stf.skeleton import SKELETONS

KINECT = SKELETONS["kinect20"]
LABELS = "s01_e01\nwalk: 10 14 \nsitDown:  16 20\ncarry:  NaN NaN\n\n"


def write(folder, files):
    "Text or bytes in files {name: content} below a folder; the Files of it."
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(content)
    return Files(folder)


def lines(*rows, sep=" "):
    return "".join(sep.join(f"{x:g}" for x in row) + "\n" for row in rows)


def mat(skeleton, name="d_skel"):
    file = io.BytesIO()
    savemat(file, {name: skeleton})
    return file.getvalue()


def size(record, joint, other):
    "Median distance of two joints, in metres."
    a, b = (record["joints"][..., record["skeleton"].index(j), :] for j in (joint, other))
    return float(np.median(np.linalg.norm(a - b, axis=-1)))


def to_the_left(record, forward):
    "Whether the left shoulder is on a body's left, if it faces forward (…,3); Kinect's axes."
    s = record["skeleton"]
    across = [record["joints"][..., s.index(f"{side} shoulder"), :] for side in ("left", "right")]
    left = np.cross([0, 1, 0], forward)  # right-handed: up × forward
    return (((across[0] - across[1]) * left).sum(-1) > 0).mean()


def test_a_real_recording_of_ut_kinect(real_data):
    opened = open_set(Files(real_data / "ut-kinect"))
    assert opened.title == "UT-Kinect" and len(opened) == 10 and opened.about["classes"] == 10
    assert opened.names[1] == "s01_e01_sitDown" and opened.labels == [*range(10)]
    rows = np.loadtxt(real_data / "ut-kinect" / "joints_s01_e01.txt")
    record = opened.record(0)
    wanted = rows[(rows[:, 0] >= 252) & (rows[:, 0] <= 390)]
    assert len(np.unique(wanted[:, 0])) < len(wanted)  # repeated numbers are kept
    assert np.allclose(record["joints"][0], wanted[:, 1:].reshape(-1, 20, 3))
    assert record["tags"] == {"action": 1, "subject": 1, "take": 1} and record["split"] == {}
    assert record["skeleton"] == KINECT and record["class_name"] == "walk"
    push = opened.record(6)  # the person stands and faces the camera
    assert to_the_left(push, [0, 0, -1]) == 1 and 0.3 < size(push, "left hip", "left knee") < 0.55


def test_a_real_recording_of_sbu_is_two_upright_people_who_face_each_other(real_data):
    record = open_set(Files(real_data / "sbu" / "s01s02")).record(0)
    joints, s = record["joints"], record["skeleton"]
    assert joints.shape == (2, 45, 15, 3) and record["class_name"] == "approaching"
    assert record["split"] == {"fold1": "test", **{f"fold{k}": "train" for k in (2, 3, 4, 5)}}
    height = joints[:, :, s.index("head"), 1] - joints[:, :, s.index("left foot"), 1]
    assert 1.2 < height.min() and height.max() < 1.9
    for bone in (("left hip", "left knee"), ("left shoulder", "left elbow"), ("neck", "head")):
        assert 0.15 < size(record, *bone) < 0.55
    between = joints[1, :, s.index("torso")] - joints[0, :, s.index("torso")]
    between[:, 1] = 0
    assert np.linalg.norm(between[0]) > np.linalg.norm(between[-1])  # they approach
    assert to_the_left(record, np.stack([between, -between])) == 1


def test_utd_mhad_is_sorted_into_the_layout_of_kinect(tmp_path):
    skeleton = np.arange(20 * 3 * 4).reshape(20, 3, 4) / 100
    names = ("Skeleton/a27_s8_t4_skeleton.mat", "Skeleton/a1_s1_t1_skeleton.mat")
    opened = open_set(write(tmp_path, {names[0]: mat(skeleton), names[1]: mat(skeleton[..., 0])}))
    one, two = opened.record(0), opened.record(1)
    assert opened.names == ["a1_s1_t1", "a27_s8_t4"] and opened.labels == [0, 26]
    assert one["joints"].shape == (1, 1, 20, 3) and two["joints"].shape == (1, 4, 20, 3)
    for place, joint in enumerate(["head", "shoulder centre", "spine", "hip centre"]):
        assert np.allclose(two["joints"][0, :, KINECT.index(joint)], skeleton[place].T)
    assert np.allclose(two["joints"][0, :, KINECT.index("right foot")], skeleton[19].T)
    assert one["split"] == {"xsub": "train"} and two["split"] == {"xsub": "test"}
    assert one["class_name"] == "swipe left" and two["class_name"] == "squat"


def test_msr_action3d_is_sorted_too_and_has_three_subsets(tmp_path):
    text = lines(*([k, 1, 2, 0.5] for k in range(1, 21))) * 3
    files = {f"a{a:02d}_s0{s}_e01_skeleton3D.txt": text for a, s in ((6, 1), (9, 2))}
    files["a06_s01_e01_skeleton.txt"] = text  # pixels, of which nothing is read
    opened = open_set(write(tmp_path, files))
    one, two = map(opened.record, range(len(opened)))
    x = one["joints"][0, 2, :, 0]
    order = {"left shoulder": 1, "right shoulder": 2, "shoulder centre": 3, "hip centre": 7,
             "left elbow": 8, "right hand": 13, "left knee": 14, "right foot": 19, "head": 20}
    assert {joint: x[KINECT.index(joint)] for joint in order} == order
    assert one["joints"].shape == (1, 3, 20, 3) and one["label"] == 5
    assert one["split"] == dict.fromkeys(("xsub", "as1", "as3"), "train")
    assert two["split"] == dict.fromkeys(("xsub", "as2"), "test")
    (tmp_path / "pixels").mkdir()
    shutil.copy(tmp_path / "a06_s01_e01_skeleton.txt", tmp_path / "pixels")
    with pytest.raises(ClipError, match="fetch its MSRAction3DSkeletonReal3D"):
        open_set(Files(tmp_path / "pixels"))


def test_florence_is_one_file_in_millimetres(tmp_path):
    rows = [[1, 1, 3, *range(45)], [1, 1, 3, *range(45, 90)], [2, 10, 9, *range(45)]]
    path = tmp_path / "Florence_dataset_WorldCoordinates.txt"
    write(tmp_path, {path.name: lines(*rows) + "3 1 1 " + "0.5 " * 44 + "\n"})
    opened = open_set(Files(path))
    assert opened.names == ["video001", "video002", "video003"] and opened.labels == [2, 8, 0]
    one = opened.record(0)
    assert one["joints"].shape == (1, 2, 15, 3) and one["class_name"] == "answer phone"
    right_ankle = one["joints"][0, 1, one["skeleton"].index("right ankle")]
    assert np.allclose(right_ankle, [0.087, 0.088, 0.089])
    assert opened.record(1)["split"]["actor10"] == "test" and len(one["split"]) == 10
    with pytest.raises(ClipError, match="WorldCoordinates.txt: line 4: must be 48 finite numbers"):
        opened.record(2)  # the others are not lost with it


def test_a_set_in_an_archive_goes_to_another_process(tmp_path):
    rows = lines(*([t, *np.arange(60) + t] for t in (10, 12, 12, 14, 16, 20)))
    with zipfile.ZipFile(tmp_path / "ut.zip", "w") as z:
        z.writestr("UT/actionLabel.txt", LABELS)
        z.writestr("UT/joints/joints_s01_e01.txt", rows)
    opened = open_set(Files(tmp_path / "ut.zip"))
    again = pickle.loads(pickle.dumps(opened))
    assert again.names == ["s01_e01_walk", "s01_e01_sitDown"] and again.about["lost"] == 1
    assert again.record(0)["joints"].shape == (1, 4, 20, 3)  # two rows of frame 12
    assert again.where[0].endswith("ut.zip/UT/joints/joints_s01_e01.txt")
    Clip(**{k: v for k, v in again.record(1).items()})


def test_absent_bodies_of_sbu_stay_at_zero(tmp_path):
    one, none = np.full(45, 0.25), np.zeros(45)
    rows = lines([1, *one, *one], [2, *one, *none], sep=",")
    opened = open_set(write(tmp_path, {"s02s03/08/002/skeleton_pos.txt": rows}))
    record = opened.record(0)
    assert opened.names == ["s02s03_08_002"] and record["class_name"] == "punching"
    assert record["joints"].any((2, 3)).tolist() == [[True, True], [True, False]]
    assert np.allclose(record["joints"][0, 0, 0], [0.64, 0.48, 0.32])


GOOD = lines([10, *range(60)], [16, *range(60)])
BAD = {
    "no label file": ({"joints_s01_e01.txt": GOOD}, "actionLabel.txt is missing"),
    "no such recording": (
        {"joints_s02_e01.txt": GOOD, "actionLabel.txt": LABELS},
        "actionLabel.txt: lists no actions of s02_e01",
    ),
    "unknown action": (
        {"joints_s01_e01.txt": GOOD, "actionLabel.txt": "s01_e01\nfly: 1 2\n"},
        "actionLabel.txt: line 2: must be a recording",
    ),
    "cut off": (
        {"joints_s01_e01.txt": GOOD[:90], "actionLabel.txt": LABELS},
        "joints_s01_e01.txt: line 1: must be 61 finite numbers, not",
    ),
    "no number": (
        {"joints_s01_e01.txt": GOOD.replace(" 7 ", " nan "), "actionLabel.txt": LABELS},
        "joints_s01_e01.txt: line 1: must be 61 finite numbers",
    ),
    "no such frame": (
        {"joints_s01_e01.txt": GOOD.replace("10 0", "9 0"), "actionLabel.txt": LABELS},
        "joints_s01_e01.txt: no frame with a number from 10 to 14",
    ),
    "empty": ({"s01s02/01/001/skeleton_pos.txt": ""}, "skeleton_pos.txt: is empty"),
    "unknown class": ({"s01s02/09/001/skeleton_pos.txt": ""}, "skeleton_pos.txt: action 9, but"),
    "half a frame": (
        {"a01_s01_e01_skeleton3D.txt": "1 2 3 1\n" * 30},
        "a01_s01_e01_skeleton3D.txt: 30 lines are no whole frames of 20",
    ),
    "other matrix": (
        {"a1_s1_t1_skeleton.mat": mat(np.ones((20, 3, 2)), "d_iner")},
        "a1_s1_t1_skeleton.mat: d_skel: must be numbers",
    ),
    "other joints": ({"a1_s1_t1_skeleton.mat": mat(np.ones((25, 3, 2)))}, r"got \(25, 3, 2\)"),
    "no matrix": ({"a1_s1_t1_skeleton.mat": "text"}, "a1_s1_t1_skeleton.mat: no .mat file"),
    "two sets": (
        {"a1_s1_t1_skeleton.mat": "", "a01_s01_e01_skeleton3D.txt": ""},
        "holds several sets, UTD-MHAD and MSR-Action3D",
    ),
}


@pytest.mark.parametrize("files, message", BAD.values(), ids=BAD)
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(ClipError, match=message):
        open_set(write(tmp_path, files)).record(0)


def test_other_files_are_none_of_these_sets(tmp_path):
    names = ("S001C001P001R001A001.skeleton", "a01_s01_e00_v01.json", "notes.txt", "x_skeleton.mat")
    assert open_set(write(tmp_path, dict.fromkeys(names, ""))) is None


def test_folds_of_sbu_and_actors_of_florence_are_tested_once():
    for key, groups in (("sbu", 21), ("florence3d", 10)):
        tested = [group for fold in SETS[key].tested.values() for group in fold]
        assert len(tested) == len({*tested}) == groups
