"""Records and tables: only equal ones are pooled, and none is made twice."""
import json
import os
import subprocess
import sys
import textwrap
from copy import copy
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stf import experiments
from stf.checkpoints import batch_options, read_header, shipped_checkpoints
from stf.evaluate import average, holm
from stf.experiments import (CONTRASTS, PRIMARY, READINGS, ROWS, TABLE5, ablation, dose_curve,
                             focus_gains, focus_records, gains, load_records, operations,
                             paper_table, range_records, record_scores, scarce, shift_table,
                             streams, summary, table1, table2, table3, table4, table5)
from stf.train import Config, ConfigError, Run, run
from test_train import TinyStore, tiny

HERE = Path(__file__).resolve().parent
FIRST = HERE.parent / "data" / "results" / "first"
pytestmark = pytest.mark.usefixtures("one_thread")


def quick(folder, **changes):
    short = dict(epochs=1, milestones=(), stf_epochs=1, stf_milestones=())
    return tiny(folder, **short | changes)


def config_of(base, row, seed=0):
    return ROWS[row].configs(base, seed)[-1]


def test_the_papers_tables_agree_with_each_other():
    t2, t3, t5 = (paper_table(f"table{n}") for n in (2, 3, 5))
    kinetics = [c for c in t2 if c.startswith("Kinetics")]
    gain = t2.loc["STF", kinetics] - t2.loc["MS-G3D (code)*", kinetics]
    assert np.allclose(gain, t3.loc["STF over MS-G3D"].to_numpy(float), atol=1e-9)
    assert np.allclose((t5["accuracy"] - t5.loc["M1", "accuracy"])[1:], t5["gain"][1:], atol=0.011)
    assert paper_table("table4").loc["STF", "100"] == t2.loc["STF", "NTU60 x-sub J"]
    assert table1()["M4, M5 (ours)"].tolist() == table1()["STF"].tolist()
    assert table1()["M1 (ours)"].tolist() == table1()["G2"].tolist()  # MS-G3D's group


# ---- rows


def test_folders_and_configurations_of_table_5_are_as_they_were():
    """Runs made by earlier versions stay valid."""
    config, tails = Config(name="x"), {
        "M1": "", "M2": "-stf-c", "M3": "-stf-dc", "M4": "-stf-dcg", "Le": "-stf-e", "CE": "-ce",
        "CE2": "-ce2", "STF-CE": "-stf-ce", "Lg-shuffled": "-stf-g-shuffled",
        "M4-guide": "-stf-dcg-guide", "M4-frobenius": "-stf-dcg-frobenius", "M1-atmost": "-atmost",
        "M4-atmost": "-atmost-stf-dcg", "Le-coordinates": "-stf-e-coordinates"}
    for row, tail in tails.items():
        assert str(config_of(config, row, 2).run_folder) == f"data/runs/x{tail}-seed2"
    assert config_of(config, "M4", 2) == config.replace(seed=2).second_stage("dcg")
    trained = [row for row in ROWS if not ROWS[row].average]
    for base in (config, config.replace(folder="r")):
        folders = {config_of(base, row, seed).run_folder for row in trained for seed in (0, 1)}
        assert len(folders) == 2 * len(trained)


def test_controls_differ_from_what_they_control_in_one_thing():
    config = {row: config_of(Config(folder="r"), row) for row in ROWS if not ROWS[row].average}
    differ = lambda a, b: {f.name for f in fields(Config) if f.name not in ("name", "folder")
                           and getattr(config[a], f.name) != getattr(config[b], f.name)}
    for a, b, what in [
            ("CE", "CE2", "order"), ("CE", "STF-CE", "model"), ("Ld", "STF-CE", "losses"),
            ("Lg", "Lg-shuffled", "control"), ("Le", "Le-random", "control"),
            ("M4", "M4-blocks", "coherence"), ("M4", "M4-guide", "guide"),
            ("M4", "M4-logit", "score"), ("Le", "Le-logit", "score"),
            ("M4", "M4-frobenius", "norm"),
            ("Le", "Le-1-running", "lambda_e"), ("Le-1-running", "Le-1", "statistics"),
            ("Le-1", "Le-1-random", "control"),
            ("Le", "Le-score", "exploration"), ("Le", "Le-detached", "mask_gradient"),
            ("Ld", "Ld-overlap", "divergence"), ("Ld-overlap", "Ld-overlap-logit", "score"),
            ("M4", "M4-3x1", "beta_kernel"),
            ("M1", "M1-atmost", "exact"), ("Le", "Le-coordinates", "mask")]:
        assert differ(a, b) == {what}
    assert differ("M4", "M4-atmost") == {"exact", "init"}
    assert config["CE"].init == config["M4"].init == str(config["M1"].run_folder)
    compared = {row for pair in CONTRASTS.values() for row in pair}
    assert set(ROWS) - compared == {"CE2"} and compared <= set(ROWS)


