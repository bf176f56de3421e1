"""What a pruning run reports: one record a layer, the network's certificate, and the forms they can be kept in.

Nothing is computed here: every number was measured elsewhere and is only kept, shown, written and read.
"""

import dataclasses
import json
import math
import numbers
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from nettrim import reading
from nettrim.errors import ArgumentError, NetTrimError
from nettrim.solvers.base import HistoryPoint
from nettrim.surroundings import left_out

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure
    from torch import Tensor

SCHEMA = 2  # of the dictionary and the JSON file; raised when a reader of the old one would misread the new one


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One pruned layer.

    Attributes
    ----------
    name : str
        Qualified name of the module in the model, and behind it that of the matrix where it holds several (docs/layers.md).
    shape : tuple of int
        (M, N): outputs and inputs of the weight matrix, without the bias.
    rows : int
        P, the calibration rows (samples, tokens, patches) that the promise is about.
    nonzeros : int
        Entries of the weight matrix that are kept.
    density : float
        ``nonzeros`` as a share of the M N entries, in [0, 1].
    epsilon : float
        Budget promised: Frobenius norm of the layer's output discrepancy over those rows.
    discrepancy : float
        The same norm, measured by running the stored layer.
    relative_discrepancy : float
        ``discrepancy`` as a share of the norm of the dense network's output.
    accumulated : float or None
        Relative discrepancy of the layer's output in the pruned network against the dense one, over the samples solved on: its own, and what the
        layers before it left. In a cascade that solves on all rows the two are one; in parallel mode the rest is not in ``discrepancy``. None where
        the layer does not run alike in both networks.
    holdout : float or None
        ``relative_discrepancy`` on the samples kept out, on the inputs that the layer's program would see there; None without any, or where the
        layer does not run alike on them.
    objective, lower_bound : float
        Value of the program at the solution, and a proven lower bound on its optimum.
    gap : float
        Relative distance between these two.
    status : str
        ``"optimal"``, ``"feasible"``, ``"infeasible"`` or ``"iteration_limit"``.
    iterations : int
        Of the solver.
    seconds : float
        Spent in the solver.
    solver : str
        Name of the solver that was used.
    activation : str or None
        ``"relu"`` where a ReLU follows the layer; the name of another activation that does.
    weight_bytes : int
        Of the weight matrix in its dtype, stored dense.
    history : tuple of HistoryPoint
        How the solver's objective and bound came together (see :class:`nettrim.Solution`); with more than one solve, that of the last one; empty
        for a layer of several groups.
    """

    name: str
    shape: tuple[int, int]
    rows: int
    nonzeros: int
    density: float
    epsilon: float
    discrepancy: float
    relative_discrepancy: float
    accumulated: float | None
    holdout: float | None
    objective: float
    lower_bound: float
    gap: float
    status: str
    iterations: int
    seconds: float
    solver: str
    activation: str | None
    weight_bytes: int
    history: tuple[HistoryPoint, ...]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Promised against measured, for the whole network.

    Attributes
    ----------
    holds : bool
        Every promise was kept.
    guaranteed : float or None
        Bound on the Frobenius norm of the network's output discrepancy on the calibration samples solved on; None when
        there is none (the layers are no chain), and `explanation` says why.
    measured : float
        That norm, measured by running the stored network.
    holdout : float or None
        Relative output discrepancy on the calibration samples kept out; None without any.
    relative_measured : float
        `measured` as a share of the norm of the dense network's output.
    explanation : str
        What the bound rests on, or why there is none, or which promise was broken.
    """

    holds: bool
    guaranteed: float | None
    measured: float
    holdout: float | None
    relative_measured: float
    explanation: str

    def __str__(self) -> str:
        return _rendering().verdict(self)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `nettrim.prune` did to a network.

    Attributes
    ----------
    layers : tuple of LayerReport
        The pruned layers in execution order.
    skipped : dict of str to str
        The other layers with weights, each with the reason why it was left dense.
    certificate : Certificate
        Promised against measured.
    options : dict
        The arguments of the call.
    density : float
        Share of the pruned layers' weight entries that are kept, biases aside, in [0, 1].
    seconds : float
        Wall time of the whole call.
    digests : dict of str to str
        SHA-256 of ``"dense model"``, ``"pruned model"``, ``"calibration"`` and the ``"report"`` without this field: what :func:`nettrim.verify`
        tells other ones by. Empty in reports of older versions.
    """

    layers: tuple[LayerReport, ...]
    skipped: dict[str, str]
    certificate: Certificate
    options: dict[str, object]
    density: float
    seconds: float
    digests: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return _rendering().text.render(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dictionaries, lists, strings and numbers only.

        Options that are no such thing (a callable, a module type, a device) become their names.
        """
        layers = [_plain(dataclasses.asdict(layer)) for layer in self.layers]
        return {"schema": SCHEMA, **_plain({**vars(self), "layers": layers, "certificate": vars(self.certificate)})}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`.

        Raises
        ------
        ArgumentError
            `data` is no report, or one of a schema that this version cannot read.
        """
        schema = data.get("schema") if isinstance(data, Mapping) else None
        if isinstance(schema, bool) or schema != SCHEMA:
            found = repr(schema)[:80] if isinstance(data, Mapping) else f"a {type(data).__name__}"
            raise ArgumentError(
                f"not a nettrim report that this version can read: expected a dictionary with schema {SCHEMA}, "
                f"found {found}; use what Report.to_dict or Report.to_json wrote"
            )
        body = {key: value for key, value in data.items() if key != "schema"}
        try:
            report: Self = reading.read(cls, body)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"not a whole nettrim report ({error}); use what Report.to_dict or Report.to_json wrote"
            ) from error
        return report

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Write the report as JSON to `path`, if one is given, and return the text.

        JSON has no infinity and no NaN: they are written as the strings ``"Infinity"``, ``"-Infinity"`` and ``"NaN"``,
        which `from_json` (and ``float`` in Python, ``Number`` in JavaScript) turn back into numbers. A value that does
        not exist is ``null``.

        Raises
        ------
        OSError
            `path` cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `to_json` wrote to `path`.

        Raises
        ------
        ArgumentError
            The file is no report.
        OSError
            `path` cannot be read.
        """
        data = reading.load_json(path)
        try:
            return cls.from_dict(data)
        except ArgumentError as error:
            raise ArgumentError(f"{os.fspath(path)}: {error}") from error

    def to_frame(self) -> "pandas.DataFrame":
        """Return one row a pruned layer, with the columns of `LayerReport` but its history.

        Raises
        ------
        NetTrimError
            pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise _missing("Report.to_frame", "pandas", "frame") from error
        columns = [field.name for field in dataclasses.fields(LayerReport) if field.name != "history"]
        return pandas.DataFrame([vars(layer) for layer in self.layers], columns=columns)

    @left_out()
    def to_html(
        self, path: str | os.PathLike[str], *, masks: "Mapping[str, Tensor] | None" = None, facts: Mapping[str, str] | None = None
    ) -> None:
        """Write the report as one HTML file that needs no other file, no network and no script.

        Parameters
        ----------
        path : path-like
        masks : mapping of str to Tensor, optional
            `PruneResult.masks` of the same run, to be shown as pictures; a report alone does not hold them.
        facts : mapping of str to str, optional
            What else is known of the network and to be shown at the top: ``{"speed at batch 1": "2.5 times the dense network's"}``.

        Raises
        ------
        ArgumentError
            The masks are not this report's.
        OSError
            `path` cannot be written.
        """
        Path(path).write_text(_rendering().page.render(self, masks or {}, facts or {}), encoding="utf-8")

    @left_out()
    def plot(self, *, masks: "Mapping[str, Tensor] | None" = None) -> "Figure":
        """Return a figure: densities, discrepancies promised, measured and held out, the error through the depth, and gaps.

        The figure is not known to pyplot: show it in a notebook as it is, or write it with ``savefig``.

        Parameters
        ----------
        masks : mapping of str to Tensor, optional
            As `to_html` takes them.

        Raises
        ------
        ArgumentError
            The masks are not this report's.
        NetTrimError
            matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise _missing("Report.plot", "matplotlib", "plot") from error
        return _rendering().figure.draw(self, Figure, masks or {})


def _missing(what: str, package: str, extra: str) -> NetTrimError:
    return NetTrimError(f"{what} needs {package}, which is not installed; run: pip install 'nettrim[{extra}]'")


def _plain(value: Any) -> Any:
    """Return `value` in JSON's own types; see `Report.to_json` for what has no place there."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):  # numpy's scalars too
        figure = float(value)
        if math.isnan(figure):
            return "NaN"
        return figure if math.isfinite(figure) else ("Infinity" if figure > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _plain_name(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    return _plain_name(value)


def _plain_name(value: object) -> str:
    """Return a name that does not change from run to run, as a repr with an address would."""
    named = value if hasattr(value, "__qualname__") else type(value)
    shown = str(value)
    return f"{named.__module__}.{named.__qualname__}" if named is value or " at 0x" in shown else shown


def _rendering() -> Any:
    """Tables, pages and figures: imported when there is one to draw."""
    from nettrim import rendering

    return rendering
