"""Every kernel compiled for sm_80 and sm_90, no GPU needed: no spills, and 16-byte accesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# In a process of its own, since where TRITON_INTERPRET is set a kernel is a Python function.
COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

def kinds(types, path=()):  # (place of an argument, in its tuple too; its type)
    for i, kind in enumerate(types):
        yield from kinds(kind, (*path, i)) if type(kind) is tuple else [((*path, i), kind)]

usage = []
for name, module, kernel, capabilities, types, constants, options in json.loads(sys.argv[1]):
    kernel = getattr(importlib.import_module("kernels." + module), kernel)
    names = [p.name for p in kernel.params]
    tuples = lambda v: tuple(v) if type(v) is list else v
    signature = {n: tuples(types.get(n, "constexpr")) for n in names}
    constants = {n: tuples(v) for n, v in constants.items() if n in names}
    aligned = {path: [["tt.divisibility", 16]] for path, kind in kinds(signature.values())
               if kind.startswith("*") or names[path[0]] == "C"}
    source = ASTSource(kernel, signature, constants, aligned)
    for capability in capabilities:
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
            text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\\d+)", text)}
        found["vectors"] = "global.v4.b32" in compiled.asm["ptx"]
        found["fused"] = "fma.rn.f32" in compiled.asm["ptx"]
        usage.append([name, capability, found])
print(json.dumps(usage))
"""


def dense_decode(dtype):
    types = {"proposals_ptr": "*fp32", "offsets_ptr": dtype, "logits_ptr": dtype}
    types |= {"sizes_ptr": "*fp32", "out_ptr": "*fp32", "R": "i32"}
    types |= {"height": "fp32", "width": "fp32"}
    types |= dict.fromkeys("off_r off_c off_y off_x log_r log_y log_x".split(), "i32")
    constants = {"S": 7, "CELLS": 64, "ROIS": 4, "CLIP": 2}
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return ["dense_decode", "_decode_kernel", (80, 90), types, constants, options]


def focal_loss(dtype):
    types = {"logits_ptr": dtype, "labels_ptr": "*i64", "loss_ptr": "*fp32", "slope_ptr": dtype}
    types |= {"M": "i32", "K": "i32", "row_stride": "i32", "slope_row_stride": "i32"}
    types |= {"alpha": "fp32"}
    constants = {"column_stride": 1, "slope_column_stride": 1, "GAMMA": 2.0, "SLOPE": True}
    constants |= {"ROWS": 32, "COLUMNS": 16}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return ["focal_loss", "_focal_kernel", (80, 90), types, constants, options]


def nms(kernel):
    from kernels.nms import _GREEDY_LAUNCH, _SOFT_LAUNCH

    more, constants, launch = {
        "_nms_kernel": ({"kept_boxes": "*fp32", "half_ulp": "fp32"}, {"ODD": True}, _GREEDY_LAUNCH),
        "_soft_nms_kernel": ({"score_threshold": "fp32"}, {}, _SOFT_LAUNCH),
        "_cl_nms_kernel": ({}, {"LITERAL": False}, _SOFT_LAUNCH),
    }[kernel]  # fmt: skip
    types = {"boxes": "*fp32", "live": "*fp32", "order": "*i64", "starts": "*i32"}
    types |= {"out": "*fp32", "N": "i32", "iou_threshold": "fp32", **more}
    options = {k: v for k, v in launch.items() if k != "BLOCK"}
    return ["nms", kernel, (80, 90), types, {"BLOCK": launch["BLOCK"], **constants}, options]


def roi_align(name, dtype):
    """The pooling kernels at 256 channels and 7x7 bins, over four levels."""
    from kernels.roi_align import _tile

    tile = _tile(1, 256, 7)[1]
    types = dict.fromkeys(("rois", "offsets", "weights"), "*fp32")
    types |= dict(maps=["*" + dtype] * 4, heights=["fp32"] * 4, widths=["fp32"] * 4)
    types |= dict(cells="*i32", starts="*i32", order="*i32", C="i32", gamma="fp32")
    types |= dict(num_images="i32", num_cells="i32")
    types |= dict.fromkeys(("out", "grad", "table"), "*" + dtype)
    if name == "pool":  # forward: without a gradient
        del types["grad"]
    constants = dict(SIZE=7, STRIDES=(4, 8, 16, 32), SAMPLES=2, SKIP=True, TAPS=16, STEP=4)
    constants |= dict(grad=None) if name == "pool" else {}
    constants |= dict(BINS=tile["BINS"], CH=tile["CH"])
    options = {"num_warps": {"taps": 2, "gather": 1}.get(name, tile["num_warps"])}
    capabilities = (80, 90) if dtype == "fp32" else (90,)
    return ["roi_align", f"_{name.split()[0]}_kernel", capabilities, types, constants, options]


def test_kernels_compile_for_gpus():
    """In one process: to start python and Triton takes longer than to compile a kernel."""
    jobs = [[f"{make.__name__} {dtype}", *make(dtype)] for make in (dense_decode, focal_loss)
            for dtype in ("*fp32", "*bf16")]  # fmt: skip
    jobs += [[k, *nms(k)] for k in ("_nms_kernel", "_soft_nms_kernel", "_cl_nms_kernel")]
    for name in ("pool", "pool backward", "taps", "gather"):
        jobs += [[f"{name} {dtype}", *roi_align(name, dtype)] for dtype in ("fp32", "bf16")]
    root = Path(__file__).resolve().parent.parent
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, json.dumps(jobs)]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 14 + 12
    for name, capability, usage in found:  # spilled registers live on the stack
        # ptxas stops at 128 registers on sm_80, and lays one down outside of greedy NMS's loops
        most = 8 if name == "_nms_kernel" else 0
        assert usage["LOCAL"] == 0 < usage["REG"], (name, capability, usage)
        assert usage["STACK"] <= most, (name, capability, usage)
        if name.endswith("nms_kernel"):  # the compiler fuses nothing, and tl.fma is one operation
            assert usage["fused"] == (name == "_nms_kernel"), (name, capability)
        if name.startswith(("pool", "gather")):
            assert usage["vectors"], (name, capability)
