"""Calls of `nettrim.prune` with a checkpoint folder that are killed, again and again, and their files damaged; what the last one ends with.

A child process prunes; it is killed (SIGKILL) at a random time, or at one of its own operations on files. After some of the crashes the newest file
is cut short, overwritten in part, or removed, as a power cut can leave it. The call is then made again, until it ends.
"""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nettrim
from nettrim import dispatch, fingerprints, sealed

SCENARIOS: dict[str, dict[str, Any]] = {
    "cascade": {"epsilon": 0.2, "penalty": "l1"},
    "fewest weights": {"epsilon": 0.2, "penalty": "l0"},
    "cascade, the papers' set": {"epsilon": 0.2, "consistency": "paper"},
    "parallel": {"epsilon": 0.2, "mode": "parallel", "inplace": True},
    "parallel, threads": {"epsilon": 0.2, "mode": "parallel", "executor": "threads"},
    "parallel, processes": {"epsilon": 0.2, "mode": "parallel", "executor": "processes"},
    "exact zeros": {"sparsity": 0.7, "max_rows": 150},
    "a budget": {"budget": 0.1},
    "repair": {"sparsity": 0.6, "repair": "auto"},
    "layers kept dense": {"epsilon": 0.2, "consistency": "paper", "kappa": 1e-3, "on_failure": "keep_dense", "max_iter": 200},
}


