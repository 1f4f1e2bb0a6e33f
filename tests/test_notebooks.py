"""The book: each notebook runs, reads in order, and each module stands alone."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stf.reading import cell_flags

ROOT = Path(__file__).resolve().parent.parent
BOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = sorted(p.stem for p in (ROOT / "stf").glob("*.py") if not p.stem.startswith("_"))


def cells(book, kind="code"):
    return [c for c in json.loads(book.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def module_order():
    """Module name → number of the notebook that exports it."""
    order = {}
    for book in BOOKS:
        for cell in cells(book):
            if found := re.search(r"^#\|\s*default_exp\s+(\S+)", source(cell), re.M):
                order[found[1]] = book.stem
    return order


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_runs(book, monkeypatch):
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook

    monkeypatch.chdir(ROOT / "nbs")
    skipped = set(get_config(path=ROOT).tst_flags.split())
    if os.environ.get("STF_RUN_FLAGS"):  # e.g. STF_RUN_FLAGS="data" runs the cells on real recordings too
        skipped -= set(os.environ["STF_RUN_FLAGS"].split())
    passed, _ = run_notebook(book, skip_flags=skipped, basepath=ROOT)
    assert passed, f"a cell of {book.name} failed; its traceback is above"


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_exports_import_only_from_lower_numbers(book):
    """What a notebook exports; the cells that teach may use pictures and example clips from anywhere."""
    order = module_order()
    for cell in cells(book) if book.stem[0].isdigit() else ():
        if not re.search(r"^#\|\s*export", source(cell), re.M):
            continue
        for module in re.findall(r"^\s*(?:from|import)\s+stf\.(\w+)", source(cell), re.M):
            assert order[module] < book.stem, f"{book.stem} imports stf.{module} of {order[module]}"


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_outputs_are_stored_and_clean(book):
    code = cells(book)
    assert not code or any(c["outputs"] for c in code), "no stored output"
    for c in code:
        text = json.dumps(c["outputs"])
        assert '"output_type": "error"' not in text
        assert "Warning:" not in text, f"a warning in the outputs of: {source(c)[:80]}"
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), f"a path of some machine in the outputs of: {source(c)[:80]}"
        assert not re.search(r"0x[0-9a-f]{8,}", text), f"an address in the outputs of: {source(c)[:80]}"


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_run_all_in_jupyter_starts_no_long_work(book):
    """A cell marked slow, cuda or data comes after the call that leaves it out when a reader runs all cells."""
    flagged = [i for i, c in enumerate(cells(book)) if cell_flags(source(c).splitlines())]
    calls = [i for i, c in enumerate(cells(book)) if re.search(r"^leave_out_flagged\(\)", source(c), re.M)]
    assert not flagged or calls and calls[0] < flagged[0], f"{book.name}: leave_out_flagged() is missing before a flagged cell"


@pytest.mark.parametrize("module", MODULES)
def test_imports_alone(module):
    """A notebook's own namespace hides a missing import: so each module is imported in a fresh process."""
    code = f"import stf.{module}, sys; assert not {{'nbdev', 'fastcore', 'execnb'}} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reading_order_is_import_order():
    """Each exported module's notebook exists, and no module is left over from a deleted notebook."""
    assert set(module_order()) == set(MODULES)
