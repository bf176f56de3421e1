"""Feature flow regularization (Wu, Lan, Zhang, Xiang: Feature flow regularization, arXiv 2106.02914; Neural Networks 2023).

``L + λ (Σ_ℓ ‖x_{ℓ+1} − x_ℓ‖ + c Σ_ℓ ‖x_{ℓ+1} − 2x_ℓ + x_{ℓ−1}‖)`` over the features x of adjacent hidden layers: a short and straight path needs
fewer units. Units of least ``‖W_i·‖₁`` are removed. How features of different widths are compared was not at hand: zeros fill the narrower.
"""

from torch import Tensor, nn

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.models import hidden_units
from benchmarks.neighbours.selection import prune_units
from nettrim import criteria, penalties

PENALTY = 1e-2
CURVATURE = 0.5


class Features:
    """The inputs of a chain and what is behind each of its ReLUs, of the last forward pass.

    Parameters
    ----------
    model : nn.Sequential
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.values: list[Tensor] = []
        self._hooks = [model.register_forward_pre_hook(lambda module, inputs: self.values.__setitem__(slice(None), [inputs[0]]))]
        for module in model:
            if isinstance(module, nn.ReLU):
                self._hooks.append(module.register_forward_hook(lambda module, inputs, output: self.values.append(output)))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def run(task: Task) -> Outcome:
    """Train with the path's length and curvature, remove units, retrain."""
    model = task.build()
    features = Features(model)
    task.fit(model, task.training, penalty=lambda: PENALTY * penalties.feature_flow(features.values, curvature=CURVATURE))
    features.remove()
    return prune_units(task, model, {layer: criteria.unit_norms(model.get_submodule(layer).weight) for layer, _ in hidden_units(model)})


METHODS = (Method("feature flow", run, "penalty", auto=True),)
