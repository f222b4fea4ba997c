"""One launcher for all kernels, where Triton would have the C compiler build one for each.

Triton 3.6 writes a C file for every signature (the types of a kernel's arguments) and compiles it: 0.15 to 0.25 s of a
core for each of 17, nearly half of all that a first token costs a machine of two cores. Here one file is compiled,
which reads the types from a string. Triton 3.7 has such a launcher itself. Where this one cannot be built, or does not
know a type, Triton builds its own.

    with launcher.shared():     # kernels that are loaded within it get this launcher
        ...
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import Any

# one letter for an argument: an address, a whole number, a float, nothing (it was compiled in)
KINDS = {"i1": "i", "i8": "i", "i16": "i", "i32": "i", "i64": "i", "u1": "i", "u8": "i", "u16": "i", "u32": "i",
         "fp32": "f", "f32": "f", "constexpr": "-"}  # fmt: skip
MOST = 96  # arguments of a kernel, as in SOURCE

SOURCE = r"""
#include "cuda.h"
#define PY_SSIZE_T_CLEAN
#include <Python.h>

enum { MOST = 96, BEFORE = 14 };  /* BEFORE: what stands before a kernel's own arguments */

static PyObject *data_ptr;

static int failed(CUresult code) {
    const char *why = NULL;
    if (code == CUDA_SUCCESS) return 0;
    cuGetErrorString(code, &why);
    PyErr_Format(PyExc_RuntimeError, "Triton Error [CUDA]: %s", why ? why : "unknown");
    return 1;
}

/* The address of a tensor on a card, or of None. */
static int address(PyObject *value, uint64_t *slot) {
    PyObject *number;
    CUdeviceptr seen = 0;
    CUresult code;
    *slot = 0;
    if (value == Py_None) return 0;
    number = PyLong_Check(value) ? Py_NewRef(value) : PyObject_CallMethodNoArgs(value, data_ptr);
    if (!number) return -1;
    *slot = PyLong_AsUnsignedLongLong(number);
    Py_DECREF(number);
    if (PyErr_Occurred()) return -1;
    if (*slot == 0) return 0;
    code = cuPointerGetAttribute(&seen, CU_POINTER_ATTRIBUTE_DEVICE_POINTER, (CUdeviceptr)*slot);
    if (code == CUDA_ERROR_INVALID_VALUE) {
        PyErr_SetString(PyExc_ValueError, "a kernel's tensor is not on the card (a CPU tensor?)");
        return -1;
    }
    *slot = seen;
    return failed(code) ? -1 : 0;
}

/* An argument in 8 bytes: a kernel that wants fewer reads the first ones, the lowest of a whole number. */
static int put(char kind, PyObject *value, uint64_t *slot) {
    if (kind == 'p') return address(value, slot);
    if (kind == 'f') {
        float number = (float)PyFloat_AsDouble(value);
        *slot = 0;
        memcpy(slot, &number, sizeof number);
    } else {
        *slot = (uint64_t)PyLong_AsLongLong(value);
    }
    return PyErr_Occurred() ? -1 : 0;
}

static int hook(PyObject *call, PyObject *metadata) {
    PyObject *result;
    if (call == Py_None) return 0;
    result = PyObject_CallOneArg(call, metadata);
    Py_XDECREF(result);
    return result ? 0 : -1;
}

/* kinds, grid x, y, z, stream, function, cooperative, early, two scratch buffers, (warps, blocks of a cluster, bytes of
   shared memory), metadata for the hooks, hook before, hook after, the kernel's own arguments */
