"""`make soak` at a tiny size: every part runs, its figures are counted, and a wrong outcome is an exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import soak
from benchmarks.soak import PARTS, Figure


@pytest.mark.parametrize("part", ("crashes", "faults", "leaks", "load"))
def test_each_part_runs_at_a_tiny_size(part: str) -> None:
    """Those of files and of certificates have tests of their own."""
    # in a process of its own: it forks, and this one has threads and pools of other tests
    command = [sys.executable, "-m", "benchmarks.soak", "--scale", "0.003", "--seed", "1", "--part", part]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("wrong: 0"), done.stdout + done.stderr


def test_a_wrong_outcome_is_said_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "leaks", lambda scale, seed: iter([Figure("runs", 3, "one leaked", 2, ("run 1: a file", "run 2: a file"))]))
    done = CliRunner().invoke(soak.main, ["--part", "leaks"])
    assert done.exit_code == 1 and "runs: run 2: a file" in done.output and done.output.rstrip().endswith("wrong: 2")
