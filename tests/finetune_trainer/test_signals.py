"""Signals in processes of their own: what they end, how fast, and with which exit code."""

import signal
import subprocess
import sys
import time

import pytest
from finetune_trainer.errors import PreemptedError
from finetune_trainer.signals import run_interruptibly

# One loop that asks whether to stop, as all loops of the trainer do, and one that never does.
_PROGRAM = """
import sys, time
from finetune_trainer.signals import StopFlag
stop = StopFlag()
stop.grace_seconds = float(sys.argv[1])
with stop.installed():
    print("ready", flush=True)
    if sys.argv[2] == "poll":
        try:
            while True:
                stop.check()
                time.sleep(0.01)
        except Exception as error:
            sys.exit(int(error.exit_code))
    while True:
        time.sleep(1)
"""


def start(grace_seconds: float, what: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(grace_seconds), what], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def finish(process: "subprocess.Popen[str]") -> int:
    with process:
        return process.wait(30)


def test_first_signal_ends_the_loop_that_polls() -> None:
    process = start(60, "poll")

    process.send_signal(signal.SIGTERM)

    assert finish(process) == 75


def test_second_signal_leaves_at_once() -> None:
    process = start(60, "hang")

    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGTERM)

    assert finish(process) == 75


def test_end_of_the_grace_period_leaves_with_what_is_saved() -> None:
    process = start(6, "hang")

    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()

    assert finish(process) == 75
    assert 0.9 < time.monotonic() - sent < 5


def test_check_interrupts_what_asks_nobody() -> None:
    def stop() -> None:
        raise PreemptedError("Preempted", "stopped")

    started = time.monotonic()
    with pytest.raises(PreemptedError):
        run_interruptibly(lambda: time.sleep(5), stop)
    assert time.monotonic() - started < 2
    assert run_interruptibly(lambda: 3, lambda: None) == 3
    with pytest.raises(KeyError):
        run_interruptibly(lambda: {}["missing"], lambda: None)
