"""The command line: its options, its exit codes, and the tables on any store."""
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from stf import cli
from stf.checkpoints import ConfigError, load_checkpoint
from stf.clips import open_clips
from stf.dataset import ClipStore
from stf.evaluate import Scores
from stf.experiments import load_records, record_scores
from stf.synthetic import SyntheticConfig, write_synthetic
from stf.train import Config, Ensemble, Run, run
from test_experiments import made  # noqa: F401 (a fixture)
from test_train import pressing, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
SCORES = Scores(["a", "b"], [0, 1], [[0.6, 0.4], [0.7, 0.3]], ["walk", "run"])


def typed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["stf", *map(str, words)])
    assert cli.main() is None


@pytest.mark.parametrize("words, message", [
    ("train ntu60-xsub-join", "did you mean 'ntu60-xsub-joint'"), ("train", "needs a preset"),
    ("train ucla-small --data nowhere --folder {tmp}/r", "nowhere"),
    ("evaluate", "at least one source"), ("evaluate {tmp}", "no checkpoint in"),
    ("evaluate {tmp} --protocol subject=1", "add --store"),
    ("evaluate {tmp}/none", "none: there is no such file or folder"),
    ("info {tmp}/none", "no checkpoint"), ("prepare {tmp}/none {tmp}/s", "none"),
    ("train ucla-small --lr -1", "lr must be of type float ≥ 0"),
    ("train ucla-small --no-such 1", "no-such"), ("trian", "trian"),
    ("train ucla-small --bodies motion", "--bodies motion is for --preprocess paper"),
    ("evaluate {tmp}/none.npz", "none.npz: No such file or directory"),
])
def test_mistakes_end_in_a_line_and_an_exit_code(tmp_path, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        typed(monkeypatch, *words.format(tmp=tmp_path).split())
    said = capsys.readouterr()
    assert stop.value.code == 2 and message in said.err + said.out and "Traceback" not in said.err


def test_help_names_all_commands_without_torch():
    """PyTorch takes more than a second to import; `stf --help` must not wait for it."""
    code = "import sys; from stf import cli; cli.call(['-h']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"  {command} " in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize("text, shown", [
    ("s exists (overwrite=True replaces it)", "s exists (--overwrite replaces it)"),
    ("14 joints: name it by skeleton=…", "14 joints: name it by --skeleton …"),
    ("needs model='stf': 'msg3d' has no β", "needs --model stf: 'msg3d' has no β"),
    ("batch_size=4, accumulate=2: less", "--batch-size 4, --accumulate 2: less"),
    ("batch_size must be at least 1", "--batch-size must be at least 1"),
    ("use a larger batch_size, or less", "use a larger --batch-size, or less"),
    ("widths must be odd, got (5, 4)", "--widths must be odd, got 5 4"),
    ("its classes is ['a b', 'c'], not ('d',)", "its classes is 'a b' 'c', not 'd'"),
    ("no 'batchsize'; did you mean 'batch_size'?", "no 'batchsize'; did you mean 'batch_size'?"),
    ("data/lr 1/batch_size/x: no file", "data/lr 1/batch_size/x: no file"),
    ("k=3 of /data/x=1/a.npz", "k=3 of /data/x=1/a.npz"),
    ("lr=0.1/run.json: damaged", "lr=0.1/run.json: damaged"),
])
def test_options_in_messages_are_those_that_one_types(capsys, text, shown):
    with pytest.raises(SystemExit):
        cli._fail(ConfigError(text), 1)
    assert capsys.readouterr().err == f"stf: {shown}\n"


def test_skeletons_are_named_alike_everywhere(tmp_path, monkeypatch, capsys):
    """A name or a JSON file, whatever the command; an unknown one is refused in the same words."""
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "w.pt").write_bytes(b"")
    imported = "import-msg3d {t}/w.pt {t}/n --stream joint"
    for command in ("prepare {t}/w.pt {t}/s", "predict {t}/w.pt", imported, "info {t}/w.pt"):
        for skeleton, reason in (("cat", "no skeleton 'cat'; known are ntu25"),
                                 (tmp_path / "list.json", "list.json: describes no skeleton")):
            with pytest.raises(SystemExit) as stop:
                typed(monkeypatch, *command.format(t=tmp_path).split(), "--skeleton", skeleton)
            assert stop.value.code == 2 and reason in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [(FloatingPointError("nan"), 1), (OSError("disk"), 1),
                                         (KeyboardInterrupt("stopped"), 130)])
