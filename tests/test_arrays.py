"""Array files of the field, written here in exactly their layout: routes that must agree,
hostile and damaged input."""

import os
import pickle
import resource
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stf.arrays import Rows, load_pickle, open_arrays, what_is_it
from stf.clips import ClipError, open_clips
from stf.skeleton import SKELETONS

FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
RNG = np.random.default_rng(0)
NAMES = ["S001C001P001R001A010", "S001C002P003R001A058", "S001C003P008R001A060"]
LABELS = [9, 57, 59]
RAW = [RNG.normal(0, 1, (m, t, 25, 3)).astype(np.float32) for m, t in ((1, 8), (2, 11), (2, 1))]


def row_of(name, joints, label=0, **more):
    """An annotation as pyskl writes it."""
    row = {"frame_dir": name, "label": label, "keypoint": joints}
    return {**row, "total_frames": joints.shape[1], **more}


def write_pyskl(path, keypoints=RAW, protocol=4, **more):
    rows = [
        {"frame_dir": n, "label": label, "keypoint": k, "total_frames": k.shape[1], **more}
        for n, label, k in zip(NAMES, LABELS, keypoints)
    ]
    split = {"xsub_train": NAMES[:1], "xsub_val": NAMES[1:]}
    split |= {"xview_train": NAMES[1:], "xview_val": NAMES[:1]}
    content = {"split": split, "annotations": [rows[0], None, *rows[1:]]}
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def write_ctrgcn(path, compressed=False, onehot=True):
    x = np.zeros((3, 12, 2, 25, 3), np.float32)
    for i, k in enumerate(RAW):
        x[i, : k.shape[1], : len(k)] = k.transpose(1, 0, 2, 3)
    y = np.eye(60)[LABELS] if onehot else np.array(LABELS)
    x = x.reshape(3, 12, 150)
    (np.savez_compressed if compressed else np.savez)(
        path, x_train=x[:1], y_train=y[:1], x_test=x[1:], y_test=y[1:]
    )
    return path


def npy_array(centred=False):
    x = np.zeros((3, 3, 300, 25, 2), np.float32)
    for i, k in enumerate(RAW):
        x[i, :, : k.shape[1], :, : len(k)] = k.transpose(3, 1, 2, 0)
    return x - x[:, :, :, [1], :] if centred else x


def write_npy(folder, x, stem="val_data_joint", names=NAMES, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{stem}.npy", x)
    part = stem.split("_")[0]
    (folder / f"{part}_label.pkl").write_bytes(pickle.dumps((names, LABELS), protocol))
    return folder / f"{stem}.npy"


# ---------------------------------------------------------------- each form


@pytest.mark.parametrize("protocol", range(6))
def test_pyskl(tmp_path, protocol):
    clips = open_clips(write_pyskl(tmp_path / "ntu60_3danno.pkl", protocol=protocol))
    assert (
        clips.names == NAMES
        and "3 clips, 25 joints, up to 2 bodies, 3 classes, 1 more without a skeleton"
        in clips.summary
    )
    for clip, joints, label in zip(clips, RAW, LABELS):
        np.testing.assert_array_equal(clip.joints, joints)
        assert clip.label == label and clip.tags["action"] == label + 1 and clip.visible.min() == 1
    assert (
        clips[0].split == {"xsub": "train", "xview": "test"}
        and clips[1].class_name == "handshaking"
    )
    again = pickle.loads(pickle.dumps(clips))
    np.testing.assert_array_equal(again[1].joints, RAW[1])


def test_pyskl_2d(tmp_path):
    """Pixels and scores; a score a little over 1 is what networks say, 7 is a fault."""
    pixels = [RNG.uniform(0, 1900, (*k.shape[:2], 17, 2)).astype(np.float16) for k in RAW]
    size = dict(img_shape=(1080, 1920), original_shape=(1080, 1920))
    rows = [row_of(f"v_{i}", k, i, keypoint_score=np.full(k.shape[:3], s, np.float16), **size)
            for i, (k, s) in enumerate(zip(pixels, (0.5, 1.02, 7)))]  # fmt: skip
    path = tmp_path / "k400_hrnet.pkl"
    path.write_bytes(
        pickle.dumps({"split": {"train": ["v_0"], "val": ["v_1"]}, "annotations": rows})
    )
    clips = open_clips(path, errors="collect")
    good = list(clips)
    assert [c.name for c in good] == ["v_0", "v_1"] and "score of 7" in clips.errors[0].reason
    assert (
        good[0].skeleton is SKELETONS["coco17"]
        and good[0].tags["image"] == [1080, 1920]
        and good[1].visible.max() == 1
    )
    assert good[1].split == {"official": "test"}
    np.testing.assert_array_equal(good[1].joints, pixels[1].astype(np.float32))


def test_pyskl_list_only(tmp_path):
    path = tmp_path / "old.pickle"
    path.write_bytes(pickle.dumps([row_of(NAMES[0], RAW[0], 9)]))
    assert open_clips(path)[0].split == {}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "name, protocol",
    [
        ("NTU60_CS", "xsub"),
        ("NTU60_CV", "xview"),
        ("NTU120_CSub", "xsub"),
        ("NTU120_CSet", "xset"),
        ("own", "official"),
    ],
)
def test_ctrgcn(tmp_path, compressed, name, protocol):
    path = write_ctrgcn(tmp_path / f"{name}.npz", compressed)
    clips = open_clips(path)
    assert [c.class_name for c in open_clips(tmp_path)] == [
        c.class_name for c in clips
    ]  # however it is named
    guessed = (
        " (taken as ntu25)" if name == "own" else ""
    )  # neither the name nor the user says which body
    assert f"3 clips, 25 joints{guessed}, up to 2 bodies, 3 classes" in clips.summary
    for i in (0, 1, 2, 1, 0):  # back and forth
        np.testing.assert_array_equal(clips[i].joints, RAW[i])
        assert clips[i].label == LABELS[i] and clips[i].split == {
            protocol: "test" if i else "train"
        }
    assert len(set(clips.names)) == 3 and "setup" not in clips[0].tags


