"Stores: damage, kills, full disks, real splits, views, files in any number of processes."

import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import stf.store
from stf.clips import Clip, ClipError, name_tags, ntu_missing_skeletons, open_clips
from stf.dataset import (Batches, ClipStore, StoreError, load_batches, make_batch, protocol_side,
                         splits, validation_split)  # fmt: skip
from stf.preparation import STREAMS, Augment
from stf.skeleton import SKELETONS
from test_clips import ntu_text
from test_preparation import FLAT, REAL, clip, needs_real, some


def build(clips, folder, **more):
    return ClipStore.build(clips, folder, progress=False, **more)


def files_of(folder):
    return {p.name: p.read_bytes() for p in sorted(Path(folder).iterdir())}


def there(folder):
    return sorted(p.name for p in folder.iterdir())


# ---- protocols


@needs_real
def test_standard_splits_name_for_name(tmp_path):
    lists = {}
    with tarfile.open(REAL / "ntu-labels/ntu_split_labels.tar.xz") as tar:
        for member in filter(tarfile.TarInfo.isfile, tar):
            *_, data, protocol, file = Path(member.name).parts
            listed, _ = pickle.loads(tar.extractfile(member).read())  # our own reference file
            sides = lists.setdefault((data, protocol), {})
            sides[file.split("_")[0]] = sorted(n[:20] for n in listed)
    assert len(lists) == 4
    for (_, protocol), names in lists.items():
        found = {"train": [], "test": []}
        for name in sorted(names["train"] + names["val"]):
            found[protocol_side(name_tags(name), protocol)].append(name)
        assert [*found.values()] == [names["train"], names["val"]]
    names = lists["ntu", "xview"]  # once through a store, with the official list applied
    every = [*names["train"], *names["val"], *(n for n in ntu_missing_skeletons() if n < "S018")]
    one = np.ones((1, 1, 25, 3), np.float32)
    store = build((Clip(one, name=n, label=int(n[17:]) - 1) for n in sorted(every)), tmp_path / "s")
    assert len(store.header["skipped"]) == 302
    split = [[store.names[i] for i in side] for side in store.split("xview")]
    assert split == [names["train"], names["val"]]


def test_what_is_stored_comes_before_the_rule(tmp_path):
    def sides(protocol, *splits):
        clips = [clip(f"S001C001P00{i}R001A001", split=s) for i, s in enumerate(splits, 1)]
        store = build(clips, tmp_path / "s", overwrite=True)
        return [side.tolist() for side in store.split(protocol)]

    four = [{"xsub": "test" if i % 2 else "train", "own": "train"} for i in range(1, 5)]
    assert sides("Cross-Subject", *four) == [[1, 3], [0, 2]]
    assert sides("own", *four) == [[0, 1, 2, 3], []]
    assert sides("x-view", *four) == [[], [0, 1, 2, 3]]
    assert sides("xsub", *four[:2], {}, {}) == [[1], [0]]  # two are on neither side
    for protocol, stored, message in (
        ("xmoon", four, "knows own, xsub, x-view, x-set"),
        ("mine", [{"mine": "Train"}], "split: 'mine' must be 'train' or 'test', not 'Train'"),
        ("mine", [{"mine": "train"}, {"mine": "val"}], "must be 'train' or 'test', not 'val'"),
    ):  # fmt: skip
        with pytest.raises((StoreError, ClipError), match=message):
            sides(protocol, *stored)
    with pytest.raises(StoreError, match="subject=2,5'; there are none.*--test-subjects and --fol"):
        build(some(3), tmp_path / "t").split("xsub")
    for tags, protocol, side in (
        ({"action": 1, "take": 3, "view": 3}, "xview", "test"),
        ({"action": 1, "take": 3, "camera": 2}, "x-view", "train"),
        ({"take": 3, "view": 2}, "x-sub", None),
        ({"setup": "1", "camera": "1"}, "xview", "test"), ({"setup": "1"}, "xset", "test"),
        (name_tags("data01_s01_e01_v03_x"), "xview", None),
    ):  # fmt: skip
        assert protocol_side(tags, protocol) == side


