"""DropNeuron (Pan, Dong, Guo: Simplifying the structure of deep neural networks, arXiv 1606.07326).

``L + λ₁ Σ|w| + λ_li Σ_ℓ Σ_i ‖W_i·‖₂ + λ_lo Σ_ℓ Σ_j ‖W_·j‖₂`` (section 3.1): incoming and outgoing connections of a neuron go to 0 together, so that
it can be dropped. Adam comes near 0 and not to it: what is small is cut afterwards, groups and weights by one threshold.
"""

from benchmarks.neighbours.contract import Method, Outcome, Task
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria, penalties

L1 = 1e-5
LI = 1e-4
LO = 1e-4


def run(task: Task, li: float, lo: float) -> Outcome:
    """Train with the penalties, cut the smallest weights, retrain without penalties.

    Parameters
    ----------
    task : Task
    li, lo : float
        λ of the incoming and of the outgoing groups.
    """
    model = task.build()

    def penalty():
        total = L1 * penalties.l1(model)
        if li:
            total = total + li * penalties.incoming_groups(model)
        if lo:
            total = total + lo * penalties.outgoing_groups(model)
        return total

    task.fit(model, task.training, penalty=penalty)
    return prune_weights(task, model, criteria.magnitude)


METHODS = (
    Method("DropNeuron li", lambda task: run(task, LI, 0.0), "penalty"),
    Method("DropNeuron lo", lambda task: run(task, 0.0, LO), "penalty"),
    Method("DropNeuron li + lo", lambda task: run(task, LI, LO), "penalty"),
)
