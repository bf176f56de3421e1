"""The documentation: its examples run and print what they show, its links resolve, the names in it exist.

``python tests/test_docs.py [--write] [file ...]`` runs the examples, prints what they print and, with ``--write``, puts
that into the files: a block marked ``text`` straight behind a python block is that block's output.
"""

import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import socket
import sys
import tempfile
import typing
from pathlib import Path

import pytest

import nettrim

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if "_build" not in page.parts]
FILES = [ROOT / "README.md", *PAGES]
OWNERS = {
    "result": nettrim.PruneResult,
    "report": nettrim.Report,
    "certificate": nettrim.Certificate,
    "layer": nettrim.LayerReport,
    "program": nettrim.LayerProgram,
    "solution": nettrim.Solution,
    "event": nettrim.ProgressEvent,
}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OUTPUT = re.compile(r"\s*^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WORD = re.compile(r"[A-Za-z_]{2,}")  # figures and exponents differ from machine to machine, words do not

by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


@dataclasses.dataclass(frozen=True)
class Example:
    """A python block: its source, the line that it starts on, and where the output it shows lies in the file."""

    source: str
    line: int
    shown: tuple[int, int] | None


def examples(text: str) -> list[Example]:
    """The python blocks of a Markdown text, in order."""
    found = []
    for block in FENCE.finditer(text):
        if block[1] == "python":
            output = OUTPUT.match(text, block.end())
            line = text.count("\n", 0, block.start(2))
            found.append(Example(block[2], line, None if output is None else output.span(1)))
    return found


def run(path: Path) -> list[tuple[Example, str]]:
    """Run the python blocks of a file in one namespace, in an empty folder; each with what it printed."""
    namespace: dict[str, object] = {"__name__": "__example__"}
    done = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for example in examples(path.read_text(encoding="utf-8")):
            # blank lines in front: a traceback names the line of the document
            code = compile("\n" * example.line + example.source, str(path), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            done.append((example, "".join(f"{line.rstrip()}\n" for line in printed.getvalue().strip("\n").split("\n"))))
    return done


def prose(text: str) -> str:
    """A Markdown text without its blocks of code."""
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def anchors(text: str) -> set[str]:
    """The anchors that a Markdown text's headings have on GitHub."""
    titles = re.findall(r"^#+ +(.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@by_file
def test_examples_run_and_print_what_is_shown(path, monkeypatch):
    def refuse(*_args):
        raise AssertionError("an example opens a connection; examples run offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    text = path.read_text(encoding="utf-8")
    for example, printed in run(path):
        if example.shown is not None:
            shown = text[slice(*example.shown)]
            message = f"{path.name}, line {example.line}: the output shown is old; run python tests/test_docs.py --write"
            assert WORD.findall(shown) == WORD.findall(printed), message


@by_file
def test_relative_links_resolve(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), f"{path.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked.read_text(encoding="utf-8")), f"{path.name}: {target} has no such heading"


def follow(owner: type, attributes: list[str]) -> bool:
    """Whether the dotted attributes exist on instances of a class, by its fields and their types."""
    current: typing.Any = owner
    for name in attributes:
        fields = getattr(current, "__dataclass_fields__", {})
        if name not in fields and not hasattr(current, name):
            return False
        hint = typing.get_type_hints(current).get(name) if name in fields else None
        if not dataclasses.is_dataclass(hint):
            return True  # a number, a method: what is behind it is not ours
        current = hint
    return True


@by_file
def test_names_exist(path):
    text = path.read_text(encoding="utf-8")
    for dotted in set(re.findall(r"\bnettrim\.([A-Za-z_][\w.]*\w)", text)):
        current: typing.Any = nettrim
        for name in dotted.split("."):
            if inspect.ismodule(current) and not hasattr(current, name):
                current = importlib.import_module(f"{current.__name__}.{name}")
            elif inspect.isclass(current):
                assert follow(current, [name]), f"{path.name}: there is no nettrim.{dotted}"
                break
            else:
                current = getattr(current, name)
    for code in inline_code(text):
        found = re.match(rf"({'|'.join(OWNERS)})((?:\.[a-z_]+)+)", code)
        if found and not code.endswith((".json", ".html")):
            assert follow(OWNERS[found[1]], found[2][1:].split(".")), f"{path.name}: there is no {code}"


@by_file
def test_arguments_exist(path):
    callables = (nettrim.prune, nettrim.solve, nettrim.verify, nettrim.LayerProgram, nettrim.to_sparse, nettrim.Report.to_html)
    known = {name for function in callables for name in inspect.signature(function).parameters}
    for code in inline_code(path.read_text(encoding="utf-8")):
        found = re.match(r"([a-z_]+)=\S", code)
        if found:
            assert found[1] in known, f"{path.name}: no public function takes {code}"


def main(arguments: list[str]) -> None:
    write = "--write" in arguments
    given = [Path(argument).resolve() for argument in arguments if not argument.startswith("--")]
    for path in given or FILES:
        text = path.read_text(encoding="utf-8")
        for example, printed in reversed(done := run(path)):
            if write and example.shown is not None:
                text = text[: example.shown[0]] + printed + text[example.shown[1] :]
        if write:
            path.write_text(text, encoding="utf-8")
        for example, printed in done:
            print(f"{os.path.relpath(path)}, line {example.line}\n{printed}")


if __name__ == "__main__":
    main(sys.argv[1:])
