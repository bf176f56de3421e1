"""One-shot pruners of others, for `benchmarks.sparsity` to set ours against; each written from its paper, in the letters of this project.

All take the same: ``W`` (M, N), the layer's weights without the bias, neurons as rows; ``G = AᵀA`` (N, N) in float64, the Gram matrix of its
inputs ``A``, one sample a row; and what to keep, a number of weights of the layer or ``"n:m"``: n of every m consecutive inputs of a neuron.
They return new weights of the same shape and dtype. None touches the bias, and none knows of a ReLU behind the layer: they keep ``A Wᵀ``.
Factorisations are in float64, iterations in the dtype of ``W``, as in the authors' codes where they exist.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Kept = int | str
Pruner = Callable[[Tensor, Tensor, Kept], Tensor]


def parse_pattern(pattern: str) -> tuple[int, int]:
    """``"n:m"`` as two numbers, 0 < n ≤ m.

    Raises
    ------
    ValueError
        If it is none.
    """
    n, _, m = pattern.partition(":")
    if not (n.isdecimal() and m.isdecimal() and 0 < int(n) <= int(m)):
        raise ValueError(f"{pattern!r} is no pattern; expected 'n:m' with 0 < n <= m, such as '2:4'.")
    return int(n), int(m)


def best(scores: Tensor, kept: Kept) -> Tensor:
    """Where the largest scores are: ``kept`` of the whole matrix (ties broken, so that it is exactly that many), or n of every m of a row."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    if isinstance(kept, int):
        mask.view(-1)[scores.flatten().topk(kept).indices] = True
        return mask
    n, m = parse_pattern(kept)
    if scores.shape[1] % m:
        raise ValueError(f"{kept!r} needs a number of inputs that is a multiple of {m}; this layer has {scores.shape[1]}.")
    groups = scores.unflatten(1, (-1, m))
    return mask.unflatten(1, (-1, m)).scatter(2, groups.topk(n, dim=2).indices, True).flatten(1)


def magnitude(W: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """Keep the weights of largest magnitude, unchanged. ``G`` is not used."""
    return W * best(W.abs(), kept)


def wanda(W: Tensor, G: Tensor, kept: Kept) -> Tensor:
    """Wanda (Sun, Liu, Bair, Kolter: A simple and effective pruning approach for large language models, arXiv 2306.11695).

    Scores ``|w_ij| · ‖A_j‖₂`` (their eq. 1), compared within a neuron (section 3, "comparison group"); kept weights are unchanged. Where
    ``kept`` is not a multiple of M, the rest go to the neurons whose next weight scores highest, so that the layer keeps exactly ``kept``.
    """
    scores = W.abs() * G.diagonal().sqrt().to(W.dtype)
    if isinstance(kept, str):
        return W * best(scores, kept)
    each, rest = divmod(kept, len(W))
    order = scores.argsort(dim=1, descending=True)
    mask = torch.zeros_like(W, dtype=torch.bool).scatter(1, order[:, :each], True)
    if rest:
        following = order[:, each]
        rows = scores.gather(1, following[:, None]).flatten().topk(rest).indices
        mask[rows, following[rows]] = True
    return W * mask


def sparsegpt(W: Tensor, G: Tensor, kept: Kept, *, block: int = 128, damping: float = 0.01) -> Tensor:
    """SparseGPT (Frantar, Alistarh: Massive language models can be accurately pruned in one-shot, arXiv 2301.00774), Algorithm 1.

    Columns from left to right; what a column loses is made up for by those right of it (the OBS update, their eq. 3), by way of the Cholesky
    factor of the inverse Hessian, the same for all neurons (section 3.2). The mask is chosen for a block of columns at a time by ``(w / U_jj)²``
    of the weights as updated so far, the same share of each block, or for m columns at a time (section 3.3).

    Parameters
    ----------
    block : int
        B_s, columns in a block; rounded down to a multiple of m for "n:m".
    damping : float
        Added to the diagonal of G, as a share of its mean.
    """
    N = len(G)
    H = G + damping * G.diagonal().mean() * torch.eye(N, dtype=G.dtype, device=G.device)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True).to(W.dtype)
    # an input that is never there: its weights are worth nothing, and must not be kept for their size
    W = W * (G.diagonal() > 0)
    m = 1 if isinstance(kept, int) else parse_pattern(kept)[1]
    block -= block % m
    for start in range(0, N, block):
        stop = min(start + block, N)
        part, factor = W[:, start:stop], U[start:stop, start:stop]
        diagonal = factor.diagonal()
        if isinstance(kept, int):
            mask = best((part / diagonal) ** 2, round(kept * stop / N) - round(kept * start / N))
        else:
            mask = torch.zeros_like(part, dtype=torch.bool)
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if isinstance(kept, str) and j % m == 0:
                mask[:, j : j + m] = best((part[:, j : j + m] / diagonal[j : j + m]) ** 2, kept)
            errors[:, j] = part[:, j] * ~mask[:, j] / diagonal[j]
            part[:, j:] -= errors[:, j, None] * factor[j, j:]
        part *= mask  # what the update has brought to 0 up to rounding
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W


