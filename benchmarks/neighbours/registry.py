"""Every method by the name that the tables give it, and the numbers that its runs depend on."""

import sys

from benchmarks.neighbours import (
    bernoulli,
    cafo,
    dropnet,
    dropneuron,
    dsd,
    feature_flow,
    fuse,
    judge,
    large,
    learn_drop,
    magnitude,
    mars,
    node_selection,
    norms,
    oicsr,
    refined,
    selection,
    sparse_group_lasso,
    spectral_dropout,
    stressed,
    taylor,
    units,
    vip,
)
from benchmarks.neighbours.contract import Method

_FILES = (
    norms, magnitude, large, units, taylor, vip, refined, dropnet, dsd, dropneuron, sparse_group_lasso, oicsr, feature_flow, mars,
    spectral_dropout, bernoulli, node_selection, learn_drop, stressed, fuse, cafo,
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}


def constants(name: str) -> dict[str, float]:
    """The numbers that a method's own file sets, and those of the rules for all: a run is found again only where they are the same.

    Parameters
    ----------
    name : str

    Returns
    -------
    dict of str to float
        By the file and the name there.
    """
    files = {sys.modules[METHODS[name].run.__module__], selection, judge}
    found = {f"{file.__name__.rsplit('.', 1)[-1]}.{key}": value for file in files for key, value in vars(file).items() if key.isupper()}
    return {key: value for key, value in sorted(found.items()) if isinstance(value, (int, float))}
