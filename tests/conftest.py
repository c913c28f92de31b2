"""Shared by all tests: where to import from, how Triton runs, and where real images lie."""

import os
import sys
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: on such small tensors threads cost
# more than they give, and where cores are shared they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch  # noqa: E402

# Before triton is imported: on a machine without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    try:  # which asks of every sum of integers whether it overflows: a third of its time
        from triton.runtime.interpreter import InterpreterOptions, interpreter_builder

        interpreter_builder.options = InterpreterOptions(sanitize_overflow=False)
    except (ImportError, TypeError):  # no Triton, or one that does not ask
        pass
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture
def detection_data() -> Path:
    """Folder with small real data sets (`coco_tiny/`, `bccd/`); skips where there is none."""
    folder = os.environ.get("DETECTION_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("the environment variable DETECTION_DATA names no folder of real images")
    return Path(folder)