def alps(W: Tensor, G: Tensor, kept: Kept, *, max_iter: int = 300, refine: int = 10) -> Tensor:
    """ALPS (Meng, Behdin, Wang, Mazumder: Improved optimization for highly sparse one-shot pruning, arXiv 2406.07831), Algorithm 1.

    ``min ‖A Bᵀ − A Wᵀ‖² + λ₂ ‖B − W‖²`` with at most ``kept`` weights (their eq. 1), λ₂ a hundredth of the mean of G's diagonal, columns scaled
    so that the Hessian's diagonal is 1: ADMM on the copy D that is sparse, while the penalty ρ grows from 0.1 every third step by 1.3, 1.2 or
    1.1, as at least 10 %, 0.5 % or less of the support has changed since (section 3.1, "ρ update"), until it changes no more; then preconditioned
    conjugate gradients on that support, all neurons at once (section 3.2; after the scaling the preconditioner is the identity).

    Two rules are in the authors' code only: ρ is a fifth, and ADMM starts anew, where the first check finds next to no change; and from the 30th
    step on less than 0.03 % of change ends it.
    """
    H = G + 0.01 * G.diagonal().mean() * torch.eye(len(G), dtype=G.dtype, device=G.device)
    scale = H.diagonal().sqrt()
    H = H / scale / scale[:, None]
    eigenvalues, Q = (part.to(W.dtype) for part in torch.linalg.eigh(H))
    H, scale = H.to(W.dtype), scale.to(W.dtype)
    dense = W * scale
    C = dense @ H
    size = kept if isinstance(kept, int) else W.numel() * parse_pattern(kept)[0] / parse_pattern(kept)[1]

    before = best(dense.abs(), kept)
    D, V, rho, grown = dense * before, torch.zeros_like(dense), 0.1, False
    inverse = (Q / (eigenvalues + rho)) @ Q.T
    for iteration in range(1, max_iter + 1):
        B = (C - V + rho * D) @ inverse
        moved = B + V / rho
        mask = best(moved.abs(), kept)
        D = moved * mask
        V = V + rho * (B - D)
        if iteration % 3:
            continue
        changed = int((mask ^ before).sum())
        if (grown and changed == 0) or (iteration > 30 and changed < 3e-4 * size):
            break
        grown = grown or changed > 5e-3 * size
        if grown:
            rho *= 1.3 if changed > 0.1 * size else 1.2 if changed > 5e-3 * size else 1.1
            before = mask
        else:
            rho /= 5
            before = best(dense.abs(), kept)
            D, V = dense * before, torch.zeros_like(dense)
        inverse = (Q / (eigenvalues + rho)) @ Q.T
    mask = best(B.abs(), kept)
    return _refined(H, C, B * mask, mask, refine) / scale


