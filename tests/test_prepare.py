"""`stf prepare` and `stf info`, as typed: what they say, what they leave behind, and how they
end."""

import json
import re
import shutil
import sys

import matplotlib
import matplotlib.image
import numpy as np
import pytest

matplotlib.use("Agg")

from stf.cli import draw_sheet, main  # noqa: E402
from stf.clips import Clip, save_clip  # noqa: E402
from stf.dataset import ClipStore  # noqa: E402
from stf.skeleton import SKELETONS, Skeleton  # noqa: E402
from test_clips import TWO, UCLA, ntu_text  # noqa: E402

DOG = Skeleton(
    "dog",
    [f"j{i}" for i in range(7)],
    [(i, i - 1) for i in range(1, 7)],
    centre=0,
    height=(0, 1, 2),
)
MISSING = "S001C002P005R002A008"  # on the official list


@pytest.fixture
def stf(monkeypatch, tmp_path, capsys):
    """Type a command; its exit code, what it printed, and what it complained about."""
    monkeypatch.chdir(tmp_path)

    def typed(line):
        monkeypatch.setattr(sys, "argv", ["stf", *line.split()])
        try:
            main()
            code = 0
        except SystemExit as e:
            code = e.code or 0
        out, err = capsys.readouterr()
        return code, out, err.split("\n")[-2] if "stf: " in err else ""

    return typed


def raw_files(folder, **more):
    folder.mkdir()
    for i in range(1, 7):
        (folder / f"S001C00{1 + i % 3}P00{i}R001A00{1 + i % 2}.skeleton").write_text(
            ntu_text([["1"]] * 9, seed=i)
        )
    for name, data in more.items():
        (folder / f"{name}.skeleton").write_text(data)


def test_prepare_tells_what_it_found(stf, tmp_path):
    raw_files(tmp_path / "raw", S001C001P009R001A001=TWO[:900], **{MISSING: TWO})
    code, out, _ = stf("prepare raw store")
    assert code == 0
    lines = dict(
        line.split(maxsplit=1) for line in out.splitlines() if line and not line.startswith("  ")
    )
    assert "NTU RGB+D .skeleton files: 8 clips, 25 joints" in out.splitlines()[0]
    assert lines["clips"] == "6" and lines["classes"].startswith("2 (drink water, eat meal")
    assert lines["frames"] == "9 to 9, median 9, 54 in all" and lines["bodies"] == "1 a clip"
    for protocol in ("xsub", "xview"):
        assert f"{protocol}: 4 training, 2 test" in lines["protocols"]
    assert lines["unreadable"] == "1" and MISSING in lines["left"]
    assert re.search(r"S001C001P009R001A001.skeleton: line .*cut off", out)
    assert matplotlib.image.imread(tmp_path / "store/sheet.png").std() > 0.01  # not empty
    assert len(ClipStore(tmp_path / "store")) == 6  # the picture beside its files does no harm
    code, again, _ = stf("info store")
    assert code == 0 and all(line in again for line in out.splitlines()[2:9])
    assert "   0 drink water" in again



