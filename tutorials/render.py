"""The tutorials as pages for a browser, which need no network.

python tutorials/render.py [--execute] [--out DIR] [NAME ...]

NAME: of a notebook or page, as 05_samplers; all of them without. --execute: run the notebooks among them first, in
place; where a cell fails the notebook stays as it was. Cells tagged hide-cell are left out, of those tagged hide-input
the code. MathJax, which draws the formulas, comes into DIR by npm, once.
"""

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import nbformat
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from tinytwinflow.files import aside

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = [ROOT / "README.md", HERE / "README.md", *sorted(HERE.glob("[0-9]*.ipynb")), *sorted(HERE.glob("[a-z]*.md"))]
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
HIDDEN = {"enabled": True, "remove_cell_tags": ["hide-cell"], "remove_input_tags": ["hide-input"]}

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>MathJax = {{tex: {{inlineMath: [["$", "$"]]}}, options: {{enableMenu: false}}}}</script>
<script async src="{top}mathjax.js"></script>
</head>
<body>
<a class="jump" href="#chapters">Chapters</a>
<main>{body}</main>
<nav id="chapters">{chapters}</nav>
</body>
</html>
"""


def execute(path):
    """Run a notebook in place, in a process of one thread, and keep of its metadata the tags alone."""
    notebook, place = nbformat.read(path, 4), {"metadata": {"path": str(path.parent)}}
    env = {
        name: value for name, value in os.environ.items() if name != "TTF_QUICK"
    }  # what is saved is the full setting
    NotebookClient(notebook, timeout=None, resources=place).execute(env=env | {"OMP_NUM_THREADS": "1"})
    for cell in notebook.cells:
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    with aside(path, "w") as file:
        nbformat.write(notebook, file)


def fetch_mathjax(out):
    """Put mathjax.js into a folder. Raises OSError if npm is not there or does not bring it."""
    with tempfile.TemporaryDirectory() as folder:
        told = subprocess.run(["npm", "pack", "mathjax@3", "--silent"], cwd=folder, capture_output=True, text=True)
        if told.returncode:
            raise OSError(" ".join(told.stderr.split()) or f"npm ended with {told.returncode}")
        with tarfile.open(Path(folder) / told.stdout.strip()) as package, aside(out / "mathjax.js") as file:
            shutil.copyfileobj(package.extractfile("package/es5/tex-svg-full.js"), file)


def read(path):
    """A notebook; a page in Markdown is one of a single cell."""
    if path.suffix == ".ipynb":
        return nbformat.read(path, 4)
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(path.read_text())])


@functools.cache
def title_of(path):
    """The name of a chapter, as its first line has it, up to a colon."""
    return re.search(r"^# (.*)", read(path).cells[0].source, re.MULTILINE)[1].partition(":")[0]


def page_of(path):
    """Where the page of a source lies in the folder of pages; a README's is what a browser opens first."""
    return path.relative_to(ROOT).with_name("index.html" if path.stem == "README" else f"{path.stem}.html")


def anchor(heading):
    """What a heading is called in links, as GitHub has it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def linked(address, path, out):
    """Where a link leads to from the page of `path`: to the page of a source; what else is there is copied."""
    file, mark, place = address.partition("#")
    target = (path.parent / file).resolve()
    if not file or re.match(r"\w+:", address):
        return address
    if target in SOURCES:
        return os.path.relpath(page_of(target), page_of(path).parent) + mark + place
    copy = out / target.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(target, copy)
    return address


@functools.cache
def exporter():
    """What makes HTML of a notebook. Its pages are our own, so code is not searched for what may do harm."""
    made = HTMLExporter(
        template_name="basic", config=Config(TagRemovePreprocessor=HIDDEN), embed_images=True,
        preprocessors=[CoalesceStreamsPreprocessor(enabled=True)],
        exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True,
    )  # fmt: skip
    made.register_filter("clean_html", lambda code: code)
    return made


def body_of(path, out):
    """What stands in the middle of a page, as HTML."""
    body, _ = exporter().from_notebook_node(read(path), {"metadata": {"path": str(path.parent)}})
    soup = BeautifulSoup(body, "html.parser")
    for heading in soup.find_all(re.compile(r"h\d")):
        heading["id"] = anchor(heading.text)
    for tag, name in ("a", "href"), ("img", "src"):
        for one in soup.find_all(tag, {name: True}):
            one[name] = linked(one[name], path, out)
    for table in soup.find_all("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    for paragraph in soup.find_all("p"):
        if paragraph.text.startswith("Figure ") and paragraph.find(True, recursive=False).name == "em":
            paragraph["class"] = "caption"
    return str(soup)


def write(path, out, style):
    """Write the page of a notebook or of one in Markdown into the folder of pages."""
    here, chapters = page_of(path), ""
    for source in SOURCES:
        current = ' aria-current="page"' if source == path else ""
        chapters += f'<a href="{os.path.relpath(page_of(source), here.parent)}"{current}>{title_of(source)}</a>\n'
    (out / here).parent.mkdir(parents=True, exist_ok=True)
    with aside(out / here, "w") as file:
        top = "../" * (len(here.parts) - 1)
        file.write(PAGE.format(title=title_of(path), style=style, top=top, body=body_of(path, out), chapters=chapters))


def style_of():
    """The style sheet, with the colours of code by day and by night."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("friendly", "github-dark"))
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n{(HERE / 'render.css').read_text()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of a notebook or page, as 05_samplers")
    parser.add_argument("--execute", action="store_true", help="run the notebooks first, in place")
    parser.add_argument("--out", type=Path, default=Path("runs/pages"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    known = {path.stem for path in SOURCES}
    for name in args.names:
        if name not in known:
            parser.exit(2, f"render: no page {name!r}: there are {', '.join(sorted(known))}\n")
    chosen = [path for path in SOURCES if path.stem in (args.names or known)]
    for path in chosen:
        if args.execute and path.suffix == ".ipynb":
            try:
                execute(path)
            except (CellExecutionError, DeadKernelError) as error:
                told = re.sub(r"\x1b\[[\d;]*m", "", str(error))
                parser.exit(1, f"{told}\nrender: {path.name} failed and stays as it was\n")
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "mathjax.js").exists():
        try:
            fetch_mathjax(args.out)
        except OSError as error:
            print(f"render: formulas stay as they are typed, npm does not bring mathjax ({error})", file=sys.stderr)
    style = style_of()
    for path in chosen:
        write(path, args.out, style)
        print(args.out / page_of(path))


if __name__ == "__main__":
    main()
