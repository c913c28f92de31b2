"""Shared by all tests: where to import from, how Triton runs, and where real images lie."""

import functools
import json
import os
import subprocess
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


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


_COMPILE = """
import importlib, json, re, subprocess, sys, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module, name, signature, constants, options = json.loads(sys.argv[1])
kernel = getattr(importlib.import_module(module), name)
pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
source = ASTSource(
    kernel,
    signature | dict.fromkeys(constants, "constexpr"),
    constants,
    {(i,): [["tt.divisibility", 16]] for i in pointers},
)
usage = {}
for capability in (80, 90):
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        dump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\\d+)", text))
    usage[capability] = {key: int(value) for key, value in found.items()}
print(json.dumps(usage))
"""


@pytest.fixture(scope="session")
def gpu_usage():
    """Compiles a kernel for sm_80 and sm_90, no GPU needed: {"80": {"REG", "STACK", "LOCAL"}, ...}.

    Spilled registers live on the stack. In a process of its own, since where TRITON_INTERPRET is
    set a kernel is a Python function.
    """

    def usage(module, kernel, signature, constants, options) -> dict[str, dict[str, int]]:
        job = json.dumps([module, kernel, signature, constants, options])
        root = Path(__file__).resolve().parent.parent
        env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        command = [sys.executable, "-c", _COMPILE, job]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return usage
