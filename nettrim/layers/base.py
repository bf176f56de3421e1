"""What a module type says of itself so that the rest of the package sees matrices only.

The orientation is that of torch: weights are ``(M, N)``, samples are rows. A bias is the last column of the weights, and the rows of inputs then end
in a one, so that ``Z = A Wᵀ`` holds with and without a bias. A grouped layer is a stack of ``G`` such matrices, one below the other: its rows of
inputs are ``G`` rows side by side, and the outputs of group g read the g-th of them alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nettrim.errors import ArgumentError
from nettrim.passes import own_attribute


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module's forward.

    Attributes
    ----------
    args, kwargs : tuple and dict
        As it was called.
    out : object
        What it returned.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def argument(self, module: nn.Module, name: str | None = None, default: Any = None) -> Any:
        """The argument ``name`` of the module's forward, or its first one; ``default`` where it was not given."""
        if name is None and self.args:
            return self.args[0]
        bound = inspect.signature(type(module).forward).bind(module, *self.args, **self.kwargs).arguments
        return list(bound.values())[1] if name is None else bound.get(name, default)


@dataclass(frozen=True)
class Part:
    """One matrix of a module.

    Attributes
    ----------
    label : str
        What its name has behind the module's; empty where the module is one matrix.
    weight : str
        The parameter, by its name in the module.
    bias : str or None
    rows, bias_rows : slice or None
        The rows of the weight, and entries of the bias, that are the matrix's; None for all.
    groups : int
        How many matrices are stacked in it.
    """

    label: str = ""
    weight: str = "weight"
    bias: str | None = "bias"
    rows: slice | None = None
    bias_rows: slice | None = None
    groups: int = 1


class Kind:
    """How one module type is read as matrices. The defaults are those of a layer like ``nn.Linear``.

    Attributes
    ----------
    methods : tuple of str
        The methods that a subclass must inherit unchanged: an override may compute anything.
    channel : int
        Which dimension of the output counts the rows of the weights; what normalises that dimension can be folded into them.
    observed : bool
        Whether the module's output is the one matrix's ``Z``, so that what becomes of it can be followed.
    repeats : bool
        Whether the module may run several times in a forward pass: the rows are then those of all its calls.
    feeds_itself : bool
        Whether what the module is given within a forward pass depends on its own weights.
    """

    methods: tuple[str, ...] = ("forward",)
    channel = -1
    observed = True
    repeats = False
    feeds_itself = False

    def refuses(self, module: nn.Module) -> str | None:
        """Why this module cannot be read, or None."""
        return None

    def refuses_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why a module called like this cannot be read, or None."""
        return None

    def parts(self, module: nn.Module) -> tuple[Part, ...]:
        """The module's matrices, in the order in which they are used."""
        return (Part(bias="bias" if getattr(module, "bias", None) is not None else None),)

    def to_matrix(self, module: nn.Module, part: Part, weight: Tensor) -> Tensor:
        """The part's weight as (M, N); a view or a copy."""
        return weight.reshape(weight.shape[0], -1)

    def to_weight(self, module: nn.Module, part: Part, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse: (M, N) to a weight of ``shape``."""
        return matrix.reshape(shape)

    def inputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        """What is kept of the input: by default the rows themselves, (P, N)."""
        x = call.argument(module)
        return x.flatten(0, -2) if x.dim() > 1 else x.reshape(1, -1)

    def unfold(self, module: nn.Module, part: Part, kept: Tensor) -> Tensor:
        """Entries along the first dimension of what was kept, to rows: (p, G, N) or, for one group, (p, N); without the column of ones."""
        return kept

    def spread(self, module: nn.Module, part: Part, call: Call) -> float:
        """By what factor rows can differ more than inputs do, both in Frobenius norm: the root of how often an input occurs in them."""
        return 1.0

    def outputs(self, module: nn.Module, part: Part, call: Call) -> Tensor:
        """``Z``, (P, M), in the order of the rows."""
        out = call.out
        return out.flatten(0, -2) if out.dim() > 1 else out.reshape(1, -1)


_KINDS: dict[type[nn.Module] | str, Kind] = {}


def register(module_type: type[nn.Module] | str) -> Callable[[type[Kind]], type[Kind]]:
    """Class decorator: read modules of a type by this :class:`Kind`.

    Parameters
    ----------
    module_type : type or str
        A module type, or its full name (``"package.module.Class"``) where its package is not to be imported for it.

    Raises
    ------
    ArgumentError
        It is neither.
    """
    if not isinstance(module_type, str) and not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise ArgumentError(f"register({module_type!r}); expected a subclass of nn.Module, or its full name")

    def add(kind: type[Kind]) -> type[Kind]:
        if not (isinstance(kind, type) and issubclass(kind, Kind)):
            raise ArgumentError(f"got {kind!r} to read {module_type} by; expected a subclass of nettrim.layers.Kind")
        _KINDS[module_type] = kind()
        return kind

    return add


def _registered(module: nn.Module) -> tuple[type[nn.Module], Kind] | None:
    """The nearest registered type that the module's is, or comes from, and its kind."""
    for ancestor in type(module).__mro__:
        kind = _KINDS.get(ancestor) or _KINDS.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if kind is not None:
            return ancestor, kind
    return None


def find_kind(module: nn.Module) -> Kind | None:
    """The kind that reads a module; None where there is none."""
    found = _registered(module)
    return found[1] if found is not None and _refusal(module, *found) is None else None


def is_registered(module: nn.Module) -> bool:
    """Whether the module's type is one that nettrim reads, whatever this module does."""
    return _registered(module) is not None


def _refusal(module: nn.Module, ancestor: type[nn.Module], kind: Kind) -> str | None:
    for method in kind.methods:
        # an instance attribute named `forward` replaces the method too (some libraries hook modules that way)
        if getattr(type(module), method) is not getattr(ancestor, method) or own_attribute(module, method) is not None:
            return f"{type(module).__name__} replaces nn.{ancestor.__name__}'s {method}: what it computes is unknown"
    return kind.refuses(module)


def unsupported_reason(module: nn.Module) -> str:
    """Say why a module that holds weights is not one that nettrim reads as matrices."""
    found = _registered(module)
    if found is not None:
        return _refusal(module, *found) or f"{type(module).__name__} is supported"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return f"{type(module).__name__} looks its weights up, it multiplies nothing by them: no program says which of them are needed"
    names = ", ".join(sorted({key.rpartition(".")[2] if isinstance(key, str) else key.__name__ for key in _KINDS}))
    return f"{type(module).__name__} is not a supported layer type ({names}); nettrim.layers.register adds one"
