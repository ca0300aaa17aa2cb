"""Nobody takes all the threads."""

from __future__ import annotations

import threading
from concurrent.futures import wait

import pytest

from adapter_store.fair_threads import FairThreads


@pytest.fixture
def threads():
    made = FairThreads(threads=6, share=2, name="test")
    yield made
    made.close()


def test_an_owner_whose_work_hangs_holds_up_nobody_else(threads: FairThreads) -> None:
    released = threading.Event()
    hung = [threads.submit("silent", released.wait, 30) for _ in range(50)]
    for number in range(20):
        assert threads.submit(f"owner{number % 3}", lambda number=number: number).result(10) == number
    assert not any(future.done() for future in hung)
    released.set()
    assert all(wait(hung, 30).done)


def test_an_owner_uses_its_share_and_not_more(threads: FairThreads) -> None:
    both, lock, running, most = threading.Barrier(2), threading.Lock(), [0], [0]

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        both.wait(10)  # passes only while two run at once
        with lock:
            running[0] -= 1

    for future in [threads.submit("one", work) for _ in range(20)]:
        future.result(30)
    assert most[0] == 2


def test_work_of_one_owner_begins_in_order(threads: FairThreads) -> None:
    single, seen = FairThreads(1, 1, "test"), []
    for future in [single.submit("one", seen.append, number) for number in range(30)]:
        future.result(10)
    assert seen == list(range(30))
    single.close()


def test_failures_and_cancelled_work_give_the_share_back(threads: FairThreads) -> None:
    released = threading.Event()
    running = [threads.submit("one", released.wait, 30) for _ in range(2)]
    failing = [threads.submit("one", int, "no number") for _ in range(3)]
    cancelled = [threads.submit("one", seen) for seen in [lambda: pytest.fail("it was cancelled")] * 3]
    assert all(future.cancel() for future in cancelled)
    released.set()
    for future in failing:
        assert isinstance(future.exception(10), ValueError)
    wait(running, 10)
    assert threads.submit("one", lambda: "fine").result(10) == "fine"


def test_nothing_begins_after_close(threads: FairThreads) -> None:
    released, began = threading.Event(), threading.Event()
    running = [threads.submit("one", released.wait, 30) for _ in range(2)]
    threads.submit("one", began.set)
    threads.close()
    released.set()
    wait(running, 10)
    assert not began.wait(0.2)
    with pytest.raises(RuntimeError, match="closed"):
        threads.submit("one", began.set)