def test_a_split_by_a_function(tmp_path):
    "True, 'Train' and 'training' would all have become the test side."
    store = build([clip(f"c{i}", i % 3, tags={"subject": i}) for i in range(9)], tmp_path / "s")
    rule = lambda tags: "train" if tags["subject"] < 4 else "test" if tags["label"] else None
    assert [side.tolist() for side in store.split(rule)] == [[0, 1, 2, 3], [4, 5, 7, 8]]
    for side in (True, "Train", "training", 1):
        with pytest.raises(StoreError, match=f"the rule gives {side!r} for clip 'c0'"):
            store.split(lambda tags: side)
    with pytest.raises(StoreError, match="doesn't apply to 9"):
        store.split(lambda tags: None)


def test_a_split_in_words(tmp_path):
    "Whole groups, even folds that test each clip once, classes alike; what is stored is first."
    people = [("anna", 9), ("ben", 5), (3, 4), ("dan", 4), ("eva", 2)]  # and how many clips of each
    clips = [clip(f"{who} {i}", i % 3, tags={"subject": who, "view": i})
             for who, count in people for i in range(count)]  # fmt: skip
    store = build(clips, tmp_path / "s")
    who = lambda side: {store.about(i)["tags"]["subject"] for i in side}
    train, test = store.split("subject=ben,3")
    assert who(test) == {"ben", 3} and who(train) == {"anna", "dan", "eva"}
    for tag, folds, sizes in ("subject", 3, [9, 7, 8]), ("clip", 5, [5, 5, 5, 5, 4]):
        sides = [store.split(f"{tag}:{k}/{folds}") for k in range(1, folds + 1)]
        assert [len(test) for _, test in sides] == sizes
        assert sorted(np.concatenate([test for _, test in sides])) == [*range(24)]
        assert all(sorted([*train, *test]) == [*range(24)] for train, test in sides)
        assert tag == "clip" or not any(who(train) & who(test) for train, test in sides)
        counts = [np.bincount(store.labels[test], minlength=3) for _, test in sides]
        assert tag != "clip" or np.ptp(counts, axis=0).max() <= 1
    for protocol, message in (
        ("camera=1", "no tag 'camera'; it has clip, subject, view"), ("hat:1/2", "no tag 'hat'"),
        ("subject=ben,cleo", "no clip has subject 'cleo'; there are anna, ben, 3, dan, eva"),
        ("subject:4/3", "from 2 to 5, the number of different subjects"),
        ("subject:0/3", "goes from 1"), ("subject:1/6", "from 2 to 5"), ("subject:1/1", "from 2"),
        ("subject:1", "doesn't apply"), ("subject=", "doesn't apply"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            store.split(protocol)
    with pytest.raises(StoreError, match="leaves 0 training and 24 test"):
        splits(store, "subject=anna,ben,3,dan,eva")
    stored = [clip("a", split={"subject=2": "train"}), clip("b", 1, split={"subject=2": "test"})]
    assert [s.tolist() for s in build(stored, tmp_path / "t").split("subject=2")] == [[0], [1]]


def test_parts_of_the_training_side(tmp_path):
    name = "S001C001P{:03d}R{:03d}A001".format
    clips = [clip(name(s, r), r % 4) for s in range(1, 9) for r in range(1, 11)]
    store = build(clips, tmp_path / "s")
    train, _ = store.split("xsub")
    a, b = validation_split(store, train, seed=3)
    assert sorted([*a, *b]) == train.tolist() and len(b) == 10
    assert len({store.names[i][9:12] for i in b}) == 1
    assert len({tuple(validation_split(store, train, seed=s)[1]) for s in range(20)}) > 1
    for by, message in (("camera", "same 'camera'"), ("hat", "no tag 'hat'")):
        with pytest.raises(StoreError, match=message):
            validation_split(store, train, by=by)
    share = lambda p, *more: splits(store, "xsub", p, *more)[0]
    small, large = (share(p, True, 0, 5) for p in (0.1, 0.5))
    assert {*small} <= {*large} and {*store.labels[small]} == {*store.labels[train]}
    assert len(share(0.25)) == 13 and len(share(1)) == len(train)
    for wrong in (dict(share=10), dict(share=float("nan")), dict(share=0), dict(validation=-0.5),
                  dict(validation=0.01), dict(validation=1)):  # fmt: skip
        with pytest.raises(ValueError, match="10 % is 0.1"):
            splits(store, "xsub", **wrong)


# ---- building


def test_store_gives_clips_back_and_is_the_same_bytes_twice(tmp_path):
    clips = some(700, split={"mine": "train"}, tags={"bodies": ["7", "8"], "subject": 3})
    store, again = build(clips, tmp_path / "a"), build(iter(clips), tmp_path / "b")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert ClipStore(tmp_path / "a", verify=True).header == store.header
    for c, back in zip(clips, store):
        assert np.array_equal(c.joints, back.joints)
        for of in ("name", "label", "tags", "split", "skeleton"):
            assert getattr(c, of) == getattr(back, of)
    x = make_batch([clips[5], clips[699], clips[5]], length=9).x
    for copy in (again, pickle.loads(pickle.dumps(store)), build(tmp_path / "b", tmp_path / "c")):
        assert torch.equal(copy.batch([5, 699, 5], length=9).x, x)
        assert copy.header == store.header
    with pytest.raises(ClipError, match="a prepared store: open it with stf.dataset.ClipStore"):
        open_clips(tmp_path / "c")
    late = np.zeros((2, 100, 25, 3), np.float32)
    late[0], late[1, 40:45] = 1, 2
    store = build([Clip(late, name="late", label=0)], tmp_path / "late")
    assert store.index[0]["tracks"] == [[0, 100], [40, 5]]  # a body's own rows only
    assert len(np.load(tmp_path / "late/rows.npy")) == 105


def test_classes(tmp_path):
    named = [clip("a", 4, class_name="jump"), clip("b", 2, class_name="run")]
    store = build(named, tmp_path / "a")
    assert store.classes == ["run", "jump"] and store.labels.tolist() == [1, 0]
    assert store[0].label == 4
    five = ["sit", "lie", "run", "walk", "jump"]
    store = build(named, tmp_path / "b", classes=five)
    assert store.labels.tolist() == [4, 2] and store.batch([0], length=3).y.tolist() == [4]
    again = build(tmp_path / "b", tmp_path / "c")  # a store of a store keeps its class names
    assert again.classes == five and again[1].class_name == "run"
    view = store.subset([1], classes=["walk", "run"])
    assert build(view, tmp_path / "d").classes == ["walk", "run"]
    mixed = [clip("a", 0), clip("b", 0, class_name="wave"), clip("c", 0)]
    assert build(mixed, tmp_path / "e").classes == ["wave"]


def ending():
    "A generator that ends at a bad file."
    yield clip("a")
    raise ClipError("b", "line 1", "bad")


NAMED = lambda a, b: [clip("a", a, class_name="jump"), clip("b", b, class_name="hop")]
KINECT = clip("kinect", skeleton=SKELETONS["kinect20"])
FAR = [clip(f"c{i}") for i in range(300)]  # the odd one comes far from the first
UNFIT = [
    ([clip("same"), clip("same")], "'same'"), (FAR + [clip("c0")], "'c0'"),
    ([clip("a"), KINECT], r"'a' \(body, 3 coord.* and 'kinect' \(kinect20, 3 coord"),
    (FAR + [KINECT], "'c0' .*'kinect'"), ([], "no clip to store"),
    ([clip("a", skeleton=FLAT, C=2), clip("b", skeleton=FLAT)], "coordinates"),
    ([Clip(np.ones((1, 1, 7, 3)), name="seven", label=0)], "'seven' has no skeleton"),
    ([clip("a", None)], "a: label: has no label"),
    ([ClipError("b", "line 1", "bad")], "1 refused.*line 1: bad"),
    (ending(), "b: line 1: bad"), ([clip("a"), {"joints": 1}], "got a dict where a Clip should be"),
    ([clip("a", tags={"x": object()})], "clip 'a': tags and split"),
    (NAMED(1, 1), "clip 'b' calls label 1 'hop', but it is 'jump' in clips before it"),
    ([clip(n, i, class_name="jump") for i, n in enumerate("ab")], "two labels have one"),
    (dict(clips=NAMED(4, 0), classes=["x", "y"]), "'a' has label 4, classes 2 names"),
    (dict(clips=NAMED(0, 1), classes=["hop", "x"]), "'b' calls label 1 'hop', but it is 'x' in"),
    (dict(classes=["a", "a"]), "different names"), (dict(classes="abc"), "not one text"),
    (dict(skip="abc"), "not one text"), (dict(workers=-1), "workers must be 0 or more"),
    (dict(clips=[clip("a"), clip("lost", None)], strict=True), "lost: label"),
    (dict(clips=[clip("a"), ClipError("f", "line 2", "cut")], strict=True), "f: line 2: cut"),
]  # fmt: skip


@pytest.mark.parametrize("options, message", UNFIT)
def test_what_does_not_fit_is_named_and_nothing_stays(options, message, tmp_path):
    options = options if isinstance(options, dict) else dict(clips=options)
    with pytest.raises((StoreError, ClipError), match=message):
        build(**{"clips": some(3), "folder": tmp_path / "s", **options})
    assert there(tmp_path) == []


def test_what_cannot_be_read_is_left_out_and_listed(tmp_path):
    missing = clip("raw/S001C002P005R002A008.skeleton")  # in NTU's list of missing skeletons
    items = [clip("a"), ClipError("f.skeleton", "line 2", "cut off"), clip("lost", None), missing]
    store = build(items, tmp_path / "s")
    assert store.names == ["a"] and store.header["skipped"] == [missing.name]
    assert [*store.refused["path"]] == ["f.skeleton", "lost"]
    assert "has no label" in store.refused["reason"][1]


def test_damage_is_found(tmp_path):
    folder = tmp_path / "s"
    store = build(some(20), folder)
    lines = folder / "clips.jsonl"
    whole, n = lines.read_bytes(), lines.stat().st_size
    deep = b"[" + b"0," * (n // 2 - 2) + b"0" * (1 + n % 2) + b"]\n"
    for data, verify, message in (
        (whole[:-1], False, f"{n - 1} bytes"), (deep, False, "clips.jsonl is damaged"),
        (whole.replace(b"frames", b"Frames"), True, "clips.jsonl: changed since it was built"),
    ):  # fmt: skip
        lines.write_bytes(data)
        with pytest.raises(StoreError, match=message):
            ClipStore(folder, verify)
    lines.write_bytes(whole)
    header, rng = (folder / "header.json").read_bytes(), np.random.default_rng(0)
    for i in rng.integers(0, len(header), 200):
        other = bytes([header[i] ^ int(rng.integers(1, 256))])
        (folder / "header.json").write_bytes(header[:i] + other + header[i + 1 :])
        try:
            assert ClipStore(folder).header == store.header  # a blank changed into another
        except StoreError:
            pass
    for version in (1, 99):  # of the first edition, of a later one
        later = json.dumps({**json.loads(header), "version": version})
        (folder / "header.json").write_text(later)
        with pytest.raises(StoreError, match=f"a store of format .*{version}.*build it again"):
            ClipStore(folder)


def test_only_stores_are_replaced(tmp_path, monkeypatch):
    "A header.json alone is no store; drafts of others stay; a link to a store stays a link."
    (tmp_path / "mine").mkdir()
    for name in ("header.json", "thesis.txt"):
        (tmp_path / "mine" / name).write_text("{}")
    build(some(3), tmp_path / "s")
    for folder, overwrite, message in (("s", False, "already exists.*overwrite=True"),
                                       ("mine", True, "it is no store")):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            build(some(3), tmp_path / folder, overwrite=overwrite)
    (tmp_path / "s.partial-999999").mkdir()
    (tmp_path / "s.partial-999999/thesis.txt").write_text("years")
    (tmp_path / "s.partial-notes").mkdir()
    (tmp_path / "s.partial-888888").write_text("a file")
    left = tmp_path / f"s[1].partial-{os.getpid()}"
    left.mkdir()
    (left / "rows.npy").write_text("of an interrupted build in this very process")
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert len(build(some(3), tmp_path / "s[1]")) == 3
    assert len(build(some(5), tmp_path / "link", overwrite=True)) == 5
    assert (tmp_path / "link").is_symlink() and len(ClipStore(tmp_path / "s")) == 5
    drafts = ["s.partial-888888", "s.partial-999999", "s.partial-notes"]
    assert there(tmp_path) == ["link", "mine", "s", *drafts, "s[1]"]
    renamed, rename = [], os.rename

    def stop(a, b):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(b)
        rename(a, b)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        build(some(2), tmp_path / "s", overwrite=True)
    assert len(ClipStore(renamed[0])) == 5  # interrupted between the two: the old store is there


def test_a_copy_of_a_store_never_reads_another_ones_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = build(some(3), "s")
    copied = pickle.dumps(store)
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    assert np.array_equal(pickle.loads(copied)[1].joints, store[1].joints)
    build(some(4), tmp_path / "s", overwrite=True)
    with pytest.raises(StoreError, match="built anew"):
        pickle.loads(copied)


def slow_clips(n=600):
    for i in range(n):
        time.sleep(0.0005)
        yield clip(f"clip {i}", i % 3, T=1 + i % 9, seed=i)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_build_leaves_no_store_and_the_next_one_is_whole(tmp_path):
    target, fork = tmp_path / "s", multiprocessing.get_context("fork")
    for wait in (0.01, 0.1, 0.2):
        child = fork.Process(target=build, args=(slow_clips(), target))
        child.start()
        child.join(wait)
        child.kill()
        child.join()
        with pytest.raises(StoreError, match="no store here"):
            ClipStore(target)
    build(slow_clips(), target)
    build(slow_clips(), tmp_path / "t")
    assert files_of(target) == files_of(tmp_path / "t") and there(tmp_path) == ["s", "t"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to act as a full disk")
@pytest.mark.parametrize("full_at", ["rows.npy", "clips.jsonl"])
def test_a_full_disk_is_named_and_nothing_stays(tmp_path, monkeypatch, full_at):
    def full(path, mode="r", *a, real=open):
        return real("/dev/full" if "w" in mode and full_at in str(path) else path, mode, *a)

    monkeypatch.setattr(stf.store, "open", full, raising=False)
    with pytest.raises(StoreError, match="the build stopped.*No space left.*MB are free there"):
        build(some(30), tmp_path / "s")
    assert there(tmp_path) == []


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for clips, place, message in (
        (some(3), "file/store", "the build stopped at .*file"),
        (some(3), "x" * 300, "build stopped"),
        (str(tmp_path / "nowhere"), "s", "nowhere"),
    ):  # fmt: skip
        with pytest.raises((StoreError, ClipError), match=message):
            build(clips, tmp_path / place)
    assert there(tmp_path) == ["file"]


# ---- files


def write_ntu(folder, n, bad=()):
    "n small NTU files of two frames; the bad ones are cut off."
    folder.mkdir()
    for i in range(n):
        name = f"S002C001P{i % 40 + 1:03d}R{i // 40 + 1:03d}A{i % 3 + 1:03d}.skeleton"
        text = ntu_text([["1"]] * 2, seed=i)
        (folder / name).write_text(text[:300] if i in bad else text)
    return folder


def test_files_are_built_the_same_in_any_number_of_processes(tmp_path):
    source = write_ntu(tmp_path / "raw", 200, bad=(5, 150))
    one = build(open_clips(source), tmp_path / "one")
    assert len(one) == 198 and "line" in one.refused["place"][0]
    assert one.refused["path"][1].startswith(str(source))
    build(str(source), tmp_path / "two", workers=2)  # a path will do
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    build(tmp_path / "one", tmp_path / "three", workers=2)  # a store, too
    files = files_of(tmp_path / "three")
    assert all(files[name] == files_of(tmp_path / "one")[name] for name in one.header["files"])


class Lazy(list):
    "Counts in a file how many clips have been read, by whichever process."

    def __getitem__(self, i):
        with open("count", "a") as f:
            f.write("x")
        return clip(f"c{i}")


def test_workers_do_not_run_ahead_without_bound(tmp_path, monkeypatch):
    "A slow disk must not fill the memory with clips that wait to be written."
    monkeypatch.chdir(tmp_path)
    items = stf.store._read(Lazy(range(2000)), 1)
    for _ in range(20):
        next(items)
    time.sleep(1)
    assert os.path.getsize("count") < 150
    items.close()


BUILD = """
import re, sys
import numpy as np
from stf.clips import Clip, open_clips
from stf.dataset import ClipStore
if __name__ == "__main__":
    clips, workers = open_clips(sys.argv[2]) if sys.argv[2:] else None, 2
    if clips is None:
        one, workers = np.ones((2, 150, 25, 3)), 0
        clips = (Clip(one, name=f"c{i}", label=i % 60) for i in range(12_000))
    ClipStore.build(clips, sys.argv[1], skip=(), progress=False, workers=workers)
    print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
def test_no_worker_stays_behind_a_killed_build(tmp_path):
    source = write_ntu(tmp_path / "raw", 3000)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "s"), str(source)]
    process = subprocess.Popen(command, start_new_session=True)
    at_work = lambda: any(p.stat().st_size > 10_000 for p in tmp_path.glob("s.partial-*/rows.npy"))
    while not at_work():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()

    def left():
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended meanwhile
                yield int(stat.read_text().rpartition(")")[2].split()[3]) == process.pid

    until = time.time() + 15  # a DataLoader's workers look for their parent every five seconds
    while any(left()) and time.time() < until:
        time.sleep(0.1)
    assert not any(left())
    assert list(tmp_path.glob("s.partial-*"))
    build(open_clips(source), tmp_path / "s")  # clears away what the killed one left
    assert there(tmp_path) == ["raw", "s"]


@pytest.mark.slow
def test_memory_of_a_large_build_is_bounded(tmp_path):
    command = [sys.executable, "-c", BUILD, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 700_000  # kB; the rows are 1.4 GB, torch's libraries most of the rest


def test_recordings_of_ones_own(tmp_path, monkeypatch):
    "Plain .npz in folders of classes, in a home folder; bad ones are refused one by one."
    raw, good = tmp_path / "own", np.ones((4, 25, 3), np.float32)
    for label, word in enumerate(("run", "walk")):
        (raw / word).mkdir(parents=True)
        for i in range(2):
            np.savez(raw / word / f"0{i}", joints=good * (i + 1), label=label, class_name=word)
    nan, seen = good * np.nan, np.full((4, 25), 2, np.float32)
    bad = {"nan": (dict(joints=nan, label=0), "frame 0, joint 0.*not a finite"),
           "none": (dict(joints=good[:0], label=0), "none of them 0"),
           "empty": (dict(joints=0 * good, label=0), "no body"),
           "seen": (dict(joints=good, label=0, visible=seen), "0..1"),
           "minus": (dict(joints=good, label=-1), "label")}  # fmt: skip
    for name, (arrays, _) in bad.items():
        np.savez(raw / name, **arrays)
    (raw / "text.npz").write_text("no archive")
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):  # into the same place once more
        store = build("~/own", "~/own/store", overwrite=True)
    assert store.names == ["run/00", "run/01", "walk/00", "walk/01"]
    assert ClipStore("~/own/store").classes == ["run", "walk"]
    table = {Path(r.path).stem: f"{r.place}: {r.reason}" for r in store.refused.itertuples()}
    assert {*table} == {*bad, "text"}
    for name, (_, message) in bad.items():
        assert re.search(message, table[name]), table[name]


# ---- views and batches


def test_a_view_is_a_store_of_its_clips(tmp_path):
    clips, picks = some(30, split={"mine": "train"}), np.array([20, 3, 3, 11])
    store = build(clips, tmp_path / "s", classes=["run", "hop", "sit"])
    view = store.subset(picks)
    for back, n in zip(view, picks):
        assert np.array_equal(back.joints, clips[n].joints) and back.name == clips[n].name
        assert back.label == clips[n].label and back.split == {"mine": "train"}
    assert torch.equal(view.batch([3, 0], length=9).x, store.batch([11, 20], length=9).x)
    again = pickle.loads(pickle.dumps(view))
    assert again.header == view.header and np.array_equal(again[1].joints, view[1].joints)
    inner = view.subset([2, 0])  # a view of a view
    assert inner.names == [store.names[3], store.names[20]]
    views = store, view, inner, store.subset([3, 20, 3, 11]), store.subset(range(30))
    assert len({v.header["checksum"] for v in views}) == 5


def test_class_subsets_and_label_maps(tmp_path):
    store = build(some(30), tmp_path / "s", classes=["run", "hop", "sit"])
    two = store.subset(classes=["sit", "run"])
    assert two.classes == ["sit", "run"] and len(two) == 20 and {*two.labels} == {0, 1}
    assert all(c.class_name == two.classes[k] and c.label == k for c, k in zip(two, two.labels))
    assert two.subset(classes=[1]).classes == ["run"] and len(store.subset(classes=0)) == 10
    assert store.subset(range(9), classes="run").names == ["clip 0", "clip 3", "clip 6"]
    moved = store.relabel({"run": "moving", 1: "moving"})
    assert moved.classes == ["moving", "sit"] and np.bincount(moved.labels).tolist() == [20, 10]
    assert moved.classes == store.relabel(["moving", "moving", "sit"]).classes
    fixed = store.relabel({"hop": None}, classes=["lie", "sit", "run"])
    assert fixed.classes == ["lie", "sit", "run"] and {*fixed.labels} == {1, 2}
    for view in (moved, two):  # a view built into a store keeps its classes and their order
        kept = build(view, tmp_path / view.classes[0])
        assert kept.classes == view.classes and np.array_equal(kept.labels, view.labels)
    for wrong, message in (
        (lambda: store.subset(classes=[3]), "no class 3"),
        (lambda: store.relabel(["a"]), "3 classes"),
        (lambda: store.subset(classes=["run", 0]), "named twice"),
        (lambda: store.relabel([None] * 3), "no clip is left"),
        (lambda: store.subset([0], classes=["hop"]), "no clip is left"),
    ):  # fmt: skip
        with pytest.raises(StoreError, match=message):
            wrong()


def test_masks_and_bad_numbers(tmp_path):
    "A mask means the same everywhere; nothing is taken silently."
    store = build([clip(f"c{i}", tags={"subject": i % 4}) for i in range(12)], tmp_path / "s")
    mask = np.arange(12) >= 8
    assert sorted(np.concatenate(Batches(store, mask, 3).micro)) == [8, 9, 10, 11]
    assert sorted(np.concatenate(validation_split(store, mask))) == [8, 9, 10, 11]
    assert store.subset(mask).names == ["c8", "c9", "c10", "c11"]
    for bad in (
        lambda: Batches(store, [0.9, 5.7], 4), lambda: Batches(store, range(12), 0),
        lambda: Batches(store, range(12), 2.5), lambda: validation_split(store, [50, 51]),
        lambda: validation_split(store, [-1]), lambda: store.batch([]), lambda: store.batch([0.5]),
        lambda: store.subset([12]), lambda: make_batch([]),
        lambda: make_batch(some(3), numbers=[0]), lambda: make_batch(some(3), labels=[0]),
    ):  # fmt: skip
        with pytest.raises((ValueError, IndexError)):
            bad()
    with pytest.raises(TypeError, match="slice"):
        store[0:2]


def test_variants_change_with_the_epoch_in_any_number_of_workers(tmp_path):
    "Each clip looks different in another epoch, and the same in the same one of another run."
    store, augment = build(some(20), tmp_path / "s"), Augment(rotate=30)

    def epochs(*numbers, workers):
        batches = Batches(store, range(20), 7, 2, seed=1, augment=augment, length=9)
        for epoch in numbers:
            batches.set_epoch(epoch)
            xs = [x for x, _ in DataLoader(batches, batch_size=None, num_workers=workers)]
            clips = np.concatenate(batches.micro)
            yield torch.cat(xs)[np.argsort(clips)]  # clip by clip

    first, second = epochs(0, 1, workers=0)
    assert not any(map(torch.equal, first, second))
    assert torch.equal(second, store.batch(length=9, augment=augment, seed=(1, 1)).x)
    for again, wanted in zip(epochs(1, 0, workers=2), (second, first)):
        assert torch.equal(again, wanted)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_the_same_on_cuda(tmp_path):
    store = build(some(30), tmp_path / "s")
    for stream in STREAMS:
        options = dict(stream=stream, length=20)
        here, there = (store.batch(device=d, **options).x for d in ("cpu", "cuda"))
        assert there.device.type == "cuda" and torch.equal(here, there.cpu())
    for x, y in load_batches(store, [[0, 1], [2]], "cuda", length=20):
        assert x.is_pinned() and y.is_pinned()