def test_strict_and_nothing_readable_end_with_2(stf, tmp_path):
    raw_files(tmp_path / "raw", S001C001P009R001A001=TWO[:900])
    code, _, err = stf("prepare raw store --strict")
    assert (
        code == 2
        and "S001C001P009R001A001.skeleton: line" in err
        and not (tmp_path / "store").exists()
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/a.skeleton").write_text("4\n")
    code, _, err = stf("prepare bad store")
    assert code == 2 and "no clip to store (1 refused" in err
    code, _, err = stf("prepare raw raw")
    assert code == 2 and "already exists" in err


def test_own_skeleton_from_a_file(stf, tmp_path):
    for folder in ("plain", "told"):
        (tmp_path / folder).mkdir()
    for i in range(4):
        joints, words = (
            np.random.default_rng(i).normal(0, 1, (1, 5, 7, 3)),
            ("sit", "roll over")[i % 2],
        )
        np.savez(tmp_path / f"plain/c{i}.npz", joints=joints, label=i % 2, class_name=words)
        save_clip(
            Clip(joints, name=f"c{i}", label=i % 2, class_name=words, skeleton=DOG),
            tmp_path / f"told/c{i}.npz",
        )
    assert (
        stf("prepare told from-told")[0] == 0 and ClipStore(tmp_path / "from-told").skeleton == DOG
    )  # the file says it
    code, _, err = stf("prepare plain store")
    assert code == 2 and "no skeleton" in err and "none is known with 7 joints" in err
    about = {
        "name": "dog",
        "joints": DOG.joints,
        "bones": DOG.bones,
        "centre": 0,
        "height": DOG.height,
    }
    (tmp_path / "dog.json").write_text(json.dumps(about))
    code, out, _ = stf("prepare plain store --skeleton dog.json")
    assert (
        code == 0
        and "dog: 7 joints" in out
        and "none: the clips have no split" in out
        and ClipStore(tmp_path / "store").skeleton == DOG
    )
    for text, reason in (
        ("cat", "no skeleton 'cat'"),
        ("bad.json", "describes no skeleton"),
        ("list.json", "describes no skeleton"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({**about, "bones": [[0, 99]]}))
        (tmp_path / "list.json").write_text("[1]")
        code, _, err = stf(f"prepare plain other --skeleton {text}")
        assert code == 2 and reason in err, err


def test_two_kinds_in_one_folder(stf, tmp_path):
    raw_files(tmp_path / "raw")
    (tmp_path / "raw/a05_s03_e00_v02.json").write_text(json.dumps(UCLA))
    code, _, err = stf("prepare raw store")
    assert code == 2 and "several kinds" in err and ".skeleton" in err and "v02.json" in err
    assert stf("prepare raw store --kind ntu")[0] == 0 and len(ClipStore(tmp_path / "store")) == 6
    assert (
        stf("prepare raw other --kind ucla")[0] == 0
        and ClipStore(tmp_path / "other").skeleton == SKELETONS["kinect20"]
    )


def test_verify_names_the_damaged_file(stf, tmp_path):
    raw_files(tmp_path / "raw")
    stf("prepare raw store")
    code, out, _ = stf("info store --verify")
    assert code == 0 and "all 2 files" in out
    for name in ("rows.npy", "clips.jsonl"):
        shutil.copytree(tmp_path / "store", tmp_path / "damaged", dirs_exist_ok=True)
        path = tmp_path / "damaged" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        code, _, err = stf("info damaged --verify")
        assert code == 2 and name in err and "changed" in err, err
        path.write_bytes(data[:-1])
        code, _, err = stf("info damaged --verify")
        assert code == 2 and name in err, err
    code, _, err = stf("info raw --verify")
    assert code == 2 and "only a store" in err


def test_info_on_recordings(stf, tmp_path):
    raw_files(tmp_path / "raw")
    code, out, _ = stf("info raw")
    assert code == 0 and "NTU RGB+D .skeleton files: 6 clips" in out
    (tmp_path / "empty").mkdir()
    assert stf("info empty")[0] == 2 and stf("info nowhere")[0] == 2


@pytest.mark.parametrize("clips", [1, 3, 6])
def test_sheet_of_few_clips(tmp_path, clips):
    """Fewer clips than places, a clip of one frame, a body that comes late."""
    joints = np.random.default_rng(0).normal(0, 1, (2, 8, 25, 3))
    joints[:, :5] = 0
    made = [Clip(joints if i else joints[:1, -1:], name=f"c{i}", label=i) for i in range(clips)]
    store = ClipStore.build(made, tmp_path / "s", progress=False)
    assert (
        len(draw_sheet(store, tmp_path / "sheet.png"))
        == clips
        == len(set(draw_sheet(store, tmp_path / "sheet.png")))
    )
