"""The layer programs: what is minimised, over which set, and what proves how good a solution is.

One class holds all of them. Its letters are the papers' (with samples as rows, the papers' transpose):

======  ========  =================================================================================
letter  shape     meaning
======  ========  =================================================================================
``A``   (P, N)    layer inputs; with a bias the last column is ones
``W``   (M, N)    weights (torch's orientation); with a bias the last column is the bias
``Z``   (P, M)    pre-activations ``A Wᵀ``
``Y``   (P, M)    targets: the dense layer's outputs, after its ReLU if it has one
``Ω``   (P, M)    ``Y > 0`` (``Y > floor``); everything, for a layer without a ReLU behind it
``V``   (P, M)    upper bound of ``Z`` off Ω (paper's set; 0 unless given)
``D``   (P, M)    residual: ``z − y`` on Ω, ``max(z − v, 0)`` off Ω
``ω``   (M, N)    weights of the ℓ1 norm
======  ========  =================================================================================

Sets (Aghasi et al., SIAM J. Math. Data Sci. 2020, eq. (3) and (6); NIPS 2017, eq. (4)):

* ``consistency="paper"``:   ``C_ε(A, Y, V) = {W : Σ_Ω (z − y)² ≤ ε²,  z ≤ v off Ω}``
* ``consistency="relaxed"``: ``{W : F(W) = Σ_Ω (z − y)² + Σ_{Ωᶜ} max(z, 0)² ≤ ε²}``, which holds ``C_ε(A, Y, 0)`` inside it and
  gives the same guarantee ``‖relu(Z) − Y‖_F ≤ ε`` (docs/method.md has the proof)
* ``activation=None``:       ``{W : ‖A Wᵀ − Y‖_F ≤ ε}``

Programs: ``min Σ ω|w|`` over the set (``epsilon=``), or ``min λ Σ ω|w| + ½ · misfit`` (``regularization=``, Net-Trim v1), the paper's
one-sided constraints kept as constraints.

Every figure here is computed in float64, in chunks of rows, whatever the precision of the data: this is what solutions are judged by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nettrim import program_checks
from nettrim.duality import best_bound
from nettrim.errors import ArgumentError
from nettrim.grams import Moments
from nettrim.metrics import Metric
from nettrim.patterns import Supports, make_supports
from nettrim.residual import ONE_SIDED_TOLERANCE, ROUNDING, Measures, residual
from nettrim.rows import BLOCK_ELEMENTS, Rows, Stream, as_rows
from nettrim.surroundings import left_out


@dataclass(frozen=True, eq=False)
class LayerProgram:
    """One layer's convex program.

    Parameters
    ----------
    inputs : Tensor, ndarray or callable, (P, N)
        ``A``, one sample a row; for a bias, append a column of ones. A ``numpy.memmap`` stays on disk; a callable returns a fresh iterable of row
        chunks each time (see :class:`nettrim.rows.Rows`).
    targets : Tensor, ndarray or callable, (P, M)
        ``Y``, the dense layer's outputs: after the ReLU for ``activation="relu"`` (so never negative).
    epsilon : float, optional
        Budget on the output discrepancy: absolute, Frobenius norm.
    regularization : float, optional
        ``λ`` of the penalised form (of ``epsilon``, ``regularization`` and ``nonzeros`` exactly one is given).
    nonzeros : int, optional
        The third form: ``min ½ · misfit`` with so many weights kept, of those that count (``ω > 0``; a column with ``ω = 0``, a free bias, is kept
        besides). Not convex: what is found is feasible, and no bound says how far it is from the best.
    penalty : {"l1", "l0"}
        The objective beside a budget: the papers' ``Σ ω|w|``, or the number of weights kept.
    pattern : str
        Of ``nonzeros`` programs: see :func:`nettrim.patterns.parse`. ``"n:m"`` says the number itself.
    metric : Tensor or ndarray, (M, M) or (M,), optional
        Of ``nonzeros`` programs without a ReLU: ``S``, symmetric and positive semidefinite (or its diagonal), which weighs errors of the outputs
        against each other: the misfit is ``Σ_p d_pᵀ S d_p``, with ``d_p`` the rows of ``D``.
    support : Tensor or ndarray, (M, N) bool, optional
        Of ``nonzeros`` and ``"l0"`` programs: the only weights that may be kept.
    activation : {"relu", None}
        What follows the layer.
    consistency : {"relaxed", "paper"}
        Which set (see the module's docstring); without a ReLU the two are the same.
    upper : Tensor or ndarray, (P, M), optional
        ``V`` of the paper's set (the floor by default).
    floor : Tensor or ndarray, (M,), optional
        Of ``activation="relu"``: the output is ``max(z, floor)``, neuron by neuron, 0 by default; Ω is ``y > floor``, and off Ω the floor takes the
        place of 0. So a shift ``t`` between the layer and its ReLU, as a BatchNorm's, is no part of ``W``: ``max(z + t, 0) − t = max(z, −t)``.
    ceiling : Tensor or ndarray, (M,), optional
        Of ``activation="relu"`` and the relaxed set: the output is ``min(max(z, floor), ceiling)``, as ReLU6's; where ``y`` is the ceiling, only what
        falls below it counts.
    l1_weights : float, Tensor or ndarray, (N,) or (M, N), optional
        ``ω ≥ 0`` (1 by default).
    moments : Moments, optional
        The sums over the rows that a program without a ReLU is about, where they are known already (:mod:`nettrim.grams`); for ``"topk_admm"``. Of
        a program with ``nonzeros`` the rows are then left alone: a solution's objective and discrepancy are NaN, for who stores it to measure.

    Raises
    ------
    ArgumentError
        If a shape, a dtype or a value is not as described.
    """

    inputs: Tensor | Stream
    targets: Tensor | Stream
    epsilon: float | None = field(default=None, kw_only=True)
    regularization: float | None = field(default=None, kw_only=True)
    nonzeros: int | None = field(default=None, kw_only=True)
    penalty: str = field(default="l1", kw_only=True)
    pattern: str = field(default="unstructured", kw_only=True)
    metric: Tensor | Metric | None = field(default=None, kw_only=True)
    support: Tensor | None = field(default=None, kw_only=True)
    activation: str | None = field(default="relu", kw_only=True)
    consistency: str = field(default="relaxed", kw_only=True)
    upper: Tensor | None = field(default=None, kw_only=True)
    floor: Tensor | None = field(default=None, kw_only=True)
    ceiling: Tensor | None = field(default=None, kw_only=True)
    l1_weights: Tensor | float | None = field(default=None, kw_only=True)
    moments: Moments | None = field(default=None, kw_only=True, repr=False)
    supports: Supports | None = field(init=False, repr=False)
    _rows: Rows = field(init=False, repr=False)

    @left_out()
    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.activation not in ("relu", None):
            raise ArgumentError(f"activation={self.activation!r}; expected 'relu' or None")
        if self.consistency not in ("relaxed", "paper"):
            raise ArgumentError(f"consistency={self.consistency!r}; expected 'relaxed' or 'paper'")
        if self.penalty not in ("l1", "l0"):
            raise ArgumentError(f"penalty={self.penalty!r}; expected 'l1' or 'l0'")
        self._check_level()
        if self.upper is not None and not self.one_sided:
            raise ArgumentError("upper was given; it belongs to consistency='paper' with activation='relu'")
        for name in ("floor", "ceiling"):
            if getattr(self, name) is not None and not self.relu:
                raise ArgumentError(f"{name} was given with activation=None; it belongs to activation='relu'")
        if self.ceiling is not None and self.consistency == "paper":
            raise ArgumentError("ceiling was given with consistency='paper'; expected 'relaxed': the papers' set is the ReLU's")
        floor = None if self.floor is None else as_rows(self.floor, "floor")
        rows = Rows(self.inputs, self.targets, self.upper, floor=floor if floor is not None else torch.zeros(1) if self.relu else None)
        put("floor", None if floor is None else program_checks.floor(floor, rows))
        put("_rows", rows)
        put("ceiling", None if self.ceiling is None else program_checks.ceiling(self.ceiling, self.floor, rows))
        put("upper", rows.upper)
        for name in ("inputs", "targets"):
            if getattr(rows, name) is not None:
                put(name, getattr(rows, name))
        put("l1_weights", program_checks.l1_weights(self.l1_weights, rows))
        put("supports", self._make_supports())

    def _check_level(self) -> None:
        program_checks.one_level(self.epsilon, self.regularization, self.nonzeros)
        if self.penalty == "l0" and self.regularization is not None:
            raise ArgumentError("penalty='l0' was given with regularization; expected it with epsilon or nonzeros")
        for name in ("epsilon", "regularization"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, program_checks.level(name, getattr(self, name)))

    def _make_supports(self) -> Supports | None:
        """The supports that may be kept; None for the convex programs."""
        options = {"pattern": self.pattern != "unstructured", "metric": self.metric is not None, "support": self.support is not None}
        if self.nonzeros is None and self.penalty == "l1":
            given = [name for name, value in options.items() if value]
            if given:
                raise ArgumentError(f"{given[0]} was given; it belongs to programs with nonzeros or penalty='l0'")
            return None
        if self.one_sided or self.upper is not None:
            raise ArgumentError("consistency='paper' was given with nonzeros or penalty='l0'; expected 'relaxed'")
        omega = self.l1_weights
        assert isinstance(omega, Tensor)
        if omega.ndim == 2:
            raise ArgumentError("l1_weights of shape (M, N) were given with nonzeros or penalty='l0'; expected (N,), 0 for columns that don't count")
        if self.metric is not None:
            if self.nonzeros is None or self.relu:
                raise ArgumentError("metric was given with a budget or a ReLU; it belongs to programs with nonzeros and activation=None")
            object.__setattr__(self, "metric", program_checks.metric(self.metric, self.shape[0], omega))
        object.__setattr__(self, "support", program_checks.support(self.support, self.shape))
        return make_supports(self.pattern, self.nonzeros, omega > 0, self.shape, self.support)

    # -- what the program is ---------------------------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(M, N), the shape of the weights."""
        return self._rows.outputs, self._rows.width

    @property
    def rows(self) -> int:
        """P."""
        return self._rows.count

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs, and of solutions: float32 or float64."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Of the inputs, and of solutions."""
        return self._rows.device

    @property
    def streamed(self) -> bool:
        """Whether the rows come from a callable; only solvers that say so take such a program."""
        return self._rows.streamed

    @property
    def in_memory(self) -> bool:
        """Whether the inputs are a plain array: neither streamed nor a ``numpy.memmap``."""
        return self._rows.in_memory

    @property
    def arrays(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``A``, ``Y``, ``V`` in float64, whole: for solvers that need them so (``V`` is None where it is 0)."""
        assert isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)
        upper = self.upper if self.upper is not None or self.floor is None else self.floor.expand_as(self.targets)
        return self.inputs.double(), self.targets.double(), None if upper is None else upper.double()

    @property
    def relu(self) -> bool:
        return self.activation == "relu"

    @property
    def one_sided(self) -> bool:
        """Whether ``z ≤ v`` off Ω is a constraint (the paper's set) instead of a part of the misfit."""
        return self.relu and self.consistency == "paper"

    @property
    def S(self) -> Metric | None:
        """What weighs errors of the outputs against each other; None for no weights."""
        assert self.metric is None or isinstance(self.metric, Metric)
        return self.metric

    @property
    def omega(self) -> Tensor:
        """Ω, (P, M) bool."""
        return torch.cat([self.on_support(Y) for _, Y, _ in self.target_chunks(self.dtype)])

    def on_support(self, Y: Tensor) -> Tensor:
        """Ω of some rows of the targets, in any precision."""
        if not self.relu:
            return torch.ones_like(Y, dtype=torch.bool)
        inside = Y > 0 if self.floor is None else Y > self.floor
        return inside if self.ceiling is None else inside & (Y < self.ceiling)

    def residual(self, Z: Tensor, Y: Tensor, V: Tensor | None) -> Tensor:
        """``D`` of some rows (see :func:`nettrim.residual.residual`)."""
        return residual(Z, Y, V, relu=self.relu, floor=self.floor, ceiling=self.ceiling)

    @property
    def target_norm(self) -> float:
        """``‖Y‖_F``."""
        return math.sqrt(sum(float(Y.square().sum()) for _, Y, _ in self.target_chunks(torch.float64)))

    @property
    def description(self) -> str:
        """Kind of program in words, for messages."""
        level = "budget" if self.epsilon is not None else "penalised" if self.nonzeros is None else "nonzeros"
        if self.supports is not None and self.epsilon is not None:
            level = "l0 budget"
        return f"{level} program on the {'no-ReLU' if not self.relu else self.consistency} set"

    def row_chunks(
        self, dtype: torch.dtype = torch.float64, columns: Tensor | None = None
    ) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """``(rows, A, Y, V)`` chunk by chunk in ``dtype``, each of a bounded size; of ``A`` only some columns, if their indices are given."""
        return self._rows.chunks(dtype, columns)

    def target_chunks(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
        """``(rows, Y, V)`` chunk by chunk, for what needs no inputs."""
        return self._rows.target_chunks(dtype)

    # -- the primal side -------------------------------------------------------------------------------------------------------

    def norm(self, W: Tensor) -> float:
        """``Σ ω|w|`` for W of shape (M, N); the number of nonzeros that count, where that is what the program is about."""
        if self.supports is not None:
            return float(self.supports.count(W))
        omega = self.l1_weights.expand(self.shape)  # type: ignore[union-attr]
        return sum(float((omega[block].double() * W[block].double().abs()).sum()) for block in self.neuron_blocks())

    def neuron_blocks(self) -> Iterator[slice]:
        """Neurons, as many at a time as a computation may hold the weights of."""
        M, N = self.shape
        step = max(1, BLOCK_ELEMENTS // N)
        return (slice(start, start + step) for start in range(0, M, step))

    @left_out()
    def measure(self, W: Tensor) -> Measures:
        """One pass over the rows: misfit, one-sided excess and output discrepancy of W, (M, N).

        In float64; with ``nonzeros``, where no bound and no budget hangs on the last digits, residuals are in the precision of the data.
        """
        dtype = torch.float64 if self.nonzeros is None else self.dtype
        W = W.to(self.device, dtype)
        on = off = out = 0.0
        zero = not bool(W.any())
        for _, A, Y, V in self.row_chunks(dtype) if not zero else ((rows, None, Y, V) for rows, Y, V in self.target_chunks(dtype)):
            Z = torch.zeros_like(Y) if A is None else torch.cat([A @ W[block].T for block in self.neuron_blocks()], 1)
            D = self.residual(Z, Y, V).double()
            if not self.relu:
                total = float(D.square().sum())
                on, out = on + (total if self.S is None else self.S.square(D)), out + total
                continue
            # summed apart: a difference of sums would see no excess below 1e-8 of the misfit
            inside = self.on_support(Y)
            on += float(torch.where(inside, D, 0.0).square().sum())
            off += float(torch.where(inside, 0.0, D).square().sum())
            Z = Z.clamp(min=0) if self.floor is None else torch.maximum(Z, self.floor)
            out += float(((Z if self.ceiling is None else torch.minimum(Z, self.ceiling)) - Y).square().sum())
        return Measures(on, off, math.sqrt(out))

    def weigh(self, D: Tensor) -> Tensor:
        """``D S`` for residuals (P, M); ``D`` itself without a metric."""
        return D if self.S is None else self.S.weigh(D.T).T

    def objective(self, W: Tensor) -> float:
        """``Σ ω|w|`` of a budget program (nonzeros for ``"l0"``); ``λ Σ ω|w| + ½ · misfit`` of a penalised one; ``½ · misfit`` for ``nonzeros``."""
        return self.value(self.norm(W), 0.0 if self.epsilon is not None else self.misfit(W))

    def value(self, norm: float, misfit: float) -> float:
        """The objective from its parts, what :meth:`norm` says and the misfit (of which a budget program's has none)."""
        if self.nonzeros is not None:
            return 0.5 * misfit
        return norm if self.regularization is None else self.regularization * norm + 0.5 * misfit

    def misfit(self, W: Tensor) -> float:
        """``F(W)``; for the paper's set its part on Ω, the rest being constraints."""
        return self.misfit_of(self.measure(W))

    def misfit_of(self, measures: Measures) -> float:
        """The misfit that the measures of some weights say (see :meth:`misfit`)."""
        return measures.on_support if self.one_sided else measures.on_support + measures.off_support

    @left_out()
    def gradient(self, W: Tensor) -> Tensor:
        """``∂ misfit / ∂W = 2 Dᵀ A``, (M, N) float64 (on Ω alone for the paper's set)."""
        W = W.to(self.device, torch.float64)
        gradient = torch.zeros(self.shape, dtype=torch.float64, device=self.device)
        for _, A, Y, V in self.row_chunks():
            D = self.residual(A @ W.T, Y, V)
            if self.one_sided:
                D = torch.where(self.on_support(Y), D, 0.0)
            gradient += 2 * self.weigh(D).T @ A
        return gradient

    def discrepancy(self, W: Tensor) -> float:
        """``‖relu(A Wᵀ) − Y‖_F`` (``‖A Wᵀ − Y‖_F`` without a ReLU)."""
        return self.measure(W).discrepancy

    def violation(self, W: Tensor) -> float:
        """Largest relative excess over a constraint, 0 when all are met (see :meth:`violation_of`)."""
        return max(self.violation_of(self.measure(W)), self.excess(W))

    def excess(self, W: Tensor) -> float:
        """By what share W has more nonzeros than may be kept, infinite where it breaks the pattern; 0 for the convex programs."""
        return 0.0 if self.supports is None else self.supports.excess(W)

    def violation_of(self, measures: Measures) -> float:
        """``max((‖D‖_F − ε)/ε, ‖max(z − v, 0)‖_F/ε, 0)``, the second for the paper's set only (over ``‖Y‖_F`` in a penalised program)."""
        excess = 0.0
        if self.epsilon is not None and measures.distance > self.epsilon:
            excess = math.inf if self.epsilon == 0 else (measures.distance - self.epsilon) / self.epsilon
        return max(excess, self.one_sided_excess(measures))

    def one_sided_excess(self, measures: Measures) -> float:
        """``‖max(z − v, 0)‖_F / ε`` of the paper's set (over ``‖Y‖_F`` in a penalised program); 0 for the others."""
        if not self.one_sided or measures.off_support == 0:
            return 0.0
        scale = self.epsilon if self.epsilon is not None else self.target_norm
        return math.inf if scale == 0 else math.sqrt(measures.off_support) / scale

    def is_feasible(self, W: Tensor) -> bool:
        """Whether W keeps the budget (to rounding) and the one-sided constraints (to :data:`ONE_SIDED_TOLERANCE`)."""
        return self.excess(W) == 0 and self.feasible_by(self.measure(W))

    def feasible_by(self, measures: Measures) -> bool:
        """Feasibility, from the measures of some weights."""
        if not math.isfinite(measures.distance):
            return False
        if self.epsilon is not None and measures.distance > self.epsilon * (1 + ROUNDING):
            return False
        return self.violation_of(measures) <= (ONE_SIDED_TOLERANCE if self.one_sided else ROUNDING)

    # -- the dual side ---------------------------------------------------------------------------------------------------------

    @left_out()
    def lower_bound(self, theta: Tensor) -> float:
        """Bound on the optimum that a dual point proves, by weak duality.

        With ``Σ ω|w|``'s conjugate, every ``θ`` with ``|Aᵀθ| ≤ ω`` (``≤ λω`` for a penalised program) and ``θ ≥ 0`` off Ω gives

        * budget: ``−⟨θ_Ω, y⟩ − ⟨θ_{Ωᶜ}, v⟩ − ε‖θ‖_F`` (the norm on Ω alone for the paper's set; ``v`` is the floor for the relaxed one)
        * penalised: ``−Σ_Ω (½θ² + θy) − Σ_{Ωᶜ} ½θ²`` (the last sum is ``⟨θ, v⟩`` for the paper's set)

        Any ``theta`` is made feasible first: clipped at 0 off Ω, projected to ``a_jᵀθ = 0`` for columns with ``ω_j = 0``, and scaled neuron
        by neuron with the factors that give the best bound. Both signs of convention fail safe: a useless ``theta`` gives 0. So does every one
        for the programs that are not convex.

        Parameters
        ----------
        theta : Tensor, (P, M)

        Returns
        -------
        float
            A lower bound on the optimal objective, at least 0.
        """
        return best_bound(self, theta)[0] if self.supports is None else 0.0
