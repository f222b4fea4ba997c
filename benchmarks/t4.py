"""What a T4 makes of the kernels, without one: registers, spills, shared memory, occupancy; and tokens/s, estimated.

Nothing in benchmarks/results/t4.json was measured on a T4.

    python -m benchmarks.t4        # minutes on two cores; needs no GPU

Every launch of benchmarks/kernels/ahead.py is compiled for sm_75 and assembled by the ptxas that Triton brings. Of a
kernel's variants the worst one counts: most registers, most spilled bytes, most shared memory, lowest occupancy.
"""

import argparse
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from nbhelpers import presets
from nbhelpers.memory import seconds

# of a multiprocessor of compute capability 7.5 (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"): 32-bit registers, bytes, warps, blocks; registers are given out in 256 to a warp, shared memory in 256 B
REGISTERS, SHARED, WARPS, BLOCKS, UNIT = 65536, 65536, 32, 16, 256
MODELS, ROWS, PROMPT, COMPLETION = ("qwen2.5-1.5b", "llama-3.1-8b", "phi-4"), (8, 16, 32, 64), 200, 512


class Use(NamedTuple):
    """What one variant of a kernel takes: registers of a thread, bytes spilled, bytes shared, warps of a block."""

    registers: int
    spilled: int
    shared: int
    warps: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident: 0 if not even one block can."""
        of_a_warp = -(-32 * self.registers // UNIT) * UNIT
        limits = [BLOCKS, WARPS // self.warps, REGISTERS // of_a_warp // self.warps]
        if self.shared:
            limits.append(SHARED // (-(-self.shared // UNIT) * UNIT))
        return min(limits) * self.warps / WARPS


def assembled(ptx: str, shared: int, warps: int, arch: str = "sm_75") -> Use:
    """Use of a kernel, by ptxas; shared: bytes, which Triton allocates at the launch."""
    import triton.backends.nvidia as nvidia

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        ptxas = Path(nvidia.__file__).parent / "bin" / "ptxas"
        run = [str(ptxas), "-v", f"-arch={arch}", str(file), "-o", str(file.with_suffix(".cubin"))]
        said = subprocess.run(run, capture_output=True, text=True, check=True).stderr
    spilled = sum(int(number) for number in re.findall(r"(\d+) bytes spill", said))
    return Use(int(re.findall(r"Used (\d+) registers", said)[0]), spilled, shared, warps)


def kernel_rows() -> list[common.Row]:
    """Four rows a kernel, of its worst variants."""
    from benchmarks.kernels import ahead

    uses: dict[str, list[Use]] = defaultdict(list)
    for launch in ahead.every_launch("sm_75").values():
        compiled = launch.compile("sm_75")
        uses[launch.name].append(assembled(compiled.asm["ptx"], compiled.metadata.shared, compiled.metadata.num_warps))
    rows = []
    for name, variants in sorted(uses.items()):
        more: dict[str, Any] = {"variants": len(variants), "compiled_for": "sm_75"}
        for metric, value, unit in (
            ("registers", max(use.registers for use in variants), "a thread"),
            ("spilled", max(use.spilled for use in variants), "bytes"),
            ("shared", max(use.shared for use in variants), "bytes"),
            ("occupancy", round(min(use.occupancy for use in variants), 4), "share"),
        ):
            rows.append(common.row(f"kernels/{name}/{metric}", "ptxas", value, unit, **more))
    return rows


def decode_rows() -> list[common.Row]:
    """Tokens/s of the graph engine on a T4 as the planner estimates them."""
    t4, middle = seconds.card_of(15, "T4"), PROMPT + COMPLETION / 2
    more: dict[str, Any] = {"estimated": True, "prompt": PROMPT, "completion": COMPLETION, "GB/s": t4.gb_s}
    return [
        common.row(
            f"{name}/batch-{rows}/decode", "estimate",
            round(rows / seconds.decoding_step(presets.get(name).architecture, t4, "nf4", rows, middle), 1),
            "tokens/s", **more,
        )
        for name in MODELS for rows in ROWS
    ]  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="the folder that t4.json goes to")
    folder = parser.parse_args().out
    made = [*kernel_rows(), *decode_rows()]
    print(common.table(made))
    print(common.publish("t4", made, folder))
