"""Sphinx extension of the site: what jupyter-book can't make from the notebooks by itself.

Before Sphinx reads, it writes nbs/reference/ (not in git): the list of autodoc directives of each
module, and "Our readings", collected from the notebooks. While Sphinx reads, nbdev's directives
become labels of their cells, names of functions become links, and the comments beside parameters
become their descriptions. Formulas come from a local MathJax.
"""
import ast
import hashlib
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent
ROOT = NBS.parent
REFERENCE = NBS / "reference"


def notebooks():
    "Paths of the notebooks, in reading order."
    return sorted(NBS.glob("*.ipynb"))


def cells(path):
    "(kind, source) of each cell."
    book = json.loads(path.read_text(encoding="utf-8"))
    return [(c["cell_type"], "".join(c["source"])) for c in book["cells"]]


def title(path):
    return next(s.splitlines()[0].lstrip("# ") for kind, s in cells(path) if kind == "markdown")


def module_notebooks():
    "Module name (within stf) → its notebook's path, in reading order."
    found = {}
    for path in notebooks():
        for kind, source in cells(path):
            if kind == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M)):
                found[m[1]] = path
    return found


def definitions(source):
    "(name, autodoc directive) of what a cell of exported code defines, without private names."
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.append((node.name, "autofunction"))
        elif isinstance(node, ast.ClassDef):
            raised = node.name.endswith("Error")
            found.append((node.name, "autoexception" if raised else "autoclass"))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [(t.id, "autodata") for t in targets if isinstance(t, ast.Name)]
    return [(name, how) for name, how in found if not name.startswith("_")]


def public_names(module):
    "name → autodoc directive of what the cells of a module's notebook export."
    sources = [s for kind, s in cells(module_notebooks()[module]) if kind == "code" and exported(s)]
    return dict(pair for s in sources for pair in definitions(s))


def exported(source):
    return re.match(r"\s*#\|\s*export\s*$", source.split("\n", 1)[0]) is not None


def label(module, name):
    "Target of the cell that defines a name; targets know no capitals, so `Run` is not `run`."
    kind = "" if name[0].islower() else "constant-" if name.isupper() else "class-"
    return f"cell-{kind}stf.{module}.{name}"


# ---------------------------------------------------------------- generated pages


def readings(path):
    "(section, text) of each blockquote **Our reading.** of a notebook, in its order."
    found, section = [], title(path)
    for kind, source in cells(path):
        quote = None
        for line in [*source.splitlines(), ""] if kind == "markdown" else ():
            if line.startswith("#"):
                section = line.lstrip("# ")
            if line.startswith(">") and quote is None and "**Our reading." in line:
                quote = []
            if quote is not None and line.startswith(">"):
                quote.append(line)
            elif quote is not None:
                found.append((section, "\n".join(quote)))
                quote = None
    return found


def readings_page():
    lines = ["# Our readings", "",
             "> Where the paper is silent or can be read in two ways, and what this book does.", "",
             "Each stands in its notebook; its text names the option that changes it."]  # fmt: skip
    for path in notebooks():
        if found := readings(path):
            lines += ["", f"## {title(path)}", "", f"[{path.stem}](../{path.name})"]
        for i, (section, text) in enumerate(found, start=1):
            text = re.sub(r"\]\((\w+\.ipynb)", r"](../\1", text)  # as seen from reference/
            lines += ["", f"[{section}](#reading-{path.stem}-{i})", "", text]
    return "\n".join(lines) + "\n"


def module_page(module, path):
    "An autodoc directive for each public name."
    lines = [f"# stf.{module}", "", f"Written in [{path.stem}](../../{path.name}): {title(path)}."]
    for name, directive in public_names(module).items():
        options = {"autoclass": "   :members:\n", "autodata": "   :no-value:\n"}.get(directive, "")
        lines += ["", "```{eval-rst}", f".. {directive}:: stf.{module}.{name}", f"{options}```"]
    return "\n".join(lines) + "\n"


def write_reference():
    "All generated pages; an equal file is left alone, so that a second build reads what changed."
    pages = {"readings": readings_page()}
    modules = module_notebooks()
    rows = [f"| [stf.{m}](api/{p.stem}.md) | [{p.stem}](../{p.name}) | {title(p)} |"
            for m, p in modules.items()]  # fmt: skip
    head = ["# API", "", "> All exported functions and classes, in reading order.", ""]
    pages["api"] = "\n".join([*head, "| module | notebook | |", "|---|---|---|", *rows, ""])
    pages |= {f"api/{p.stem}": module_page(m, p) for m, p in modules.items()}
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pages["contributing"] = contributing.replace("](nbs/", "](../")
    (REFERENCE / "api").mkdir(parents=True, exist_ok=True)
    for old in REFERENCE.rglob("*.md"):
        if old.relative_to(REFERENCE).with_suffix("").as_posix() not in pages:
            old.unlink()
    for name, text in pages.items():
        path = REFERENCE / f"{name}.md"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- while Sphinx reads


