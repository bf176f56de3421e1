"""MARS projection (Gouk, Hospedales, Pontil: Distance-based regularisation of deep networks for fine-tuning, ICLR 2021, arXiv 2002.08253).

Fine-tune within ``max_i Σ_j |w_ij − w⁰_ij| ≤ γ`` of given weights, by a projection after every step (section 4): here around a pruned network's,
whose zeros stay. Pruned by magnitude first.
"""

from benchmarks.neighbours.contract import Method, Outcome, Task, outcome, zeros
from benchmarks.neighbours.selection import prune_weights
from nettrim import criteria, penalties

RADIUS = 1.0


def run(task: Task) -> Outcome:
    """Train, prune the smallest weights, fine-tune within the radius."""
    pruned = prune_weights(task, task.trained(), criteria.magnitude, retrain=False)
    model = pruned.model
    reference = {name: weight.detach().clone() for name, weight in penalties.weights(model).items()}

    def project(step: int) -> None:
        penalties.project_rows(model, reference, RADIUS)

    task.fit(model, task.retraining, masks=zeros(model), after_step=project, learning_rate=5e-4)
    moved = max(float((weight - reference[name]).detach().abs().flatten(1).sum(dim=1).max()) for name, weight in penalties.weights(model).items())
    return outcome(model, share=pruned.notes["share"], moved=moved)


METHODS = (Method("magnitude + MARS", run, "penalty"),)