def test_ctrgcn_numbers_as_labels(tmp_path):
    assert [c.label for c in open_clips(write_ctrgcn(tmp_path / "a.npz", onehot=False))] == LABELS


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_stgcn_raw_arrays(tmp_path, protocol):
    paths = [f"/some/where/{n}.skeleton" for n in NAMES]
    clips = open_clips(write_npy(tmp_path / "xview", npy_array(), "train_data", paths, protocol))
    assert clips.names == NAMES
    for clip, joints in zip(clips, RAW):
        np.testing.assert_array_equal(clip.joints, joints)
        assert "preprocessed" not in clip.tags and clip.split == {"xview": "train"}


def test_msg3d_folder_with_both_parts_and_bones(tmp_path):
    x = npy_array(centred=True)
    folder = tmp_path / "xsub"
    write_npy(folder, x, "val_data_joint")
    write_npy(folder, x, "train_data_joint", [n.replace("R001", "R002") for n in NAMES])
    bone = x - x[:, :, :, SKELETONS["ntu25"].parents]
    write_npy(folder, bone, "train_data_bone", [n.replace("R001", "R002") for n in NAMES])
    clips = open_clips(folder)
    assert len(clips) == 6 and [c.split["xsub"] for c in clips] == ["train"] * 3 + ["test"] * 3
    assert all(c.tags["preprocessed"] == "msg3d" for c in clips)
    assert [c.split for c in open_clips(folder / "val_label.pkl")] == [{"xsub": "test"}] * 3
    for bad in ("train_data_bone", "train_data_joint_motion"):
        if bad != "train_data_bone":
            write_npy(folder, x, bad, [n.replace("R001", "R002") for n in NAMES])
        with pytest.raises(ClipError, match="give the joint file"):
            open_clips(folder / f"{bad}.npy")


def test_kinetics_arrays(tmp_path):
    """Two coordinates and a score; zeros at the end are padding."""
    x = np.zeros((3, 3, 300, 18, 2), np.float32)
    x[:, :2, 1:100] = RNG.uniform(-0.5, 0.5, (3, 2, 99, 18, 2))
    x[:, 2, 1:100] = 0.7
    clip = open_clips(write_npy(tmp_path / "kinetics", x, names=["a", "b", "c"]))[1]
    assert (
        clip.joints.shape == (2, 100, 18, 2)
        and clip.visible.max() == np.float32(0.7)
        and clip.split == {"kinetics": "test"}
    )
    np.testing.assert_array_equal(clip.joints[1, 50], x[1, :2, 50, :, 1].T)
    skeleton = SKELETONS["openpose18"]
    bones = x - x[:, :, :, skeleton.parents]  # the published bones subtract the score, too
    assert what_is_it(bones) == "bone" and what_is_it(x) == "preprocessed"


def test_routes_agree(tmp_path):
    """The same clips by four routes."""
    routes = [
        open_clips(write_pyskl(tmp_path / "a.pkl")),
        open_clips(write_ctrgcn(tmp_path / "b.npz")),
        open_clips(write_npy(tmp_path / "c", npy_array(), "test_data")),
    ]
    for a, b, c in zip(*routes):
        assert a.label == b.label == c.label
        for other in (b, c):
            np.testing.assert_array_equal(a.joints, other.joints)
            np.testing.assert_array_equal(a.visible, other.visible)


def renamed(data, new):
    """A pickle as another NumPy writes it: 1.x says numpy.core, 2.x numpy._core."""
    for module in (b"multiarray", b"numeric"):
        for old in (b"numpy._core.", b"numpy.core."):
            name, other = old + module, new + b"." + module
            data = data.replace(
                b"\x8c" + bytes([len(name)]) + name, b"\x8c" + bytes([len(other)]) + other
            ).replace(b"c" + name + b"\n", b"c" + other + b"\n")
    return data


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_pickles_of_either_numpy(tmp_path, module, protocol):
    """A set pickled under NumPy 1 is read under NumPy 2, and the other way round; labels may be
    NumPy's numbers."""
    path = write_pyskl(tmp_path / "a.pkl", protocol=protocol, label=np.int64(9))
    path.write_bytes(renamed(path.read_bytes(), module))
    other = b"numpy._core" if module == b"numpy.core" else b"numpy.core"
    assert module + b"." in path.read_bytes() and other + b"." not in path.read_bytes()
    clip = open_clips(path)[0]
    np.testing.assert_array_equal(clip.joints, RAW[0])
    assert clip.label == 9


