"""The sections ``wide`` (layers without a ReLU, streamed) and ``growth`` (time against P, N and M)."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import nettrim
from benchmarks.memory import PeakMemory
from benchmarks.solver_mnist import warm_up
from benchmarks.solver_problems import CorrelatedStream, correlated_layer, make_program
from benchmarks.solver_session import Run, Session, figures, in_a_process
from nettrim.solvers.gram import gather

WIDE, GROWTH = "wide", "growth"
GROWTH_KINDS = ("relaxed-budget", "linear-budget")
GROWTH_TOLERANCE = 1e-3
REPEATS = 3  # of a matrix product, of which the fastest counts


def wide(session: Session) -> None:
    """Section ``wide``: gathering the Gram matrix against the machine's products, the solve's constant, peak memory."""
    sizes = session.sizes
    rows = []
    for width in sizes.wide:
        arguments = (width, sizes.wide_rows, sizes.wide_chunk, session.seed, sizes.wide_tolerance, session.threads)
        with session.doing(f"{WIDE}: N = M = {width}"):
            run = in_a_process(solve_streamed, *arguments)
        problem = {"N": width, "M": width, "P": sizes.wide_rows, "tolerance": sizes.wide_tolerance}
        run = session.record(WIDE, f"N = M = {width}", problem, run)
        peaks = {dtype: max(run["products"][dtype].values()) for dtype in ("float64", "float32")}
        rate, extra = run["gram_rate"], run["extra_bytes"]
        units = None if extra is None else (extra - 4 * width**2) / (8 * width**2)
        rows.append(
            (
                f"{width}",
                peaks["float64"] / 1e9,
                peaks["float32"] / 1e9,
                rate / 1e9,
                rate / peaks["float64"],
                rate / peaks["float32"],
                run["gather_seconds"],
                run["seconds"],
                run["iterations"],
                run["gap"],
                run["constant"],
                units,
            )
        )
        session.check(WIDE, f"Gram accumulation / float64 peak, N = {width}", rate / peaks["float64"], "≥", 0.6)
        session.check(WIDE, f"memory beyond the weights (N² numbers of float64), N = {width}", float("nan") if units is None else units, "≤", 6)
    session.table(
        f"{WIDE}: no ReLU, N = M, P = {sizes.wide_rows}, streamed, tolerance {sizes.wide_tolerance:g}",
        (
            "N",
            "float64 GFLOP/s",
            "float32 GFLOP/s",
            "Gram GFLOP/s",
            "/ float64",
            "/ float32",
            "gather s",
            "solve s",
            "iterations",
            "gap",
            "s / N²M iteration",
            "memory / 8N² bytes",
        ),
        rows,
        "solve: the whole call, rows read and gathered included; s / N²M iteration: less the gathering; memory beyond the weights",
    )


def solve_streamed(width: int, rows: int, chunk: int, seed: int, tol: float, threads: int) -> Run:
    """Everything that the section ``wide`` measures of one layer; for a process of its own.

    The rate of the accumulation is that of the second half of the rows: the difference between all rows and half of them,
    which leaves out factorisations, less the time in which the stream makes those rows.
    """
    torch.set_num_threads(threads)
    warm_up()
    stream = CorrelatedStream(rows, width, width, chunk, seed)
    half = CorrelatedStream(rows // 2, width, width, chunk, seed)
    next(stream.inputs())
    program = stream.program()
    with PeakMemory() as memory:
        solution = nettrim.solve(program, tol=tol)
    products = {str(dtype).removeprefix("torch."): _product_rates(width, chunk, dtype) for dtype in (torch.float64, torch.float32)}
    part = half.program()
    gather_seconds = [_seconds(lambda p=p: gather(p)) for p in (part, program)]  # type: ignore[misc]
    make = [_seconds(lambda s=s: _exhaust(s)) for s in (half, stream)]  # type: ignore[misc]
    accumulate = max(gather_seconds[1] - gather_seconds[0] - (make[1] - make[0]), 1e-9)
    flops = 2 * (rows - rows // 2) * (width**2 + width * width)
    return {
        **figures(program, solution),
        "extra_bytes": memory.extra,
        "products": products,
        "gather_seconds": gather_seconds[1],
        "stream_seconds": make[1],
        "gram_rate": flops / accumulate,
        "constant": max(solution.seconds - gather_seconds[1], 0.0) / (width**3 * max(solution.iterations, 1)),
    }


def _exhaust(stream: CorrelatedStream) -> None:
    for _ in zip(stream.inputs(), stream.targets(), strict=True):
        pass


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _product_rates(width: int, chunk: int, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of the products that the solver needs: ``Aᵀ A`` of a chunk of rows, and (N, N) by (N, N)."""
    rates = {}
    for name, rows in (("chunk", chunk), ("square", width)):
        A = torch.randn(rows, width, dtype=dtype)
        out = torch.zeros(width, width, dtype=dtype)
        best = min(_seconds(lambda: out.addmm_(A.T, A)) for _ in range(REPEATS))  # noqa: B023 (called at once)
        rates[name] = 2 * rows * width**2 / best
    return rates


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Slope of the least-squares line of ``log seconds`` over ``log sizes``: seconds grow like sizes to this power."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth(session: Session) -> None:
    """Section ``growth``: one of P, N, M at a time, random layers with and without a ReLU."""
    base = dict(zip("PNM", session.sizes.base, strict=True))
    rows: list[tuple[object, ...]] = []
    fits: list[tuple[object, ...]] = []
    for kind in GROWTH_KINDS:
        for letter, factors in session.sizes.factors.items():
            runs = []
            for factor in factors:
                shape = {**base, letter: max(1, round(base[letter] * factor))}
                A, Z = correlated_layer(shape["P"], shape["N"], shape["M"], session.seed, torch.float32)
                program = make_program(kind, A, Z, 0.1)
                with session.doing(f"{GROWTH}: {kind}, {letter} = {shape[letter]}"):
                    run = figures(program, nettrim.solve(program, tol=GROWTH_TOLERANCE))
                runs.append(session.record(GROWTH, f"{kind}, {letter}", {"kind": kind, "varied": letter, **shape}, run))
                each = run["seconds"] / max(run["iterations"], 1)
                rows.append((kind, *shape.values(), run["seconds"], run["iterations"], each, run["gap"], run["status"]))
            values = [run["settings"][letter] for run in runs]
            seconds = [run["seconds"] for run in runs]
            each = [run["seconds"] / max(run["iterations"], 1) for run in runs]
            if len(set(values)) > 1:
                fits.append((kind, letter, f"{min(values)} to {max(values)}", exponent(values, seconds), exponent(values, each)))
    session.table(
        f"{GROWTH}: relative tolerance {GROWTH_TOLERANCE:g}, float32 data",
        ("program", "P", "N", "M", "s", "iterations", "s an iteration", "gap", "status"),
        rows,
    )
    session.table(
        f"{GROWTH}: seconds grow like size to the power",
        ("program", "of", "from", "exponent", "exponent, an iteration"),
        fits,
        f"the others at P = {base['P']}, N = {base['N']}, M = {base['M']}; least squares in log-log, fixed costs included",
    )
