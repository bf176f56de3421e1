"""The documentation site: `make docs` builds it from the Markdown pages and the docstrings, offline, with warnings as errors."""

import re
from fnmatch import fnmatchcase

from sphinx.application import Sphinx

import nettrim

project = "nettrim"
author = "nettrim developers"
version = release = nettrim.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "numpydoc"]
exclude_patterns = ["_build"]

# headings have the anchors that they have on GitHub
myst_heading_anchors = 4
highlight_language = "none"
default_role = "literal"

autodoc_typehints = "none"  # the docstrings say the types
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

html_theme = "furo"
html_title = f"nettrim {release}"
html_copy_source = False
html_show_copyright = False


def _adapt(app: Sphinx, name: str, source: list[str]) -> None:
    """What the pages say to readers of the repository, said to those of the site."""
    # files beside docs/ are no pages here
    source[0] = re.sub(r"\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)", r"\1 (`\2` in the repository)", source[0])
    if name == "index":
        # the toctree says an order; a pattern that no other page is left for would be a warning
        head, fence, rest = source[0].partition("```{toctree}\n")
        body, end, tail = rest.partition("```")
        left, kept = set(app.env.found_docs) - {"index"}, []
        for line in body.splitlines():
            matched = {page for page in left if fnmatchcase(page, line)}
            left -= matched
            if matched or line.startswith(":") or not line:
                kept.append(line)
        source[0] = head + fence + "\n".join(kept) + "\n" + end + tail


def _skip(app: Sphinx, what: str, name: str, value: object, skip: bool, options: object) -> bool | None:
    # the fields of a named tuple: its docstring lists them
    return True if type(value).__name__ == "_tuplegetter" else None


def setup(app: Sphinx) -> None:
    app.connect("source-read", _adapt)
    app.connect("autodoc-skip-member", _skip)