def test_long_texts_of_numpy(tmp_path):
    """To read one moved the file away under the unpickler: "list index out of range"."""
    name = np.str_("walk" * 50)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([row_of(name, RAW[0])]))
    assert open_clips(tmp_path / "a.pkl").names == [name]


def test_parts_of_a_set_in_two_pickles(tmp_path):
    """Older pyskl and mmaction2 files are bare lists, one for training, one for the test; the
    file's name tells which."""
    for part, i in (("train", 0), ("val", 1)):
        row = row_of(NAMES[i], RAW[i], LABELS[i])
        (tmp_path / f"ntu60_xsub_{part}.pkl").write_bytes(pickle.dumps([row]))
    clips = open_clips(tmp_path)
    assert (
        clips.names == NAMES[:2]
        and [c.split for c in clips] == [{"xsub": "train"}, {"xsub": "test"}]
        and "2 clips" in clips.summary
    )
    assert "2 classes" in clips.summary and pickle.loads(pickle.dumps(clips))[1].label == LABELS[1]
    (tmp_path / "other.pkl").write_bytes(b"")
    with pytest.raises(
        ClipError,
        match="several data sets; name one of them: "
        "ntu60_xsub_train.pkl, ntu60_xsub_val.pkl, other.pkl",
    ):
        open_clips(tmp_path)


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_in_any_memory_layout(tmp_path, protocol):
    """Trackers give (T,M,V,C), and np.transpose only relabels the axes; pickle 5 writes such an
    array as it lies in memory."""
    kept = RNG.normal(size=(11, 2, 25, 3)).astype(np.float32)
    row = row_of("v", kept.transpose(1, 0, 2, 3))
    for keypoint in (row["keypoint"], np.asfortranarray(row["keypoint"])):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps([{**row, "keypoint": keypoint}], protocol))
        clips = open_clips(tmp_path / "a.pkl")
        np.testing.assert_array_equal(clips[0].joints, kept.transpose(1, 0, 2, 3))
        assert "25 joints" in clips.summary and "2 bodies" in clips.summary


