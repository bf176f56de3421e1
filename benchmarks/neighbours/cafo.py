"""The Cascaded Forward algorithm (Zhao, Wang, Li, Jin, Lang, Ling: The cascaded forward algorithm for neural network training, arXiv 2303.09728).

Blocks one behind the other, each with a predictor of the classes of its own; no gradient goes from block to block, and what the network says is the
sum of what the predictors say. A block is a linear layer and its ReLU here, trained by direct feedback alignment (their CaFo + DFA): the error of the
block's predictor comes back through a fixed random matrix. A predictor is ridge regression on one-hot classes, in closed form (their CaFo-MSE),
each by itself.
Each block and each predictor is a layer program for `nettrim.prune`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.neighbours.contract import Method, Outcome, Task, zeros

RIDGE = 1e-3  # of the mean square of a feature
STEP = 1e-3


class Cascade(nn.Module):
    """Blocks and their predictors; the output is the predictors' sum.

    Parameters
    ----------
    widths : list of int
        Of the input and of the blocks.
    classes : int
    """

    def __init__(self, widths: list[int], classes: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True))
        self.predictors = nn.ModuleList(nn.Linear(b, classes) for b in widths[1:])
        self.hidden_layers = [f"blocks.{place}" for place in range(len(self.blocks))]

    def forward(self, x: Tensor) -> Tensor:
        total = 0
        for block, predictor in zip(self.blocks, self.predictors, strict=True):
            x = block(x).relu()
            total = total + predictor(x)
        return total


@torch.no_grad()
def fit_predictor(predictor: nn.Linear, features: Tensor, targets: Tensor) -> None:
    """``argmin ‖X Wᵀ + b − T‖² + ridge ‖W‖²``, the bias free, in closed form."""
    X, T = features.double(), targets.double()
    x_mean, t_mean = X.mean(dim=0), T.mean(dim=0)
    centred = X - x_mean
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    W = torch.linalg.solve(gram, centred.T @ (T - t_mean)).T
    predictor.weight.copy_(W)
    predictor.bias.copy_(t_mean - W @ x_mean)


@torch.no_grad()
def feedback_gradients(block: nn.Linear, predictor: nn.Linear, feedback: Tensor, x: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands for the gradients of a block's weight and bias, ``((E F) ∘ [z > 0])ᵀ x`` and its sum, and the true ones of its predictor's.

    Parameters
    ----------
    block, predictor : nn.Linear
    feedback : Tensor, shape (classes, units)
        F, in the place of the predictor's weight.
    x : Tensor, shape (samples, inputs)
    wanted : Tensor, shape (samples, classes)
        One-hot classes; ``E = (softmax − wanted) / samples``.
    """
    z = block(x)
    h = z.relu()
    error = (predictor(h).softmax(dim=1) - wanted) / len(x)
    back = (error @ feedback) * (z > 0)
    return back.T @ x, back.sum(dim=0), error.T @ h, error.sum(dim=0)


@torch.no_grad()
def train_block(block: nn.Linear, inputs: Tensor, labels: Tensor, classes: int, epochs: int, batch_size: int) -> None:
    """Direct feedback alignment of one block with a linear softmax predictor of its own, which is thrown away."""
    feedback = torch.randn(classes, block.out_features) / classes**0.5
    predictor = nn.Linear(block.out_features, classes)
    parameters = [block.weight, block.bias, predictor.weight, predictor.bias]
    optimizer = torch.optim.Adam(parameters, lr=STEP)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(batch_size):
            gradients = feedback_gradients(block, predictor, feedback, inputs[batch], functional.one_hot(labels[batch], classes))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()


def run(task: Task) -> Outcome:
    """Block by block, the epochs in equal parts, the first blocks with one more where they do not go; prune nothing."""
    linear = [module for module in task.build() if isinstance(module, nn.Linear)]
    widths = [linear[0].in_features, *[module.out_features for module in linear[:-1]]]
    classes = task.data.classes
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(task.seed)
        model = Cascade(widths, classes)
        x = task.inputs
        target = functional.one_hot(task.labels, classes).float()
        for place, (block, predictor) in enumerate(zip(model.blocks, model.predictors, strict=True)):
            each, more = divmod(task.epochs, len(model.blocks))
            epochs = each + (place < more)
            train_block(block, x, task.labels, classes, epochs, task.batch)
            task.spent += epochs
            x = block(x).relu()
            fit_predictor(predictor, x, target)
    model.eval()
    return Outcome(model, zeros(model), start=Cascade(widths, classes))


METHODS = (Method("CaFo", run, "depth"),)
