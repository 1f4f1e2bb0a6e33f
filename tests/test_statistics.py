"""Intervals, tests and corrections: known values, and what holds for any; measures of the focus."""
import copy
from dataclasses import replace
from fractions import Fraction
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from stf.checkpoints import ConfigError, batch_options, load_checkpoint
from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.evaluate import Scores, class_tests, differences, mcnemar, paired_interval, verdict
from stf.faithfulness import (areas, beta_ceiling, class_mean, faithfulness, focus_measures,
                              known_answer, localisation, occlude, occlusion_curve, reinitialise)
from stf.focus import grad_cam
from stf.losses import LossWeights, STFLoss, mask_input, permute_focus
from stf.preparation import prepare
from stf.synthetic import SyntheticConfig, read_action_masks, write_synthetic
from stf.train import Config, run
from test_experiments import quick
from test_train import TinyStore

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(right):
    labels = np.arange(len(right)) % 3
    predicted = np.where(np.asarray(right, dtype=bool), labels, (labels + 1) % 3)
    names = [f"clip{i}" for i in range(len(right))]
    return Scores(names, labels, np.eye(3)[predicted], list("abc"))


# ---- statistics


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial(wins, losses):
    n, k = wins + losses, min(wins, losses)
    exact = min(Fraction(1), 2 * sum(Fraction(comb(n, i), 2**n) for i in range(k + 1)))
    assert mcnemar(wins, losses) == pytest.approx(float(exact), rel=1e-12)
    assert mcnemar(wins, losses) == pytest.approx(mcnemar(losses, wins), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(2, 40), st.integers(0, 1000))
def test_interval_of_any_differences(seeds, clips, draw):
    d = np.random.default_rng(draw).integers(-1, 2, (seeds, clips))
    made, other = paired_interval(d), paired_interval(-d[::-1, ::-1])
    assert made.low <= made.gain <= made.high and made.gain == pytest.approx(100 * d.mean())
    symmetric = (-made.gain, -made.high, -made.low, *made[3:])
    assert np.isfinite(made).all() and np.allclose(other, symmetric)
    assert (made.p < 0.05) == (made.low > 0 or made.high < 0)
    level = np.clip(1 - made.p, 0.001, 0.999)  # at 1 − p the interval ends at 0
    if level == 1 - made.p:
        assert np.abs(paired_interval(d, level)[1:3]).min() == pytest.approx(0, abs=1e-6)


def test_interval_is_the_t_interval_of_seeds_or_of_clips():
    """Where one of both makes no difference, classical numbers."""
    of, rng = lambda m: (m.low, m.high, m.p), np.random.default_rng(0)
    seeds, clips = rng.normal(size=(5, 1)), rng.normal(size=(1, 40))
    for x, d in ((seeds, seeds.repeat(40, 1)), (clips, clips), (clips, clips.repeat(3, 0))):
        known = stats.ttest_1samp(100 * x.ravel(), 0)
        assert np.allclose(of(paired_interval(d)), (*known.confidence_interval(), known.pvalue))
    for wrong in (np.zeros((0, 5)), [[1]], [[]]):
        with pytest.raises(ValueError, match="need a seed, two clips"):
            paired_interval(wrong)


@pytest.mark.parametrize("sd", [0, 1, 3])
def test_interval_covers_the_true_gain(sd):
    """Ratings of 1500 designs: 5 seeds, 150 clips; a true gain of 2, clip effects, 10 % differ."""
    rng = np.random.default_rng(0)
    often = rng.beta(0.5, 4.5, (1500, 1, 150))
    shift = (2 + sd * rng.normal(size=(1500, 5, 1))) / 10
    lead, u = often * (rng.uniform(-1, 1, often.shape) + shift), 2 * rng.random((1500, 5, 150))
    either = np.maximum(often, abs(lead))
    made = [paired_interval(d) for d in 1 * (u < either + lead) - (2 - u < either - lead)]
    assert 0.93 <= np.mean([m.low <= 2 <= m.high for m in made]) <= 0.97