def test_more_single_annotations_than_files_may_be_open(tmp_path):
    """Each kept its file open: from the thousandth on, all were "not a pickle"."""
    for i in range(100):
        (tmp_path / f"v{i}.pkl").write_bytes(pickle.dumps(row_of(f"v{i}", RAW[0] + i)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 80, hard))
    try:
        for clip in open_clips(tmp_path):
            np.testing.assert_array_equal(clip.joints, RAW[0] + int(clip.name[1:]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_several_sets_in_one_place_are_told_not_merged(tmp_path):
    row = row_of(NAMES[0], RAW[0])
    for k, names in enumerate(
        (
            ["ntu60_xsub_train", "ntu60_xsub_val", "ntu60_xview_train"],
            ["ntu60_xsub_train", "ntu120_xsub_val"],
        )
    ):
        (tmp_path / str(k)).mkdir()
        for name in names:
            (tmp_path / str(k) / f"{name}.pkl").write_bytes(pickle.dumps([row]))
        with pytest.raises(ClipError, match="several data sets"):
            open_clips(tmp_path / str(k))
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as z:
        for part in ("xsub", "xview"):
            path = write_npy(tmp_path / part, npy_array())
            for file in path.parent.iterdir():
                z.write(file, f"{part}/{file.name}")
    with pytest.raises(ClipError, match="several data sets; name one of them: xsub, xview"):
        open_clips(tmp_path / "both.zip")
    write_npy(tmp_path / "mixed", npy_array(), "val_data")
    write_npy(
        tmp_path / "mixed",
        npy_array(),
        "train_data_joint",
        [n.replace("R001", "R002") for n in NAMES],
    )
    assert len(open_clips(tmp_path / "mixed")) == 6  # both parts, whichever way they are called


def test_recordings_beside_arrays_are_not_left_out(tmp_path):
    """A folder of raw files into which something else has got: an error that names both, and
    kind= settles it."""
    from test_clips import TWO

    (tmp_path / f"{NAMES[0]}.skeleton").write_text(TWO)
    for beside in ("NTU60_CS.npz", "cache.pkl"):
        write_ctrgcn(tmp_path / beside) if beside.endswith("npz") else (
            tmp_path / beside
        ).write_bytes(pickle.dumps({"a": 1}))
        with pytest.raises(
            ClipError, match=f"several kinds, 1 .* like {beside} and 1 .* like {NAMES[0]}.*kind="
        ):
            open_clips(tmp_path)
        assert open_clips(tmp_path, kind="ntu").names == NAMES[:1]
        (tmp_path / beside).unlink()


def test_files_that_are_no_data_beside_a_set(tmp_path):
    """A list of classes, means as an array, label pickles in another folder: no recordings, and
    no other set."""
    from test_clips import TWO

    write_npy(tmp_path / "b/splits", npy_array())
    (tmp_path / "a").mkdir()
    write_pyskl(tmp_path / "a/ntu60_3danno.pkl")
    for folder, name in (("a", "label_map.json"), ("b", "means.npy")):
        np.save(tmp_path / folder / name, np.zeros(3)) if name == "means.npy" else (
            tmp_path / folder / name
        ).write_text("{}")
    assert len(open_clips(tmp_path / "a")) == 3
    with pytest.raises(ClipError, match="means.npy, but no .*joint.npy"):
        open_clips(tmp_path / "b")
    (tmp_path / "b" / f"{NAMES[0]}.skeleton").write_text(TWO)
    assert open_clips(tmp_path / "b").names == NAMES[:1]
    (tmp_path / "b/means.npy").unlink()
    assert open_clips(tmp_path / "b").names == NAMES[:1]
    with pytest.raises(ClipError, match="several data sets; name one of them: b/splits$"):
        (tmp_path / "b" / f"{NAMES[0]}.skeleton").unlink()
        (tmp_path / "a/ntu60_3danno.pkl").unlink()
        open_clips(tmp_path)


def test_ntu_names_with_classes_of_ones_own(tmp_path):
    """The mutual actions as 0, 1, 2 …: a label for each action, and no clip with NTU's; words
    are those of the names."""
    path = write_npy(tmp_path / "xsub", npy_array())
    for labels, reason in (
        ([0, 1, 2], ""),
        ([9, 1, 2], "the name says 57"),
        ([1, 1, 2], "the name says 9"),
    ):
        (path.parent / "val_label.pkl").write_bytes(pickle.dumps((NAMES, labels)))
        if reason:
            with pytest.raises(ClipError, match=reason):
                list(open_clips(path))
        else:
            assert [(c.label, c.class_name) for c in open_clips(path)] == [
                (0, "clapping"),
                (1, "handshaking"),
                (2, "walking apart from each other"),
            ]


@pytest.mark.parametrize("route", ["npy", "npz", "pyskl", "zip"])
def test_processes_and_threads_read_side_by_side(tmp_path, route):
    """An open file has one position: whoever shares it gets another clip's numbers under a
    clip's label."""
    x = np.ones((200, 3, 30, 25, 2), np.float32) * (np.arange(200) + 1)[:, None, None, None, None]
    names, labels = [f"c{i}" for i in range(200)], list(range(200))
    path = (
        tmp_path
        / {"npy": "val_data_joint.npy", "npz": "a.npz", "pyskl": "a.pkl", "zip": "a.zip"}[route]
    )
    if route == "npy":
        np.save(path, x)
        (tmp_path / "val_label.pkl").write_bytes(pickle.dumps((names, labels)))
    elif route == "npz":
        np.savez(path, x_train=x.transpose(0, 2, 4, 3, 1).reshape(200, 30, 150), y_train=labels)
    elif route == "pyskl":
        rows = [row_of(n, x[i].transpose(3, 1, 2, 0).copy(), i) for i, n in enumerate(names)]
        path.write_bytes(pickle.dumps(rows))
    else:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for i, n in enumerate(names):
                np.savez(tmp_path / "one.npz", joints=x[i].transpose(3, 1, 2, 0), label=i)
                z.write(tmp_path / "one.npz", f"{n}.npz")
    clips = open_clips(path)
    right = lambda i: bool(clips[i].joints[0, 0, 0, 0] == clips[i].label + 1)
    assert right(0)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(200)))
    children = []
    for _ in range(2):  # which inherit open files
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os._exit(0 if all(map(right, range(200))) else 1)
            except BaseException:
                os._exit(2)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_hidden_files_and_pipes_by_name(tmp_path):
    write_pyskl(tmp_path / ".hidden.pkl")
    assert len(open_clips(tmp_path / ".hidden.pkl")) == 3
    os.mkfifo(tmp_path / "pipe.pkl")
    with pytest.raises(ClipError, match="neither a file nor a folder"):
        open_clips(tmp_path / "pipe.pkl")


def test_an_array_of_millions_of_empty_rows_is_refused_at_once(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=np.ones((1, 5, 150)), y_train=np.zeros((3_000_000, 0)))
    begin = time.perf_counter()
    with pytest.raises(ClipError, match="no plain array"):
        open_clips(tmp_path / "a.npz")
    assert time.perf_counter() - begin < 1


def test_names_that_differ_in_their_folder_only(tmp_path):
    rows = [row_of(f"{k}/v1.mp4", RAW[0]) for k in ("run", "walk")]
    content = {"split": {"train": ["run/v1.mp4"], "val": ["walk/v1.mp4"]}, "annotations": rows}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    clips = open_clips(tmp_path / "a.pkl")
    assert clips.names == ["run/v1.mp4", "walk/v1.mp4"] and [c.split for c in clips] == [
        {"official": "train"},
        {"official": "test"},
    ]


