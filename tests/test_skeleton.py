"""Graphs: random trees against an independent count of hops, and bodies that make no sense."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stf.skeleton import SKELETONS, Skeleton, hop_distance, k_adjacency, multi_scale_adjacency
from stf.skeleton import normalize_adjacency


@st.composite
def trees(draw, largest=24):
    V = draw(st.integers(2, largest))
    return [draw(st.integers(0, v - 1)) for v in range(1, V)]  # parent of joint v


def make(parents):
    names = [f"joint {v}" for v in range(len(parents) + 1)]
    return Skeleton("tree", names, [(v + 1, p) for v, p in enumerate(parents)], 0, height=(0, 1))


def hops_by_ancestors(parents, a, b):
    up = lambda v: [v] + (up(parents[v - 1]) if v else [])
    way_a, way_b = up(a), up(b)
    meet = next(v for v in way_a if v in way_b)
    return way_a.index(meet) + way_b.index(meet)


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, 8))
def test_hops_and_scales_of_random_trees(parents, k):
    A = make(parents).adjacency()
    V = range(len(A))
    assert hop_distance(A).tolist() == [[hops_by_ancestors(parents, a, b) for b in V] for a in V]
    exact, most = k_adjacency(A, k), k_adjacency(A, k, exact=False)
    assert (np.diag(exact) == 1).all() and np.array_equal(exact, exact.T)
    assert np.array_equal(most, np.max([k_adjacency(A, j) for j in range(k + 1)], axis=0))
    assert np.linalg.eigvalsh(normalize_adjacency(exact)).max() < 1 + 1e-9


def test_public_bones():
    "A wrong bone would still be a tree: so the hands, where codebases differ, and a few others."
    parents = lambda s: {s.joints[j]: s.joints[p] for j, p in s.bones}
    ntu, kinetics = parents(SKELETONS["ntu25"]), parents(SKELETONS["openpose18"])
    assert ntu["left hand tip"] == "left thumb" and ntu["left thumb"] == "left hand"
    assert ntu["right hand tip"] == "right thumb" and ntu["right thumb"] == "right hand"
    assert "spine shoulder" not in ntu and ntu["spine mid"] == "spine shoulder"
    assert ntu["left hip"] == "spine base" and kinetics["left hip"] == "left shoulder"
    assert [len(s.bones) for s in SKELETONS.values()] == [24, 17, 16, 19, 24, 25, 32, 16, 14, 14]


@pytest.mark.parametrize("change, message", [
    (dict(bones=[(1, 0)]), "not connected to 'a': \\['c'\\]"),
    (dict(bones=[(1, 0), (2, 1), (0, 2)]), "need 2 bones"),
    (dict(bones=[(1, 0), (2, 2)]), "two different joints"),
    (dict(bones=[(1, 0), (2, 7)]), "indices go from 0 to 2"),
    (dict(centre="x"), "no joint 'x'"),
    (dict(centre=True), "no joint True"),
    (dict(height=(0, 9)), "no joint 9"),
    (dict(height=()), "'arm': height needs two or more different joints, got \\[\\]"),
    (dict(height=None), "height needs two or more"), (dict(height=(1, 1)), "got \\['b', 'b'\\]"),
    (dict(spine=(0,)), "'arm': spine needs two different joints, got \\['a'\\]"),
    (dict(shoulders=(1, 1)), "shoulders needs two"), (dict(spine=(0, 1, 2)), "spine needs two"),
    (dict(joints=("a", "b", "b")), "repeated: \\['b'\\]"),
])  # fmt: skip
def test_refused(change, message):
    fine = dict(name="arm", joints="abc", bones=[(1, 0), (2, 1)], centre=0, height=(0, 1, 2))
    Skeleton(**fine)
    with pytest.raises(ValueError, match=message):
        Skeleton(**{**fine, **change})


def test_no_adjacency_and_no_scale():
    for bad in (np.zeros((2, 3)), [[np.nan]], [[0, -1], [-1, 0]], np.zeros((0, 0))):
        with pytest.raises(ValueError, match="adjacency matrix must"):
            hop_distance(bad)
    for k in (-1, 1.5, "2", None):
        with pytest.raises(ValueError, match="k must be"):
            k_adjacency(np.zeros((2, 2)), k)
        with pytest.raises(ValueError, match="scales must be"):
            multi_scale_adjacency(np.zeros((2, 2)), k)
