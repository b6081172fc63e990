"""Semantics of the work queue, with the clock in the test's hand."""

import asyncio
from dataclasses import dataclass, field

import pytest
from finetune_operator.queue import QueueClosedError, WorkQueue


@dataclass
class Bench:
    """A queue, its clock, and what it measured."""

    now: float = 100.0
    waits: list[float] = field(default_factory=list)
    queue: WorkQueue[str] = field(init=False)

    def __post_init__(self) -> None:
        self.queue = WorkQueue(clock=lambda: self.now, jitter=lambda: 1.0, observe_wait=self.waits.append)

    def drain(self) -> list[str]:
        """Take all keys that are handed out at this time, and finish them."""
        keys: list[str] = []
        while (key := self.queue.take()) is not None:
            keys.append(key)
            self.queue.done(key)
        return keys


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_keys_come_in_the_order_they_were_added(bench: Bench) -> None:
    for key in ("a", "b", "c"):
        bench.queue.add(key)

    assert bench.drain() == ["a", "b", "c"]


def test_urgent_keys_come_first_in_their_order(bench: Bench) -> None:
    bench.queue.add("a")
    for key in ("b", "c"):
        bench.queue.add(key, is_urgent=True)

    assert bench.drain() == ["b", "c", "a"]


def _build_turns() -> Bench:
    """A queue whose keys say by their first letter to which flow they belong."""
    bench = Bench()
    bench.queue = WorkQueue(clock=lambda: bench.now, find_flow=lambda key: key[0], jitter=lambda: 1.0)
    return bench


def test_flows_take_turns() -> None:
    bench = _build_turns()
    for key in ("a1", "a2", "a3", "b1", "c1", "b2"):
        bench.queue.add(key)
    assert len(bench.queue) == 6

    assert bench.drain() == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(bench.queue) == 0


def test_urgent_keys_come_first_in_their_own_flow_alone() -> None:
    bench = _build_turns()
    for key in ("a1", "b1"):
        bench.queue.add(key)
    for key in ("a2", "a3"):
        bench.queue.add(key, is_urgent=True)

    assert bench.drain() == ["a2", "b1", "a3", "a1"]


def test_flow_that_comes_later_waits_for_one_key_of_each_other() -> None:
    bench = _build_turns()
    for number in range(1000):
        bench.queue.add(f"a{number}", is_urgent=True)
        bench.queue.add(f"b{number}")
    bench.queue.take()
    bench.queue.add("c1")

    assert bench.drain()[:3] == ["b0", "a1", "c1"]


def test_key_added_many_times_comes_once(bench: Bench) -> None:
    for _ in range(5):
        bench.queue.add("a")

    assert bench.drain() == ["a"]


def test_key_is_never_with_two_workers(bench: Bench) -> None:
    bench.queue.add("a")
    assert bench.queue.take() == "a"
    bench.queue.add("a")

    assert bench.queue.take() is None