def test_ctrgcn_of_other_bodies(tmp_path):
    """UAV-Human in CTR-GCN's form has 17 joints: the error says what it could be, and a
    skeleton settles it."""
    x = RNG.normal(0, 1, (2, 30, 102)).astype(np.float32)
    x[:, 12:] = 0
    np.savez(tmp_path / "UAV.npz", x_train=x, y_train=np.eye(5)[[1, 4]])
    with pytest.raises(ClipError, match="could be 2 × 17.*skeleton="):
        open_clips(tmp_path / "UAV.npz")
    clips = open_clips(tmp_path / "UAV.npz", skeleton=SKELETONS["coco17"])
    assert clips[0].joints.shape == (2, 12, 17, 3) and [c.label for c in clips] == [1, 4]
    np.testing.assert_array_equal(
        clips[1].joints, x[1, :12].reshape(12, 2, 17, 3).transpose(1, 0, 2, 3)
    )


def test_ctrgcn_class_names(tmp_path):
    """The files have no names, but the label says which NTU action it is."""
    assert open_clips(write_ctrgcn(tmp_path / "NTU60_CS.npz"))[1].class_name == "handshaking"
    assert open_clips(write_ctrgcn(tmp_path / "own.npz"))[1].class_name is None


# ---------------------------------------------------------------- what is wrong


def test_a_folder_that_needs_a_word(tmp_path):
    """Several sets, only bones, no labels, arrays in an archive: each is told by name."""
    for name in ("xsub", "xview"):
        write_npy(tmp_path / "both" / name, npy_array()[:, :, :5])
    with pytest.raises(ClipError, match="name one of them: xsub, xview"):
        open_clips(tmp_path / "both")
    write_npy(tmp_path / "bones", npy_array()[:, :, :5], "train_data_bone")
    with pytest.raises(
        ClipError, match="has train_data_bone.npy, but no .*the joint file is what is needed"
    ):
        open_clips(tmp_path / "bones")
    np.save(tmp_path / "mine.npy", npy_array()[:, :, :5])
    clips = open_clips(tmp_path / "mine.npy")  # to predict, none are needed
    assert clips[0].label is None and "no labels: label.pkl, a pickle" in clips.summary
    for n in ("NTU60_CS.npz", "NTU60_CV.npz"):
        write_ctrgcn((tmp_path / "npz").mkdir(exist_ok=True) or tmp_path / "npz" / n)
    with pytest.raises(ClipError, match="name one of them: NTU60_CS.npz, NTU60_CV.npz"):
        open_clips(tmp_path / "npz")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("ntu60_3danno.pkl", write_pyskl(tmp_path / "ntu60_3danno.pkl").read_bytes())
    assert len(open_clips(tmp_path / "a.zip")) == 3  # in a zip they are read in place


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda p: p.write_bytes(pickle.dumps({"annotations": []})), "no list of annotations"),
        (lambda p: p.write_bytes(pickle.dumps(3)), "no list of annotations"),
        (lambda p: p.write_bytes(pickle.dumps({"annotations": [None]})), "no list of annotations"),
        (lambda p: p.write_bytes(b""), "cut off"),
        (lambda p: p.write_bytes(write_pyskl(p).read_bytes()[:1000]), "cut off"),
        (lambda p: write_pyskl(p, total_frames=99), "total_frames is 99"),
        (lambda p: write_pyskl(p, label=-2), "label"),
        (lambda p: write_pyskl(p, label="nine"), "label"),
        (lambda p: write_pyskl(p, label=3), "name says"),
        (lambda p: write_pyskl(p, keypoint=None), "keypoint is missing"),
        (lambda p: write_pyskl(p, keypoint=[[1, 2]]), "must be an array"),
        (lambda p: write_pyskl(p, [k[0] for k in RAW]), "must be an array of 4 axes"),
        (lambda p: write_pyskl(p, [np.where(k > 1, np.nan, k) for k in RAW]), "not a finite"),
        (lambda p: write_pyskl(p, [np.zeros_like(k) for k in RAW]), "no body"),
        (lambda p: write_pyskl(p, keypoint_score=np.zeros((1, 2, 3))), "like the joints"),
    ],
)
def test_bad_pyskl(tmp_path, change, reason):
    path = tmp_path / "a.pkl"
    change(path)
    with pytest.raises(ClipError, match=reason):
        open_clips(path)[0]


@pytest.mark.parametrize("arrays, reason", [
    (dict(x_train=np.ones((2, 5, 149)), y_train=np.eye(2)), "no whole bodies"),
    (dict(x_train=np.ones((2, 5, 150)), y_train=np.eye(3)), "3 labels"),
    (dict(x_train=np.ones((2, 150)), y_train=np.eye(2)), "must be"),
    (dict(x_train=np.ones((2, 5, 150)), y_train=np.ones((2, 2))), "one-hot"),
    (dict(x_train=np.ones((0, 5, 150)), y_train=np.ones((0, 2))), "no clips"),
    (dict(x_train=np.array([None]), y_train=np.eye(1)), "pickle"),
    (dict(x_train=np.ones((1, 5, 150)), y_train=np.array([-2])), "labels|whole"),
    (dict(x_train=np.zeros((1, 5, 150)), y_train=np.eye(1)), "no body"),
    (dict(x_train=np.full((1, 5, 150), np.inf), y_train=np.eye(1)), "finite"),
])  # fmt: skip
def test_bad_ctrgcn(tmp_path, arrays, reason):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ClipError, match=reason):
        open_clips(tmp_path / "a.npz")[0]


