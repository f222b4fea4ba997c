"""The program that parses model-written mathematics, in a process of its own (math_equal.py starts and ends it).

It first reads one line of JSON, {"path": sys.path, "start_seconds": b}, and answers null, or a string that says why it
cannot work. Then it reads a line {"pairs": [[right answer, given answer], ...], "seconds": s} for each batch, and
answers a line [number of the pair, true, false or null] for each pair, in any order: null for one that did not end in
time. It is run as a file, so that no notebook's __main__ and no torch is imported; it ends when its input does.

Where there is fork, copies of this process compare, several at a time. One that is late is killed and replaced in
milliseconds, where a new process would import sympy for a second. No answer waits long behind one that never ends: all
get some hundredths of a second first, then those that were late more, then whatever is left of the batch's time.

LaTeX is parsed by a grammar. math-verify's parser of plain expressions is not used: it ends in sympy's `parse_expr`,
which evaluates its text as Python.
"""

import faulthandler
import gc
import json
import os
import select
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator

PASSES = (0.04, 0.4, 60.0)  # seconds of the processor for one comparison, in the first pass, the second and the third
MEMORY = 2 * 1024**3  # bytes of address space, on Linux; sympy with its grammars needs about a tenth


def limit_memory() -> None:
    """On Linux, let no formula take more than MEMORY, and write no core file when one does."""
    if sys.platform == "linux":
        import resource

        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        limit = MEMORY if hard == resource.RLIM_INFINITY else min(MEMORY, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def comparison() -> Callable[[str, str], bool]:
    """A function (right answer, given answer) -> bool."""
    from math_verify import LatexExtractionConfig, parse, verify

    whole = [LatexExtractionConfig(boxed_match_priority=0)]  # the whole answer counts, not a number found within it

    def read(answer: str) -> list:
        # no timeouts of its own: they are signals, which a number with 10^9 digits does not let through
        return parse(f"\\boxed{{{answer}}}", whole, fallback_mode="no_fallback", parsing_timeout=None)

    def equal(gold: str, given: str) -> bool:
        try:
            return bool(verify(read(gold), read(given), timeout_seconds=None))
        except (Exception, RecursionError):
            return False

    equal("\\frac{1}{2}", "0.5")  # builds the grammar's tables: a second that no real comparison should pay
    return equal


def judged(
    pairs: list[tuple[str, str]], seconds: float, equal: Callable[[str, str], bool]
) -> Iterator[tuple[int, bool | None]]:
    """The number of each pair and its verdict, None for one that did not end in time. Takes `seconds` at most."""
    end = time.monotonic() + seconds
    late = deque(range(len(pairs)))
    for limit in PASSES:
        waiting, late = late, deque()
        copies: dict[int, _Copy] = {}  # by the file descriptor of its answers
        try:
            while (waiting or copies) and time.monotonic() < end:
                while waiting and len(copies) < max(2, min(4, os.cpu_count() or 1)):
                    share = [waiting.popleft() for _ in range(min(len(waiting), 8))]
                    copy = _Copy(pairs, share, min(limit, seconds), equal)
                    copies[copy.answers] = copy
                for descriptor in select.select(list(copies), [], [], max(0.0, end - time.monotonic()))[0]:
                    copy = copies[descriptor]
                    verdicts = os.read(descriptor, 64)
                    for verdict in verdicts:
                        yield copy.share.popleft(), verdict == ord("1")
                    if not verdicts:  # it has ended, over the first of what is left of its share
                        copies.pop(descriptor).kill()
                        late.extend([copy.share.popleft()] if copy.share else [])
                        waiting.extendleft(reversed(copy.share))
        finally:
            for copy in copies.values():
                copy.kill()
                late.extend(copy.share)
            late.extend(waiting)
    yield from ((i, None) for i in late)


class _Copy:
    """A fork of this process that compares a share of the pairs and writes "1" or "0" for each.

    The system ends it when one takes `limit` seconds of the processor, so that a busy machine makes nobody late, and
    none is left when whoever would kill it is gone.
    """

    def __init__(self, pairs: list[tuple[str, str]], share: list[int], limit: float, equal: Callable[[str, str], bool]):
        self.share = deque(share)
        self.answers, there = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for i in share:
                    signal.setitimer(signal.ITIMER_PROF, limit)
                    os.write(there, b"1" if equal(*pairs[i]) else b"0")
            finally:
                os._exit(0)
        os.close(there)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.answers)


def one_by_one(
    pairs: list[tuple[str, str]], seconds: float, equal: Callable[[str, str], bool]
) -> Iterator[tuple[int, bool | None]]:
    """The same where there is no fork: whoever asked must kill this process when an answer is late."""
    for i, pair in enumerate(pairs):
        watch(seconds + 5)
        yield i, equal(*pair)


def watch(seconds: float) -> None:
    """End this process then, whatever it is doing: who started it may be gone and unable to."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=NOWHERE)


NOWHERE = open(os.devnull, "w")  # noqa: SIM115  open as long as the program runs


def main() -> None:
    """Answer on the standard output what is asked on the standard input, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stop button is meant for the notebook
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    hello = json.loads(sys.stdin.readline())
    sys.path[:] = hello["path"]
    watch(hello["start_seconds"])
    problem = None
    try:
        limit_memory()
        equal = comparison()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    print(json.dumps(problem), file=answers, flush=True)
    if problem:
        return
    faulthandler.cancel_dump_traceback_later()
    gc.freeze()  # what is there stays: no copy needs to look at it
    for line in sys.stdin:
        asked = json.loads(line)
        judge = judged if hasattr(os, "fork") else one_by_one
        for verdict in judge(asked["pairs"], asked["seconds"], equal):
            print(json.dumps(verdict), file=answers, flush=True)
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
