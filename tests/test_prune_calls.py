"""How `nettrim.prune` can be called: forms of calibration data, executors, progress, seeds, rows, devices, in place."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from networks import chain, hooks_of, same_bits, samples, state_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nettrim import ArgumentError, ConvergenceError, NetTrimError, ProgressEvent, PruneResult, prune

INPUTS = samples(60, 8)
LABELS = torch.zeros(60, dtype=torch.long)


class Named(nn.Module):
    """Takes its input under a name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain(8, 10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def weights(result: PruneResult) -> dict[str, Tensor]:
    return state_of(result.model)


def one_by_one() -> Iterator[Tensor]:
    yield from INPUTS.split(25)


FORMS: dict[str, Callable[[], Any]] = {
    "tuple with labels": lambda: (INPUTS, LABELS),
    "dict": lambda: {"x": INPUTS, "labels": LABELS},
    "numpy": lambda: INPUTS.numpy(),
    "list of one": lambda: [INPUTS],
    "list of tuples": lambda: [(INPUTS, LABELS)],
    "loader": lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=60),
    "dataset": lambda: TensorDataset(INPUTS, LABELS),
}
IN_BATCHES: dict[str, Callable[[], Any]] = {
    "generator": one_by_one,
    "list": lambda: list(INPUTS.split(25)),
    "loader": lambda: DataLoader(TensorDataset(INPUTS, LABELS), batch_size=25),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_in_one_batch_give_the_same_bits(form: str) -> None:
    expected = prune(Named(), INPUTS, epsilon=0.2)
    assert same_bits(weights(prune(Named(), FORMS[form](), epsilon=0.2)), weights(expected))


@pytest.mark.parametrize("form", IN_BATCHES)
def test_the_same_samples_in_batches_of_different_size(form: str) -> None:
    """25, 25 and 10 samples: the same samples are kept out, and the weights are the same up to the rounding of the products."""
    expected = prune(Named(), INPUTS, epsilon=0.2)
    result = prune(Named(), IN_BATCHES[form](), epsilon=0.2)
    for name, value in weights(result).items():
        assert torch.allclose(value, weights(expected)[name], atol=1e-4)
    assert [layer.rows for layer in result.report.layers] == [54, 54]
    assert result.report.certificate.holdout == pytest.approx(expected.report.certificate.holdout, rel=1e-3)


def test_forward_fn_runs_what_model_of_batch_cannot() -> None:
    expected = prune(Named(), INPUTS, epsilon=0.2)
    result = prune(Named(), {"pixels": INPUTS}, epsilon=0.2, forward_fn=lambda model, batch: model(batch["pixels"]))
    assert same_bits(weights(result), weights(expected))


@pytest.mark.parametrize("mode", ("parallel", "cascade"))
def test_the_same_seed_gives_the_same_bits(mode: str) -> None:
    model = chain(8, 10, 4)
    torch.manual_seed(1)
    first = prune(model, INPUTS, epsilon=0.2, mode=mode, max_rows=40, seed=3)
    torch.manual_seed(2)
    noise = torch.get_rng_state()
    again = prune(model, INPUTS, epsilon=0.2, mode=mode, max_rows=40, seed=3)
    assert torch.equal(torch.get_rng_state(), noise)  # the caller's random numbers are left alone
    assert same_bits(weights(first), weights(again))
    assert first.report.certificate == again.report.certificate
    other = prune(model, INPUTS, epsilon=0.2, mode=mode, max_rows=40, seed=4)
    assert not same_bits(weights(first), weights(other))


def test_max_rows_solves_on_that_many_and_promises_for_all() -> None:
    model = chain(8, 10, 4)
    for count in (30, 54, 1000):
        result = prune(model, INPUTS, epsilon=0.3, max_rows=count)
        assert [layer.rows for layer in result.report.layers] == [54] * 2
        assert result.report.certificate.holds and result.report.certificate.guaranteed is not None
    assert same_bits(weights(result), weights(prune(model, INPUTS, epsilon=0.3)))
    with pytest.raises(ConvergenceError, match=r"raise max_rows \(now 1 of 54\)"):
        prune(model, INPUTS, epsilon=0.3, max_rows=1)
    assert prune(model, INPUTS, sparsity=0.5, max_rows=1).report.certificate.holds  # which promises what it leaves


def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))


def processes() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,))


@pytest.mark.parametrize("pool", (threads, processes))
def test_an_executor_gives_the_same_bits(pool: Callable[[], Executor]) -> None:
    model = chain(8, 10, 6, 4)
    serial = prune(model, INPUTS, epsilon=0.2, mode="parallel")
    events: list[ProgressEvent] = []
    with pool() as executor:
        result = prune(model, INPUTS, epsilon=0.2, mode="parallel", executor=executor, progress=events.append)
    assert same_bits(weights(serial), weights(result))
    assert [layer.name for layer in result.report.layers] == ["0", "2", "4"]
    assert sorted(event.layer for event in events) == ["0", "2", "4"] and [event.index for event in events] == [1, 2, 3]
    assert result.report.certificate == serial.report.certificate


