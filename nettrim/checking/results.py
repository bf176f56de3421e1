"""What a verification found: one record a check, and the table of them."""

from __future__ import annotations

import dataclasses
import io
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

HOLDS, BROKEN, UNPROVEN = "holds", "broken", "not proven"
_WIDTH = 120
_ALIKE = 1e-12  # relative: what sums in another order differ by


@dataclass(frozen=True)
class Check:
    """One thing that a report says, and what was found instead of it.

    Attributes
    ----------
    subject : str
        A layer's name, or ``"network"``, ``"report"``, ``"masks"``.
    what : str
        The figure or the promise.
    stated, found : float, str or None
        What the report says, and what was computed.
    tolerance : float
        By how much the two may differ; 0 where they must be the same.
    outcome : {"holds", "broken", "not proven"}
        The last where nothing here can say: it is no reason for doubt, and no proof.
    note : str
        What the outcome rests on.
    """

    subject: str
    what: str
    stated: float | str | None
    found: float | str | None
    tolerance: float
    outcome: str
    note: str

    def __str__(self) -> str:
        said = f"{self.subject}: {self.what}: stated {_shown(self.stated)}, found {_shown(self.found)}"
        within = f" (tolerance {self.tolerance:.3g})" if self.tolerance else ""
        return f"{said}{within}: {self.outcome.upper() if self.outcome == BROKEN else self.outcome}{f'; {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class Verification:
    """Every promise of a report, checked; ``str()`` of it is a table.

    Attributes
    ----------
    checks : tuple of Check
    """

    checks: tuple[Check, ...]

    @property
    def holds(self) -> bool:
        """Whether no check is broken (and there is one)."""
        return bool(self.checks) and not self.broken

    @property
    def complete(self) -> bool:
        """Whether every check holds: nothing is broken, and nothing is left unproven."""
        return bool(self.checks) and all(check.outcome == HOLDS for check in self.checks)

    @property
    def broken(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.outcome == BROKEN)

    @property
    def unproven(self) -> tuple[Check, ...]:
        """The checks that could not be made here; each says why."""
        return tuple(check for check in self.checks if check.outcome == UNPROVEN)

    def to_dict(self) -> dict[str, Any]:
        """Return it as dictionaries, lists, strings and finite numbers; other numbers become strings."""
        checks = [{key: _plain(value) for key, value in dataclasses.asdict(check).items()} for check in self.checks]
        return {"holds": self.holds, "complete": self.complete, "checks": checks}

    def __str__(self) -> str:
        out = io.StringIO()
        console = Console(file=out, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
        console.print(Text(self._verdict()))
        table = Table(box=box.MARKDOWN)
        for header in ("subject", HOLDS, BROKEN, UNPROVEN):
            table.add_column(header, overflow="fold", justify="left" if header == "subject" else "right")
        counts: dict[str, Counter[str]] = {}
        for check in self.checks:
            counts.setdefault(check.subject, Counter())[check.outcome] += 1
        for subject, count in counts.items():
            table.add_row(*map(Text, (subject, str(count[HOLDS]), str(count[BROKEN] or "-"), str(count[UNPROVEN] or "-"))))
        console.print(table)
        for check in (*self.broken, *self.unproven):
            console.print(Text(str(check)))
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _verdict(self) -> str:
        total, broken, unproven = len(self.checks), len(self.broken), len(self.unproven)
        rest = f", {unproven} not proven here" if unproven else ""
        if not self.holds:
            return f"VERIFICATION FAILS: {broken} of {total} checks broken{rest}"
        return f"verification holds: {total - unproven} of {total} checks{rest}"


def compare(subject: str, what: str, stated: float, found: float, tolerance: float = 0.0, note: str = "") -> Check:
    """A figure: it holds where it differs by at most ``tolerance``; a figure that is no number never does."""
    tolerance += _ALIKE * abs(found) if math.isfinite(found) else 0.0
    same = stated == found or abs(stated - found) <= tolerance
    return Check(subject, what, stated, found, tolerance, HOLDS if same else BROKEN, note)


def decide(subject: str, what: str, good: bool | None, stated: float | str | None, found: float | str | None, note: str = "") -> Check:
    """Something that is so, is not so, or (None) that nothing here can say."""
    outcome = UNPROVEN if good is None else HOLDS if good else BROKEN
    return Check(subject, what, stated, found, 0.0, outcome, note)


def _shown(value: float | str | None) -> str:
    if isinstance(value, float):
        return f"{value:.9g}"
    return "-" if value is None else str(value)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
