"""Pictures: what they must survive, and what they must say when they refuse."""
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from stf import plot  # noqa: E402
from stf.skeleton import SKELETONS, Skeleton  # noqa: E402

DOT = Skeleton("dot", ["dot"], bones=(), centre=0, height=(0,))


@pytest.fixture(autouse=True)
def closed():
    before = dict(plt.rcParams)
    yield
    assert dict(plt.rcParams) == before, "a drawing function changed the global settings"
    plt.close("all")


def clip(skeleton, M=2, T=6, C=3, seed=0):
    return np.random.default_rng(seed).normal(size=(M, T, skeleton.num_joints, C))


def pixels(ax):
    fig = getattr(ax, "figure", ax)
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())


@pytest.mark.parametrize("skeleton", [*SKELETONS.values(), DOT], ids=lambda s: s.name)
@pytest.mark.parametrize("C", [2, 3])
def test_every_layout_is_drawn(skeleton, C):
    joints = clip(skeleton, C=C)
    V = skeleton.num_joints
    for view in ["front"] + (["side", "top", 30.0, "3d"] if C == 3 else []):
        pixels(plot.draw_skeleton(joints[:, 0], skeleton, view=view, names=True, values=np.ones((2, V))))
    pixels(plot.draw_strip(joints, skeleton, frames=3))
    pixels(plot.draw_focus(np.abs(joints[0, ..., 0]), skeleton))
    pixels(plot.draw_adjacency(skeleton.adjacency(), skeleton))


def test_tensors_with_gradients_and_half_precision_are_accepted():
    joints = torch.randn(25, 3, requires_grad=True)
    plot.draw_skeleton(joints, SKELETONS["ntu25"], values=torch.rand(25, dtype=torch.bfloat16))


def test_absent_bodies_and_lost_joints_leave_no_ink():
    ntu = SKELETONS["ntu25"]
    joints = clip(ntu, T=1)[:, 0]
    alone = pixels(plot.draw_skeleton(joints[0], ntu)).copy()
    with_absent = np.concatenate([joints[:1], np.zeros((1, 25, 3))])
    assert np.array_equal(alone, pixels(plot.draw_skeleton(with_absent, ntu)))
    hidden = plot.draw_skeleton(joints, ntu, visible=np.repeat([[1.0], [0.0]], 25, 1))
    assert np.array_equal(alone, pixels(hidden))
    lost = joints[0].copy()
    lost[3] = np.nan
    ax = plot.draw_skeleton(lost, ntu)
    assert len(ax.collections[1].get_offsets()) == 24 and len(ax.collections[0].get_segments()) == 23


def test_visibility_overrules_zero_coordinates():
    arm = Skeleton("arm", "abc", bones=[(1, 0), (2, 1)], centre=0, height=(0, 1))
    assert not len(plot.draw_skeleton(np.zeros((3, 2)), arm).collections[1].get_offsets())
    assert len(plot.draw_skeleton(np.zeros((3, 2)), arm, visible=np.ones(3)).collections[1].get_offsets()) == 3


def test_image_coordinates_are_turned_over():
    "The nose of a pose in pixels (y downwards) must be above its ankles."
    coco = SKELETONS["coco17"]
    pose = np.zeros((17, 2)) + np.arange(17)[:, None]
    offsets = plot.draw_skeleton(pose, coco).collections[1].get_offsets()
    assert offsets[0, 1] > offsets[16, 1]
    offsets = plot.draw_skeleton(pose, coco, y_down=False).collections[1].get_offsets()
    assert offsets[0, 1] < offsets[16, 1]


def test_scores_in_the_third_channel_do_not_tilt_the_front_view():
    openpose = SKELETONS["openpose18"]
    pose = clip(openpose, M=1, T=1)[0, 0]
    flat, scored = (plot.draw_skeleton(p, openpose).collections[1].get_offsets() for p in (pose[:, :2], pose))
    assert np.allclose(flat, scored)


@pytest.mark.parametrize("values", [np.zeros(25), np.full(25, 0.3), np.r_[np.nan, np.arange(24.0)], -np.arange(25.0)])
def test_values_constant_negative_or_unknown(values):
    joints = clip(SKELETONS["ntu25"])[0, 0]
    pixels(plot.draw_skeleton(joints, SKELETONS["ntu25"], values=values, colour_bar="v"))


@pytest.mark.parametrize(
    "joints, options, message",
    [
        (np.ones((24, 3)), {}, "25 joints"),
        (np.ones((25, 4)), {}, "2 or 3 coordinates"),
        (np.ones(25), {}, r"\(V,C\)"),
        (np.ones((0, 25, 3)), {}, "empty"),
        ([["a"] * 3] * 25, {}, "array of numbers"),
        (np.ones((25, 2)), {"view": "3d"}, "3 coordinates"),
        (np.ones((25, 3)), {"view": "back"}, "view must be"),
        (np.ones((25, 3)), {"view": np.nan}, "view must be"),
        (np.ones((25, 3)), {"values": np.ones(24)}, "one value for each joint"),
        (np.ones((25, 3)), {"visible": np.ones((2, 25))}, "one value for each joint"),
        (np.ones((25, 3)), {"values": np.full(25, np.nan)}, "no finite value"),
        (np.ones((25, 3)), {"names": ["tail"]}, "no joint 'tail'"),
    ],
)
def test_draw_skeleton_refuses(joints, options, message):
    with pytest.raises(ValueError, match=message):
        plot.draw_skeleton(joints, SKELETONS["ntu25"], **options)


