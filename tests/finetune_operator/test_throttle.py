"""The token bucket, with the clock in the test's hand."""

import math

import pytest
from finetune_operator.throttle import TokenBucket, Turns


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_burst_passes_at_once_and_the_rest_at_the_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3, clock=Clock())

    assert [bucket.reserve() for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])


def test_pause_fills_the_bucket_up_to_the_burst() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=10, burst=2, clock=clock)
    bucket.reserve()
    bucket.reserve()
    clock.now = 60

    assert [bucket.reserve() for _ in range(3)] == pytest.approx([0, 0, 0.1])


def test_nothing_passes_while_the_server_asks_for_patience() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=10, burst=5, clock=clock)
    bucket.block(7)
    assert bucket.reserve() == pytest.approx(7)
    clock.now = 7

    assert bucket.reserve() == 0


def test_keys_beyond_the_rate_wait_for_one_turn_each() -> None:
    clock = Clock()
    turns: Turns[str] = Turns(rate=10, clock=clock)
    waits = [turns.take(key) for key in ("a", "b", "c", "b")]
    clock.now = 0.1
    later = [turns.take(key) for key in ("b", "c")]

    assert waits == pytest.approx([0, 0.1, 0.2, 0.1])
    assert later == pytest.approx([0, 0.1])


def test_time_since_the_last_turn_counts_from_when_it_came() -> None:
    clock = Clock()
    turns: Turns[str] = Turns(rate=10, clock=clock)
    turns.take("a")
    turns.take("b")
    before = turns.seconds_since("b")
    clock.now = 0.1
    turns.take("b")
    clock.now = 5

    assert (before, turns.seconds_since("a"), turns.seconds_since("b")) == (math.inf, 5, pytest.approx(4.9))


def test_key_that_is_gone_leaves_no_turn() -> None:
    turns: Turns[str] = Turns(rate=10, clock=Clock())
    turns.take("a")
    turns.take("b")
    turns.forget("a")
    turns.forget("b")

    assert turns.take("b") == pytest.approx(0.2)
    assert turns.seconds_since("a") == math.inf


def test_a_token_is_there_or_not() -> None:
    clock = Clock()
    bucket = TokenBucket(rate=0.1, burst=2, clock=clock)

    assert [bucket.take() for _ in range(4)] == [True, True, False, False]
    clock.now = 10
    assert [bucket.take() for _ in range(2)] == [True, False]
