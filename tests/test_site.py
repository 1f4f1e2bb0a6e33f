"""The site: contents, links, and a map that names what exists; the slow test builds it."""
import json
import re
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
sys.path.insert(0, str(NBS / "_ext"))
import book  # noqa: E402

TEXTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md")]
PAGES = [*TEXTS, *sorted(NBS.glob("*.md")), *book.notebooks()]


def prose(path):
    "The text of a page without code."
    if path.suffix == ".ipynb":
        text = "\n\n".join(s for kind, s in book.cells(path) if kind == "markdown")
    else:
        text = path.read_text(encoding="utf-8")
    return re.sub(r"`[^`\n]*`", "", re.sub(r"```.*?```", "", text, flags=re.S))


def contents():
    "Entries of _toc.yml in order, without the glob of API pages."
    text = (NBS / "_toc.yml").read_text(encoding="utf-8")
    return re.findall(r"^\s*(?:-\s+file|root):\s*(\S+)", text, re.M)


def test_contents_are_the_notebooks_in_reading_order():
    listed = [c for c in contents() if c[0].isdigit()]
    assert listed == [p.stem for p in book.notebooks() if p.stem[0].isdigit()]
    others = {p.stem for p in [*book.notebooks(), *NBS.glob("*.md")] if not p.stem[0].isdigit()}
    made = {c for c in contents() if c.startswith("reference/")}
    assert {c for c in contents() if not c[0].isdigit()} - made == others


def test_index_lists_every_notebook():
    linked = set(re.findall(r"\]\((\w+)\.ipynb", prose(NBS / "index.ipynb")))
    assert linked >= {p.stem for p in book.notebooks() if p.stem[0].isdigit()}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:|#", target):
            there = (page.parent / unquote(target.split("#")[0])).exists()
            assert there, f"{page.name} links to {target}, which does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_displayed_formulas_are_paragraphs(page):
    beside = re.findall(r"[^\n]\n\$\$.*|.*\$\$\n[^\n]", prose(page))
    assert not beside, f"the site shows stray dollars around {beside}: leave a blank line"


@pytest.mark.parametrize("page", ["paper.md", "glossary.md"])
def test_map_names_functions_that_exist(page):
    text = (NBS / page).read_text(encoding="utf-8")
    for module, name in re.findall(r"`stf\.([\w.]+)\.(\w+)`", text):
        assert name in book.public_names(module), f"{page}: no notebook exports {module}.{name}"
    for line in text.splitlines():  # a row's notebook must at least mention one of its functions
        names = re.findall(r"`stf\.[\w.]+\.(\w+)`", line)
        for stem in re.findall(r"\]\((\w+)\.ipynb\)", line) if names else []:
            code = "\n".join(s for _, s in book.cells(NBS / f"{stem}.ipynb"))
            found = any(re.search(rf"\b{n}\b", code) for n in names)
            assert found, f"{page}: {stem} has none of {names}"


def test_map_has_every_equation_figure_and_table():
    text = (NBS / "paper.md").read_text(encoding="utf-8").replace("\u00a0", " ")
    wanted = [f"Eq. {i}" for i in range(1, 7)] + [f"Table {i}" for i in range(1, 6)]
    wanted += [f"Fig. {i}({p})" for i in (1, 2) for p in "abcd"] + ["Fig. 3"]
    missing = [w for w in wanted if f"\n| {w} |" not in text]
    assert not missing, f"not in the map: {missing}"


def test_every_exercise_has_a_solution():
    solved = "\n".join(s for kind, s in book.cells(NBS / "solutions.ipynb") if kind == "markdown")
    sections = dict(re.findall(r"^## (\w+).*?\n(.*?)(?=^## |\Z)", solved, re.M | re.S))
    for path in book.notebooks():
        text = next((s for _, s in book.cells(path) if "**Exercises.**" in s), "")
        asked = re.findall(r"\s(\d)\. ", text.partition("**Exercises.**")[2])
        number = path.stem.partition("_")[0]
        answered = re.findall(r"\*\*(\d)\.\*\*", sections.get(number, ""))
        assert answered == asked, f"{path.stem}: exercises {asked}, solutions {answered}"


def test_readings_page_has_every_reading():
    page = book.readings_page()
    there = "(../10e_readers.ipynb)"  # as seen from its folder
    assert there in page and "](10e_readers" not in page
    page = page.replace("](../", "](")
    for path in book.notebooks():
        marked = sum(s.count("**Our reading.") for kind, s in book.cells(path) if kind != "code")
        found = book.readings(path)
        marked -= path.stem == "index"  # which explains the mark
        assert len(found) == marked, f"{path.stem}: {marked} readings, {len(found)} collected"
        assert all(text in page for _, text in found)


def test_api_page_has_every_exported_name():
    for module, path in book.module_notebooks().items():
        page = book.module_page(module, path)
        for name in book.public_names(module):
            assert f":: stf.{module}.{name}\n" in page, f"no entry for {module}.{name}"


class Links(HTMLParser):
    "Targets and anchors of a page; what a browser would load from elsewhere."

    def __init__(self, text):
        super().__init__()
        self.hrefs, self.ids, self.loaded = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = {k: v or "" for k, v in attrs}
        self.ids |= {attrs[k] for k in ("id", "name") if k in attrs}
        if tag == "a" and "href" in attrs:
            self.hrefs.add(unescape(attrs["href"]))
        if tag in ("script", "img", "iframe", "video", "source"):
            self.loaded.add(attrs.get("src", ""))
        if tag == "link" and attrs.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.add(attrs["href"])


@pytest.mark.slow
def test_site_builds_without_warning_and_needs_no_network(tmp_path):
    start = "from jupyter_book.cli.main import main; main()"
    options = ["build", "-W", "--keep-going", "-q", "--path-output", str(tmp_path), str(NBS)]
    command = [sys.executable, "-c", start, *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    html = tmp_path / "_build" / "html"
    found = [p for p in html.rglob("*.html") if "_static" not in p.parts]
    pages = {p: Links(p.read_text(encoding="utf-8")) for p in found}
    for path in book.notebooks():
        assert html / f"{path.stem}.html" in pages
    for page, links in pages.items():
        foreign = {s for s in links.loaded if s.startswith(("http:", "https:", "//"))}
        assert not foreign, f"{page.name} loads {foreign}"
        for href in links.hrefs:
            if re.match(r"[a-z]+:", href) or href in ("#", ""):
                continue
            file, _, anchor = href.partition("#")
            target = (page.parent / unquote(file)).resolve() if file else page
            assert target.exists(), f"{page.relative_to(html)} links to {href}"
            if anchor and target in pages:
                assert unquote(anchor) in pages[target].ids, f"{page.name}: no place {href}"
    assert (html / "_static" / "mathjax" / "tex-chtml.js").exists()
    index = (html / "searchindex.js").read_text(encoding="utf-8")
    assert json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))["titles"]
    api = pages[html / "reference" / "api" / "00_skeleton.html"]
    text = (html / "reference" / "api" / "00_skeleton.html").read_text(encoding="utf-8")
    assert "stf.skeleton.k_adjacency" in api.ids and "exactly k hops" in text  # its docment