def test_bad_npy(tmp_path):
    path = write_npy(tmp_path / "a", npy_array())
    (tmp_path / "a/val_label.pkl").unlink()
    assert "val_label.pkl" in open_clips(path).summary and open_clips(path)[1].label is None
    for x, reason in ((npy_array()[0], "must be"),
                      (npy_array()[:2], "2 clips, but val_label.pkl 3"),
                      (npy_array().astype(complex), "plain array.*not of numbers"),
                      (np.asfortranarray(npy_array()), "plain array.*is in Fortran order")):
        with pytest.raises(ClipError, match=reason):
            open_clips(write_npy(tmp_path / "b", x))
    path = write_npy(tmp_path / "c", npy_array())
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ClipError, match="cut off"):
        open_clips(path)
    with pytest.raises(ClipError, match="only labels"):
        (tmp_path / "d").mkdir()
        (tmp_path / "d/train_label.pkl").write_bytes(pickle.dumps((NAMES, LABELS)))
        open_clips(tmp_path / "d/train_label.pkl")


# ---------------------------------------------------------------- hostile


class Call:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class WithState:
    def __reduce__(self):
        return np.dtype, ("f8",), {"order": "x"}


HOSTILE = {
    "os.system": Call(os.system, "echo hacked > hacked"),
    "eval": Call(eval, "1+1"),
    "getattr": Call(getattr, "a", "upper"),
    "import": Call(__import__, "os"),
    "subprocess": Call(subprocess.Popen, ["true"]),
    "np.load": Call(np.load, "x"),
    "np.memmap": Call(np.memmap, "x"),
    "ndarray of a terabyte": Call(np.ndarray, (10**12,)),
    "an object": WithState(),
    "an instance": Fraction(1, 3),
    "a class": ClipError,
    "bytearray of a terabyte": Call(bytearray, 10**12),
    "key that breaks hash": None,
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("route", ["a.pkl", "val_label.pkl", "x.npz", "x.npy"])
def test_hostile_pickles_are_refused_by_name(tmp_path, monkeypatch, case, route):
    monkeypatch.chdir(tmp_path)
    if case.startswith("key"):
        data = b"\x80\x04}" + b")" + b"\x85" * 10**5 + b"K\x01s."
    else:
        data = pickle.dumps({"annotations": [{"frame_dir": "a", "keypoint": HOSTILE[case]}]})
    path = tmp_path / route
    if route == "x.npz":
        np.savez(path, x_train=np.array([HOSTILE[case]], dtype=object), y_train=np.eye(1))
    elif route == "x.npy":
        np.save(path, np.array([HOSTILE[case]], dtype=object))
        (tmp_path / "label.pkl").write_bytes(data)
    else:
        path.write_bytes(data)
        np.save(tmp_path / "val_data_joint.npy", npy_array())
    with pytest.raises(ClipError) as e:
        open_clips(path)[0]
    assert not (tmp_path / "hacked").exists()
    if route == "a.pkl" and case in ("os.system", "eval", "getattr"):
        assert HOSTILE[case].reduced[0].__name__ in str(e.value)


def instructions(*parts):
    return b"".join(p if isinstance(p, bytes) else p.encode() for p in parts)


@pytest.mark.parametrize("data", [
    instructions("cos\nsystem\n", "(S'true'\ntR."),
    instructions("(cos\nsystem\nS'true'\no."),
    instructions("(S'true'\nios\nsystem\n."),
    instructions(b"\x80\x02cos\nsystem\n", "(S'true'\nt", b"\x81."),
    instructions("Pabc\n."),
    instructions(b"\x80\x02K\x01Q."),
    instructions(b"\x80\x02\x82\x01."),
    instructions(b"\x80\x05", b"\x97."),
    instructions("cnumpy\ndtype\n(S'f8'\ntR}S'__class__'\nI1\nsb."),
    instructions("cnumpy\ndtype\n}S'dtype'\nI1\nsb."),
    instructions("cbuiltins\nexec\n(S'1'\ntR."),
    instructions("c__builtin__\neval\n(S'1'\ntR."),
    instructions("cnumpy.core.multiarray\n_reconstruct.__globals__\n."),
    instructions(b"\x80\x04\x8c\x05numpy\x8c\x0cdtype.__init__\x93."),
    instructions(b"\x80\x04B\xff\xff\xff\xff."),
    instructions(b"\x80\x04\x8e", b"\xff" * 8, "."),
    instructions(b"\x80\x04r\xff\xff\xff\x7f."),
    instructions(b"\x80\x04\x8b\xff\xff\xff\x7f."),
    instructions("L" + "9" * 5000 + "\n."),
    instructions(b"."),
    instructions(b"0."),
    instructions(b"\x80\xff."),
])  # fmt: skip
def test_hostile_instructions(tmp_path, data):
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(ValueError):
        load_pickle(path)


@pytest.mark.parametrize("begin, end", [
    (b"}", b"K\x01s."),  # the key of a dictionary
    (b"cnumpy.core.numeric\n_frombuffer\n(NN}N", b"tR."),  # the axes of an array
    (b"B" + (600).to_bytes(4, "little") + bytes(600), b"R."),  # what long bytes are called with
], ids=["key", "axes", "bytes"])  # fmt: skip
def test_nothing_nested_is_hashed(tmp_path, begin, end):
    """To hash tuples nested so deep ends the process."""
    (tmp_path / "a.pkl").write_bytes(begin + b")" + b"\x85" * 300_000 + end)
    with pytest.raises(ValueError, match="not a pickle"):
        load_pickle(tmp_path / "a.pkl")


def test_values_nested_without_end_are_refused_in_time(tmp_path):
    """Forty lists, each of which holds the one before twice, are a few bytes, and as text a
    trillion characters."""
    nested = []
    for _ in range(40):
        nested = [nested, nested]
    row = row_of("a", RAW[0])
    for bad in (
        {"label": nested},
        {"total_frames": nested},
        {"keypoint": nested},
        {"img_shape": nested},
        {"split": nested},
    ):
        split = {"split": {"train": bad.pop("split", ["a"])}}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps({"annotations": [{**row, **bad}], **split}))
        if "img_shape" in bad:
            assert open_clips(tmp_path / "a.pkl")[0].tags == {}
        else:
            with pytest.raises(ClipError):
                open_clips(tmp_path / "a.pkl")[0]
    np.save(tmp_path / "val_data_joint.npy", npy_array()[:1, :, :5])
    (tmp_path / "val_label.pkl").write_bytes(pickle.dumps((["a"], [nested])))
    with pytest.raises(ClipError, match="whole number"):
        open_clips(tmp_path / "val_data_joint.npy")


