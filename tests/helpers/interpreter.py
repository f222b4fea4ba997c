"""How a Triton kernel is tested on a CPU: in Triton's interpreter, in a process of its own.

The interpreter wants TRITON_INTERPRET=1 before `import triton`, for the whole process; compiling ahead of time
(benchmarks/kernels/ahead.py) wants it unset. So a test file puts what needs the interpreter into classes with
`__test__ = interpreter.ON`, which an ordinary run does not collect, and has one test that runs those classes:

    import interpreter  # first: before anything that imports triton

    class TestRope:
        __test__ = interpreter.ON
        def test_forward(self): ...

    def test_in_the_interpreter():
        interpreter.run(__file__, "TestRope")

`TRITON_INTERPRET=1 pytest tests/kernels/test_elementwise.py` runs them directly.
"""

import os
import subprocess
import sys

import pytest

ON = os.environ.get("TRITON_INTERPRET") == "1"


def patch_once_a_launch() -> None:
    """For each call of one jitted function by another Triton looks through all of triton.language for what it has put
    its interpreter's functions in the place of since the launch: a fifth of the time. Here it does that once."""
    import triton.language as tl
    from triton.runtime import interpreter

    patched: set[frozenset[int]] = set()  # by the modules that a function sees
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    def patch_lang(fn):
        sees = frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)
        if sees in patched:
            return None
        patched.add(sees)
        return patch(fn)  # the first of a launch: what that takes back in the end

    def begin(*args, **kwargs):
        patched.clear()
        return launch(*args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, begin


if ON:
    patch_once_a_launch()


def run(file: str, *classes: str) -> None:
    """`file`, or only these classes of it, tested in a new process with the interpreter on; fails with their output."""
    pytest.importorskip("triton", reason="triton has no build for this system")
    if ON:
        pytest.skip("already inside the interpreter")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += [f"{file}::{name}" for name in classes] or [file]
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]
