"""Intervals, tests and corrections: known values, and what must hold for any numbers; the paper's tables beside records; the focus's own tests."""
import json
from fractions import Fraction
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stf import cli, tables
from stf.experiments import load_records, paper_table, record_scores
from stf.evaluate import Scores
from stf.faithfulness import FILLS, STAGES, areas, curve, focus_measures, focus_records, focus_table, forget, ranks, take_away, turned
from stf.losses import LossWeights, STFLoss, mask_input, permute_focus, shuffle_focus
from stf.evaluate import class_tests, differences, holm, mcnemar, paired_bootstrap, verdict
from stf.checkpoints import ConfigError, load_checkpoint
from stf.train import Config
from test_experiments import quick
from test_train import TinyStore

pytestmark = pytest.mark.usefixtures("one_thread")


def toy(right, names=None):
    right = np.asarray(right, dtype=bool)
    labels = np.arange(len(right)) % 3
    predicted = np.where(right, labels, (labels + 1) % 3)
    return Scores(names or [f"clip{i}" for i in range(len(right))], labels, np.eye(3)[predicted], ["a", "b", "c"])


# ---- statistics


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_exact_binomial(wins, losses):
    n, k = wins + losses, min(wins, losses)
    exact = min(Fraction(1), 2 * sum(Fraction(comb(n, i), 2**n) for i in range(k + 1)))
    assert mcnemar(wins, losses) == pytest.approx(float(exact), rel=1e-12) == mcnemar(losses, wins)


@pytest.mark.parametrize("wins, losses, p", [(0, 6, 0.03125), (2, 10, 0.03857421875), (5, 15, 0.04138946533203125), (10, 10, 1.0), (0, 0, 1.0)])
def test_mcnemars_known_values(wins, losses, p):
    assert mcnemar(wins, losses) == p


def test_mcnemar_of_many_clips_neither_overflows_nor_vanishes():
    assert mcnemar(4000, 4000) == 1 and 0 < mcnemar(3800, 4200) < 1e-4 and mcnemar(0, 5000) == 0.0


@given(st.lists(st.floats(0, 1), max_size=30))
def test_holm_never_lowers_and_keeps_the_order(p):
    adjusted = holm(p)
    assert len(adjusted) == len(p) and (adjusted >= np.array(p)).all() and (adjusted <= 1).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(adjusted[order]) >= 0).all()
    if p:
        assert adjusted.min() == min(1, min(p) * len(p))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 40), st.integers(0, 1000))
def test_bootstrap_of_any_differences(seeds, clips, draw):
    d = np.random.default_rng(draw).integers(-1, 2, (seeds, clips))
    gain, low, high = paired_bootstrap(d, samples=300)
    assert low <= high and -100 <= low and high <= 100 and gain == pytest.approx(100 * d.mean())
    assert np.allclose(paired_bootstrap(-d, samples=300), (-gain, -high, -low))  # nobody is favoured
    order = np.random.default_rng(draw).permutation(seeds)
    assert paired_bootstrap(d[order], samples=300)[0] == pytest.approx(gain)


def test_identical_scores_differ_in_nothing():
    a = toy(np.arange(30) % 4 > 0)
    assert paired_bootstrap(differences([a, a], [a, a])) == (0, 0, 0)
    table = class_tests([a], [a])
    assert (table["p"] == 1).all() and (table["holm"] == 1).all() and (table["verdict"] == "none").all()


def test_differences_are_paired_by_name():
    a = toy([1, 0, 1, 0, 0, 1])
    order = [3, 1, 0, 5, 4, 2]
    b = Scores([a.names[i] for i in order], a.labels[order], a.probabilities[order], a.classes)
    assert not differences([a], [b]).any()
    with pytest.raises(ValueError, match="a pair for each seed"):
        differences([a], [])


def test_interval_covers_seeds_too():
    """A gain that changes its sign with the seed is none, however many clips there are."""
    d = np.concatenate([np.full((1, 500), 0.1), np.full((1, 500), -0.06)])
    gain, low, high = paired_bootstrap(d)
    assert low < 0 < gain < high and verdict(low, high, 2) == "none (2 seeds)"
    assert paired_bootstrap(d[:1])[1] > 0  # one seed alone hides it


def test_class_tests_count_a_clip_once_whatever_the_seeds():
    right, wrong = toy([1] * 30), toy([0] * 30)
    one, three = class_tests([right], [wrong]), class_tests([right] * 3, [wrong] * 3)
    assert one["wins"].tolist() == three["wins"].tolist() == [10] * 3 and (one["p"] == three["p"]).all()
    assert (one["verdict"] == "better").all() and np.allclose(one["p"], 2 / 2**10)


# ---- controls


