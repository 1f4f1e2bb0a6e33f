"""The book: each notebook runs, stores clean outputs, reads in order; each module stands alone."""
import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "nbs"))
from flags import FLAGS, run_or_note  # noqa: E402

BOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
FILES = [p for p in sorted((ROOT / "stf").rglob("*.py")) if not p.stem.startswith("_")]
MODULES = [".".join(p.relative_to(ROOT / "stf").with_suffix("").parts) for p in FILES]
each_book = pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)


def cells(book):
    found = json.loads(book.read_text(encoding="utf-8"))["cells"]
    return [{**c, "source": "".join(c["source"])} for c in found if c["cell_type"] == "code"]


def module_order():
    "Module name (within stf) → number of the notebook that exports it."
    exp = re.compile(r"^#\|\s*default_exp\s+(\S+)", re.M)
    return {m[1]: b.stem for b in BOOKS for c in cells(b) if (m := exp.search(c["source"]))}


@each_book
def test_runs(book, monkeypatch):
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook

    monkeypatch.chdir(ROOT / "nbs")
    run = set(os.environ.get("STF_RUN_FLAGS", "").split())  # e.g. "data": on real recordings too
    skipped = set(get_config(path=ROOT).tst_flags.split()) - run
    passed, _ = run_notebook(book, skip_flags=skipped, basepath=ROOT)
    assert passed, f"a cell of {book.name} failed; its traceback is above"


@each_book
def test_outputs_are_stored_and_clean(book):
    assert any(c["outputs"] for c in cells(book)), "no stored output"
    for c in cells(book):
        text, where = json.dumps(c["outputs"]), f"in the outputs of: {c['source'][:80]}"
        assert '"output_type": "error"' not in text
        assert "Warning:" not in text, f"a warning {where}"
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), f"a path {where}"
        assert not re.search(r"0x[0-9a-f]{8,}", text), f"an address {where}"


@each_book
def test_run_all_in_jupyter_starts_no_long_work(book):
    """A flagged cell comes after the call that leaves it out when a reader runs all cells."""
    sources = [c["source"] for c in cells(book)]
    flagged = [i for i, s in enumerate(sources) if run_or_note([s]) != [s]]
    calls = [i for i, s in enumerate(sources) if re.search(r"^leave_out_flagged\(\)", s, re.M)]
    assert not flagged or calls and calls[0] < flagged[0], "leave_out_flagged() is missing"


def test_flagged_cells_run_when_they_are_asked_for(monkeypatch):
    monkeypatch.delenv("STF_RUN_FLAGS", raising=False)
    cell = ["#| slow\n", "#| data\n", "train()  # not slow at all\n"]
    assert run_or_note(cell) == ["print('left out: this cell is marked data slow')\n"]
    assert run_or_note(["x = 1\n", "#| slow\n"]) == ["x = 1\n", "#| slow\n"]
    monkeypatch.setenv("STF_RUN_FLAGS", " ".join(FLAGS))
    assert run_or_note(cell) == cell


def imports(path):
    "(module of stf, imported name) of every import of a file, those inside functions too."
    package = ["stf", *path.relative_to(ROOT / "stf").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            full = ".".join([*base, *filter(None, [node.module])])
            if full == "stf":
                yield from ((a.name, "") for a in node.names)
            elif full.startswith("stf."):
                yield from ((full.removeprefix("stf."), a.name) for a in node.names)


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_modules_import_public_names_from_lower_numbers(path):
    """The command line, last of all, is the only one that may load extras."""
    order = module_order()
    module = MODULES[FILES.index(path)]
    for other, name in imports(path):
        if other in order:
            assert order[other] < order[module], f"{module} imports {other}"
            assert not name.startswith("_"), f"{module} imports the private {other}.{name}"
            core = not module.startswith("extras.") and module != "cli"
            assert not (core and other.startswith("extras.")), f"{module} imports {other}"


@pytest.mark.parametrize("module", MODULES)
def test_imports_alone(module):
    """A notebook's own namespace hides a missing import, so each is imported in a fresh process."""
    alone = "assert not {'nbdev', 'fastcore', 'execnb'} & set(sys.modules)"
    code = f"import stf.{module}, sys; {alone}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_each_module_has_its_notebook():
    """No module is left over from a deleted notebook."""
    assert set(module_order()) == set(MODULES)
