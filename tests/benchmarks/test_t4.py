"""`python -m benchmarks.t4`: what is read from the assembler, what follows of it, and the file that was written."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks import common, t4
from benchmarks.t4 import Use


@pytest.mark.parametrize(
    ("use", "share"),
    [
        (Use(64, 0, 0, 4), 1.0),  # 32 threads x 64 registers, 32 times: all 65536
        (Use(65, 0, 0, 4), 0.875),  # 72 are given: 28 warps
        (Use(128, 0, 0, 4), 0.5), (Use(255, 0, 0, 8), 0.25), (Use(255, 0, 0, 16), 0.0),
        (Use(16, 0, 0, 1), 0.5),  # 16 blocks at most
        (Use(16, 0, 40_000, 4), 0.125), (Use(16, 0, 65_536, 8), 0.25), (Use(16, 0, 65_537, 8), 0.0),
    ],
)  # fmt: skip
def test_occupancy_of_a_multiprocessor(use, share):
    assert use.occupancy == share


def test_the_assembler_tells_registers_and_spills():
    loads = "".join(f"ld.global.u32 %r{i}, [%d0+{4 * i}];\n" for i in range(40))
    adds = "".join(f"add.u32 %r50, %r50, %r{i};\n" for i in range(40))
    kernel = (
        ".version 6.3\n.target sm_75\n.address_size 64\n.visible .entry k(.param .u64 p) {MAXIMUM\n"
        "{.reg .u32 %r<60>; .reg .u64 %d<2>;\nld.param.u64 %d0, [p];\nmov.u32 %r50, 0;\n"
        f"{loads}bar.sync 0;\n{adds}st.global.u32 [%d0], %r50;\nret;}}}}"
    )
    kernel = kernel.replace("{MAXIMUM\n{", "{\n").replace("}}", "}")
    use = t4.assembled(kernel, 512, 4)
    assert use.registers > 8 and use.spilled == 0 and (use.shared, use.warps) == (512, 4)


def test_the_committed_file_says_what_is_estimated_and_has_no_fall():
    rows = json.loads((common.RESULTS / "t4.json").read_text())["rows"]
    speeds = {row["what"]: row["value"] for row in rows if row["unit"] == "tokens/s"}
    assert all(row["who"] == "estimate" and row["estimated"] for row in rows if row["unit"] == "tokens/s")
    for name in t4.MODELS:
        of_one = [speeds[f"{name}/batch-{n}/decode"] for n in t4.ROWS]
        assert of_one == sorted(of_one)
    assert speeds == {row["what"]: row["value"] for row in t4.decode_rows()}, "run python -m benchmarks.t4 again"


def test_every_kernel_is_in_the_committed_file_and_runs_on_a_t4():
    rows = json.loads((common.RESULTS / "t4.json").read_text())["rows"]
    occupancy = {row["what"]: row["value"] for row in rows if row["what"].endswith("/occupancy")}
    assert len(occupancy) >= 18 and min(occupancy.values()) > 0