def test_random_focus_has_the_size_of_the_focus_and_nothing_else():
    torch.manual_seed(0)
    q, present = torch.rand(6, 2, 5, 7, dtype=torch.float64, requires_grad=True), torch.tensor([[True, i % 2 == 0] for i in range(6)])
    given_q = q * present[:, :, None, None]
    random = permute_focus(given_q, present)
    torch.testing.assert_close(random.flatten(1).sort().values, given_q.flatten(1).sort().values)
    assert not random[1::2, 1].any() and not torch.equal(random, given_q)
    random.square().sum().backward()
    torch.testing.assert_close(q.grad, 2 * given_q.detach())  # gradient flows through the values
    assert torch.equal(shuffle_focus(given_q)[1:], given_q[:-1])


def test_random_places_are_all_places():
    torch.manual_seed(0)
    q = torch.zeros(2000, 1, 2, 3)
    q[:, 0, 0, 0] = 1
    share = permute_focus(q, torch.ones(2000, 1, dtype=torch.bool)).mean(0)
    assert (share - 1 / 6).abs().max() < 0.04


def test_mask_may_leave_the_visibility():
    x, q = torch.randn(2, 4, 8, 5, 1), torch.ones(2, 1, 2, 5)
    masked = mask_input(x, q, "coordinates")
    assert not masked[:, :3].any() and torch.equal(masked[:, 3], x[:, 3]) and not mask_input(x, q).any()
    with pytest.raises(ValueError, match="all"):
        mask_input(x, q, "some")
    with pytest.raises(ConfigError, match="needs visibility"):
        Config(mask="coordinates", preprocess="msg3d")
    with pytest.raises(ValueError, match="control"):
        STFLoss(torch.nn.Identity(), LossWeights(0, 0, 0, 0), control="blind")


# ---- tables


def fake(row, seed, dataset="ntu60", protocol="xsub", stream="joint", name="ntu60-xsub-joint", top1=50.0, **more):
    return dict(experiment="table2", row=row, seed=seed, dataset=dataset, protocol=protocol, stream=stream, name=name, top1=top1, **more)


def test_our_records_fall_in_the_papers_columns():
    records = [fake("M1", 0, top1=80.0), fake("M1", 1, top1=82.0), fake("M5", 0, top1=84.0), fake("M5", 0, top1=84.0, stream="bone", name="ntu60-xsub-bone"),
               fake("M5", 0, "kinetics", "val", "joint+bone", "kinetics-joint+bone", 40.0), fake("M1", 0, "mine", "xset", name="ucla-small-mine")]  # fmt: skip
    table = tables.table2([*records, records[0]])  # a record that occurs twice counts once
    assert table.shape == (23, 16) and list(table.columns[:15]) == list(paper_table("table2"))
    assert table.loc["MS-G3D (ours)", "NTU60 x-sub J"] == 81 and table.loc["STF (ours)", "NTU60 x-sub B"] == 84
    assert table.loc["STF (ours)", "Kinetics J+B"] == 40 and table.loc["MS-G3D (ours, ucla-small-mine)", "mine xset J"] == 50
    assert table.loc["STF (ours)"].notna().sum() == 3 and table.loc["STF", "Kinetics J+B"] == 39.87
    assert tables.table3(records).loc["STF over MS-G3D (ours)", "NTU60 x-sub J"] == pytest.approx(3)
    assert tables.table2([]).shape == (20, 15) and tables.table3([]).shape == (2, 3)


def test_table4_and_shift_leave_blank_what_was_not_run():
    records = [fake("M1", s, share=0.1, of="x", top1=t) for s, t in ((0, 60.0), (1, 62.0))] + [fake("M5", 0, share=0.3, of="x")]
    table = tables.table4(records)
    assert table.loc["MS-G3D (ours, x)", "10"] == 61 and np.isnan(table.loc["STF (ours, x)", "10"]) and table.loc["STF (ours, x)", "30"] == 50
    assert table.loc["STF", "25"] == 84.27 and tables.table4([], "scarce_kinetics").loc["STF", "B"] == 26.3
    assert tables.shift_table([]).loc["STF"].tolist() == [83.38]


@pytest.mark.parametrize("name, stream, expected", [("ntu60-xsub-joint", "bone", "ntu60-xsub-bone"), ("ucla-small", "bone", "ucla-small-bone"),
                                                    ("ucla-small-mine", "joint-motion", "ucla-small-mine-joint-motion")])  # fmt: skip
def test_streams_have_names_of_their_own(name, stream, expected):
    assert tables.stream_config(Config(name=name), stream).name == expected


def test_table_1_is_read_off_the_code():
    has = lambda **k: list(tables.properties(Config(**k)).values())
    assert has() == [True, False, False, False, False] and has(model="stf") == [True] * 5
    assert has(model="stf", losses="") == [True, True, False, False, False] and has(losses="dc") == [True, False, False, True, False]


