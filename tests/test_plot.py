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


def test_confusion_in_per_cent_by_name():
    counts = pd.DataFrame([[3, 1], [0, 0]], index=["a", "b"], columns=["a", "b"])
    shown = plot.draw_confusion(counts).images[0].get_array()
    assert shown[0].tolist() == [75, 25] and shown.mask[1].all()  # no clip of class b: unknown, not 0 %
    assert plot.draw_confusion(counts, classes=["b", "a"]).get_yticklabels()[0].get_text() == "b"
    pixels(plot.draw_confusion(np.eye(60), share=False))
    for wrong in [counts[["b", "a"]], -counts, np.ones((2, 3))]:
        with pytest.raises(ValueError):
            plot.draw_confusion(wrong)


@pytest.mark.parametrize("skeleton", [*SKELETONS.values(), DOT], ids=lambda s: s.name)
def test_focus_figures_for_every_layout(skeleton):
    joints = clip(skeleton, C=2)
    Q = np.random.default_rng(1).random(joints.shape[:-1])
    Q[1, :3], joints[1, :3] = 0, 0  # the second body comes late
    V = skeleton.num_joints
    pixels(plot.draw_focus_volume(joints, Q, skeleton, frames=3))
    pixels(plot.draw_focus_parts(joints[0], Q[0], skeleton, frames=3))
    pixels(plot.draw_masked_input(joints, Q, skeleton, frames=3))
    pixels(plot.draw_betas([Q, Q[0], Q[:, ::2]], skeleton))
    A = skeleton.adjacency() + np.eye(V)
    pixels(plot.draw_connections(joints[0, :2], {"A": A, "A + G": np.stack([A, 2 * A])}, skeleton, titles=["x", "y"]))
    pixels(plot.draw_dynamic_adjacency(A, np.stack([A, -A]), skeleton, k=1))


def test_focus_figures_of_a_single_frame_and_of_zeros():
    ntu = SKELETONS["ntu25"]
    joints = clip(ntu, M=1, T=1)[0]
    for Q in [np.zeros((1, 25)), np.ones((1, 25))]:
        pixels(plot.draw_focus_volume(joints, Q, ntu))
        pixels(plot.draw_focus_parts(joints, Q, ntu))
        pixels(plot.draw_masked_input(joints, Q, ntu))


def test_masked_joints_fall_into_the_centre():
    ntu = SKELETONS["ntu25"]
    joints = clip(ntu, M=1, T=1)[0] + 5.0
    fig = plot.draw_masked_input(joints, np.ones((1, 25)), ntu)
    points = fig.axes[1].collections[1].get_offsets()
    assert np.ptp(points, axis=0).max() < 1e-9
    for Q in [np.full((1, 25), 1.5), np.full((1, 25), np.nan), -np.ones((1, 25))]:
        with pytest.raises(ValueError, match="0..1"):
            plot.draw_masked_input(joints, Q, ntu)


def test_links_are_those_of_the_matrix():
    ntu = SKELETONS["ntu25"]
    pose = clip(ntu)[0, 0]
    A = np.eye(25)
    A[3, 7] = 1.0
    ax = plot.draw_links(pose, A, ntu)
    (link,) = ax.collections[2].get_segments()
    assert np.allclose(link[[0, -1]], pose[[3, 7], :2])
    assert not plot.draw_links(pose, np.eye(25), ntu).collections[2].get_segments()
    for wrong in [dict(A=np.eye(3)), dict(top=-1), dict(joints=np.zeros((25, 3))), dict(joints=np.ones((2, 25, 3)))]:
        with pytest.raises(ValueError):
            plot.draw_links(**{"joints": pose, "A": A, "skeleton": ntu, **wrong})


@pytest.mark.parametrize(
    "draw, arguments",
    [
        ("draw_focus", (np.ones((4, 24)),)),
        ("draw_focus", (np.full((4, 25), np.nan),)),
        ("draw_focus_volume", (np.ones((4, 25, 3)), np.ones((3, 25)))),
        ("draw_focus_volume", (np.zeros((4, 25, 3)), np.ones((4, 25)))),
        ("draw_focus_parts", (np.ones((4, 25, 3)), np.ones((2, 4, 25)))),
        ("draw_betas", ([],)),
        ("draw_betas", ([np.ones((4, 24))],)),
        ("draw_dynamic_adjacency", (np.eye(25), np.ones((2, 24, 24)))),
        ("draw_connections", ([np.ones((25, 3))], {"A": np.ones((2, 25, 25))})),
        ("draw_connections", ([], {"A": np.eye(25)})),
    ],
)
def test_focus_figures_refuse(draw, arguments):
    with pytest.raises(ValueError):
        getattr(plot, draw)(*arguments, SKELETONS["ntu25"])


