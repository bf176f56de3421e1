"""bench and the clock under it: ratios that a known difference shows in, every form and number, and a model left as it was."""

import json
import time

import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn

import nettrim
from nettrim import ArgumentError, CalibrationError, timing


def test_the_clock_sees_which_call_is_slower() -> None:
    found = timing.compare({"long": lambda: sum(range(200_000)), "short": lambda: sum(range(5_000))}, cpu=True)
    assert found["long"].speedup == 1.0 and found["short"].speedup > 3  # 40, where nobody else is about
    assert found["long"].seconds > found["short"].seconds > 0


def test_on_one_thread_of_a_cpu_waiting_is_not_counted_and_elsewhere_it_is() -> None:
    calls = {"busy": lambda: sum(range(50_000)), "waits": lambda: time.sleep(0.01)}
    assert timing.compare(calls, cpu=True, threads=1, turns=3)["waits"].seconds < 0.002
    assert timing.compare(calls, cpu=False, threads=1, turns=3)["waits"].seconds >= 0.01
    assert timing.compare(calls, cpu=True, threads=2, turns=3)["waits"].seconds >= 0.01


def test_the_clock_sets_threads_and_puts_them_back() -> None:
    seen = set()
    before = torch.get_num_threads()
    timing.compare({"call": lambda: seen.add((torch.get_num_threads(), torch.is_grad_enabled()))}, cpu=True, threads=before + 1, turns=2, seconds=0.0)
    assert seen == {(before + 1, False)} and torch.get_num_threads() == before


def pruned(*widths: int, dead: int = 0) -> nn.Sequential:
    model = chain(*widths)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.masked_fill_(torch.rand(parameter.shape, generator=generator) < 0.97, 0)
    model[0].weight.data[:dead] = 0
    return model.train()


def test_every_form_and_batch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(96, 96, 16, dead=30)
    before = state_of(model)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0}, raising=False)  # two threads on a busy machine mostly wait for each other
    found = nettrim.bench(model, batches=(8, 1))
    assert [(one.threads, one.form, one.batch) for one in found.timings] == [
        (1, form, batch) for form in ("dense", "shrunk", "sparse") for batch in (1, 8)
    ]
    for one in found.timings:
        assert one.seconds > 0 and one.speedup > 0 and (one.form != "dense" or one.speedup == 1.0)
    assert found.bytes["dense"] == 4 * sum(value.numel() for value in model.parameters())
    assert found.bytes["shrunk"] < found.bytes["dense"] and found.bytes["compressed file"] < found.bytes["dense"] / 5
    assert set(found.sparse) == {1} and [layer.name for layer in found.sparse[1].layers] == ["0", "2"]
    assert set(found.sparse[1].layers[0].speedups) <= {1, 8}
    assert json.loads(json.dumps(found.to_dict()))["bytes"] == found.bytes
    text = str(found)
    assert text.startswith("| form") and all(word in text for word in ("batch 1: ms", "batch 8: ms", "(1.00x)", "compressed file"))
    assert model.training and same_bits(state_of(model), before) and torch.get_num_threads() == 1


def test_a_given_dense_network_is_what_the_others_are_compared_with() -> None:
    dense = chain(512, 2048, 16)
    found = nettrim.bench(pruned(512, 64, 16), dense, batches=[64], threads=[1])
    assert found.bytes["dense"] == 4 * sum(value.numel() for value in dense.parameters())
    assert next(one for one in found.timings if one.form == "sparse").speedup > 2


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        assert x.shape[0] == scale.shape[0]
        return self.layer(x) * scale[:, None]


def test_an_example_is_repeated_to_every_batch_and_a_sparse_model_made_dense_first() -> None:
    example = {"x": samples(3, 8), "scale": torch.ones(3), "labels": torch.zeros(3)}
    found = nettrim.bench(nettrim.to_sparse(Weighted(), layers=["layer"]), example_inputs=example, batches=[1, 5], threads=[2, 1])
    assert {(one.threads, one.batch) for one in found.timings} == {(1, 1), (1, 5), (2, 1), (2, 5)} and torch.get_num_threads() == 1
    assert {threads: report.threads for threads, report in found.sparse.items()} == {1: 1, 2: 2}
    assert {one.batch for one in found.timings} == {1, 5} and "shrunk" not in found.bytes
    seen = []

    def run(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(batch.shape[0])
        return model(batch, torch.ones(batch.shape[0]))

    nettrim.bench(Weighted(), example_inputs=samples(2, 8), batches=[4], threads=[1], forward_fn=run)
    assert 4 in seen


def test_a_network_without_a_dense_layer_is_given_its_dtype() -> None:
    sparse = nettrim.to_sparse(pruned(16, 16), layers=["0"])
    nettrim.bench(sparse, sparse, example_inputs=samples(2, 16).double(), batches=[2], threads=[1])


def test_what_cannot_be_run_is_refused() -> None:
    with pytest.raises(ArgumentError, match="what a Weighted is called with cannot be guessed; give example_inputs"):
        nettrim.bench(Weighted())
    with pytest.raises(ArgumentError, match="Sequential is called with"):
        nettrim.bench(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(CalibrationError, match="could not run"):
        nettrim.bench(chain(4, 3), example_inputs=samples(2, 5))
    with pytest.raises(CalibrationError, match="could not run"):
        nettrim.bench(chain(4, 3), chain(5, 3))
    for batches in ([], [0], [True], [1.5]):
        with pytest.raises(ArgumentError, match="batches="):
            nettrim.bench(chain(4, 3), batches=batches)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"threads=\[-1\]"):
        nettrim.bench(chain(4, 3), threads=[-1])
    with pytest.raises(ArgumentError, match="dense is a str"):
        nettrim.bench(chain(4, 3), "dense")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="model is a NoneType"):
        nettrim.bench(None)  # type: ignore[arg-type]
