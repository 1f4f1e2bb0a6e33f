"""The explorer under odd clips, quick hands and missing packages."""
import sys
import time

import numpy as np
import pytest
import torch

from stf.clips import Clip, open_clips
from stf.dataset import ClipStore
from stf.explorer import Board, Scene, Shelf, explore, look_at, name_links, turn_view, view_window
from stf.predict import Predictor, shipped_checkpoints
from stf.skeleton import SKELETONS
from stf.checkpoints import save_checkpoint
from stf.stf_module import STFNet
from stf.synthetic import SyntheticConfig, write_synthetic


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_synthetic(folder, SyntheticConfig(actions=(7, 44, 58), subjects=(27,), cameras=(1, 3)), progress=False)
    return folder


@pytest.fixture(scope="module")
def ask():
    return Predictor(shipped_checkpoints(), "cpu")


@pytest.fixture(scope="module")
def flat_net(tmp_path_factory):
    """An untrained network for 2D people."""
    folder = tmp_path_factory.mktemp("flat")
    torch.manual_seed(0)
    net = STFNet(3, SKELETONS["openpose18"], in_channels=3, widths=(12, 24, 48), gcn_scales=3, g3d_scales=3)
    save_checkpoint(folder / "weights", net, dict(classes=["a", "b", "c"], stream="joint", preprocess="paper", length=40))
    return folder


def walk(T=20, V=25, C=3, bodies=1, seed=0):
    return np.random.default_rng(seed).normal(size=(bodies, T, V, C)).cumsum(1).astype(np.float32) * 0.02 + 0.5


def test_moved_board_equals_fresh_board(raw, ask):
    """A ghost of an earlier frame, clip, body or scale left in a kept layer."""
    clips = open_clips(raw)
    looks = [look_at(clips[i], ask) for i in (0, 2)]  # one person; two
    board, rng = Board(looks[0]), np.random.default_rng(3)
    for _ in range(8):
        look = looks[rng.integers(2)]
        changes = {"frame": int(rng.integers(look.clip.joints.shape[1])), "azimuth": float(rng.uniform(-180, 180)), "links": bool(rng.integers(2)),
                   "module": int(rng.integers(6)), "k": int(rng.integers(1, 4)), "body": int(rng.choice(look.shown))}
        board.show(look, **{k: v for k, v in changes.items() if rng.random() < 0.5})
        board.pixels()
    np.testing.assert_array_equal(board.pixels(), Board(board.look, board.scene).pixels())


def test_a_step_is_quick(raw, ask):
    """A step that draws all labels again."""
    board = Board(look_at(open_clips(raw)[0], ask))
    board.png()
    taken = []
    for t in range(1, 12):
        start = time.process_time()
        board.show(frame=t).png()
        taken.append(time.process_time() - start)
    assert np.median(taken) < 0.1, taken


def test_window_holds_the_body_from_every_side():
    joints = walk(bodies=2).reshape(-1, 3)
    for elevation in (-90, -20, 0, 45, 90):
        centre, wide, high = view_window(joints, elevation)
        for azimuth in range(0, 360, 20):
            assert (np.abs(turn_view(joints - centre, azimuth, elevation)) <= [wide, high]).all()


def test_bodies_that_are_not_shown(ask):
    """A third body has no β, no G and no place in the list; a body that comes late has β 0 before."""
    joints = walk(bodies=3, T=30)
    joints[2, 5:] = 0
    joints[1, :10] = 0
    look = look_at(Clip(joints, name="three"), ask)
    assert look.shown == (0, 1)
    assert all(not g[2].any() for g in look.dynamic) and all(not b[2].any() and not b[1, :10].any() and b[1, 10:].any() for b in look.beta)
    Board(look).show(body=1, frame=29, links=True).pixels()


def test_empty_frames_and_one_frame(ask):
    joints = walk(T=12)
    joints[:, 4:7] = 0
    Board(look_at(Clip(joints, name="gap"), ask), Scene(frame=5, links=True)).pixels()
    Board(look_at(Clip(walk(T=1), name="one"), ask)).pixels()


def test_flat_people(flat_net):
    """2D: nothing to turn, y grows downwards, 18 joints."""
    rng = np.random.default_rng(0)
    clip = Clip(rng.uniform(0, 1, (1, 15, 18, 2)).astype(np.float32), rng.uniform(0.2, 1, (1, 15, 18)).astype(np.float32), "flat")
    look = look_at(clip, Predictor(flat_net, "cpu"))
    np.testing.assert_allclose(look.points[..., 1], -clip.joints[..., 1])
    board = Board(look)
    before = board.pixels().copy()
    np.testing.assert_array_equal(board.show(azimuth=70.0).pixels(), before)
    assert look.scales == 2  # three scales in the network: k = 0, 1, 2
    with pytest.raises(ValueError, match="k must be a whole number from 1 to 2"):
        board.show(k=3)