def test_axes_of_the_wrong_kind_are_refused():
    joints = clip(SKELETONS["ntu25"])[0, 0]
    with pytest.raises(ValueError, match="projection"):
        plot.draw_skeleton(joints, SKELETONS["ntu25"], ax=plt.figure().add_subplot(), view="3d")
    with pytest.raises(ValueError, match="projection"):
        plot.draw_skeleton(joints, SKELETONS["ntu25"], ax=plt.figure().add_subplot(projection="3d"))


def test_shared_axes_can_be_drawn():
    fig, axes = plt.subplots(1, 2, sharex=True, sharey=True)
    for ax in axes:
        plot.draw_skeleton(clip(SKELETONS["ntu25"])[0, 0], SKELETONS["ntu25"], ax=ax)
    fig.canvas.draw()


def test_a_strip_stands_on_one_ground_and_keeps_order():
    ntu = SKELETONS["ntu25"]
    walk = clip(ntu, M=1, T=5)[0] + np.arange(5)[:, None, None] * [3.0, 0, 0]
    ax = plot.draw_strip(walk, ntu, frames=5)
    middles = [c.get_offsets()[:, 0].mean() for c in ax.collections[1:-1:2]]
    assert middles == sorted(middles) and len(middles) == 5
    low = min(c.get_offsets()[:, 1].min() for c in ax.collections[1:-1:2])
    assert np.isclose(low, walk[..., 1].min())


@pytest.mark.parametrize("frames", [0, -1, [], [9], [0.5], True])
def test_strip_refuses_frames(frames):
    with pytest.raises((ValueError), match="frames must be"):
        plot.draw_strip(clip(SKELETONS["ntu25"]), SKELETONS["ntu25"], frames=frames)


def test_strip_with_empty_frames_and_a_motionless_dot():
    joints = clip(SKELETONS["ntu25"], M=1, T=4)[0]
    joints[1:3] = 0
    pixels(plot.draw_strip(joints, SKELETONS["ntu25"], frames=4))
    pixels(plot.draw_strip(np.ones((3, 1, 2)), DOT))
    with pytest.raises(ValueError, match="no body"):
        plot.draw_strip(joints, SKELETONS["ntu25"], frames=[1, 2])


def test_limb_groups_hold_every_joint_once():
    groups = plot.limb_groups(SKELETONS["ntu25"])
    assert sorted(v for g in groups for v in g) == list(range(25))
    names = [[SKELETONS["ntu25"].joints[v] for v in g] for g in groups]
    assert names[1][0] == "left shoulder" and names[4][0] == "right hip"


def test_heat_maps_put_rows_under_the_right_names():
    ntu = SKELETONS["ntu25"]
    Q = np.zeros((4, 25))
    Q[:, ntu.index("head")] = 1
    ax = plot.draw_focus(Q, ntu)
    row = int(ax.images[0].get_array()[:, 0].argmax())
    assert ax.get_yticklabels()[row].get_text() == "head"
    A = np.zeros((25, 25))
    A[ntu.index("left hand"), ntu.index("right foot")] = 1
    ax = plot.draw_adjacency(A, ntu)
    y, x = np.argwhere(ax.images[0].get_array() == 1)[0]
    assert (ax.get_yticklabels()[y].get_text(), ax.get_xticklabels()[x].get_text()) == ("left hand", "right foot")


def test_focus_leaves_out_absent_bodies_but_names_the_others():
    Q = np.zeros((3, 4, 25))
    Q[1:] = 0.5
    ax = plot.draw_focus(Q, SKELETONS["ntu25"])
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(labels) == 50 and labels[0].endswith("(2)") and labels[-1].endswith("(3)")


def test_class_difference_sorts_and_chooses():
    frame = pd.DataFrame({"STF": [0.9, 0.2, 0.5], "MS-G3D": [0.8, 0.4, 0.5], "difference": [10, -20, 0]}, index=["a", "b", "c"])
    ax = plot.draw_class_difference(frame)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "c", "b"]
    assert [bar.get_width() for bar in ax.patches] == [10, 0, -20]
    assert len(plot.draw_class_difference(frame, top=1).patches) == 2
    for wrong in [frame[["STF", "MS-G3D"]], {}, {"a": np.inf}, {"a": "x"}]:
        with pytest.raises(ValueError):
            plot.draw_class_difference(wrong)


def test_history_with_one_epoch_gaps_and_no_epoch_column():
    one = pd.DataFrame({"epoch": [1], "loss": [2.0], "ce": [2.0], "lr": [0.0]})
    pixels(plot.draw_history(one))
    gaps = pd.DataFrame({"ce": [3.0, 2.0, 1.0], "test_top1": [np.nan, 40.0, 50.0], "e": [np.nan] * 3})
    assert len(plot.draw_history(gaps).axes) == 2  # no panel for a term that was never measured
    for wrong in [gaps[:0], pd.DataFrame({"speed": [1]}), [1, 2]]:
        with pytest.raises(ValueError):
            plot.draw_history(wrong)


def test_use_style_is_the_only_global_change():
    with plt.rc_context():
        plot.use_style()
        assert plt.rcParams["axes.spines.top"] is False