def test_shares_are_trained_on_and_named(tmp_path):
    config = quick(tmp_path / "r")
    store = TinyStore()
    records = tables.scarce(config, (0.5, 1.0), rows=["M1"], results=tmp_path, store=store, progress=False)
    assert [(r["share"], r["name"], r["of"]) for r in records] == [(0.5, "tiny-p50", "tiny"), (1.0, "tiny", "tiny")]
    assert [r["config"]["fraction"] for r in records] == [0.5, 1.0]
    for share in (0, 1.5):
        with pytest.raises(ConfigError, match="a share of the training clips"):
            tables.share_config(config, share)


def test_choice_never_sees_a_test_clip(tmp_path):
    store = TinyStore()
    side = tables.TrainingSide.__new__(tables.TrainingSide)
    train, test = store.split("xsub")
    side.store, side.sides = store, (train[:-4], train[-4:])
    assert side.labels is store.labels and [len(s) for s in side.split("xview")] == [len(train) - 4, 4]
    from stf.experiments import Job, make_records, record_path

    config = quick(tmp_path / "r")
    job = Job(record_path(tmp_path, "choice", "tiny", "a", 0), "choice", "tiny", "a", 0, config)
    [record] = make_records([job], {config.data: side}, progress=False)
    assert record_scores(record).names == [store.names[i] for i in train[-4:]]
    assert not {store.names[i] for i in test} & set(record_scores(record).names)


def test_operations_are_counted():
    table = tables.operations(Config.preset("synthetic", length=16))
    assert 0 < table.loc["STF", "more (%)"] < 10 and table.loc["STF", "parameters (M)"] > table.loc["MS-G3D", "parameters (M)"]


# ---- on any store, from the command line


@pytest.mark.slow
def test_every_table_on_a_set_given_as_a_folder(tmp_path, monkeypatch, capsys):
    """As a user would who has a store, a protocol and a preset to take sizes from."""
    from stf.clips import open_clips
    from stf.dataset import ClipStore
    from stf.synthetic import SyntheticConfig, write_synthetic

    monkeypatch.chdir(tmp_path)
    for name, actions in (("mine", (23, 24, 26)), ("other", (23, 24, 26, 27))):
        write_synthetic(f"raw-{name}", SyntheticConfig(actions=actions, subjects=tuple(range(1, 9)), cameras=(2,)), progress=False)
        ClipStore.build(open_clips(f"raw-{name}"), name, progress=False)
    sizes = ("--data mine --protocol xsub --length 16 --widths 6 12 12 --gcn-scales 4 --g3d-scales 2 --epochs 2 --milestones --stf-epochs 1 "
             "--stf-milestones --results out --device cpu").split()  # fmt: skip
    for words in ("ablation ucla-small --rows M1 CE", "scarce ucla-small --shares 0.5 1", "shift ucla-small --to other", "table2 ucla-small"):
        cli.call([*words.split(), *sizes])
        first = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")}
        cli.call([*words.split(), *sizes])  # all recorded: nothing changes
        assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")} == first
    said = capsys.readouterr().out
    for piece in ("training on, without STF?", "MS-G3D (ours, ucla-small-mine)", "mine → other xsub", "mine xsub J+B"):
        assert piece in said
    records = load_records("out")
    assert {r["experiment"] for r in records} == {"ablation", "scarce", "shift", "table2"}
    assert all({"experiment", "row", "dataset", "stream", "seed", "top1"} <= set(r) for r in records)
    shifted = [r for r in records if r["experiment"] == "shift"]
    assert {r["dataset"] for r in shifted} == {"other"} and {r["source"] for r in shifted} == {"mine"} and len(record_scores(shifted[0]).classes) == 4
    before, after = (load_checkpoint(f"data/runs/ucla-small-mine{t}-seed0")[0].state_dict() for t in ("", "-to-other"))
    assert [k for k in before if before[k].shape != after[k].shape or not torch.equal(before[k], after[k])] == ["fc.weight", "fc.bias"]
    with pytest.raises(ConfigError, match="--to data/"):
        cli.run_shift(Config.preset("ucla-small"))


# ---- is the focus faithful?


def test_ranks_break_ties_by_chance_not_by_place():
    present = torch.ones(400, 1, dtype=torch.bool)
    r = ranks(torch.zeros(400, 1, 4, 5), present)
    assert r.mean(0).flatten().sub(0.475).abs().max() < 0.06  # nobody first on average
    assert all(sorted(c.flatten().tolist()) == pytest.approx(np.arange(20) / 20) for c in r[:5])
    q = torch.rand(3, 2, 4, 5)
    half = torch.tensor([[True, False]] * 3)
    assert (ranks(q, half)[:, 1] == 1).all() and (ranks(q, half)[:, 0].flatten(1).argmin(1) == q[:, 0].flatten(1).argmax(1)).all()