def test_exit_codes(monkeypatch, error, code):
    monkeypatch.setattr("stf.train.run", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit) as stop:
        typed(monkeypatch, "train", "ucla-small")
    assert stop.value.code == code


def test_every_value_of_config_is_an_option_and_reaches_run(monkeypatch, capsys):
    seen, run = [], lambda c, **k: seen.append(c) or Run(Path("r"), c, pd.DataFrame(), 50.0, SCORES)
    monkeypatch.setattr("stf.train.run", run)
    typed(monkeypatch, *"train ucla-small-bone --lr 0.1 --widths 6 12 18 --seed 4 --no-exact "
                        "--losses e --model stf --augment.scale 0.1".split())
    assert seen[0] == Config.preset("ucla-small-bone", lr=0.1, widths=(6, 12, 18), seed=4,
                                    exact=False, losses="e", model="stf",
                                    augment={"rotate": 17.0, "scale": 0.1})
    with pytest.raises(SystemExit):
        typed(monkeypatch, "train", "ucla-small", "--help")
    said = capsys.readouterr().out
    assert all(f"--{f.name.replace('_', '-')}" in said for f in fields(Config))
    assert "{rms,mean-square,frobenius}" in said


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Folder of a store: three actions of four people, a clip each."
    folder = tmp_path_factory.mktemp("cli")
    few = SyntheticConfig(actions=(23, 27, 44), subjects=(1, 2, 3, 6), cameras=(2,))
    write_synthetic(folder / "raw", few, progress=False)
    return ClipStore.build(open_clips(folder / "raw"), folder / "s", progress=False).folder


def test_folds_and_test_subjects_are_protocols(store, monkeypatch, capsys):
    """Fold k has top-1 10k; its run has a name, a folder and a protocol of its own."""
    seen = []

    def run(c):
        seen.append((c.name, c.folder, c.protocol))
        top1 = 10.0 * int(c.name[-1]) if "fold" in c.name else 0.0
        return Run(Path("r"), c, pd.DataFrame(), top1, SCORES)

    both = lambda c: Ensemble({"M1": run(c)}, None, 90.0 + run(c).top1 / 10)
    monkeypatch.setattr("stf.train.run", run)
    monkeypatch.setattr("stf.train.run_stf", both)
    words = ("train", "synthetic", "--data", store)
    typed(monkeypatch, *words, "--test-subjects", 2, 6)
    assert seen == [("synthetic", "", "subject=2,6")]
    seen.clear()
    typed(monkeypatch, *words, "--folds", 4, "--folder", "own")
    assert seen == [(f"synthetic-fold{k}", f"own-fold{k}", f"subject:{k}/4") for k in (1, 2, 3, 4)]
    said = capsys.readouterr().out
    told = "top-1 30.00 % of 2 test clips after epoch 0, all predicted as one class"
    assert f"synthetic-fold3: {told}" in said and "top-1: 25.00 ± 12.91 %, mean" in said
    typed(monkeypatch, *words, "--folds", 5, "--both-stages")
    said = capsys.readouterr().out
    assert seen[-1] == ("synthetic-fold5", "", "clip:5/5") and "by clip: fewer subjects" in said
    assert "M1: 30.00 ± 15.81 %" in said and "M5: 93.00 ± 1.58 %" in said
    for wrong, message in (("--folds 1", "from 2 to 12"), ("--folds -2", "from 2 to 12"),
                           ("--folds 2 --test-subjects 2", "give one of them")):
        with pytest.raises(SystemExit):
            typed(monkeypatch, *words, *wrong.split())
        assert message in capsys.readouterr().err


def test_a_run_given_by_its_folder_keeps_the_names_of_its_second_stages(tmp_path, monkeypatch):
    """`stf train data/runs/a-seed0 --both-stages` trained both stages anew, under other names."""
    monkeypatch.chdir(tmp_path)
    for config, folder in ((tiny(name="a", folder=""), "data/runs/a-seed0"),
                           (tiny(name="b", folder="own"), "own")):
        Path(folder).mkdir(parents=True)
        Path(folder, "config.json").write_text(config.to_json())
        found = cli.named_config(folder)
        assert found.second_stage("e").run_folder == config.second_stage("e").run_folder
        assert found.run_folder == Path(folder)
    Path("own").rename("moved")
    assert cli.named_config("moved").second_stage("e").run_folder == Path("moved-stf-e")


