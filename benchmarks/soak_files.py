"""Malformed files by the thousand: each must end in an error of nettrim's own, soon and in little memory, or be read.

``python -m benchmarks.soak_files --cases 10000`` prints the figures; :func:`soak` returns them.
"""

from __future__ import annotations

import collections
import io
import json
import random
import resource
import signal
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import torch
from torch import nn

import nettrim
from nettrim.files import load_arrays

MAX_BYTES = 2**24
SECONDS = 5  # that one file may take
MEBIBYTES = 512  # that all of them together may add to the process
NUMBERS = (b"\xff" * 8, b"\x00" * 8, b"\x7f" + b"\xff" * 7, b"\xff" * 7 + b"\x7f", b"99999999999999999999", b"-1", b"1e999", b"NaN")
WORDS = (b"|O8", b"<f16", b"../../../etc/passwd", b"\x00", b"{" * 500, b"[" * 500, b'"dtype"', b"(1099511627776,)", b"c__builtin__\neval\n")


def seeds() -> dict[str, list[bytes]]:
    """Sound files of every kind, by suffix."""
    rng = np.random.default_rng(0)
    arrays = {"weight": rng.standard_normal((7, 5)), "mask": rng.random((7, 5)) < 0.5, "ids": np.arange(6, dtype=np.int32)}
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    found: dict[str, list[bytes]] = {".npy": [_written(lambda file, a=array: np.save(file, a)) for array in arrays.values()]}
    found[".npz"] = [_written(lambda file: np.savez(file, **arrays)), _written(lambda file: np.savez_compressed(file, **arrays))]
    found[".safetensors"] = [safetensors.torch.save(tensors)]
    found[".pt"] = [_written(lambda file: torch.save(tensors, file)), _written(lambda file: torch.save(list(tensors.values()), file))]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    report = nettrim.prune(model, torch.randn(30, 6), epsilon=0.2).report
    found[".compressed"] = [_compressed(model.state_dict()), _compressed({"0.weight": torch.eye(40), "same": model[0].weight.detach() * 0})]
    found[".json"] = [report.to_json().encode(), json.dumps(report.to_dict()).encode()]
    return found


def _compressed(state: dict[str, torch.Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        nettrim.save_compressed(state, None, Path(folder) / "whole")
        return (Path(folder) / "whole").read_bytes()


def _written(write: Callable[[Any], Any]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to three of: bits turned, a piece cut, doubled, moved, or replaced by what breaks parsers."""
    found = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        if not found:
            break
        at = rng.randrange(len(found)) if rng.random() < 0.5 else rng.randrange(min(len(found), 300))  # headers lie in front, or behind
        at = at if rng.random() < 0.8 else max(0, len(found) - 1 - at)
        length = min(rng.choice((1, 2, 8, 40, len(found))), len(found) - at)
        way = rng.randrange(7)
        if way == 0:
            found[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            del found[at:]
        elif way == 2:
            del found[at : at + length]
        elif way == 3:
            found[at:at] = found[at : at + length]
        elif way == 4:
            found[at : at + 8] = rng.choice(NUMBERS)
        elif way == 5:
            found[at:at] = rng.choice(WORDS)
        else:
            found[at : at + length] = rng.randbytes(length)
    return bytes(found)


def damaged_record(text: bytes, rng: random.Random) -> bytes:
    """A report whose JSON is sound and whose content is not: a value of another type, a key more or less."""
    data = json.loads(text)
    places: list[tuple[Any, Any]] = []
    queue: list[Any] = [data]
    for item in queue:
        for key in item if isinstance(item, dict) else range(len(item)):
            places.append((item, key))
            if isinstance(item[key], dict | list):
                queue.append(item[key])
    owner, key = rng.choice(places)
    values: list[Any] = [None, True, -1, 0, 10**400, 1e308, "", "NaN", "x" * 2_000_000, [], {}, [[[]]], {"a": {}}, "Infinity", "\ud800", [1, 2, 3]]
    if rng.random() < 0.2 and isinstance(owner, dict):
        del owner[key]
    else:
        owner[key] = rng.choice(values)
    return json.dumps(data).encode()


def read(path: Path) -> None:
    """Read a file by the reader that its suffix is for."""
    if path.suffix == ".json":
        str(nettrim.Report.from_json(path))
    elif path.suffix == ".compressed":
        nettrim.load_compressed(path)
    else:
        load_arrays(path, max_bytes=MAX_BYTES)


def outcome(path: Path) -> str:
    """``"read"``, ``"refused"``, or in words what went wrong."""

    def too_long(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        read(path)
    except nettrim.NetTrimError as error:
        return "refused" if str(error).strip() and "longer than" not in str(error) else f"an error that says {error}"
    except BaseException as error:  # a panic of a library in another language is no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return "read"


def soak(cases: int, seed: int = 0) -> dict[str, Any]:
    """Read ``cases`` malformed files; how many were refused, read all the same, or ended in any other way.

    Returns
    -------
    dict
        ``cases``, ``refused``, ``read``, ``wrong`` (a list of what happened and how to get it again), ``seconds`` (of the slowest), ``mebibytes``
        (that the process grew by).
    """
    rng, found = random.Random(seed), seeds()
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    slowest, memory = 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        for case in range(cases):
            suffix = rng.choice(list(found))
            sound = rng.choice(found[suffix])
            data = damaged_record(sound, rng) if suffix == ".json" and rng.random() < 0.5 else damaged(sound, rng)
            path = Path(folder) / f"case{suffix}"
            path.write_bytes(data)
            start = time.perf_counter()
            said = outcome(path)
            slowest = max(slowest, time.perf_counter() - start)
            counts[said if said in ("read", "refused") else "wrong"] += 1
            if said not in ("read", "refused"):
                wrong.append(f"seed {seed}, case {case}, {suffix}: {said}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    if grown > MEBIBYTES:
        wrong.append(f"the process grew by {grown:.0f} MiB")
    return {"cases": cases, **{key: counts[key] for key in ("refused", "read")}, "wrong": wrong, "seconds": slowest, "mebibytes": grown}


def bomb(path: Path, size: int) -> None:
    """An NPZ of a few kilobytes that says, and is, ``size`` bytes of zeros once inflated."""
    header = _written(lambda file: np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (size // 8,)}))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.npy", "w", force_zip64=True) as member:
        member.write(header)
        for _ in range(size // 2**20):
            member.write(bytes(2**20))


@click.command()
@click.option("--cases", type=click.IntRange(min=1), default=10_000, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(cases: int, seed: int) -> None:
    """Print how many malformed files were refused, read, or ended in any other way; exit with 1 if one did."""
    figures = soak(cases, seed)
    click.echo(
        f"files fuzzed: {figures['cases']}, refused: {figures['refused']}, read all the same: {figures['read']}, "
        f"wrong outcomes: {len(figures['wrong'])}; slowest {figures['seconds']:.2f} s, process grew by {figures['mebibytes']:.0f} MiB"
    )
    for line in figures["wrong"]:
        click.echo(line)
    raise SystemExit(1 if figures["wrong"] else 0)


if __name__ == "__main__":
    main()
