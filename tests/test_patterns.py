"""Patterns keep exactly what they say, and the nearest allowed matrix is the nearest."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nettrim import ArgumentError, patterns
from nettrim.patterns import UNSTRUCTURED, Supports, first_of_groups, largest, make_supports, parse


def scores(M: int, N: int, seed: int) -> torch.Tensor:
    return torch.rand(M, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(M=st.integers(1, 6), N=st.integers(1, 8), sparsity=st.floats(0, 1), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_unstructured_keeps_exactly_the_share_to_one_weight(M, N, sparsity, seed):
    kept = UNSTRUCTURED.kept((M, N), sparsity)
    assert abs(kept - (1 - sparsity) * M * N) <= 0.5 + 1e-6
    mask = UNSTRUCTURED.mask(scores(M, N, seed), kept)
    assert int(mask.sum()) == kept
    if 0 < kept < M * N:
        assert float(scores(M, N, seed)[mask].min()) >= float(scores(M, N, seed)[~mask].max())


@given(n=st.integers(1, 4), m=st.integers(1, 4), groups=st.integers(1, 3), M=st.integers(1, 4), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=100)
def test_n_of_m_keeps_the_n_largest_of_every_m(n, m, groups, M, seed):
    if n > m:
        with pytest.raises(ArgumentError, match="n kept of every m"):
            parse(f"{n}:{m}")
        return
    pattern, shape = parse(f"{n}:{m}"), (M, groups * m)
    assert pattern.share == n / m
    s = scores(*shape, seed)
    mask = pattern.mask(s, pattern.kept(shape, 0.0))
    assert int(mask.sum()) == pattern.kept(shape, 0.5) == M * groups * n
    for group, kept in zip(s.view(-1, m), mask.view(-1, m), strict=True):
        assert set(torch.nonzero(kept).flatten().tolist()) == set(group.topk(n).indices.tolist())
    assert pattern.allows(mask)
    if n < m:
        assert not pattern.allows(torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("small", (0, 64), ids=("by sorting", "by comparing"))
@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), seed=st.integers(0, 20), data=st.data())
def test_of_equal_scores_the_first_are_kept(small, m, seed, data):
    n = data.draw(st.integers(1, m))
    groups = torch.randint(0, 3, (5, 4, m), generator=torch.Generator().manual_seed(seed)).float()
    expected = torch.zeros_like(groups, dtype=torch.bool)
    for place in np.ndindex(5, 4):
        expected[place][sorted(range(m), key=lambda j: (-float(groups[place][j]), j))[:n]] = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_SMALL", small)
        assert torch.equal(first_of_groups(groups, n), expected)
    flat = groups.flatten()
    chosen = largest(flat, n)
    assert chosen.tolist() == [j in sorted(range(len(flat)), key=lambda j: (-float(flat[j]), j))[:n] for j in range(len(flat))]


def test_blocks_are_kept_whole_and_the_heaviest():
    pattern = parse("block:2x3")
    s = scores(4, 6, 0)
    assert pattern.kept((4, 6), 0.5) == 12
    mask = pattern.mask(s, 12)
    blocks = mask.view(2, 2, 2, 3).permute(0, 2, 1, 3).reshape(4, 6)
    assert all(row.all() or not row.any() for row in blocks)
    sums = s.view(2, 2, 2, 3).sum((1, 3)).flatten()
    best = max(itertools.combinations(range(4), 2), key=lambda pair: float(sums[list(pair)].sum()))
    assert {index for index in range(4) if bool(blocks[index].all())} == set(best)


@pytest.mark.parametrize("text", ["2-4", "4:2", "0:4", "block:0x2", "block:2", "neurons", "", 24, None])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(ArgumentError, match="expected 'unstructured'"):
        parse(text)


def test_a_shape_that_is_not_tiled_is_refused():
    with pytest.raises(ArgumentError, match=r"fc has weights of shape \(3, 6\).*outputs divisible by 1 and inputs by 4"):
        parse("2:4").check((3, 6), "fc")
    with pytest.raises(ArgumentError, match="outputs divisible by 2 and inputs by 3"):
        parse("block:2x3").check((3, 6), "fc")


def test_supports_leave_columns_that_do_not_count_alone():
    counted = torch.tensor([True, True, True, False])
    supports = make_supports("unstructured", 2, counted, (2, 4), None)
    mask = supports.nearest(scores(2, 4, 1))
    assert bool(mask[:, 3].all())
    assert int(mask[:, :3].sum()) == 2
    W = mask.double()
    assert supports.count(W) == 2
    assert supports.excess(W) == 0
    assert supports.excess(torch.ones(2, 4)) == 2.0


def test_supports_keep_within_what_is_allowed():
    allowed = torch.zeros(2, 3, dtype=torch.bool)
    allowed[0] = True
    supports = Supports(UNSTRUCTURED, 2, torch.ones(3, dtype=torch.bool), allowed)
    mask = supports.nearest(scores(2, 3, 2))
    assert int(mask.sum()) == 2
    assert not bool(mask[1].any())
    assert supports.excess(torch.ones(2, 3)) == torch.inf


@pytest.mark.parametrize(
    ("text", "nonzeros", "message"),
    [
        ("unstructured", 13, "nonzeros=13; expected a whole number from 0 to 12"),
        ("unstructured", -1, "nonzeros=-1"),
        ("unstructured", True, "nonzeros=True"),
        ("2:4", 3, "nonzeros=3 with pattern='2:4', which keeps 6"),
        ("block:3x2", 4, "a multiple of 6"),
        ("block:3x2", None, "given without nonzeros"),
    ],
)
def test_numbers_that_a_pattern_cannot_have_are_refused(text, nonzeros, message):
    with pytest.raises(ArgumentError, match=message):
        make_supports(text, nonzeros, torch.ones(4, dtype=torch.bool), (3, 4), None)
