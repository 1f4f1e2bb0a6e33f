"""Pictures: what they must survive, show under the right name, and refuse."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from stf import plot  # noqa: E402
from stf.skeleton import SKELETONS, Skeleton  # noqa: E402

NTU = SKELETONS["ntu25"]
STICK = Skeleton("stick", "ab", bones=((1, 0),), centre=0, height=(0, 1))


@pytest.fixture(autouse=True)
def closed():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before, "a drawing function changed the global settings"
    plt.close("all")


def clip(skeleton=NTU, M=2, T=6, C=3, seed=0):
    return np.random.default_rng(seed).normal(size=(M, T, skeleton.num_joints, C))


def pixels(ax):
    ax.figure.canvas.draw()
    return np.asarray(ax.figure.canvas.buffer_rgba())


def points(ax):
    return [c.get_offsets() for c in ax.collections if hasattr(c, "get_sizes")]


@pytest.mark.parametrize("skeleton", [*SKELETONS.values(), STICK], ids=lambda s: s.name)
def test_every_layout_is_drawn(skeleton):
    C, V = 2 + skeleton.name.startswith(("ntu", "kinect")), skeleton.num_joints
    joints = clip(skeleton, C=C)
    Q = np.random.default_rng(1).random(joints.shape[:-1])
    Q[1, :3], joints[1, :3] = 0, 0  # the second body comes late
    for view in ["front"] + ["side", "top", 30.0] * (C == 3):
        plot.draw_skeleton(joints[:, 5], skeleton, view=view, names=True, values=np.ones((2, V)))
    plot.draw_strip(joints, skeleton, frames=3)
    plot.draw_focus(Q, skeleton)
    plot.draw_focus({"early": Q, "late": Q[:, ::2]}, skeleton)
    plot.draw_focus_volume(joints, Q, skeleton, frames=3)
    A = skeleton.adjacency() + np.eye(V)
    plot.draw_adjacency({"A": A, "G": -A}, skeleton)
    plot.draw_links(joints[0, 0], A, skeleton)
    for number in plt.get_fignums():
        plt.figure(number).draw_without_rendering()


def test_extreme_values_are_drawn():
    joints, half = torch.randn(25, 3, requires_grad=True), torch.rand(25, dtype=torch.bfloat16)
    for values in [half, np.zeros(25), np.r_[np.nan, np.arange(24.0)], np.full(25, np.nan)]:
        pixels(plot.draw_skeleton(joints, NTU, values=values, colour_bar="v"))
    pixels(plot.draw_focus_volume(clip(M=1, T=1)[0], np.zeros((1, 25)), NTU))  # a single frame
    pixels(plot.draw_focus(np.zeros((1, 25)), NTU))
    pixels(plot.draw_strip(np.ones((3, 2, 2)), STICK))
    assert "no body" in plot.draw_skeleton(np.zeros((25, 3)), NTU).texts[0].get_text()


def test_absent_bodies_and_lost_joints_leave_no_ink():
    joints = clip(T=1)[:, 0]
    alone = pixels(plot.draw_skeleton(joints[0], NTU)).copy()
    with_absent = np.concatenate([joints[:1], np.zeros((1, 25, 3))])
    assert np.array_equal(alone, pixels(plot.draw_skeleton(with_absent, NTU)))
    second_hidden = np.repeat([[1.0], [0.0]], 25, 1)
    assert np.array_equal(alone, pixels(plot.draw_skeleton(joints, NTU, visible=second_hidden)))
    lost = joints[0].copy()
    lost[3] = np.nan
    ax = plot.draw_skeleton(lost, NTU)
    assert len(points(ax)[0]) == 24 and len(ax.collections[1].get_segments()) == 23
    zeros = plot.draw_skeleton(np.zeros((25, 3)), NTU, visible=np.ones(25))  # visibility overrules
    assert len(points(zeros)[0]) == 25


def test_image_coordinates_are_turned_over_and_scores_do_not_tilt():
    coco, openpose = SKELETONS["coco17"], SKELETONS["openpose18"]
    pose = np.zeros((17, 2)) + np.arange(17)[:, None]  # y in pixels, downwards: the nose on top
    (shown,) = points(plot.draw_skeleton(pose, coco))
    assert shown[0, 1] > shown[16, 1]
    for s, C in ((SKELETONS["body25"], 2), (coco, 3)):  # in 3D y is up, whatever the layout
        pose = np.zeros((s.num_joints, C)) + np.arange(s.num_joints)[:, None]
        (shown,) = points(plot.draw_skeleton(pose, s))
        assert (shown[0, 1] > shown[16, 1]) == (C == 2)
    pose = clip(openpose, M=1, T=1)[0, 0]  # third channel: a score
    assert np.allclose(*(points(plot.draw_skeleton(p, openpose))[0] for p in (pose[:, :2], pose)))


@pytest.mark.parametrize("draw, arguments, message", [
    ("draw_skeleton", (np.ones((24, 3)), NTU), "25 joints"),
    ("draw_skeleton", (np.ones((25, 4)), NTU), "2 or 3 coordinates"),
    ("draw_skeleton", (np.ones((25, 2)), NTU, None, None, None, "side"), "3 coordinates"),
    ("draw_skeleton", (np.ones((25, 3)), NTU, None, None, np.ones(24)), "a value a joint"),
    ("draw_strip", (np.zeros((4, 25, 3)), NTU), "no body"),
    ("draw_focus", (np.ones((4, 24)), NTU), "V = 25"),
    ("draw_adjacency", (np.eye(24), NTU), r"\(25,25\)"),
    ("draw_links", (np.ones((25, 3)), np.eye(3), NTU), "shapes"),
    ("draw_history", (pd.DataFrame({"speed": [1]}),), "none of the columns"),
    ("animate", ([clip(), clip()], NTU, [None]), "shorter"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(plot, draw)(*arguments)


def test_a_strip_stands_on_one_ground_and_keeps_order():
    walk = clip(M=1, T=5)[0] + np.arange(5)[:, None, None] * [3.0, 0, 0]
    walk[2] = 0  # an empty frame keeps its place
    shown = points(plot.draw_strip(walk, NTU, frames=5))
    steps = np.diff([p[:, 0].mean() for p in shown if len(p)])
    assert len(steps) == 3 and steps.min() > 0 and steps[1] > 1.5 * steps[0]
    assert np.isclose(min(p[:, 1].min() for p in shown if len(p)), walk[..., 1].min())


def test_heat_maps_put_rows_under_the_right_names():
    groups = plot.limb_groups(NTU)
    assert sorted(v for g in groups for v in g) == list(range(25))
    assert [NTU.joints[groups[i][0]] for i in (1, 4)] == ["left shoulder", "right hip"]
    Q = np.tile(np.eye(25)[NTU.index("head")], (4, 1))
    ax = plot.draw_focus(Q, NTU)
    row = int(ax.images[0].get_array()[:, 0].argmax())
    assert ax.get_yticklabels()[row].get_text() == "head"
    A = np.zeros((25, 25))
    A[NTU.index("left hand"), NTU.index("right foot")] = 1
    ax = plot.draw_adjacency(A, NTU)
    y, x = np.argwhere(ax.images[0].get_array() == 1)[0]
    assert ax.get_yticklabels()[y].get_text() == "left hand"
    assert ax.get_xticklabels()[x].get_text() == "right foot"
    labels = plot.draw_focus(np.stack([0 * Q, Q, Q]), NTU).get_yticklabels()  # body 1 is absent
    assert len(labels) == 50 and [labels[i].get_text()[-3:] for i in (0, -1)] == ["(2)", "(3)"]
    A = np.diag(np.r_[-3.0, np.ones(24)])
    for ax in plot.draw_adjacency({"A": A, "B": np.eye(25)}, NTU):  # one scale around zero
        norm, cmap = ax.images[0].norm, ax.images[0].get_cmap()
        assert (norm.vmin, norm.vmax) == (-3, 3) and cmap(1.0)[0] > cmap(1.0)[2]  # red adds


def test_links_are_those_of_the_matrix():
    pose, A = clip()[0, 0], np.eye(25)
    A[3, 7], A[4, 9] = 2, -1
    first, second = plot.draw_links(pose, A, NTU).patches
    assert np.allclose(first.get_path().vertices[[0, -1]], pose[[3, 7], :2], atol=1e-6)
    (red, _, blue, _), (less_red, _, more_blue, _) = (p.get_edgecolor() for p in (first, second))
    assert red > blue and less_red < more_blue
    assert not plot.draw_links(pose, np.eye(25), NTU).patches


def test_results_are_under_their_names():
    frame = pd.DataFrame({"accuracy": [20, 90, 50], "difference": [-20, 10, 0]}, index=list("bac"))
    ax = plot.draw_class_difference(frame)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "c", "b"]
    assert sorted(bar.get_width() for bar in ax.patches) == [-20, 0, 10]
    counts = pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"])
    ax = plot.draw_confusion(counts)  # no clip of class b: unknown, not 0 %
    assert [t.get_text() for t in ax.texts][:2] == ["75", "25"]
    assert ax.collections[0].get_array().mask.tolist() == [[False, False], [True, True]]
    assert plot.draw_confusion(counts, ["b", "a"]).get_yticklabels()[0].get_text() == "b"


def test_history_with_one_epoch_and_gaps():
    one = pd.DataFrame({"epoch": [1], "loss": [2.0], "ce": [2.0], "lr": [0.0]})
    assert len(plot.draw_history(one).axes) == 3
    gaps = pd.DataFrame({"ce": [3.0, 2.0], "test_top1": [np.nan, 40.0], "e": [np.nan] * 2})
    assert len(plot.draw_history({"a": gaps, "b": one}).axes) == 4  # e was never measured
    pixels(plot.draw_method())


def test_a_gif_has_every_frame_at_the_right_speed_on_white(tmp_path):
    coco = SKELETONS["coco17"]  # beside a clip of another length, layout and view
    clips = [clip(T=9), clip(coco, T=3, C=2)[0]]
    anim = plot.animate(clips, [NTU, coco], values=[np.full((2, 9, 25), 0.5), None], fps=20, step=2,
                        view=[(0, 90), "front"], titles=["a", "b"], colour_bar="v")  # fmt: skip
    with Image.open(plot.save_animation(anim, tmp_path / "a.gif", dpi=50)) as picture:
        first = picture.convert("RGB")
        assert picture.n_frames == 5 and picture.info["duration"] == 100
        assert first.getpixel((0, 0)) == (255, 255, 255)
        picture.seek(4)
        assert first.tobytes() != picture.convert("RGB").tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


@pytest.mark.filterwarnings("ignore:Animation was deleted")
def test_a_failing_animation_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.gif"
    path.write_text("old")
    anim = plot.animate(clip(T=3), NTU, trail="head")
    page = plot.save_animation(anim, tmp_path / "b.html", dpi=30)
    assert page.read_text().count("data:image/png") == 3
    anim._func = lambda frame: 1 / (2 - frame)
    with pytest.raises(ZeroDivisionError):
        plot.save_animation(anim, path)
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 2
    fast = plot.animate(clip(T=2), NTU, fps=120)
    for name, message in [("a.gif", "at most 50"), ("a", "written as")]:
        with pytest.raises(ValueError, match=message):
            plot.save_animation(fast, tmp_path / name)
