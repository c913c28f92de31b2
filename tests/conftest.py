"""Shared by all tests: where to import from, how Triton runs, and where real images lie."""

import functools
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: on such small tensors threads
# cost more than they give, and where cores are shared they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests, and the processes that they start, neither read nor write the user's cache of checked
# images. The fonts that matplotlib has found, and weights of torch, stay where they are.
_users_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
os.environ.setdefault("MPLCONFIGDIR", os.path.join(_users_cache, "matplotlib"))
os.environ.setdefault("TORCH_HOME", os.path.join(_users_cache, "torch"))
_cache = tempfile.TemporaryDirectory(prefix="two-task-detection-")
os.environ["XDG_CACHE_HOME"] = _cache.name
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


@pytest.fixture(scope="module", autouse=True)
def cpu_alone(request):
    """Tests use the CPU where torch sees a GPU too, but for those of kernels, which name DEVICE."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(request.module, "DEVICE"):
            patch.setattr(torch.cuda, "is_available", lambda: False)
            patch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that tests start
        yield


@pytest.fixture
def detection_data() -> Path:
    """Folder with small real data sets (`coco_tiny/`, `bccd/`); skips where there is none."""
    folder = os.environ.get("DETECTION_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("the environment variable DETECTION_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="session")
def few_real_images(tmp_path_factory):
    """folder of a real set -> a folder with four of its images to train and four to test on."""

    def few(whole: Path) -> Path:
        out = tmp_path_factory.mktemp(whole.name)
        for path in whole.iterdir():
            if path.name not in ("annotations", "ImageSets"):
                (out / path.name).symlink_to(path.resolve())
        for path in whole.glob("annotations/instances_*.json"):
            coco = json.loads(path.read_text())
            crowded = {a["image_id"] for a in coco["annotations"] if a["iscrowd"]}
            coco["images"].sort(key=lambda image: image["id"] not in crowded)
            coco["images"] = coco["images"][:4]
            ids = {image["id"] for image in coco["images"]}
            coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
            (out / "annotations").mkdir(exist_ok=True)
            (out / "annotations" / path.name).write_text(json.dumps(coco))
        for path in whole.glob("ImageSets/Main/*.txt"):
            (out / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            lines = path.read_text().splitlines()[:4]
            (out / "ImageSets" / "Main" / path.name).write_text("\n".join(lines) + "\n")
        return out

    return functools.cache(few)


@pytest.fixture(scope="module")
def unpainted():
    """Figures are built, and saved as empty files: drawing them takes as long as a short run.

    The fixture is the function that draws, for the test that wants it back.
    """
    from matplotlib.figure import Figure

    drawn = Figure.savefig
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
        yield drawn
