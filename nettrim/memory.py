"""Memory that goes back to the system: rows in one piece, and what was freed."""

from __future__ import annotations

import contextlib
import ctypes

from torch import Tensor


def give_back() -> None:
    """Give freed memory back, which glibc keeps where it came in pieces of less than 32 MB: block by block that adds up. Without glibc, nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Room:
    """Room for the rows that come batch by batch, as one tensor: a large one goes back to the system when it is freed, many small ones may not."""

    def __init__(self, rows: int) -> None:
        self._rows, self._filled, self._all_here = rows, 0, True
        self._whole: Tensor | None = None

    def put(self, piece: Tensor) -> Tensor:
        """A copy of the piece in its place, or elsewhere if it is not some of the rows."""
        end = self._filled + len(piece)
        if piece.dim() != 2 or end > self._rows or (self._whole is not None and self._whole.shape[1] != piece.shape[1]):
            self._all_here = False
            return piece.clone()
        if self._whole is None:
            self._whole = piece.new_empty(self._rows, piece.shape[1])
        here = self._whole[self._filled : end]
        self._filled = end
        return here.copy_(piece)

    @property
    def rows(self) -> Tensor | None:
        """All of them, if they are complete and in one piece."""
        return self._whole if self._filled == self._rows and self._all_here else None
