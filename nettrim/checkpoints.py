"""A folder that remembers every layer that was solved, so that a call which was cut off goes on where it was.

In the folder: ``run.json`` says what the run is of, ``.lock`` that somebody works there, and there is one folder for each execution of the
pipeline (a budget, or ``repair="auto"``, takes several), with one file a layer. A layer's file holds all that the rest of the run needs of it: its
stored weights, and its part of the report. A cascade observes its inputs anew by running the partly pruned copy, so the weights are its state.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from nettrim import fingerprints, reading, sealed
from nettrim.allocation import Curve
from nettrim.certificate import Promise
from nettrim.errors import ArgumentError, CheckpointError
from nettrim.goals import Measured
from nettrim.metrics import Metric
from nettrim.options import Options
from nettrim.report import LayerReport

_RUN, _LOCK, _MEASURED, _EXECUTION = "run.json", ".lock", "measured.safetensors", "execution-"


@dataclass(frozen=True, eq=False)
class Record:
    """What became of one layer.

    Attributes
    ----------
    status : str
        Of its solution.
    seconds : float
        Wall time that it took.
    report : LayerReport or None
        None for a layer that stays dense.
    promise : Promise or None
    kept_dense : str or None
        Why it stays dense.
    """

    status: str
    seconds: float
    report: LayerReport | None
    promise: Promise | None
    kept_dense: str | None


class Checkpoint:
    """An open checkpoint folder; `opened` makes it.

    Parameters
    ----------
    folder : Path
    run : str
        Digest of the run's fingerprint.
    """

    def __init__(self, folder: Path, run: str) -> None:
        self.folder, self.run = folder, run
        self.resumed = self.solved = 0
        self.notes: list[str] = []

    def execution(self, options: Options) -> Execution:
        """The layers of one execution of the pipeline with these options."""
        return Execution(self, options)

    def summary(self) -> dict[str, object]:
        """For the report: how many layers were taken from the folder, and what was wrong there."""
        return {"folder": str(self.folder), "resumed": self.resumed, "solved": self.solved, "notes": list(self.notes)}

    def read(self, path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What a file of this run holds; None, and a note, where it cannot be used."""
        try:
            tensors, kept = sealed.read(path)
        except FileNotFoundError:
            return None
        except sealed.Damaged as error:
            self.notes.append(f"{what}: its file was damaged ({error}), so it was done again")
            return None
        if kept.get("run") != self.run:
            self.notes.append(f"{what}: its file was another run's, so it was done again")
            return None
        return tensors, kept

    def load_measured(self, measured: Measured) -> None:
        """Add what was measured of the dense network, if it is there."""
        found = self.read(self.folder / _MEASURED, "what was measured of the dense network")
        if found is None:
            return
        tensors, kept = found
        for index, (name, home) in enumerate(kept["metrics"]):
            measured.metrics[name] = Metric(tensors[f"{index} own"], tensors[f"{index} F"]).to(home)
        for index, (name, size) in enumerate(kept["curves"]):
            measured.curves[name] = Curve(tensors[f"{index} kept"].numpy(), tensors[f"{index} error"].numpy(), size)

    def save_measured(self, measured: Measured) -> None:
        """Keep what was measured of the dense network, once.

        Raises
        ------
        CheckpointError
            It cannot be written.
        """
        tensors = {f"{index} {part}": getattr(metric, part) for index, metric in enumerate(measured.metrics.values()) for part in ("own", "F")}
        for index, curve in enumerate(measured.curves.values()):
            tensors |= {f"{index} kept": torch.from_numpy(curve.kept), f"{index} error": torch.from_numpy(curve.error)}
        metrics = [(name, str(metric.own.device)) for name, metric in measured.metrics.items()]
        curves = [(name, curve.size) for name, curve in measured.curves.items()]
        sealed.write(self.folder / _MEASURED, tensors, {"run": self.run, "metrics": metrics, "curves": curves})


