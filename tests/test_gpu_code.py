"""Every kernel compiled as it is launched, for four GPUs and without one: what ptxas spills.

`python tests/test_gpu_code.py 90` prints the registers and the stack of each kernel on sm_90.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = (75, 80, 90, 120)
# Bytes of stack that are left at most; the reasons are beside the launch constants.
SPILLS = {("nms", 75): 8, ("nms", 80): 8, ("cl_nms", 120): 8}


def pool(dtype, C, S, deform=False, backward=False):
    module = importlib.import_module("kernels.roi_align")
    maps = [torch.zeros(1, 64 // s, 64 // s, C, dtype=dtype) for s in (4, 8, 16, 32)]
    maps = [m.permute(0, 3, 1, 2) for m in maps]  # channels_last
    offsets = torch.zeros(3, 2, S, S) if deform else None
    options = (maps, torch.zeros(3, 5), offsets, S, [4, 8, 16, 32], 2, 0.1, deform)
    if not backward:
        return module._pool._init_fn(*options)
    return module._pool_backward._init_fn([True, deform], maps[0].new_zeros(3, C, S, S), *options)


def focal_loss(K, dtype, want_slope, transposed=False):
    module = importlib.import_module("kernels.focal_loss")
    logits = torch.zeros(K, 64, dtype=dtype).T if transposed else torch.zeros(64, K, dtype=dtype)
    return module._triton_forward(logits, torch.zeros(64).long(), 0.25, 2.0, want_slope)


def dense_decode(dtype):
    module = importlib.import_module("kernels.dense_decode")
    offsets, logits = torch.zeros(8, 4, 7, 7, dtype=dtype), torch.zeros(8, 1, 7, 7, dtype=dtype)
    return module._decode(torch.zeros(8, 4), offsets, logits, torch.zeros(8, 2), -1, -1, "triton")


def nms():
    module, scores = importlib.import_module("kernels.nms"), torch.zeros(64)
    return module._triton_kept(torch.zeros(64, 4), scores, scores.long(), 0.5, scores.long())


def soft_cl_nms(method):
    module, scores = importlib.import_module("kernels.soft_cl_nms"), torch.zeros(64)
    return module._triton_select(torch.zeros(64, 4), scores, scores.long(), 0.5, method, 0.05)


CASES = {
    "pool": lambda: pool(torch.float32, 256, 7, deform=True),
    "pool backward": lambda: pool(torch.float32, 256, 7, deform=True, backward=True),
    "pool of 255 channels": lambda: pool(torch.float32, 255, 7),
    "pool bf16 14x14": lambda: pool(torch.bfloat16, 256, 14),
    "focal_loss": lambda: focal_loss(80, torch.float32, True),
    "focal_loss of 10 classes": lambda: focal_loss(10, torch.bfloat16, False, transposed=True),
    "dense_decode": lambda: dense_decode(torch.float32),
    "nms": nms,
    "soft_nms": lambda: soft_cl_nms("soft"),
    "cl_nms": lambda: soft_cl_nms("cl"),
}


def compile_all(capability: int) -> list:
    """[case, kernel, what the compiler made of it] for each kernel that the cases launch."""
    sys.path.insert(0, str(ROOT))

    class NoGPU:  # as much of a driver as compiling asks for
        def get_current_target(self):
            return triton.backends.compiler.GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    compiled: list = []
    run = triton.runtime.jit.JITFunction.run

    def compile_only(kernel, *args, grid, warmup, **options):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.append((kernel.__name__, usage(binary.asm)))

    triton.runtime.driver.set_active(NoGPU())
    triton.runtime.jit.JITFunction.run = compile_only
    found = []
    for case, launch in CASES.items():
        compiled.clear()
        launch()
        found += [[case, *kernel] for kernel in compiled]
    return found


def usage(asm: dict) -> dict:
    """Registers and stack, which holds what is spilled; 16-byte accesses and fused operations."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found: dict = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    found["vectors"] = "global.v4.b32" in asm["ptx"]
    found["fused"] = "fma.rn.f32" in asm["ptx"]
    return found


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills_but_the_named_ones(capability):
    """In a process of its own, because under TRITON_INTERPRET a kernel is a Python function."""
    try:
        tools = triton.knobs.nvidia
        assert (tools.ptxas_blackwell if capability >= 100 else tools.ptxas) and tools.cuobjdump
    except (AttributeError, RuntimeError) as missing:
        pytest.skip(f"no ptxas for sm_{capability}: {missing}")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {case for case, *_ in found} == set(CASES) and len(found) == len(CASES) + 2
    for case, kernel, used in found:
        assert used["LOCAL"] == 0 < used["REG"], (case, kernel, used)
        assert used["STACK"] <= SPILLS.get((case, capability), 0), (case, kernel, used)
        if case.endswith("nms"):  # the compiler fuses nothing, and tl.fma is one operation
            assert used["fused"] == (case == "nms"), case
        if kernel in ("_pool_kernel", "_gather_kernel") and "255" not in case:
            assert used["vectors"], (case, kernel)


if __name__ == "__main__":
    for line in compile_all(int(sys.argv[1])):
        print(json.dumps(line))