def test_nothing_unpickles_freely():
    """No module of the package loads pickles any other way."""
    root = os.path.join(os.path.dirname(__file__), "..", "stf")
    for name in os.listdir(root):
        if name.endswith(".py"):
            text = open(os.path.join(root, name), encoding="utf-8").read()
            for bad in (
                "pickle.load(",
                "pickle.loads(",
                "allow_pickle=True",
                "weights_only=False",
                "read_pickle",
                "joblib",
                "eval(",
                "exec(",
            ):
                own = (
                    ".eval(",
                    "bn_eval(",
                    "load_pickle(",
                    "pickle.loads(pickle.dumps(",
                )  # the last: an object of this process, there and back
                lines = [
                    line
                    for line in text.split("\n")
                    if bad in line and not any(word in line for word in own)
                ]
                assert not lines, (name, lines)


@given(st.data())
@settings(max_examples=150, **FUZZ)
def test_fuzzed_pickles(tmp_path_factory, data):
    from test_clips import check_clip, mutations

    folder = tmp_path_factory.mktemp("fuzz")
    path = write_pyskl(
        folder / "a.pkl", [k[:, :2, :3, :] for k in RAW], protocol=data.draw(st.integers(0, 5))
    )
    path.write_bytes(mutations(path.read_bytes(), data.draw))
    try:
        for clip in open_clips(path, errors="collect"):
            check_clip(clip)
    except ClipError:
        pass


@given(st.data())
@settings(max_examples=100, **FUZZ)
def test_fuzzed_npz_and_labels(tmp_path_factory, data):
    from test_clips import check_clip, mutations

    folder = tmp_path_factory.mktemp("fuzz")
    if data.draw(st.booleans()):
        path = damaged = write_ctrgcn(folder / "a.npz", data.draw(st.booleans()))
    else:
        path = write_npy(folder, npy_array()[:, :, :5])
        damaged = data.draw(st.sampled_from([path, folder / "val_label.pkl"]))
    damaged.write_bytes(mutations(damaged.read_bytes(), data.draw))
    try:
        for clip in open_clips(path, errors="collect"):
            check_clip(clip)
    except ClipError:
        pass


def test_memory_stays_small(tmp_path):
    """A file of 150 MB is opened and read in a process that may use little more than it needs
    for one clip."""
    rows = [row_of(f"v{i}", np.ones((1, 5000, 25, 3), np.float32), i % 7) for i in range(100)]
    (tmp_path / "big.pkl").write_bytes(pickle.dumps({"annotations": rows}))
    code = (
        "import re, sys\nfrom stf.clips import open_clips\n"
        "status = lambda: open('/proc/self/status').read()\n"  # ru_maxrss would count the parent's
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', status())[1])\n"
        "base = peak()\nn = sum(c.joints.shape[1] for c in open_clips(sys.argv[1]))\n"
        "assert n == 500_000\n"
        "print((peak() - base) // 1024)"
    )
    more = int(
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "big.pkl")],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert more < 60, f"{more} MiB"