class Execution:
    """The layers that one execution of the pipeline has solved.

    A layer of a cascade was solved for the weights of the layers before it; its file says which, and counts only behind the same ones.

    Parameters
    ----------
    checkpoint : Checkpoint
    options : Options
        Of this execution.
    """

    def __init__(self, checkpoint: Checkpoint, options: Options) -> None:
        self._checkpoint = checkpoint
        asked = {name: value for name, value in options.describe().items() if name != "on_failure"}
        self._folder = checkpoint.folder / f"{_EXECUTION}{fingerprints.digest(asked)[:16]}"
        self._cascade, self._may_fail = options.mode == "cascade", options.on_failure == "keep_dense"
        self._before = ""

    def _path(self, name: str) -> Path:
        readable = re.sub(r"[^A-Za-z0-9.]+", "_", name)[:60].strip(".")
        return self._folder / f"{readable}-{hashlib.sha256(name.encode('utf-8', 'surrogatepass')).hexdigest()[:12]}.safetensors"

    def load(self, name: str) -> tuple[Record, Tensor | None] | None:
        """The layer, and its stored weights (M, N) if it has any, where it is kept and still good.

        The layers of a cascade are to be asked for in execution order.
        """
        found = self._checkpoint.read(self._path(name), f"layer {name!r}")
        if found is None:
            return None
        tensors, kept = found
        if kept["before"] != self._before:
            self._checkpoint.notes.append(f"layer {name!r}: a layer before it has other weights now, so it was done again")
            return None
        if kept["kept_dense"] is not None and not self._may_fail:
            return None
        report = kept["report"]
        record = Record(
            status=kept["status"],
            seconds=kept["seconds"],
            report=None if report is None else reading.read(LayerReport, report),
            promise=None if kept["promise"] is None else Promise(**kept["promise"]),
            kept_dense=kept["kept_dense"],
        )
        self._checkpoint.resumed += 1
        self._pass(name, tensors.get("matrix"))
        return record, tensors.get("matrix")

    def save(self, name: str, record: Record, matrix: Tensor | None) -> None:
        """Keep a layer that was just solved, with its stored weights (M, N), None for one that stays dense.

        Raises
        ------
        CheckpointError
            It cannot be written.
        """
        if not self._folder.exists():
            _make(self._folder)
        plain = {
            **{key: getattr(record, key) for key in ("status", "seconds", "kept_dense")},
            "report": None if record.report is None else dataclasses.asdict(record.report),
            "promise": None if record.promise is None else dataclasses.asdict(record.promise),
            "run": self._checkpoint.run,
            "before": self._before,
            "layer": name,
        }
        sealed.write(self._path(name), {} if matrix is None else {"matrix": matrix}, plain)
        self._checkpoint.solved += 1
        self._pass(name, matrix)

    def _pass(self, name: str, matrix: Tensor | None) -> None:
        if self._cascade:
            weights = "dense" if matrix is None else fingerprints.tensor_hash(matrix)
            self._before = fingerprints.digest({"before": self._before, "layer": name, "weights": weights})


@contextlib.contextmanager
def opened(given: str | os.PathLike[str], fingerprint: dict[str, str]) -> Iterator[Checkpoint]:
    """The folder ``given``, locked and of the run that the fingerprint describes; made where there is none.

    Raises
    ------
    ArgumentError
        It is no path.
    CheckpointError
        Another call works there, it holds another run or other files, or it cannot be read or written.
    """
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ArgumentError(f"checkpoint_dir={given!r}; expected the path of a folder")
    folder = Path(os.fsdecode(given)).absolute()
    _make(folder)
    # no lock by the mere existence of a file: that one would outlive a process that was killed
    lock = filelock.FileLock(folder / _LOCK, timeout=0, fallback_to_soft=False)
    with contextlib.ExitStack() as stack:
        _acquire(lock, folder, stack)
        checkpoint = Checkpoint(folder, fingerprints.digest(fingerprint))
        _check_run(checkpoint, fingerprint)
        yield checkpoint


def _acquire(lock: filelock.BaseFileLock, folder: Path, stack: contextlib.ExitStack) -> None:
    try:
        stack.enter_context(lock)
    except filelock.Timeout as error:
        raise CheckpointError(
            f"checkpoint_dir={str(folder)!r} is in use by another call; expected one at a time: wait for it, or give another folder"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint_dir={str(folder)!r} cannot be locked: {error.strerror or error}; give a folder on another disk") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sealed.flush_folder(folder.parent)
    except OSError as error:
        raise CheckpointError(f"{str(folder)!r} cannot be made a folder: {error.strerror or error}; give another checkpoint_dir") from error


def _check_run(checkpoint: Checkpoint, fingerprint: dict[str, str]) -> None:
    """Refuse a folder of another run; say in a new one what the run is of."""
    path = checkpoint.folder / _RUN
    try:
        names = sorted(os.listdir(checkpoint.folder))
        there: object = json.loads(path.read_bytes()) if path.exists() else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError:
        there = {}
    kept = there.get("fingerprint") if isinstance(there, dict) else None
    if isinstance(there, dict) and isinstance(kept, dict) and there.get("checksum") == fingerprints.digest(kept):
        different = fingerprints.differences(kept, fingerprint)
        if different:
            raise CheckpointError(
                f"checkpoint_dir={str(checkpoint.folder)!r} holds the layers of another run, which differs in: {different}. Expected the same "
                "model, calibration data, options and version: give another folder, or remove this one to start anew"
            )
        return
    ours = [name for name in names if name in (_RUN, _MEASURED) or name.startswith(_EXECUTION)]
    strange = [name for name in names if name not in ours and name != _LOCK and not name.endswith(sealed.TEMPORARY)]
    if strange:
        raise CheckpointError(
            f"checkpoint_dir={str(checkpoint.folder)!r} holds other files ({', '.join(strange[:3])}); expected a new or empty folder, or that of "
            "the run to go on with"
        )
    if ours:  # each layer's file says itself which run it is of
        checkpoint.notes.append(f"{_RUN} was {'damaged' if there is not None else 'missing'}, so it was written again")
    text = json.dumps({"checksum": fingerprints.digest(fingerprint), "fingerprint": fingerprint}, indent=1)
    sealed.write_bytes(path, text.encode())