def test_detectable_gain_is_found_in_four_of_five_designs():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(1000, 10, 60)) + 0.2 * rng.normal(size=(1000, 10, 1))
    sees = np.mean([paired_interval(d).detectable for d in noise[:100]]) / 100
    assert 0.75 < np.mean([paired_interval(d + sees).low > 0 for d in noise]) < 0.85


def test_detectable_gain_of_three_seeds():
    """Only trainings differ: two degrees of freedom, where t + t of 80 % finds 77 %."""
    seeds = np.random.default_rng(0).normal(size=(4000, 3, 1)) / 100
    made = [paired_interval(np.repeat(d, 20, 1)) for d in seeds]
    sees = np.median([m.detectable / m.se for m in made]) / 3**0.5 / 100
    found = [paired_interval(np.repeat(d + sees, 20, 1)).low > 0 for d in seeds]
    assert 0.785 < np.mean(found) < 0.815
    assert paired_interval([[1, 1], [0, 1]], level=1 - 1e-12).low < 0  # where scipy has no power


def test_identical_scores_differ_in_nothing_and_clips_are_paired_by_name():
    a, order = toy(np.arange(30) % 4 > 0), np.random.default_rng(0).permutation(30)
    b = Scores([a.names[i] for i in order], a.labels[order], a.probabilities[order], a.classes)
    assert paired_interval(differences([a, a], [a, b]))[:5] == (0, 0, 0, 1, 0)
    table = class_tests([a], [b])
    assert (table[["p", "holm"]] == 1).all(axis=None) and (table["verdict"] == "none").all()
    with pytest.raises(ValueError, match="a pair for each seed"):
        differences([a], [])


def test_interval_covers_seeds_too():
    """A gain that changes its sign with the seed is none, however many clips there are."""
    d = np.concatenate([np.full((1, 500), 0.1), np.full((1, 500), -0.06)])
    gain, low, high, *_ = paired_interval(d)
    assert low < 0 < gain < high and verdict(low, high, 2) == "none (2 seeds)"
    assert paired_interval(d[:1]).low > 0  # one seed alone hides it


def test_class_tests_count_a_clip_once_whatever_the_seeds():
    right, wrong = toy([1] * 30), toy([0] * 30)
    one, three = class_tests([right], [wrong]), class_tests([right] * 3, [wrong] * 3)
    assert one["wins"].tolist() == three["wins"].tolist() == [10] * 3
    assert np.allclose(one["p"], 2 / 2**10) and (one["p"] == three["p"]).all()
    assert (one["verdict"] == "better").all()


# ---- controls


