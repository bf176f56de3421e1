"""Every method by the name that the tables give it."""

from benchmarks.neighbours import (
    bernoulli,
    cafo,
    dropnet,
    dropneuron,
    dsd,
    feature_flow,
    fuse,
    large,
    learn_drop,
    magnitude,
    mars,
    node_selection,
    norms,
    oicsr,
    refined,
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