def test_links_by_name():
    G = np.zeros((25, 25))
    G[3, 7], G[7, 3], G[0, 0] = 0.4, 0.2, 9.0  # a self-link is none
    assert name_links(G, SKELETONS["ntu25"]) == [f"{SKELETONS['ntu25'].joints[3]} – {SKELETONS['ntu25'].joints[7]} +0.300"]


class TestExplorer:
    @pytest.fixture(autouse=True)
    def needs_widgets(self):
        pytest.importorskip("ipywidgets")

    def test_hands(self, raw, ask):
        """Every control, on clips of another length: a slider that keeps the old maximum asks for a frame that isn't there."""
        explorer = explore(str(raw), ask)
        c = explorer.controls
        c["frame"].value = c["frame"].max
        for i in [i for _, i in c["clip"].options][1:]:
            c["clip"].value = i
            assert c["frame"].max == explorer.board.look.clip.joints.shape[1] - 1 and explorer.board.scene.frame == 0
        for name, value in (("frame", 5), ("azimuth", 90), ("elevation", -30), ("links", True), ("body", 1), ("module", 0), ("k", 3)):
            before = explorer.image.value
            c[name].value = value
            assert getattr(explorer.board.scene, name) == value and explorer.image.value != before, name
        c["network"].value = 1
        assert explorer.board.look.network == ask.networks[1].name and explorer.board.scene.frame == 5
        c["about"].value = c["about"].options[1]
        assert explorer.board.look.answer.about == c["about"].options[1] and explorer.board.scene.frame == 5
        c["after"].click()
        assert c["clip"].value == c["clip"].options[0][1]  # round to the first

    def test_filters(self, raw, ask, tmp_path):
        store = ClipStore.build(open_clips(raw), tmp_path / "store", progress=False)
        c = (explorer := explore(str(tmp_path / "store"), ask)).controls
        assert len(c["clip"].options) == len(store) == 6
        c["class"].value = "touch head (headache)"
        assert len(c["clip"].options) == 2 and explorer.board.look.clip.class_name == "touch head (headache)"
        c["wrong"].value = True
        right = {i: ask([store[i]])[0].correct for i in range(6)}
        assert [i for _, i in c["clip"].options] == [i for i in (store.labels == store.classes.index("touch head (headache)")).nonzero()[0] if not right[i]]
        c["class"].value = "throw"  # all of them are right: an empty list, a sentence, and the picture stays
        assert [right[i] for i in (store.labels == store.classes.index("throw")).nonzero()[0]] == [True, True]
        assert not c["clip"].options and "none of these" in explorer.status.value
        c["wrong"].value = False
        assert explorer.board.look.clip.class_name == "throw"

    def test_bad_file_is_a_sentence(self, raw, ask, tmp_path):
        for path in raw.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        bad = sorted(tmp_path.iterdir())[1]
        bad.write_bytes(bad.read_bytes()[:500])
        c = (explorer := explore(str(tmp_path), ask)).controls
        picture = explorer.image.value
        c["clip"].value = 1
        assert bad.name in explorer.status.value and explorer.image.value == picture
        c["clip"].value = 2
        assert explorer.status.value == "" and explorer.image.value != picture

    def test_clip_of_another_skeleton(self, ask):
        explorer = explore([Clip(walk(V=20), name="kinect")], ask)
        assert explorer.board is None and "'kinect20', 20 joints" in explorer.status.value
        assert "kinect20" in explorer._repr_mimebundle_()["text/plain"]

    def test_unlabelled(self, ask):
        explorer = explore(Clip(walk(), name="nobody knows"), ask)
        assert explorer.controls["wrong"].disabled and "nobody knows" in explorer.board.headline.get_text()

    def test_still_where_there_is_no_front_end(self, raw, ask):
        bundle = explore(str(raw), ask)._repr_mimebundle_()
        assert bundle["image/png"][:4] == b"\x89PNG" and set(bundle) == {"image/png", "text/plain"}


def test_without_ipywidgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(ImportError, match="pip install ipywidgets"):
        explore([Clip(walk(), name="c")])


def test_shelf_refuses(tmp_path):
    for empty in ([], iter(())):
        with pytest.raises(ValueError, match="no clip to explore"):
            Shelf(empty)
