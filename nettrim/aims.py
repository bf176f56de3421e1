"""What a program with a number of weights is about, in sums over its rows: ``G = AᵀA`` and ``C = TᵀA`` for the targets ``T`` that it has.

In a cascade, with ``B`` (P, M) for what the layer's output is added to, if it is a part of a sum:

* targets that make the dense network's sum:  ``T₁ = A Wᵀ + B − B̂``; without a ``B``, ``C₁ = W (AᵀÂ)``, which is less to multiply where a layer has
  more outputs than inputs
* those of a ``repair`` ``r`` below 1, which lean to what the dense weights make of the disturbed inputs:  ``T = r T₁ + (1 − r) Â Wᵀ``
* damped, the program is about ``‖Â Ŵᵀ − T‖² + δ Σ_j ‖â_j‖² ‖ŵ_j − w_j‖²`` (columns ``j``): what is expected on inputs that have independent noise
  of ``δ`` times their energy, which dense and pruned weights see alike. It is the same program with a row more for every input.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from nettrim.grams import Moments
from nettrim.metrics import Metric

_CANCELLED = 1e-2  # of its terms: what they are measured to is not all lost
_ROUNDED = 1e-8  # of ‖Â Ŵᵀ‖²: half of the digits that float64 sums have


@dataclass(frozen=True, eq=False)
class Aim:
    """What a layer's program is about.

    Attributes
    ----------
    seen : Moments
        Of ``Â`` and ``T₁``.
    dense : Tensor, (M, N)
        W.
    repair, damping : float
        r and δ.
    columns : int
        Of the inputs that are damped: all but the bias's ones.
    metric : Metric or None
        S.
    """

    seen: Moments
    dense: Tensor
    repair: float
    damping: float
    columns: int
    metric: Metric | None

    @cached_property
    def moments(self) -> Moments:
        """Those of the program: of ``Â`` and ``T``, with the rows of the damping."""
        found, W = self.seen, self.dense.to(self.seen.C)
        if self.repair < 1:
            found = dataclasses.replace(found, C=self.repair * found.C + (1 - self.repair) * self._dense_correlations)
        if self.damping > 0:
            found = Moments(found.gram.damped(self.damping, self.columns), found.C + W * self._energy)
        return found

    @cached_property
    def _dense_correlations(self) -> Tensor:
        """``W G``, (M, N)."""
        return self.dense.to(self.seen.C) @ self.seen.G

    @property
    def _energy(self) -> Tensor:
        """``δ ‖â_j‖²`` of every input, (N,)."""
        found = self.damping * self.seen.G.diagonal()
        found[self.columns :] = 0
        return found

    def misfit(self, W: Tensor, apart: float) -> float | None:
        """The program's misfit of the weights ``Ŵ`` (M, N), from ``apart = Σ_p d_pᵀ S d_p``, ``D₁ = Â Ŵᵀ − T₁``, as it is measured on the rows.

        With ``Δ = Ŵ − W``, ``Â Ŵᵀ − T = r D₁ + (1 − r) Â Δᵀ`` and ``D₁ᵀ Â = Ŵ G − C``, so that it is

            ``r² apart + ⟨S (2 r (1 − r) (Ŵ G − C) + (1 − r)² Δ G), Δ⟩``

        and the damping's part. Of a small misfit the sums alone would say no digit: it is a difference of terms as large as ``‖T‖²``. So are these
        where they nearly cancel, as where there are fewer rows than inputs: None then, and only the rows say it.
        """
        W = W.to(self.seen.C)
        moved = W - self.dense.to(W)
        found = self.repair**2 * apart
        if self.repair < 1:
            lean, change = 1 - self.repair, moved @ self.seen.G
            V = self._dense_correlations + change
            crossed = 2 * self.repair * lean * self._weighed(V - self.seen.C, moved)
            own = lean**2 * self._weighed(change, moved)
            size = found + abs(crossed) + own
            found += crossed + own
            if not (found > _CANCELLED * size and found > _ROUNDED * self._weighed(V, W)):
                return None
        if self.damping > 0:
            found += self._weighed(moved * self._energy, moved)
        return found

    def _weighed(self, X: Tensor, Y: Tensor) -> float:
        """``⟨S X, Y⟩``, float64."""
        return float(((X if self.metric is None else self.metric.weigh(X)) * Y).sum())
