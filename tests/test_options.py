"""Arguments in the number types of other libraries mean what they say, here, in the report and to ``nettrim.verify``; ranges are checked early."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import chain, same_bits, samples, state_of
from torch import Tensor, nn

import nettrim

INPUTS = samples(80, 8)
NUMBERS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"epsilon": np.float32(0.25)}, {"epsilon": 0.25}),
    ({"epsilon": {"0": np.float64(0.25), nn.Linear: Fraction(1, 2)}}, {"epsilon": {"0": 0.25, nn.Linear: 0.5}}),
    ({"sparsity": Fraction(1, 2), "holdout": np.float32(0.25)}, {"sparsity": 0.5, "holdout": 0.25}),
    ({"epsilon": 0.25, "gamma": np.float32(1.25), "tol": np.float32(2**-10)}, {"epsilon": 0.25, "gamma": 1.25, "tol": 2**-10}),
    ({"sparsity": 0.5, "max_rows": np.int64(40), "seed": np.int32(3)}, {"sparsity": 0.5, "max_rows": 40, "seed": 3}),
    ({"epsilon": 0.25, "penalty": "l1", "max_iter": np.int64(500), "reweight": np.uint8(1)}, {"epsilon": 0.25, "max_iter": 500, "reweight": 1}),
)


@pytest.mark.parametrize(("given", "plain"), NUMBERS, ids=lambda options: ", ".join(options))
def test_numbers_of_other_libraries(given: dict[str, Any], plain: dict[str, Any], tmp_path: Path) -> None:
    model = chain(8, 10, 4)
    result, same = nettrim.prune(model, INPUTS, **given), nettrim.prune(model, INPUTS, **plain)
    assert same_bits(state_of(result.model), state_of(same.model))
    assert result.report.options == same.report.options
    kept = result.report.options.values()
    assert all(type(value) in (int, float, str, bool, dict, type(None)) for value in kept)
    result.report.to_json(tmp_path / "report.json")
    for report in (result.report, nettrim.Report.from_json(tmp_path / "report.json")):
        assert nettrim.verify(model, result.model, INPUTS, report, bounds=False).holds


@pytest.mark.parametrize("seed", (-1, 2**63, 2**70, np.int64(-5), math.nan), ids=str)
def test_seeds_that_no_generator_takes(seed: Any) -> None:
    with pytest.raises(nettrim.ArgumentError, match=r"seed=.*expected a whole number from 0 to 2\*\*63 - 1"):
        nettrim.prune(chain(8, 10, 4), INPUTS, epsilon=0.2, seed=seed)


@pytest.mark.parametrize("options", ({"epsilon": 0.2, "max_rows": 60}, {"sparsity": 0.5}), ids=str)
def test_the_largest_seed(options: dict[str, Any]) -> None:
    assert nettrim.prune(chain(8, 10, 4), INPUTS, seed=2**63 - 1, **options).report.options["seed"] == 2**63 - 1


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c, self.t, self.d = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.d(torch.relu(self.t(torch.relu(self.c(x)))).flatten(1))


class Inferring(Convolved):
    @torch.inference_mode()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_convolutions_in_a_forward_under_inference_mode() -> None:
    images = samples(30, 36).view(-1, 1, 6, 6)
    result, plain = (nettrim.prune(kind(), images, epsilon=0.2) for kind in (Inferring, Convolved))
    assert same_bits(state_of(result.model), state_of(plain.model))
    assert result.report.certificate == plain.report.certificate
