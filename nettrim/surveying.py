"""What is found out about a network before anything is solved: its layers as they run, and its blocks.

A network of blocks is traced on the first batch alone where no values were seen to decide what runs in it, and all the layers to be pruned lie in
blocks: each block is run on every batch anyway, when its layers are observed, and is compared then with what the first batch had shown.
"""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nettrim import layers, selection
from nettrim.blockwise import Chain, NotBlocks
from nettrim.calibration import Run
from nettrim.capture import Outputs, Seen, comparable
from nettrim.errors import ArgumentError
from nettrim.finding import candidates, find
from nettrim.observation import HELD_ELEMENTS
from nettrim.routes import check_order
from nettrim.selection import Pattern
from nettrim.taking import Holding
from nettrim.tracing import Trace, trace


class Survey(NamedTuple):
    """What was found out.

    Attributes
    ----------
    trace : Trace
    chain : Chain or None
        The network's blocks, as they were asked for; None where it is run whole.
    said : str
        What they are, in words, or why there are none.
    outputs : Tensor or None
        Of a network that is run whole and is a chain of its layers, its outputs of the samples solved on, as they came in the trace, joined by
        :class:`nettrim.capture.Outputs`.
    seen : list of dict of str to Seen, or None
        Of such a network, batch by batch, what its layers were given and gave in the trace, if that is little.
    """

    trace: Trace
    chain: Chain | None
    said: str
    outputs: Tensor | None
    seen: list[dict[str, Seen]] | None


def survey(
    model: nn.Module,
    solve_on: list[Any],
    keep_out: list[Any],
    run: Run,
    *,
    blocks: Any,
    spread: bool,
    targets: Iterable[Pattern] | Pattern | None,
    ignore: Iterable[Pattern] | Pattern,
    device: torch.device | str | None = None,
) -> Survey:
    """Trace the network and look for its blocks; its outputs are looked at, so that no hours are spent on what cannot be compared in the end.

    ``spread`` says that an executor solves all layers at once. The other arguments and the errors are those of :func:`nettrim.prune`.
    """
    batches = [*solve_on, *keep_out]
    named, said = _named(model, blocks, spread)
    outputs = Outputs()
    found: list[tuple[Chain | None, str]] = [] if named is not None else [(None, said)]

    def tried(traced: Trace) -> tuple[Chain | None, str]:
        assert named is not None
        try:
            return _ordered(find(model, named, said, batches, run), blocks, traced)
        except NotBlocks as error:
            return _none(blocks, error)

    def suffices(first: Trace) -> Fraction | None:
        if named is None:
            return None
        found.append(tried(first))
        chain, _ = found[0]
        return None if chain is None else _times(chain, model, first, len(solve_on), targets, ignore)

    def note(output: Any, index: int) -> None:
        if named is None:
            outputs.add(output, index)
        else:  # all of a network of blocks' may be more than fits
            comparable(output, index)

    # of a network that may be one of blocks, all that its layers are given is much
    holding = None if named is not None else Holding(layers.matrices(model), device, HELD_ELEMENTS // 4)
    traced = trace(model, solve_on, run, note, suffices=suffices, within=None if holding is None else holding.taking)
    if not found:
        found.append(tried(traced))
    elif found[0][0] is not None and not traced.of_first:
        found[0] = _ordered(found[0][0], blocks, traced)
    if not traced.chain:
        return Survey(traced, *found[0], None, None)
    return Survey(traced, *found[0], outputs.joined() if outputs else None, None if holding is None else holding.batches)


def _times(
    chain: Chain, model: nn.Module, first: Trace, count: int, targets: Iterable[Pattern] | Pattern | None, ignore: Iterable[Pattern] | Pattern
) -> Fraction | None:
    """How many times the first batch's rows there are in all, if its trace is enough; else None."""
    if first.chain:  # a bound follows from how each batch runs through the whole network
        return None
    try:
        names, _ = selection.select(model, first, targets, ignore)
    except ArgumentError:  # which other batches may spare
        return None
    chosen = [layer for layer in first.layers if layer.name in names]
    inside = all(chain.place(layer.module_name) is not None and layer.matrix.kind.observed and not layer.matrix.kind.repeats for layer in chosen)
    times = Fraction(sum(chain.entries[:count]), chain.entries[0] or 1)
    return times if inside and all((layer.rows * times).denominator == 1 for layer in first.layers) else None


def _named(model: nn.Module, given: Any, spread: bool) -> tuple[list[str] | None, str]:
    """The names of what may be the network's blocks, and what they are in words; or None, and why there are none.

    Raises
    ------
    ArgumentError
        It has none such as were asked for.
    """
    if given is None:
        return None, "none: the whole network, as asked"
    if spread:
        if given != "auto":
            raise ArgumentError("blocks was given with an executor in parallel mode, which solves all layers at once; leave out one of them")
        return None, "none: an executor solves all layers at once"
    try:
        return candidates(model, given)
    except NotBlocks as error:
        return _none(given, error)


def _ordered(chain: Chain, given: Any, traced: Trace) -> tuple[Chain | None, str]:
    """The chain, if the trace does not speak against it."""
    try:
        check_order(chain, traced)
    except NotBlocks as error:
        return _none(given, error)
    return chain, chain.said


def _none(given: Any, error: NotBlocks) -> tuple[None, str]:
    if given != "auto":
        raise ArgumentError(f"blocks={given!r}: {error}; leave blocks out, or name others") from error
    return None, f"none: {error}"
