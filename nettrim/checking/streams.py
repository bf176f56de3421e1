"""What a layer did in the dense and in the pruned network, measured by hooks, batch by batch; and its rows, where a bound needs them all.

A layer is taken for a map that is linear but for its bias, whatever its type: a copy of the module in float64, run by the module's own forward,
says what its weights make of an input in exact arithmetic, or nearly so.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nettrim import layers
from nettrim.calibration import Run, run_batch
from nettrim.checking.behind import Array, Behind
from nettrim.layers import Matrix
from nettrim.passes import evaluation, tensors_in
from nettrim.sums import Sums

_ROUNDING = 100.0  # units: a smaller difference of inputs is none (docs/method.md)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: what it was given and what it gave, before anything else changed it; and what that was added to, if it was asked for."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    beside: Tensor | None = None

    def through(self, module: nn.Module, dtype: torch.dtype | None = None, *, absolute: bool = False) -> Tensor:
        """What the forward of ``module`` makes of the same input, in another dtype if one is given; hooks are not run."""

        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                return leaf
            leaf = leaf if dtype is None else leaf.to(dtype)
            return leaf.abs() if absolute else leaf

        args, kwargs = tree_map(convert, (self.args, self.kwargs))
        return module.forward(*args, **kwargs)


@contextlib.contextmanager
def listening(model: nn.Module, names: list[str]) -> Iterator[dict[str, Call]]:
    """A dictionary that every forward pass fills anew with the calls of the layers ``names``."""
    calls: dict[str, Call] = {}

    def hook_for(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            args, kwargs = tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            calls[name] = Call(args, kwargs, output.detach().clone())

        return hook

    handles = []
    try:
        for name in names:
            handles.append(model.get_submodule(name).register_forward_hook(hook_for(name), prepend=True, with_kwargs=True))
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Measured:
    """Sums over a layer's rows, all in float64; the letters are those of docs/method.md.

    Attributes
    ----------
    entries : int
        P M.
    target_square, target_fourth : float
        ``‖Y‖²``, and the sum of the fourth powers.
    before_square, before_fourth : float
        The same before the activation.
    difference : float
        ``‖act(output) − Y‖²`` of the stored layer, run in its own dtype, ``Y`` being the dense layer's after what follows it.
    dense_on, dense_off : float
        ``Σ_Ω (v − y)²`` and ``Σ_{Ωᶜ} max(v, 0)²`` of the dense weights on the same inputs.
    on, off : float
        The same of the stored weights.
    straight, leaning : float
        ``‖A Wᵀ − T‖²``, in the layer's metric if it has one, of the stored weights for targets ``T`` before the activation: the dense network's, or
        those that make its sum, leaning to the pruned stream (``repair``).
    columns : Array, (G, N)
        ``‖â_j‖²`` of every input of each group.
    beside_square : float
        ``‖B‖²`` of what the outputs are added to in the dense network.
    sums_square : float
        ``‖|A| |W|ᵀ‖²``, of the larger of both weights entry by entry.
    input_difference, input_square : float
        ``‖Â − A‖²`` and ``‖A‖²``.
    through, through_square : float
        ``‖·‖²`` of the layer's output in the pruned network less that in the dense one, and of the latter, over all rows.
    """

    entries: int = 0
    target_square: float = 0.0
    target_fourth: float = 0.0
    before_square: float = 0.0
    before_fourth: float = 0.0
    difference: float = 0.0
    dense_on: float = 0.0
    dense_off: float = 0.0
    on: float = 0.0
    off: float = 0.0
    straight: float = 0.0
    leaning: float = 0.0
    columns: Array | float = 0.0
    beside_square: float = 0.0
    sums_square: float = 0.0
    input_difference: float = 0.0
    input_square: float = 0.0
    through: float = 0.0
    through_square: float = 0.0

    def disturbed(self, eps: float) -> bool:
        """Whether the inputs differ from the dense network's by more than rounding, ``eps`` being one unit of the dtype that they are kept in."""
        return math.sqrt(self.input_difference) > _ROUNDING * eps * math.sqrt(self.input_square)