# ---- records


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    config = quick(folder / "run")
    return folder, ablation(config, results=folder / "r", store=TinyStore(), progress=False)


def test_ablation_makes_the_rows_of_table_5(made):
    folder, records = made
    of = {r["row"]: r for r in records}
    assert tuple(of) == TABLE5
    for r in records:
        assert r["threads"] == 1 and {"dataset", "config", "versions", "commit", "device"} <= set(r)
        assert record_scores(r).names == [f"clip{i}" for i in range(14, 20)]
    used = {row: "".join(sorted(set(of[row]["history"][0]) & set("edcg"))) for row in TABLE5[:-1]}
    assert used == {"M1": "", "M2": "c", "M3": "cd", "M4": "cdg", "Le": "e"}
    both = average(record_scores(of["M4"]), record_scores(of["Le"]))
    assert np.allclose(record_scores(of["M5"]).probabilities, both.probabilities)
    assert of["M5"]["average"] == ["M4-seed0", "Le-seed0"]
    assert load_records(folder / "r", row="M4") == [of["M4"]]
    assert sum(p.stat().st_size for p in (folder / "r").rglob("*.*")) < 60_000  # compact


def test_recorded_rows_are_skipped_and_missing_ones_made_again(made, tmp_path, monkeypatch):
    folder, records = made
    config = quick(folder / "run")
    (tmp_path / "ablation/tiny").mkdir(parents=True)
    (tmp_path / "ablation/tiny/notes.json").write_text('{"by": "a user"}')
    fresh = ablation(quick(tmp_path / "x"), rows=["M3"], results=tmp_path, store=TinyStore(),
                     progress=False)
    assert [r["row"] for r in fresh] == ["M3"]  # from scratch, with its baseline: the same numbers
    same = [record_scores(r).probabilities for r in (fresh[0], records[2])]
    assert np.array_equal(*same) and not (tmp_path / "ablation/tiny/M1-seed0.json").exists()
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained again"))
    assert ablation(config, results=folder / "r", progress=False) == records
    with pytest.raises(ConfigError, match="recorded with other settings .*: lr 0.05 and 0.01"):
        ablation(config.replace(lr=0.01), results=folder / "r", progress=False)
    with pytest.raises(ConfigError, match="M5-seed0.json .*: lambda_d 0.1 and 0.2"):
        ablation(config.replace(lambda_d=0.2), rows=["M5"], results=only(folder, tmp_path, "M5"))
    for row, file in (("CE", "M1"), ("M4", "M4")):  # both start at M1; CE has no record
        with pytest.raises(ConfigError, match=f"{file}-seed0.json .*: lr 0.05 and 0.01"):
            ablation(config.replace(lr=0.01), rows=[row], results=folder / "r", progress=False)
    for of_rows in (ablation, focus_records):
        with pytest.raises(ConfigError, match="no row .M7."):
            of_rows(config, rows=["M7"])
    with pytest.raises(ConfigError, match="first is"):
        ablation(config, first="any")


def only(folder, to, row):
    "A results folder with one record."
    for file in (folder / "r").rglob(f"{row}-seed0.*"):
        copy = to / file.relative_to(folder / "r")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    return to


def test_unequal_records_are_never_pooled(made, tmp_path):
    """As first-edition records of another norm and new ones in one folder."""
    record = json.loads(next((made[0] / "r").rglob("M4-seed0.json")).read_text())

    def write(number, folder="x", **changes):
        path = tmp_path / folder / f"M4-seed{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        config = record["config"] | changes
        path.write_text(json.dumps(record | {"seed": number, "config": config}))

    write(0)
    write(1, seed=1, device="auto", init="moved/tiny-seed1", data="moved/nowhere", ema=0.0)
    assert len(load_records(tmp_path)) == 2
    write(2, "first", norm="frobenius")
    assert len(load_records(tmp_path)) == 2 and len(load_records(tmp_path / "first")) == 1
    write(3, norm="frobenius", data="elsewhere")
    with pytest.raises(ConfigError, match="M4-seed0.json and .*M4-seed3.json .*norm 'rms' "
                                          "and 'frobenius', data 'nowhere' and 'elsewhere'"):
        load_records(tmp_path, row="M4")
    write(3, lambda_d=5.0)
    with pytest.raises(ConfigError, match=r"M4-seed3.json .*\(lambda_d 0.1 and 5.0\)"):
        load_records(tmp_path, row="M4")
    write(3, "copy")
    (tmp_path / "x/M4-seed3.json").write_text('[{"epoch": 1}]')  # a user's own file
    assert len(load_records(tmp_path)) == 3
    write(0, "copy")
    with pytest.raises(ConfigError, match="M4-seed0.json and .*M4-seed0.json are of one row and"):
        load_records(tmp_path)
    for damaged in ('{"row": "M4", "experiment": "x"}', json.dumps(
            record | {"seed": 9, "config": record["config"] | {"losses": "dd"}})):
        (tmp_path / "copy/M4-seed0.json").write_text(damaged)
        with pytest.raises(ConfigError, match="copy/M4-seed0.json: not a whole record: "):
            load_records(tmp_path)