def test_rows_of_a_lying_zip(tmp_path):
    with pytest.raises(OSError):
        Rows(tmp_path / "none.npz", "x")
    path = write_ctrgcn(tmp_path / "a.npz")
    data = bytearray(path.read_bytes())
    at = data.find(b"(1, 12, 150)")
    data[at : at + 12] = b"(9, 12, 150)"
    path.write_bytes(data)
    with pytest.raises(ClipError, match="no plain array of recordings"):
        open_clips(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_each_form_inside_a_zip(tmp_path, compression):
    """pyskl's pickle, CTR-GCN's npz and MS-G3D's arrays with both parts, below a folder: the
    same clips as unpacked."""
    sets = ("a", "b", "xsub")
    for folder in sets[:2]:
        (tmp_path / folder).mkdir()
    write_pyskl(tmp_path / "a/ntu60_3danno.pkl")
    write_ctrgcn(tmp_path / "b/NTU60_CS.npz")
    write_npy(tmp_path / "xsub", npy_array())
    names = [n.replace("R001", "R002") for n in NAMES]
    write_npy(tmp_path / "xsub", npy_array(), "train_data_joint", names)
    for folder in sets:
        with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w", compression) as z:
            for path in sorted((tmp_path / folder).iterdir()):
                z.write(path, f"data/{path.name}")
        loose, packed = open_clips(tmp_path / folder), open_clips(tmp_path / f"{folder}.zip")
        again = pickle.loads(pickle.dumps(packed))
        assert packed.names == loose.names and len(loose) >= 3
        for i in (2, 0, 1):
            for clips in (packed, again):
                np.testing.assert_array_equal(clips[i].joints, loose[i].joints)
                assert (clips[i].label, clips[i].split) == (loose[i].label, loose[i].split)


def test_a_folder_with_one_file(tmp_path):
    write_pyskl(tmp_path / "ntu60_3danno.pkl")
    assert len(open_clips(tmp_path)) == 3
    (tmp_path / "ntu60_3danno.pkl").unlink()
    write_ctrgcn(tmp_path / "NTU60_CS.npz")
    assert len(open_clips(tmp_path)) == 3
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as z:
        z.write(tmp_path / "NTU60_CS.npz", "NTU60_CS.npz")
    assert len(open_clips(tmp_path / "packed.zip")) == 3


def test_what_is_nothing_of_the_kind(tmp_path):
    (tmp_path / "a.txt").touch()
    assert (
        open_arrays(tmp_path, {"a.txt": (tmp_path / "a.txt",)}) is None
        and open_arrays(tmp_path / "a.txt", {"a.txt": (tmp_path / "a.txt",)}) is None
    )


# ---------------------------------------------------------------- real files


def test_real_ctrgcn(real_data):
    """Eleven clips whose raw files are there, too: the same up to a move and the makers' noise
    rules."""
    path = real_data / "ntu-ctrgcn-npz/NTU60_CS.npz"
    if not path.exists():
        pytest.skip("CTR-GCN's file is not among the real recordings")
    clips = open_clips(path)
    assert len(clips) == 11 and [c.label for c in clips] == list(range(49, 60))
    compared = 0
    for clip in clips:
        raw_path = real_data / f"ntu-raw/skeletons/S017C003P020R002A{clip.label + 1:03d}.skeleton"
        if not raw_path.exists():
            continue
        raw = open_clips(raw_path)[0]
        assert raw.joints.shape[1] == clip.joints.shape[1]
        a = clip.joints[0] - clip.joints[0, :, :1]
        distance = min(np.abs(a - (b - b[:, :1])).max() for b in raw.joints)
        compared += distance < 1e-4
    assert compared >= 5


def test_real_golden_pairs(real_data, tmp_path):
    """The published arrays are told apart: joints from bones."""
    path = real_data / "ntu-msg3d-npy/golden_pairs.npz"
    if not path.exists():
        pytest.skip("the golden pairs are not among the real recordings")
    golden = np.load(path)
    assert what_is_it(golden["joint"]) == "preprocessed" and what_is_it(golden["bone"]) == "bone"


def test_real_routes_agree_when_preprocessed(real_data, tmp_path):
    """A raw file, and what the published code made of it, read as users have them, are the same
    batch."""
    from stf.dataset import ClipStore

    name, golden = "S001C002P003R002A013", real_data / "ntu-msg3d-npy/golden_pairs.npz"
    raw = real_data / f"ntu-raw/skeletons/{name}.skeleton"
    if not (golden.exists() and raw.exists()):
        pytest.skip("the golden pairs or their raw file are not among the real recordings")
    (tmp_path / "xsub").mkdir()
    np.save(tmp_path / "xsub/val_data_joint.npy", np.load(golden)["joint"])
    (tmp_path / "xsub/val_label.pkl").write_bytes(
        pickle.dumps(([f"nturgb+d/{name}.skeleton"], [12]), 2)
    )
    batches = []
    for k, source in enumerate((raw, tmp_path / "xsub")):
        store = ClipStore.build(open_clips(source), tmp_path / f"store{k}", progress=False)
        batches.append(store.batch([0], preprocess="msg3d", length=300))
    np.testing.assert_allclose(batches[0].x.numpy(), batches[1].x.numpy(), atol=1e-5)


def test_real_label_pickles(real_data, tmp_path):
    """All eight label files of the standard splits pass the restricted unpickler."""
    import tarfile

    path = real_data / "ntu-labels/ntu_split_labels.tar.xz"
    if not path.exists():
        pytest.skip("the label pickles are not among the real recordings")
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                (tmp_path / "a.pkl").write_bytes(tar.extractfile(member).read())
                names, labels = load_pickle(tmp_path / "a.pkl")
                assert len(names) == len(labels) > 16_000
