"""Kernels compiled side by side before they are needed.

Triton compiles a kernel when it is first launched, for exactly these arguments, one after the other: two dozen for a
first token, half a second each. So the code that is about to run runs dry first: nothing is launched, what each launch
needs is compiled, in several threads. (LLVM and ptxas, most of the work, run without Python's lock.) What takes longest
is best launched first, so that the threads end together.

    ahead.compile_for(device, dry_pass)      # dry_pass(): what is about to run, on the tensors that it will run on

PyTorch's own operations do run in a dry pass, on whatever the memory holds: its results are noise. No index may come of
them: the one that a kernel makes, a drawn token, is 0 then (triton/sampling.py). A dry pass leaves no state behind. If
anything about it fails, kernels are compiled one by one, as they are launched.
"""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from . import launcher

THREADS = 16  # at most; a first token takes some two dozen kernels

_dry = False


def dry() -> bool:
    """Whether launches compile only, and what kernels should have written is noise."""
    return _dry


def possible(device: torch.device) -> bool:
    """Whether kernels are compiled at all for what is on this device, and this Triton can do it side by side."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    try:
        from triton.runtime._async_compile import AsyncCompileMode, active_mode  # noqa: F401  (private in Triton)

        return bool(_compiled_kernels())
    except Exception:  # whatever a Triton that cannot be imported raises
        return False


def begin(device: torch.device) -> None:
    """Begin what the first kernel of a process waits for, in threads. Call it before something that takes longer than
    the second that this takes, as weights that are to be read."""
    if possible(device):
        _begun()


@cache
def _begun() -> list[Future]:
    pool = ThreadPoolExecutor(2, "begin")
    futures = [pool.submit(_hash), pool.submit(_build)]
    pool.shutdown(wait=False)
    return futures


def _hash() -> None:
    """What Triton finds compiled kernels by: of its own library, 400 MB, and of each kernel's source."""
    from triton.runtime.cache import triton_key

    triton_key()
    import_module("triton.compiler.code_generator")
    for fn in _compiled_kernels():
        fn.cache_key  # noqa: B018


def _build() -> None:
    """What Triton has the C compiler build once."""
    from triton.runtime import driver

    driver.active.utils  # noqa: B018
    launcher.built()


def compile_for(device: torch.device, dry_pass: Callable[[], object]) -> None:
    """Compile what `dry_pass` launches, and nothing if that is not possible.

    Args:
        device (`torch.device`): What it launches on.
        dry_pass (`Callable[[], object]`): See the top of this file. What it raises is printed, not raised.
    """
    if not possible(device):
        return
    try:
        with side_by_side(device):
            dry_pass()
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"Kernels are compiled one by one, as they are launched: the dry pass failed ({what}).")


@contextmanager
def side_by_side(device: torch.device) -> Iterator[None]:
    """Within it a launch of this package's kernels compiles only; when it is left, all have been compiled."""
    from triton.runtime import _async_compile

    global _dry
    for begun in _begun():
        begun.exception()  # waits; what went wrong goes wrong again where it is needed
    every = _compiled_kernels()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on Windows
    pool = ThreadPoolExecutor(min(THREADS, cores), "compile", partial(_enter, device))
    mode = _async_compile.AsyncCompileMode(_Loading(pool))

    def launch(fn: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # set for each launch: autograd launches a backward's from a thread of its own
        before = _async_compile.active_mode.set(mode)
        try:
            type(fn).run(fn, *args, grid=grid, warmup=True, **options)
        finally:
            _async_compile.active_mode.reset(before)

    with launcher.shared():
        try:
            _dry = True
            for fn in every:
                fn.run = partial(launch, fn)  # of this one function, not of its class
            yield
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            for fn in every:
                vars(fn).pop("run", None)
            _dry = False
            pool.shutdown()
            for future in mode.future_kernels.values():
                future.result(ignore_errors=True)
            _forget_unfinished(every, _async_compile.FutureKernel)


class _Loading:
    """The pool, as AsyncCompileMode uses it; what was compiled is loaded onto the card by the same thread."""

    def __init__(self, pool: ThreadPoolExecutor):
        self.pool = pool

    def submit(self, compile_one: Callable[[], Any]) -> Future:
        def loaded() -> Any:
            kernel = compile_one()
            with suppress(Exception):  # the launch will say it
                kernel.run  # noqa: B018  (loads it, and makes its launcher)
            return kernel

        return self.pool.submit(loaded)


def _enter(device: torch.device) -> None:
    """A thread of the pool begins: what it loads goes to this card."""
    if device.index is not None:
        torch.cuda.set_device(device)


def _compiled_kernels() -> list[Any]:
    """Every function under @triton.jit in nbhelpers/kernels/triton; none in Triton's interpreter."""
    from triton.runtime.jit import JITFunction

    modules = [module for name, module in sys.modules.items() if name.startswith("nbhelpers.kernels.triton.")]
    found = {id(fn): fn for module in modules for fn in vars(module).values() if isinstance(fn, JITFunction)}
    return list(found.values())


def _forget_unfinished(every: list[Any], future_kernel: Any) -> None:
    """Triton (from 3.7 on) keeps a kernel that failed, or that another one's arguments share, as a promise of it."""
    for fn in every:
        for per_device in fn.device_caches.values():
            kernels = per_device[0]
            for key, kernel in list(kernels.items()):
                if isinstance(kernel, future_kernel):
                    del kernels[key]
                    if kernel.kernel is not None:
                        kernels[key] = kernel.kernel
