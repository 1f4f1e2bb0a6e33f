"""What notebooks 10b and 11 can't teach: damaged, hostile and real files."""
import errno
import gc
import gzip
import io
import json
import lzma
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stf.clips import (Clip, ClipError, class_names, name_tags, ntu_missing_skeletons, open_clips,
                       read_kinetics, read_ntu, read_plain, read_ucla, save_clip)  # fmt: skip
from stf.files import Files, named
from stf.skeleton import SKELETONS, Skeleton

NAME = "S001C001P001R001A058"
FUZZ = dict(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def ntu_text(bodies_in_frames, seed=0, number="{:.7g}"):
    """A `.skeleton` file with the given body IDs in each frame."""
    rng = np.random.default_rng(seed)
    lines = [str(len(bodies_in_frames))]
    for ids in bodies_in_frames:
        lines.append(str(len(ids)))
        for body in ids:
            lines += [f"{body} 0 1 1 1 1 0 0.02764709 0.05745083 2", "25"]
            for _ in range(25):
                row = [number.format(v) for v in rng.normal(0, 1, 11)]
                lines.append(" ".join([*row, str(rng.integers(0, 3))]))
    return "\n".join(lines) + "\n"


ANN, BOB = "72057594037931101", "72057594037931102"  # equal as floats
TWO = ntu_text([[ANN], [ANN, BOB], [], [BOB, ANN]])
UCLA = {"file_name": "a05_s03_e00_v02", "label": 5,
        "skeletons": np.random.default_rng(0).normal(0, 1, (3, 20, 3)).round(4).tolist()}
PERSON = {"pose": [0.25] * 36, "score": [0.5] * 18}
KINETICS = {"data": [{"frame_index": t, "skeleton": [PERSON] * (t % 3)} for t in range(1, 5)],
            "label": "yoga", "label_index": 399}
FILM = json.dumps({"data": KINETICS["data"]})  # without a label


def as_json(content):
    return io.BytesIO(json.dumps(content).encode())


def ntu(text, name=NAME):
    return read_ntu(io.BytesIO(text if isinstance(text, bytes) else text.encode()), name)


def plain_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


OWN = plain_bytes(joints=np.ones((4, 25, 3), np.float32), label=3)


def folder_of(folder, **files):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def archive(path, files, kind=None):
    """A zip, or a tar of some compression, of {name: text}; the path's ending or kind tells."""
    kind = path.suffix[1:] if kind is None else kind
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
            for name, text in files.items():
                z.writestr(name, text)
        return path
    with tarfile.open(path, "w:" + kind.replace("tar", "")) as t:
        for name, text in files.items():
            info, data = tarfile.TarInfo(name), text if isinstance(text, bytes) else text.encode()
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return path


def check_clip(clip):
    """What every Clip promises."""
    assert clip.joints.dtype == clip.visible.dtype == np.float32
    assert clip.joints.ndim == 4 and clip.visible.shape == clip.joints.shape[:3]
    assert np.isfinite(clip.joints).all() and clip.present.any()
    assert (clip.visible >= 0).all() and (clip.visible <= 1).all()


def refused(reason, function, *args, **kw):
    with pytest.raises(ClipError, match=reason) as e:
        function(*args, **kw)
    return e.value


# ---------------------------------------------------------------- NTU


def test_bodies_are_followed_by_exact_id():
    """IDs that are equal as floats are two people, and order within a frame doesn't matter."""
    clip = ntu(TWO)
    assert clip.tags["bodies"] == [ANN, BOB] and "listed" not in clip.tags
    assert clip.present.tolist() == [[True, True, False, True], [False, True, False, True]]
    rows = [np.array(line.split(), float) for line in TWO.split("\n") if len(line.split()) == 12]
    last = np.array(rows[75:])  # in the last frame the second body comes first
    np.testing.assert_array_equal(clip.joints[1, 3], last[:25, :3].astype(np.float32))
    np.testing.assert_array_equal(clip.joints[0, 3], last[25:, :3].astype(np.float32))
    np.testing.assert_array_equal(clip.visible[1, 3], last[:25, 11] > 0)
    assert not clip.joints[0, 2].any() and not clip.visible[0, 2].any()


@pytest.mark.parametrize("frames, listed", [
    (["1", "21", "21", "12"], [1, 0]), (["1", "231"], [2, 0, 1]), (["23", "23", "12"], [1, 2, 0]),
    (["123", "123"], None), (["12", "23", "31"], None),  # no order at all: as they came
])  # fmt: skip
def test_ranks_of_bodies(frames, listed):
    """All bodies of a frame are compared, and orders linked by another frame are followed."""
    assert ntu(ntu_text([[*ids] for ids in frames])).tags.get("listed") == listed


def naive(text):
    """x, y, z of every joint's row by float(), in the file's order."""
    rows = [line.split() for line in text.split("\n") if len(line.split()) == 12]
    return np.array([[float(word) for word in row[:3]] for row in rows]).astype(np.float32)


@pytest.mark.parametrize("number", ["{:.7g}", "{:.3e}", "{:.17g}", "{:.0f}", "{:+.4f}", "{:.9f}",
                                    "{:.1f}0000000000000000000", "{:.4E}"])  # fmt: skip
def test_numbers_equal_float(number):
    """The reader and float() agree to the last bit, whatever the form of the numbers."""
    text = ntu_text([["1", "2"]] * 4, seed=1, number=number)
    np.testing.assert_array_equal(ntu(text).joints.swapaxes(0, 1).reshape(-1, 3), naive(text))


@given(st.lists(st.floats(-999, 999), min_size=3, max_size=3), st.integers(1, 17),
       st.sampled_from("gfe"))  # fmt: skip
@settings(max_examples=150, **FUZZ)
def test_any_number_equals_float(xyz, digits, form):
    words = [f"{v:.{digits}{form}}" for v in xyz]
    rows = "1 1 1" + 24 * (" 0 0 0 0 0 0 0 0 2\n" + " ".join(words)) + " 0 0 0 0 0 0 0 0 2\n"
    found = ntu("1\n1\n1 0 1 1 1 1 0 0 0 2\n25\n" + rows).joints[0, 0, 7]
    np.testing.assert_array_equal(found, np.array([float(word) for word in words], np.float32))
    assert (np.signbit(found) == [w.startswith("-") for w in words]).all()


ROW = TWO.split("\n")[6].split()


def with_word(word, k=1):
    return TWO.replace(" ".join(ROW), " ".join([*ROW[:k], word, *ROW[k + 1 :]]))


@pytest.mark.parametrize("change", [
    lambda s: s.replace("\n", "\r\n"), lambda s: s + "\n \r\n\n", lambda s: s.rstrip(),
    lambda s: s.replace(" ", "  "), lambda s: s.replace("\n", " \n"),
    lambda s: s.replace(" ", "\t"), lambda s: s.replace("\n", "\r\r\n"),
    lambda s: s.replace(" ".join(ROW), " ".join([*ROW[:3], "-1.#IND", "nan", "Inf", *ROW[6:]])),
])  # fmt: skip
def test_line_ends_blanks_and_nan_in_unused_columns_do_not_matter(change):
    clip, expected = ntu(change(TWO)), ntu(TWO)
    np.testing.assert_array_equal(clip.joints, expected.joints)
    np.testing.assert_array_equal(clip.visible, expected.visible)
    assert clip.tags == expected.tags


def first(old, new):
    return lambda s: s.replace(old, new, 1)


BAD_NTU = {
    "empty": ("", "line 1", "empty"),
    "blank": (" \n\r\n", "line 1", "empty"),
    "cut in a row": (TWO[:900], "line", "cut off"),
    "cut between rows": ("\n".join(TWO.split("\n")[:20]), "line 20", "ends here"),
    "cut before a frame": ("\n".join(TWO.split("\n")[:29]), "line 29", "ends here"),
    "lines added": (TWO + "1\n", "line", "more lines follow"),
    "frames a word": ("four" + TWO[1:], "line 1", "'four'"),
    "frames negative": ("-4" + TWO[1:], "line 1", "'-4'"),
    "a billion frames": ("1000000000" + TWO[1:], "line 1", ""),
    "a million frames": ("1000000" + TWO[1:], "line 1", "no recording"),
    "no frames": ("0\n", "", "no body in any frame"),
    "nobody": ("3\n0\n0\n0\n", "", "no body in any frame"),
    "999 bodies": (TWO.replace("\n1\n", "\n999\n", 1), "line 2", "no recording"),
    "24 joints": (TWO.replace("\n25\n", "\n24\n", 1), "line 4", "25 joints"),
    "unused word": (with_word("abc", 5), "line 7", "'abc'"),
    "float id": (TWO.replace(ANN, "7.20e16", 1), "line 3", "7.20e16"),
    "one id twice": (TWO.replace(BOB, ANN), "frame 2", "twice"),
    "state 3": (with_word("3", 11), "line 7", "tracking state"),
    "11 entries": (TWO.replace(" ".join(ROW), " ".join(ROW[1:])), "line 7", "12 entries"),
    "binary": (bytes(range(256)) * 40, "line 1", ""),
    "utf-16": (TWO.encode("utf-16"), "line 1", ""),
    **{word: (with_word(word), "line 7", "no measurement")
       for word in ("1e999", "384400000.0", "1e99", "1001")},
    **{w: (with_word(w), "line 7", w) for w in ("abc", "nan", "1_0", "0,5", "infinity")},
    **{word: (with_word(word), "line 7", "")
       for word in ("0.3:", "1.2.3", "-", ".", "+-2", "0.2e", "0x2", "0.12345678\xa09")},
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_NTU)
def test_bad_ntu_names_file_line_and_reason(case):
    text, place, reason = BAD_NTU[case]
    error = refused("bad.skeleton", ntu, text, "bad.skeleton")
    assert error.path == "bad.skeleton" and error.place.startswith(place), error
    assert reason in error.reason, error


def test_a_new_body_in_every_frame_does_not_fill_the_memory():
    """Dense (bodies, frames) storage would need frames squared."""
    row = "0.1 0.2 3.0 0 0 0 0 0 0 0 0 2\n" * 25
    text = "2000\n" + "".join(f"1\n{i} 0 1 1 1 1 0 0 0 2\n25\n{row}" for i in range(2000))
    refused("more than any recording", ntu, text)


# ---------------------------------------------------------------- fuzzing


PIECES = [b"nan", b"9", b"99999999", b"-", b".", b" ", b"\n", b"e9", b"1e5", b"\0", b"[", b"]",
          b'"', b",", b"{", b"null", b"true", b"NaN"]  # fmt: skip


def mutations(data, draw):
    """A few bytes of data cut, changed, inserted or repeated."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "end", "repeat"]))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(PIECES)))
        if kind == "cut":
            del data[at : at + draw(st.integers(1, 200))]
        elif kind == "change":
            data[at : at + len(piece)] = piece
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "end":
            del data[at:]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 300))]
    return bytes(data)


FORMATS = {"ntu": (read_ntu, NAME, TWO.encode()), "plain": (read_plain, "own", OWN),
           "ucla": (read_ucla, "a05_s03_e00_v02", json.dumps(UCLA).encode()),
           "kinetics": (read_kinetics, "film", json.dumps(KINETICS).encode())}  # fmt: skip


def fuzz_reader(kind, data):
    """A Clip or a ClipError, soon; and of NTU, nothing that doesn't stand in the file."""
    read, name, whole = FORMATS[kind]
    damaged, begin = mutations(whole, data.draw), time.monotonic()
    try:
        clip = read(io.BytesIO(damaged), name)
        check_clip(clip)
        if kind == "ntu":
            found = clip.joints[clip.present].reshape(-1, 3)
            assert np.isin(found, naive(damaged.decode("latin1"))).all()
    except ClipError as e:
        assert str(e) and "\n" not in e.place
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("kind", FORMATS)
@given(st.data())
@settings(max_examples=150, **FUZZ)
def test_fuzzed_files(kind, data):
    fuzz_reader(kind, data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
@given(st.data())
@settings(max_examples=2000, **FUZZ)
def test_fuzzed_files_long(kind, data):
    fuzz_reader(kind, data)


PAIR = {"S001C001P001R001A001.skeleton": TWO, "README.md": "hello",
        "a/S001C001P001R001A002.skeleton": TWO}  # fmt: skip


def fuzz_archives(folder, data):
    """Whatever bytes an archive has: clips and ClipErrors, no crash, no other error."""
    kind, path = data.draw(st.sampled_from(["zip", "", "gz", "xz"])), folder / "a.bin"
    path.write_bytes(mutations(archive(path, PAIR, kind).read_bytes(), data.draw))
    if data.draw(st.booleans()):  # in a folder of archives
        (folder / "in").mkdir()
        path.rename(folder / "in" / ("a.zip" if kind == "zip" else "a.tar"))
        path = folder / "in"
    try:
        for clip in open_clips(path, errors="collect"):
            check_clip(clip)
    except ClipError as e:
        assert str(e)


@given(st.data())
@settings(max_examples=100, **FUZZ)
def test_fuzzed_archives(tmp_path_factory, data):
    fuzz_archives(tmp_path_factory.mktemp("fuzz"), data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=1500, **FUZZ)
def test_fuzzed_archives_long(tmp_path_factory, data):
    fuzz_archives(tmp_path_factory.mktemp("fuzz"), data)


def listing(**names):
    """A Kinetics label list {name: (label, words, has a skeleton)}."""
    return json.dumps({n: {"has_skeleton": has, "label": words, "label_index": label}
                       for n, (label, words, has) in names.items()})  # fmt: skip


@given(st.data())
@settings(max_examples=100, **FUZZ)
def test_fuzzed_label_lists(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    listed = listing(a=(399, "yoga", True), b=(399, "yoga", True)).encode()
    name = data.draw(st.sampled_from(["x_label.json", "x_label.json.gz"]))
    listed = gzip.compress(listed) if name.endswith("gz") else listed
    folder_of(folder, **{"a.json": json.dumps(KINETICS), name: mutations(listed, data.draw)})
    try:
        check_clip(open_clips(folder)[0])
    except ClipError as e:
        assert str(e)


# ---------------------------------------------------------------- JSON


def frames(joint, V=20):
    return {"skeletons": [[joint] * V]}


@pytest.mark.parametrize("change, reason", [
    ({"label": 0}, "label"), ({"label": True}, "label"), ({"label": "5"}, "label"),
    ({"label": 5.0}, "label"), ({"skeletons": []}, "0 frames"), ({"skeletons": {}}, "no list"),
    ([], "no list"), (3, "no list"), (frames([0, 0, 1], 19), "20 joints"),
    (frames([0, 1]), "3 numbers"), (frames("abc"), "3 numbers"), (frames([0, 0, 0]), "no body"),
    *((frames([0, 0, v]), "number should be") for v in ("1", False, None)),
    *((frames([0, 0, v]), "beyond") for v in (10**400, 1e9)),
    (frames([0, 0, float("nan")]), "NaN"), (frames([0, 0, float("-inf")]), "-Infinity"),
])  # fmt: skip
def test_bad_ucla(change, reason):
    content = {**UCLA, **change} if isinstance(change, dict) else change
    refused(reason, read_ucla, as_json(content), "a05_s03_e00_v02")


def people(*skeleton, t=1):
    return {"data": [{"frame_index": t, "skeleton": list(skeleton)}]}


@pytest.mark.parametrize("change, reason", [
    ({"data": []}, "no body in any frame"), (people(), "no body in any frame"),
    ({"data": None}, "no list 'data'"), ({"data": people(PERSON)["data"] * 2}, "twice"),
    *((people(PERSON, t=t), "frame_index") for t in (-1, 10**12, 1.0, True, "1", None, [1])),
    (people(None), "a person"), (people([]), "a person"), (people({"pose": [0] * 36}), "'score'"),
    (people({**PERSON, "pose": [0] * 35}), "36"), (people({**PERSON, "pose": {}}), "36"),
    (people({**PERSON, "score": [0] * 17}), "18"),
    (people({**PERSON, "score": [7] * 18}), "score of 7"),
    (people({**PERSON, "score": [-1] * 18}), "score"),
    (people({"pose": [0] * 36, "score": [0] * 18}), "no body in any frame"),
    ({"label_index": -7}, "label_index"), ({"label_index": "yoga"}, "label_index"),
    ({"label": 3}, "label"), ({"data": [3]}, "data"),
])  # fmt: skip
def test_bad_kinetics(change, reason):
    refused(reason, read_kinetics, as_json({**KINETICS, **change}), "film")


@pytest.mark.parametrize("data", [
    b"", b"[" * 10**6, b"\xff\xfe{}", b'{"data": [], "data": []}', b"1" * 10**5, b"{} {}", b"nul",
    b'"\\ud800"', b"\x1f\x8b not gzip",
])  # fmt: skip
@pytest.mark.parametrize("read", [read_ucla, read_kinetics])
def test_bad_json(data, read):
    refused("odd", read, io.BytesIO(data), "odd")


def test_best_people_of_each_frame_are_kept():
    """A sixth person with the best score isn't lost, and equal scores keep the file's order."""
    scores = [0.2, 0.4, 0.4, 0.3, 0.1, 0.9, 0.05]
    crowd = [{"pose": [0.1 * i] * 36, "score": [s] * 18} for i, s in enumerate(scores, 1)]
    clip = read_kinetics(as_json(people(*crowd, t=3)), "film")
    np.testing.assert_allclose(clip.joints[:, 3, 0, 0], [0.6, 0.2, 0.3, 0.4, 0.1], atol=1e-6)
    assert clip.joints.shape == (5, 4, 18, 2) and not clip.present[:, :3].any()


@pytest.mark.parametrize("label", ["", -1, None])
def test_no_label_is_no_fault(label):
    clip = read_kinetics(as_json({**KINETICS, "label": "", "label_index": label}), "film")
    assert clip.label is None and clip.class_name is None


# ---------------------------------------------------------------- Clip, plain form


ONE = np.ones((1, 2, 25, 3))


@pytest.mark.parametrize("joints, more, reason", [
    (np.ones((2, 3, 4)), {}, "must be"), (np.ones((0, 3, 4, 2)), {}, "must be"),
    (np.ones((1, 0, 4, 2)), {}, "must be"), (ONE * np.inf, {}, "finite"),
    (ONE * 1e300, {}, "finite"), (ONE * 2e5, {}, "within"),
    (ONE.astype(complex), {}, "numbers"), (ONE.astype(str), {}, "numbers"), (None, {}, "numbers"),
    ([[[[1, 2], [3]]]], {}, "numbers"), ([[[[10**400]]]], {}, "numbers"), (ONE * 0, {}, "no body"),
    (ONE, dict(visible=np.full((1, 2, 25), np.nan)), "0..1"),
    (ONE, dict(visible=np.full((1, 2, 25), 1.5)), "0..1"), (ONE, dict(label=-1), "label"),
    (ONE, dict(name=None), "name"), (ONE, dict(tags=None), "tags"),
    (ONE, dict(split=["a"]), "split"), (ONE, dict(label=2**31), "label"),
    (ONE, dict(label=True), "label"),
    (ONE, dict(label=1.0), "label"), (ONE, dict(skeleton=SKELETONS["coco17"]), "17"),
    (ONE, dict(skeleton="ntu25"), "skeleton: must be a Skeleton"),
    (ONE, dict(class_name=3), "class_name: must be a str"),
    (ONE, dict(tags={"listed": [0, 0]}), "listed: must be the ranks of 1"),
    (ONE, dict(tags={"listed": 0}), "listed"), (ONE, dict(tags={"listed": ["0"]}), "listed"),
])  # fmt: skip
def test_clip_refuses(joints, more, reason):
    refused(reason, Clip, joints, **{"name": "x", **more})


def chain(V):
    bones = [(i, i - 1) for i in range(1, V)]
    return Skeleton("dog", [f"j{i}" for i in range(V)], bones, centre=0, height=(0, 1))


@pytest.mark.parametrize("clip", [
    ntu(TWO), Clip(ONE, name="rex", label=2, skeleton=chain(25), class_name="bark",
                   tags={"owner": "ann", "day": [1, 2]}, split={"mine": "test"}),
    Clip(ONE, tags={"subject": np.int64(3), "size": np.ones(2)}),
])  # fmt: skip
def test_a_plain_file_carries_all_that_a_clip_knows(tmp_path, clip):
    save_clip(clip, tmp_path / "own.npz")
    clips = open_clips(tmp_path)
    for key in ("name", "label", "class_name", "skeleton", "split"):
        assert getattr(clips[0], key) == getattr(clip, key), key
    plain = {k: v.tolist() if hasattr(v, "tolist") else v for k, v in clip.tags.items()}
    assert clips[0].tags == plain
    np.testing.assert_array_equal(clips[0].joints, clip.joints)
    np.testing.assert_array_equal(clips[0].visible, clip.visible)
    assert "25 joints" in clips.summary and "taken as" not in clips.summary
    clip.tags["x"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        save_clip(clip, tmp_path / "own.npz")


def test_own_skeleton(tmp_path):
    """Joints without a known layout are read; a given skeleton must fit; a guess is told."""
    data, dog = plain_bytes(joints=np.ones((5, 12, 2))), chain(12)
    assert read_plain(io.BytesIO(data), "a").skeleton is None
    assert read_plain(io.BytesIO(data), "a", skeleton=dog).skeleton is dog
    refused("25", read_plain, io.BytesIO(data), "a", skeleton=SKELETONS["ntu25"])
    folder_of(tmp_path, **{"a.npz": OWN})
    assert "25 joints (taken as ntu25)" in open_clips(tmp_path).summary
    assert "taken as" not in open_clips(tmp_path, skeleton=chain(25)).summary


J = np.ones((2, 3, 2))


@pytest.mark.parametrize("arrays, reason", [
    (dict(x=J), "unknown key"), (dict(label=3), "no 'joints'"), (dict(joints=J[0]), "T,V,C"),
    (dict(joints=J, label=1.5), "whole number"), (dict(joints=J, label=[1, 2]), "whole number"),
    (dict(joints=J, label=-2), "label"), (dict(joints=J, class_name=3), "text"),
    (dict(joints=J, skeleton="cat"), "not known"), (dict(joints=np.array([None])), "pickle"),
    (dict(joints=J, tags="[]"), "tags: must be a dict"), (dict(joints=J, label=2**63 - 1), "label"),
    (dict(joints=J, split='["train"]'), "split: must be a dict"),
    (dict(joints=J, tags="null", subject=3), "tags: must be a dict"),
    (dict(joints=J, visible=np.ones((3, 2))), "like the joints"),
    (dict(joints=J * np.nan), "finite"),
])  # fmt: skip
def test_bad_plain(arrays, reason):
    refused(reason, read_plain, io.BytesIO(plain_bytes(**arrays)), "own")


def test_npy_that_lies_about_its_size(tmp_path):
    file = io.BytesIO()
    head = {"descr": "<f8", "fortran_order": False, "shape": (10**12,)}
    np.lib.format.write_array_header_1_0(file, head)
    lying = archive(tmp_path / "a.zip", {"joints.npy": file.getvalue()}).read_bytes()
    for data in (lying, b"PK\3\4 not a zip", file.getvalue(), b""):
        refused("can't be read", read_plain, io.BytesIO(data), "a.npz")
    np.save(scalar := io.BytesIO(), 3.0)
    refused("axes must be", read_plain, io.BytesIO(scalar.getvalue()), "a.npy")


# ---------------------------------------------------------------- open_clips


def test_bad_files_are_collected(tmp_path):
    good = {f"S001C001P001R001A00{i}.skeleton": TWO if i % 2 else TWO[:700] for i in range(1, 6)}
    clutter = {"._S001C001P001R001A001.skeleton": b"\0", "README.txt": "hello",
               "__MACOSX/S001C001P001R001A009.skeleton": b"\0"}
    folder = folder_of(tmp_path, **good, **clutter)
    clips = open_clips(folder, errors="collect")
    assert [c.label for c in clips] == [0, 2, 4] and len(clips) == 5
    assert "NTU RGB+D .skeleton files: 5 clips" in clips.summary
    assert [os.path.basename(e.path)[16:20] for e in clips.errors] == ["A002", "A004"]
    assert len(list(clips)) == 3 and len(clips.errors) == 2  # a second time, not twice as many
    refused("A002", list, open_clips(folder))
    with pytest.raises(ValueError, match="errors must"):
        open_clips(folder, errors="ignore")


def test_archives_equal_folders(tmp_path):
    files = {f"{s}/S00{s}C001P001R001A00{i}.skeleton": ntu_text([["1"]] * 3, seed=i)
             for s in (1, 2) for i in (3, 1, 2)}
    folder = folder_of(tmp_path / "in", **files)
    expected = list(open_clips(folder))
    assert [c.name for c in expected] == sorted(c.name for c in expected)
    for form in ("zip", "tar", "gztar", "bztar", "xztar"):
        path = shutil.make_archive(str(tmp_path / form), form, folder)
        clips = open_clips(shutil.move(path, tmp_path / "a.dat"))  # known by its content
        backwards = [clips[i] for i in reversed(range(6))][::-1]
        for got in (list(clips), backwards, list(pickle.loads(pickle.dumps(clips)))):
            assert [c.name for c in got] == [c.name for c in expected]
            assert all(np.array_equal(a.joints, b.joints) for a, b in zip(got, expected))


def test_a_folder_of_archives(tmp_path):
    """NTU RGB+D 120 comes as two zips in one folder, with the lists beside them."""
    texts, folder = [ntu_text([["1"]] * 3, seed=k) for k in (1, 2)], tmp_path / "in"
    folder_of(folder, **{"NTU_RGBD_samples_with_missing_skeletons.txt": "a list"})
    for k in (2, 1):
        inside = {f"nturgb+d_skeletons/S00{k}C001P001R001A001.skeleton": texts[k - 1],
                  "__MACOSX/._S.skeleton": b"\0"}
        archive(folder / f"nturgbd_s{k}.zip", inside)
    clips = open_clips(folder)
    assert clips.names == ["S001C001P001R001A001", "S002C001P001R001A001"]
    for again in (clips, pickle.loads(pickle.dumps(clips))):
        for text, clip in zip(texts, again):
            np.testing.assert_array_equal(clip.joints, ntu(text).joints)
    assert clips.where(1).endswith(
        "nturgbd_s2.zip/nturgb+d_skeletons/S002C001P001R001A001.skeleton")
    listed = listing(a=(399, "yoga", True))
    folder = folder_of(tmp_path / "kinetics", **{"kinetics_val_label.json": listed})
    archive(folder / "kinetics_val.tar.gz", {"a.json": FILM})
    (clip,) = open_clips(folder)
    assert clip.label == 399 and clip.split == {"kinetics": "test"}


@pytest.mark.parametrize("files, names", [
    ({"run/01.npz": OWN, "walk/01.npz": OWN}, ["run/01", "walk/01"]),
    ({"x/01.skeleton": TWO, "y/01.skeleton": TWO}, ["x/01", "y/01"]),
    ({"kinetics_train/b.json": FILM, "kinetics_val/b.json": FILM},
     ["kinetics_train/b", "kinetics_val/b"]),
])  # fmt: skip
def test_files_of_one_name_in_two_folders(tmp_path, files, names):
    clips = open_clips(folder_of(tmp_path, **files))
    assert clips.names == [c.name for c in clips] == names


def test_links_are_followed_and_dead_ones_named(tmp_path):
    """Data sets are often linked from other disks; a link may lead back to where it is."""
    folder_of(tmp_path / "in", **{"S001C001P001R001A001.skeleton": TWO})
    home = tmp_path / "home"
    home.mkdir()
    (home / "ntu60").symlink_to(tmp_path / "in")
    (tmp_path / "in/again").symlink_to(home)
    assert open_clips(home).names == ["S001C001P001R001A001"]
    (home / "S001C001P001R001A002.skeleton").symlink_to(tmp_path / "nowhere")
    assert open_clips(home).summary.endswith("not read: S001C001P001R001A002.skeleton")


def test_the_same_films_however_they_are_named(tmp_path, monkeypatch):
    """By a relative path, and zipped, with the label list beside: the same labels and splits."""
    listed = listing(a=(399, "yoga", True))
    folder_of(tmp_path, **{"kinetics_val/a.json": FILM, "kinetics_val_label.json": listed})
    archive(tmp_path / "kinetics_val.zip", {"a.json": FILM})
    archive(tmp_path / "windows.zip", {"kinetics_val\\a.json": json.dumps(KINETICS),
                                       "__MACOSX\\._a.json": b""})  # with backslashes
    monkeypatch.chdir(tmp_path / "kinetics_val")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (".", "../kinetics_val", "~/kinetics_val", "../kinetics_val.zip", "../windows.zip"):
        (clip,) = open_clips(path)
        assert (clip.name, clip.label, clip.split) == ("a", 399, {"kinetics": "test"}), path


def test_kinetics_label_list(tmp_path):
    listed = listing(a=(399, "yoga", True), b=(1, "zumba", False))
    films = {f"kinetics_train/{name}.json": FILM for name in "abc"}
    folder = folder_of(tmp_path / "in", **films, **{
        "kinetics_train_label.json.gz": gzip.compress(listed.encode())})  # fmt: skip
    for clips in (open_clips(folder), open_clips(folder / "kinetics_train")):
        assert clips.names == ["a", "c"] and [c.label for c in clips] == [399, None]
        assert clips[0].class_name == "yoga" and clips[0].split == {"kinetics": "train"}
        assert "so far, 1 class, 1 more without a skeleton" in clips.summary
    assert open_clips(folder / "kinetics_train", labels={"c": (7, "x")})[1].label == 7
    with_label = json.dumps(KINETICS)
    for label, film, reason in (("399", FILM, "label_index"), (1, with_label, "399, but 1")):
        files = {"a.json": film, "x_label.json": listing(a=(label, "zumba", True))}
        refused(reason, lambda: open_clips(folder_of(tmp_path / reason[:3], **files))[0])


def test_a_tar_of_npz_and_an_archive_in_an_archive(tmp_path):
    """The end of a tar may be the end of a zip, as an .npz is one. A sparse member is named."""
    folder_of(tmp_path, **{"no_label.npz": OWN})
    archive(tmp_path / "own.tar", {"no_label.npz": OWN})
    for name in ("own.tar", "no_label.npz"):
        assert open_clips(tmp_path / name).names == ["no_label"]
    inner = archive(tmp_path / "inner.zip", {"a.npz": OWN}).read_bytes()
    refused("1 .zip. Known are", open_clips, archive(tmp_path / "outer.zip", {"inner.zip": inner}))
    sparse = tarfile.TarInfo("b.npz")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(tmp_path / "own.tar", "a") as t:
        t.addfile(sparse)
    assert open_clips(tmp_path / "own.tar").summary.endswith("not read: b.npz")


def test_names_of_any_bytes(tmp_path):
    (tmp_path / "a.npz").write_bytes(OWN)
    os.rename(os.fsencode(tmp_path / "a.npz"), os.fsencode(tmp_path) + b"/caf\xe9.npz")
    assert open_clips(tmp_path)[0].name == "caf?"


def test_archives_beside_loose_files_are_named(tmp_path):
    files = {"S001C001P001R001A001.skeleton": TWO, "more.zip": b"PK", "._more.zip": b""}
    assert open_clips(folder_of(tmp_path, **files)).summary.endswith("1 class, not read: more.zip")


@pytest.mark.parametrize("files, reason", [
    ({"a.rar": b"Rar!\x1a\x07\0"}, "(?s)1 .rar.*unpack them first.*ClipStore.build"),
    ({"a.csv": "1,2,3"}, "(?s)1 .csv.*make a Clip"), ({"a.mat": "MATLAB"}, "make a Clip"),
    ({"a.bvh": "HIERARCHY"}, "make a Clip"), ({"a.txt": "x"}, "Known are"),
    ({"x_label.json": "{}"}, "a label list, and the recordings that it lists are missing"),
    ({"x_label.json.gz": gzip.compress(b"{}")}, "the recordings that it lists are missing"),
    ({"a.json": "{}"}, "JSON with neither"), ({"a.json": '{"a": 1'}, "not JSON"),
    ({"a.zip": b"PK\3\4 no zip"}, "a.zip: the zip is cut off or damaged .*fetch or pack it again"),
    ({"a.tar.gz": gzip.compress(b"no tar" * 99)}, "a damaged one: fetch or pack it again"),
])  # fmt: skip
def test_advice_for_what_has_no_reader(tmp_path, files, reason):
    for path in (folder_of(tmp_path, **files), tmp_path / [*files][0]):
        refused(reason, open_clips, path)


def test_mixed_folders_and_wrong_arguments(tmp_path):
    hidden = folder_of(tmp_path / "hidden", **{"._a.skeleton": TWO})
    refused("there is no file in it", open_clips, hidden)
    refused("no such", open_clips, tmp_path / "nowhere")
    files = {"S001C001P001R001A001.skeleton": TWO, "b.json": json.dumps(KINETICS)}
    mixed = folder_of(tmp_path / "mixed", **files)
    (mixed / "S001C001P001R001A002.skeleton").write_text(TWO)
    kinds = "2 .skeleton like S001C001P001R001A001.skeleton and 1 .json like b.json: .*kind="
    refused(f"holds recordings of several kinds, {kinds}", open_clips, mixed)
    (mixed / "S001C001P001R001A002.skeleton").unlink()
    assert len(open_clips(mixed, kind="ntu")) == 1
    (mixed / "b.json").write_text('{"classes": ["drink water"]}')  # no recording
    assert len(open_clips(mixed)) == 1
    refused("no such file", open_clips, mixed, labels="nowhere.json")
    refused("give a table", open_clips, mixed, labels=mixed / "b.json")
    refused("unknown kind", open_clips, mixed, kind="bvh")
    with pytest.raises(ValueError, match="must be a Skeleton"):
        open_clips(mixed, skeleton="ntu25")


def test_unreadable_files(tmp_path):
    """A pipe or a dead link called .skeleton must not block or crash."""
    folder_of(tmp_path, **{"a.skeleton": TWO})
    os.mkfifo(tmp_path / "b.skeleton")
    (tmp_path / "c.skeleton").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(open_clips(tmp_path)) == 1
    for name in ("b.skeleton", "c.skeleton"):
        for read in (read_ntu, open_clips):
            refused(name, read, tmp_path / name)


def test_errors_of_a_single_file_name_it(tmp_path):
    rows = re.sub(r"(?m)^\S+ \S+ \S+( \S+){8} \d$", "0 " * 12, ntu_text([["1"]]))
    flat = json.dumps({**UCLA, **frames([0, 0, 0])})
    for name, data, read in (("a.skeleton", rows, read_ntu), ("a.json", flat, read_ucla)):
        (tmp_path / name).write_text(data)
        assert refused("no body", read, tmp_path / name).path == str(tmp_path / name)


# ---------------------------------------------------------------- archives that are damaged or bad


def test_damaged_archives(tmp_path):
    path = archive(tmp_path / "cut.tar.xz", PAIR, "xz")
    good = path.read_bytes()
    for end in (10, 100, len(good) // 2, len(good) - 20):
        path.write_bytes(good[:end])
        reason = "cut.tar.xz: the archive is cut off or damaged .*fetch or pack it again"
        refused(reason, lambda: list(open_clips(path)))
    path = archive(tmp_path / "cut.zip", PAIR)
    path.write_bytes(path.read_bytes()[:-30])
    refused("cut.zip: the zip is cut off or damaged .*fetch or pack it again", open_clips, path)


def test_damaged_member_of_a_zip_is_collected(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as z:
        for i in (1, 2, 3):
            z.writestr(f"S001C001P001R001A00{i}.skeleton", TWO)
    data = bytearray(path.read_bytes())
    at = data.find(TWO[100:200].encode(), len(TWO))  # inside the second
    data[at : at + 4] = b"oops"
    path.write_bytes(data)
    clips = open_clips(path, errors="collect")
    assert [c.label for c in clips] == [0, 2] and "A002" in clips.errors[0].path


def test_a_tar_that_ends_early_is_no_tar(tmp_path):
    """tarfile takes a damaged header, or a file cut off between two members, for the end."""
    names = [f"S001C001P001R001A00{i}.skeleton" for i in range(1, 4)]
    path = archive(tmp_path / "a.tar", dict.fromkeys(names, TWO))
    link = tarfile.TarInfo("S001C001P001R001A004.skeleton")
    link.type, link.linkname = tarfile.LNKTYPE, names[0]
    with tarfile.open(path, "a") as t:
        t.addfile(link)
        at = t.getmembers()[1].offset
    assert [c.label for c in open_clips(path)] == [0, 1, 2, 3]  # a hard link is its file
    whole = path.read_bytes()
    flipped = whole[: at + 150] + bytes([whole[at + 150] ^ 1]) + whole[at + 151 :]
    for damaged in (flipped, whole[: at + 100], whole[:at]):
        path.write_bytes(damaged)
        refused("fetch or pack it again", open_clips, path)


def test_the_reason_of_the_system_is_given_in_words():
    "Without Python's number of the error, and the file's name once."
    with pytest.raises(ClipError, match="^a: can't be read: Permission denied$"):
        with named("a", "can't be read: {}"):
            raise PermissionError(errno.EACCES, "Permission denied", "a")


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        name = "full"

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stf.files.tempfile.NamedTemporaryFile", lambda **k: Full())
    monkeypatch.setattr("stf.files.weakref.finalize", lambda *a: None)
    path = archive(tmp_path / "a.tar.xz", PAIR, "xz")
    refused("no room to unpack it in .*TMPDIR", open_clips, path)


def test_more_archives_than_open_files(tmp_path):
    for i in range(1, 121):
        archive(tmp_path / f"{i}.zip", {f"S001C001P{i:03d}R001A001.skeleton": ntu_text([["1"]])})
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, limits[1]))
    try:
        clips = open_clips(tmp_path)
        assert len({c.tags["subject"] for c in clips}) == 120 and clips[0].tags["subject"] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_huge_members_are_refused(tmp_path):
    path = archive(tmp_path / "bomb.zip", {"a.skeleton": bytes(70 << 20)})
    refused("no recording of this kind", lambda: open_clips(path)[0])


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE])
def test_tar_bomb_is_refused(tmp_path, monkeypatch, kind):
    """It stops long before its end: in a file's content, and in a header that claims to be long."""
    monkeypatch.setattr("stf.files._RATIO_FROM", 1 << 22)
    info = tarfile.TarInfo("a.skeleton")
    info.type, info.size = kind, 90 << 20
    with lzma.open(tmp_path / "a.tar.xz", "wb", preset=0) as f:
        f.write(info.tobuf())
        for _ in range(90):
            f.write(bytes(1 << 20))
    refused("200 times", open_clips, tmp_path / "a.tar.xz")


def test_links_and_devices_in_a_tar_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as t:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.skeleton")
            info.type, info.linkname = kind, "/etc/passwd"
            t.addfile(info)
    assert Files(tmp_path / "links.tar").names == []


@pytest.mark.parametrize("kind", ["zip", "tar", "xz"])
def test_names_in_an_archive_lead_nowhere(tmp_path, kind):
    """Absolute paths and .. are names like others: read, and nothing is written."""
    names = ["../../out.skeleton", str(tmp_path / "abs.skeleton"), "a/../../b.skeleton"]
    (tmp_path / "in").mkdir()
    path = archive(tmp_path / "in/a", dict.fromkeys(names, TWO), kind)
    before = sorted(tmp_path.rglob("*"))
    assert sorted(c.name for c in open_clips(path)) == ["abs", "b", "out"]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_temporary_file_goes_with_its_clips(tmp_path):
    clips = open_clips(archive(tmp_path / "a.tar.xz", PAIR, "xz"))
    file = clips.read.args[0].entries[1][2]
    assert file.exists() and len(list(clips)) == 2
    del clips
    gc.collect()
    assert not file.exists()


def test_error_travels_between_processes():
    e = pickle.loads(pickle.dumps(ClipError("a", "line 3", "bad")))
    assert (e.path, e.place, e.reason, str(e)) == ("a", "line 3", "bad", "a: line 3: bad")


@pytest.mark.parametrize("name", ["arrays", "files", "clips", "preparation", "dataset"])
def test_modules_import_alone(name):
    subprocess.run([sys.executable, "-W", "error", "-c", f"import stf.{name}"], check=True)


# ---------------------------------------------------------------- facts and real recordings


def test_names():
    assert class_names("ntu60") == class_names("ntu120")[:60]
    assert len(set(class_names("kinetics400"))) == 400
    assert all(name_tags(n) for n in ntu_missing_skeletons())
    tags = dict(setup=1, camera=2, subject=3, replication=2, action=13)
    assert name_tags("C:\\data\\S001C002P003R002A013.skeleton") == tags
    for bad in ("S001C002P003R002A000", "S001C002P003R002", "xS001C002P003R002A013", ""):
        assert name_tags(bad) == {}


@pytest.fixture
def real(real_data):
    """A path among the real recordings; the test is skipped where it is absent."""
    def find(name):
        if not (real_data / name).exists():
            pytest.skip(f"{name} is not among the real recordings")
        return real_data / name

    return find


def test_real_ntu(real):
    """Every raw file gives what a reader by the words of the format gives."""
    folder = real("ntu-raw/skeletons")
    for path in (folder, real("ntu120-raw/ntu120_116.tar.xz")):
        for i, clip in enumerate(clips := open_clips(path)):
            check_clip(clip)
            if len(clip.joints) == 1 and i % 3 == 0 and path.is_dir():
                found = naive(open(clips.where(i)).read())
                there = clip.joints[0][clip.present[0]].reshape(-1, 3)
                np.testing.assert_array_equal(there, found)
    false_body = read_ntu(folder / "S001C001P003R002A005.skeleton")
    assert false_body.present.all() and len(false_body.joints) == 2
    two = read_ntu(folder / "S017C003P020R002A059.skeleton")
    assert two.present.sum(axis=1).tolist() == [111, 32] and two.tags["listed"] == [1, 0]


def test_real_truncated(real):
    for path in sorted(real("ntu-raw/truncated").glob("*.skeleton")):
        refused(rf"{path.name}.*line \d+: .*cut off", read_ntu, path)


def test_real_missing_list(real):
    path = real("ntu-raw/missing-lists/NTU_RGBD120_samples_with_missing_skeletons.txt")
    names = {line.strip() for line in path.read_text().split("\n")[3:]} - {""}
    assert ntu_missing_skeletons() == names


def test_real_ucla(real):
    clips = list(open_clips(real("nw-ucla/nw_ucla_all_sqe.tar.xz")))
    assert len(clips) == 1484 and {c.label for c in clips} == set(range(10))
    assert sum(c.tags["view"] == 3 for c in clips) == 464
    lengths = [c.joints.shape[1] for c in clips]
    assert len({c.tags["subject"] for c in clips}) == 10
    assert (min(lengths), max(lengths), np.median(lengths)) == (1, 201, 31)


def test_real_kinetics(real):
    """The odd cases, the archive with its empty films, and the published arrays of one film."""
    folder = real("kinetics-skeleton")
    clips = open_clips(folder / "samples", errors="collect")
    assert len(list(clips)) == 4
    assert [e.reason for e in clips.errors] == ["no body in any frame"] * 2
    clips = open_clips(folder / "kinetics_skeleton_240.tar.xz", errors="collect")
    splits = [c.split["kinetics"] for c in clips]
    assert (splits.count("train"), splits.count("test"), len(clips.errors)) == (117, 116, 7)
    clip = read_kinetics(folder / "pairs/bqfirst/open_pose_skeleton.json")
    golden = np.load(folder / "pairs/bqfirst/test_data_joint.npy")[0]  # (3,300,18,2)
    M, T, V, _ = clip.joints.shape
    made, seen = np.zeros((3, 300, V, 2), np.float32), clip.visible > 0
    made[0, :T, :, :M] = ((clip.joints[..., 0] - 0.5) * seen).transpose(1, 2, 0)
    made[1, :T, :, :M] = ((0.5 - clip.joints[..., 1]) * seen).transpose(1, 2, 0)
    made[2, :T, :, :M] = clip.visible.transpose(1, 2, 0)
    np.testing.assert_allclose(made, golden, atol=1e-6)


def test_the_summary_counts_the_joints_of_a_large_file(tmp_path):
    """Above 64 MiB, which other formats are limited to."""
    np.savez(tmp_path / "a.npz", joints=np.ones((1, 240_000, 25, 3), np.float32))
    assert "25 joints" in open_clips(tmp_path).summary
