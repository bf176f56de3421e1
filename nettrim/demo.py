"""The demonstration: a small ReLU network on handwritten digits, pruned in both modes and with both sets."""

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from nettrim.errors import NetTrimError
from nettrim.prune import ProgressEvent, PruneResult, prune

EPOCHS = 40
BATCH = 64
TEST_SHARE = 0.2
# (mode, consistency) of each run; the last one is what `nettrim.prune` does by default, and what is written
RUNS = (("parallel", "paper"), ("parallel", "relaxed"), ("cascade", "paper"), ("cascade", "relaxed"))


@dataclasses.dataclass(frozen=True)
class Digits:
    """Handwritten digits: images (samples, 64) with grey levels in [0, 1], labels (samples,) in 0..9."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclasses.dataclass(frozen=True)
class Run:
    """One pruned network and its accuracy on the test images, a share in [0, 1]."""

    mode: str
    consistency: str
    result: PruneResult
    accuracy: float


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread: on a network this small the others only wait, and stall it where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_digits() -> Digits:
    """Return scikit-learn's 1,797 digits, a fifth of them for testing; the split is always the same.

    Raises
    ------
    NetTrimError
        scikit-learn is not installed.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise NetTrimError(
            "the demo needs scikit-learn, which is not installed; install it with: pip install 'nettrim[demo]'"
        ) from error
    images, labels = datasets.load_digits(return_X_y=True)
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images / 16.0, labels, test_size=TEST_SHARE, random_state=0, stratify=labels
    )
    return Digits(
        torch.as_tensor(train_images, dtype=torch.float32),
        torch.as_tensor(train_labels),
        torch.as_tensor(test_images, dtype=torch.float32),
        torch.as_tensor(test_labels),
    )


def train(digits: Digits, seed: int, epochs: int, on_epoch: Callable[[], None] = lambda: None) -> nn.Sequential:
    """Train a 64-128-64-10 network with Adam; the same seed gives the same network.

    Parameters
    ----------
    digits : Digits
    seed : int
        Of the initial weights and of the order of the samples. The caller's random state is left as it was.
    epochs : int
    on_epoch : callable
        Called after each epoch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
        names = ("hidden1", "relu1", "hidden2", "relu2", "output")
        model = nn.Sequential(collections.OrderedDict(zip(names, layers, strict=True)))
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(digits.train_images)).split(BATCH):
                loss = nn.functional.cross_entropy(model(digits.train_images[rows]), digits.train_labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            on_epoch()
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the test images that `model` labels right, in [0, 1]."""
    with torch.no_grad():
        return (model(digits.test_images).argmax(dim=1) == digits.test_labels).double().mean().item()


def runs(
    model: nn.Module, digits: Digits, epsilon: float, seed: int, on_layer: Callable[[str, float], None]
) -> Iterator[Run]:
    """Prune a copy of `model` once for each of `RUNS`, from the training images without their labels.

    Parameters
    ----------
    model : torch.nn.Module
        Left as it is.
    digits : Digits
    epsilon : float
        Budget relative to the norm of a layer's output.
    seed : int
    on_layer : callable
        Called after each layer with a line that says which, and with how many runs are done, the present one in part.

    Raises
    ------
    NetTrimError
        From `nettrim.prune`.
    """
    for before, (mode, consistency) in enumerate(RUNS):

        def report(event: ProgressEvent, before: int = before, run: str = f"{mode}/{consistency}") -> None:
            on_layer(f"{run}: {event.layer} {event.status}", before + event.index / event.total)

        result = prune(
            model,
            digits.train_images,
            epsilon=epsilon,
            mode=mode,
            consistency=consistency,
            penalty="l1",  # the program that both sets have
            seed=seed,
            progress=report,
        )
        yield Run(mode, consistency, result, accuracy(result.model, digits))