class Parts(TinyStore):
    "A TinyStore with a subset of some classes."
    def subset(self, classes):
        part, numbers = copy(self), [self.classes.index(k) for k in classes]
        keep = np.flatnonzero(np.isin(self.labels, numbers))
        part.names, part.x, part.classes = [self.names[i] for i in keep], self.x[keep], classes
        part.labels = np.searchsorted(numbers, self.labels[keep])
        part.split = lambda protocol: (np.flatnonzero(keep < 14), np.flatnonzero(keep >= 14))
        return part


def test_measured_is_what_was_trained_and_nothing_else(tmp_path):
    """Focus records and curves are of the test clips of a run's classes, by its settings."""
    base, store = quick(tmp_path / "r", classes=("down", "still")), Parts()
    (m1,) = ablation(base, rows=("M1",), results=tmp_path, store=store, progress=False)
    (found,) = focus_records(base, ("M1",), (0,), tmp_path, store, progress=False)
    stage = config_of(base, "M1").replace(folder=str(tmp_path / "c"), save_every=1)
    curve = dose_curve(stage, "M1", (0, 1), tmp_path, store, progress=False)["curve"]
    assert found["measures"]["correct"] == curve[-1]["correct"] == m1["top1"] / 100
    assert not list((tmp_path / "c").rglob("*.safetensors"))  # nothing to go on from
    both = [found, found | {"row": "STF-CE"}, found | {"row": "Ld"}]
    gained = focus_gains(both).index.get_level_values("measure")
    assert "mean of Q" in gained and "mean of Q on the answer" not in gained  # not measured here
    known = Path(found["path"]).with_name("known.json")  # of one row the answer was known
    clips = dict(np.load(Path(found["path"]).with_suffix(".npz")))
    np.savez(known.with_suffix(".npz"), **clips, **{"mean of Q on the answer": clips["mean of Q"]})
    some = [*both, found | {"row": "Le", "path": str(known)}]
    assert "mean of Q on the answer" not in focus_gains(some).index.get_level_values("measure")
    for pooled in ([m1, m1, m1 | {"row": "CE"}], [m1, m1]):
        with pytest.raises(ValueError, match="two records of M1, seed 0: choose"):
            summary(pooled)
    with pytest.raises(ValueError, match="of one configuration, not of another, "):
        summary([m1, m1 | {"name": "another", "seed": 1}])
    for measure in (lambda c: focus_records(c, ("M1",), (0,), tmp_path, store, progress=False),
                    lambda c: dose_curve(c.replace(folder="c"), "M1", (0, 1), tmp_path, store)):
        with pytest.raises(ConfigError, match="recorded with other settings than now: lr "):
            measure(base.replace(lr=0.3))
    Path(found["path"]).with_suffix(".npz").write_bytes(b"PK")
    with pytest.raises(ConfigError, match="M1-seed0.npz: lost or damaged: .* Delete .*json"):
        focus_gains([found])
    next(tmp_path.rglob("focus/**/*.json")).unlink()
    with pytest.raises(ConfigError, match="holds another configuration: lr "):
        focus_records(base.replace(lr=0.3), ("M1",), (0,), tmp_path, store, progress=False)


def test_first_edition_records_can_be_read():
    records = load_records(FIRST)
    now = {r["path"] for r in load_records(FIRST.parent)}
    assert len(records) == 114 and now and not now & {r["path"] for r in records}
    assert all(len(record_scores(r)) == r["test_clips"] for r in records if "scores" in r)


def test_a_record_is_whole_or_not_there(made, tmp_path, monkeypatch):
    config = quick(made[0] / "run")
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ablation(config, rows=["M1"], results=tmp_path, store=TinyStore(), progress=False)
    assert not load_records(tmp_path)


BOTH = """
    import os, sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import torch; torch.set_num_threads(1)
    import stf.train as train
    import test_experiments as t
    begin = train.Training
    def noted(config, *args):
        with open({log!r}, "a") as f:
            f.write(f"{{config.name}}{{config.seed}} {{os.getpid()}}" + chr(10))
        return begin(config, *args)
    train.Training = noted
    t.ablation(t.quick({folder!r} + "/run"), (0, 1), results={folder!r} + "/r", store=t.TinyStore(),
               progress=False)
"""