@dataclass
class Outputs:
    """Sums over the network's outputs: ``‖dense − pruned‖²`` and ``‖dense‖²``."""

    difference: float = 0.0
    square: float = 0.0
    comparable: bool = True

    def add(self, dense: Any, pruned: Any) -> None:
        ours, theirs = ([numbers(tensor) for tensor in tensors_in(output) if tensor.is_floating_point()] for output in (dense, pruned))
        if [array.shape for array in ours] != [array.shape for array in theirs]:
            self.comparable = False
            return
        for a, b in zip(ours, theirs, strict=True):
            self.difference += float(np.square(a - b).sum())
            self.square += float(np.square(a).sum())

    @property
    def norm(self) -> float:
        return math.sqrt(self.difference) if self.comparable else math.inf

    @property
    def relative(self) -> float:
        if self.square == 0:
            return 0.0 if self.norm == 0 else math.inf
        return self.norm / math.sqrt(self.square)


def numbers(tensor: Tensor) -> Array:
    """A tensor of any dtype, on any device, as float64."""
    return tensor.detach().to("cpu").double().numpy()


@dataclass(frozen=True, eq=False)
class LayerPair:
    """A layer of the report in both networks, and the sums over what is seen of it.

    Attributes
    ----------
    name : str
    dense, pruned : Matrix
    behind : Behind
        What follows it.
    metric : Array or None, (M, M) or (M,)
        What errors of its outputs cost at the network's, where its program was to heed that.
    summed : bool
        Whether its program was about the sum that its outputs are part of.
    damping : float
        How near its program kept the weights to the dense ones.
    measured : Measured
        Over all rows.
    drawn : Measured or None
        Over the rows that its program was solved on, where they are not all.
    """

    name: str
    dense: Matrix
    pruned: Matrix
    behind: Behind
    metric: Array | None = None
    summed: bool = False
    damping: float = 0.0
    measured: Measured = field(default_factory=Measured)
    drawn: Measured | None = None

    @property
    def solved(self) -> Measured:
        """Over the rows that its program was solved on."""
        return self.measured if self.drawn is None else self.drawn

    def folded(self, matrix: Matrix) -> Array:
        """The weights (M, N) of one of the two, the bias as last column, times the BatchNorm's scale."""
        return self.behind.folded(numbers(matrix.as_matrix()))

    def rows(self, call: Call, output: Tensor | None = None) -> Array:
        """``u``, (p, M), of a call; of another ``output`` of the same call if one is given."""
        whole = layers.Call(call.args, call.kwargs, call.output if output is None else output)
        return self.behind.scaled(numbers(self.dense.output_rows(whole)))

    def beside(self, call: Call) -> Array:
        """What was added to ``u`` of a call, (p, M)."""
        assert call.beside is not None
        return numbers(self.dense.output_rows(layers.Call(call.args, call.kwargs, call.beside.reshape(call.output.shape))))

    def given(self, call: Call) -> Array:
        """What the layer was given, as its kind keeps it."""
        return numbers(self.dense.kind.inputs(self.dense.module, self.dense.part, layers.Call(call.args, call.kwargs, call.output)))

    def unfolded(self, call: Call) -> Array:
        """The rows of its inputs, (p, G, N), without the bias's ones."""
        kept = torch.from_numpy(self.given(call))
        rows = numbers(self.dense.kind.unfold(self.dense.module, self.dense.part, kept))
        return rows.reshape(len(rows), self.dense.groups, -1)

    def moved(self) -> float:
        """``δ Σ_j ‖â_j‖² ‖ŵ_j − w_j‖²``, in the layer's metric if it has one, over the rows that the program was solved on: what is damped."""
        if self.damping == 0:
            return 0.0
        M, N = self.dense.shape
        G, columns = self.dense.groups, np.asarray(self.solved.columns)
        change = (self.folded(self.pruned) - self.folded(self.dense))[:, :N]
        rows = np.zeros((G, N, M))
        for group, part in enumerate(np.split(change, G)):
            rows[group, :, group * (M // G) : (group + 1) * (M // G)] = np.sqrt(columns[group])[:, None] * part.T
        return self.damping * self._weighed(rows.reshape(G * N, M))

    def add(self, call: Call, seen: Call | None, repair: float, *, parallel: bool, keep: Array | None) -> None:
        """Add one batch: the ``call`` in the dense network and that ``seen`` in the pruned one; ``keep`` says which of its rows were drawn.

        In parallel mode ``seen`` may be None: the pruned network may take another way.
        """
        found, behind = self.measured, self.behind
        source = call if parallel or seen is None else seen
        if not parallel and seen is not None:
            ours, theirs = self.given(call), self.given(seen)
            found.input_difference += _square(theirs - ours) if ours.shape == theirs.shape else math.inf
            found.input_square += _square(ours)
        # copies in float64, made anew for every batch: kept ones would hold the network three times
        exact_dense, exact_pruned = _exact(self.dense.module), _exact(self.pruned.module)
        before, after = self.rows(call), None if seen is None else self.rows(seen)
        own = self.pruned.weight.dtype
        if parallel or after is None or source.output.dtype != own:  # as autocast in the network's forward may make it
            output = self.rows(source, source.through(self.pruned.module, own))
            after = output if after is not None and not parallel and not self.pruned.kind.feeds_itself else after
        else:
            output = after
        whole, other = behind.output(before), None if after is None else behind.output(after)
        found.through += _square(other - whole) if other is not None and whole.shape == other.shape else math.inf
        found.through_square += _square(whole)
        V, Z = (self.rows(source, source.through(exact, torch.float64)) for exact in (exact_dense, exact_pruned))
        sums = self.rows(source, source.through(_larger(exact_dense, exact_pruned), torch.float64, absolute=True))
        aim, added = before, np.zeros_like(before)
        if self.summed and seen is not None:
            added = self.beside(call)
            aim = before + (added - self.beside(seen))
        everything = (before, output, V, Z, behind.lipschitz * np.abs(sums), aim, added)
        squares = np.square(self.unfolded(source)) if self.damping else np.zeros(len(before))
        found.columns = found.columns + squares.sum(0)
        self._sum(self.measured, repair, *everything)
        if keep is not None:
            assert self.drawn is not None
            self._sum(self.drawn, repair, *(array[keep] for array in everything))
            self.drawn.columns = self.drawn.columns + squares[keep].sum(0)

    def _sum(
        self, found: Measured, repair: float, before: Array, output: Array, V: Array, Z: Array, sums: Array, aim: Array, added: Array
    ) -> None:
        """Add rows to sums: the dense layer's, the stored layer's as run, both in exact arithmetic, sums of sizes, what would make the dense sum, and
        what is added there, each (p, M).
        """
        behind = self.behind
        Y, targets = behind.output(before), behind.targets(before)
        found.entries += Y.size
        found.target_square += _square(Y)
        found.target_fourth += _square(np.square(Y))
        found.before_square += _square(before)
        found.before_fourth += _square(np.square(before))
        found.difference += _square(behind.output(output) - Y)
        on, off = behind.misfit(V, targets)
        found.dense_on, found.dense_off = found.dense_on + on, found.dense_off + off
        on, off = behind.misfit(Z, targets)
        found.on, found.off = found.on + on, found.off + off
        found.straight += self._weighed(Z - before)
        found.leaning += self._weighed(Z - (repair * aim + (1 - repair) * V))
        found.beside_square += _square(added)
        found.sums_square += _square(sums)

    def _weighed(self, D: Array) -> float:
        """``Σ_p d_pᵀ S d_p`` of rows (P, M); ``‖D‖²`` without a metric."""
        if self.metric is None:
            return _square(D)
        return float(((D * self.metric if self.metric.ndim == 1 else D @ self.metric) * D).sum())


def _larger(dense: nn.Module, pruned: nn.Module) -> nn.Module:
    """The first, changed to hold the larger of both sizes of every weight."""
    others = dict(pruned.named_parameters())
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(torch.maximum(parameter.abs(), others[name].abs()))
    return dense


def _exact(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module).double()
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(made, kind).clear()
    return made


def _square(array: Array) -> float:
    return float(np.square(array).sum())


def pass_over(
    dense: nn.Module, pruned: nn.Module, names: list[str], batches: list[Any], run: Run, summed: Collection[str] = ()
) -> Iterator[tuple[dict[str, Call], dict[str, Call], Any, Any]]:
    """Both networks over every batch: the calls of the layers ``names`` in each, with what ``summed`` ones are added to, and both outputs."""
    with evaluation(dense), evaluation(pruned), listening(dense, names) as ours, listening(pruned, names) as theirs:
        for index, batch in enumerate(batches):
            outputs = []
            for model, calls in ((dense, ours), (pruned, theirs)):
                calls.clear()
                sums = Sums({name: model.get_submodule(name) for name in summed})
                with sums.hooks(), sums if summed else contextlib.nullcontext():
                    outputs.append(run_batch(model, batch, index, run))
                calls.update({name: replace(calls[name], beside=beside) for name, beside in sums.beside.items()})
            yield dict(ours), dict(theirs), *outputs
