"""Docstrings that list parameters or attributes list exactly those that there are, and the public ones do list them."""

import dataclasses
import importlib
import inspect
import pkgutil
import re

import pytest

import nettrim

HEADING = re.compile(r"^(?P<title>[A-Z][A-Za-z ]+)\n-{3,}$", re.MULTILINE)


def modules():
    yield nettrim
    for info in pkgutil.walk_packages(nettrim.__path__, "nettrim."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def documented():
    """Every function, class and method that is defined in the package and has no underscore, by its dotted name."""
    found = {}
    for module in modules():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                for key, member in vars(value).items():
                    function = getattr(member, "__func__", member)
                    if not key.startswith("_") and inspect.isfunction(function):
                        found[f"{module.__name__}.{name}.{key}"] = function
    return found


def sections(docstring):
    """The sections of a numpydoc docstring, as {title: names that it lists}."""
    text = inspect.cleandoc(docstring or "")
    headings = list(HEADING.finditer(text))
    found = {}
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=False):  # without a heading there is no section to end
        body = text[heading.end() : end]
        lines = [line.split(" : ")[0] for line in body.splitlines() if line and not line.startswith(" ")]
        found[heading["title"]] = [name.strip().lstrip("*") for line in lines for name in line.split(",")]
    return found


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def fields(owner):
    if dataclasses.is_dataclass(owner):
        return [field.name for field in dataclasses.fields(owner) if not field.name.startswith("_")]
    return []


DOCUMENTED = documented()
PUBLIC = {name: value for name in nettrim.__all__ if callable(value := getattr(nettrim, name))}
EVERYTHING = pytest.mark.parametrize("name", sorted(DOCUMENTED))


@EVERYTHING
def test_listed_names_are_those_of_the_signature(name):
    value = DOCUMENTED[name]
    listed = sections(value.__doc__)
    if "Parameters" in listed:
        assert listed["Parameters"] == parameters(value)
    if "Attributes" in listed and fields(value):
        # several fields may share a line, and lines may be in any order
        assert sorted(listed["Attributes"]) == sorted(fields(value))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_names_list_them(name):
    value = PUBLIC[name]
    assert value.__doc__, f"nettrim.{name} has no docstring"
    expected = fields(value) if inspect.isclass(value) else parameters(value)
    listed = sections(value.__doc__)
    assert not expected or "Parameters" in listed or "Attributes" in listed, f"nettrim.{name} does not list {expected}"


def test_sections_are_read():
    """The parser itself: a shared line, a star, a type, and a section that is none of these."""
    found = sections(
        """What it does.

        Parameters
        ----------
        first, second : int
            In a line.
        *rest

        Returns
        -------
        int
        """
    )
    assert found["Parameters"] == ["first", "second", "rest"]
    assert found["Returns"] == ["int"]
