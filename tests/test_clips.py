"""What notebook 11 can't teach: damaged, hostile and real files."""
import gzip
import io
import json
import lzma
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stf.clips import (
    Clip, ClipError, class_names, name_tags, ntu_missing_skeletons, open_clips, read_kinetics, read_ntu, read_plain, read_ucla, save_clip,
)
from stf.files import Files
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


TWO = ntu_text([["72057594037931101"], ["72057594037931101", "72057594037931102"], [], ["72057594037931102", "72057594037931101"]])
UCLA = {"file_name": "a05_s03_e00_v02", "skeletons": np.random.default_rng(0).normal(0, 1, (3, 20, 3)).round(4).tolist(), "label": 5}
PERSON = {"pose": [0.25] * 36, "score": [0.5] * 18}
KINETICS = {"data": [{"frame_index": t, "skeleton": [PERSON] * (t % 3)} for t in range(1, 5)], "label": "yoga", "label_index": 399}


def as_json(content):
    return io.BytesIO(json.dumps(content).encode())


def ntu(text, name=NAME):
    return read_ntu(io.BytesIO(text if isinstance(text, bytes) else text.encode()), name)


def check_clip(clip):
    """What every Clip promises."""
    assert clip.joints.dtype == clip.visible.dtype == np.float32
    assert clip.joints.ndim == 4 and clip.visible.shape == clip.joints.shape[:3]
    assert np.isfinite(clip.joints).all() and (clip.visible >= 0).all() and (clip.visible <= 1).all()
    assert clip.present.any()


# ---------------------------------------------------------------- NTU


def test_bodies_are_followed_by_exact_id():
    """IDs that are equal as floats are two people, and order within a frame doesn't matter."""
    clip = ntu(TWO)
    assert clip.tags["bodies"] == ["72057594037931101", "72057594037931102"] and "listed" not in clip.tags
    assert ntu(ntu_text([["1"], ["2", "1"], ["2", "1"], ["1", "2"]])).tags["listed"] == [1, 0]
    assert clip.present.tolist() == [[True, True, False, True], [False, True, False, True]]
    rows = [np.array(line.split(), float) for line in TWO.split("\n") if len(line.split()) == 12]
    last = np.array(rows[75:])  # in the last frame the second body comes first
    np.testing.assert_array_equal(clip.joints[1, 3], last[:25, :3].astype(np.float32))
    np.testing.assert_array_equal(clip.joints[0, 3], last[25:, :3].astype(np.float32))
    np.testing.assert_array_equal(clip.visible[1, 3], last[:25, 11] > 0)
    assert not clip.joints[0, 2].any() and not clip.visible[0, 2].any()


def naive(text):
    """x, y, z of every joint's row by float(), in the file's order."""
    rows = [line.split() for line in text.split("\n") if len(line.split()) == 12]
    return np.array([[float(word) for word in row[:3]] for row in rows]).astype(np.float32)


@pytest.mark.parametrize("number", ["{:.7g}", "{:.3e}", "{:.17g}", "{:.0f}", "{:+.4f}", "{:.9f}", "{:.1f}0000000000000000000", "{:.4E}"])
def test_numbers_equal_float(number):
    """The reader and float() agree to the last bit, whatever the form of the numbers."""
    text = ntu_text([["1", "2"]] * 4, seed=1, number=number)
    np.testing.assert_array_equal(ntu(text).joints.transpose(1, 0, 2, 3).reshape(-1, 3), naive(text))


@given(st.lists(st.floats(-999, 999), min_size=3, max_size=3), st.integers(1, 17), st.sampled_from("gfe"))
@settings(max_examples=150, **FUZZ)
def test_any_number_equals_float(xyz, digits, form):
    words = [f"{v:.{digits}{form}}" for v in xyz]
    text = "1\n1\n1 0 1 1 1 1 0 0 0 2\n25\n" + 25 * (" ".join(words) + " 0 0 0 0 0 0 0 0 2\n")
    found = ntu(text).joints[0, 0, 7]
    np.testing.assert_array_equal(found, np.array([float(word) for word in words]).astype(np.float32))
    assert (np.signbit(found) == [w.startswith("-") for w in words]).all()


@pytest.mark.parametrize("word", ["0.3:", "1.2.3", "0,2", "-", "1_0", ".", "+-2", "0.2e", "1e99", "1001", "0x2", "0.12345678\xa09", "infinity"])
def test_no_number_is_no_number(word):
    row = TWO.split("\n")[6]
    with pytest.raises(ClipError, match="line 7"):
        ntu(TWO.replace(row, " ".join([row.split()[0], word, *row.split()[2:]])))


@pytest.mark.parametrize("change", [
    lambda s: s.replace("\n", "\r\n"), lambda s: s + "\n \r\n\n", lambda s: s.rstrip(), lambda s: s.replace(" ", "  "),
    lambda s: s.replace("\n", " \n"), lambda s: s.replace(" ", "\t"), lambda s: s.replace("\n", "\r\r\n"),
])
def test_line_ends_and_blanks_do_not_matter(change):
    expected = ntu(TWO)
    clip = ntu(change(TWO))
    np.testing.assert_array_equal(clip.joints, expected.joints)
    np.testing.assert_array_equal(clip.visible, expected.visible)
    assert clip.tags == expected.tags


