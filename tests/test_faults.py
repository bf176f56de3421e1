"""After any failure, at any line of any stage, the caller's model is what it was and nothing is left behind; the judge of it can see."""

import linecache
import os
import signal
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from networks import chain, same_bits, samples, state_of

from benchmarks import soak_faults
from nettrim import NetTrimError, prune, safeguard

INPUTS = samples(60, 8)


@pytest.mark.parametrize("call", soak_faults.CALLS)
def test_an_exception_at_any_line_leaves_the_model(call: str) -> None:
    """A part of the lines, other ones each time; `make soak` takes all of them."""
    found = soak_faults.faults(per_line=2, seed=int.from_bytes(os.urandom(4)), calls=(call,), share=0.03)
    assert found.injected > 10
    assert (found.wrong, found.complaints) == (0, [])


@pytest.mark.parametrize("call", ("threads", "exact zeros, in place"))
def test_an_exception_behind_the_last_write(call: str) -> None:
    """The network is the pruned one by then, and what the call was made under is put back."""
    lines = len(soak_faults.places(call))
    for index in range(lines - 12, lines):
        assert soak_faults.inject(call, index, RuntimeError) == []


@pytest.mark.parametrize("call", ("cascade, in place", "exact zeros, in place"))
def test_an_interrupt_of_the_cleaning_up_itself(call: str) -> None:
    """In front of each line of the ``finally`` blocks, the first and the last time that it runs."""
    places = soak_faults.places(call)
    lines = sorted({place for place in places if place[0] in ("capture.py", "sensitivity.py", "sharing.py", "prune.py")})
    chosen = lines[:: max(1, len(lines) // 25)]
    for place in chosen:
        last = len(places) - 1 - places[::-1].index(place)
        assert soak_faults.inject(call, last, KeyboardInterrupt) == []


def test_the_judge_sees_what_is_not_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safeguard.Before, "put_back", lambda self: None)
    call = "cascade, in place"
    places = soak_faults.places(call)
    complaints = []
    for text in ("module.training = training", "buffer.copy_(value)", "return result"):
        index = next(index for index, place in enumerate(places) if text in linecache.getline(str(soak_faults.PACKAGE / place[0]), place[1]))
        complaints.append(" ".join(soak_faults.inject(call, index, KeyboardInterrupt)))
    torch.backends.mha.set_fastpath_enabled(True)
    assert "flags" in complaints[0] and "state" in complaints[1]


def test_a_real_interrupt() -> None:
    """SIGINT, as Ctrl-C sends it, at times that nobody chose."""
    model = chain(8, 40, 40, 4)
    before, flags = state_of(model), [module.training for module in model.modules()]
    for delay in (0.01, 0.03, 0.06, 0.1):
        assert any(_interrupted(model, delay) for _ in range(20))
        assert same_bits(state_of(model), before) and [module.training for module in model.modules()] == flags
        assert torch.is_grad_enabled() and torch.backends.mha.get_fastpath_enabled()


def _interrupted(model: torch.nn.Module, delay: float) -> bool:
    """Whether the interrupt came out of a call; Python itself drops one that strikes in a destructor."""
    timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        timer.start()
        while timer.is_alive():
            prune(model, INPUTS, epsilon=0.05, inplace=False)
        time.sleep(0.05)
    except KeyboardInterrupt:
        return True
    finally:
        timer.join()
        signal.signal(signal.SIGINT, handler)
    return False


def test_a_worker_that_is_killed_while_it_solves() -> None:
    model = chain(8, 40, 40, 4)
    before = state_of(model)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as executor:
        worker = executor.submit(os.getpid).result()

        def kill() -> None:
            time.sleep(0.05)
            os.kill(worker, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        with pytest.raises(NetTrimError, match="BrokenProcessPool"):
            thread.start()
            while True:
                prune(model, INPUTS, epsilon=0.02, mode="parallel", executor=executor, inplace=False)
        thread.join()
    assert same_bits(state_of(model), before)
    assert prune(model, INPUTS, epsilon=0.2, mode="parallel").report.certificate.holds


def test_no_thread_is_left_by_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    threads = set(threading.enumerate())
    prune(chain(8, 4), INPUTS, epsilon=0.2, progress=True)
    assert set(threading.enumerate()) == threads
