"Stores: what notebook 14 can't show: damage, kills, full disks, real splits, files in any number of processes."

import json
import multiprocessing
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import stf.store
from stf.clips import Clip, ClipError, name_tags, open_clips
from stf.dataset import (Batches, ClipStore, StoreError, fraction, load_batches, make_batch, open_input, protocol_side, splits,
                         validation_split, verify_store)
from stf.preparation import STREAMS, Augment
from stf.skeleton import SKELETONS
from test_preparation import FLAT, clip, some

REAL = Path(os.environ.get("STF_REAL_DATA", Path(__file__).resolve().parents[2] / "shared" / "real-data"))
needs_real = pytest.mark.skipif(not REAL.exists(), reason=f"real recordings are not at {REAL}")


def build(clips, folder, **more):
    return ClipStore.build(clips, folder, progress=False, **more)


@needs_real
def test_golden_pair_through_a_store(tmp_path):
    from stf.clips import read_ntu

    golden = np.load(REAL / "ntu-msg3d-npy/golden_pairs.npz")
    clips = [read_ntu(p) for p in sorted((REAL / "ntu-raw/skeletons").glob("*.skeleton"))]
    store = build(clips, tmp_path / "s")
    for stream in ("joint", "bone"):
        at = [store.names.index(str(n)[:20]) for n in golden[stream + "_names"]]
        x, _ = store.batch(at, stream=stream, preprocess="msg3d")
        assert np.abs(x.numpy() - golden[stream]).max() < 1e-5
    x, _ = store.batch(range(len(store)))
    assert x.shape == (18, 4, 300, 25, 2) and x.isfinite().all() and x.abs().max() < 20


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
        assert store.names == names and len(store.header["skipped"]) == 302
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
    verify_store(tmp_path / "a")
    for c, back in zip(clips, store):
        assert np.array_equal(c.joints, back.joints) and np.array_equal(c.visible, back.visible)
        assert (c.name, c.label, c.tags, c.split, c.skeleton) == (
            back.name,
            back.label,
            back.tags,
            back.split,
            back.skeleton,
        )
    x = again.batch([5, 699, 5], stream="bone", length=9).x
    assert torch.equal(x, make_batch([clips[5], clips[699], clips[5]], stream="bone", length=9).x)
    assert torch.equal(pickle.loads(pickle.dumps(store)).batch([5, 699, 5], stream="bone", length=9).x, x)


