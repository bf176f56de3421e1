"""Calibration data in every form that it comes in, split by samples, and given to the model by its signature."""

from collections import OrderedDict, UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from nettrim import calibration
from nettrim.errors import ArgumentError, CalibrationError

X, LABELS = torch.randn(10, 4), torch.arange(10)


def generator() -> Iterator[Tensor]:
    yield X[:4]
    yield X[4:]


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.numpy(),
        (X, LABELS),
        (X.numpy(), LABELS.numpy()),
        {"x": X},
        UserDict(x=X, labels=LABELS),
        [X[:3], X[3:]],
        [(X[:3], LABELS[:3]), (X[3:], LABELS[3:])],
        [[X[:3].numpy(), LABELS[:3].numpy()], [X[3:].numpy(), LABELS[3:].numpy()]],
        generator(),
        TensorDataset(X, LABELS),
        DataLoader(TensorDataset(X, LABELS), batch_size=4),
        [X[:0], X],
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_form_gives_the_same_samples_to_the_model(data: Any) -> None:
    found = calibration.batches(data)
    assert sum(calibration.sample_count(batch) for batch in found) == 10
    assert all(calibration.sample_count(batch) for batch in found)
    seen = []
    for batch in found:
        args, kwargs = calibration.arguments(OneInput(), batch)
        seen.append(args[0] if args else kwargs["x"])
        assert len(args) + len(kwargs) == 1
    assert torch.equal(torch.cat(seen), X)


def test_one_big_batch_is_cut_into_pieces_but_given_batches_are_kept() -> None:
    big, labels, mask = torch.randn(2500, 3), torch.arange(2500), torch.ones(3)
    pieces = calibration.batches((big, labels, mask))
    assert [calibration.sample_count(piece) for piece in pieces] == [1024, 1024, 452]
    assert torch.equal(torch.cat([piece[0] for piece in pieces]), big)
    assert torch.equal(torch.cat([piece[1] for piece in pieces]), labels)
    assert all(torch.equal(piece[2], mask) for piece in pieces)
    assert len(calibration.batches([big])) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no calibration sample"),
        (X[:0], "no calibration sample"),
        (iter(()), "no calibration sample"),
        (torch.tensor(1.0), "batch 0 is a Tensor without a tensor of samples"),
        ([X, "text"], "batch 1 is a str without a tensor"),
        ((1, 2), "batch 0 is a tuple without a tensor"),
        (np.array(["a"], dtype=object), "dtype object"),
        ("text", "type str"),
        (5, "type int"),
        (None, "type NoneType"),
        ([X, X[:, :3]], r"batch 1 \(float32 \(10, 3\)\) does not fit batch 0 \(float32 \(10, 4\)\)"),
        ([X[:0], X, X[0]], "batch 2 .* does not fit batch 1"),
        ([X, LABELS], "give one .inputs, labels. as a tuple"),
        ([(X, LABELS), X], "batch 1"),
    ],
)
def test_unusable_data_is_refused_with_what_was_given(data: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        calibration.batches(data)


def test_tokens_may_differ_in_length() -> None:
    assert len(calibration.batches([torch.ones(2, 7, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)])) == 2


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    holdout=st.floats(0, 0.99),
    seed=st.integers(0, 50),
)
def test_split_keeps_every_sample_exactly_once(sizes: list[int], holdout: float, seed: int) -> None:
    ids = torch.arange(sum(sizes)).split(sizes)
    found = calibration.batches(
        [{"x": i[:, None].float(), "more": (i, [i * 2]), "fixed": torch.tensor(3)} for i in ids]
    )
    solve, out = calibration.split(found, holdout, seed)
    solved, kept_out = (
        torch.cat([torch.empty(0, dtype=torch.long), *(b["more"][0] for b in part)]) for part in (solve, out)
    )
    assert torch.equal(kept_out, calibration.holdout_indices(found, holdout, seed))
    assert torch.equal(torch.cat([solved, kept_out]).sort().values, torch.arange(sum(sizes)))
    assert len(solved) >= 1 and abs(len(kept_out) - holdout * sum(sizes)) <= 1
    for batch in solve + out:
        assert torch.equal(batch["x"][:, 0].long(), batch["more"][0]) and torch.equal(
            batch["more"][1][0], batch["more"][0] * 2
        )


