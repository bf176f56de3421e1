"""Nonconvex sparse group lasso (Bui, Park, Zhang, Qi, Xin, Front. Appl. Math. Stat. 2021, doi 10.3389/fams.2020.529564).

``L + λ (Σ_g √n_g ‖W_g‖₂ + ‖W‖₀)``, g the output channels, by variable splitting (Algorithm 1): ``min_W L + λ Σ_g √n_g ‖W_g‖₂ + ½β ‖W − V‖²`` by a
few steps of the optimiser, then ``V = argmin λ‖V‖₀ + ½β ‖V − W‖²``, a hard threshold at ``√(2λ/β)``, while β grows. The zeros are V's.
"""

import torch

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from nettrim import penalties

PENALTY = 5e-6
COUPLING = 1e-2  # β at first
GROWTH = 4.0  # of β, in all
EVERY = 50  # steps between two V


def run(task: Task) -> Outcome:
    """Train by the splitting, put V in the place of W, retrain with its zeros held."""
    model = task.build()
    coupling = COUPLING
    copies = {name: weight.detach().clone() for name, weight in penalties.weights(model).items()}

    def penalty():
        distance = torch.stack([(weight - copies[name]).square().sum() for name, weight in penalties.weights(model).items()]).sum()
        return PENALTY * penalties.incoming_groups(model, by_size=True) + coupling / 2 * distance

    def split(step: int) -> None:
        if step % EVERY == 0:
            for name, weight in penalties.weights(model).items():
                copies[name] = penalties.hard_threshold(weight, PENALTY, coupling)

    def grow(epoch: int) -> None:
        nonlocal coupling
        coupling *= GROWTH ** (1 / task.training)

    task.fit(model, task.training, penalty=penalty, after_step=split, after_epoch=grow)
    with torch.no_grad():
        for weight in penalties.weights(model).values():
            weight.copy_(penalties.hard_threshold(weight, PENALTY, coupling))
    task.fit(model, task.retraining, masks=zeros(model), learning_rate=5e-4)
    return outcome(model, coupling=coupling)


METHODS = (Method("sparse group lasso", run, "penalty", auto=True),)