def _refined(H: Tensor, C: Tensor, W: Tensor, mask: Tensor, iterations: int) -> Tensor:
    """Conjugate gradients from W towards argmin ½⟨W H, W⟩ − ⟨C, W⟩ over the weights on the mask, each neuron with its own steps."""
    tiny = torch.finfo(W.dtype).tiny
    residual = (C - W @ H) * mask
    direction, square = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        image = (direction @ H) * mask
        step = square / (direction * image).sum(dim=1, keepdim=True).clamp_min(tiny)
        W, residual = W + step * direction, residual - step * image
        last, square = square, residual.square().sum(dim=1, keepdim=True)
        direction = residual + square / last.clamp_min(tiny) * direction
    return W


def lasso(C: Tensor, G: Tensor, penalty: float, start: Tensor, *, max_iter: int, tol: float = 1e-6) -> Tensor:
    """``argmin_W ½⟨W G, W⟩ − ⟨C, W⟩ + penalty · ‖W‖₁`` by FISTA (FISTAPruner's eq. 4).

    Parameters
    ----------
    C : Tensor, shape (M, N)
        TᵀA for targets T of A.
    G : Tensor, shape (N, N)
    start : Tensor, shape (M, N)
    max_iter : int
    tol : float
        It ends when a step is smaller than this, in Frobenius norm (their eq. 6).
    """
    step = 1 / float(torch.linalg.matrix_norm(G, 2))
    W = extrapolated = start
    momentum = 1.0
    for _ in range(max_iter):
        before = W
        W = torch.nn.functional.softshrink(extrapolated - step * (extrapolated @ G - C), penalty * step)
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        extrapolated = W + (momentum - 1) / following * (W - before)
        momentum = following
        if float((W - before).norm()) < tol:
            break
    return W


def fistapruner(
    W: Tensor,
    G: Tensor,
    kept: Kept,
    streams: tuple[Tensor, Tensor] | None = None,
    *,
    max_iter: int = 20,
    searches: int = 20,
    rounding: float = 0.3,
) -> Tensor:
    """FISTAPruner (Zhao, Hu, Li, Zheng, Wang, Yuan: A convex-optimization-based layer-wise post-training pruner, arXiv 2408.03728), Algorithm 1.

    ``min ½‖Â Bᵀ − A Wᵀ‖² + λ‖B‖₁`` (their eq. 2), Â from the layers pruned so far and A from the dense ones (its error correction), by FISTA
    (eq. 4) from SparseGPT's weights, then rounded: the smallest weights go (section 3.4; eq. 7 for "n:m"), and what is kept stays shrunk. λ by
    bisection (section 3.4): up where rounding makes more than ``rounding`` of the error (eq. 8), else down; the best rounded weights met count.

    The paper brackets λ by [0, 10⁶] for its models and starts at 10⁻⁵. Here, in place of numbers that depend on the scale of the data: the
    λ at which nothing is left, downwards, a millionth of it at most, by the geometric mean, ``searches`` times.

    Parameters
    ----------
    streams : tuple of Tensor, each of shape (N, N), optional
        ``AᵀÂ`` and ``AᵀA``, where A is the dense stream and ``G = ÂᵀÂ``; if not given, the targets come from the pruned stream too.
    max_iter : int
        K, FISTA's steps for a λ.
    """
    start = chosen = sparsegpt(W, G, kept)
    cross, dense = (part.to(W.dtype) for part in streams or (G, G))
    G = G.to(W.dtype)
    C = W @ cross
    constant = float((W @ dense * W).sum())

    def error(B: Tensor) -> float:
        return max(float(((B @ G - 2 * C) * B).sum()) + constant, 0.0) ** 0.5

    least = error(chosen)
    high = float(C.abs().max())
    low = 1e-6 * high
    for _ in range(searches):
        penalty = (low * high) ** 0.5
        solution = lasso(C, G, penalty, start, max_iter=max_iter)
        rounded = solution * best(solution.abs(), kept)
        total = error(rounded)
        if total < least:
            chosen, least = rounded, total
        if total - error(solution) > rounding * total:
            low = penalty
        else:
            high = penalty
    return chosen


PRUNERS: dict[str, Pruner] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "sparsegpt": sparsegpt,
    "alps": alps,
    "fistapruner": fistapruner,
}
