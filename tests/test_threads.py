"""Work shared over kept threads."""

import threading

import pytest

from hqsearch.threads import share_work


@pytest.mark.parametrize("n_workers", [1, 2, 4])
def test_every_part_is_done_once(n_workers):
    done = []
    share_work(done.append, 25, n_workers)
    assert sorted(done) == list(range(25))


@pytest.mark.parametrize("n_workers", [1, 2])
def test_an_exception_in_a_part_is_raised_and_the_threads_work_on(n_workers):
    def fail(part):
        raise KeyError(part)

    for _ in range(2):
        with pytest.raises(KeyError):
            share_work(fail, 6, n_workers)
        done = []
        share_work(done.append, 6, n_workers)
        assert sorted(done) == list(range(6))


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_after_an_error_of_the_caller_the_other_threads_stop(error):
    # Each of two workers has one of the first two parts; the caller's fails.
    both, done, n_parts = threading.Barrier(2), [], 10**6

    def work(part):
        if part < 2:
            both.wait(timeout=30)
            if threading.current_thread() is threading.main_thread():
                raise error
        done.append(part)

    with pytest.raises(error):
        share_work(work, n_parts, 2)
    assert 0 < len(done) < n_parts - 1
