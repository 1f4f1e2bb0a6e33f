"""Records and tables: the paper's numbers agree with each other, records are whole, resumable and shared by two calls at once; the command line."""
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stf import cli, experiments
from stf.evaluate import Scores, average
from stf.experiments import (CONTRASTS, CONTROLS, READINGS, ROWS, TABLE5, ablation, gains, load_records, make_records, paper_table,
                             record_scores, row_config, row_jobs, summary, table5, telling_clip, write_record)  # fmt: skip
from stf.train import Config, ConfigError, Run
from test_train import TinyStore, tiny

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.usefixtures("one_thread")


def quick(folder, **changes):
    return tiny(folder, **{**dict(epochs=1, milestones=(), stf_epochs=1, stf_milestones=()), **changes})


# ---- the paper's numbers


def test_the_papers_tables_agree_with_each_other():
    t2, t3, t5 = paper_table("table2"), paper_table("table3"), paper_table("table5")
    assert t2.shape == (20, 15)
    kinetics = [c for c in t2 if c.startswith("Kinetics")]
    assert np.allclose(t2.loc["STF", kinetics] - t2.loc["MS-G3D (code)*", kinetics], t3.loc["STF over MS-G3D"].to_numpy(float), atol=1e-9)
    assert np.allclose((t5["accuracy"] - t5.loc["M1", "accuracy"])[1:], t5["gain"][1:], atol=0.011)
    assert paper_table("table4").loc["STF", "100"] == t2.loc["STF", "NTU60 x-sub J"] == t5.loc["M5", "accuracy"]


# ---- records


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ablation")
    records = ablation(quick(folder / "run"), results=folder / "results", store=TinyStore(), progress=False)
    return folder, records


def test_ablation_makes_the_rows_of_table_5(made):
    folder, records = made
    assert [r["row"] for r in records] == ["M1", "M2", "M3", "M4", "Le", "M5"]
    for r in records:
        assert {"experiment", "row", "dataset", "stream", "seed", "top1", "config", "history", "versions", "commit", "device", "threads"} <= set(r)
        assert r["experiment"] == "ablation" and r["seed"] == 0 and r["threads"] == 1
        assert record_scores(r).names == [f"clip{i}" for i in range(14, 20)]
    of = {r["row"]: r for r in records}
    used = {row: set(of[row]["history"][0]) & set("edcg") for row in TABLE5 if row != "M5"}
    assert used == {"M1": set(), "M2": set("c"), "M3": set("cd"), "M4": set("cdg"), "Le": set("e")}
    both = average(record_scores(of["M4"]), record_scores(of["Le"]))
    assert np.allclose(record_scores(of["M5"]).probabilities, both.probabilities) and of["M5"]["average"] == ["M4-seed0", "Le-seed0"]
    read = load_records(folder / "results", experiment="ablation", row="M4")
    assert len(read) == 1 and read[0]["top1"] == of["M4"]["top1"]
    size = sum(p.stat().st_size for p in (folder / "results").rglob("*.*"))
    assert size < 60_000  # compact


def test_recorded_rows_are_skipped_and_deleted_ones_made_again(made, monkeypatch):
    folder, records = made
    config = quick(folder / "run")
    monkeypatch.setattr(experiments, "run", lambda *a, **k: pytest.fail("trained again"))
    assert [r["top1"] for r in ablation(config, results=folder / "results", progress=False)] == [r["top1"] for r in records]
    monkeypatch.undo()
    fresh = ablation(quick(folder / "elsewhere"), rows=["M3"], results=folder / "other", store=TinyStore(), progress=False)
    assert [r["row"] for r in fresh] == ["M3"]  # from scratch, with its baseline: the same numbers
    assert np.array_equal(record_scores(fresh[0]).probabilities, record_scores(records[2]).probabilities)
    assert not (folder / "other" / "ablation" / "tiny" / "M1-seed0.json").exists()


def test_records_of_other_settings_are_not_reused(made):
    folder, _ = made
    with pytest.raises(ConfigError, match="recorded with other settings: lr 0.05 .now 0.01."):
        ablation(quick(folder / "run", lr=0.01), results=folder / "results", progress=False)
    with pytest.raises(ConfigError, match="no row .M7."):
        ablation(quick(folder / "run"), rows=["M7"])


