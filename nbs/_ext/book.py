"""Sphinx extension of the site: what is made from the package and the notebooks when the site is built.

It writes nbs/reference/ (not in git): one API page a module from signatures and docments, and "Our readings", collected from the
notebooks. While Sphinx reads, it turns nbdev's directives into labels and names of functions into links, and puts a local MathJax beside the pages.
"""
import ast
import hashlib
import io
import json
import re
import shutil
import sys
import tokenize
from importlib.util import find_spec
from pathlib import Path

NBS = Path(__file__).resolve().parent.parent
ROOT = NBS.parent
REFERENCE = NBS / "reference"
FLAGS = {"slow": "takes long: its outputs are stored", "cuda": "needs a GPU: its outputs are stored", "data": "needs real recordings: its outputs are stored"}


# ---------------------------------------------------------------- notebooks

def notebooks():
    "Paths of the notebooks that export a module or tell a chapter, in reading order."
    return sorted(NBS.glob("*.ipynb"))


def cells(path):
    "(kind, source) of each cell."
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]


def title(path):
    "The notebook's first heading."
    return next(s.splitlines()[0].lstrip("# ") for kind, s in cells(path) if kind == "markdown")


def module_notebooks():
    "Module name → its notebook's path, in reading order."
    found = {}
    for path in notebooks():
        for kind, source in cells(path):
            if kind == "code" and (m := re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M)):
                found[m[1]] = path
    return found


def definitions(source):
    "Names that a cell of exported code defines at its top level, without private ones."
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [t.id for t in node.targets if isinstance(t, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [n for n in names if not n.startswith("_")]


def label(module, name):
    "Target of a name; targets don't tell `Run` from `run`, so capitals are told apart by a prefix."
    return f"{'' if name[0].islower() else 'constant-' if name.isupper() else 'class-'}stf.{module}.{name}"


def exported(source):
    return re.match(r"\s*#\|\s*export\s*$", source.split("\n", 1)[0]) is not None


# ---------------------------------------------------------------- our readings

def readings(path):
    "(section, text) of each blockquote **Our reading.** of a notebook, in its order."
    found, section = [], title(path)
    for kind, source in cells(path):
        if kind != "markdown":
            continue
        quote = None
        for line in [*source.splitlines(), ""]:
            if line.startswith("#"):
                section = line.lstrip("# ")
            if line.startswith(">") and quote is None and "**Our reading" in line:
                quote = []
            if quote is not None:
                if not line.startswith(">"):
                    found.append((section, "\n".join(quote)))
                    quote = None
                else:
                    quote.append(line)
    return found


def readings_page():
    lines = ["# Our readings", "",
             "> Where the paper is silent or can be read in two ways: what this book does, collected from the notebooks.", "",
             "Each stands in its notebook where it is used; the option that changes it, where there is one, is named in the text.", ""]
    for path in notebooks():
        found = readings(path)
        if found:
            lines += [f"## {title(path)}", "", f"[{path.stem}](../{path.name})", ""]
            for i, (section, text) in enumerate(found, start=1):
                text = re.sub(r"\]\((\w+\.ipynb)", r"](../\1", text)  # as seen from reference/
                lines += [f"[{section}](#reading-{path.stem}-{i})", "", text, ""]
    return "\n".join(lines)


# ---------------------------------------------------------------- API pages

def comments(source):
    "Line number → trailing comment."
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT}


def parameters(node, notes):
    "(name, annotation, default, docment) of a function's parameters, self left out."
    a = node.args
    plain = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(plain) - len(a.defaults)) + list(a.defaults)
    rows = [(p, d, "") for p, d in zip(plain, defaults)]
    rows += [(a.vararg, None, "*")] if a.vararg else []
    rows += [(p, d, "") for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    rows += [(a.kwarg, None, "**")] if a.kwarg else []
    text = lambda n: "" if n is None else ast.unparse(n)
    return [(star + p.arg, text(p.annotation), text(d), notes.get((d or p).end_lineno, "")) for p, d, star in rows if p.arg not in ("self", "cls")]


def signature(name, node, notes):
    "A function's head as it would be typed, broken where it is long, and its table of docments."
    rows = parameters(node, notes)
    shown = [n + (f": {t}" if t else "") + (f"{' = ' if t else '='}{d}" if d else "") for n, t, d, _ in rows]
    head = f"{name}({', '.join(shown)})"
    if len(head) > 80:
        head = f"{name}(\n" + "".join(f"    {s},\n" for s in shown) + ")"
    if node.returns is not None:
        head += f" -> {ast.unparse(node.returns)}"
    table = [(f"`{n}`", note) for n, _, _, note in rows]
    if node.returns is not None and node.returns.end_lineno != node.args_end:
        table.append(("*returns*", notes.get(node.returns.end_lineno, "")))
    return head, [(a, b) for a, b in table if b]


def escape(text):
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_").replace("<", "&lt;").replace("$", "\\$")


def docstring(node):
    "A docstring as text: paragraphs, and indented blocks as they are."
    doc = ast.get_docstring(node) or ""
    doc = re.split(r"\n\s*Args:\n", doc)[0]
    blocks = [b if not re.match(r"\s{2,}\S", b) else "```text\n" + b + "\n```" for b in re.split(r"\n\s*\n", doc)]
    keep_code = lambda b: b if b.startswith("```") else "".join(p if i % 2 else escape(p) for i, p in enumerate(re.split(r"(`[^`]*`)", b)))
    return "\n\n".join(keep_code(b) for b in blocks)


def table(rows, first="parameter"):
    if not rows:
        return []
    return [f"| {first} | |", "|---|---|", *(f"| {a} | {escape(b) if '`' not in b else b.replace('|', chr(92) + '|')} |" for a, b in rows), ""]


def function_entry(name, node, notes):
    node.args_end = max([n.end_lineno for n in ast.walk(node.args) if hasattr(n, "end_lineno")], default=node.lineno)
    head, rows = signature(name, node, notes)
    return ["```python", head, "```", "", docstring(node), "", *table(rows)]


def class_entry(node, notes):
    "A class: its fields or its constructor, then its public methods."
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    fields = [(n.target.id, ast.unparse(n.annotation), ast.unparse(n.value) if n.value else "", notes.get(n.end_lineno, ""))
              for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]  # fmt: skip
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef)]
    init = next((m for m in methods if m.name == "__init__"), None)
    lines = ["```python", f"class {node.name}" + (f"({bases})" if bases else ""), "```", "", docstring(node), ""]
    if init is not None:
        lines += function_entry(node.name, init, notes)
    rows = [(f"`{n}: {t}" + (f" = {d}`" if d else "`"), note) for n, t, d, note in fields]
    lines += table(rows, "field")
    for m in methods:
        if m.name.startswith("_") and m.name != "__call__" or not ast.get_docstring(m):
            continue
        name = f"{node.name}.{m.name}" if m.name != "__call__" else node.name.lower()
        kinds = {ast.unparse(d) for d in m.decorator_list}
        if kinds & {"property", "cached_property", "functools.cached_property"}:
            lines += ["```python", name + (f" -> {ast.unparse(m.returns)}" if m.returns else ""), "```", "", docstring(m), ""]
        else:
            lines += function_entry(name, m, notes)
    return lines


