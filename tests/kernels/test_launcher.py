"""The launcher that Triton 3.6 gets (kernels/launcher.py), built by the C compiler and run against a driver that is not
there: a library of that name, which notes what it is asked for."""

import ctypes
import shutil
import struct
import subprocess
import sys
import sysconfig
from importlib import util
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
import triton
from triton.backends.nvidia import driver

from nbhelpers.kernels import launcher

ARGUMENTS = 6  # that reach the kernel below, with the two scratch buffers

DRIVER = r"""
#include <stdint.h>
#include <string.h>
uint64_t params[16];
unsigned config[16];
int early, wanted, launches;
uint64_t function, on_host;
#define FINE(name) int name() { return 0; }
FINE(cuDeviceGet) FINE(cuDevicePrimaryCtxRetain) FINE(cuCtxSetCurrent)
int cuGetErrorString(int code, const char **text) { *text = code == 700 ? "an illegal address" : "other"; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuPointerGetAttribute(uint64_t *seen, int attribute, uint64_t address) {
    *seen = address;
    return address == on_host;
}
int cuLaunchKernelEx(const unsigned *how, void *what, void **numbers, void **more) {
    memcpy(config, how, sizeof config);
    early = (int)config[12];
    function = (uint64_t)what;
    for (int i = 0; i < wanted; i++) memcpy(&params[i], numbers[i], 8);
    launches++;
    return what == (void *)13 ? 700 : 0;
}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(launch of SOURCE, the driver that it launches on)."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("launcher")
    library, module = folder / "libcuda.so.1", folder / f"nbhelpers_launcher{sysconfig.get_config_var('EXT_SUFFIX')}"
    (folder / "driver.c").write_text(DRIVER)
    (folder / "launcher.c").write_text(launcher.SOURCE)
    build = [compiler, "-shared", "-fPIC", "-O1"]
    subprocess.run([*build, folder / "driver.c", "-w", "-Wl,-soname,libcuda.so.1", "-o", library], check=True)
    includes = [f"-I{path}" for path in (*driver.include_dirs, sysconfig.get_paths()["include"])]
    strict = ["-Wall", "-Werror", *includes, f"-L{folder}", "-l:libcuda.so.1"]
    subprocess.run([*build, folder / "launcher.c", "-o", module, *strict], check=True)
    card = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by its name then
    spec = util.spec_from_file_location("nbhelpers_launcher", module)
    loaded = util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded.launch, card


def number(card, name, kind=ctypes.c_int):
    return kind.in_dll(card, name)


def before(early=True, function=7, hooks=(None, None), cluster=1):
    return (3, 2, 1, 9, function, False, early, None, 64, (4, cluster, 1000), "metadata", *hooks)


def test_a_kernel_gets_its_arguments_as_bytes(built):
    launch, card = built
    x = torch.zeros(3)
    number(card, "wanted").value = ARGUMENTS
    signature = {"x": "*fp32", "n": "i32", "BLOCK": "constexpr", "scale": "fp32", "large": "i64", "no": "*fp32"}
    launch(launcher.kinds(signature), *before(), x, -5, 128, 0.37, 2**40, None)
    params = (ctypes.c_uint64 * 16).in_dll(card, "params")
    assert params[0] == x.data_ptr()
    assert params[1] & 0xFFFFFFFF == 2**32 - 5
    assert struct.pack("<I", params[2] & 0xFFFFFFFF) == struct.pack("<f", 0.37)
    assert list(params[3:6]) == [2**40, 0, 0], "a large number, no tensor, and no scratch buffer"
    number(card, "wanted").value = ARGUMENTS + 1
    launch(launcher.kinds(signature), *before(), x, -5, 128, 0.37, 2**40, None)
    assert params[6] == 64, "the other scratch buffer"
    config = (ctypes.c_uint * 16).in_dll(card, "config")
    assert list(config[:9]) == [3, 2, 1, 128, 1, 1, 1000, 0, 9], "grid, block, shared memory, stream"
    assert number(card, "function", ctypes.c_uint64).value == 7


def test_early_launches_and_empty_grids(built):
    launch, card = built
    number(card, "wanted").value = 0
    for early in (True, False):
        launch("i", *before(early), 1)
        assert number(card, "early").value == early
    launches = number(card, "launches").value
    launch("i", 0, *before()[1:], 1)
    assert number(card, "launches").value == launches


def test_hooks_are_called_around_a_launch(built):
    launch, card = built
    number(card, "wanted").value = 0
    seen = []

    def hook(metadata):
        seen.append((metadata, number(card, "launches").value))

    start = number(card, "launches").value
    launch("i", *before(hooks=(hook, hook)), 1)
    assert seen == [("metadata", start), ("metadata", start + 1)]
    with pytest.raises(ZeroDivisionError):
        launch("i", *before(hooks=(lambda metadata: 1 / 0, None)), 1)
    assert number(card, "launches").value == start + 1


def test_what_cannot_be_launched_is_an_error(built):
    launch, card = built
    number(card, "wanted").value = 0
    x = torch.zeros(3)
    number(card, "on_host", ctypes.c_uint64).value = x.data_ptr()
    launches = number(card, "launches").value
    for error, kinds, first, values in (
        (ValueError, "p", before(), (x,)),
        (TypeError, "i", before(), (0.5,)),
        (OverflowError, "i", before(), (2**64,)),
        (TypeError, "f", before(), ("1",)),
        (AttributeError, "p", before(), ("1",)),
        (TypeError, "ii", before(), (1,)),
        (TypeError, "i" * (launcher.MOST + 1), before(), (1,) * (launcher.MOST + 1)),
        (ValueError, "i", before(cluster=2), (1,)),
    ):
        with pytest.raises(error):
            launch(kinds, *first, *values)
    assert number(card, "launches").value == launches
    with pytest.raises(RuntimeError, match="an illegal address"):
        launch("i", *before(function=13), 1)


def test_types_that_it_does_not_know_are_left_to_triton():
    assert launcher.kinds({0: "*bf16", 1: "i32", 2: "fp32", 3: "constexpr"}) == "pif-"
    for unknown in ("fp64", "u64", "nvTmaDesc", "tensordesc<fp16[64]>", ("i32", "i32")):
        assert launcher.kinds({0: "*bf16", 1: unknown}) is None, unknown
    assert launcher.kinds(dict.fromkeys(range(launcher.MOST), "i32")) is not None
    assert launcher.kinds(dict.fromkeys(range(launcher.MOST + 1), "i32")) is None
    assert f"MOST = {launcher.MOST}," in launcher.SOURCE


def as_triton_3_6_loads(signature):
    """What its CudaLauncher does for one kernel."""
    source = driver.make_launcher({}, signature, None)
    return driver.compile_module_from_src(src=source, name="__triton_launcher").launch


def test_within_the_block_kernels_share_one_launcher(monkeypatch):
    module = SimpleNamespace(launch=lambda *arguments: arguments)
    monkeypatch.setattr(launcher, "built", lambda: module)
    monkeypatch.setattr(driver, "make_launcher", lambda *_: "a C file", raising=False)
    monkeypatch.setattr(driver, "compile_module_from_src", lambda src, name: SimpleNamespace(launch=src), raising=False)
    known, unknown = {0: "*fp32", 1: "i32"}, {0: "fp64"}
    with pytest.raises(ZeroDivisionError), launcher.shared():
        assert as_triton_3_6_loads(known)(1, 2) == ("pi", 1, 2)
        assert as_triton_3_6_loads(unknown) == "a C file"
        raise ZeroDivisionError
    assert as_triton_3_6_loads(known) == "a C file"


def test_nothing_is_built_where_triton_has_one_launcher_itself():
    if hasattr(driver, "make_launcher"):
        pytest.skip("Triton 3.6")
    assert launcher.built() is None
    with launcher.shared():
        assert not hasattr(driver, "make_launcher")


def test_a_launcher_that_cannot_be_built_is_done_without(monkeypatch):
    def fails(**_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(driver, "make_launcher", lambda *_: "a C file", raising=False)
    monkeypatch.setattr(driver, "compile_module_from_src", fails)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(driver, "library_dirs", list)
    launcher.built.cache_clear()
    try:
        with launcher.shared():
            assert driver.compile_module_from_src is fails
    finally:
        launcher.built.cache_clear()
