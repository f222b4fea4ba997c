"""Whether two answers are the same mathematics: 1/2, 0.5 and \\frac12. By math-verify, in a process that can be killed.

Deciding equality can take for ever (9^{9^{9^9}} has more digits than the universe has room for), and Python cannot
stop its own thread in the middle of one big number. So a second process does it: started on first use, kept, and killed
when it is late. A batch has a budget of seconds, which that process shares out (math_worker.py). It never sees the
notebook's memory and is not given more than a few hundred characters.
"""

import atexit
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbhelpers import host

from .answers import number_of, same
from .reading import fraction, one_number, plain

PROGRAM = Path(__file__).with_name("math_worker.py")
SECONDS = 2.5  # for a batch of comparisons, most of which take a few milliseconds each,
SECONDS_EACH = 0.03  # and this much more for each of them
START_SECONDS = 120.0  # importing sympy takes one second, on a cold and busy disk many
CHARACTERS, DEPTH, WORDS = 200, 8, 6  # an answer beyond any of these is no short piece of mathematics

if sys.platform == "win32":
    _NO_WINDOW = subprocess.CREATE_NO_WINDOW
else:
    _NO_WINDOW = 0

_PARTS = re.compile(r"(?P<escape>\\[A-Za-z]+|\\.)|(?P<open>[({\[])|(?P<close>[)}\]])|(?P<word>[^\W\d_]{2,})", re.DOTALL)


def comparable(answer: str) -> bool:
    """Whether an answer is given to the parser: short, its braces closed, not deeply nested, not prose.

    Nested brackets and prose are what the grammar is slowest at: seconds for a hundred characters.
    """
    if not answer.strip() or len(answer) > CHARACTERS:
        return False
    depth = words = braces = 0
    for match in _PARTS.finditer(answer):
        depth += (match["open"] is not None) - (match["close"] is not None)
        words += match["word"] is not None
        braces += (match[0] == "{") - (match[0] == "}")
        if depth > DEPTH or words > WORDS or braces < 0:
            return False
    return braces == 0


class Worker:
    """One process that compares answers, and the same one for every call. Safe to use from any thread.

    Args:
        seconds (`float`): Time for a batch, to which `SECONDS_EACH` is added for each comparison. Starting the process
            does not count.
        program (`Path`): What it runs.
    """

    def __init__(self, seconds: float = SECONDS, program: Path = PROGRAM):
        self.seconds, self.program = seconds, program
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()
        atexit.register(self.close)

    def equal(self, pairs: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether in each pair (right answer, given answer) the second is equal to the first.

        A comparison that is late, or that kills its process in another way, is False; the others are not affected, as
        long as the batch has time left.

        Raises:
            host.CannotRun: If math-verify is not installed, or its process does not start.
        """
        with self.lock:
            verdicts = self._compare(list(dict.fromkeys(pairs)))
        return [verdicts.get(pair) is True for pair in pairs]

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be written has no reader any more
                    if pipe is not None:
                        pipe.close()

    def _compare(self, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], bool | None]:
        """Verdicts by pair; None, or no entry, for what did not end in time."""
        verdicts: dict[tuple[str, str], bool | None] = {}
        left = self.seconds + SECONDS_EACH * len(pairs)
        while pairs and left > 0:
            # In a fork (accelerate's notebook launcher) the worker is not a child of the forked process, so poll()
            # calls it gone: each rank starts its own, and no answers are mixed.
            process = self.process
            if process is None or process.poll() is not None:
                process = self._start()
            begun = time.monotonic()
            # a program that cannot fork is killed over each late answer, one that can keeps to its time itself
            patience = left + 2 if hasattr(os, "fork") else left
            for answer in self._ask(process, {"pairs": pairs, "seconds": left}, len(pairs), patience):
                verdicts[pairs[answer[0]]] = answer[1]
            left -= time.monotonic() - begun
            pairs = [pair for pair in pairs if pair not in verdicts][1:]  # the process died over the first of them
        return verdicts

    def _start(self) -> subprocess.Popen:
        self.close()
        host.require("math-verify")
        self.process = process = subprocess.Popen(
            [sys.executable, "-B", str(self.program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            creationflags=_NO_WINDOW,
        )
        hello = {"path": [p for p in sys.path if p], "start_seconds": START_SECONDS}
        for problem in self._ask(process, hello, 1, START_SECONDS) or ["it ended, or took too long to start"]:
            if problem is None:
                break
            self.close()
            raise host.CannotRun(
                f"math-verify's process does not work ({problem}). In a notebook cell: "
                f"%{host.INSTALL['math-verify']}. Or use rewards.correctness, which needs no process"
            )
        return process

    def _ask(self, process: subprocess.Popen, line: dict, count: int, seconds: float) -> list[Any]:
        """The `count` answers to a line; fewer if the process ended, or was killed because it took too long."""
        assert process.stdin is not None and process.stdout is not None  # both are pipes
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        answers: list[Any] = []
        try:
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            while len(answers) < count and (answer := process.stdout.readline()).endswith("\n"):
                answers.append(json.loads(answer))
        except OSError:  # it ended before it read the line
            pass
        except BaseException:  # the stop button: answers to come must not be taken for the next ones'
            self.close()
            raise
        finally:
            timer.cancel()
            timer.join()
        if len(answers) < count:
            self.close()
        return answers


_worker = Worker()


def equal(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether in each pair (right answer, given answer) both are the same mathematics.

    Text that is equal, and two plain numbers, need no parser; nor does what `comparable` refuses, which is unequal. The
    rest (roots, percentages, sets, intervals, formulas) is read by math-verify and compared by these rules:

    - Numbers are compared exactly, however small they are and however little they differ. A decimal is also equal to a
      number that no decimal states (1/7, a root, pi) if it is that number rounded or cut off and has six digits from
      its first that is not 0: 0.142857 is 1/7, 0.143 is not.
    - 50% is 50, where a percentage is asked, as it is 0.5.
    - Of a chain of equations the last member counts, if all are equal: x = 6/2 = 3 is 3, and 6 = 5 is nothing.
    - Sets are equal in any order; pairs, points and intervals are not. What stands in braces is a set and no pair,
      {1,2} is not (1,2); without any, 1,2 is either. A set of one is its member.

    Args:
        pairs (`Sequence[tuple[str, str]]`): LaTeX, with or without dollar signs, or plain numbers.

    Returns:
        `list[bool]`

    Raises:
        host.CannotRun: If math-verify is needed and not installed, or its process does not start.

    Example:
    >>> equal([("1/2", "0.5"), ("1/2", r"\\frac12"), ("1/2", r"\\frac13")])
    [True, True, False]
    """
    verdicts = [_without_parser(gold, given) for gold, given in pairs]
    asked = [i for i, verdict in enumerate(verdicts) if verdict is None]
    for i, verdict in zip(asked, _worker.equal([pairs[i] for i in asked]), strict=True):
        verdicts[i] = verdict
    return [verdict is True for verdict in verdicts]


def _without_parser(gold: str, given: str) -> bool | None:
    """Whether two answers are equal, where that can be said at once; None where the parser has to look."""
    if same(given, gold):
        return True
    if not comparable(gold) or not comparable(given) or None not in (number_of(gold), number_of(given)):
        return False
    one, other = one_number(plain(gold).strip()), one_number(plain(given).strip().removesuffix("."))
    if one is None or other is None:
        return None
    part, whole = (one, other) if one.endswith("%") else (other, one)
    hundredth = part.endswith("%") and not whole.endswith("%") and fraction(part) / 100 == fraction(whole)
    return True if hundredth or fraction(part) == fraction(whole) else None
