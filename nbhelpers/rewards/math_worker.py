"""The program that parses model-written mathematics, in a process of its own (math_equal.py starts and ends it).

It first reads one line of JSON, {"path": sys.path, "seconds": a, "start_seconds": b}, and answers null, or a string
that says why it cannot work. Then it reads a line [right answer, given answer] at a time and answers true or false. It
is run as a file, so that no notebook's __main__ and no torch is imported; it ends when its input does.

LaTeX is parsed by a grammar. math-verify's parser of plain expressions is not used: it ends in sympy's `parse_expr`,
which evaluates its text as Python.
"""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Callable

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


def main() -> None:
    """Answer on the standard output what is asked on the standard input, until that ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stop button is meant for the notebook
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    hello = json.loads(sys.stdin.readline())
    sys.path[:] = hello["path"]
    nowhere = open(os.devnull, "w")  # noqa: SIM115  open as long as the program runs

    def watch(seconds: float) -> None:
        """End this process then, whatever it is doing: who started it may be gone and unable to."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)

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
    for line in sys.stdin:
        watch(hello["seconds"])
        verdict = equal(*json.loads(line))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(verdict), file=answers, flush=True)


if __name__ == "__main__":
    main()