@pytest.mark.slow
def test_two_calls_at_once_share_the_work(tmp_path, made):
    places = dict(tests=HERE, root=HERE.parent, folder=tmp_path, log=tmp_path / "log")
    code = textwrap.dedent(BOTH).format(**{k: str(v) for k, v in places.items()})
    two = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
           for _ in range(2)]
    errors = [p.communicate(timeout=300)[1] for p in two]
    assert [p.returncode for p in two] == [0, 0], errors
    names, pids = zip(*(line.split() for line in (tmp_path / "log").read_text().splitlines()))
    tails = ("", "-stf-c", "-stf-dc", "-stf-dcg", "-stf-e")
    assert sorted(names) == sorted(f"tiny{tail}{seed}" for tail in tails for seed in (0, 1))
    assert len(set(pids)) == 2  # each took some, none twice
    records, wanted = load_records(tmp_path / "r"), {r["row"]: r for r in made[1]}
    assert {(r["row"], r["seed"]) for r in records} == {(r, s) for r in TABLE5 for s in (0, 1)}
    for r in (r for r in records if r["seed"] == 0):
        same = [record_scores(x).probabilities for x in (r, wanted[r["row"]])]
        assert np.array_equal(*same)


def test_every_row_trains(tmp_path, monkeypatch):
    """Each control and reading end to end, and what its run focuses on."""
    base = quick(tmp_path / "r", preprocess="paper")
    rows = [row for row in ROWS if row not in TABLE5]
    made = ablation(base, rows=rows, results=tmp_path, store=TinyStore(), progress=False)
    of = {r["row"]: r for r in made}
    assert list(of) == rows and of["CE+CE"]["average"] == ["CE-seed0", "CE2-seed0"]
    for row in (row for row in rows if not ROWS[row].average):
        assert set(of[row]["history"][0]) & set("edcg") == set(ROWS[row].losses or "")
    same = lambda a, b: np.array_equal(*(record_scores(of[r]).probabilities for r in (a, b)))
    assert not same("CE", "CE2") and not same("Lg", "Lg-shuffled")
    single = config_of(base, "Lg").replace(
        folder="", control="shuffled", batch_size=4, accumulate=3)
    with pytest.raises(ConfigError, match="two clips in each micro-batch"):
        run(single, TinyStore(), progress=False)
    assert not same("Le-random", "Le-coordinates")
    table = gains(made, CONTRASTS)
    assert table.loc["L_Gk: is it this clip's focus?", "seeds"] == 1
    assert table.loc["L_e: is it the focus?", "seeds"] == 0
    answer = lambda store, clips, *_: torch.arange(24).view(1, 8, 3) < 3 + torch.as_tensor(
        store.labels[clips]).view(-1, 1, 1, 1)  # depends on the class alone
    monkeypatch.setattr(experiments, "known_answer", answer)
    focus = focus_records(base, ("CE", "Lg", "Le"), (0, 1), tmp_path, TinyStore(), False, ("Lg",),
                          "raw")
    assert [r["row"] for r in focus] == ["CE", "Lg"]  # what has finished
    assert focus[0]["measures"]["β follows Q"] is None
    assert 100 * focus[0]["measures"]["correct"] == pytest.approx(of["CE"]["top1"])
    assert np.isfinite(focus[1]["measures"]["deletion, still: ahead of random"])
    assert focus[1]["measures"]["average precision (class mean)"] == 1
    moved = focus_gains([*focus, {**focus[1], "row": "STF-CE"}]).xs("STF-CE", level="against")
    assert (moved["difference"] == 0).all() and list(moved["seeds"]) == [1, 1, 1]
    means = focus[0]["by_class"]["average precision (chance)"]
    assert list(means) == ["down", "still", "up"] and means["up"] < means["down"] < means["still"]