BAD = {
    "empty": (lambda s: "", "line 1", "empty"),
    "blank": (lambda s: " \n\r\n", "line 1", "empty"),
    "cut in a row": (lambda s: s[:900], "line", "cut off"),
    "cut between rows": (lambda s: "\n".join(s.split("\n")[:20]), "line 20", "ends here"),
    "cut before a frame": (lambda s: "\n".join(s.split("\n")[:29]), "line 29", "ends here"),
    "lines added": (lambda s: s + "1\n", "line", "more lines follow"),
    "frames a word": (lambda s: "four" + s[1:], "line 1", "'four'"),
    "frames negative": (lambda s: "-4" + s[1:], "line 1", "'-4'"),
    "a billion frames": (lambda s: "1000000000" + s[1:], "line 1", ""),
    "a million frames": (lambda s: "1000000" + s[1:], "line 1", "no recording"),
    "no frames": (lambda s: "0\n", "", "no body in any frame"),
    "nobody": (lambda s: "3\n0\n0\n0\n", "", "no body in any frame"),
    "999 bodies": (lambda s: s.replace("\n1\n", "\n999\n", 1), "line 2", "no recording"),
    "24 joints": (lambda s: s.replace("\n25\n", "\n24\n", 1), "line 4", "25 joints"),
    "a word": (lambda s: s.replace(s.split("\n")[6].split()[1], "abc", 1), "line 7", "'abc'"),
    "nan": (lambda s: s.replace(s.split("\n")[6].split()[1], "nan", 1), "line 7", "'nan'"),
    "overflow": (lambda s: s.replace(s.split("\n")[6].split()[1], "1e999", 1), "line 7", "no measurement"),
    "on the moon": (lambda s: s.replace(s.split("\n")[6].split()[1], "384400000.0", 1), "line 7", "no measurement"),
    "underscore": (lambda s: s.replace(s.split("\n")[6].split()[1], "1_0", 1), "line 7", "'1_0'"),
    "decimal comma": (lambda s: s.replace(s.split("\n")[6].split()[1], "0,5", 1), "line 7", "'0,5'"),
    "unused word": (lambda s: s.replace(s.split("\n")[6].split()[5], "abc", 1), "line 7", "'abc'"),
    "float id": (lambda s: s.replace("72057594037931101", "7.20e16", 1), "line 3", "7.20e16"),
    "one id twice": (lambda s: s.replace("931102", "931101"), "frame 2", "twice"),
    "state 3": (lambda s: s.replace("\n".join(s.split("\n")[4:5]), s.split("\n")[4][:-1] + "3", 1), "line 5", "tracking state"),
    "11 entries": (lambda s: s.replace(s.split("\n")[4], s.split("\n")[4][2:].split(" ", 1)[1], 1), "line 5", "12 entries"),
    "binary": (lambda s: bytes(range(256)) * 40, "line 1", ""),
    "utf-16": (lambda s: s.encode("utf-16"), "line 1", ""),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_ntu_names_file_line_and_reason(case):
    change, place, reason = BAD[case]
    with pytest.raises(ClipError) as e:
        ntu(change(TWO), "bad.skeleton")
    assert e.value.path == "bad.skeleton" and e.value.place.startswith(place) and reason in e.value.reason, str(e.value)


def test_nan_in_unused_columns_is_no_fault():
    row = TWO.split("\n")[6]
    odd = " ".join(row.split()[:3] + ["-1.#IND", "nan", "Infinity", "-inf"] + row.split()[7:])
    np.testing.assert_array_equal(ntu(TWO.replace(row, odd)).joints, ntu(TWO).joints)


def mutations(data, draw):
    """A few bytes of data cut, changed, inserted or repeated."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        kind = draw(st.sampled_from(["cut", "change", "insert", "end", "repeat"]))
        piece = draw(st.one_of(st.binary(min_size=1, max_size=4), st.sampled_from(
            [b"nan", b"9", b"99999999", b"-", b".", b" ", b"\n", b"e9", b"1e5", b"\0", b"[", b"]", b'"', b",", b"{", b"null", b"true", b"NaN"])))
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


def survives(read, data):
    """A Clip or a ClipError, soon."""
    begin = time.monotonic()
    try:
        check_clip(read(io.BytesIO(data)))
        good = True
    except ClipError as e:
        assert str(e) and "\n" not in e.place
        good = False
    assert time.monotonic() - begin < 20
    return good


def fuzz_ntu(data, original=TWO.encode()):
    damaged = mutations(original, data.draw)
    if survives(lambda f: read_ntu(f, NAME), damaged):
        clip, rows = ntu(damaged), naive(damaged.decode("latin1"))
        assert np.isin(clip.joints[clip.present].reshape(-1, 3), rows).all()  # nothing that doesn't stand in the file


@given(st.data())
@settings(max_examples=200, **FUZZ)
def test_fuzzed_ntu(data):
    fuzz_ntu(data)


@given(st.data())
@settings(max_examples=150, **FUZZ)
def test_fuzzed_ucla(data):
    survives(lambda f: read_ucla(f, "a05_s03_e00_v02"), mutations(json.dumps(UCLA).encode(), data.draw))


@given(st.data())
@settings(max_examples=150, **FUZZ)
def test_fuzzed_kinetics(data):
    survives(lambda f: read_kinetics(f, "film"), mutations(json.dumps(KINETICS).encode(), data.draw))


def plain_bytes(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


@given(st.data())
@settings(max_examples=150, **FUZZ)
def test_fuzzed_plain(data):
    original = plain_bytes(joints=np.ones((4, 5, 3), np.float32), label=3, class_name="wave")
    survives(lambda f: read_plain(f, "own"), mutations(original, data.draw))


@pytest.mark.slow
@given(st.data())
@settings(max_examples=4000, **FUZZ)
def test_fuzzed_ntu_long(data):
    fuzz_ntu(data)


@pytest.mark.slow
@given(st.data(), st.sampled_from(["ucla", "kinetics", "plain"]))
@settings(max_examples=4000, **FUZZ)
def test_fuzzed_others_long(data, kind):
    original = {"ucla": json.dumps(UCLA).encode(), "kinetics": json.dumps(KINETICS).encode(),
                "plain": plain_bytes(joints=np.ones((4, 5, 3), np.float32), label=3)}[kind]
    survives({"ucla": read_ucla, "kinetics": read_kinetics, "plain": read_plain}[kind], mutations(original, data.draw))


def test_a_new_body_in_every_frame_does_not_fill_the_memory():
    """Dense (bodies, frames) storage would need frames squared."""
    row = "0.1 0.2 3.0 0 0 0 0 0 0 0 0 2\n"
    text = "2000\n" + "".join(f"1\n{i} 0 1 1 1 1 0 0 0 2\n25\n{row * 25}" for i in range(2000))
    with pytest.raises(ClipError, match="more than any recording"):
        ntu(text)


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize("content, reason", [
    ({**UCLA, "label": 0}, "label"), ({**UCLA, "label": True}, "label"), ({**UCLA, "label": "5"}, "label"), ({**UCLA, "label": 5.0}, "label"),
    ({**UCLA, "skeletons": []}, "0 frames"), ({**UCLA, "skeletons": {}}, "no list"), ([], "no list"), (3, "no list"),
    ({**UCLA, "skeletons": [[[0, 0, 1]] * 19]}, "20 joints"), ({**UCLA, "skeletons": [[[0, 1]] * 20]}, "3 numbers"),
    ({**UCLA, "skeletons": [[[0, 0, "1"]] * 20]}, "number should be"), ({**UCLA, "skeletons": [[[0, 0, False]] * 20]}, "number should be"),
    ({**UCLA, "skeletons": [[[0, 0, None]] * 20]}, "number should be"), ({**UCLA, "skeletons": [[[0, 0, 10**400]] * 20]}, "beyond"),
    ({**UCLA, "skeletons": [[[0, 0, 1e9]] * 20]}, "beyond"), ({**UCLA, "skeletons": [["abc"] * 20]}, "3 numbers"),
    ({**UCLA, "skeletons": [[[0, 0, 0]] * 20]}, "no body"), ({**UCLA, "skeletons": [[[0, 0, float("nan")]] * 20]}, "NaN"),
    ({**UCLA, "skeletons": [[[0, 0, float("-inf")]] * 20]}, "-Infinity"),
])  # fmt: skip
def test_bad_ucla(content, reason):
    with pytest.raises(ClipError, match=reason):
        read_ucla(as_json(content), "a05_s03_e00_v02")


def people(*skeleton, t=1):
    return {**KINETICS, "data": [{"frame_index": t, "skeleton": list(skeleton)}]}


@pytest.mark.parametrize("content, reason", [
    ({**KINETICS, "data": []}, "no body in any frame"), (people(), "no body in any frame"), ({}, "no list 'data'"),
    (people(PERSON, t=-1), "frame_index"), (people(PERSON, t=10**12), "frame_index"), (people(PERSON, t=1.0), "frame_index"),
    (people(PERSON, t=True), "frame_index"), (people(PERSON, t="1"), "frame_index"), (people(PERSON, t=None), "frame_index"), (people(PERSON, t=[1]), "frame_index"),
    ({**KINETICS, "data": people(PERSON)["data"] * 2}, "twice"), (people(None), "a person"), (people([]), "a person"),
    (people({"pose": [0] * 36}), "'score'"), (people({**PERSON, "pose": [0] * 35}), "36"), (people({**PERSON, "score": [0] * 17}), "18"),
    (people({**PERSON, "pose": {}}), "36"), (people({**PERSON, "score": [7] * 18}), "score of 7"), (people({**PERSON, "score": [-1] * 18}), "score"),
    (people({"pose": [0] * 36, "score": [0] * 18}), "no body in any frame"), ({**KINETICS, "label_index": -7}, "label_index"),
    ({**KINETICS, "label_index": "yoga"}, "label_index"), ({**KINETICS, "label": 3}, "label"), ({**KINETICS, "data": [3]}, "data"),
])  # fmt: skip
def test_bad_kinetics(content, reason):
    with pytest.raises(ClipError, match=reason):
        read_kinetics(as_json(content), "film")


@pytest.mark.parametrize("data", [b"", b"[" * 10**6, b"\xff\xfe{}", b'{"data": [], "data": []}', b"1" * 10**5, b"{} {}", b"nul", b'"\\ud800"'])
def test_bad_json(data):
    for read in (read_ucla, read_kinetics):
        with pytest.raises(ClipError):
            read(io.BytesIO(data), "odd")


def test_best_people_of_each_frame_are_kept():
    """A sixth person with the best score must not be lost, and equal scores keep the file's order."""
    crowd = [{"pose": [0.1 * (i + 1)] * 36, "score": [s] * 18} for i, s in enumerate([0.2, 0.4, 0.4, 0.3, 0.1, 0.9, 0.05])]
    clip = read_kinetics(as_json(people(*crowd, t=3)), "film")
    np.testing.assert_allclose(clip.joints[:, 3, 0, 0], [0.6, 0.2, 0.3, 0.4, 0.1], atol=1e-6)
    assert clip.joints.shape == (5, 4, 18, 2) and not clip.present[:, :3].any()


def test_no_label_is_no_fault():
    for label in ("", -1, None):
        clip = read_kinetics(as_json({**KINETICS, "label": "", "label_index": label}), "film")
        assert clip.label is None and clip.class_name is None


# ---------------------------------------------------------------- Clip, plain form


@pytest.mark.parametrize("joints, reason", [
    (np.ones((2, 3, 4)), "must be"), (np.ones((0, 3, 4, 2)), "must be"), (np.ones((1, 0, 4, 2)), "must be"), (np.full((1, 1, 4, 2), np.inf), "finite"),
    (np.full((1, 1, 4, 2), 1e300), "finite"), (np.ones((1, 1, 4, 2), complex), "numbers"), (np.full((1, 1, 4, 2), "1"), "numbers"),
    ([[[[1, 2], [3]]]], "numbers"), (np.zeros((1, 1, 4, 2)), "no body"), (None, "numbers"), ([[[[10**400]]]], "numbers"),
])  # fmt: skip
def test_clip_refuses(joints, reason):
    with pytest.raises(ClipError, match=reason):
        Clip(joints, name="x")


@pytest.mark.parametrize("kw, reason", [
    (dict(visible=np.full((1, 2, 25), np.nan)), "0..1"), (dict(visible=np.full((1, 2, 25), 1.5)), "0..1"), (dict(label=-1), "label"),
    (dict(name=None), "name"), (dict(tags=None), "tags"), (dict(split=["a"]), "split"), (dict(label=2**31), "label"),
    (dict(label=True), "label"), (dict(label=1.0), "label"), (dict(skeleton=SKELETONS["coco17"]), "17"),
    (dict(skeleton="ntu25"), "skeleton: must be a Skeleton"), (dict(class_name=3), "class_name: must be a str"),
    (dict(tags={"listed": [0, 0]}), "listed: must be the ranks of 1"), (dict(tags={"listed": 0}), "listed"), (dict(tags={"listed": ["0"]}), "listed"),
])  # fmt: skip
def test_clip_refuses_the_rest(kw, reason):
    with pytest.raises(ClipError, match=reason):
        Clip(np.ones((1, 2, 25, 3)), **{"name": "x", **kw})


def test_plain_round_trip(tmp_path):
    clip = ntu(TWO)
    save_clip(clip, tmp_path / "own.npz")
    again = open_clips(tmp_path)[0]
    np.testing.assert_array_equal(again.joints, clip.joints)
    np.testing.assert_array_equal(again.visible, clip.visible)
    assert (again.name, again.label, again.class_name, again.skeleton) == (clip.name, clip.label, clip.class_name, clip.skeleton)
    assert again.tags == clip.tags


def test_a_plain_file_carries_all_that_a_clip_knows(tmp_path):
    """An own skeleton, the split and any tags; and a layout that was guessed from the number of joints is said."""
    dog = Skeleton("dog", [f"j{i}" for i in range(25)], [(i, i - 1) for i in range(1, 25)], centre=0, height=(0, 1))
    clip = Clip(np.ones((1, 2, 25, 3)), name="rex", label=2, skeleton=dog, class_name="bark", tags={"owner": "ann", "day": [1, 2]}, split={"mine": "test"})
    (tmp_path / "in").mkdir()
    save_clip(clip, tmp_path / "in/rex.npz")
    clips = open_clips(tmp_path / "in")
    assert (clips[0].skeleton, clips[0].tags, clips[0].split, clips[0].class_name) == (dog, clip.tags, clip.split, "bark")
    assert "25 joints" in clips.summary and "taken as" not in clips.summary
    np.savez(tmp_path / "in/rex.npz", joints=clip.joints)
    assert "25 joints (taken as ntu25)" in open_clips(tmp_path / "in").summary
    assert "taken as" not in open_clips(tmp_path / "in", skeleton=dog).summary


def test_saved_tags_of_numpy_and_nan(tmp_path):
    clip = Clip(np.ones((1, 2, 25, 3)), tags={"subject": np.int64(3), "size": np.ones(2)})
    save_clip(clip, tmp_path / "a.npz")
    assert read_plain(tmp_path / "a.npz").tags == {"subject": 3, "size": [1, 1]}
    clip.tags["x"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        save_clip(clip, tmp_path / "a.npz")


def test_own_skeleton():
    """Joints without a known layout are read, and a given skeleton must fit."""
    dog = Skeleton("dog", [f"j{i}" for i in range(12)], [(i, i - 1) for i in range(1, 12)], centre=0, height=(0, 1))
    data = plain_bytes(joints=np.ones((5, 12, 2)))
    assert read_plain(io.BytesIO(data), "a").skeleton is None
    assert read_plain(io.BytesIO(data), "a", skeleton=dog).skeleton is dog
    with pytest.raises(ClipError, match="25"):
        read_plain(io.BytesIO(data), "a", skeleton=SKELETONS["ntu25"])


@pytest.mark.parametrize("arrays, reason", [
    (dict(x=np.ones((2, 3, 2))), "unknown key"), (dict(label=3), "no 'joints'"), (dict(joints=np.ones((3, 2))), "T,V,C"),
    (dict(joints=np.ones((2, 3, 2)), label=1.5), "whole number"), (dict(joints=np.ones((2, 3, 2)), label=[1, 2]), "whole number"),
    (dict(joints=np.ones((2, 3, 2)), label=-1), "label"), (dict(joints=np.ones((2, 3, 2)), class_name=3), "text"),
    (dict(joints=np.ones((2, 3, 2)), skeleton="cat"), "not known"), (dict(joints=np.array([None])), "pickle"),
    (dict(joints=np.ones((2, 3, 2)), tags="[]"), "tags: must be a dict"), (dict(joints=np.ones((2, 3, 2)), split='["train"]'), "split: must be a dict"),
    (dict(joints=np.ones((2, 3, 2)), tags="null", subject=3), "tags: must be a dict"), (dict(joints=np.ones((2, 3, 2)), label=2**63 - 1), "label"),
    (dict(joints=np.ones((2, 3, 2)), visible=np.ones((3, 2))), "like the joints"), (dict(joints=np.full((2, 3, 2), np.nan)), "finite"),
])  # fmt: skip
def test_bad_plain(arrays, reason):
    with pytest.raises(ClipError, match=reason):
        read_plain(io.BytesIO(plain_bytes(**arrays)), "own")


# ---------------------------------------------------------------- open_clips


def folder_of(tmp_path, **files):
    folder = tmp_path / "in"
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return folder


def test_bad_files_are_collected(tmp_path):
    folder = folder_of(tmp_path, **{f"S001C001P001R001A00{i}.skeleton": TWO if i % 2 else TWO[:700] for i in range(1, 6)},
                       **{"._S001C001P001R001A001.skeleton": b"\0", "README.txt": "hello", "__MACOSX/S001C001P001R001A009.skeleton": b"\0"})
    clips = open_clips(folder, errors="collect")
    assert [c.label for c in clips] == [0, 2, 4] and len(clips) == 5 and "NTU RGB+D .skeleton files: 5 clips" in clips.summary
    assert [os.path.basename(e.path)[16:20] for e in clips.errors] == ["A002", "A004"]
    assert len(list(clips)) == 3 and len(clips.errors) == 2  # a second time, not twice as many
    with pytest.raises(ClipError, match="A002"):
        list(open_clips(folder))
    with pytest.raises(ValueError, match="errors must"):
        open_clips(folder, errors="ignore")


def test_archives_equal_folders(tmp_path):
    import shutil

    folder = folder_of(tmp_path, **{f"{s}/S00{s}C001P001R001A00{i}.skeleton": ntu_text([["1"]] * 3, seed=i) for s in (1, 2) for i in (3, 1, 2)})
    expected = list(open_clips(folder))
    assert [c.name for c in expected] == sorted(c.name for c in expected)
    for form in ("zip", "tar", "gztar", "bztar", "xztar"):
        clips = open_clips(shutil.make_archive(str(tmp_path / form), form, folder))
        for got in (list(clips), [clips[i] for i in reversed(range(6))][::-1], list(pickle.loads(pickle.dumps(clips)))):
            assert [c.name for c in got] == [c.name for c in expected]
            assert all(np.array_equal(a.joints, b.joints) for a, b in zip(got, expected))


def test_a_folder_of_archives(tmp_path):
    """NTU RGB+D 120 comes as two zips in one folder, with the lists beside them."""
    (tmp_path / "in").mkdir()
    for k in (2, 1):
        with zipfile.ZipFile(tmp_path / f"in/nturgbd_s{k}.zip", "w") as z:
            z.writestr(f"nturgb+d_skeletons/S00{k}C001P001R001A001.skeleton", ntu_text([["1"]] * 3, seed=k))
            z.writestr("__MACOSX/._S.skeleton", b"\0")
    (tmp_path / "in/NTU_RGBD_samples_with_missing_skeletons.txt").write_text("a list")
    clips = open_clips(tmp_path / "in")
    assert clips.names == ["S001C001P001R001A001", "S002C001P001R001A001"] and "2 clips" in clips.summary
    for again in (clips, pickle.loads(pickle.dumps(clips))):
        for k, clip in enumerate(again, 1):
            np.testing.assert_array_equal(clip.joints, ntu(ntu_text([["1"]] * 3, seed=k)).joints)
    assert clips.where(1).endswith("nturgbd_s2.zip/nturgb+d_skeletons/S002C001P001R001A001.skeleton")
    film = json.dumps({**KINETICS, "label": "", "label_index": ""})
    (tmp_path / "kinetics").mkdir()
    with tarfile.open(tmp_path / "kinetics/kinetics_val.tar.gz", "w:gz") as t:
        info = tarfile.TarInfo("a.json")
        info.size = len(film)
        t.addfile(info, io.BytesIO(film.encode()))
    (tmp_path / "kinetics/kinetics_val_label.json").write_text(json.dumps({"a": {"has_skeleton": True, "label": "yoga", "label_index": 399}}))
    clip = open_clips(tmp_path / "kinetics")[0]
    assert clip.label == 399 and clip.split == {"kinetics": "test"}


def test_the_split_is_told_by_the_folder_itself(tmp_path):
    folder = folder_of(tmp_path, **{"kinetics_val/a.json": json.dumps(KINETICS)})
    assert open_clips(folder / "kinetics_val")[0].split == open_clips(folder)[0].split == {"kinetics": "test"}


def test_plain_files_of_one_name_in_two_folders(tmp_path):
    data = plain_bytes(joints=np.ones((4, 5, 3), np.float32), label=3)
    clips = open_clips(folder_of(tmp_path, **{"run/01.npz": data, "walk/01.npz": data}))
    assert clips.names == [c.name for c in clips] == ["run/01", "walk/01"]
    clips = open_clips(folder_of(tmp_path / "ntu", **{"x/01.skeleton": TWO, "y/01.skeleton": TWO}))
    assert clips.names == [c.name for c in clips] == ["x/01", "y/01"]
    films = {f"kinetics_{part}/{name}.json": json.dumps({"data": KINETICS["data"]}) for part, name in (("train", "a"), ("train", "b"), ("val", "b"))}
    listing = json.dumps({n: {"has_skeleton": True, "label": n, "label_index": i} for i, n in enumerate("ab")})
    clips = open_clips(folder_of(tmp_path / "films", **films, **{"kinetics_train_label.json": listing}))
    assert [(c.name, c.label) for c in clips] == [("kinetics_train/a", 0), ("kinetics_train/b", 1), ("kinetics_val/b", 1)] and "2 classes" in clips.summary


def test_links_are_followed_and_dead_ones_named(tmp_path):
    """Data sets are often linked from other disks, and git-annex leaves dead links; a link may lead back to where it is."""
    folder_of(tmp_path, **{"S001C001P001R001A001.skeleton": TWO})
    home = tmp_path / "home"
    home.mkdir()
    (home / "ntu60").symlink_to(tmp_path / "in")
    (tmp_path / "in/again").symlink_to(home)
    assert open_clips(home).names == ["S001C001P001R001A001"]
    (home / "S001C001P001R001A002.skeleton").symlink_to(tmp_path / "nowhere")
    assert open_clips(home).summary.endswith("not read: S001C001P001R001A002.skeleton")


def test_the_same_films_however_they_are_named(tmp_path, monkeypatch):
    """By a relative path, and zipped, with the label list beside: the same labels and splits."""
    listing = json.dumps({"a": {"has_skeleton": True, "label": "yoga", "label_index": 399}})
    folder = folder_of(tmp_path, **{"kinetics_val/a.json": json.dumps({"data": KINETICS["data"]}), "kinetics_val_label.json": listing})
    with zipfile.ZipFile(folder / "kinetics_val.zip", "w") as z:
        z.write(folder / "kinetics_val/a.json", "a.json")
    with zipfile.ZipFile(folder / "windows.zip", "w") as z:  # some packers write backslashes
        z.writestr("kinetics_val\\a.json", json.dumps(KINETICS))
        z.writestr("__MACOSX\\._a.json", b"")
    monkeypatch.chdir(folder / "kinetics_val")
    monkeypatch.setenv("HOME", str(folder))
    for path in (".", "../kinetics_val", "~/kinetics_val", "../kinetics_val.zip", "../windows.zip"):
        (clip,) = open_clips(path)
        assert (clip.name, clip.label, clip.split) == ("a", 399, {"kinetics": "test"}), path


def test_a_tar_of_npz_and_an_archive_in_an_archive(tmp_path):
    """The end of a tar may be the end of a zip, as an .npz is one. A zip of a zip is whole, but not what can be read."""
    folder = folder_of(tmp_path, **{"no_label.npz": plain_bytes(joints=np.ones((4, 25, 3), np.float32))})
    with tarfile.open(folder / "own.tar", "w") as t:
        t.add(folder / "no_label.npz", "no_label.npz")
    assert open_clips(folder / "own.tar").names == open_clips(folder / "no_label.npz").names == ["no_label"]
    with zipfile.ZipFile(folder / "inner.zip", "w") as z:
        z.write(folder / "no_label.npz", "a.npz")
    with zipfile.ZipFile(folder / "outer.zip", "w") as z:
        z.write(folder / "inner.zip", "inner.zip")
    with pytest.raises(ClipError, match="1 .zip. Known are"):
        open_clips(folder / "outer.zip")
    sparse = tarfile.TarInfo("b.npz")
    sparse.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(folder / "own.tar", "a") as t:
        t.addfile(sparse)
    assert open_clips(folder / "own.tar").summary.endswith("not read: b.npz")


def test_names_of_any_bytes(tmp_path):
    folder = folder_of(tmp_path, **{"a.npz": plain_bytes(joints=np.ones((4, 25, 3), np.float32))})
    os.rename(os.fsencode(folder / "a.npz"), os.fsencode(folder) + b"/caf\xe9.npz")
    assert open_clips(folder)[0].name == "caf?"


def test_archives_beside_loose_files_are_named(tmp_path):
    folder = folder_of(tmp_path, **{"S001C001P001R001A001.skeleton": TWO, "more.zip": b"PK", "._more.zip": b""})
    assert open_clips(folder).summary.endswith("1 class, not read: more.zip")
    (folder / "x_label.json.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(ClipError, match="a label list, and the recordings that it lists are missing"):
        open_clips(folder / "x_label.json.gz")


@pytest.mark.parametrize("name, data, advice", [
    ("a.rar", b"Rar!\x1a\x07\0", "unpack them first"), ("a.csv", b"1,2,3", "make a Clip"), ("a.mat", b"MATLAB 5.0", "make a Clip"),
    ("a.bvh", b"HIERARCHY", "make a Clip"), ("x_label.json", b"{}", "the recordings that it lists are missing"),
])
def test_advice_for_what_has_no_reader(tmp_path, name, data, advice):
    folder = folder_of(tmp_path, **{name: data})
    for path in (folder, folder / name):
        with pytest.raises(ClipError, match=advice) as e:
            open_clips(path)
        assert "ClipStore.build" in str(e.value)


def test_what_is_unknown_is_told(tmp_path):
    for files, reason in [({"a.txt": "x"}, "Known are"), ({"a.skeleton": TWO, "b.json": json.dumps(KINETICS)}, "kind="), ({"a.json": "{}"}, "neither"), ({"._a.skeleton": TWO}, "there is no file in it")]:
        with pytest.raises(ClipError, match=reason):
            open_clips(folder_of(tmp_path / str(len(str(files))), **files))
    with pytest.raises(ClipError, match="no such"):
        open_clips(tmp_path / "nowhere")
    mixed = folder_of(tmp_path / "mixed", **{"S001C001P001R001A001.skeleton": TWO, "b.json": json.dumps(KINETICS)})
    assert len(open_clips(mixed, kind="ntu")) == 1
    (mixed / "b.json").write_text('{"classes": ["drink water"]}')  # no recording
    assert len(open_clips(mixed)) == 1
    with pytest.raises(ClipError, match="need no labels"):
        open_clips(mixed, labels="nowhere.json")
    with pytest.raises(ValueError, match="must be a Skeleton"):
        open_clips(mixed, skeleton="ntu25")
    with pytest.raises(ClipError, match="unknown kind"):
        open_clips(mixed, kind="bvh")


def test_kinetics_label_list(tmp_path):
    film = json.dumps({**KINETICS, "label": "", "label_index": ""})
    listing = {"a": {"has_skeleton": True, "label": "yoga", "label_index": 399}, "b": {"has_skeleton": False, "label": "zumba", "label_index": 1}}
    folder = folder_of(tmp_path, **{"kinetics_train/a.json": film, "kinetics_train/b.json": film, "kinetics_train/c.json": film,
                                    "kinetics_train_label.json.gz": gzip.compress(json.dumps(listing).encode())})
    for clips in (open_clips(folder), open_clips(folder / "kinetics_train")):
        assert clips.names == ["a", "c"] and [c.label for c in clips] == [399, None] and clips[0].class_name == "yoga"
    assert open_clips(folder)[0].split == {"kinetics": "train"}
    assert open_clips(folder / "kinetics_train", labels={"c": (7, "x")})[1].label == 7
    wrong = {"a": {"label": "yoga", "label_index": "399"}}
    with pytest.raises(ClipError, match="label_index"):
        open_clips(folder_of(tmp_path / "w", **{"a.json": film, "x_label.json": json.dumps(wrong)}))
    conflict = {"a": {"label": "zumba", "label_index": 1}}
    with pytest.raises(ClipError, match="399, but 1"):
        open_clips(folder_of(tmp_path / "c", **{"a.json": json.dumps(KINETICS), "x_label.json": json.dumps(conflict)}))[0]


def test_unreadable_files(tmp_path):
    """A pipe or a dead link called .skeleton must not block or crash."""
    folder = folder_of(tmp_path, **{"a.skeleton": TWO})
    os.mkfifo(folder / "b.skeleton")
    (folder / "c.skeleton").symlink_to(folder / "nothing")
    (folder / "loop").symlink_to(folder)
    assert len(open_clips(folder)) == 1
    for name in ("b.skeleton", "c.skeleton"):
        with pytest.raises(ClipError):
            read_ntu(folder / name)
        with pytest.raises(ClipError):
            open_clips(folder / name)


# ---------------------------------------------------------------- archives and arrays


def test_damaged_archives(tmp_path):
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w:xz") as t:
        for i in range(3):
            info = tarfile.TarInfo(f"S001C001P001R001A00{i + 1}.skeleton")
            info.size = len(TWO)
            t.addfile(info, io.BytesIO(TWO.encode()))
    path = tmp_path / "cut.tar.xz"
    for end in (10, 100, len(good.getvalue()) // 2, len(good.getvalue()) - 20):
        path.write_bytes(good.getvalue()[:end])
        with pytest.raises(ClipError):
            list(open_clips(path))


def packed(kind):
    """Two recordings and clutter as an archive's bytes."""
    files, out = {"S001C001P001R001A001.skeleton": TWO, "README.md": "hello", "a/S001C001P001R001A002.skeleton": TWO}, io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            for name, text in files.items():
                z.writestr(name, text)
    else:
        with tarfile.open(fileobj=out, mode=f"w:{kind}") as t:
            for name, text in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(text)
                t.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def fuzz_archives(folder, data):
    """Whatever bytes an archive has: clips and ClipErrors, no crash, no other error."""
    kind = data.draw(st.sampled_from(["zip", "", "gz", "xz"]))
    (folder / "a.bin").write_bytes(mutations(packed(kind), data.draw))
    path = folder / "a.bin"
    if data.draw(st.booleans()):  # in a folder of archives
        path = (folder / "in").mkdir() or folder / "in"
        (folder / "a.bin").rename(path / ("a.zip" if kind == "zip" else "a.tar"))
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


@given(st.data())
@settings(max_examples=100, **FUZZ)
def test_fuzzed_label_lists(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    listing = json.dumps({n: {"has_skeleton": True, "label": "yoga", "label_index": 399} for n in "ab"}).encode()
    (folder / "a.json").write_text(json.dumps(KINETICS))
    if data.draw(st.booleans()):
        (folder / "x_label.json.gz").write_bytes(mutations(gzip.compress(listing), data.draw))
    else:
        (folder / "x_label.json").write_bytes(mutations(listing, data.draw))
    try:
        check_clip(open_clips(folder)[0])
    except ClipError as e:
        assert str(e)


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


def test_huge_members_are_refused(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        with z.open("a.skeleton", "w") as f:
            for _ in range(70):
                f.write(bytes(1 << 20))
    with pytest.raises(ClipError, match="no recording of this kind"):
        open_clips(path)[0]


def test_a_tar_that_ends_early_is_no_tar(tmp_path):
    """tarfile itself takes a damaged header, or a file cut off between two members, for the end."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as t:
        for i in range(1, 4):
            info = tarfile.TarInfo(f"S001C001P001R001A00{i}.skeleton")
            info.size = len(TWO)
            t.addfile(info, io.BytesIO(TWO.encode()))
        link = tarfile.TarInfo("S001C001P001R001A004.skeleton")
        link.type, link.linkname = tarfile.LNKTYPE, "S001C001P001R001A001.skeleton"
        t.addfile(link)
    assert [c.label for c in open_clips(path)] == [0, 1, 2, 3]  # a hard link is its file
    with tarfile.open(path) as t:
        at = t.getmembers()[1].offset
    whole = path.read_bytes()
    for damaged in (whole[: at + 150] + bytes([whole[at + 150] ^ 1]) + whole[at + 151 :], whole[: at + 100], whole[:at]):
        path.write_bytes(damaged)
        with pytest.raises(ClipError, match="cut off or damaged"):
            open_clips(path)


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        name = "full"

        def write(self, data):
            raise OSError(28, "No space left on device")

    (tmp_path / "a.tar.xz").write_bytes(packed("xz"))
    monkeypatch.setattr("stf.files.tempfile.NamedTemporaryFile", lambda **k: Full())
    monkeypatch.setattr("stf.files.weakref.finalize", lambda *a: None)
    with pytest.raises(ClipError, match="no room to unpack it in .*TMPDIR"):
        open_clips(tmp_path / "a.tar.xz")


def test_more_archives_than_open_files(tmp_path):
    import resource

    for i in range(120):
        with zipfile.ZipFile(tmp_path / f"{i:03d}.zip", "w") as z:
            z.writestr(f"S001C001P{i + 1:03d}R001A001.skeleton", ntu_text([["1"]]))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 80, hard))
    try:
        clips = open_clips(tmp_path)
        assert len(list(clips)) == 120 and clips[0].tags["subject"] == 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("frames, listed", [
    ([["1"], ["2", "3", "1"]], [2, 0, 1]), ([["2", "3"], ["2", "3"], ["1", "2"]], [1, 2, 0]), ([["1", "2", "3"]] * 2, None),
    ([["1", "2"], ["2", "3"], ["3", "1"]], None),  # no order at all: as they came
])
def test_ranks_of_three_bodies(frames, listed):
    """All bodies of a frame are compared, and orders that hang together by another frame are followed."""
    assert ntu(ntu_text(frames)).tags.get("listed") == listed


def test_errors_of_a_single_file_name_it(tmp_path):
    rows = re.sub(r"(?m)^\S+ \S+ \S+( \S+){8} \d$", "0 0 0 0 0 0 0 0 0 0 0 0", ntu_text([["1"]]))
    for name, data, read in (("a.skeleton", rows, read_ntu), ("a.json", json.dumps({**UCLA, "skeletons": [[[0, 0, 0]] * 20]}), read_ucla)):
        (tmp_path / name).write_text(data)
        with pytest.raises(ClipError, match="no body") as e:
            read(tmp_path / name)
        assert e.value.path == str(tmp_path / name)


def test_tar_bomb_is_refused(tmp_path, monkeypatch):
    """It must stop long before its end: in a file's content, and in a header that claims to be long."""
    monkeypatch.setattr("stf.files._RATIO_FROM", 1 << 22)
    for kind, name in ((tarfile.REGTYPE, "a.skeleton"), (tarfile.XHDTYPE, "header")):
        info = tarfile.TarInfo(name)
        info.type, info.size = kind, 90 << 20
        path = tmp_path / f"{name}.tar.xz"
        with lzma.open(path, "wb", preset=0) as f:
            f.write(info.tobuf())
            for _ in range(90):
                f.write(bytes(1 << 20))
        with pytest.raises(ClipError, match="200 times"):
            open_clips(path)


def test_links_and_devices_in_a_tar_are_no_files(tmp_path):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as t:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.skeleton")
            info.type, info.linkname = kind, "/etc/passwd"
            t.addfile(info)
    assert Files(path).names == []


@pytest.mark.parametrize("kind", ["zip", "tar", "xztar"])
def test_names_in_an_archive_lead_nowhere(tmp_path, kind):
    """Absolute paths and .. are names like others: read, and nothing is written."""
    names, path = ["../../out.skeleton", str(tmp_path / "abs.skeleton"), "a/../../b.skeleton"], tmp_path / "in" / f"a.{kind}"
    path.parent.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as z:
            for name in names:
                z.writestr(name, TWO)
    else:
        with tarfile.open(path, "w:xz" if kind == "xztar" else "w") as t:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(TWO)
                t.addfile(info, io.BytesIO(TWO.encode()))
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert sorted(c.name for c in open_clips(path)) == ["abs", "b", "out"]
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_temporary_file_goes_with_its_clips(tmp_path):
    import gc

    (tmp_path / "a.tar.xz").write_bytes(packed("xz"))
    clips = open_clips(tmp_path / "a.tar.xz")
    _, _, file, _ = clips.read.args[0].entries[1]
    assert file.exists() and len(list(clips)) == 2
    del clips
    gc.collect()
    assert not file.exists()


def test_npy_that_lies_about_its_size():
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    lying = io.BytesIO()
    with zipfile.ZipFile(lying, "w") as archive:
        archive.writestr("joints.npy", file.getvalue())
    for data in (lying.getvalue(), b"PK\3\4 not a zip", file.getvalue(), b""):
        with pytest.raises(ClipError, match="can't be read"):
            read_plain(io.BytesIO(data), "a.npz")


def test_an_archive_is_known_by_its_content(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.dat", "w") as z:
        z.writestr("a.skeleton", TWO)
    assert len(open_clips(tmp_path / "a.dat")) == 1


def test_error_travels_between_processes():
    e = pickle.loads(pickle.dumps(ClipError("a", "line 3", "bad")))
    assert (e.path, e.place, e.reason, str(e)) == ("a", "line 3", "bad", "a: line 3: bad")


def test_modules_import_alone():
    for name in ("arrays", "clips", "preparation", "dataset"):
        subprocess.run([sys.executable, "-W", "error", "-c", f"import stf.{name}"], check=True)


# ---------------------------------------------------------------- facts and real recordings


def test_names():
    assert class_names("ntu60") == class_names("ntu120")[:60] and len(set(class_names("kinetics400"))) == 400
    assert all(name_tags(n) for n in ntu_missing_skeletons())
    assert name_tags("C:\\data\\S001C002P003R002A013.skeleton") == dict(setup=1, camera=2, subject=3, replication=2, action=13)
    for bad in ("S001C002P003R002A000", "S001C002P003R002", "xS001C002P003R002A013", ""):
        assert name_tags(bad) == {}


def test_real_ntu(real_data):
    """Every raw file gives what a reader by the words of the format gives."""
    paths = [real_data / "ntu-raw/skeletons", real_data / "ntu120-raw/ntu120_116.tar.xz"]
    if not all(p.exists() for p in paths):
        pytest.skip("raw NTU files are not among the real recordings")
    for path in paths:
        for i, clip in enumerate(clips := open_clips(path)):
            check_clip(clip)
            if len(clip.joints) == 1 and i % 3 == 0 and path.is_dir():
                found = naive(open(clips.where(i)).read())
                np.testing.assert_array_equal(clip.joints[0][clip.present[0]].reshape(-1, 3), found)
    false_body = read_ntu(paths[0] / "S001C001P003R002A005.skeleton")
    assert false_body.present.all() and len(false_body.joints) == 2
    assert read_ntu(paths[0] / "S017C003P020R002A059.skeleton").present.sum(axis=1).tolist() == [111, 32]
    assert read_ntu(paths[0] / "S017C003P020R002A059.skeleton").tags["listed"] == [1, 0]


def test_real_truncated(real_data):
    for path in sorted((real_data / "ntu-raw/truncated").glob("*.skeleton")):
        with pytest.raises(ClipError, match=r"line \d+: .*cut off"):
            read_ntu(path)


def test_real_missing_list(real_data):
    path = real_data / "ntu-raw/missing-lists/NTU_RGBD120_samples_with_missing_skeletons.txt"
    if not path.exists():
        pytest.skip("the official list of missing skeletons is not among the real recordings")
    assert ntu_missing_skeletons() == {line.strip() for line in path.read_text().split("\n")[3:] if line.strip()}


def test_real_ucla(real_data):
    path = real_data / "nw-ucla/nw_ucla_all_sqe.tar.xz"
    if not path.exists():
        pytest.skip("NW-UCLA is not among the real recordings")
    clips = list(open_clips(path))
    assert len(clips) == 1484 and {c.label for c in clips} == set(range(10))
    assert sum(c.tags["view"] == 3 for c in clips) == 464 and len({c.tags["subject"] for c in clips}) == 10
    lengths = [c.joints.shape[1] for c in clips]
    assert (min(lengths), max(lengths), np.median(lengths)) == (1, 201, 31)


def test_real_kinetics(real_data):
    """The odd cases, the archive with its empty films, and the published arrays of one film."""
    folder = real_data / "kinetics-skeleton"
    if not folder.is_dir():
        pytest.skip("Kinetics-Skeleton is not among the real recordings")
    clips = open_clips(folder / "samples", errors="collect")
    assert len(list(clips)) == 4 and [e.reason for e in clips.errors] == ["no body in any frame"] * 2
    clips = open_clips(folder / "kinetics_skeleton_240.tar.xz", errors="collect")
    splits = [c.split["kinetics"] for c in clips]
    assert (splits.count("train"), splits.count("test")) == (117, 116) and len(clips.errors) == 7
    clip = read_kinetics(folder / "pairs/bqfirst/open_pose_skeleton.json")
    golden = np.load(folder / "pairs/bqfirst/test_data_joint.npy")[0]  # (3,300,18,2)
    M, T, V, _ = clip.joints.shape
    made = np.zeros((3, 300, V, 2), np.float32)
    seen = clip.visible > 0
    made[0, :T, :, :M] = ((clip.joints[..., 0] - 0.5) * seen).transpose(1, 2, 0)
    made[1, :T, :, :M] = ((0.5 - clip.joints[..., 1]) * seen).transpose(1, 2, 0)
    made[2, :T, :, :M] = clip.visible.transpose(1, 2, 0)
    np.testing.assert_allclose(made, golden, atol=1e-6)