def test_m5_alone_trains_what_it_needs(tmp_path):
    records = ablation(quick(tmp_path / "r"), seeds=(3,), rows=["M5"], results=tmp_path, store=TinyStore(), progress=False)
    assert [(r["row"], r["seed"]) for r in records] == [("M5", 3)]
    assert sorted(p.stem for p in (tmp_path / "ablation" / "tiny").glob("*.json")) == ["Le-seed3", "M4-seed3", "M5-seed3"]


BOTH = """
    import sys
    sys.path[:0] = [{tests!r}, {root!r}]
    import torch; torch.set_num_threads(1)
    import stf.train as train
    import test_experiments as t
    begin = train.Training
    def noted(config, *args):
        with open({log!r}, "a") as f:
            f.write(config.name + str(config.seed) + " " + str(__import__("os").getpid()) + chr(10))
        return begin(config, *args)
    train.Training = noted
    t.ablation(t.quick({folder!r} + "/run"), (0, 1), results={folder!r} + "/results", store=t.TinyStore(), progress=False)
"""


@pytest.mark.slow
def test_two_calls_at_once_share_the_work(tmp_path, made):
    code = textwrap.dedent(BOTH).format(tests=str(HERE), root=str(HERE.parent), log=str(tmp_path / "log"), folder=str(tmp_path))
    two = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [p.communicate(timeout=300)[1] for p in two]
    assert [p.returncode for p in two] == [0, 0], errors
    log = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(name for name, _ in log) == sorted(f"tiny{t}{seed}" for t in ("", "-stf-c", "-stf-dc", "-stf-dcg", "-stf-e") for seed in (0, 1))
    assert len({pid for _, pid in log}) == 2 and not any("waiting" in e for e in errors)  # each took some, none waited
    records = load_records(tmp_path / "results")
    expected = {r["row"]: record_scores(r).probabilities for r in made[1]}
    assert {(r["row"], r["seed"]) for r in records} == {(row, seed) for row in expected for seed in (0, 1)}
    assert all(np.array_equal(record_scores(r).probabilities, expected[r["row"]]) for r in records if r["seed"] == 0)
    assert not [p for p in (tmp_path / "results").rglob("*") if p.name.endswith(".new")]


def test_fuse_matches_rows_and_seeds(tmp_path):
    made = {}
    for stream, seeds in (("joint", (0, 1)), ("bone", (1, 2))):
        config = Config(stream=stream)
        for seed in seeds:
            scores = Scores(["a", "b"], [0, 1], np.random.default_rng(seed).dirichlet([1, 1], 2), ["x", "y"])
            about = dict(experiment="e", row="M1", name=stream, versions={}, device="cpu", threads=1, system="", machine="", processor="", commit=None)
            path = experiments.record_path(tmp_path, "e", stream, "M1", seed)
            made[stream, seed] = write_record(path, scores, config.replace(seed=seed), **about)
    fused = experiments.fuse([made["joint", 0], made["joint", 1]], [made["bone", 2], made["bone", 1]], tmp_path)
    assert [(r["seed"], r["stream"]) for r in fused] == [(1, "joint+bone")]
    table = experiments.stream_table([*made.values(), *fused])
    assert list(table.columns) == ["J", "B", "J+B"] and table.loc["M1", "J+B"] == fused[0]["top1"]
    assert load_records(tmp_path, stream="joint+bone")[0]["average"] == [made["joint", 1]["path"], made["bone", 1]["path"]]


def test_table5_pairs_gains_by_seed():
    rows = [("M1", 0, 70.0), ("M1", 1, 80.0), ("M5", 0, 73.0), ("M5", 1, 81.0), ("M2", 1, 82.0)]
    table = table5([{"name": "x", "row": row, "seed": seed, "top1": top1} for row, seed, top1 in rows])
    assert table.loc["M5", "x gain"] == pytest.approx(2) and table.loc["M2", "x gain"] == pytest.approx(2)  # not 82 − 75
    assert table.loc["M5", "x top-1"] == 77 and table.loc["M5", "x std"] == pytest.approx(np.std([73, 81], ddof=1))
    assert table["x seeds"].dropna().to_dict() == {"M1": 2, "M2": 1, "M5": 2} and np.isnan(table.loc["M2", "x std"])
    assert table.loc["M4", "L_Gk"] == "✓" and table.loc["M4", "L_e"] == "" and table.loc["M5", "paper"] == 91.34
    assert list(table5([]).index) == ["M1", "M2", "M3", "M4", "Le", "M5"]


