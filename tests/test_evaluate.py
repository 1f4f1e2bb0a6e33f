"""Scores: files, alignment by name, accuracies against naive counting, and predict_scores' promises."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.evaluate import (Scores, align, average, class_accuracy, class_difference, confusion_matrix, confusions,
                          predict_scores, top_k)


def make(n=7, k=3, seed=0, names=None, labels=None):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(k), size=n)
    return Scores(names or [f"clip{i}" for i in range(n)], rng.integers(0, k, n) if labels is None else labels, p,
                  [f"class {i}" for i in range(k)])


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), k=st.integers(1, 8), seed=st.integers(0, 99), data=st.data())
def test_top_k_matches_counting(n, k, seed, data):
    s, top = make(n, k, seed), data.draw(st.integers(1, k))
    hits = sum(int(y) in sorted(range(k), key=lambda c: (-row[c], c))[:top] for row, y in zip(s.probabilities, s.labels))
    assert top_k(s, top) == pytest.approx(100 * hits / n)
    assert np.trace(confusion_matrix(s)) == round(top_k(s) * n / 100)
    assert class_accuracy(s)["correct"].sum() == np.trace(confusion_matrix(s))
    assert confusions(s, 100)["clips"].sum() == n - np.trace(confusion_matrix(s))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), seed=st.integers(0, 99))
def test_average_does_not_depend_on_order(n, seed):
    a = make(n, 4, seed)
    b = make(n, 4, seed + 1, labels=a.labels)
    order = np.random.default_rng(seed).permutation(n)
    c = Scores([b.names[i] for i in order], b.labels[order], b.probabilities[order], b.classes)
    both = average(a, c)
    assert both.names == a.names and np.array_equal(both.probabilities, average(a, b).probabilities)
    assert np.allclose(both.probabilities.sum(axis=1), 1)
    assert np.array_equal(align(c, a).probabilities, b.probabilities)


def test_save_and_load_without_pickle(tmp_path):
    s = make()
    s.names[0] = "Größe/名前 with spaces"
    s.save(tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz", allow_pickle=False) as z:
        assert z["names"][0] == s.names[0]
    t = Scores.load(tmp_path / "s.npz")
    assert t.names == s.names and t.classes == s.classes and np.array_equal(t.probabilities, s.probabilities)
    assert [p.name for p in tmp_path.iterdir()] == ["s.npz"]  # nothing left beside it


def test_load_says_what_is_missing(tmp_path):
    np.savez(tmp_path / "other.npz", names=np.array(["a"]))
    with pytest.raises(ValueError, match="other.npz: not a file of scores: .*labels"):
        Scores.load(tmp_path / "other.npz")


@pytest.mark.parametrize("change, message", [
    (lambda s: Scores(s.names[:-1], s.labels[:-1], s.probabilities[:-1], s.classes), "'clip6' is missing"),
    (lambda s: Scores([*s.names[:-1], "other"], s.labels, s.probabilities, s.classes), "'clip6' is missing"),
    (lambda s: Scores(s.names, (s.labels + 1) % 3, s.probabilities, s.classes), "labels: 'clip0'"),
    (lambda s: Scores(s.names, s.labels, s.probabilities, ["class 0", "x", "class 2"]), "number 1 is 'class 1' in one and 'x'"),
    (lambda s: Scores(s.names, s.labels, s.probabilities[:, :2], s.classes[:2]) if (s.labels < 2).all() else
     Scores(s.names, s.labels % 2, s.probabilities[:, :2], s.classes[:2]), "classes: 3 and 2"),
])  # fmt: skip
def test_mismatch_names_the_first_difference(change, message):
    s = make()
    with pytest.raises(ValueError, match=message):
        average(s, change(s))
    with pytest.raises(ValueError):
        class_difference(s, change(s))


def test_more_clips_in_the_second_file_are_noticed():
    with pytest.raises(ValueError, match="'clip7' is in one of them only"):
        average(make(7, labels=[0] * 7), make(8, labels=[0] * 8))


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [np.nan, 1]])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match="weights must be 2 numbers"):
        average(make(), make(), weights=weights)


def test_unlabelled_clips_and_empty_classes():
    s = Scores(["a", "b"], [-1, 1], [[0.9, 0.1, 0], [0.2, 0.7, 0.1]], ["x", "y", "z"])
    assert top_k(s) == 100 and confusion_matrix(s).to_numpy().sum() == 1
    assert np.isnan(class_accuracy(s).loc["x", "accuracy"])
    assert s.frame()["label"].tolist()[1] == "y"
    assert np.isnan(top_k(Scores(["a"], [-1], [[0.5, 0.5]], ["x", "y"])))


class Store:
    def __init__(self, n):
        self.names, self.labels, self.classes = [f"c{i}" for i in range(n)], np.arange(n) % 3, list("abc")
        self.asked = []

    def batch(self, indices, *, stream, preprocess, length, num_bodies, dtype):
        self.asked += list(indices)
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
def test_predict_scores_each_clip_once_and_modes_restored(batch_size):
    torch.manual_seed(0)
    net, store = Net(), Store(10)
    net.train(), net.norm.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    order = [4, 1, 9, 0, 7, 2, 3]
    s = predict_scores(net, store, order, length=5, num_bodies=1, batch_size=batch_size, progress=False)
    assert s.names == [f"c{i}" for i in order] and store.asked == order
    assert net.training and not net.norm.training and net.drop.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # running statistics untouched
    whole = predict_scores(net, Store(10), order, length=5, num_bodies=1, progress=False)
    assert np.allclose(s.probabilities, whole.probabilities, atol=1e-6)


def test_predict_scores_restores_modes_after_an_error():
    net, store = Net(), Store(4)
    store.batch = lambda *a, **k: 1 / 0
    with pytest.raises(ZeroDivisionError):
        predict_scores(net, store, [0], progress=False)
    assert net.training and net.norm.training


def test_predict_scores_wrong_class_count_and_float64():
    store = Store(4)
    assert predict_scores(Net(torch.float64), store, [0, 1], length=3, progress=False).probabilities.shape == (2, 3)
    store.classes = list("abcd")
    with pytest.raises(ValueError, match="3 classes, the store 4"):
        predict_scores(Net(), store, [0, 1], length=3, progress=False)
