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
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal, localcontext
from itertools import combinations
from typing import Any

PASSES = (0.04, 0.4, 60.0)  # seconds of the processor for one comparison, in the first pass, the second and the third
# Compared at the start, for half a second in all: the first of a kind builds tables of the grammar, imports a part of
# sympy and fills its caches, for which each copy would pay anew.
WARM = (
    (r"\frac{1}{2}", "0.5"), (r"1+\sin(a+2)", r"2\sin(a/2)\cos(b/2)-\sin a"), (r"3\sqrt{5}-1", r"\frac{\pi}{7}+a^{2}"),
    (r"\ln(b)", "2e^{-b}"), (r"\{a,b\}", r"\{b,c\}"), ("(3,4)", "(3,-5)"), ("[2,3)", "[2,4]"), (r"\log_3 7", "4"),
    ("a^2-4", "(a-2)(a+2)"), (r"\sin(3)", r"2\sin(4)"), ("|a|+i", r"\frac{\tan b}{2a}"), ("a<b", "b>a"),
)  # fmt: skip
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
    from math_verify import LatexExtractionConfig, parse

    whole = [LatexExtractionConfig(boxed_match_priority=0)]  # the whole answer counts, not a number found within it

    def read(answer: str) -> list:
        # no timeouts of its own: they are signals, which a number with 10^9 digits does not let through
        return parse(f"\\boxed{{{answer}}}", whole, fallback_mode="no_fallback", parsing_timeout=None)

    def equal(gold: str, given: str) -> bool:
        try:
            read_gold, read_given = read(gold), read(given)
            return bool(read_gold and read_given) and same(
                read_gold[0], read_given[0], {opened(gold), opened(given)} == {"{", "("}
            )
        except (Exception, RecursionError):
            return False

    for pair in WARM:
        equal(*pair)
    return equal


def opened(answer: str) -> str:
    """The bracket that an answer begins with, "{" or "("; "" for another beginning."""
    begun = answer.lstrip(" $\\").removeprefix("left").lstrip(" \\")[:1]
    return begun if begun in ("{", "(") else ""


# ---- what math-verify has read, compared: its own comparison rounds to six decimals, however small the numbers ----


def same(gold: Any, given: Any, other_brackets: bool = False) -> bool:
    """Whether two expressions of sympy's are equal, by the rules of `math_equal.equal`.

    Args:
        gold (`sympy.Basic`), given (`sympy.Basic`): The right and the given answer.
        other_brackets (`bool`): One is written in braces and the other in parentheses.
    """
    from math_verify import verify

    claimed, wanted = members(given), members(gold)
    if not all(same_number(one, other, digits=2) for one, other in combinations(filter(constant, claimed), 2)):
        return False  # 6 = 5
    if claimed and not wanted:
        return any(same(gold, member) for member in [*filter(constant, claimed)] or claimed[-1:])
    if wanted and not claimed and wanted[0].is_Symbol:
        return any(same(member, given) for member in [*filter(constant, wanted)] or wanted[-1:])
    if constant(gold) and constant(given):
        return same_number(gold, given)
    verdict = same_members(gold, given, other_brackets)
    if verdict is None:
        verdict = verify(exact(gold), exact(given), numeric_precision=60, timeout_seconds=None)
    return bool(verdict)


def members(relation: Any) -> list:
    """The sides of an equation, or of a chain of equations, in the order of writing; nothing for anything else."""
    from sympy import And, Eq

    chain = relation._unsorted_args if isinstance(relation, And) else [relation]  # kept by math-verify's parser
    return [side for one in chain for side in one.args] if all(isinstance(one, Eq) for one in chain) else []


def constant(expression: Any) -> bool:
    """Whether an expression is a number, written in whatever way."""
    from sympy import Expr

    return isinstance(expression, Expr) and bool(expression.is_number)


def exact(expression: Any) -> Any:
    """An expression whose decimals are the fractions that they state, and not their neighbours in binary."""
    from sympy import Float, Rational

    return expression.xreplace({number: Rational(str(number)) for number in expression.atoms(Float)})