class Reluctant(ThreadPoolExecutor):
    """Runs the first layer and fails on the second, once all three were given; counts what is cancelled."""

    def __init__(self, failure: BaseException) -> None:
        super().__init__(1)
        self.failure, self.given = failure, list[Future[Any]]()

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.given.append(future)
        if len(self.given) == 1:
            self.first = function(*args, **kwargs)
        elif len(self.given) == 3:
            self.given[0].set_result(self.first)
            self.given[1].set_exception(self.failure)
        return future


@pytest.mark.parametrize(
    ("failure", "expected"),
    (
        (RuntimeError("worker lost"), NetTrimError),
        (MemoryError("no memory"), NetTrimError),
        (ArgumentError("as it is"), ArgumentError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ),
)
def test_a_worker_that_fails(failure: BaseException, expected: type[BaseException]) -> None:
    model = chain(8, 10, 6, 4)
    before = state_of(model)
    executor = Reluctant(failure)
    with pytest.raises(expected) as caught:
        prune(model, INPUTS, epsilon=0.2, mode="parallel", executor=executor, inplace=True)
    if expected is NetTrimError:
        assert "layer '2'" in str(caught.value) and str(failure) in str(caught.value)
    assert executor.given[2].cancelled()
    assert same_bits(state_of(model), before) and hooks_of(model) == 0


def die(*_: Any) -> None:
    os._exit(1)


def test_a_process_that_dies() -> None:
    model = chain(8, 10, 4)
    with processes() as executor:
        future = executor.submit(die)
        future.exception()  # the pool is broken from here on
        with pytest.raises(NetTrimError, match="layer '0'.*BrokenProcessPool"):
            prune(model, INPUTS, epsilon=0.2, mode="parallel", executor=executor)


def test_an_executor_that_is_shut_down() -> None:
    executor = ThreadPoolExecutor(1)
    executor.shutdown()
    with pytest.raises(NetTrimError, match="layer '0'.*shutdown"):
        prune(chain(8, 4), INPUTS, epsilon=0.2, mode="parallel", executor=executor)


def test_a_failure_leaves_nothing_in_the_queue() -> None:
    """A layer that fails after others were queued: theirs are cancelled, though the exception (and so the frame) is still held."""
    executor = Reluctant(RuntimeError())
    with pytest.raises(ZeroDivisionError):
        prune(chain(8, 10, 6, 4), INPUTS, epsilon=0.2, mode="parallel", executor=executor, progress=lambda event: 1 // 0)
    assert executor.given[2].cancelled()


def test_progress_comes_once_a_layer() -> None:
    events: list[ProgressEvent] = []
    result = prune(chain(8, 10, 6, 4), INPUTS, epsilon=0.2, progress=events.append)
    assert events == [ProgressEvent(layer.name, index, 3, layer.status, layer.gap) for index, layer in enumerate(result.report.layers, 1)]


def test_progress_as_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    prune(chain(8, 10, 4), INPUTS, epsilon=0.2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "nettrim" in err and "2/2" in err and "2: " in err
    prune(chain(8, 10, 4), INPUTS, epsilon=0.2)
    assert capsys.readouterr() == ("", "")


def test_the_model_is_copied_and_its_flags_stay() -> None:
    model = nn.Sequential(chain(8, 10), nn.Dropout(), nn.BatchNorm1d(10), chain(10, 4))
    model.train()
    model[2].eval()
    model[0][0].weight.requires_grad_(False)
    before, flags = state_of(model), [module.training for module in model.modules()]
    result = prune(model, INPUTS, epsilon=0.2)
    assert result.model is not model
    assert [module.training for module in model.modules()] == flags
    assert [module.training for module in result.model.modules()] == flags
    assert same_bits(state_of(model), before) and hooks_of(model) == hooks_of(result.model) == 0
    assert not result.model[0][0].weight.requires_grad and result.model[3][0].weight.requires_grad
    assert same_bits({k: v for k, v in state_of(result.model).items() if k.startswith("2.")}, {k: v for k, v in before.items() if k.startswith("2.")})
    assert all(parameter.grad is None for parameter in result.model.parameters())


@pytest.mark.parametrize("mode", ("parallel", "cascade"))
def test_in_place_writes_the_same_weights(mode: str) -> None:
    model = chain(8, 10, 4)
    expected = prune(model, INPUTS, epsilon=0.2, mode=mode)
    parameters = list(model.parameters())
    result = prune(model, INPUTS, epsilon=0.2, mode=mode, inplace=True)
    assert result.model is model
    assert all(before is after for before, after in zip(parameters, model.parameters(), strict=True))
    assert same_bits(state_of(model), weights(expected))
    assert torch.equal(result.masks["0.weight"], model[0].weight != 0)


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", (None, torch.device("cpu"), *DEVICES))
@pytest.mark.parametrize("home", DEVICES)
def test_the_programs_can_be_solved_on_a_device(home: str, device: Any) -> None:
    result = prune(chain(8, 10, 4).to(home), INPUTS, epsilon=0.2, device=device)
    assert result.report.certificate.holds
    assert {tensor.device.type for tensor in (*result.model.parameters(), *result.masks.values())} == {home}


def test_the_report_keeps_the_options() -> None:
    options = prune(chain(8, 10, 4), INPUTS, epsilon={nn.Linear: 0.2, "0": 0.1}, seed=5).report.options
    assert options["epsilon"] == {"Linear": 0.2, "0": 0.1} and options["seed"] == 5 and options["mode"] == "cascade"
