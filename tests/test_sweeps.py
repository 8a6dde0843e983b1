"""Jobs side by side: results in order, errors and interruptions that stop the work."""

import os
import signal
import sys
import threading
import time

import pytest

from mome_utils.sweeps import in_parallel


def double(x):
    return 2 * x


def fail(x):
    if x == 1:
        raise ValueError("job one")
    return x


def mark(folder, number):
    time.sleep(0.5)
    (folder / str(number)).write_text(str(os.getpid()))


@pytest.fixture
def interruptible():
    """Interrupts raise, also where the tests run in the background of a shell, which has them ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_progress_is_told(workers):
    seen = []
    jobs = [(i,) for i in range(5)]
    assert in_parallel(double, jobs, workers=workers, watch=seen.append, pause=0.05) == [0, 2, 4, 6, 8]
    assert seen[-1] == 5 and seen == sorted(seen)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_error_reaches_the_caller(workers):
    with pytest.raises(ValueError, match="job one"):
        in_parallel(fail, [(0,), (1,), (2,)], workers=workers)


def test_one_worker_is_this_thread():
    assert in_parallel(threading.get_ident, [()], workers=1) == [threading.get_ident()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that a stop button could send")
def test_an_interruption_ends_the_workers(tmp_path, interruptible):
    def interrupt(finished):
        if any(tmp_path.iterdir()):
            os.kill(os.getpid(), signal.SIGINT)  # what a notebook's stop button sends

    with pytest.raises(KeyboardInterrupt):
        in_parallel(mark, [(tmp_path, i) for i in range(40)], workers=2, watch=interrupt, pause=0.05)
    time.sleep(1)
    done = len(list(tmp_path.iterdir()))
    time.sleep(1)
    assert len(list(tmp_path.iterdir())) == done < 40