def test_a_record_is_whole_or_not_there(tmp_path, monkeypatch):
    scores = Scores(["a", "b"], [0, 1], np.eye(2), ["x", "y"])
    path = tmp_path / "e" / "n" / "M1-seed0.json"
    write_record(path, scores, Config(), experiment="e", row="M1", name="n")
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_record(path, scores, Config(lr=1.0), experiment="e", row="M1", name="n")
    assert path.read_bytes() == before and load_records(tmp_path)[0]["config"]["lr"] == 0.05


def test_seeds_have_folders_of_their_own(tmp_path):
    config = quick(tmp_path / "r")
    trained = [row for row in ROWS if not ROWS[row].average and row != "Le-coordinates"]  # this set has no visibility
    for c in (config, config.replace(folder="")):
        assert len({row_config(c, row, seed).run_folder for row in trained for seed in (0, 1)}) == 2 * len(trained)


def test_folders_and_configurations_of_table_5_are_as_they_were():
    """Records and runs made before there were controls stay valid."""
    config = Config(name="x", folder="")
    assert [str(row_config(config, row, 2).run_folder) for row in ("M1", "M2", "M3", "M4", "Le")] == [
        f"data/runs/x{tail}-seed2" for tail in ("", "-stf-c", "-stf-dc", "-stf-dcg", "-stf-e")]
    assert row_config(config, "M4", 2) == config.replace(seed=2).second_stage("dcg")


def test_controls_differ_from_what_they_control_in_one_thing(tmp_path):
    base = quick(tmp_path / "r")
    config = {row: row_config(base, row, 0) for row in ROWS if not ROWS[row].average and row != "Le-coordinates"}
    differ = lambda a, b: {f.name for f in fields(Config) if getattr(config[a], f.name) != getattr(config[b], f.name)} - {"name", "folder"}
    assert differ("CE", "CE2") == {"order"} and differ("CE", "STF-CE") == {"model"} and differ("STF-CE", "Ld") == {"losses"}
    assert differ("Lg", "Lg-shuffled") == differ("Le", "Le-random") == {"control"}
    assert differ("M4", "M4-blocks") == {"coherence"} and differ("M4", "M4-guide") == {"guide"} and differ("M4", "M4-logit") == {"score"}
    assert differ("M4", "M4-rms") == {"norm"} and differ("M1", "M1-atmost") == {"exact"} and differ("M4", "M4-atmost") == {"exact", "init"}
    assert config["CE"].init == config["M4"].init == str(config["M1"].run_folder) and config["M4-atmost"].init == str(config["M1-atmost"].run_folder)
    assert row_config(base.replace(preprocess="paper"), "Le-coordinates", 0).mask == "coordinates"
    rows = {r for pair in CONTRASTS.values() for r in pair}
    assert rows <= set(ROWS) == {*TABLE5, *CONTROLS, *READINGS} and {*CONTROLS, *READINGS} - {"CE2"} <= rows


def test_jobs_come_in_order_of_priority():
    config = Config(name="x")
    rows = ("CE+CE", "M4", "M1")
    of = lambda first: [(j.row, j.seed) for j in row_jobs(config, rows, (1, 0), first=first)]
    assert of("seeds") == [(r, s) for s in (1, 0) for r in ("M1", "M4", "CE", "CE2", "CE+CE")]  # with the parts of the average
    assert of("rows") == [(r, s) for r in ("M1", "M4", "CE", "CE2", "CE+CE") for s in (1, 0)]
    atmost = row_jobs(config, ["M4-atmost"], (0,))
    assert [c.name for c in atmost[0].before] == ["x-atmost"] and len(atmost) == 1
    with pytest.raises(ConfigError, match="first is"):
        row_jobs(config, rows, (0,), first="any")


def test_every_row_trains(tmp_path):
    """Each control and reading end to end: its losses reach the history, its average is the average of its parts."""
    base = quick(tmp_path / "r", preprocess="paper")
    rows = [row for row in ROWS if row not in TABLE5]
    records = {r["row"]: r for r in ablation(base, rows=rows, results=tmp_path, store=TinyStore(), progress=False)}
    assert set(records) == set(rows)
    terms = {row: set(records[row]["history"][0]) & set("edcg") for row in rows if not ROWS[row].average}
    assert terms == {row: set(ROWS[row].losses or "") for row in terms}
    assert records["CE+CE"]["average"] == ["CE-seed0", "CE2-seed0"] and records["CE2"]["seed"] == 0
    same = lambda a, b: np.array_equal(record_scores(records[a]).probabilities, record_scores(records[b]).probabilities)
    assert not same("CE", "CE2") and not same("Lg", "Lg-shuffled") and not same("Le-random", "Le-coordinates")
    table = gains(list(records.values()), CONTRASTS, samples=200)
    assert table.loc["L_Gk: is it this clip's focus?", "seeds"] == 1 and table.loc["L_e: is it the focus?", "seeds"] == 0


