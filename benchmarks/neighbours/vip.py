"""PLS + VIP (Jordao, Kloss, Yamada, Schwartz: Pruning deep neural networks using partial least squares, arXiv 1810.07610).

Partial least squares from the outputs of all hidden units to the classes; a unit's importance is ``VIP_j = √(p Σ_a SS_a (w_ja / ‖w_a‖)² / Σ_a
SS_a)``, with ``SS_a = ‖q_a‖² ‖t_a‖²`` what component a explains of the classes (their eq. 1). Units of least importance go, over all layers.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.data import DataError
from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_units

SAMPLES = 2000
COMPONENTS = 9  # one less than the classes


def importance(features: Tensor, labels: Tensor, components: int) -> Tensor:
    """VIP of every feature.

    Parameters
    ----------
    features : Tensor, shape (samples, p)
    labels : Tensor, shape (samples,)
    components : int

    Returns
    -------
    Tensor, shape (p,)
        Their mean square is 1.

    Raises
    ------
    DataError
        scikit-learn is not installed.
    """
    try:
        from sklearn.cross_decomposition import PLSRegression
    except ImportError as error:
        raise DataError("PLS + VIP needs scikit-learn: pip install 'nettrim[demo]'.") from error
    pls = PLSRegression(components).fit(features.double().numpy(), functional.one_hot(labels).double().numpy())
    explained = torch.from_numpy((pls.y_loadings_**2).sum(axis=0) * (pls.x_scores_**2).sum(axis=0))
    weights = torch.from_numpy(pls.x_weights_)
    shares = (weights / weights.norm(dim=0)).square()
    return (len(weights) * (shares * explained).sum(dim=1) / explained.sum()).sqrt()


@torch.no_grad()
def hidden_outputs(model: nn.Sequential, inputs: Tensor) -> dict[str, Tensor]:
    """What is behind the ReLU of each hidden layer of a chain, (samples, units): the maximum over positions for filters."""
    found: dict[str, Tensor] = {}
    names = {name for name, _ in hidden_units(model)}
    x, current = inputs, None
    for name, module in model.named_children():
        x = module(x)
        if name in names:
            current = name
        elif current and isinstance(module, nn.ReLU):
            found[current] = x.flatten(2).amax(dim=2) if x.dim() > 2 else x
            current = None
    return found


def run(task: Task) -> Outcome:
    """Train, remove the units of least importance, retrain."""
    model = task.trained()
    outputs = hidden_outputs(model, task.inputs[:SAMPLES])
    scores = importance(torch.cat(list(outputs.values()), dim=1), task.labels[:SAMPLES], COMPONENTS)
    each = scores.split([output.shape[1] for output in outputs.values()])
    return prune_units(task, model, dict(zip(outputs, each, strict=True)))


METHODS = (Method("PLS + VIP", run, "criterion"),)