def test_a_store_is_no_checkpoint(store, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        typed(monkeypatch, "evaluate", store)
    assert "it is a store of recordings" in capsys.readouterr().err


def test_evaluate_fuses_and_saves(made, monkeypatch, capsys, tmp_path):  # noqa: F811
    folder, records = made
    first, a, b = (folder / f"run-seed0{t}" for t in ("", "-stf-dcg", "-stf-e"))
    typed(monkeypatch, "evaluate", a, b, "--baseline", first, "--save", tmp_path / "both.npz")
    said, m5 = capsys.readouterr().out, records[-1]
    assert f"{m5['top1']:6.2f}" in said and "class by class" in said and "top-5" not in said
    both = Scores.load(tmp_path / "both.npz").probabilities
    assert np.allclose(both, record_scores(m5).probabilities, atol=1e-6)
    config = cli.named_config(str(first))  # `stf train <run's folder>` goes on
    assert config.run_folder == first


@pytest.mark.parametrize("what, part", [
    ("", "kinetics-bone-stf-e"), ("ntu120-xset-bone", "20, 35, 50"),
    ("run-seed0", "finished, top-1"), ("run-seed0/checkpoint", '"skeleton": "hand"')])
def test_info(made, monkeypatch, capsys, what, part):  # noqa: F811
    typed(monkeypatch, "info", made[0] / what if what.startswith("run") else what)
    assert part in capsys.readouterr().out


def test_info_of_a_stopped_run(tmp_path, monkeypatch, capsys):
    config = tiny(tmp_path / "run", epochs=2)
    with pytest.raises(KeyboardInterrupt):
        run(config, pressing(2), progress=False)
    typed(monkeypatch, "info", config.run_folder)
    assert "epochs trained: 0, steps of the next: 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # evaluated as if it were finished
        typed(monkeypatch, "evaluate", config.run_folder)
    assert "an unfinished run, epochs trained: 0" in capsys.readouterr().out


@pytest.mark.slow
def test_every_table_on_a_set_given_as_a_folder(tmp_path, monkeypatch, capsys):
    """As a user would who has a store, a protocol and a preset to take sizes from."""
    monkeypatch.chdir(tmp_path)
    for name, actions in (("mine", (23, 24, 26)), ("other", (23, 24, 26, 27))):
        few = SyntheticConfig(actions=actions, subjects=tuple(range(1, 9)), cameras=(2,))
        write_synthetic(f"raw-{name}", few, progress=False)
        ClipStore.build(open_clips(f"raw-{name}"), name, progress=False)
    sizes = ("--data mine --protocol xsub --length 16 --widths 6 12 12 --gcn-scales 4 "
             "--g3d-scales 2 --epochs 2 --milestones --stf-epochs 1 --stf-milestones "
             "--results out --device cpu").split()
    content = lambda: {p: p.read_bytes() for p in (tmp_path / "out").rglob("*.json")}
    for words in ("ablation ucla-small --rows M1 CE", "scarce ucla-small --shares 0.5 1",
                  "shift ucla-small --to other", "table2 ucla-small"):
        cli.call([*words.split(), *sizes])
        first = content()
        cli.call([*words.split(), *sizes])  # all recorded: nothing changes
        assert content() == first
    said = capsys.readouterr().out
    for piece in ("the baseline trained on as long", "Baseline (ours, ucla-small-mine)",
                  "mine → other xsub", "mine xsub J+B"):
        assert piece in said
    records = load_records("out")
    assert {r["experiment"] for r in records} == {"ablation", "scarce", "shift", "table2"}
    shifted = [r for r in records if r["experiment"] == "shift"]
    assert {(r["source"], r["dataset"]) for r in shifted} == {("mine", "other")}
    assert len(record_scores(shifted[0]).classes) == 4
    before, after = (load_checkpoint(f"data/runs/ucla-small-mine{t}-seed0")[0].state_dict()
                     for t in ("", "-to-other"))
    assert [k for k in before if before[k].shape != after[k].shape
            or not torch.equal(before[k], after[k])] == ["fc.weight", "fc.bias"]
    with pytest.raises(SystemExit):
        cli.call(["shift", "ucla-small"])
    assert "--to" in capsys.readouterr().err