class Sum(torch.nn.Module):
    "Logits (s, 0) where s is twenty times the sum of joint 0's first coordinate, less a threshold: the network's need is known."

    def forward(self, x):
        s = 20 * x[:, 0, :, 0, 0].mean(1) - 5
        return torch.stack([s, torch.zeros_like(s)], 1)


def test_curves_find_what_a_network_needs():
    x = torch.ones(4, 3, 10, 5, 1)
    needed, other = torch.zeros(4, 1, 10, 5), torch.zeros(4, 1, 10, 5)
    needed[..., 0], other[..., 0] = 1, -1
    down = [curve(Sum(), x, m).mean(0) for m in (needed, other)]
    up = [curve(Sum(), x, m, insert=True).mean(0) for m in (needed, other)]
    assert down[0].sum() < down[1].sum() and up[0].sum() > up[1].sum()
    assert torch.allclose(down[0][0], down[1][0]) and torch.allclose(up[0][-1], up[1][-1]) and torch.allclose(down[0][-1], up[0][0])
    named = {(k, m): c for k, pair in (("deletion", down), ("insertion", up)) for m, c in zip(("focus", "random"), pair)}
    named = {k: v.repeat(6, 1).numpy() for k, v in {**named, ("deletion", "motion"): down[1], ("insertion", "motion"): up[1]}.items()}
    assert (areas(named)["low"] > 0).all()


def test_what_is_taken_away():
    x = torch.randn(2, 3, 6, 4, 2)
    gone = torch.zeros(2, 2, 6, 4, dtype=torch.bool)
    gone[:, 0, :3, 1] = True
    zero, still = (take_away(x, gone, fill) for fill in FILLS)
    assert not zero[:, :, :3, 1, 0].any() and torch.allclose(still[:, :, :3, 1, 0], x[:, :, :, 1, 0].mean(2, keepdim=True).expand(-1, -1, 3))
    for made in (zero, still):
        assert torch.equal(made[:, :, 3:], x[:, :, 3:]) and torch.equal(made[..., 1], x[..., 1])


def test_forgetting_touches_the_named_parts_only(tmp_path):
    from stf.train import run

    store, config = TinyStore(), quick(tmp_path / "r")
    run(config, store, progress=False)
    net, header = load_checkpoint(config.run_folder)
    x = store.batch(np.arange(6), config.stream, config.preprocess, config.length, config.num_bodies)[0]
    other = forget(net, header, STAGES["head"] + STAGES["block 3"], x)
    changed = {k.split(".")[0] for k, v in net.state_dict().items() if not torch.equal(v, other.state_dict()[k])}
    assert "fc" in changed and changed <= {"fc", "tcn3", "gcn3d3", "sgcn3"} and not other.training
    covered = tuple(p for parts in STAGES.values() for p in parts)
    assert all(k.startswith((*covered, "data_bn")) for k in net.state_dict())  # a new part of the network must find its stage
    measures = focus_measures(net, store, [14, 15, 16], config)
    assert measures.index.tolist() == ["clip14", "clip15", "clip16"] and measures["β follows Q"].isna().all()
    assert measures.drop(columns="β follows Q").notna().all(axis=None) and measures["coverage"].between(0, 1).all()


def test_focus_records_are_made_once_and_read(tmp_path):
    from stf.experiments import ablation

    store, config = TinyStore(), quick(tmp_path / "r")
    ablation(config, rows=["M1", "M4"], results=tmp_path, store=store, progress=False)
    records = focus_records(config, ("M1", "M4", "Le"), (0, 1), tmp_path, store, progress=False, curves=("M4",))
    assert [(r["row"], r["seed"]) for r in records] == [("M1", 0), ("M4", 0)]  # what has not finished is left out
    again = focus_records(config, ("M1", "M4"), (0,), tmp_path, store, progress=False)
    assert again == records == load_records(tmp_path, experiment="focus")
    table = focus_table(records)
    lead = table["deletion, still: ahead of random"]
    assert table.loc["M4", "seeds"] == 1 and np.isnan(table.loc["M1", "β follows Q"]) and np.isfinite(lead["M4"]) and np.isnan(lead["M1"])
    assert json.loads((tmp_path / "focus" / "tiny" / "M4-seed0.json").read_text())["top1"] == pytest.approx(
        next(r["top1"] for r in load_records(tmp_path, experiment="ablation", row="M4")), abs=1e-3)
    assert focus_table([]).empty and isinstance(focus_table([]), pd.DataFrame)


def test_turned_counts_both_directions():
    assert turned(toy([1, 1, 0, 0]), toy([0, 1, 1, 0])) == {"corrected": ["clip0"], "broken": ["clip2"]}