def prepare_notebook(stem, text):
    "nbdev's directives become labels of cells; targets stand before readings and definitions."
    book, out, count = json.loads(text), [], 0
    module = next((m for m, p in module_notebooks().items() if p.stem == stem), None)
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for quote in re.findall(r"^>.*\*\*Our reading\..*\n?", source, re.M):
                count += 1
                source = source.replace(quote, f"(reading-{stem}-{count})=\n{quote}", 1)
            out.append(cell | {"source": source})
            continue
        directives = re.findall(r"^#\|\s*(\w+)", source, re.M)
        rest = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if "hide" in directives or not rest:
            continue
        names = [n for n, _ in definitions(rest)] if module and "export" in directives else []
        if names:
            targets = "\n".join(f"({label(module, n)})=" for n in names) + "\n"
            target = {"cell_type": "markdown", "id": f"{cell.get('id', 'c')}t", "metadata": {}}
            out.append(target | {"source": targets})
        tags = [d for d in directives if d in ("export", "slow", "cuda", "data")]
        out.append(cell | {"source": rest, "metadata": cell["metadata"] | {"tags": tags}})
    return json.dumps(book | {"cells": out})


def read_source(app, docname, source):
    "A notebook with its labels; in other pages, `stf.module.name` as a link to its description."
    if (NBS / f"{docname}.ipynb").exists():
        source[0] = prepare_notebook(docname, source[0])
    elif not docname.startswith("reference/"):
        source[0] = re.sub(r"(?<![\[`}])`(stf\.[\w.]+\.\w+)`(?!`)", r"{py:obj}`\1`", source[0])


def describe(app, what, name, thing, options, lines):
    "A docstring as reStructuredText, with the comments beside parameters, and a link to its cell."
    from fastcore.docments import docments

    module, _, local = name.removeprefix("stf.").rpartition(".")
    text = re.split(r"\n\s*Args:\n", "\n".join(lines))[0]
    if what == "data":  # its docstring is that of its type: the comment beside it says more
        source = "\n".join(s for _, s in cells(module_notebooks()[module]))
        beside = re.search(rf"^{local} = [^\n]*?  # (.*)$", source, re.M)
        text = beside[1] if beside else ""
    elif not (getattr(thing, "__module__", None) or "stf").startswith("stf"):  # from a library
        text = ""
    parts = re.split(r"`([^`]*)`", text)
    plain = [re.sub(r"([*|_\\])", r"\\\1", p) for p in parts[::2]]
    code = [f"``{c}``" for c in parts[1::2]] + [""]
    text = "".join(p + c for p, c in zip(plain, code))
    blocks = re.split(r"\n\s*\n", text)  # an indented block is a drawing
    lines[:] = "\n\n".join("::\n\n" + b if b.startswith("  ") else b for b in blocks).splitlines()
    if what in ("function", "method", "class"):
        try:
            notes = docments(thing, full=True, returns=False)
        except (TypeError, OSError, AttributeError, IndexError):
            notes = {}
        note = lambda n: re.sub(r"([*|_\\`])", r"\\\1", n.docment or "")
        known = [f":param {p}: {note(n)}" for p, n in notes.items() if getattr(n, "docment", None)]
        lines += ["", *known]
    if what not in ("method", "attribute", "property"):
        lines += ["", f":ref:`the cell <{label(module, local)}>`"]


def copy_mathjax(app, error):
    "MathJax from the installed package, beside the pages."
    if error is None and app.builder.format == "html":
        package = Path(find_spec("sphinx-mathjax-offline").origin).parent
        origin, target = package / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy2(origin / "tex-chtml.js", target)
        for part in ("a11y", "input/tex", "output/chtml"):
            shutil.copytree(origin / part, target / part, dirs_exist_ok=True)


def drop_thebe(app, pagename, templatename, context, doctree):
    "The theme brings scripts that run cells on a server elsewhere; this site has none."
    attributes = lambda script: str(getattr(script, "attributes", "")) + str(script)
    scripts = context.get("script_files", [])
    context["script_files"] = [s for s in scripts if "thebe" not in attributes(s).lower()]


def setup(app):
    write_reference()
    app.setup_extension("sphinx.ext.autodoc")
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", describe)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    parts = (Path(__file__), NBS / "_static" / "book.css")  # new: all pages are made anew
    version = int(hashlib.sha256(b"".join(p.read_bytes() for p in parts)).hexdigest()[:8], 16)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": version}


if __name__ == "__main__":  # the generated pages alone: python nbs/_ext/book.py
    write_reference()
