"""The suite's own way to wait: for progress, whatever it takes, and for nothing else."""

from __future__ import annotations

import sys

import pytest
import waiting


def python(code: str) -> list[str]:
    return [sys.executable, "-c", "import sys, time\n" + code]


def test_what_was_printed_and_the_exit_code(tmp_path):
    done = waiting.process(python("print('out'); sys.exit('err')"), tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (1, "out\n", "err\n")


class Clock:
    """A clock that only sleeping moves, a hundred times as far."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 100 * seconds


def test_what_gets_on_is_waited_for_and_what_is_still_is_not(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(waiting, "time", clock)
    slow = 0.9 * waiting.STILL  # from sign to sign
    waiting.until(lambda: clock.now > 50 * slow, lambda: clock.now // slow)
    assert clock.now > 40 * waiting.STILL
    with pytest.raises(AssertionError, match="nothing has happened for 900 s"):
        waiting.until(lambda: clock.now > 200 * slow, lambda: clock.now // (3 * slow))


def test_one_that_fails_ends_the_others(tmp_path):
    done = waiting.together([python("time.sleep(10**6)"), python("sys.exit(3)")], tmp_path)
    assert [process.returncode for process in done] == [-9, 3]