@dataclasses.dataclass
class Crashes:
    """What came of it.

    ``injected`` crashes in ``runs``, ``damaged`` files among them; ``resumed`` layers, that were taken from the folder; ``lost`` runs, that did not
    end with the weights, masks and certificate of one that was not disturbed; ``repeated`` layers, that were solved though their file was whole.
    """

    runs: int = 0
    injected: int = 0
    damaged: int = 0
    resumed: int = 0
    lost: int = 0
    repeated: int = 0
    complaints: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Crashes") -> None:
        for field in dataclasses.fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    widths = (16, 24, 20, 16, 12, 8)
    modules: list[nn.Module] = []
    for inputs, outputs in zip(widths, widths[1:], strict=False):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def samples() -> Tensor:
    return torch.randn(300, 16, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def _executor(kind: str | None) -> Iterator[Any]:
    if kind is None:
        yield None
    elif kind == "threads":
        with ThreadPoolExecutor(2) as pool:
            yield pool
    else:
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
            yield pool


def prune(scenario: str, folder: Path | None) -> dict[str, Any]:
    """One call, undisturbed: hashes of what came out, and how many layers were given to a solver."""
    options = dict(SCENARIOS[scenario])
    given = 0
    solve = dispatch.solutions

    def counted(chosen: Any, prepare: Any, *rest: Any) -> Any:
        def preparing(layer: Any) -> Any:
            nonlocal given
            given += 1
            return prepare(layer)

        return solve(chosen, preparing, *rest)

    dispatch.solutions = counted
    try:
        with _executor(options.pop("executor", None)) as executor:
            result = nettrim.prune(network(), samples(), executor=executor, checkpoint_dir=folder, **options)
    finally:
        dispatch.solutions = solve
    certificate = dataclasses.asdict(result.report.certificate)
    layers = []
    for layer in result.report.layers:
        history = tuple(point._replace(seconds=0.0) for point in layer.history)
        layers.append(dataclasses.asdict(dataclasses.replace(layer, seconds=0.0, history=history)))
    return {
        "weights": {name: fingerprints.tensor_hash(value) for name, value in result.model.state_dict().items()},
        "masks": {name: fingerprints.tensor_hash(value) for name, value in result.masks.items()},
        "certificate": json.dumps(certificate),
        "layers": json.dumps(layers),
        "skipped": result.report.skipped,
        "given": given,
        "checkpoint": result.report.options.get("checkpoint"),
    }


def undisturbed(scenario: str) -> tuple[dict[str, Any], float]:
    """What one call without a folder comes to, and the seconds that it takes; in a process of its own, as those that are killed."""
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "answer.json"
        child = _start(scenario, None, answer, None)
        start = time.perf_counter()
        os.waitpid(child, 0)
        return json.loads(answer.read_text()), time.perf_counter() - start


def _start(scenario: str, folder: Path | None, answer: Path, die_at: int | None) -> int:
    """Fork a child that prunes; its process id, once it has begun. It has imported torch already: so a crash takes no seconds."""
    ready, begun = os.pipe()
    child = os.fork()
    if child:
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.setpgid(0, 0)  # with its workers, so that those which outlive it can be found
        log = os.open(answer.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if die_at is not None:
            _die_at(die_at)
        os.write(begun, b".")
        os.close(begun)
        answer.write_text(json.dumps(prune(scenario, folder)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _die_at(count: int) -> None:
    """Kill this process at its ``count``-th operation of those that put a file on the disk."""
    done = 0

    def dying(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    for name in ("fsync", "replace"):
        setattr(sealed.os, name, dying(getattr(os, name)))
    sealed.write_bytes = dying(sealed.write_bytes)


def damage(folder: Path, draw: random.Random) -> bool:
    """Leave the file that was written last as a power cut may; False where there is none."""
    files = sorted((path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"), key=lambda path: path.stat().st_mtime_ns)
    if not files:
        return False
    path, data = files[-1], files[-1].read_bytes()
    kind = draw.choice(("cut", "cut", "removed", "zeros"))
    if kind == "removed" or not data:
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        start = draw.randrange(len(data))
        path.write_bytes(data[:start] + bytes(len(data) - start))
    return True


def _whole(folder: Path) -> int:
    """How many layers' files in the folder are whole."""
    count = 0
    for path in folder.glob("execution-*/*.safetensors"):
        with contextlib.suppress(sealed.Damaged):
            sealed.read(path)
            count += 1
    return count


def crash_and_resume(scenario: str, expected: dict[str, Any], seconds: float, draw: random.Random, kills: int, die_at: int | None = None) -> Crashes:
    """One run: killed ``kills`` times, with damage after every second one, then left to end."""
    found = Crashes(runs=1)
    orphans: list[int] = []  # the workers of a killed child wait on; they must not keep the folder locked, so they end after the run
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory())
        stack.callback(_end_workers, orphans)
        folder, answer = Path(temporary) / "kept", Path(temporary) / "answer.json"
        for kill in range(kills + 1):
            whole = _whole(folder)
            child = _start(scenario, folder, answer, die_at if kill < kills else None)
            if kill < kills and die_at is None:
                time.sleep(draw.uniform(0, seconds))
                os.kill(child, signal.SIGKILL)
            orphans.append(child)
            ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # its number is nobody else's until its workers have ended too
            status = -1 if ended is None else ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
            if status != -signal.SIGKILL:
                break
            found.injected += 1
            if kill % 2 == 1 or (kills == 1 and draw.random() < 0.5):
                found.damaged += damage(folder, draw)
        if not answer.exists():
            found.lost, found.complaints = 1, [f"{scenario}: the last call ended with {status}: {answer.with_suffix('.log').read_text()[-500:]}"]
            return found
        result = json.loads(answer.read_text())
        wrong = [name for name in ("weights", "masks", "certificate", "layers", "skipped") if result[name] != expected[name]]
        kept = result["checkpoint"]
        found.resumed = kept["resumed"]
        found.repeated = result["given"] - kept["solved"] + max(0, whole - kept["resumed"])
        if kept["resumed"] + kept["solved"] != expected["given"]:
            wrong.append(f"{kept['resumed']} layers resumed and {kept['solved']} solved, of {expected['given']}")
        if wrong:
            found.lost, found.complaints = 1, [f"{scenario}: {', '.join(wrong)} differ; notes {kept['notes']}"]
    return found


def _end_workers(groups: list[int]) -> None:
    """End the worker processes that killed children have left waiting: they are in their process groups."""
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
        os.waitpid(group, 0)


def crashes(count: int, seed: int = 0, scenarios: tuple[str, ...] = tuple(SCENARIOS)) -> Crashes:
    """At least ``count`` crashes at random times, spread over the scenarios."""
    draw = random.Random(seed)
    total = Crashes()
    known = {scenario: undisturbed(scenario) for scenario in scenarios}
    while total.injected < count:
        before = total.injected
        for scenario in scenarios:
            expected, seconds = known[scenario]
            total.add(crash_and_resume(scenario, expected, 1.1 * seconds, draw, kills=draw.choice((1, 1, 2, 3))))
            if total.injected >= count:
                break
        if total.injected == before:
            raise RuntimeError("no child could be killed before it ended; expected a scenario that takes longer")
    return total


def crashes_at_files(scenario: str = "cascade", seed: int = 0, every: int = 1) -> Crashes:
    """A crash before each (or every second, third ..) of the operations that put files on the disk, one run each."""
    draw = random.Random(seed)
    expected, _ = undisturbed(scenario)
    total = Crashes()
    for place in range(1, 10_000, every):
        found = crash_and_resume(scenario, expected, 0.0, draw, kills=1, die_at=place)
        total.add(found)
        if not found.injected:
            return total
    raise RuntimeError("a run has more than 10,000 operations on files; expected fewer")
