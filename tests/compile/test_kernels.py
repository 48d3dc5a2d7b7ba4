"""Every kernel that a plan may name compiles into what its tile row was chosen for."""

from __future__ import annotations

import re

import matrix
import pytest
from sass import disassemble

from cuflash.cuda import nvrtc

FLOPS_PER_HMMA = 2 * 16 * 8 * 16  # one warp's m16n8k16 product
ELEMENT_SUFFIX = {"bfloat16": ".BF16", "float16": ""}

# Hopper's kernels are quick elsewhere: test_hopper.py, test_hopper_backward.py and test_hopper_split.py compile them.
QUICK = [kernel for kernel in matrix.quick() if not kernel.step.spec.entry.endswith("_sm90")]
SLOW = [kernel for kernel in matrix.continuous() if kernel.step.spec not in {quick.step.spec for quick in QUICK}]
FULL = [kernel for kernel in matrix.full() if kernel.step.spec not in {known.step.spec for known in QUICK + SLOW}]


def cases(kernels: list[matrix.Kernel], *marks: pytest.MarkDecorator) -> list:
    return [pytest.param(kernel, id=kernel.id, marks=marks) for kernel in kernels]


@pytest.mark.parametrize("kernel", cases(QUICK) + cases(SLOW, pytest.mark.slow) + cases(FULL, pytest.mark.full))
def test_fits_registers_and_shared_memory(kernel, tmp_path):
    device, step = kernel.plan.device, kernel.step
    report = nvrtc.compile_spec(step.spec)
    assert (report.spill_stores, report.spill_loads, report.stack) == (0, 0, 0), f"{report.registers} registers"
    assert report.warnings == ()
    shared_bytes = report.shared + step.shared_bytes
    assert shared_bytes <= device.shared_per_block
    assert device.blocks_per_sm(step.threads, shared_bytes, report.registers) >= step.min_blocks
    if kernel.is_main and not kernel.features:
        sass = disassemble(report.cubin, tmp_path)
        assert matrix_instructions(sass, kernel) >= expected_matrix_instructions(kernel)


def matrix_instructions(sass: str, kernel: matrix.Kernel) -> int:
    element = ELEMENT_SUFFIX[kernel.plan.problem.dtype]
    if kernel.step.spec.entry.endswith("_sm90"):
        return len(re.findall(rf"HGMMA\.64x\d+x16\.F32{element} ", sass))
    return sass.count(f"HMMA.16816.F32{element} ")


def expected_matrix_instructions(kernel: matrix.Kernel) -> int:
    """Products of one tile of scores, unrolled completely."""
    tile, config = kernel.plan.tile, {name: value for name, _, value in kernel.step.spec.config}
    head_dim, head_dim_v = config["head_dim"], config["head_dim_v"]
    if kernel.step.spec.entry == "forward_sm90":
        # One instruction is as wide as the tile and 16 deep.
        return (head_dim + tile.block_n) // 16
    depth = head_dim + head_dim_v if tile.pass_ == "forward" else 3 * head_dim + 2 * head_dim_v
    return 2 * tile.block_m * tile.block_n * depth // tile.num_warps // FLOPS_PER_HMMA


SPILLING = """
extern "C" __global__ void __launch_bounds__(1024, 2) kernel(float* values, int n) {
  float kept[96];
  for (int i = 0; i < 96; ++i) kept[i] = values[i * n + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 96; ++i)
    for (int j = 0; j < 96; ++j) kept[i] = kept[i] * kept[j] + values[j];
  for (int i = 0; i < 96; ++i) values[i * n + threadIdx.x] = kept[i];
}
"""


def test_a_spill_is_seen():
    report = nvrtc.compile_text(SPILLING, "sm_90")
    assert report.spill_stores > 0
    assert report.spill_loads > 0
    assert report.registers <= 32


def test_static_shared_memory_is_seen():
    body = "__shared__ float s[64]; s[threadIdx.x] = *x; *x = s[63 - threadIdx.x];"
    text = f"extern \"C\" __global__ void kernel(float* x) {{ {body} }}"
    assert nvrtc.compile_text(text, "sm_80").shared == 256


def test_a_kernel_without_matrix_instructions_is_seen(tmp_path):
    (plain, *_) = (kernel for kernel in QUICK if kernel.is_main)
    sass = disassemble(nvrtc.compile_text('extern "C" __global__ void kernel() {}', "sm_90").cubin, tmp_path)
    assert "EXIT" in sass
    assert matrix_instructions(sass, plain) == 0


def test_a_compile_error_names_the_file_and_line():
    with pytest.raises(nvrtc.CompileError, match=r"broken\.cu\(2\).*undeclared"):
        nvrtc.compile_text('extern "C" __global__ void kernel() {\n  undeclared = 1;\n}', "sm_90", name="broken.cu")


@pytest.mark.parametrize("arch", [*matrix.ARCHS, "sm_90"])
def test_compiler_knows_the_architecture(arch):
    assert nvrtc.compile_text('extern "C" __global__ void kernel() {}', arch).registers > 0
