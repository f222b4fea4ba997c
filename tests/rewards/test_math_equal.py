import doctest
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from nbhelpers import host
from nbhelpers.rewards import math_equal, math_worker
from nbhelpers.rewards.math_equal import Worker, comparable, equal

ENDLESS = "9^{9^{9^{9}}}"


@pytest.fixture
def worker():
    made = Worker(seconds=2.0)
    yield made
    made.close()


def test_the_examples_in_the_docstrings():
    result = doctest.testmod(math_equal)
    assert result.attempted == 1 and result.failed == 0


@pytest.mark.parametrize(
    ("gold", "found", "right"),
    [
        ("1/2", "0.5", True),
        ("1/2", r"\frac12", True),
        (r"\frac{1}{2}", "$1/2$", True),
        ("0.5", r"50\%", True),
        (r"2\sqrt{3}", r"\sqrt{12}", True),
        ("x+1", "1 + x", True),
        (r"\{1, 2\}", "2, 1", True),
        ("3", "x = 3", True),
        ("1,000", "10^3", True),
        ("42", "42 apples", True),
        ("1/3", "0.3333333333", True),
        ("0.1", "0.10000000000000000000000000001", False),  # two decimals are compared exactly
        ("391", "17*23", True),  # an answer need not be worked out, as the docstring of the reward says
        ("1/2", "0.51", False),
        ("3", "3 or 4", False),
        ("3", "1, 2, 3", False),
        ("3", "3 3", False),
        ("3", r"\boxed{4} \boxed{3}", False),
        ("3", "three", False),
        ("3", "3}{4", False),  # would close the box that it is put into
        ("3", "", False),
        ("", "", True),  # as text
        ("nan", "1/0", False),
        ("3", "\ud800", False),
        ("3", "3\n\n\n1", False),
    ],
)
def test_equal(gold, found, right):
    assert equal([(gold, found)]) == [right]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        " ",
        "9" * 201,
        "((((((((((3))))))))))",
        "{" * 30,
        "3}",
        "}{",
        "this is no answer but a long sentence",
        "{}}{",
    ],
)
def test_what_is_not_sent_to_the_parser(answer):
    assert not comparable(answer)


@pytest.mark.parametrize("answer", [r"\frac{1}{2}", r"\{1,2\}", "[0, 1)", "3 apples", r"\left(\frac{1}{x}\right)", "9"])
def test_what_is_sent_to_the_parser(answer):
    assert comparable(answer)


def test_equal_text_and_numbers_start_no_process(monkeypatch):
    monkeypatch.setattr(math_equal, "_worker", Worker())
    assert equal([("9.9", "9.90"), ("New York", "new  york"), ("3", "9" * 300)]) == [True, True, False]
    assert math_equal._worker.process is None


def test_one_process_serves_all_calls_and_threads(worker):
    assert worker.equal([("1/2", "0.5")]) == [True]
    first, verdicts = worker.process.pid, {}

    def ask(n):
        verdicts[n] = worker.equal([(str(n), f"{2 * n}/2"), (str(n), f"{2 * n + 1}/2")])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == {n: [True, False] for n in range(1, 9)}
    assert worker.process.pid == first


def test_only_the_late_comparison_fails(worker):
    pairs = [("1/2", "0.5"), ("3", ENDLESS), ("1/2", r"\frac12"), ("3", ENDLESS), ("1/2", "2/3")]
    worker.equal(pairs[:1])
    first = worker.process
    start = time.monotonic()
    assert worker.equal(pairs) == [True, False, True, False, False]
    assert time.monotonic() - start < 30  # two seconds for the late one, asked once
    assert first.poll() is None and worker.process is first  # a copy of it was killed


def test_endless_answers_share_a_budget_and_the_good_ones_among_them_are_found(worker):
    worker.equal([("1/2", "0.5")])
    endless = [("3", f"9^{{9^{{9^{{{i}}}}}}}") for i in range(8, 16)]
    good = [(f"{i}/2", str(i / 2)) for i in range(3, 11)]
    pairs = [pair for both in zip(endless, good, strict=True) for pair in both]
    start = time.monotonic()
    verdicts = worker.equal(pairs)
    assert verdicts == [False, True] * 8
    assert time.monotonic() - start < 60  # a budget, not eight times the seconds; no timing on a busy machine


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_copy_is_left_behind(worker):
    assert worker.equal([("3", ENDLESS), ("1/2", "0.5")]) == [False, True]
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text()
    assert children == ""


def test_a_process_that_was_killed_is_replaced(worker):
    worker.equal([("1/2", "0.5")])
    worker.process.kill()
    worker.process.wait()
    assert worker.equal([("1/2", "0.5")]) == [True]