def module_page(module, path):
    source = (ROOT / "stf" / f"{module}.py").read_text(encoding="utf-8")
    tree, notes = ast.parse(source), comments(source)
    public = public_names(module)
    lines = [f"# stf.{module}", "", f"Written in [{path.stem}](../../{path.name}): {title(path)}.", ""]
    constants = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name in public:
            entry = class_entry(node, notes) if isinstance(node, ast.ClassDef) else function_entry(node.name, node, notes)
            lines += [f"({label(module, node.name)})=", f"## {node.name}", "", f"[the cell](#cell-{label(module, node.name)})", "", *entry]
        elif isinstance(node, ast.Assign):
            constants += [(t.id, notes.get(node.end_lineno, "")) for t in node.targets if isinstance(t, ast.Name) and t.id in public]
    if constants:
        lines += ["## Constants", ""]
        for name, note in constants:
            lines += [f"({label(module, name)})=", f"- [`{name}`](#cell-{label(module, name)})" + (f": {escape(note)}" if note else ""), ""]
    return "\n".join(lines)


def public_names(module):
    "The names that cells of the module's notebook define, without private ones."
    path = module_notebooks()[module]
    return [n for kind, s in cells(path) if kind == "code" and exported(s) for n in definitions(s)]


def api_page(modules):
    lines = ["# API", "", "> Every exported function and class, by module, in reading order; made from signatures and the comments beside the parameters.", "",
             "| module | notebook | |", "|---|---|---|"]
    for module, path in modules.items():
        lines.append(f"| [stf.{module}](api/{path.stem}.md) | [{path.stem}](../{path.name}) | {title(path)} |")
    return "\n".join(lines) + "\n"


