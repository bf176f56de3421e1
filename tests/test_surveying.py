"""Networks of blocks are traced on one batch where that says it all, and what the others do is compared when they are run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn
from torch.nn import functional as F

import nettrim
from nettrim import calibration
from nettrim.errors import RouteError
from nettrim.surveying import survey
from nettrim.tracing import Trace, trace

RUN = calibration.runner()
ASKED: dict[str, Any] = {"sparsity": 0.5, "allocation": "uniform", "fidelity": "layer", "holdout": 0.0, "targets": "blocks.*"}
Inner = Callable[[Any, Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, inner: Inner) -> None:
        super().__init__()
        self.a, self.b, self.c, self.inner = nn.Linear(10, 12), nn.Linear(12, 12), nn.Linear(12, 10), inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self, x)


class Stack(nn.Module):
    def __init__(self, inner: Inner) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.blocks = nn.Embedding(23, 10), nn.Sequential(*(Block(inner) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.enter(tokens))))


def plain(block: Any, x: Tensor) -> Tensor:
    return x + block.c(block.b(F.relu(block.a(x))).tanh())


def data(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(23, (4, length), generator=generator) for length in lengths or (6, 6, 5, 6)]


def surveyed(model: nn.Module, batches: list[Any], **asked: Any) -> Trace:
    given: dict[str, Any] = {"blocks": "auto", "spread": False, "targets": "blocks.*", "ignore": [], **asked}
    return survey(model, batches, [], RUN, **given)[0]


def facts(found: Trace) -> list[tuple[Any, ...]]:
    fields = ("name", "function", "norm", "reads", "reads_alone", "skip_reason", "spread", "rows", "summed")
    return [tuple(getattr(layer, field) for field in fields) for layer in found.layers]


def test_one_batch_says_what_all_would() -> None:
    model, batches = Stack(plain), data()
    found, whole = surveyed(model, batches), trace(model, batches, RUN)
    assert found.of_first and not whole.of_first
    assert facts(found) == facts(whole) and [layer.rows for layer in found.layers] == [92] * 10
    assert found.skipped == whole.skipped and found.not_chain_reason == whole.not_chain_reason
    blocks, asked = nettrim.prune(model, batches, **ASKED), nettrim.prune(model, batches, **ASKED, blocks=None)
    assert blocks.report.options["blocks"] == "blocks: 3 blocks"
    assert same_bits(state_of(blocks.model), state_of(asked.model))
    assert nettrim.verify(model, blocks.model, batches, blocks.report, bounds=False).holds


def test_a_layer_that_did_not_run_is_said_to_have_run_in_no_first_batch() -> None:
    model = Stack(plain)
    for block in model.blocks:
        block.spare = nn.Linear(3, 3)
    result = nettrim.prune(model, data(), **ASKED)
    assert result.report.skipped["blocks.1.spare"] == "never ran in the first calibration batch"
    assert nettrim.verify(model, result.model, data(), result.report, bounds=False).holds


def test_dense_blocks_run_once_for_each_batch_and_a_few_times_for_the_first() -> None:
    def runs(count: int) -> int:
        seen = 0

        def counted(block: Any, x: Tensor) -> Tensor:
            nonlocal seen
            seen += 1
            return plain(block, x)

        nettrim.prune(Stack(counted), data(*[6] * count), **ASKED)
        return seen

    few, more, most = runs(2), runs(3), runs(4)
    assert more - few == most - more == 3 * 4  # three blocks: the dense one, and the pruned one up to each of its layers


@pytest.mark.parametrize(
    ("asked", "batches"),
    [({"targets": None}, data()), ({"blocks": None}, data()), ({"spread": True}, data()), ({}, data(6)), ({"targets": "head"}, data())],
    ids=["the head too", "no blocks", "an executor", "one batch", "the head alone"],
)
def test_else_every_batch_is_traced(asked: dict[str, Any], batches: list[Tensor]) -> None:
    model = Stack(plain)
    found = surveyed(model, batches, **asked)
    assert not found.of_first and facts(found) == facts(trace(model, batches, RUN))


def test_a_chain_has_a_bound_about_every_batch() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()) for _ in range(3)))
    batches = list(samples(40, 8).split(10))
    assert not surveyed(model, batches, targets=None).of_first
    assert nettrim.prune(model, batches, epsilon=0.2).report.certificate.guaranteed is not None


def test_recurrent_layers_in_blocks_are_looked_at_before() -> None:
    class Recurrent(Block):
        def __init__(self) -> None:
            super().__init__(lambda block, x: x + block.lstm(x)[0])
            self.lstm = nn.LSTM(10, 10, batch_first=True)

    model = Stack(plain)
    model.blocks = nn.Sequential(Recurrent(), Recurrent())
    assert not surveyed(model, data()).of_first


def decided(h: Tensor) -> bool:
    return float(h.sum()) > -1e9


class Odd(Exception):
    pass


def caught(h: Tensor) -> bool:
    try:
        torch.linalg.cholesky(h[0].T @ h[0] - 1e9 * torch.eye(12))
    except torch.linalg.LinAlgError:
        return True
    return False


READINGS: dict[str, Callable[[Tensor], Any]] = {
    "a number": lambda h: h.sum().item() > -1e9,
    "truth": lambda h: bool((h > -1e9).all()),
    "equality": lambda h: torch.equal(h, h),
    "closeness": lambda h: torch.allclose(h, h),
    "a list": lambda h: h.tolist()[0][0][0] > -1e9,
    "an array": lambda h: h.numpy().sum() > -1e9,
    "indices": lambda h: len(h.nonzero()) > 0,
    "a selection": lambda h: len(h[h > 0]) > 0,
    "text": lambda h: "nan" not in repr(h),
    "a format": lambda h: f"{h.sum()}" != "nan",
    "parts": lambda h: len(h.flatten().tensor_split(h.flatten().argsort()[:2].sort().values)) == 3,
    "a count of a sparse tensor": lambda h: h[0].to_sparse()._nnz() > 0,
    "an error": caught,
    "lengths": lambda h: len(nn.utils.rnn.pack_padded_sequence(h, (h.abs().sum((1, 2)) > 0).long() * h.shape[1], batch_first=True).data) > 0,
}


@pytest.mark.parametrize("name", READINGS)
def test_where_values_may_decide_every_batch_is_traced(name: str) -> None:
    def inner(block: Any, x: Tensor) -> Tensor:
        h = block.a(x)
        return x + block.c(block.b(h) if READINGS[name](h) else h)

    model, batches = Stack(inner), data()
    found = surveyed(model, batches)
    assert not found.of_first and facts(found) == facts(trace(model, batches, RUN))


def test_values_before_the_first_layer_decide_nothing_that_is_not_compared() -> None:
    model = Stack(plain)
    model.enter.register_forward_hook(lambda module, args, out: out if decided(out) else None)
    assert surveyed(model, data()).of_first


def by_count(wrong: Callable[[Any, Tensor], Tensor], late: int) -> Inner:
    """The second block does something else from its so manieth call on."""

    def inner(block: Any, x: Tensor) -> Tensor:
        block.calls = getattr(block, "calls", 0) + 1
        return wrong(block, x) if getattr(block, "odd", False) and block.calls > late else plain(block, x)

    return inner


WRONG: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "another function": (lambda block, x: x + block.c(block.b(F.gelu(block.a(x))).tanh()), "blocks.1.a"),
    "another order": (lambda block, x: x + block.c(block.a(x + block.b(block.a(x))[..., :10] * 0)), "blocks.1"),
    "no sum": (lambda block, x: block.c(block.b(F.relu(block.a(x))).tanh()), "blocks.1.c"),
    "weights of its own": (lambda block, x: plain(block, x) + 0 * block.b.weight.sum(), "blocks.1.b"),
    "fewer rows": (lambda block, x: torch.cat([plain(block, x[:3]), x[3:]]), "blocks.1.a"),
    "another reader": (lambda block, x: (lambda h: x + block.c(block.b(h).tanh()) + 0 * h.sum())(F.relu(block.a(x))), "blocks.1.a"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_block_that_runs_otherwise_in_a_later_batch_is_an_error(name: str) -> None:
    wrong, layer = WRONG[name]
    model = Stack(by_count(wrong, 0))
    nettrim.prune(model, data(), **ASKED, blocks="blocks")  # none is odd
    calls = 0

    def counted(block: Any, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return plain(block, x)

    # how often the second block runs before its second batch is observed
    other, before = Stack(counted), state_of(model)
    other.blocks[0].inner = other.blocks[2].inner = plain  # type: ignore[union-attr]
    together = nettrim.taking.together

    def stopping(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for index, found in enumerate(together(module, *args, **kwargs)):
            if module is other.blocks[1] and index == 0:
                raise Odd
            yield found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nettrim.taking, "together", stopping)
        with pytest.raises(Odd):
            nettrim.prune(other, data(), **ASKED, blocks="blocks")
    model = Stack(by_count(wrong, calls))
    model.blocks[1].odd = True  # type: ignore[union-attr]
    with pytest.raises((RouteError, nettrim.errors.CalibrationError), match=f"{layer}.*(blocks=None|batch 1)"):
        nettrim.prune(model, data(), **ASKED, blocks="blocks")
    assert same_bits(state_of(model), before)


def test_what_layers_compute_stays_in_the_models_own_caches() -> None:
    """A cache by length, as of position biases: of the values that the network itself puts there."""

    class Caching(Stack):
        def forward(self, tokens: Tensor) -> Tensor:
            x = self.enter(tokens)
            if x.shape[1] not in self.cache:
                self.cache[x.shape[1]] = self.head(x[:1].detach())
            return self.head(self.norm(self.blocks(x))) + self.cache[x.shape[1]]

    model: Any = Caching(plain)
    model.cache = {}
    batches = data(5, 6, 7)
    expected = [model(batch).detach() for batch in batches]
    model.cache.clear()
    nettrim.prune(model, batches, **ASKED)
    assert all(torch.equal(model(batch), out) for batch, out in zip(batches, expected, strict=True))


def test_a_batch_that_a_late_block_refuses_is_named() -> None:
    with pytest.raises(calibration.CalibrationError, match="calibration batch 2"):
        nettrim.prune(Stack(plain), [*data(6, 6), torch.full((4, 6), 99)], **ASKED)


def test_small_chains_are_not_blocks() -> None:
    model = chain(8, 10, 4)
    assert not surveyed(model, list(samples(40, 8).split(10)), targets=None).of_first