def test_classes(tmp_path):
    named = [clip("a", 4, class_name="jump"), clip("b", 2, class_name="run")]
    store = build(named, tmp_path / "a")
    assert store.classes == ["run", "jump"] and store.labels.tolist() == [1, 0] and store[0].label == 4
    store = build(named, tmp_path / "b", classes=["sit", "lie", "run", "walk", "jump"])
    assert store.labels.tolist() == [4, 2] and store.batch([0], length=3).y.tolist() == [4]
    with pytest.raises(StoreError, match="'a' has label 4, classes 2 names"):
        build(named, tmp_path / "c", classes=["run", "jump"])
    with pytest.raises(StoreError, match="'a' calls label 4 'jump', but it is 'run' in classes"):
        build(named, tmp_path / "c", classes=["sit", "lie", "jump", "walk", "run"])
    with pytest.raises(StoreError, match="clip 'b' calls label 1 'hop', but it is 'jump' in clips before it"):
        build([clip("a", 1, class_name="jump"), clip("b", 1, class_name="hop")], tmp_path / "c")
    with pytest.raises(StoreError, match="two labels have one class name"):
        build([clip("a", 0, class_name="jump"), clip("b", 1, class_name="jump")], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_clips_that_do_not_fit_are_named(tmp_path):
    other = clip("other", skeleton=SKELETONS["kinect20"])
    far = [clip(f"c{i}") for i in range(300)]  # the odd one far from the first
    for clips, message in (
        ([clip("same"), clip("same")], "'same'"), (far + [clip("c0")], "'c0'"), ([clip("a"), other], "'a' .body, 3 coordinates. and 'other' .kinect20, 3 coord"),
        (far + [other], "'c0' .*'other'"), ([clip("a", None)], "a: label: has no label"), ([], "no clip to store"),
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


def test_bad_files_are_collected(tmp_path):
    items = [ClipError(f"file{i}.skeleton", "line 2", "cut off") if i % 3 == 0 else clip(f"clip {i}") for i in range(1, 11)]
    store = build(items, tmp_path / "s")
    assert len(store) == 7 and store.refused["path"].tolist() == ["file3.skeleton", "file6.skeleton", "file9.skeleton"]
    with pytest.raises(ClipError, match="file3"):
        build(items, tmp_path / "t", strict=True)

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
    assert build([clip("a"), missing], tmp_path / "s").header["skipped"] == [missing.name]


def test_damage_is_found(tmp_path):
    store = build(some(20), tmp_path / "s")
    for name in store.header["files"]:
        file = tmp_path / "s" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(StoreError, match=f"{name}: {len(whole) - 1} bytes"):
            ClipStore(tmp_path / "s")
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(StoreError, match=f"{name}: changed since it was built"):
            verify_store(tmp_path / "s")
        file.unlink()
        with pytest.raises(StoreError, match=f"{name}: 0 bytes"):
            ClipStore(tmp_path / "s")
        file.write_bytes(whole)
    assert verify_store(tmp_path / "s") == store.header
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
    with pytest.raises(StoreError, match="99.*build it again"):
        ClipStore(tmp_path / "s")


def test_a_store_of_the_first_edition_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "header.json").write_text(json.dumps({"format": "stf-clips", "version": 1, "files": {}}))
    with pytest.raises(StoreError, match="a store of format .*1.*build it again"):
        ClipStore(tmp_path)


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


def test_only_stores_are_replaced(tmp_path, monkeypatch):
    """A header.json alone is no store; what others have called like our drafts stays; a link to a store stays a link."""
    (tmp_path / "mine").mkdir()
    for name in ("header.json", "thesis.txt"):
        (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(StoreError, match="it is no store"):
        build(some(3), tmp_path / "mine", overwrite=True)
    (tmp_path / "s.partial-999999").mkdir()
    (tmp_path / "s.partial-999999/thesis.txt").write_text("years")
    (tmp_path / "s.partial-notes").mkdir()
    (tmp_path / "s.partial-888888").write_text("a file")
    left = tmp_path / f"s[1].partial-{os.getpid()}"
    left.mkdir()
    (left / "rows.npy").write_text("of an interrupted build in this very process")
    assert len(build(some(3), tmp_path / "s")) == len(build(some(3), tmp_path / "s[1]")) == 3
    assert (tmp_path / "s.partial-999999/thesis.txt").exists() and (tmp_path / "s.partial-888888").exists() and not left.exists()
    (tmp_path / "link").symlink_to(tmp_path / "s")
    assert len(build(some(5), tmp_path / "link", overwrite=True)) == 5
    assert (tmp_path / "link").is_symlink() and len(ClipStore(tmp_path / "s")) == 5
    renamed, rename = [], os.rename

    def stop(a, b):
        if renamed:
            raise KeyboardInterrupt
        renamed.append(b)
        rename(a, b)

    monkeypatch.setattr(os, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        build(some(2), tmp_path / "s", overwrite=True)
    assert len(ClipStore(renamed[0])) == 5  # interrupted between the two: the old store is still there


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


def test_a_store_of_a_store_keeps_its_class_names(tmp_path):
    first = build([clip("a", 0), clip("b", 1)], tmp_path / "s", classes=["p", "q", "r"])
    again = build(tmp_path / "s", tmp_path / "t")
    assert first.classes == again.classes == ["p", "q", "r"] and again[1].class_name == "q"
    assert build(first.subset([1], classes=["r", "q"]), tmp_path / "u").classes == ["r", "q"]
    mixed = [clip("a", 0), clip("b", 0, class_name="wave"), clip("c", 0)]  # no word is no contradiction
    assert build(mixed, tmp_path / "v").classes == ["wave"]
    with pytest.raises(StoreError, match="not one text"):
        build(mixed, tmp_path / "w", skip="abc")


def test_masks_and_bad_numbers(tmp_path):
    """A mask means the same everywhere; parts are parts; nothing is taken silently."""
    store = build([clip(f"c{i}", i % 3, tags={"subject": i % 4}) for i in range(12)], tmp_path / "s")
    mask = np.arange(12) >= 8
    assert sorted(np.concatenate(Batches(store, mask, 3).micro)) == [8, 9, 10, 11]
    assert set(fraction(store, mask, 0.5)) < {8, 9, 10, 11} and len(fraction(store, mask, 0.5)) == 2
    assert sorted(np.concatenate(validation_split(store, mask))) == [8, 9, 10, 11]
    for bad in (lambda: Batches(store, [0.9, 5.7], 4), lambda: fraction(store, [50, 51], 0.5), lambda: fraction(store, [-1], 1),
                lambda: fraction(store, [], 0.5), lambda: Batches(store, range(12), 0), lambda: Batches(store, range(12), 2.5),
                lambda: make_batch(some(3), numbers=[0]), lambda: make_batch(some(3), labels=[0]),
                *(lambda kw=kw: splits(store, "mine", **kw) for kw in (dict(share=10), dict(share=float("nan")), dict(validation=-0.5)))):
        with pytest.raises((ValueError, IndexError)):
            bad()
    with pytest.raises(TypeError, match="slice"):
        store[0:2]
    assert len(store.subset(classes=0)) == 4


def test_what_a_rule_and_a_stored_split_may_say(tmp_path):
    """Anything but train, test and None is told: True, 'Train' and 'training' would all have become the test side."""
    store = build([clip(f"c{i}", tags={"subject": i}, split={"mine": ("train", "val", "test")[i]} if i < 3 else {}) for i in range(4)], tmp_path / "s")
    for said in (True, "Train", "training", 1):
        with pytest.raises(StoreError, match=f"the rule gives {said!r} for clip 'c0'"):
            store.split(lambda tags: said)
    assert [s.tolist() for s in store.split("mine")] == [[0], [1, 2]]  # c3 is on neither side
    with pytest.raises(StoreError, match="protocol 'mine' gives 'Train' for clip 'a'"):
        build([clip("a", split={"mine": "Train"})], tmp_path / "t").split("mine")
    names = [f"S001C001P00{i}R001A001" for i in (1, 2, 3)]  # two listed, one left out on purpose
    listed = build([clip(n, split={"xsub": "train"} if i < 2 else {}) for i, n in enumerate(names)], tmp_path / "u")
    assert [s.tolist() for s in listed.split("xsub")] == [[0, 1], []]
    text = build([clip("a", tags={"setup": "1", "camera": "1", "subject": "1"})], tmp_path / "v")
    assert [s.tolist() for s in text.split("xview")] == [[], [0]] and [s.tolist() for s in text.split("xset")] == [[], [0]]
    assert protocol_side(name_tags("data01_s01_e01_v03_x"), "xview") is None


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
@pytest.mark.parametrize("full_at", ["rows.npy", "clips.jsonl"])
def test_a_full_disk_is_said_and_nothing_stays(tmp_path, monkeypatch, full_at):

    real = open
    full = lambda path, mode="r", *a: real("/dev/full", mode) if "w" in mode and full_at in str(path) else real(path, mode, *a)
    build(some(3), tmp_path / "other")
    monkeypatch.setattr(stf.store, "open", full, raising=False)
    with pytest.raises(StoreError, match="the build stopped.*No space left.*MB are free there.*build again"):
        build(some(30), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="the build stopped at .*file"):
        build(some(3), tmp_path / "file" / "store")
    with pytest.raises(ClipError, match="nowhere"):
        build(str(tmp_path / "nowhere"), tmp_path / "s")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


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


class Lazy:
    "Counts in a file how many clips have been read, by whichever process."

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 2000

    def __getitem__(self, i):
        with open(self.path, "a") as f:
            f.write("x")
        return clip(f"c{i}")


def test_workers_do_not_run_ahead_without_bound(tmp_path):
    """A slow disk must not fill the memory with clips that wait to be written."""
    items = stf.store._read(Lazy(tmp_path / "count"), 1)
    for _ in range(20):
        next(items)
    time.sleep(1)
    assert os.path.getsize(tmp_path / "count") < 150
    items.close()


@pytest.mark.slow
def test_no_worker_stays_behind_a_killed_build(tmp_path):
    source = write_ntu(tmp_path / "raw", 3000)
    command = [sys.executable, "-c", FILES_BUILD, str(source), str(tmp_path / "s"), "2"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    while not [p for p in tmp_path.glob("s.partial-*/rows.npy") if p.stat().st_size > 10_000]:  # until they are at work
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    time.sleep(2)
    alive = [p for p in Path("/proc").glob("[0-9]*/stat") if int(p.read_text().rpartition(")")[2].split()[3]) == process.pid]
    assert not alive and list(tmp_path.glob("s.partial-*"))
    build(open_clips(source), tmp_path / "s")  # clears away what the killed one left
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "s"]


def test_clip_keeps_its_rows_only(tmp_path):
    late = np.zeros((2, 100, 25, 3), np.float32)
    late[0], late[1, 40:45] = 1, 2
    store = build([Clip(late, name="late", label=0)], tmp_path / "s")
    assert store.index[0]["tracks"] == [[0, 100], [40, 5]] and len(np.load(tmp_path / "s" / "rows.npy")) == 105


@pytest.mark.slow
def test_memory_of_a_large_build_is_bounded(tmp_path):
    code = ("import re, sys\nimport numpy as np\nfrom stf.clips import Clip\nfrom stf.dataset import ClipStore\n"
            "clips = (Clip(np.ones((2, 150, 25, 3)), name=f'c{i}', label=i % 60) for i in range(12_000))\n"
            "ClipStore.build(clips, sys.argv[1], skip=(), progress=False)\n"
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n")  # its own peak: ru_maxrss would count the parent's  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 700_000  # kB; the rows are 1.4 GB, torch's libraries most of what is left


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
        assert torch.equal(view.batch([3, 0], stream=stream, length=9).x, store.batch([11, 20], stream=stream, length=9).x)
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


def test_a_store_is_an_input(tmp_path):
    clips = some(100, tags={"subject": 3})
    store = build(clips, tmp_path / "s")
    opened = open_input(tmp_path / "s")
    assert "a prepared store" in opened.summary and "100 clips" in opened.summary and len(opened) == 100
    assert np.array_equal(opened[7].joints, clips[7].joints) and opened[7].tags == {"subject": 3}
    assert pickle.loads(pickle.dumps(opened))[7].name == "clip 7"  # as a worker process does it
    again = build(tmp_path / "s", tmp_path / "t", workers=2)
    assert files_of(tmp_path / "s") == files_of(tmp_path / "t") and again.header == store.header
    (tmp_path / "s" / "clips.jsonl").unlink()
    with pytest.raises(ClipError, match="clips.jsonl: 0 bytes"):
        open_input(tmp_path / "s")
    with pytest.raises(ClipError, match="a prepared store: open it with stf.dataset.ClipStore"):
        open_clips(tmp_path / "t")


def test_a_split_by_any_function_of_the_tags(tmp_path):
    store = build([clip(f"c{i}", i % 3, tags={"subject": i}) for i in range(9)], tmp_path / "s")
    train, test = store.split(lambda tags: "train" if tags["subject"] < 4 else "test" if tags["label"] else None)
    assert train.tolist() == [0, 1, 2, 3] and test.tolist() == [4, 5, 7, 8]
    with pytest.raises(StoreError, match="doesn't apply to 9"):
        store.split(lambda tags: None)


def test_loaded_batches_are_those_of_batch(tmp_path):
    store = build(some(50), tmp_path / "s")
    groups = np.array_split(np.random.default_rng(0).permutation(50), 9)
    options = dict(stream="bone", length=20, augment=Augment(rotate=10, crop=0.5), seed=(1, 4))
    wanted = [store.batch(g, **options) for g in groups]
    for workers in (0, 2):
        got = list(load_batches(store, groups, workers=workers, **options))
        assert len(got) == 9 and all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(got, wanted))
    batches = Batches(store, range(50), 16, 2, seed=1, augment=Augment(rotate=10), length=9)
    batches.set_epoch(4)
    for i, part in enumerate(batches.micro):
        assert torch.equal(batches[i][0], store.batch(part, length=9, augment=Augment(rotate=10), seed=(1, 4)).x)
    with pytest.raises(IndexError, match="from 0 to 49"):
        list(load_batches(store, [[0], [50]]))
    with pytest.raises(ValueError, match="at least one"):
        store.batch([])
    with pytest.raises(ValueError, match="indices must be"):
        store.batch([0.5])


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
    with pytest.raises(StoreError, match="'good0' .ntu25.* and 'kinect' .kinect20"):
        build(raw, tmp_path / "t")
    (raw / "kinect.npz").unlink()
    with pytest.raises(StoreError, match="classes 1 names"):
        build(open_clips(raw), tmp_path / "t", classes=["only"])
    assert not list(tmp_path.glob("t*"))


def test_recordings_of_ones_own_in_folders_of_classes(tmp_path, monkeypatch):
    """run/01.npz and walk/01.npz, built into a store within their own folder, named by ~; and one more build of the same."""
    for label, word in enumerate(("run", "walk")):
        (tmp_path / "own" / word).mkdir(parents=True)
        for i in range(2):
            np.savez(tmp_path / f"own/{word}/0{i}.npz", joints=np.ones((5, 25, 3)), label=label, class_name=word)
    monkeypatch.setenv("HOME", str(tmp_path))
    for _ in range(2):
        store = build("~/own", "~/own/store", overwrite=True)
        assert store.names == ["run/00", "run/01", "walk/00", "walk/01"] and ClipStore("~/own/store").classes == ["run", "walk"]
    bad = tmp_path / "own/store/clips.jsonl"
    text = bad.read_bytes()
    bad.write_bytes(b"[" + b"0," * (len(text) // 2 - 2) + b"0" * (1 + len(text) % 2) + b"]" + b"\n")
    assert bad.stat().st_size == len(text)
    with pytest.raises(StoreError, match="clips.jsonl.*is damaged"):
        ClipStore(tmp_path / "own/store")
    for wrong, reason in ((dict(workers=-1), "workers must be 0 or more"), (dict(folder=tmp_path / ("x" * 300)), "the build stopped")):
        with pytest.raises(StoreError, match=reason):
            build(some(2), wrong.pop("folder", tmp_path / "t"), **wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_are_the_same_on_cuda(tmp_path):
    store = build(some(30), tmp_path / "s")
    for stream in STREAMS:
        here, there = (store.batch(range(30), stream=stream, length=20, device=device).x for device in ("cpu", "cuda"))
        assert there.device.type == "cuda" and torch.equal(here, there.cpu())
    for x, y in load_batches(store, [[0, 1], [2]], "cuda", length=20):
        assert x.is_pinned() and y.is_pinned()