def test_a_row_that_another_process_holds_is_left_to_it(tmp_path):
    """The next job is taken instead of waiting; the held one's record is read when it is there."""
    base, order = quick(tmp_path / "r"), []
    jobs = row_jobs(base, ("M1",), (0, 1), tmp_path)
    run, held = experiments.run, {jobs[0].config.run_folder}

    def busy(config, *args, **kwargs):
        if config.run_folder in held:
            held.clear()
            raise BlockingIOError
        order.append(config.seed)
        return run(config, *args, **kwargs)

    experiments.run = busy
    try:
        records = make_records(jobs, {base.data: TinyStore()}, progress=False)
    finally:
        experiments.run = run
    assert order == [1, 0] and [r["seed"] for r in records] == [0, 1]


def test_a_training_that_fails_stops_neither_the_others_nor_the_truth(tmp_path, monkeypatch):
    base, run = quick(tmp_path / "r"), experiments.run

    def fails(config, *args, **kwargs):
        if config.losses == "dcg":
            raise FloatingPointError("not a finite number")
        return run(config, *args, **kwargs)

    monkeypatch.setattr(experiments, "run", fails)
    with pytest.raises(RuntimeError, match="M4, seed 0: not a finite number"):
        ablation(base, rows=["M4", "Le", "M5"], results=tmp_path, store=TinyStore(), progress=False)
    assert [r["row"] for r in load_records(tmp_path)] == ["Le"]


def test_what_there_is_to_do_is_said_before_it_starts(tmp_path, capsys):
    base = quick(tmp_path / "r")
    ablation(base, seeds=(0, 1), rows=["M1", "CE"], results=tmp_path, store=TinyStore())
    said = capsys.readouterr().err
    assert "0 of 4 records are there; 4 trainings to do, about" in said
    before = torch.get_rng_state()
    jobs = row_jobs(base, ["M1", "M4"], (5,), tmp_path)
    seconds = experiments.estimate(jobs, lambda config: TinyStore())
    assert all(s > 0 for s in seconds) and torch.equal(torch.get_rng_state(), before)  # nobody's random numbers change
    ablation(base, seeds=(0, 1), rows=["M1", "CE"], results=tmp_path, store=TinyStore())
    assert "to do" not in capsys.readouterr().err


def test_telling_clip_prefers_one_that_was_turned():
    names, labels = ["a", "b", "c"], [0, 0, 1]
    base = Scores(names, labels, [[0.6, 0.4], [0.4, 0.6], [0.5, 0.5]], ["x", "y"])
    better = Scores(names, labels, [[1.0, 0.0], [0.6, 0.4], [0.3, 0.7]], ["x", "y"])
    assert telling_clip(better, base) == "b"  # wrong before, right now; c and a gain more or as much without turning
    assert telling_clip(base, base) in names


# ---- the command line


def typed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["stf", *map(str, words)])
    assert cli.main() is None


@pytest.mark.parametrize("words, code, message", [
    (["train", "ntu60-xsub-join"], 2, "did you mean 'ntu60-xsub-joint'"), (["train"], 2, "needs a preset"),
    (["train", "ucla-small", "--data", "nowhere", "--folder", "{tmp}/r"], 2, "nowhere"), (["evaluate"], 2, "at least one source"),
    (["evaluate", "{tmp}"], 2, "holds no scores"), (["info", "{tmp}/none"], 2, "no checkpoint"), (["prepare", "{tmp}/none", "{tmp}/s"], 2, "none"),
    (["train", "ucla-small", "--lr", "-1"], 2, "lr must be of type float ≥ 0"), (["train", "ucla-small", "--no-such", "1"], 2, "no-such"),
    (["trian"], 2, "trian"),
])  # fmt: skip
def test_mistakes_end_in_a_line_and_an_exit_code(tmp_path, monkeypatch, capsys, words, code, message):
    with pytest.raises(SystemExit) as stop:
        typed(monkeypatch, *(w.format(tmp=tmp_path) for w in words))
    said = capsys.readouterr()
    assert stop.value.code == code and message in said.err + said.out and "Traceback" not in said.err


