"""What several test files share: one trained network."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from networks import chain, train
from torch import Tensor, nn

from nettrim import dispatch

# on networks this small a second thread only waits; and the same number everywhere makes sums the same, bit for bit
torch.set_num_threads(1)

# the suite's is short and tries the same examples each time; `pytest --hypothesis-profile=nightly tests/test_properties.py` is the long one
settings.register_profile("suite", max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
settings.register_profile("nightly", max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits: images (samples, 64) in [0, 1], and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


@pytest.fixture(scope="session")
def digits_network(digits: tuple[Tensor, Tensor]) -> tuple[nn.Sequential, Tensor, Tensor, Tensor]:
    """A trained 64-32-24-10 ReLU network, 300 calibration images, and test images with their labels. Not to be written into."""
    images, labels = digits
    model = train(chain(64, 32, 24, 10), images[:1200], labels[:1200], steps=150)
    assert isinstance(model, nn.Sequential)
    return model, images[:300], images[1200:], labels[1200:]


@pytest.fixture
def solves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by one with every layer that is given to a solver."""
    given: list[int] = []
    solve = dispatch._solve
    monkeypatch.setattr(dispatch, "_solve", lambda *args: (given.append(1), solve(*args))[1])
    return given
