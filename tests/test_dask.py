"""Parallel mode and blocks of neurons on a Dask scheduler with worker processes of its own, over the loopback interface."""

import os
import signal
import threading
import time
from collections import Counter

import distributed
import pytest
import torch
from commands import calibration_file, nettrim
from networks import chain, same_bits, samples, state_of

from nettrim import LayerProgram, NetTrimError, prune, solve


@pytest.fixture(scope="module")
def client():
    """Two worker processes with one thread each, as torch has here."""
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None, "silence_logs": "ERROR"}
    with distributed.LocalCluster(**options) as cluster, distributed.Client(cluster) as found:
        yield found


INPUTS = samples(200, 24)


def test_parallel_layers_have_the_bits_of_a_serial_run(client):
    model = chain(24, 40, 32, 4)
    serial = prune(model, INPUTS, epsilon=0.2, mode="parallel")
    spread = prune(model, INPUTS, epsilon=0.2, mode="parallel", executor=client.get_executor())
    assert same_bits(state_of(serial.model), state_of(spread.model))
    assert spread.report.certificate == serial.report.certificate


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": 0.2, "mode": "parallel"},
        {"epsilon": 0.2, "mode": "cascade", "reweight": 1},
        {"pattern": "2:4", "fidelity": "layer"},
        {"pattern": "neuron", "sparsity": 0.25},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_blocks_of_neurons_have_the_bits_of_the_same_blocks_here(client, options):
    model = chain(24, 40, 32, 4)
    here = prune(model, INPUTS, neurons=16, **options)
    there = prune(model, INPUTS, neurons=16, executor=client.get_executor(), **options)
    assert same_bits(state_of(here.model), state_of(there.model))
    assert here.report.certificate.holds and there.report.certificate == here.report.certificate


def test_inputs_travel_once(client, monkeypatch):
    """However many blocks and rounds there are: the program leaves this process once, and reaches each worker at most once."""
    pickled = Counter()

    def counting(self, protocol):
        pickled[id(self)] += 1
        return object.__reduce_ex__(self, protocol)

    monkeypatch.setattr(LayerProgram, "__reduce_ex__", counting, raising=False)
    torch.manual_seed(0)
    A = torch.randn(2000, 20)
    Y = (A @ torch.randn(12, 20).T).clamp(min=0)
    program = LayerProgram(A, Y, epsilon=0.2 * float(Y.norm()))
    size = (A.numel() + Y.numel()) * 4
    seen = {address: len(log) for address, log in client.run(incoming).items()}
    solution = solve(program, neurons=4, executor=client.get_executor())
    assert solution.status == "optimal" and solution.iterations > 100  # several rounds of λ, three blocks each
    assert pickled[id(program)] == 1
    assert set(pickled.values()) == {1} and len(pickled) <= 2  # the other is the scheduler's copy, on its way to a worker: it is in this process
    for address, log in client.run(incoming).items():
        large = [entry for entry in log[seen[address] :] if entry["total"] >= size]
        assert len(large) <= 1


def incoming(dask_worker):
    return list(dask_worker.transfer_incoming_log)


def slow_down():
    """On a worker: every solve waits first, so that there is a time to kill it in."""
    from nettrim import dispatch

    def slow(*args, **kwargs):
        time.sleep(1.0)
        return solve(*args, **kwargs)

    dispatch.solve = slow


def test_a_killed_workers_layers_are_redone(client):
    model, options = chain(24, 40, 32, 4), {"epsilon": 0.2, "mode": "parallel"}
    serial = prune(model, INPUTS, **options)
    pids, killed = client.run(os.getpid), []
    client.run(slow_down)

    def kill_a_busy_worker() -> None:
        until = time.monotonic() + 60
        while not killed and time.monotonic() < until:
            busy = [address for address, keys in client.processing().items() if any("_solve" in str(key) for key in keys)]
            if busy:
                time.sleep(0.3)  # it is in the middle of a layer
                os.kill(pids[busy[0]], signal.SIGKILL)
                killed.append(busy[0])
            time.sleep(0.01)

    hunter = threading.Thread(target=kill_a_busy_worker, daemon=True)
    hunter.start()
    spread = prune(model, INPUTS, executor=client.get_executor(), **options)
    hunter.join(timeout=60)
    assert killed
    assert same_bits(state_of(serial.model), state_of(spread.model))
    assert spread.report.certificate == serial.report.certificate


def test_a_failure_on_a_worker_says_where(client):
    def fail(*args):
        raise MemoryError("no room for 3 TB")

    executor = client.get_executor()
    executor.submit = lambda function, *args, **kwargs: client.get_executor().submit(fail)
    with pytest.raises(NetTrimError, match=r"the executor failed on layer '0' \(MemoryError: no room for 3 TB\)"):
        prune(chain(24, 8), INPUTS, epsilon=0.2, mode="parallel", executor=executor)


def test_from_the_command_line(client, tmp_path):
    options = ("prune", "commands:make_chain", "--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--mode", "parallel", "--quiet")
    result = nettrim(*options, "--out", tmp_path / "here")
    assert result.exit_code == 0, result.output
    result = nettrim(*options, "--scheduler", client.scheduler.address, "--out", tmp_path / "there")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "here" / "model.safetensors").read_bytes() == (tmp_path / "there" / "model.safetensors").read_bytes()


def test_addresses_that_are_none(tmp_path):
    options = ("prune", "commands:make_chain", "--calibration", calibration_file(tmp_path), "--epsilon", 0.3, "--out", tmp_path / "out")
    for address in ("nowhere", "tcp://127.0.0.1:1"):
        result = nettrim(*options, "--mode", "parallel", "--scheduler", address)
        assert result.exit_code == 1 and f"no Dask scheduler answers at {address}" in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1
    result = nettrim(*options, "--scheduler", "tcp://127.0.0.1:1")
    assert result.exit_code == 2 and "--scheduler goes with --mode parallel, or --neurons" in result.stderr
    result = nettrim(*options, "--mode", "parallel", "--scheduler", "tcp://127.0.0.1:1", "--workers", 2)
    assert result.exit_code == 2 and "give one of them" in result.stderr
