"""Each command that a page shows: stf's go through the real parser, the others as far as is quick.

`.ci/run` runs README's marked blocks word for word, and test_launch.py its launch lines.
"""
import functools
import importlib
import re
import shlex
import shutil
import subprocess

import pytest

from stf import cli
from test_site import PAGES, ROOT, book


def commands():
    "Each command in a bash block, and each `stf …` in a line, as typed."
    for page in PAGES:
        texts = [page.read_text(encoding="utf-8")]
        if page.suffix == ".ipynb":
            texts = [source for kind, source in book.cells(page) if kind == "markdown"]
        for text in texts:
            for block in re.findall(r"```bash\n(.*?)```", text, re.S):
                yield from re.split(r"\n| && ", re.sub(r"\s*#.*", "", block))
            yield from re.findall(r"(?<!`)`(stf [^`\n]+)`", text)


def parse(line, monkeypatch):
    "Exit code of stf's part of a line, with the command's function replaced."
    words = shlex.split(re.sub(r"<.*?>", "word", line.replace("-m stf.cli", "stf")))
    words = words[words.index("stf") + 1 :]
    if words[0] in cli.COMMANDS:
        module, _, name = cli.COMMANDS[words[0]][0].partition(":")
        command = getattr(importlib.import_module(module), name)
        nothing = functools.wraps(command)(lambda *args, **options: None)
        monkeypatch.setattr(f"{module}.{name}", nothing)
    try:
        if words[1:] or words[0] not in cli.COMMANDS:  # in a sentence, a bare name will do
            cli.call(words)
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize("line", sorted({line for line in commands() if line.strip()}))
def test_a_page_shows_commands_that_work(line, monkeypatch):
    if " -m stf.cli " in line or line.startswith("stf "):
        assert parse(line, monkeypatch) == 0
        return
    tool, *words = shlex.split(line)
    assert shutil.which(tool) or (ROOT / tool).exists(), f"{tool} isn't installed"
    assert all((ROOT / w).exists() for w in words if re.match(r"(nbs|stf|tests|\.ci)\b", w))
    if tool == "ruff" or "-k" in words:
        dry = ["--collect-only"] * (tool == "pytest")
        subprocess.run([tool, *words, *dry], cwd=ROOT, check=True)


@pytest.mark.parametrize("line", ["stf train ucla-small --epoch 3", "stf predict a --focus b",
                                  "torchrun --nnodes 2 -m stf.cli train ucla-small --bf16"])
def test_a_wrong_option_is_found(line, monkeypatch):
    assert parse(line, monkeypatch) == 2