def test_key_added_while_worked_on_comes_again_once_after_that(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.take()
    bench.queue.add("a")
    bench.queue.add("a")
    bench.queue.done("a")

    assert bench.drain() == ["a"]


def test_key_that_was_not_added_again_is_over(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.take()
    bench.queue.done("a")

    assert bench.queue.take() is None


def test_other_keys_go_on_while_one_is_worked_on(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.take()
    bench.queue.add("b")

    assert bench.queue.take() == "b"


def test_delayed_key_comes_when_its_time_has_come(bench: Bench) -> None:
    bench.queue.add_after("a", 10)
    bench.now += 9.9
    assert bench.drain() == []
    bench.now += 0.1

    assert bench.drain() == ["a"]


@pytest.mark.parametrize(
    "delays", [pytest.param((10, 3), id="shorter one second"), pytest.param((3, 10), id="shorter one first")]
)
def test_earliest_delay_wins_and_the_other_is_void(bench: Bench, delays: tuple[float, float]) -> None:
    for seconds in delays:
        bench.queue.add_after("a", seconds)
    bench.now += 3
    assert bench.drain() == ["a"]
    bench.now += 100

    assert bench.drain() == []


def test_delay_of_zero_or_less_is_none(bench: Bench) -> None:
    bench.queue.add_after("a", 0)
    bench.queue.add_after("b", -1)

    assert bench.drain() == ["a", "b"]


def test_delayed_key_that_is_worked_on_waits_for_the_worker(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.take()
    bench.queue.add_after("a", 1)
    bench.now += 2
    assert bench.queue.take() is None
    bench.queue.done("a")

    assert bench.drain() == ["a"]


def test_backoff_doubles_up_to_five_minutes(bench: Bench) -> None:
    delays = [bench.queue.retry("a") for _ in range(16)]

    assert delays[:4] == pytest.approx([0.05, 0.1, 0.2, 0.4])
    assert delays[-1] == 300


def test_backoff_stays_finite_after_thousands_of_failures(bench: Bench) -> None:
    for _ in range(5000):
        bench.queue.retry("a")

    assert bench.queue.retry("a") == 300


def test_jitter_takes_up_to_half_of_the_delay() -> None:
    queue: WorkQueue[str] = WorkQueue(clock=lambda: 0.0, jitter=lambda: 0.0)

    assert queue.retry("a") == pytest.approx(0.025)


def test_backoff_is_kept_until_forget(bench: Bench) -> None:
    bench.queue.retry("a")
    bench.now += 1
    bench.drain()
    assert bench.queue.retry("a") == pytest.approx(0.1)
    bench.queue.forget("a")

    assert bench.queue.retry("a") == pytest.approx(0.05)


def test_backoff_of_one_key_is_not_that_of_another(bench: Bench) -> None:
    for _ in range(8):
        bench.queue.retry("poison")

    assert bench.queue.retry("a") == pytest.approx(0.05)


def test_key_in_backoff_comes_at_once_when_something_changes(bench: Bench) -> None:
    for _ in range(16):
        bench.queue.retry("a")
    bench.drain()
    bench.queue.add("a")

    assert bench.drain() == ["a"]


def test_wait_is_measured_from_the_first_add(bench: Bench) -> None:
    bench.queue.add("a")
    bench.now += 2
    bench.queue.add("a")
    bench.now += 1
    bench.drain()

    assert bench.waits == [3]


def test_length_counts_keys_that_wait(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.add("b")
    bench.queue.take()

    assert (len(bench.queue), bench.queue.num_in_flight) == (1, 1)


def test_closed_queue_hands_out_nothing(bench: Bench) -> None:
    bench.queue.add("a")
    bench.queue.close()
    bench.queue.add("b")
    bench.queue.add_after("c", 0)

    assert bench.drain() == []


async def test_waiting_workers_get_one_key_each(bench: Bench) -> None:
    workers = [asyncio.create_task(bench.queue.get()) for _ in range(2)]
    await asyncio.sleep(0)
    bench.queue.add("a")
    bench.queue.add("b")

    assert sorted(await asyncio.gather(*workers)) == ["a", "b"]


async def test_waiting_worker_is_woken_for_a_delayed_key() -> None:
    loop = asyncio.get_running_loop()
    queue: WorkQueue[str] = WorkQueue(clock=loop.time)
    worker = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add_after("late", 60)
    queue.add_after("early", 0.01)

    assert await worker == "early"
    queue.close()


async def test_cancelled_worker_leaves_its_key_to_another(bench: Bench) -> None:
    first, second = (asyncio.create_task(bench.queue.get()) for _ in range(2))
    await asyncio.sleep(0)
    bench.queue.add("a")
    first.cancel()

    assert await second == "a"


async def test_close_ends_waiting_workers(bench: Bench) -> None:
    worker = asyncio.create_task(bench.queue.get())
    await asyncio.sleep(0)
    bench.queue.close()

    with pytest.raises(QueueClosedError):
        await worker
