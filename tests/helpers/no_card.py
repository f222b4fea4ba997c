"""A card that is not there: Triton derives and compiles for it what a launch needs, and nothing is ever launched.

    with no_card.played() as card:
        with kernels.use("triton"):
            ...                       # launches are noted: card.launched; what a dry pass asked for: card.compiled

Numbers are noise, so drawn tokens are 0. Unless `real`, what is compiled is an empty stand-in.
"""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from nbhelpers.kernels import ahead
from nbhelpers.kernels.triton import common, nf4_few_rows, plain_few_rows

INDEX = 77  # of the card: a cache of its own


class Driver:
    def get_current_device(self):
        return INDEX

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def key(fn, args, options):
    """What Triton's own launch looks a kernel up by."""
    _, keys, _, _, binder = fn.device_caches[INDEX]
    _, specialization, options = binder(*args, **options, debug=False, instrumentation_mode="")
    return compute_cache_key(keys, specialization, options)


def kernels_of(fn):
    return fn.device_caches[INDEX][0]


@contextmanager
def played(real=False, fail=()):
    """Yields `launched` and, afterwards, `compiled`, sets of (module, kernel, key); `dry` and `launches`, how many dry
    ones and others.

    Args:
        real (`bool`): Compile, not only pretend to.
        fail (`tuple[str, ...]`): Kernels that cannot be compiled.
    """
    card = SimpleNamespace(launched=set(), compiled=set(), dry=0, launches=0)
    run, compile_one = JITFunction.run, triton.compiler.compile

    def launch(fn, *args, grid, warmup, **options):
        if warmup:
            card.dry += 1
            return run(fn, *args, grid=grid, warmup=True, **options)
        card.launches += 1
        card.launched.add((fn.__module__, fn.__name__, key(fn, args, options)))

    def compiled(source, **more):
        if source.name in fail:
            raise RuntimeError(f"{source.name} cannot be compiled")
        return compile_one(source, **more) if real else SimpleNamespace(source=source.name)

    def serves(x, parts):
        return x.shape[0] <= nf4_few_rows.MOST_ROWS and nf4_few_rows.fits(x, parts)

    with ExitStack() as patches:
        for where, name, value in (
            (driver, "_active", Driver()),
            (JITFunction, "run", launch),
            (triton.compiler, "compile", compiled),
            (nf4_few_rows, "serves", serves),
            (plain_few_rows, "tensor_cores", lambda device: True),
            (common, "supports_early_launch", lambda device: True),
            (ahead, "possible", lambda device: True),
        ):
            patches.enter_context(mock.patch.object(where, name, value))
        try:
            yield card
        finally:
            for fn in ahead._compiled_kernels():
                cache = fn.device_caches.pop(INDEX, None)
                card.compiled |= {(fn.__module__, fn.__name__, each) for each in (cache or [()])[0]}
                vars(fn).pop("compile", None)
