"""Rows that are held, unfolded chunk by chunk, or made by running the network again: the same weights, and bounded memory."""

import concurrent.futures
import math
from typing import Any

import pytest
import torch
from networks import solved_on
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, calibration, layers, observation, observing, prune
from nettrim.observing import observe
from nettrim.tracing import trace


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)
    ).eval()


def images(count: int = 60) -> list[Tensor]:
    return list(torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(1)).split(25))


class Meter:
    """The largest number of rows' elements that were made at a time, and how often the network ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.largest = self.runs = 0
        with_ones, kept = layers.Matrix.with_ones, observing.capture.kept

        def counted(matrix: layers.Matrix, rows: Tensor) -> Tensor:
            self.largest = max(self.largest, rows.numel())
            return with_ones(matrix, rows)

        def running(*args: Any, **kwargs: Any) -> Any:
            self.runs += 1
            return kept(*args, **kwargs)

        monkeypatch.setattr(layers.Matrix, "with_ones", counted)
        monkeypatch.setattr(observing.capture, "kept", running)


WAYS = (
    {"sparsity": 0.5},
    {"sparsity": 0.5, "repair": 0.5, "allocation": "uniform"},
    {"epsilon": 0.15, "penalty": "l1"},
    {"epsilon": 0.15, "penalty": "l1", "mode": "parallel"},
)


@pytest.mark.parametrize("held", ("inputs and outputs", "nothing"))
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_streamed_rows_give_the_weights_of_rows_that_are_held(options: dict[str, Any], held: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = prune(model, images(), **options)
    monkeypatch.setattr(observation, "HELD_ELEMENTS", 25_000 if held != "nothing" else 1000)  # the rows of layer "0" are 36,936 elements and more
    monkeypatch.setattr(observation, "UNFOLDED_ELEMENTS", 2000)
    meter = Meter(monkeypatch)
    result = prune(model, images(), **options)
    assert 0 < meter.largest <= 2000
    assert meter.runs > (3 if held == "nothing" else 0)
    assert result.report.certificate.holds
    for before, after in zip(expected.report.layers, result.report.layers, strict=True):
        assert (before.name, before.rows, before.nonzeros) == (after.name, after.rows, after.nonzeros)
        assert after.discrepancy == pytest.approx(before.discrepancy, rel=1e-4)
        assert after.epsilon == pytest.approx(before.epsilon, rel=1e-4)
    for (name, before), after in zip(expected.model.named_parameters(), result.model.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4, msg=name)


def test_one_samples_rows_are_the_least_that_is_made_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "HELD_ELEMENTS", 1000)
    monkeypatch.setattr(observation, "UNFOLDED_ELEMENTS", 1)
    meter = Meter(monkeypatch)
    assert prune(network(), images(20), sparsity=0.5, holdout=0).report.certificate.holds
    assert meter.largest == 16 * 2 * 27  # 4 x 4 patches of 3 x 3 x 3 in each of two groups
    assert prune(network(), images(20), epsilon=0.2, penalty="l0").report.certificate.holds


@pytest.mark.parametrize("held", (True, False))
def test_rows_are_drawn_uniformly_and_the_promise_is_on_all(held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not held:
        monkeypatch.setattr(observation, "HELD_ELEMENTS", 1000)
        monkeypatch.setattr(observation, "UNFOLDED_ELEMENTS", 3000)
    model, batches = network(), images(400)
    run = calibration.runner()
    found = trace(model, batches, run)
    whole = observe(found.layers[0], model, None, batches, run, device=None)
    some = observe(found.layers[0], model, None, batches, run, device=None, max_rows=3000, seed=7)
    again = observe(found.layers[0], model, None, batches, run, device=None, max_rows=3000, seed=7)
    other = observe(found.layers[0], model, None, batches, run, device=None, max_rows=3000, seed=8)
    assert some.drawn is not None and again.drawn is not None and other.drawn is not None and whole.drawn is None
    assert some.rows == 400 * 36 and len(some.drawn[0]) == 3000
    assert torch.equal(some.drawn[0], again.drawn[0]) and not torch.equal(some.drawn[0], other.drawn[0])
    every = torch.cat([A for A, _ in whole.observation.chunks()])
    index = torch.cdist(some.drawn[0].double(), every.double()).argmin(1)
    assert torch.equal(every[index], some.drawn[0]) and bool((index.diff() > 0).all())
    counts = torch.histc(index.double(), bins=10, min=0, max=some.rows)
    assert float(((counts - 300).square() / 300).sum()) < 35  # χ² with 9 degrees of freedom, beyond 1 in 10,000
    result = prune(model, batches, epsilon=0.15, max_rows=3000, mode="parallel")
    solved = torch.cat([solved_on(torch.cat(batches))[0]])
    with torch.no_grad():
        expected = model[0](solved).relu()
        difference = (result.model[0](solved).relu() - expected).norm()
    layer = result.report.layers[0]
    assert layer.rows == len(solved) * 36
    assert layer.discrepancy == pytest.approx(float(difference), rel=1e-4) and layer.discrepancy <= layer.epsilon
    assert layer.epsilon == pytest.approx(0.15 * float(expected.norm()), rel=1e-4)
    assert result.report.certificate.guaranteed is not None


def test_what_needs_all_rows_at_once_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "HELD_ELEMENTS", 1000)
    with pytest.raises(ArgumentError, match=r"layer '0', whose|layer '0' on its own.*not held; give max_rows"):
        prune(network(), images(), epsilon=0.15, consistency="paper")
    assert prune(network(), images(), epsilon=0.15, consistency="paper", max_rows=200).report.certificate.holds


def test_rows_for_an_executor_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    expected = prune(model, images(), epsilon=0.15, mode="parallel", holdout=0)
    monkeypatch.setattr(observation, "HELD_ELEMENTS", 1000)
    meter = Meter(monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        result = prune(model, images(), epsilon=0.15, mode="parallel", holdout=0, executor=executor)
    assert meter.runs == 3  # once a layer
    assert all(torch.equal(a, b) for a, b in zip(expected.model.parameters(), result.model.parameters(), strict=True))


def test_a_program_of_a_streamed_convolution_is_the_one_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against CVXPY, on the unfolded rows written out by torch itself."""
    torch.manual_seed(0)
    module, x = nn.Conv2d(2, 2, 2).double(), torch.randn(12, 2, 4, 4).double()
    A = torch.nn.functional.unfold(x, 2).transpose(1, 2).flatten(0, 1)
    A = torch.cat([A, torch.ones(len(A), 1)], 1)
    Y = module(x).detach().movedim(1, -1).flatten(0, 2)
    program = nettrim.LayerProgram(A, Y, epsilon=0.3 * float(Y.norm()), activation=None)
    expected = nettrim.solve(program, "cvxpy")
    monkeypatch.setattr(observation, "HELD_ELEMENTS", 10)
    result = prune(nn.Sequential(module), x, epsilon=0.3, holdout=0, tol=1e-6, penalty="l1")
    assert result.report.layers[0].objective == pytest.approx(expected.objective, rel=1e-5)
    assert result.report.layers[0].lower_bound <= expected.objective * (1 + 1e-9)
    assert math.isclose(result.report.layers[0].epsilon, 0.3 * float(Y.norm()), rel_tol=1e-9)


@pytest.mark.parametrize("most", (200, None))
def test_where_rows_are_drawn_a_convolution_holds_its_inputs_and_not_all_its_rows(most: int | None) -> None:
    model, batches = network(), images()
    run = calibration.runner(None)
    seen = observe(trace(model, batches, run).layers[0], model, None, batches, run, device=None, max_rows=most)
    assert (seen.observation.rows is None) == (most is not None)
    assert (seen.drawn is not None) == (most is not None) and seen.rows == 60 * 36
    assert most is None or seen.observation.inputs is not None
