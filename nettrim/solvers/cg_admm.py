"""``cg_admm``: the paper's algorithm on a convolution itself, no patch unfolded (Aghasi, Abdi, Romberg, SIAM J. Math. Data Sci. 2020).

The iteration is that of :mod:`nettrim.solvers.admm`; its least squares

    argmin_X ‖A Xᵀ − Z‖² / c₀² + ‖X − S‖²

are solved by conjugate gradients on ``AᵀA + c₀² I``, whose products are a convolution and the gradient of one
(:class:`nettrim.operators.Convolution`): neither ``A`` nor ``AᵀA`` is made. Each starts from the last one's solution, so a few steps do, and as
both come to rest their error does too.

It holds about a dozen matrices of the targets' shape, in the precision of the data. Bounds and feasibility are those of the program, in float64, on
rows that are unfolded chunk by chunk.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from nettrim.operators import Convolution
from nettrim.programs import LayerProgram
from nettrim.solvers.admm import iterate
from nettrim.solvers.base import Solution
from nettrim.solvers.feasibility import projected_gradients, rounding_margin, smallest_step

NAME = "cg_admm"
_STEPS = 12  # of conjugate gradients, at most, in an iteration
_ACCURACY = 0.1  # of the residual that the last iteration left: what is solved for
_ROUNDS = 3


def refuses(program: LayerProgram) -> str | None:
    if not isinstance(program.inputs, Convolution):
        return "it takes inputs that are a nettrim.operators.Convolution"
    if not isinstance(program.targets, Tensor):
        return "it needs all targets in memory, and they are streamed"
    if program.epsilon is None:
        return "the paper's algorithm takes a budget (epsilon=), not a penalty"
    return None


class _Operator:
    """A convolution's products, with what conjugate gradients want besides: the diagonal of ``AᵀA``."""

    def __init__(self, program: LayerProgram, A: Convolution) -> None:
        self._program, self._A = program, A
        self._diagonal = A.squares(program.dtype)
        # as that of `admm`: no entry of AᵀA is above its largest diagonal one
        self.scale = 0.3 * math.sqrt(float(self._diagonal.max())) or 1.0

    def forward(self, W: Tensor) -> Tensor:
        return self._A.product(W)

    def least_squares(self, Z: Tensor, S: Tensor, W: Tensor, AW: Tensor) -> tuple[Tensor, Tensor]:
        """Row by row, Jacobi preconditioned; ``A Xᵀ`` is carried along, so a step is one product and one adjoint."""
        square = self.scale**2
        X, AX = W, AW
        R = self._A.adjoint(Z - AX) + square * (S - X)
        inverse = (self._diagonal + square).reciprocal()
        H = inverse * R
        direction, rho = H, (R * H).sum(1, keepdim=True)
        enough = _ACCURACY**2 * float(rho.sum())
        for _ in range(_STEPS):
            if not float(rho.sum()) > enough:
                break
            image = self._A.product(direction)
            curvature = image.square().sum(0)[:, None] + square * direction.square().sum(1, keepdim=True)
            step = torch.where(curvature > 0, rho / curvature, 0.0)
            X, AX = X + step * direction, torch.addcmul(AX, image, step.T)
            R = R - step * (self._A.adjoint(image) + square * direction)
            H = inverse * R
            following = (R * H).sum(1, keepdim=True)
            direction = H + torch.where(rho > 0, following / rho, 0.0) * direction
            rho = following
        return X, AX

    def restore(self, W: Tensor) -> Tensor | None:
        """As :func:`nettrim.solvers.feasibility.restore_budget`, by the same steps on the operator."""
        program, A = self._program, self._A
        assert program.epsilon is not None and isinstance(program.targets, Tensor)
        margin = rounding_margin(program, W.dtype)
        budget, Y, V, mask = program.epsilon * (1 - margin), program.targets, program.upper, W != 0
        if budget**2 == 0:
            return None

        def excess_of(Z: Tensor) -> float:
            return float(program.residual(Z, Y, V).double().square().sum()) / budget**2 - 1

        for _ in range(_ROUNDS):
            Z = A.product(W)
            at_zero = excess_of(Z)
            if at_zero <= 0:
                return W
            if not math.isfinite(at_zero):
                return None
            downhill = A.adjoint(program.residual(Z, Y, V))
            step = projected_gradients(lambda X: A.adjoint(A.product(X)), self._diagonal, downhill, mask)
            dZ = A.product(step)
            at_one = excess_of(Z - dZ)
            if at_one <= 0:
                return W - smallest_step(lambda t: excess_of(torch.sub(Z, dZ, alpha=t)), at_zero, at_one, margin) * step  # noqa: B023
            W = W - step
        return None


def run(program: LayerProgram, tol: float, max_iter: int, initial: Tensor | None) -> Solution:
    """Solve a budget program, on any set, whose inputs are a convolution's; the parameters are those of every solver."""
    start = time.perf_counter()
    assert isinstance(program.inputs, Convolution) and isinstance(program.targets, Tensor)
    W = torch.zeros(program.shape, dtype=program.dtype, device=program.device) if initial is None else initial.to(program.device, program.dtype)
    products = _Operator(program, program.inputs)
    return iterate(program, products, program.targets, program.upper, W, NAME, tol, max_iter, start)