def test_ranges_and_doses_are_records(tmp_path):
    """λ·L scales with λ; a curve begins before the first step; neither is computed twice."""
    base, store = quick(tmp_path / "r", preprocess="paper"), TinyStore()
    ablation(base, rows=("M4", "Le"), results=tmp_path, store=store, progress=False)
    made = range_records(base, tmp_path, store)
    start, end = made[1]["ranges"], made[2]["ranges"]
    assert [len(r["ranges"]) for r in made] == [len(READINGS) - 4, *[len(READINGS)] * 2]  # no β
    assert start["L_e, probability, λ = 1"]["e"] == pytest.approx(
        [100 * v for v in start["L_e, probability"]["e"]])
    assert start["L_Gk, rms, sum"]["g"] == pytest.approx(
        [6 * v for v in start["L_Gk, rms, mean"]["g"]])
    assert start["L_d, rms"]["ce"] != end["L_d, rms"]["ce"]
    assert range_records(base, tmp_path, None) == made
    with pytest.raises(ConfigError, match="lambda_e 0.01 and 1.0"):
        range_records(base.replace(lambda_e=1.0), tmp_path, None)
    stage = config_of(base, "M4").replace(folder=str(tmp_path / "c"), lr=0.5, epochs=2)
    curve = dose_curve(stage, "M4, longer", (0, 2), tmp_path, store, progress=False)
    assert Path(curve["path"]).name == "M4-longer-seed0.json"
    steps = -(-len(store.split("xsub")[0]) // stage.batch_size)
    assert [line["dose"] for line in curve["curve"]] == [0, 2 * 0.5 * steps]
    before, after = (line["β follows Q"] for line in curve["curve"])
    assert before != after and dose_curve(stage, "M4, longer", (0, 2), tmp_path, None) == curve
    assert "train_top1" in curve["curve"][1] and len(curve["ceiling"]) == 3
    assert all(-1 <= r <= 1 for r in curve["ceiling"])
    with pytest.raises(ConfigError, match="seed0.json is of 'M4, longer', seed 0, not 'M4 longer'"):
        dose_curve(stage, "M4 longer", (0, 2), tmp_path, None)
    for epochs in ((), (-1, 2)):
        with pytest.raises(ConfigError, match="epochs are those after which"):
            dose_curve(stage, "none", epochs, tmp_path, None)
    Path(curve["path"]).write_text('{"row"')  # as after a full disk
    with pytest.raises(ConfigError, match="longer-seed0.json: not a whole record: .* Delete it"):
        dose_curve(stage, "M4, longer", (0, 2), tmp_path, None)


def test_a_held_row_is_left_to_its_process_and_a_nan_costs_its_own_row(tmp_path, monkeypatch):
    base, order, run = quick(tmp_path / "r"), [], experiments.run
    held = {config_of(base, "M1").run_folder}

    def busy(config, *args):
        if config.run_folder in held:
            held.clear()
            raise BlockingIOError
        if config.losses == "dcg":
            raise FloatingPointError("not a finite number")
        order.append((config.losses, config.seed))
        return run(config, *args)

    monkeypatch.setattr(experiments, "run", busy)
    make = lambda rows, seeds: ablation(base, seeds, rows, tmp_path, TinyStore(), progress=False)
    assert [r["seed"] for r in make(["M1"], (0, 1))] == [0, 1]
    assert order == [(None, 1), (None, 0)]
    with pytest.raises(RuntimeError, match="M4, seed 0: not a finite number"):
        make(["M4", "Le", "M5"], (0,))
    assert {r["row"] for r in load_records(tmp_path)} == {"M1", "Le"}


def test_a_nan_costs_all_averages_that_need_it_and_nothing_waits(tmp_path, monkeypatch):
    """An average of averages, as a fusion of M5 of two streams, waited for ever."""
    base, run, tried = quick(tmp_path / "r"), experiments.run, []

    def diverge(config, *args):
        tried.append(config.stream)
        if config.losses == "dcg" or config.stream == "bone":
            raise FloatingPointError("not a finite number")
        return run(config, *args)

    monkeypatch.setattr(experiments, "run", diverge)
    monkeypatch.setattr(experiments.time, "sleep", lambda s: pytest.fail("waits for ever"))
    with pytest.raises(RuntimeError, match="tiny: M4, seed 0: not .* tiny-bone: M1, seed 0: not"):
        streams(base, (0,), ("M1", "M5"), tmp_path, TinyStore(), progress=False)
    assert {r["row"] for r in load_records(tmp_path)} == {"M1", "Le"}
    assert tried.count("bone") == 1  # what starts from it isn't tried


def test_rows_of_ones_own(made, tmp_path, monkeypatch):
    folder, records = made
    own = {"L": experiments.Row("λ_c 1", "c", {"lambda_c": 1.0}),
           "H": experiments.Row("λ_c ½", "c", {"lambda_c": 0.5}),
           "typo": experiments.Row("no such part", average=("M4", "M44")),
           "all": experiments.Row("an average of an average", average=("M5", "M1"))}
    monkeypatch.setattr(experiments, "ROWS", ROWS | own)
    low, high = (own[row].configs(quick("r"), 0)[-1].run_folder for row in "LH")
    assert low != high
    with pytest.raises(ConfigError, match="no row 'M44'"):
        ablation(quick("r"), rows=["typo"], results=tmp_path, progress=False)
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained again"))
    both, = ablation(quick(folder / "run"), rows=["all"], results=folder / "r", progress=False)
    Path(both["path"]).unlink()
    assert both["average"] == ["M5-seed0", "M1-seed0"]
    later = summary([records[0], both | {"row": "own", "path": records[0]["path"],
                                         "scores": records[0]["scores"]}])  # in another process
    assert list(later.index) == ["M1", "own"] and later.loc["own", "gain"] == 0
    with pytest.raises(ConfigError, match="no row 'M22'"):
        gains(records, {"a question": ("M22", "M1")})


def test_a_record_is_that_of_its_row_seed_settings_and_parts(made, tmp_path, monkeypatch):
    folder, records = made
    config, results = quick(folder / "run"), tmp_path / "ablation" / "tiny"
    for row in ("M2", "M4", "Le", "M5"):
        only(folder, tmp_path, row)
    make = lambda row, c=config: ablation(c, rows=[row], results=tmp_path, progress=False)
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained again"))
    with pytest.raises(ConfigError, match="M2-seed0.json .*at its start: epochs 1 and 2"):
        make("M2", config.replace(epochs=2, folder="elsewhere"))
    (results / "M4-seed0.npz").write_bytes((results / "M2-seed0.npz").read_bytes())  # made anew
    parts = average(*(record_scores(load_records(tmp_path, row=row)[0]) for row in ("M4", "Le")))
    made_anew, = make("M5")
    assert np.allclose(record_scores(made_anew).probabilities, parts.probabilities)
    written = [p.stat().st_mtime_ns for p in sorted(results.glob("M5*"))]
    make("M5")
    assert [p.stat().st_mtime_ns for p in sorted(results.glob("M5*"))] == written
    m1, m2 = config_of(config, "M1"), config_of(config, "M2")  # as of a data shift: three stages
    third = json.loads(m1.to_json())
    assert "at its start: epochs 1 and 2" in experiments._differ(
        {"config": json.loads(m2.to_json()), "starts": [third, third], "path": ""},
        [m2, m1, m1.replace(epochs=2)])
    for broken in (b"", b"PK", (results / "M4-seed0.npz").read_bytes()[:-40]):
        (results / "M4-seed0.npz").write_bytes(broken)
        with pytest.raises(ConfigError, match="M4-seed0.npz: not .* Delete .*M4-seed0.json"):
            make("M4")
    for kind in ("json", "npz"):
        (results / f"M3-seed0.{kind}").write_bytes((results / f"M2-seed0.{kind}").read_bytes())
    with pytest.raises(ConfigError, match="M3-seed0.json is of 'M2', seed 0, not 'M3', seed 0"):
        make("M3")
    no_config = json.dumps(records[0] | {"row": "M3", "config": None})
    for damaged, text in (("[]", "not 'M3'"), ('{"experiment": "x", "row": "M3"}', "no config"),
                          (no_config, "its configuration: ")):
        (results / "M3-seed0.json").write_text(damaged)
        with pytest.raises(ConfigError, match=f"M3-seed0.json.* {text}"):
            make("M3")


def test_an_average_over_seeds_says_where_all_its_parts_come_from(made, tmp_path, monkeypatch):
    record = json.loads(next((made[0] / "r").rglob("M1-seed0.json")).read_text())
    record_scores(made[1][0]).save(tmp_path / "ablation" / "tiny" / record["scores"])
    for seed, commit in ((0, "a, b"), (1, "c, a")):
        changed = {"seed": seed, "commit": commit, "config": record["config"] | {"seed": seed}}
        file = tmp_path / "ablation" / "tiny" / f"M1-seed{seed}.json"
        file.write_text(json.dumps(record | changed))
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained again"))
    make = lambda *rows: ablation(quick(made[0] / "run"), (0,), rows, tmp_path, progress=False)
    two, = make("M1+M1")
    assert two["average"] == ["M1-seed0", "M1-seed1"] and two["seed"] == 0
    assert two["commit"] == "a, b, c" and two["threads"] == 1 and "versions" in two
    assert [(r["row"], r["seed"]) for r in make("M1+M1", "M1")] == [("M1", 0), ("M1+M1", 0)]


def test_rows_or_seeds_come_first(monkeypatch):
    monkeypatch.setattr(experiments, "_records", lambda jobs, *_: [j.facts for j in jobs])
    rows, needed = ("CE+CE", "M4", "M1"), ("M1", "M4", "CE", "CE2", "CE+CE")
    of = lambda first: [(f["row"], f["seed"])
                        for f in ablation(Config(), (1, 0), rows, first=first)]
    assert of("seeds") == [(r, s) for s in (1, 0) for r in needed]
    assert of("rows") == [(r, s) for r in needed for s in (1, 0)]
    rows, needed = ("M1+M1",), ("M1", "M1+M1")
    assert {*of("seeds")} == {("M1", 2), *((r, s) for s in (1, 0) for r in needed)}
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        ablation(Config())


# ---- tables


def test_table5_pairs_gains_by_seed():
    rows = [("M1", 0, 70), ("M1", 1, 80), ("M5", 0, 73), ("M5", 1, 81), ("M2", 1, 82)]
    table = table5([dict(name="x", row=r, seed=s, top1=float(t)) for r, s, t in rows])
    assert table.loc["M5", "x gain"] == table.loc["M2", "x gain"] == 2  # not 82 − 75
    assert table.loc["M5", "x top-1"] == 77 and table.loc["M5", "x std"] == np.std([73, 81], ddof=1)
    assert table["x seeds"].dropna().to_dict() == {"M1": 2, "M2": 1, "M5": 2}
    assert table.loc["M4", "L_Gk"] == "✓" and table.loc["M4", "L_e"] == ""
    assert table.loc["M5", "paper"] == 91.34 and tuple(table5([]).index) == TABLE5
    with pytest.raises(ValueError, match="records of one configuration, not of x, y"):
        gains([dict(name=n, row="M1", seed=0) for n in "xy"], {"?": ("M1", "M1")})


def test_only_primary_contrasts_are_corrected_and_for_those_that_were_run():
    records = load_records(FIRST, experiment="ablation", name="ucla-small")
    table = gains(records, CONTRASTS)
    primary = table[table["holm"].notna()].sort_values("p")
    assert {*zip(primary["row"], primary["against"])} == {*PRIMARY} < {*CONTRASTS.values()}
    factors = primary["holm"].iloc[:2] / primary["p"].iloc[:2]
    assert np.allclose(factors, [3, 2]) and primary["holm"].iloc[2] == primary["p"].iloc[2]
    records = [r for r in records if r["row"] != "Le"]
    assert gains(records, CONTRASTS)["holm"].min() == pytest.approx(2 * primary["p"].iloc[0])


def fake(row, seed=0, dataset="ntu60", protocol="xsub", stream="joint", name="ntu60-xsub-joint",
         top1=50.0, **more):
    return dict(row=row, seed=seed, dataset=dataset, protocol=protocol, stream=stream, name=name,
                top1=top1, **more)


def test_our_records_fall_in_the_papers_columns():
    records = [fake("M1", top1=80.0), fake("M1", 1, top1=82.0), fake("M5", top1=84.0),
               fake("M5", stream="bone", name="ntu60-xsub-bone", top1=84.0),
               fake("M5", 0, "kinetics", "val", "joint+bone", "kinetics-joint+bone", 40.0),
               fake("M1", 0, "mine", "xset", name="ucla-small-mine")]
    table = table2([*records, records[0]])  # a record that occurs twice counts once
    assert table.shape == (23, 16) and list(table)[:15] == list(paper_table("table2"))
    assert table.loc["Baseline (ours)", "NTU60 x-sub J"] == 81
    assert table.loc["STF (ours)"].dropna().to_dict() == {
        "NTU60 x-sub J": 84, "NTU60 x-sub B": 84, "Kinetics J+B": 40}
    assert table.loc["Baseline (ours, ucla-small-mine)", "mine xset J"] == 50
    assert table3(records).loc["STF over baseline (ours)", "NTU60 x-sub J"] == 3
    assert table2([]).shape == (20, 15) and table3([]).shape == (2, 3)


def test_table4_and_shift_leave_blank_what_was_not_run():
    records = [fake("M1", s, share=0.1, of="x", top1=t) for s, t in ((0, 60.0), (1, 62.0))]
    table = table4([*records, fake("M5", share=0.3, of="x")])
    assert table.loc["Baseline (ours, x)", "10"] == 61 and table.loc["STF (ours, x)", "30"] == 50
    assert np.isnan(table.loc["STF (ours, x)", "10"]) and table.loc["STF", "25"] == 84.27
    assert table4([], "scarce_kinetics").loc["STF", "B"] == 26.3
    assert shift_table([]).loc["STF"].tolist() == [83.38]


def test_streams_and_shares_are_named_and_averaged(tmp_path):
    config, store = quick(tmp_path / "r"), TinyStore()
    made = streams(config, (1,), ["M1"], tmp_path, store, False, ("joint", "bone-motion"))
    assert [r["name"] for r in made] == ["tiny", "tiny-bone-motion", "tiny+bone-motion"]
    fused = average(*map(record_scores, made[:2])).probabilities
    assert np.allclose(record_scores(made[2]).probabilities, fused)
    assert made[2]["stream"] == "joint+bone-motion" and made[2]["seed"] == 1
    assert list(table2(made))[15:] == ["nowhere xsub J", "nowhere xsub BM", "nowhere xsub J+BM"]
    held = ablation(config, (1,), ["M1"], tmp_path, store, progress=False)
    made = streams(config, (1,), ["M1"], tmp_path, store, False, experiment="ablation")
    assert made[:1] == held and {r["experiment"] for r in made} == {"ablation"}
    made = scarce(config, (0.5, 1.0), rows=["M1"], results=tmp_path, store=store, progress=False)
    assert [(r["share"], r["name"], r["config"]["fraction"]) for r in made] == [
        (0.5, "tiny-p50", 0.5), (1.0, "tiny", 1.0)]
    with pytest.raises(ConfigError, match="fraction is a share"):
        scarce(config, (1.5,))


def test_the_demo_compares_with_shipped_networks_of_its_classes_and_input(monkeypatch):
    header = read_header(shipped_checkpoints()[0])
    classes, options = header["classes"], batch_options(header)
    assert [*experiments._shipped(classes, options)] == ["M1", "M4", "Le"]
    assert not experiments._shipped(classes[:3], options)
    assert not experiments._shipped(classes, options | {"length": 12})
    monkeypatch.setattr(experiments, "shipped_checkpoints", lambda rows: [])
    assert not experiments._shipped(classes, options)


def test_the_demo_draws_the_clip_of_median_average_precision(made, monkeypatch):
    net, store, clips = Run.load(made[0] / "run-seed0").network(), TinyStore(), np.arange(14, 20)
    found = pd.DataFrame({"average precision (probability)": [0.9, np.nan, 0.1, 0.3, 0.8, 0.5]})
    monkeypatch.setattr(experiments, "focus_measures", lambda *args, **_: found)
    monkeypatch.setattr(experiments, "known_answer", lambda *args: torch.ones(6, 1, 8, 3).bool())
    drawn = []
    monkeypatch.setattr(experiments, "draw_strip", lambda joints, *args, **_: drawn.append(joints))
    title = experiments._draw_foci({"M1": net}, ("M1", net), store, clips, {}, "raw")._suptitle
    assert np.array_equal(drawn[0], store.x[19, :3].transpose(3, 1, 2, 0))  # 0.5 of five numbers
    assert title.get_text().startswith("'down'") and len(drawn) == 2


def test_operations_are_counted():
    table = operations(Config(length=30))
    assert 0 < table.loc["STF", "more (%)"] < 10


def readme_table(name):
    "Lines of the README's table between two comments."
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    part = text[text.index(f"<!-- {name} -->") : text.index(f"<!-- {name} end -->")]
    return [line for line in part.splitlines() if line.startswith("|")][2:]


def test_every_result_in_the_readme_comes_from_records():
    """Records that are made anew must not leave old numbers in the README."""
    shown = (*TABLE5, "CE", "CE2", "CE+CE", "M1+M1", "STF-CE")
    records = load_records(FIRST.parent, experiment="ablation", name="ucla-small")
    records, wanted = [r for r in records if r["row"] in shown], []
    of, signed = gains(records), lambda line: "{:+.1f} ({:+.1f} to {:+.1f})".format(
        *(line[k] for k in ("gain", "low", "high")))
    corrected = dict(zip(of["row"], holm(of["p"])))
    for row, r in summary(records).iterrows():
        gain = ("", "") if row == "M1" else (signed(r), f"{corrected[row]:.2f}")
        level = f"{r['seeds']:.0f} | {r['top-1']:.1f} ± {r['std']:.1f}"
        wanted.append(f"| {row} | {r['what']} | {level} | {gain[0]} | {gain[1]} |")
    assert readme_table("results") == wanted, "the README should say:\n" + "\n".join(wanted)
    trained, focus = (load_records(FIRST.parent, experiment=k, name="synthetic")
                      for k in ("ablation", "focus"))
    known = pd.DataFrame([r["measures"] for r in focus], [r["row"] for r in focus])
    known = known["average precision (probability)"].groupby(level=0).mean()
    of, wanted = gains(trained, "STF-CE"), []
    more = ("Ld", "Lg", "M4-frobenius", "Le-1")
    trained = [r for r in trained if r["row"] in (*shown, *more)]
    for row, r in summary(trained).query("seeds >= 5").iterrows():
        gain = "" if row == "STF-CE" else signed(of.loc[row])
        level = f"{r['seeds']:.0f} | {r['top-1']:.1f} ± {r['std']:.1f}"
        found = f"{known[row]:.2f}" if row in known else ""  # averages have no focus
        wanted.append(f"| {row} | {r['what']} | {level} | {gain} | {found} |")
    assert readme_table("synthetic") == wanted, "the README should say:\n" + "\n".join(wanted)
