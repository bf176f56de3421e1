"""What ``to_sparse`` found for each layer: a record, and how it reads."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

from nettrim.rendering import WIDTH, percent


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """One linear layer, dense against its sparse form.

    Attributes
    ----------
    name : str
        Qualified module name.
    shape : (int, int)
        Of the weights, (out_features, in_features).
    nonzeros : int or None
        Of the weights; None where the layer is of a kind that has no other form, and they were not looked at.
    form : str
        ``"csr"``, ``"bsr 8x8"``, ``"2:4"``; or ``"dense"``, where the layer was left as it is.
    speedups : dict of int to float
        Rows of inputs to the dense layer's time over that of the sparse form: of the form taken, or of the best one tried; empty if nothing was
        timed.
    bytes : int
        Of the layer's tensors as they are now.
    dense_bytes : int
        As they were.
    reason : str
        Why it was left dense; empty otherwise.
    """

    name: str
    shape: tuple[int, int]
    nonzeros: int | None
    form: str
    speedups: dict[int, float]
    bytes: int
    dense_bytes: int
    reason: str


@dataclasses.dataclass(frozen=True)
class SparseReport:
    """Which layers ``to_sparse`` converted, and by how much each is faster on this machine.

    Attributes
    ----------
    layers : tuple of SparseLayer
        Every linear layer, in the order of the modules.
    threads : int
        Of torch, as they were when it measured.
    """

    layers: tuple[SparseLayer, ...]
    threads: int

    @property
    def converted(self) -> list[str]:
        """Names of the layers that have a sparse form now."""
        return [layer.name for layer in self.layers if layer.form != "dense"]

    def to_dict(self) -> dict[str, Any]:
        """The record as dictionaries, lists, strings and numbers only; rows are strings, as JSON's keys are."""
        layers = [
            {**dataclasses.asdict(layer), "shape": list(layer.shape), "speedups": {str(rows): value for rows, value in layer.speedups.items()}}
            for layer in self.layers
        ]
        return {"threads": self.threads, "layers": layers}

    def __str__(self) -> str:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.MARKDOWN)
        for header in ("layer", "shape", "zeros", "form", "times as fast, by rows", "bytes", "dense bytes"):
            table.add_column(header, justify="left" if header in ("layer", "form") else "right", overflow="fold")
        for layer in self.layers:
            speedups = ", ".join(f"{rows}: {value:.2f}" for rows, value in layer.speedups.items())
            zeros = None if layer.nonzeros is None else 1 - layer.nonzeros / (layer.shape[0] * layer.shape[1])
            shape = "x".join(map(str, layer.shape))
            cells = (layer.name, shape, percent(zeros), layer.form, speedups or "-", f"{layer.bytes:,}", f"{layer.dense_bytes:,}")
            table.add_row(*map(Text, cells))
        out = io.StringIO()
        console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        done, threads = self.converted, f"{self.threads} thread{'s' * (self.threads != 1)}"
        console.print(Text(f"{len(done)} of {len(self.layers)} linear layers have a sparse form, measured faster with {threads}"))
        if self.layers:
            console.print(table)
        for layer in self.layers:
            if layer.reason:
                console.print(Text(f"left dense: {layer.name}: {layer.reason}"))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())