def test_a_program_that_dies_over_an_answer_costs_that_answer(tmp_path):
    program = tmp_path / "dies.py"
    program.write_text(
        textwrap.dedent("""
        import json, os, sys
        sys.stdin.readline()
        print("null", flush=True)
        for line in sys.stdin:
            for i, (gold, given) in enumerate(json.loads(line)["pairs"]):
                if given == "die": os._exit(3)
                print(json.dumps([i, gold == "1"]), flush=True)
        """)
    )
    worker = Worker(program=program)
    assert worker.equal([("1", "a"), ("1", "die"), ("1", "b"), ("2", "c")]) == [True, False, True, False]
    worker.close()


def test_a_process_that_cannot_start_says_what_to_do(tmp_path):
    for text in ("print('\"ImportError: no sympy\"')", "raise SystemExit(1)"):
        (tmp_path / "broken.py").write_text(text)
        worker = Worker(program=tmp_path / "broken.py")
        with pytest.raises(host.CannotRun, match='pip install "math-verify'):
            worker.equal([("1", "2")])
        assert worker.process is None


def test_without_math_verify_the_line_to_install_it_is_given(monkeypatch, worker):
    def missing(package):
        raise host.PackageNotFoundError(package)

    monkeypatch.setattr(host, "version", missing)
    with pytest.raises(host.CannotRun, match=r"math-verify is not installed\. .*%pip install .math-verify"):
        worker.equal([("1/2", "0.5")])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_stop_button_ends_the_process_and_leaves_the_worker_usable(request):
    # as in a notebook's kernel; what a shell starts in the background inherits that SIGINT is ignored
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = Worker(seconds=60.0)
    worker.equal([("1/2", "0.5")])
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        worker.equal([("3", ENDLESS)])
    assert worker.process is None
    assert worker.equal([("1/2", "0.5")]) == [True]
    worker.close()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_the_stop_button_does_not_reach_the_process(worker):
    worker.equal([("1/2", "0.5")])
    first = worker.process
    first.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert worker.equal([("1/2", "0.5")]) == [True] and worker.process is first


def started_from(code: str, cwd: Path, **kwargs) -> subprocess.Popen:
    root = str(Path(math_equal.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True, cwd=cwd,
        env={**os.environ, "PYTHONPATH": root}, **kwargs,
    )  # fmt: skip


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_dies_with_a_parent_that_was_killed(tmp_path):
    parent = started_from(
        """
        import time
        from nbhelpers.rewards.math_equal import Worker
        worker = Worker()
        worker.equal([("1/2", "0.5")])
        print(worker.process.pid, flush=True)
        time.sleep(60)
        """,
        tmp_path,
    )
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_process_ends_itself_in_the_middle_of_a_number_when_nobody_else_can():
    program = [sys.executable, str(math_equal.PROGRAM)]
    process = subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    paths = str([path for path in sys.path if path]).replace("'", '"').replace("\\", "\\\\")
    process.stdin.write(f'{{"path": {paths}, "start_seconds": 60}}\n')
    process.stdin.write(f'{{"pairs": [["3", "{ENDLESS}"]], "seconds": 3}}\n')
    process.stdin.flush()
    assert process.stdout.readline() == "null\n"
    copies = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 20
    while not (copy := copies.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    copy = copy.split()[0]
    process.kill()  # who would kill the copy is gone
    while not gone(int(copy)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(int(copy))
    process.wait(), process.stdin.close(), process.stdout.close()


def test_a_notebook_s_main_and_torch_stay_out_of_it(tmp_path):
    """A module beside the notebook that is called like one that the comparison needs does no harm either."""
    (tmp_path / "sympy.py").write_text("raise SystemExit('the wrong sympy')")
    code = """
        import sys
        from nbhelpers.rewards.math_equal import equal
        print("main runs", equal([("1/2", "0.5")]), "torch" in sys.modules)
        """
    out, _ = started_from(code, tmp_path).communicate(timeout=60)
    assert out == "main runs [True] False\n"


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_fork_has_a_process_of_its_own(tmp_path):
    code = """
        import os
        from nbhelpers.rewards.math_equal import Worker
        worker = Worker()
        worker.equal([("1/2", "0.5")])
        mine = worker.process.pid
        child = os.fork()
        right = worker.equal([("1/2", "0.5"), ("1/2", "2/3")] * 20) == [True, False] * 20
        if not child:
            os._exit(0 if right and worker.process.pid != mine else 1)
        _, status = os.waitpid(child, 0)
        print(right, worker.process.pid == mine, status)
        """
    out, _ = started_from(code, tmp_path).communicate(timeout=60)
    assert out == "True True 0\n"


def test_what_is_compared_first_in_each_copy_was_warmed_in_the_process_that_makes_them():
    """A copy that begins cold pays for grammar and caches anew, and 30 easy pairs were late together."""
    equal_of = math_worker.comparison()
    pairs = [(rf"\sin(x)+{i}", rf"{i}+\sin x") for i in range(8)] + [
        (rf"\sin({i})", rf"2\sin({i}/2)\cos({i}/2)") for i in range(1, 9)
    ]
    assert dict(math_worker.judged(pairs, 60.0, equal_of)) == dict.fromkeys(range(16), True)
    assert {equal_of(*pair) for pair in math_worker.WARM} == {True, False}  # each is read: none of them raises
