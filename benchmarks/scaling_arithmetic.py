"""What pruning a large model takes, counted: bytes, floating-point operations, hours."""

from dataclasses import dataclass

from rich.table import Table

_GIB = 2.0**30


@dataclass(frozen=True)
class Shape:
    """A linear layer of a block: outputs M, inputs N."""

    name: str
    outputs: int
    inputs: int



@dataclass(frozen=True)
class Architecture:
    """A decoder of equal blocks."""

    name: str
    blocks: int
    shapes: tuple[Shape, ...]

    @property
    def weights(self) -> int:
        """Of all linear layers in the blocks."""
        return self.blocks * sum(shape.outputs * shape.inputs for shape in self.shapes)


# hidden 8192, eight key-value heads of 128, feed-forward 28672 (the published configurations of Llama 2 and 3)
LLAMA_70B = Architecture(
    "70 billion parameters",
    80,
    (
        Shape("q", 8192, 8192),
        Shape("k", 1024, 8192),
        Shape("v", 1024, 8192),
        Shape("o", 8192, 8192),
        Shape("gate", 28672, 8192),
        Shape("up", 28672, 8192),
        Shape("down", 8192, 28672),
    ),
)


@dataclass(frozen=True)
class Costs:
    """What a worker does: operations a second in both precisions, and the iterations that a program takes."""

    float32: float
    float64: float
    iterations: int


def costs(model: Architecture, rows: int, rate: Costs) -> Table:
    """A row for each layer of a block, then the whole model.

    Of a program without a ReLU, with P rows, N inputs and M outputs: ``G`` and ``C`` are 2PN² + 2PNM operations in float64, a factorisation ⅔N³, an
    iteration 2N²M in float32. The rows themselves are 4P(N + M) bytes, ``G`` and ``C`` 8(N² + NM).
    """
    table = Table(title=f"{model.name}: {model.blocks} blocks, {model.weights / 1e9:.1f}e9 linear weights, {rows} rows, {rate.iterations} iterations")
    for header in ("layer", "M x N", "rows GiB", "G and C GiB", "G, C flops", "solve flops", "hours"):
        table.add_column(header, justify="left" if header == "layer" else "right")
    totals = [0.0, 0.0, 0.0]
    for shape in model.shapes:
        P, M, N = float(rows), float(shape.outputs), float(shape.inputs)
        gather, solving = 2 * P * N * (N + M), 2 / 3 * N**3 + rate.iterations * 2 * N * N * M
        hours = (gather / rate.float64 + solving / rate.float32) / 3600
        totals = [total + more for total, more in zip(totals, (gather, solving, hours), strict=True)]
        sizes = (4 * P * (N + M) / _GIB, 8 * (N * N + N * M) / _GIB)
        figures = (*(f"{size:.2f}" for size in sizes), f"{gather:.2e}", f"{solving:.2e}", f"{hours:.2f}")
        table.add_row(shape.name, f"{shape.outputs} x {shape.inputs}", *figures)
    whole = [model.blocks * total for total in totals]
    table.add_row(f"all {model.blocks} blocks", "", "", "", f"{whole[0]:.2e}", f"{whole[1]:.2e}", f"{whole[2]:.0f}", style="bold")
    forward = 2.0 * model.weights * rows
    table.caption = (
        f"weights in 16 bits: {2 * model.weights / _GIB:.0f} GiB; one forward pass of all rows: {forward:.2e} flops, "
        f"{forward / rate.float32 / 3600:.0f} hours; hidden states in 16 bits: {2 * rows * model.shapes[0].inputs / _GIB:.1f} GiB a stream; "
        f"rates: {rate.float32 / 1e9:.0f} GFLOP/s float32, {rate.float64 / 1e9:.0f} float64"
    )
    return table
