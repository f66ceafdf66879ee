"""Notebooks become pages that a browser shows without a network: what is tagged is hidden, what is linked is there."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import ended, fresh
from PIL import Image
from test_tutorials import ROOT, nbformat, program

bs4 = pytest.importorskip("bs4")
pytest.importorskip("nbconvert")
new = nbformat.v4
TEXT = """# 1. Name: more

Here $a < b$ and $$x_t^2$$, *see* [below](#11-what-it-is), [the next](02_b.ipynb#it), [a page](more.md),
[code](helper.py), [the first](../README.md#the-table).

## 1.1 What it is

![a picture](pictures/dot.png)"""


@pytest.fixture
def site(tmp_path):
    """A small site of two notebooks and three pages, beside a copy of the renderer; mathjax is there already."""
    folder = tmp_path / "tutorials"
    (folder / "pictures").mkdir(parents=True)
    for name in ("render.py", "render.css"):
        shutil.copy(ROOT / "tutorials" / name, folder)
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "dot.png")
    (folder / "helper.py").write_text("seen = 3\n")
    (folder / "more.md").write_text("# More\n\n> It is [there](https://example.org).\n")
    (folder / "README.md").write_text("# Tutorials\n\n[one](01_a.ipynb)\n")
    (tmp_path / "README.md").write_text("# First\n\n## The table\n\n| a | b |\n|---|---|\n| 1 | `2` |\n")
    cells = [
        new.new_markdown_cell(TEXT),
        new.new_code_cell("from helper import seen\nprint('kept', seen, flush=True)\nprint('too')"),
        new.new_code_cell("drawn = 1\nprint('shown', 6 * 7)", metadata={"tags": ["hide-input"], "noise": 1}),
        new.new_code_cell("assert seen == 3\nprint('unseen')", metadata={"tags": ["hide-cell"]}),
        new.new_code_cell("from IPython.display import Image\nImage('pictures/dot.png')"),
    ]
    nbformat.write(new.new_notebook(cells=cells, metadata={"noise": 1}), folder / "01_a.ipynb")
    b = new.new_notebook(cells=[new.new_markdown_cell("# 2. B\n\n## It"), new.new_code_cell("1 / seen")])
    nbformat.write(b, folder / "02_b.ipynb")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mathjax.js").write_text("here")
    return tmp_path


def rendered(site, *words, out="out", **env):
    """Call the renderer of a site.  -> exit status, its words"""
    said = site / "said"
    (status,) = ended([fresh(said, env, program, site / "tutorials" / "render.py", "--out", site / out, *words)])
    return status, said.read_text()


def check_page(path, out):
    """Nothing of a page is loaded from elsewhere, and each link leads to a file, and a place in it, that are there."""
    text = path.read_text()
    loaded = re.findall(r'<(?!a )[^<>]*? (?:src|srcset|data|poster|href)="([^"]{0,99})', text)
    script = os.path.relpath(out / "mathjax.js", path.parent)
    assert script in loaded and all(one == script or one.startswith("data:") for one in loaded)
    assert "@import" not in text and not re.search(r"url\((?!data:)", text)
    for link in re.findall(r'<a [^<>]*?href="([^"]*)"', text):
        file, _, place = link.partition("#")
        if not file.startswith("https://"):
            target = path.parent / file if file else path
            assert target.is_file() and (not place or f' id="{place}"' in target.read_text()), link


def test_a_site_is_run_and_rendered(site):
    """Outputs and pictures stay, what is tagged is left out, links lead to pages, metadata but the tags are gone."""
    first = site / "tutorials" / "01_a.ipynb"
    before = first.read_bytes(), (site / "tutorials" / "02_b.ipynb").read_bytes()
    status, words = rendered(site, "--execute")
    assert status == 1 and words.endswith("render: 02_b.ipynb failed and stays as it was\n") and "NameError" in words
    assert (site / "tutorials" / "02_b.ipynb").read_bytes() == before[1] and first.read_bytes() != before[0]
    notebook = json.loads(first.read_text())
    tags = [{}, {}, {"tags": ["hide-input"]}, {"tags": ["hide-cell"]}, {}]
    assert [cell["metadata"] for cell in notebook["cells"]] == tags and set(notebook["metadata"]) == {
        "kernelspec",
        "language_info",
    }
    assert [cell["execution_count"] for cell in notebook["cells"][1:]] == [1, 2, 3, 4]

    status, words = rendered(site)
    pages = [Path(line) for line in words.splitlines()]
    assert status == 0 and len(pages) == 5 and pages[0] == site / "out" / "index.html"
    for one in pages:
        check_page(one, site / "out")
    page = bs4.BeautifulSoup((site / "out" / "tutorials" / "01_a.html").read_text(), "html.parser")
    assert page.title.text == "1. Name" and page.find(attrs={"aria-current": "page"}).text == "1. Name"
    for shown in ("kept 3\ntoo\n", "print('kept', seen, flush=True)", "shown 42", "$a < b$", "$$x_t^2$$"):
        assert shown in page.main.text, shown
    for hidden in ("drawn", "unseen", "assert"):
        assert hidden not in page.main.text, hidden
    assert len(page.main.find_all("img", src=lambda src: src.startswith("data:image/png;base64,"))) == 2
    targets = ["#11-what-it-is", "02_b.html#it", "more.html", "helper.py", "../index.html#the-table"]
    assert [link["href"] for link in page.main.find_all("a")] == targets
    assert '<a href="https://example.org">' in (site / "out" / "tutorials" / "more.html").read_text()


def test_a_name_that_is_not_there_is_one_line(site):
    status, words = rendered(site, "01_a", "03_c")
    assert status == 2 and words == "render: no page '03_c': there are 01_a, 02_b, README, more\n"
    status, words = rendered(site, "more")
    assert status == 0 and words == f"{site / 'out' / 'tutorials' / 'more.html'}\n"


def test_without_npm_pages_are_written_and_say_so_in_one_line(site):
    status, words = rendered(site, "more", out="other", PATH=str(site))
    first, *pages = words.splitlines()
    assert status == 0 and len(pages) == 1 and Path(pages[0]).is_file()
    assert (
        first.startswith("render: formulas stay as they are typed, npm does not bring mathjax (") and "'npm'" in first
    )


def test_all_pages_of_the_project_stand_alone(tmp_path):
    (tmp_path / "mathjax.js").write_text("")
    said = tmp_path / "said"
    (status,) = ended([fresh(said, {}, program, ROOT / "tutorials" / "render.py", "--out", tmp_path)])
    pages = [Path(line) for line in said.read_text().splitlines()]
    assert (
        status == 0
        and len(pages)
        == len(list((ROOT / "tutorials").glob("*.ipynb"))) + len(list((ROOT / "tutorials").glob("*.md"))) + 1
    )
    for path in pages:
        check_page(path, tmp_path)
