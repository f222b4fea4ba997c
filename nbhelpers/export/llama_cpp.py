"""GGUF in 4 to 6 bits a weight: llama.cpp's own tool makes it from a file in bf16, where it is installed."""

import shutil
import subprocess
from pathlib import Path

from nbhelpers import host

KINDS = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
TOOL = "llama-quantize"


def why_not(quantization: str) -> str | None:
    """Why a GGUF file of that kind cannot be written here, and what helps; else None."""
    if quantization in KINDS and shutil.which(TOOL) is None:
        return (
            f"{quantization} is made by llama.cpp's {TOOL}, which is not on this machine's PATH: install llama.cpp "
            "(https://github.com/ggml-org/llama.cpp), or take q8_0, which needs no tool"
        )
    return None


def quantize(source: Path, file: Path, quantization: str) -> None:
    """Write `file` from a GGUF file in bf16. Raises host.CannotRun with the tool's last words if it fails."""
    command = [TOOL, str(source), str(file), quantization.upper()]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0 or not file.exists():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise host.CannotRun(
            f"{TOOL} ended with status {done.returncode} and wrote no {quantization} file. It said: {said}. "
            "Is there room on the disk? q8_0 needs no tool"
        )