static PyObject *launch(PyObject *self, PyObject *const *all, Py_ssize_t count) {
    uint64_t slots[MOST + 2];
    void *params[MOST + 2];
    CUlaunchAttribute attribute;
    CUlaunchConfig config;
    CUcontext context = NULL;
    CUdevice device;
    CUresult code;
    CUfunction function;
    const char *kinds;
    int warps, cluster, shared, used = 0;

    if (count < BEFORE || !(kinds = PyUnicode_AsUTF8(all[0])) || (Py_ssize_t)strlen(kinds) != count - BEFORE ||
        count - BEFORE > MOST) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "another number of arguments than of kinds");
        return NULL;
    }
    if (!PyArg_ParseTuple(all[10], "iii", &warps, &cluster, &shared)) return NULL;
    if (cluster != 1 || PyObject_IsTrue(all[6])) {
        PyErr_SetString(PyExc_ValueError, "neither clusters nor cooperative launches are known here");
        return NULL;
    }
    /* a thread of autograd may have no context yet */
    if (failed(cuCtxGetCurrent(&context))) return NULL;
    if (!context && (failed(cuDeviceGet(&device, 0)) || failed(cuDevicePrimaryCtxRetain(&context, device)) ||
                     failed(cuCtxSetCurrent(context))))
        return NULL;
    if (hook(all[12], all[11])) return NULL;

    for (Py_ssize_t i = BEFORE; i < count; i++) {
        if (kinds[i - BEFORE] == '-') continue;
        if (put(kinds[i - BEFORE], all[i], &slots[used])) return NULL;
        params[used] = &slots[used];
        used++;
    }
    for (int i = 8; i < 10; i++, used++) { /* behind all others */
        if (address(all[i], &slots[used])) return NULL;
        params[used] = &slots[used];
    }
    memset(&config, 0, sizeof config);
    config.gridDimX = (unsigned)PyLong_AsLong(all[1]);
    config.gridDimY = (unsigned)PyLong_AsLong(all[2]);
    config.gridDimZ = (unsigned)PyLong_AsLong(all[3]);
    config.blockDimX = 32 * (unsigned)warps;
    config.blockDimY = config.blockDimZ = 1;
    config.sharedMemBytes = (unsigned)shared;
    config.hStream = (CUstream)PyLong_AsUnsignedLongLong(all[4]);
    function = (CUfunction)PyLong_AsUnsignedLongLong(all[5]);
    memset(&attribute, 0, sizeof attribute);
    attribute.id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = PyObject_IsTrue(all[7]) ? 1 : 0;
    if (PyErr_Occurred()) return NULL;
    if (config.gridDimX && config.gridDimY && config.gridDimZ) {
        Py_BEGIN_ALLOW_THREADS; /* it waits where a thousand launches wait */
        code = cuLaunchKernelEx(&config, function, params, NULL);
        Py_END_ALLOW_THREADS;
        if (failed(code)) return NULL;
    }
    if (hook(all[13], all[11])) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"launch", (PyCFunction)(void (*)(void))launch, METH_FASTCALL, "Launches a kernel"}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "nbhelpers_launcher", NULL, -1, methods};

PyMODINIT_FUNC PyInit_nbhelpers_launcher(void) {
    data_ptr = PyUnicode_InternFromString("data_ptr");
    return data_ptr ? PyModule_Create(&definition) : NULL;
}
"""


@cache
def built() -> ModuleType | None:
    """The module of SOURCE, from Triton's cache if it is there; None where this Triton has no use for it, or it cannot
    be built."""
    try:
        from triton import __version__
        from triton.backends.nvidia import driver

        if not __version__.startswith("3.6."):  # what stands before a kernel's arguments is this version's business
            return None
        return driver.compile_module_from_src(
            src=SOURCE, name="nbhelpers_launcher", library_dirs=driver.library_dirs(),
            include_dirs=driver.include_dirs, libraries=driver.libraries,
        )  # fmt: skip
    except Exception:  # no compiler, no driver, another Triton: its own launchers say it
        return None


class Kinds(str):
    """What stands where Triton's C file would: the types of a kernel's arguments."""


def kinds(signature: dict[Any, Any]) -> Kinds | None:
    """The kinds of a kernel's arguments by Triton's names for their types; None if one has none."""
    letters = ["p" if str(each).startswith("*") else KINDS.get(str(each)) for each in signature.values()]
    known = [letter for letter in letters if letter is not None]
    return Kinds("".join(known)) if len(known) == len(letters) <= MOST else None


@contextmanager
def shared() -> Iterator[None]:
    """Within it what Triton loads, in whatever thread, is launched by `built()`."""
    module = built()
    if module is None:
        yield
        return
    from triton.backends.nvidia import driver

    make, compile_source = driver.make_launcher, driver.compile_module_from_src

    def make_kinds(constants: Any, signature: dict[Any, Any], *more: Any) -> str:
        return kinds(signature) or make(constants, signature, *more)

    def take(src: str, *args: Any, **options: Any) -> Any:
        if isinstance(src, Kinds):
            return SimpleNamespace(launch=partial(module.launch, str(src)))
        return compile_source(src, *args, **options)

    driver.make_launcher, driver.compile_module_from_src = make_kinds, take
    try:
        yield
    finally:
        driver.make_launcher, driver.compile_module_from_src = make, compile_source
