"""The documentation as a site: every page is reached, nothing is dead, every public name has its entry, and a browser opens it offline."""

import os
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

import pytest
from test_docs import DOCS, PAGES

import nettrim


def patterns():
    """The entries of the index's toctree."""
    [body] = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for line in body.splitlines() if line and not line.startswith(":")]


@pytest.mark.parametrize("page", [str(page.relative_to(DOCS)) for page in PAGES if page.name != "index.md"])
def test_every_page_is_in_the_toctree_and_its_place(page):
    name = page.removesuffix(".md")
    places = [pattern for pattern in patterns() if fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")]
    assert places, f"docs/{page} is not in the toctree of docs/index.md: add its name there"
    assert len([pattern for pattern in places if pattern != "*"]) <= 1, f"docs/{page} has several places in the toctree: {places}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder that `make docs` makes."""
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONPATH": str(DOCS.parent)}
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(out / "doctrees"), str(DOCS), str(out / "html")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_built(site):
    assert all((site / page.relative_to(DOCS)).with_suffix(".html").is_file() for page in PAGES)


def test_every_public_name_has_its_entry(site):
    page = (site / "api.html").read_text(encoding="utf-8")
    assert [name for name in nettrim.__all__ if not name.startswith("_") and f'id="nettrim.{name}"' not in page] == []
    assert 'id="nettrim.Report.to_html"' in page and "Raises" in page


def test_nothing_is_dead_and_nothing_is_loaded_from_elsewhere(site):
    pages = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert len(pages) > len(PAGES)
    for path, text in pages.items():
        for address in re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"|<link[^>]*\shref="([^"]*)"', text):
            assert not re.match(r"https?:|//", address[0] or address[1]), f"{path.name} loads {address}"
        for address in re.findall(r'<a [^>]*href="([^"]*)"', text):
            if re.match(r"[a-z]+:", address):
                continue
            file, _, anchor = address.partition("#")
            linked = (path.parent / unquote(file)).resolve() if file else path
            assert linked.exists(), f"{path.name} links to {address}"
            if anchor and linked in pages:
                assert f'id="{anchor}"' in pages[linked], f"{path.name}: {address} has no such anchor"


def test_a_browser_opens_it_offline(site):
    from browser import browser

    with browser() as window:
        for width in (1280, 360):
            window.open((site / "index.html").as_uri(), width=width)
            assert [line for line in window.complaints() if "SEVERE" in line or "rror" in line] == []
            assert all(url.startswith(("file:", "data:")) for url in window.requests())
            assert window.run("return document.querySelector('h1').textContent").startswith("nettrim")
            assert window.run("return document.documentElement.scrollWidth") <= width


def test_make_docs_is_the_same_command():
    makefile = (Path(DOCS).parent / "Makefile").read_text(encoding="utf-8")
    assert "-m sphinx -W --keep-going -b html docs docs/_build/html" in makefile
