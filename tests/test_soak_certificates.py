"""No solution is called optimal that is not: the exact judge itself, a short run of it, and that it would notice."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from click.testing import CliRunner

import nettrim
from benchmarks import soak_certificates
from benchmarks.soak_certificates import KINDS, STRUCTURES, Claim, Exact, generate, product, root


def test_arithmetic_without_rounding() -> None:
    array = np.array([[1e-300, 1e300, -0.1], [5e-324, 0.0, 3.0]])
    assert (Exact(array).fractions() == np.vectorize(Fraction, otypes=[object])(array)).all()
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((3, 4)) * 10.0 ** rng.integers(-20, 20, (3, 4)), rng.standard_normal((4, 2))
    exact = product(a, b)
    assert exact[1, 1] == sum((Fraction(x) * Fraction(y) for x, y in zip(a[1], b[:, 1], strict=True)), Fraction(0))
    for value in (Fraction(2), Fraction(1, 10**40), Fraction(9), Fraction(0)):
        assert root(value, up=False) ** 2 <= value <= root(value, up=True) ** 2


def test_no_certificate_is_false() -> None:
    """Every kind of program once, with the structures in turn; the long form has a thousand and more."""
    figures = soak_certificates.soak(len(KINDS) * len(STRUCTURES), seed=3)
    assert figures["false"] == [] and figures["open"] == [], figures
    assert figures["optimal"] > 0.9 * figures["programs"] and figures["true"] >= 0.97 * figures["optimal"]


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_a_false_claim_is_noticed(index: int) -> None:
    program, _ = generate(index)
    good, worse = nettrim.solve(program, tol=1e-4), nettrim.solve(program, tol=0.3, max_iter=20)
    claim = Claim.of(program, good, 1e-4)
    assert claim.judge(good.lower_bound)[0] == "true"
    # weights that are not feasible
    assert Claim.of(program, dataclasses.replace(good, weights=0.97 * good.weights), 1e-4).judge(good.lower_bound)[0] != "true"
    # feasible weights that are far from the optimum, with a bound that some weights undercut
    if worse.objective > 1.02 * good.objective and worse.gap < math.inf:
        verdict, gap = Claim.of(program, worse, 1e-4).judge(0.5 * (worse.objective + good.objective))
        assert gap > 0.01 and (verdict == "false" or (program.one_sided and verdict == "open"))


def test_the_exact_bound_is_a_bound() -> None:
    """For any dual point, however wrong."""
    rng = np.random.default_rng(5)
    for index in range(2 * len(KINDS)):
        program, _ = generate(index)
        solution = nettrim.solve(program, tol=1e-4)
        claim = Claim.of(program, solution, 1e-4)
        slack = 1 + 1e-3 * program.one_sided
        for scale in (1e-6, 1.0, 1e6):
            theta = -scale * rng.random(claim.problem.Y.shape) + scale * 0.3
            assert 0 <= claim.bound(theta) <= solution.objective * slack


def test_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CliRunner().invoke(soak_certificates.main, ["--programs", "3"])
    assert run.exit_code == 0 and "false certificates: 0" in run.output
    monkeypatch.setattr(Claim, "judge", lambda self, lower_bound: ("false", 1.0))
    run = CliRunner().invoke(soak_certificates.main, ["--programs", "3"])
    assert run.exit_code == 1 and "false certificates: 3" in run.output and "number 2" in run.output