def gif_frames(path):
    from PIL import Image

    with Image.open(path) as picture:
        frames = []
        for i in range(picture.n_frames):
            picture.seek(i)
            frames.append(np.asarray(picture.convert("RGB")))
        return frames, picture.info["duration"]


def test_a_gif_has_every_frame_at_the_right_speed_on_white(tmp_path):
    ntu = SKELETONS["ntu25"]
    anim = plot.animate(clip(ntu, T=9), ntu, fps=20, step=2)
    frames, duration = gif_frames(plot.save_animation(anim, tmp_path / "a.gif", dpi=50))
    assert len(frames) == 5 and duration == 100
    assert frames[0][0, 0].tolist() == [255, 255, 255]
    assert not np.array_equal(frames[0], frames[-1])
    assert [p.name for p in tmp_path.iterdir()] == ["a.gif"]


def test_side_by_side_with_different_lengths_skeletons_and_views(tmp_path):
    ntu, coco = SKELETONS["ntu25"], SKELETONS["coco17"]
    clips = [clip(ntu, T=5), clip(coco, T=3, C=2)[0]]
    values = [np.full((2, 5, 25), 0.5), None]
    anim = plot.animate(clips, [ntu, coco], values=values, view=[(0, 90), "front"], titles=["a", "b"], colour_bar="v")
    assert len(gif_frames(plot.save_animation(anim, tmp_path / "a.gif", dpi=40))[0]) == 5
    with pytest.raises(ValueError, match="2 clips, but 1 titles"):
        plot.animate(clips, [ntu, coco], titles=["a"])


def test_a_page_plays_alone(tmp_path):
    ntu = SKELETONS["ntu25"]
    text = plot.save_animation(plot.animate(clip(ntu, T=3), ntu), tmp_path / "a.html", dpi=40).read_text()
    assert text.count('"iVBOR') == 3 and "http" not in text and "{{" not in text


def test_a_failing_animation_leaves_the_old_file_and_nothing_else(tmp_path):
    ntu = SKELETONS["ntu25"]
    path = tmp_path / "a.gif"
    path.write_text("old")
    anim = plot.animate(clip(ntu, T=3), ntu)
    plot.save_animation(anim, tmp_path / "b.gif", dpi=30)
    anim._func = lambda frame: 1 / 0
    with pytest.raises(ZeroDivisionError):
        plot.save_animation(anim, path)
    assert path.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "b.gif"]


@pytest.mark.filterwarnings("ignore:Animation was deleted")
def test_what_cannot_be_saved_says_why(tmp_path):
    ntu = SKELETONS["ntu25"]
    anim = plot.animate(clip(ntu, T=2), ntu, fps=120)
    with pytest.raises(ValueError, match="at most 50"):
        plot.save_animation(anim, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="no folder"):
        plot.save_animation(anim, tmp_path / "none" / "a.html")
    with pytest.raises(ValueError, match="written as"):
        plot.save_animation(anim, tmp_path / "a")
    if matplotlib.animation.writers.is_available("ffmpeg"):
        assert plot.save_animation(anim, tmp_path / "a.mp4").stat().st_size
    else:
        with pytest.raises(RuntimeError, match="ffmpeg"):
            plot.save_animation(anim, tmp_path / "a.mp4")
    plot.save_animation(anim, tmp_path / "a.html", dpi=30)


def test_animation_html_is_one_picture_within_its_limit():
    ntu = SKELETONS["ntu25"]
    html = plot.animation_html(plot.animate(clip(ntu, M=1, T=4)[0], ntu, trail="head"), alt='a "wave" <b>')
    assert html._repr_html_().startswith('<img alt="a &quot;wave&quot; &lt;b>" src="data:image/gif;base64,') and len(repr(html)) < 40
    assert not plt.get_fignums()
    anim = plot.animate(clip(ntu, T=4), ntu)
    with pytest.raises(ValueError, match="limit=1"):
        plot.animation_html(anim, limit=1)


@pytest.mark.parametrize("options", [{"fps": 0}, {"fps": np.inf}, {"step": 0}, {"step": 1.5}, {"view": (0, 1, 2)}, {"trail": ["tail"]}, {"values": np.ones((2, 5, 25))}])
@pytest.mark.filterwarnings("ignore:Animation was deleted")
def test_animate_refuses(options):
    with pytest.raises(ValueError):
        plot.animate(clip(SKELETONS["ntu25"]), SKELETONS["ntu25"], **options)
    with pytest.raises(ValueError, match="no body"):
        plot.animate(np.zeros((4, 25, 3)), SKELETONS["ntu25"])