def write_if_new(path, text):
    "Leave an equal file alone, so that a second build reads only what has changed."
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_reference():
    "All generated pages."
    (REFERENCE / "api").mkdir(parents=True, exist_ok=True)
    modules = module_notebooks()
    pages = {"api": api_page(modules), "readings": readings_page(), **{f"api/{p.stem}": module_page(m, p) for m, p in modules.items()}}
    pages["contributing"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").replace("](nbs/", "](../")
    for old in REFERENCE.rglob("*.md"):
        if old.relative_to(REFERENCE).with_suffix("").as_posix() not in pages:
            old.unlink()
    for name, text in pages.items():
        write_if_new(REFERENCE / f"{name}.md", text)


# ---------------------------------------------------------------- while Sphinx reads

def mark_readings(stem, cell, count):
    "Put a target before each reading of a markdown cell; returns the new count."
    lines, out, inside = cell["source"] if isinstance(cell["source"], list) else cell["source"].splitlines(True), [], False
    for line in lines:
        if line.startswith(">") and not inside and "**Our reading" in line:
            count, inside = count + 1, True
            out.append(f"(reading-{stem}-{count})=\n")
        inside = inside and line.startswith(">")
        out.append(line)
    cell["source"] = "".join(out)
    return count


def prepare_notebook(stem, text):
    "nbdev's directives become labels of their cells; targets stand before readings and exported definitions."
    book, out, count = json.loads(text), [], 0
    module = next((m for m, p in module_notebooks().items() if p.stem == stem), None)
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            count = mark_readings(stem, cell, count)
            out.append(cell)
            continue
        directives = re.findall(r"^#\|\s*(.+?)\s*$", source, re.M)
        rest = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        if "hide" in directives or not rest:
            continue
        cell["source"] = rest
        cell["metadata"]["tags"] = [d for d in directives if d in ("export", *FLAGS)]
        if module and "export" in directives:
            targets = [f"(cell-{label(module, n)})=" for n in definitions(rest)]
            if targets:
                out.append({"cell_type": "markdown", "id": f"{cell.get('id', 'c')}t", "metadata": {}, "source": "\n".join(targets) + "\n"})
        out.append(cell)
    book["cells"] = out
    return json.dumps(book)


def link_names(text):
    "`stf.module.name` → the same, linked to its place in the API."
    known = {f"stf.{m}.{n}": label(m, n) for m in module_notebooks() for n in public_names(m)}
    return re.sub(r"(?<!\[)`(stf\.\w+\.\w+)`", lambda m: f"[`{m[1]}`](#{known[m[1]]})" if m[1] in known else m[0], text)


def read_source(app, docname, source):
    if (NBS / f"{docname}.ipynb").exists():
        source[0] = prepare_notebook(docname, source[0])
    elif not docname.startswith("reference/"):
        source[0] = link_names(source[0])


def copy_mathjax(app, error):
    "Formulas without network: MathJax from the installed package, beside the pages."
    if error is None and app.builder.format == "html":
        origin = Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
        target = Path(app.outdir) / "_static" / "mathjax"
        for part in ("tex-chtml.js", "a11y", "input/tex", "output/chtml"):
            copy = shutil.copytree if (origin / part).is_dir() else shutil.copy2
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            copy(origin / part, target / part, **({"dirs_exist_ok": True} if (origin / part).is_dir() else {}))


def drop_thebe(app, pagename, templatename, context, doctree):
    "The theme brings scripts that run cells on a server elsewhere; this site has none."
    body = lambda script: str(getattr(script, "attributes", {}).get("body", "")) + str(getattr(script, "filename", script))
    context["script_files"] = [s for s in context.get("script_files", []) if not re.search("thebe", body(s), re.I)]


def setup(app):
    write_reference()
    app.connect("source-read", read_source)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    version = int(hashlib.sha256(Path(__file__).read_bytes() + (NBS / "_static" / "book.css").read_bytes()).hexdigest()[:8], 16)  # another extension or style: all pages anew
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": version}


if __name__ == "__main__":  # the generated pages alone: python nbs/_ext/book.py
    sys.exit(write_reference())
