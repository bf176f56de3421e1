"""Which neurons of a layer the next one needs least: backward elimination, each step the best there is.

With the next layer's inputs ``A`` (P, N), one column a neuron, and its dense pre-activations ``Y``, removing column j and refitting every output
costs

    Σ_m w_mj² / 2H_jj,    H = (AᵀA)⁻¹,  W = Yᵀ A H

and the refitted weights and the inverse without column j are ``W − w_j h_jᵀ / H_jj`` and ``H − h_j h_jᵀ / H_jj`` (block inversion; the optimal brain
surgeon's step, Hassibi and Stork, NIPS 1992, for a column of all outputs at once).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nettrim import capture, layers
from nettrim.calibration import Run
from nettrim.programs import LayerProgram
from nettrim.solvers.gram import gather
from nettrim.tracing import Trace, TracedLayer

_SINGULAR = 1e-8  # of the mean diagonal, added to AᵀA


def supports(
    model: nn.Module, trace: Trace, batches: list[Any], run: Run, shares: dict[str, float], device: torch.device | str | None
) -> dict[str, Tensor]:
    """The weights that may stay, (M, N) bool with the bias, of every layer that loses neurons or reads from one that does.

    An ``nn.Linear`` can lose neurons where one other ``nn.Linear`` is all that reads them, without a BatchNorm in between.
    """
    removed: dict[str, Tensor] = {}
    traced = {layer.name: layer for layer in trace.layers}
    for reader in trace.layers:
        name = reader.reads
        if name not in shares or not reader.reads_alone or not _plain(reader) or not _plain(traced[name]):
            continue
        A, Z = capture.rows(model, batches, run, reader.matrix, device=device)
        gram = gather(LayerProgram(A, Z, epsilon=1.0, activation=None))
        neurons = traced[name].matrix.shape[0]
        candidates = torch.ones(A.shape[1], dtype=torch.bool, device=A.device)
        candidates[neurons:] = False
        count = min(int(shares[name] * neurons + 0.5), neurons - 1)
        removed[name] = least_needed(gram.G, gram.C, count, candidates)[:neurons]
    found: dict[str, Tensor] = {}
    for layer in trace.layers:
        rows, columns = removed.get(layer.name), removed.get(layer.reads or "") if layer.reads_alone else None
        if rows is None and columns is None:
            continue
        mask = torch.ones_like(layers.as_matrix(layer.matrix), dtype=torch.bool)
        if rows is not None:
            mask[rows.to(mask.device)] = False
        if columns is not None:
            mask[:, : len(columns)] &= ~columns.to(mask.device)
        found[layer.name] = mask
    return found


def _plain(layer: TracedLayer) -> bool:
    """Whether column j of the layer that reads this one can be neuron j: of ``nn.Linear``, without a BatchNorm in between."""
    return isinstance(layer.module, nn.Linear) and layer.norm is None


def least_needed(G: Tensor, C: Tensor, count: int, candidates: Tensor) -> Tensor:
    """The columns to remove, (N,) bool.

    Parameters
    ----------
    G : Tensor, (N, N)
        ``AᵀA``, float64.
    C : Tensor, (M, N)
        ``YᵀA``, float64.
    count : int
        How many; at most as many as there are candidates.
    candidates : Tensor, (N,) bool
        The columns that may go (a column of ones may not).
    """
    live = G.diagonal() > 0
    removed = candidates & ~live  # they put out nothing
    if int(removed.sum()) >= count:
        return _first(removed, count)
    mean = float(G.diagonal()[live].mean()) if bool(live.any()) else 1.0
    shifted = G.clone()
    shifted.diagonal().add_(_SINGULAR * mean)
    H = torch.cholesky_inverse(torch.linalg.cholesky(shifted))
    W = C @ H
    for _ in range(count - int(removed.sum())):
        cost = W.square().sum(0) / H.diagonal()
        j = int(torch.where(candidates & ~removed, cost, torch.inf).argmin())
        removed[j] = True
        h, pivot = H[j].clone(), float(H[j, j])
        W -= torch.outer(W[:, j].clone(), h / pivot)
        H -= torch.outer(h, h / pivot)
        W[:, j] = 0.0
        H[j, j] = 1.0  # its row and column are zero now; this keeps the quotient finite
    return removed


def _first(mask: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(mask)
    kept[torch.nonzero(mask).flatten()[:count]] = True
    return kept
