"""Machine code as text, by NVIDIA's disassembler, and its loops."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from cuda import pathfinder

LABEL = re.compile(r"^(\.L_x_\d+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;")
CONDITIONAL_BRANCH = re.compile(r"^@!?U?P\d+ BRA.*\((\.L_x_\d+)\)")


def disassemble(cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    nvdisasm = pathfinder.find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm, "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    return subprocess.run([nvdisasm, "-c", str(path)], check=True, capture_output=True, text=True).stdout


def loops(sass: str) -> list[list[str]]:
    """Instructions of every loop that ends with its condition, in program order; branches out of line are no loops."""
    instructions, labels, found = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.match(line):
            instructions.append(instruction[1])
            branch = CONDITIONAL_BRANCH.match(instruction[1])
            if branch and branch[1] in labels:
                found.append(instructions[labels[branch[1]] :])
    return found