@pytest.mark.parametrize("error, code", [(FloatingPointError("nan"), 1), (KeyboardInterrupt("stopped"), 130), (OSError("disk"), 1)])
def test_exit_codes(monkeypatch, error, code):
    monkeypatch.setattr(cli, "run", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as stop:
        typed(monkeypatch, "train", "ucla-small")
    assert stop.value.code == code


def test_every_value_of_config_is_an_option_and_reaches_run(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(cli, "run", lambda config, **k: seen.append(config) or Run(Path("r"), config, pd.DataFrame(), 50.0, []))
    typed(monkeypatch, "train", "ucla-small-bone", "--lr", "0.1", "--widths", "6", "12", "18", "--seed", "4", "--no-exact", "--losses", "e", "--model", "stf",
          "--augment.rotate", "17")
    assert seen[0] == Config.preset("ucla-small-bone", lr=0.1, widths=(6, 12, 18), seed=4, exact=False, losses="e", model="stf", augment={"rotate": 17.0})
    with pytest.raises(SystemExit):
        typed(monkeypatch, "train", "ucla-small", "--help")
    said = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')}" in said for f in fields(Config)) and "{frobenius,rms}" in said


def test_train_goes_on_with_a_runs_folder(tmp_path, monkeypatch, made):
    folder = made[0] / "run-seed0"
    config = cli.named_config(str(folder))
    assert config.run_folder == folder and config.replace(folder="") == Run.load(folder).config.replace(folder="")


def test_evaluate_fuses_and_saves(made, monkeypatch, capsys, tmp_path):
    folder, records = made
    a, b = (folder / f"run-seed0{t}" for t in ("-stf-dcg", "-stf-e"))
    typed(monkeypatch, "evaluate", a, b, "--baseline", folder / "run-seed0", "--save", tmp_path / "both.npz")
    said = capsys.readouterr().out
    top1 = next(r["top1"] for r in records if r["row"] == "M5")
    assert f"{top1:6.2f}" in said and "class by class" in said
    assert np.allclose(Scores.load(tmp_path / "both.npz").probabilities, record_scores(records[-1]).probabilities, atol=1e-6)


@pytest.mark.parametrize("what", ["", "ntu120-xset-bone", "run", "checkpoint"])
def test_info(made, monkeypatch, capsys, what):
    folder = made[0] / "run-seed0"
    typed(monkeypatch, "info", {"run": folder, "checkpoint": folder / "checkpoint"}.get(what, what))
    said = capsys.readouterr().out
    assert {"": "kinetics-bone-stf-e", "ntu120-xset-bone": "20, 35, 50", "run": "finished, top-1", "checkpoint": '"skeleton": "hand"'}[what] in said


def test_config_json_of_a_run_can_be_read_by_people(made):
    said = json.loads((made[0] / "run-seed0" / "config.json").read_text())
    assert said["version"] == 1 and said["name"] == "tiny"


def readme_lines(table):
    "The README's table of results, a line a row, as it must stand there."
    lines = []
    for row, r in table.iterrows():
        signed = lambda key: f"{round(r[key], 1) + 0.0:+.1f}"  # no -0.0
        gain = "" if pd.isna(r["gain"]) else f"{signed('gain')} ({signed('low')} to {signed('high')})"
        lines.append(f"| {row} | {r['what']} | {r['seeds']:.0f} | {r['top-1']:.1f} ± {r['std']:.1f} | {gain} | {r['verdict'] if gain else ''} |")
    return lines


def test_every_result_in_the_readme_comes_from_records():
    """Records that are made anew must not leave old numbers in the README."""
    records = load_records(HERE.parent / "data" / "results" / "first", experiment="ablation", name="ucla-small")
    wanted = readme_lines(summary([r for r in records if r["row"] in (*TABLE5, "CE", "CE+CE", "STF-CE")]))
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    part = text[text.index("<!-- results -->") : text.index("<!-- results end -->")]
    found = [line for line in part.splitlines() if line.startswith("|")][2:]
    assert found == wanted, "the README should say:\n" + "\n".join(wanted)