def test_split_is_the_same_for_a_seed_and_needs_a_share() -> None:
    found = calibration.batches(torch.randn(50, 2))
    draws = [calibration.holdout_indices(found, 0.2, seed) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2]) and len(draws[0]) == 10
    assert calibration.split(found, 0.0) == (found, [])
    assert calibration.split(calibration.batches(torch.randn(1, 2)), 0.9)[1] == []
    for share in (-0.1, 1, float("nan"), True):
        with pytest.raises(ArgumentError, match="share in"):
            calibration.split(found, share)


class OneInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, scale: Tensor, bias: int = 0, labels: Any = None, more: Any = None) -> Any:
        return x, scale, bias, labels, more


class NeedsLabels(nn.Module):
    def forward(self, x: Tensor, labels: Tensor) -> Any:
        return x, labels


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


@pytest.mark.parametrize(
    ("model", "batch", "args", "kwargs"),
    [
        (OneInput(), 1, (1,), {}),
        (OneInput(), (1, 2), (1,), {}),
        (OneInput(), ((1, 2), 3), ((1, 2),), {}),
        (OneInput(), [1], (1,), {}),
        (nn.Sequential(nn.ReLU()), (1, 2), (1,), {}),
        (nn.DataParallel(OneInput()), (1, 2), (1,), {}),
        (TwoInputs(), (1, 2), (1, 2), {}),
        (TwoInputs(), (1, 2, 3, 4, 5, 6), (1, 2, 3), {}),
        (NeedsLabels(), (1, 2, 3), (1, 2), {}),
        (Anything(), (1, 2), (1, 2), {}),
        (OneInput(), {"x": 1, "y": 2, "labels": 3}, (), {"x": 1}),
        (TwoInputs(), OrderedDict(x=1, labels=3, scale=2), (), {"x": 1, "scale": 2}),
        (NeedsLabels(), {"x": 1, "labels": 3, "label": 4}, (), {"x": 1, "labels": 3}),
        (Anything(), {"x": 1, "y": 2, "labels": 3, "target": 4}, (), {"x": 1, "y": 2}),
    ],
)
def test_the_signature_decides_what_the_model_is_given(
    model: nn.Module, batch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    assert calibration.arguments(model, batch) == (args, kwargs)


def test_a_mapping_without_any_key_of_the_model_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"keys \['ids', 'labels'\], none of which OneInput.forward takes \(x\)"):
        calibration.arguments(OneInput(), {"ids": 1, "labels": 2})


def test_run_moves_and_casts_and_never_changes_the_data() -> None:
    run = calibration.runner()
    model = nn.Sequential(nn.Linear(4, 2).double(), nn.ReLU(inplace=True))
    assert torch.equal(run(model, X), model(X.double()))
    ints = run(nn.Sequential(nn.Embedding(10, 3).half()), (LABELS, LABELS))
    assert ints.shape == (10, 3)
    before = X.clone()
    run(nn.ReLU(inplace=True), X)
    assert torch.equal(X, before)


def test_forward_fn_is_given_the_whole_batch_uncast() -> None:
    run = calibration.runner(lambda model, batch: (model, batch))
    model = nn.Linear(4, 2)
    given_model, (x, labels) = run(model, (X.double(), LABELS))
    assert given_model is model and x.dtype == torch.float64 and torch.equal(labels, LABELS)


def test_a_batch_that_cannot_be_run_is_named_and_chained() -> None:
    with pytest.raises(
        CalibrationError, match=r"Linear could not run calibration batch 7 \(\(float32 \(10, 4\), .*shapes"
    ) as caught:
        calibration.run_batch(nn.Linear(3, 2), (X, LABELS), 7, calibration.runner())
    assert isinstance(caught.value.__cause__, RuntimeError)
