"""Streams of frames: the same as prediction on the window, people who come and go, bad frames."""
import numpy as np
import pytest

from stf.clips import Clip, ClipError
from stf.extras.live import Stream
from stf.predict import MismatchError, Predictor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped():
    return Predictor(device="cpu")


def test_a_stream_is_prediction_on_its_window(shipped):
    rng = np.random.default_rng(5)
    joints, visible = rng.normal(size=(2, 30, 25, 3)), rng.uniform(0.2, 1, size=(2, 30, 25))
    stream = Stream(shipped, window=12, every=5, focus=True)
    found = {t: p for t in range(30) if (p := stream.push(joints[:, t], visible[:, t]))}
    assert list(found) == [4, 9, 14, 19, 24, 29]
    for t in (4, 19):
        part = slice(max(0, t - 11), t + 1)
        whole, = shipped([Clip(joints[:, part], visible[:, part])])
        np.testing.assert_allclose(found[t].probabilities, whole.probabilities, atol=1e-6)
        np.testing.assert_allclose(found[t].focus, whole.focus, atol=1e-5)


def test_people_come_and_go(shipped):
    stream, rng = Stream(shipped, window=4), np.random.default_rng(0)
    nobody = np.zeros((0, 25, 3))
    assert stream.push(nobody) is None and stream.push(np.zeros((1, 25, 3))) is None
    assert stream.push(rng.normal(size=(25, 3))) is not None
    assert stream.push(rng.normal(size=(3, 25, 3))) is not None
    clip = stream.clip()
    assert clip.joints.shape == (3, 4, 25, 3)
    assert clip.present.tolist() == [[False, False, True, True]] + [[False] * 3 + [True]] * 2
    assert all(stream.push(nobody) is not None for _ in range(3))  # still in the window
    assert stream.push(nobody) is None
    stream.reset()
    assert stream.clip() is None


def test_what_is_no_frame_is_named(shipped):
    stream = Stream(shipped)
    stream.push(np.ones((25, 3)))
    for frame, kind, reason in ((np.ones((20, 3)), MismatchError, "20 joints"),
                                (np.ones((25, 2)), MismatchError, "2 coordinates"),
                                (np.full((25, 3), np.nan), ClipError, "not a finite number")):
        with pytest.raises(kind, match=f"frame 1.*{reason}"):
            stream.push(frame)
    with pytest.raises(ClipError, match="frame 1: visible"):
        stream.push(np.ones((25, 3)), np.full(25, 2))
    with pytest.raises(ValueError, match="at least 1"):
        Stream(shipped, window=0)