def same_number(gold: Any, given: Any, digits: int = 6) -> bool:
    """Whether two constants are equal; a decimal of so many digits may be the other one, rounded or cut off."""
    from sympy import Mul, Rational, UnevaluatedExpr

    percent = UnevaluatedExpr(Rational(1, 100))  # how math-verify reads a percent sign

    def without_sign(number: Any) -> tuple[Any, bool]:
        if isinstance(number, Mul) and percent in number.args:
            return Mul(*(factor for factor in number.args if factor != percent)).doit(), True
        return number.doit(), False

    (one, one_percent), (other, other_percent) = without_sign(gold), without_sign(given)
    if one_percent == other_percent:
        return same_value(one, other, digits)
    part, whole = (one, other) if one_percent else (other, one)
    return same_value(part, whole, digits) or same_value(part * percent.doit(), whole, digits)


def same_value(one: Any, other: Any, digits: int) -> bool:
    """`same_number` without percent signs."""
    from sympy import Float

    values = exact(one), exact(other)
    if not all(value.is_finite for value in values):
        return one == other and bool(one.is_extended_real)
    if all(value.is_Rational for value in values):
        if values[0] == values[1]:
            return True
    else:
        numbers = [value.evalf(60) for value in values]
        size = max(map(abs, numbers))
        if abs(numbers[0] - numbers[1]) < size * 1e-50 or (size < 1e-40 and values[0].equals(values[1])):
            return True
    pairs = ((one, values[1]), (other, values[0]))
    return any(isinstance(decimal, Float) and rounds(decimal, number, digits) for decimal, number in pairs)


def rounds(decimal: Any, number: Any, digits: int) -> bool:
    """Whether a decimal of at least so many digits is a number that no decimal states, rounded or cut off."""
    if number.is_Rational and pow(10, int(number.q).bit_length(), int(number.q)) == 0:
        return False  # it has a last decimal, and could have been written out
    with localcontext(prec=100):
        shown = Decimal(str(decimal)).normalize()
        full = Decimal(str(number.evalf(80)))
        return len(shown.as_tuple().digits) >= digits and any(
            full.quantize(shown, rounding) == shown for rounding in (ROUND_HALF_UP, ROUND_DOWN)
        )


def same_members(gold: Any, given: Any, other_brackets: bool) -> bool | None:
    """Whether sets, pairs, points, intervals and matrices are equal, member by member; None for anything else."""
    from sympy import FiniteSet, Interval, MatrixBase, Tuple

    def listed(group: Any) -> list | None:  # in the order of writing
        if isinstance(group, FiniteSet):
            return list(group._unsorted_args)  # kept by math-verify's parser
        if isinstance(group, Tuple):
            return list(group.args)
        return [group.start, group.end] if isinstance(group, Interval) and group.is_open else None

    if isinstance(gold, MatrixBase) and isinstance(given, MatrixBase):
        return gold.shape == given.shape and all(map(same, gold.flat(), given.flat()))
    if isinstance(gold, Interval) and isinstance(given, Interval):
        sides = (gold.left_open, gold.right_open) == (given.left_open, given.right_open)
        return sides and same(gold.start, given.start) and same(gold.end, given.end)
    if isinstance(gold, FiniteSet) and isinstance(given, FiniteSet):
        return len(gold) == len(given) and all(any(same(one, other) for other in given.args) for one in gold.args)
    one, other = listed(gold), listed(given)
    if one is not None and other is not None:
        return not other_brackets and len(one) == len(other) and all(map(same, one, other))
    if isinstance(gold, FiniteSet) and constant(given):
        return len(gold) == 1 and same(gold.args[0], given)
    if isinstance(given, FiniteSet) and constant(gold):
        return len(given) == 1 and same(gold, given.args[0])
    return None


# ---- many answers at a time, and none that waits long behind one that never ends ----


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
