#!/usr/bin/env python3
"""Run a script, `-m` and a module, or `-c` and code, as if the machine had a GPU.

Needs Linux, gcc and a torch built for CUDA. See cuda.c for what is pretended, and its environment.

    tests/pretend_gpu/run.py d2det.py --train --steps 3 --image-size 64 --scales 64 --max-size 64
    SMALL=1 DEVICE=cuda PYTHON=tests/pretend_gpu/run.py studies/gpu.sh OUT
"""

import hashlib
import os
import runpy
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
HEADER = "cuda_runtime_api.h"


def build() -> Path:
    """Compile cuda.c, unless that was done before. Raises OSError or CalledProcessError."""
    source = (HERE / "cuda.c").read_bytes()
    packages = Path(find_spec("torch").origin).parent.parent
    headers = sorted(
        {file.parent for name in ("nvidia", "triton") for file in (packages / name).rglob(HEADER)}
    )
    key = hashlib.sha256(source + str(headers).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretend_gpu_{os.getuid()}_{key}" / "libcuda.so.1"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        include = [f"-I{folder}" for folder in headers]
        # the name, so that torch finds no other driver
        command = ["gcc", "-shared", "-fPIC", "-O1", "-w", "-Wl,-soname,libcuda.so.1", *include]
        subprocess.run([*command, HERE / "cuda.c", "-o", made, "-lpthread"], check=True)
        made.rename(library)
    return library


def main() -> None:
    if "PRETEND_GPU" not in os.environ:
        library = str(build())
        root = str(HERE.parent.parent)
        python_path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        own = dict(
            PRETEND_GPU="1", LD_PRELOAD=library, TRITON_INTERPRET="1", PYTHONPATH=python_path
        )
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **own})
    import torch
    from mode import PretendedGPU

    torch.backends.cudnn.enabled = False
    sys.argv = sys.argv[1:]
    with PretendedGPU() as mode:
        sys.pretended_gpu = mode  # for check.py
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        elif sys.argv[0] == "-c":
            exec(sys.argv[1])
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
