"""Machine code as text, by NVIDIA's disassembler."""

from __future__ import annotations

import subprocess
from pathlib import Path

from cuda import pathfinder


def disassemble(cubin: bytes, folder: Path) -> str:
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    nvdisasm = pathfinder.find_nvidia_binary_utility("nvdisasm")
    assert nvdisasm, "nvdisasm is missing: pip install nvidia-cuda-nvdisasm"
    return subprocess.run([nvdisasm, "-c", str(path)], check=True, capture_output=True, text=True).stdout
