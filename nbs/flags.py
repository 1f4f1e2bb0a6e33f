"""For notebooks in Jupyter: "Run All" leaves out the cells that take long.

A notebook with such cells begins with `from flags import leave_out_flagged` and
`leave_out_flagged()`. Start Jupyter with STF_RUN_FLAGS="slow" (or "slow cuda data") to run them.
"""
import os
import re

from IPython import get_ipython

FLAGS = {"slow", "cuda", "data"}  # takes long; needs a GPU; needs real recordings


def run_or_note(lines):
    "A cell's lines, or a note in their place if STF_RUN_FLAGS lacks one of its flags."
    head = re.match(r"(#\|.*\n?)*", "".join(lines))[0]
    missing = FLAGS & set(re.findall(r"\w+", head))
    missing -= set(os.environ.get("STF_RUN_FLAGS", "").split())
    names = " ".join(sorted(missing))
    return [f"print('left out: this cell is marked {names}')\n"] if missing else lines


def leave_out_flagged():
    "From here on, Jupyter leaves flagged cells out. Outside IPython this does nothing."
    if (shell := get_ipython()) and run_or_note not in shell.input_transformers_cleanup:
        shell.input_transformers_cleanup.append(run_or_note)
