"""Scores: files, matching by name, accuracies against counting, what predict_scores promises."""
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.evaluate import (Scores, average, class_difference, confusion_matrix, confusions,
                          predict_scores, top_k, write_file)
from stf.plot import animate, save_animation
from stf.skeleton import SKELETONS


def make(n=7, k=3, seed=0, labels=None):
    rng = np.random.default_rng(seed)
    p, drawn = rng.dirichlet(np.ones(k), size=n), rng.integers(0, k, n)
    names, classes = [f"clip{i}" for i in range(n)], [f"class {i}" for i in range(k)]
    return Scores(names, drawn if labels is None else labels, p, classes)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_accuracies_match_counting(n, k, seed, data):
    s, top = make(n, k, seed), data.draw(st.integers(1, k))
    rank = lambda row: sorted(range(k), key=lambda c: (-row[c], c))
    hits = sum(int(y) in rank(row)[:top] for row, y in zip(s.probabilities, s.labels))
    assert top_k(s, top) == pytest.approx(100 * hits / n)
    matrix, right = confusion_matrix(s), int((s.predicted == s.labels).sum())
    assert np.trace(matrix) == right and matrix.to_numpy().sum() == n
    pairs = confusions(s, 100)
    assert pairs["clips"].sum() == n - right and pairs["clips"].is_monotonic_decreasing
    for _, pair in pairs.iterrows():
        assert pair["clips"] == matrix.loc[pair["true"], pair["predicted"]] > 0
        assert pair["share"] == pytest.approx(100 * pair["clips"] / matrix.loc[pair["true"]].sum())
    table = class_difference(s, make(n, k, seed + 1, s.labels))
    assert (table["accuracy"] * table["clips"] / 100).sum() == pytest.approx(right)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 99))
def test_average_does_not_depend_on_order(n, seed):
    a = make(n, 4, seed)
    b = make(n, 4, seed + 1, labels=a.labels)
    order = np.random.default_rng(seed).permutation(n)
    c = Scores([b.names[i] for i in order], b.labels[order], b.probabilities[order], b.classes)
    both = average(a, c)
    assert both.names == a.names
    np.testing.assert_allclose(both.probabilities, (a.probabilities + b.probabilities) / 2)


def test_files_hold_no_pickle_and_name_what_is_missing(tmp_path):
    s = make()
    s.names[0] = "Größe/名前 with spaces"
    t = Scores.load(s.save(tmp_path / "s.npz"))
    assert t.names == s.names and t.classes == s.classes
    assert np.array_equal(t.probabilities, s.probabilities) and np.array_equal(t.labels, s.labels)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]  # nothing left beside it
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    with pytest.raises(ValueError, match="other.npz: not a file of scores: .*labels"):
        Scores.load(tmp_path / "other.npz")


def test_files_have_the_mode_that_the_umask_says(tmp_path):
    "Not 0600, which a temporary file has, renamed."
    anim, before = animate(np.ones((1, 2, 25, 3)), SKELETONS["ntu25"]), os.umask(0o027)
    try:
        files = [write_file(tmp_path / "run.json", {}), save_animation(anim, tmp_path / "a.gif")]
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in files} == {0o640}


@pytest.mark.parametrize("change, message", [
    (lambda n, y, p, c: (n[:-1], y[:-1], p[:-1], c), "'clip6' is missing"),
    (lambda n, y, p, c: ([*n[:-1], "other"], y, p, c), "'clip6' is missing"),
    (lambda n, y, p, c: ([*n, "more"], [*y, 0], [*p, p[0]], c), "'more' is missing"),
    (lambda n, y, p, c: (n, (y + 1) % 3, p, c), "labels: 'clip0'"),
    (lambda n, y, p, c: (n, y, p, [c[0], "x", c[2]]), "number 1 is 'class 1' in one and 'x'"),
    (lambda n, y, p, c: (n, y % 2, p[:, :2], c[:2]), "number 2 is 'class 2' in one and None"),
])
def test_mismatch_names_the_first_difference(change, message):
    s = make()
    other = Scores(*change(s.names, s.labels, s.probabilities, s.classes))
    for fuse in (average, class_difference):
        with pytest.raises(ValueError, match=message):
            fuse(s, other)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [np.nan, 1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        average(make(), make(), weights=weights)


def test_unlabelled_clips_and_empty_classes():
    s = Scores(["a", "b"], [-1, 1], [[0.9, 0.1, 0], [0.2, 0.7, 0.1]], ["x", "y", "z"])
    assert top_k(s) == 100 and confusion_matrix(s).to_numpy().sum() == 1
    assert np.isnan(class_difference(s, s).loc["x", "accuracy"])
    assert s.frame()["label"].tolist()[1] == "y"
    assert np.isnan(top_k(Scores(["a"], [-1], [[0.5, 0.5]], ["x", "y"])))


class Store:
    def __init__(self, n):
        self.names, self.labels = [f"c{i}" for i in range(n)], np.arange(n) % 3
        self.classes, self.scored = list("abc"), []

    def batch(self, indices, *, stream, preprocess, length, num_bodies, dtype):
        self.scored += list(indices)
        x = torch.as_tensor(np.asarray(indices), dtype=dtype).view(-1, 1, 1, 1, 1)
        return x.expand(-1, 3, length, 4, num_bodies), torch.as_tensor(self.labels[indices])


class Net(torch.nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.norm, self.drop = torch.nn.BatchNorm3d(3), torch.nn.Dropout(0.9)
        self.fc = torch.nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, x):
        return self.fc(self.drop(self.norm(x).mean((2, 3, 4))))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_each_clip_is_scored_once_and_the_network_is_as_before(batch_size):
    torch.manual_seed(0)
    net, store, order = Net(), Store(10), [4, 1, 9, 0, 7, 2, 3]
    net.train(), net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    options = dict(length=5, num_bodies=1, progress=False)
    s = predict_scores(net, store, order, batch_size=batch_size, **options)
    assert s.names == [f"c{i}" for i in order] and store.scored == order
    whole = predict_scores(net, Store(10), order, **options)
    assert np.allclose(s.probabilities, whole.probabilities, atol=1e-6)
    store.batch = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict_scores(net, store, [0], **options)
    assert net.training and not net.norm.training and net.drop.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_wrong_class_count_and_float64():
    store = Store(4)
    s = predict_scores(Net(torch.float64), store, [0, 1], length=3, progress=False)
    assert s.probabilities.shape == (2, 3)
    store.classes = list("abcd")
    with pytest.raises(ValueError, match="3 classes, the store 4"):
        predict_scores(Net(), store, [0, 1], length=3, progress=False)
