"""The columns that the iterations of ``prox_admm`` work on: those that some neuron uses, or would.

An input that no neuron uses changes nothing in ``A Wᵀ``, and its column can leave both products. At an optimum its multiplier is within the
threshold, ``β |a_jᵀ u_m| ≤ λ ω_mj`` for every neuron m; so a column leaves when that holds with room, and comes back when it fails. Nothing that is
proven depends on it: bounds are taken over all columns, so one that left wrongly shows in the gap until it is back.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nettrim.programs import LayerProgram
from nettrim.solvers.splitting import State, column_scale, inverse

_ROOM = 0.8  # of the threshold
_WORTHWHILE = 0.1  # share of the columns that must be able to leave: the rest has to be picked from each row, and its Gram matrix factorised
_WORTHWHILE_DEAD = 0.05
_WORK = 1e8  # P·N·M below which picking costs what it saves


class WorkingSet:
    """Which columns are present, what moves a state from some to others, and the way back to all of them."""

    def __init__(self, program: LayerProgram, state: State) -> None:
        """``state`` has all columns."""
        self._G, self._column = state.G, column_scale(state.G, state.mean)
        self._omega: Tensor = program.l1_weights.double()  # type: ignore[union-attr]
        self._present = torch.ones(program.shape[1], dtype=torch.bool, device=program.device)
        # hard inequalities are met late, by a large β, while columns come and go
        self._pays = not program.one_sided and program.rows * program.shape[0] * program.shape[1] >= _WORK

    def expand(self, W: Tensor) -> Tensor:
        """Weights (M, present) to (M, N), the others 0."""
        if W.shape[1] == len(self._present):
            return W
        whole = W.new_zeros((W.shape[0], len(self._present)))
        whole[:, self._present] = W
        return whole

    def without_dead(self, s: State) -> State:
        """The state without the columns that are 0 in every row, where they are many: nothing brings those back."""
        live = self._G.diagonal() > 0
        if not bool(live.any()) or int(live.sum()) > (1 - _WORTHWHILE_DEAD) * len(live):
            return s
        return self._move(s, live, s.W.new_zeros(s.W.shape[0], len(live)))

    def update(self, s: State, correlation: Tensor) -> State:
        """Let columns leave or come back, as ``correlation``, the (M, N) products ``a_jᵀ u_m``, says; the state on the new columns."""
        if not self._pays:
            return s
        share = (s.beta / s.level * correlation.abs() / self._omega.clamp(min=torch.finfo(torch.float64).tiny)).amax(0)
        used = self._present.clone()
        used[self._present] = (s.S != 0).any(0)
        wanted = torch.where(self._present, used | (share > _ROOM), share > 1)
        returning = bool((wanted & ~self._present).any())
        if not returning and int(wanted.sum()) > (1 - _WORTHWHILE) * int(self._present.sum()) or not bool(wanted.any()):
            return s
        return self._move(s, wanted, correlation)

    def _move(self, s: State, wanted: Tensor, correlation: Tensor) -> State:
        W, S = self.expand(s.W), self.expand(s.S)
        # where W = S = 0, step 3 holds still at this E
        E = torch.where(self._present, self.expand(s.E), (-correlation / self._column / s.r).to(s.E))
        self._present = wanted
        columns = torch.nonzero(wanted).flatten()
        G, column = self._G[columns][:, columns], self._column[columns]
        return dataclasses.replace(
            s,
            columns=columns,
            column=column.to(s.W),
            omega=(self._omega[..., columns] / column).to(s.W),
            G=G,
            inverse=inverse(G, column, s.r).to(s.W),
            W=W[:, columns],
            S=S[:, columns],
            E=E[:, columns],
        )