def test_random_focus_has_the_values_of_the_focus_at_random_places():
    torch.manual_seed(0)
    q = torch.rand(6, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    present = torch.tensor([[True, i % 2 == 0] for i in range(6)])
    focus = q * present[:, :, None, None]
    random = permute_focus(focus, present)
    ordered = [x.flatten(1).sort().values for x in (random, focus)]
    torch.testing.assert_close(*ordered)
    assert not random[1::2, 1].any() and not torch.equal(random, focus)
    random.square().sum().backward()
    torch.testing.assert_close(q.grad, 2 * focus.detach())  # gradient flows through the values
    q = torch.zeros(2000, 1, 2, 3)
    q[:, 0, 0, 0] = 1
    share = permute_focus(q, torch.ones(2000, 1, dtype=torch.bool)).mean(0)
    assert (share - 1 / 6).abs().max() < 0.04  # all places


def test_mask_may_leave_the_visibility():
    x, q = torch.randn(2, 4, 8, 5, 1), torch.ones(2, 1, 2, 5)
    masked = mask_input(x, q, "coordinates")
    assert not masked[:, :3].any() and torch.equal(masked[:, 3], x[:, 3])
    assert not mask_input(x, q).any()
    with pytest.raises(ValueError, match="all"):
        mask_input(x, q, "some")
    with pytest.raises(ConfigError, match="needs visibility"):
        Config(mask="coordinates", preprocess="msg3d")
    with pytest.raises(ValueError, match="control"):
        STFLoss(torch.nn.Identity(), LossWeights(0, 0, 0, 0), control="blind")


# ---- is the focus faithful?


class Sum(torch.nn.Module):
    "Logits (s, 0), s = 20 · (mean of joint 0's first coordinate) − 5: what it needs is known."

    def forward(self, x):
        s = 20 * x[:, 0, :, 0, 0].mean(1) - 5
        return torch.stack([s, torch.zeros_like(s)], 1)


def test_curves_find_what_a_network_needs():
    x, needed = torch.ones(4, 3, 10, 5, 1), torch.zeros(4, 1, 10, 5)
    needed[..., 0] = 1
    curves = {}
    for kind in ("deletion", "insertion"):
        for name, importance in (("focus", needed), ("motion", -needed), ("random", -needed)):
            curves[kind, name] = occlusion_curve(Sum(), x, importance, kind == "insertion")
    down, up = (curves[kind, "focus"] for kind in ("deletion", "insertion"))
    assert torch.allclose(down[:, 0], up[:, -1]) and torch.allclose(down[:, -1], up[:, 0])
    table = areas({k: v.repeat(6, 1).numpy() for k, v in curves.items()})
    assert (table["low"] > 0).all()


def test_what_is_occluded():
    x, gone = torch.randn(2, 3, 6, 4, 2), torch.zeros(2, 2, 6, 4, dtype=torch.bool)
    gone[:, 0, :3, 1] = True
    zero, still = (occlude(x, gone, fill) for fill in ("zero", "still"))
    mean = x[:, :, :, 1, 0].mean(2, keepdim=True).expand(-1, -1, 3)
    assert not zero[:, :, :3, 1, 0].any() and torch.allclose(still[:, :, :3, 1, 0], mean)
    for made in (zero, still):
        assert torch.equal(made[:, :, 3:], x[:, :, 3:]) and torch.equal(made[..., 1], x[..., 1])


def test_fresh_weights_are_in_the_named_parts_only(tmp_path, monkeypatch):
    store, config = TinyStore(), quick(tmp_path / "r")
    run(config, store, progress=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)  # cards that nothing here is on
    net, header = load_checkpoint(config.run_folder)
    x, before = store.batch(np.arange(6), **batch_options(header))[0], net.state_dict()
    fresh = reinitialise(net, header, ("fc", "tcn3"), x)
    after = fresh.state_dict()
    changed = {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])}
    assert changed == {"fc", "tcn3"} and not fresh.training
    assert all(m.momentum == 0.1 for m in fresh.modules() if hasattr(m, "momentum"))
    known, what = torch.rand(3, 1, 8, 3) < 0.4, (net, store, [14, 15, 16], batch_options(header))
    state, other = torch.get_rng_state(), {"known": known, "others": {"itself": known.float()}}
    measures = focus_measures(*what, batch_size=2, **other)
    assert torch.equal(torch.get_rng_state(), state)
    assert measures.index.tolist() == ["clip14", "clip15", "clip16"]
    β = measures.filter(like="β follows")
    assert β.shape == (3, 8) and β.isna().all(axis=None)
    assert measures.drop(columns=β.columns).notna().all(axis=None)
    assert measures["coverage"].between(0, 1).all() and (measures["IoU (itself)"] == 1).all()
    whole = focus_measures(*what, **other).filter(regex=r"\(")  # no clip gets another's answer
    np.testing.assert_allclose(measures[whole.columns], whole, atol=1e-5)
    assert not focus_measures(*what).columns.str.contains("IoU").any()

    plain, own = net.features, "β follows its Q more than another's"

    def taught(shift):
        "Features whose β is the focus of the same clip, or of the clip `shift` places before."
        def features(x):
            f = plain(x)
            q = grad_cam(f, net.head, net.head(f.last).argmax(1))
            return f._replace(beta=(q.roll(shift, 0),) * 6)
        return features

    net.features = taught(0)
    right = focus_measures(*what)
    net.features = taught(1)
    wrong = focus_measures(*what)
    np.testing.assert_allclose(right["β follows Q"], 1, atol=1e-5)
    assert (right[own] > 0).all()
    np.testing.assert_allclose(wrong[own], -right[own], atol=1e-5)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measures_on_cuda_are_those_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    store, config = TinyStore(), quick(tmp_path / "r", model="stf", device="cpu")
    net = run(config, store, progress=False).network()
    header, other = load_checkpoint(config.run_folder)[1], copy.deepcopy(net).to("cuda")
    options, clips = batch_options(header), [14, 15, 16]
    known = torch.rand(3, 1, 8, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    more = dict(known=known, others={"itself": known.float()})
    here, there = (focus_measures(n, store, clips, options, **more) for n in (net, other))
    drawn = "probability, as much hidden at random"
    pd.testing.assert_frame_equal(here.drop(columns=drawn), there.drop(columns=drawn), atol=0.01)
    assert there[drawn].notna().all()
    here, there = (faithfulness(n, store, clips, options) for n in (net, other))
    np.testing.assert_allclose(here["insertion", "focus"], there["insertion", "focus"], atol=0.01)
    x = store.batch(clips, **options)[0]
    here, there = (beta_ceiling(n, v, v, 3) for n, v in ((net, x), (other, x.to("cuda"))))
    np.testing.assert_allclose(here, there, atol=0.01)
    fresh = [reinitialise(net, header, ("fc",), v)(v) for v in (x, x.to("cuda"))]
    torch.testing.assert_close(fresh[0], fresh[1].cpu(), atol=0.01, rtol=0)


# ---- the known answer


def test_the_known_answer_goes_the_way_of_the_input(tmp_path):
    "Written into the visibility of the joints, the answer comes out in the input's last channel."
    config = SyntheticConfig(actions=(8, 23, 58), subjects=(1, 2, 3), cameras=(1, 3), seed=1,
                             false_bodies=0.7, missing_bodies=0.7)  # fmt: skip
    write_synthetic(tmp_path / "raw", config, progress=False)
    store = ClipStore.build(open_clips(tmp_path / "raw"), tmp_path / "s", progress=False)
    clips, swapped = [store[i] for i in range(len(store))], 0
    masks = read_action_masks(tmp_path / "raw", clips)
    for length, bodies, M in ((20, "spread", 2), (200, "presence", 3)):
        options = dict(length=length, bodies=bodies, num_bodies=M)
        known = known_answer(store, range(len(store)), tmp_path / "raw", options)
        assert known.shape == (18, M, length, 25) and known.flatten(1).any(1).all()
        for clip, mask, answer in zip(clips, masks, known):
            marked = replace(clip, visible=(1 + mask) / 2 * clip.present[..., None])
            shown = prepare(marked, **options)
            assert np.array_equal(shown.x[3].transpose(2, 0, 1) == 1, answer)
            swapped += shown.body[0, 0] == 1
    assert swapped


def test_localisation_of_many_entries_and_of_present_bodies_only():
    importance, known = torch.rand(5, 2, 9, 7), torch.rand(5, 2, 9, 7) < 0.3
    present = torch.tensor([[True, True]] * 3 + [[True, False], [False, False]])
    found = localisation(importance, known, present)
    for n, here in enumerate(present[:4]):
        order = importance[n, here].flatten().argsort(descending=True)
        hits = known[n, here].flatten()[order].double()
        R, precision = int(hits.sum()), hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        same = precision[hits > 0].mean(), (top := hits[:R].sum()) / (2 * R - top), hits[0]
        assert [m[n].item() for m in found.values()] == pytest.approx([float(v) for v in same])
    assert all(m[4].isnan() for m in found.values())
    perfect = localisation(known * 0.1, known, present)
    assert all((m[:4] == 1).all() for m in perfect.values())
    chance, n = localisation(torch.zeros_like(importance), known, present), 126
    R, H = known[0].sum().item(), (1 / np.arange(1, n + 1)).sum()
    assert chance["average precision"][0] == pytest.approx((H + (n - H) * (R - 1) / (n - 1)) / n)
    assert chance["pointing"][0] == pytest.approx(R / n)


def test_the_class_mean_is_of_its_class():
    known = torch.tensor([1, 0, 1, 0]).bool().view(4, 1, 1, 1)
    means = class_mean(known, np.array([0, 0, 2, 3]), np.array([2, 0, 0, 1]))
    assert means.flatten().tolist() == [1, 0.5, 0.5, 0]
