"""How much memory a computation takes beyond what was there before it."""

import ctypes
import gc
import os
import threading
from pathlib import Path
from types import TracebackType

_STATM = Path("/proc/self/statm")
_INTERVAL = 0.002  # seconds


def anonymous_bytes() -> int:
    """Bytes of the process's own pages; pages of mapped files, which the system can take back, are not counted."""
    resident, shared = _STATM.read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Peak memory of this process inside a ``with`` block, in bytes beyond that at its start.

    Sampled 500 times a second by a thread, which sees every allocation that is large enough to matter here: memory is
    resident only once it is written to. ``extra`` is None where the system has no ``/proc``. For a process of its own: what
    earlier work freed but the allocator kept would hide what is measured.
    """

    def __init__(self) -> None:
        self.extra: int | None = None
        self._peak = self._before = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak, anonymous_bytes())

    def __enter__(self) -> "PeakMemory":
        if not _STATM.exists():
            return self
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: gives freed memory back, so that it is counted anew
        if trim is not None:
            trim(0)
        self._before = self._peak = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            self._stop.set()
            self._thread.join()
            self.extra = max(self._peak, anonymous_bytes()) - self._before
