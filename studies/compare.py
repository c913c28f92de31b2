"""The five methods and their own baselines under one protocol, over seeds, and the tables.

    python -m studies.compare --all --data synthetic --jobs 2
    python -m studies.compare d2det --data bccd --root DIR       # DIR/bccd; or DETECTION_DATA=DIR
    python -m studies.compare --table                            # README, docs/results.md

A run is the method's own command, `python METHOD.py --train`, with the flags of PROTOCOLS. A method
and its baseline have the same loss weights, the same length, the same images and, with the same
seed, the same order of images and the same random numbers. All methods of one seed come before the
next seed, so the tables are complete early and only their intervals shrink.

Every finished run leaves one JSON file in docs/results: metrics, the same on each tenth of the test
images, what `studies.alignment` finds, all settings that matter, versions and machine. A run whose
file exists with the same settings is skipped, and an interrupted run continues from its checkpoint.
Every run has one thread; --jobs says how many run at a time.

In the tables ± is a 95 % interval of the mean (Student's t over the seeds). Differences are taken
seed by seed. Other test images would change them too: the second number of a difference is the 95 %
interval from tenths of the test images, averaged over the seeds. Bold differences exceed both.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torchvision
import tyro

from common import BadInput
from data.files import read_json
from engine.checkpoints import as_saved, write_json
from engine.command import load_data
from engine.metrics import coco_metrics
from engine.settings import MAY_CHANGE_ON_RESUME, Settings, flag
from studies.checkpoint import (
    BASELINES,
    PAPERS,
    read_options,
    reported,
    results_folder,
    settings_of,
)
from studies.tables import KEYS, agree, fill, read_results, tables

ROOT = Path(__file__).resolve().parent.parent


# ------------------------------------------------------------------------------ protocol


@dataclass
class Protocol:
    """How the methods are compared on one data set."""

    title: str
    seeds: int
    flags: list[str]
    epochs: dict[str, float]  # by method; the preset's length for the others


ONE_STAGE_LONGER = {"iou_aware_retinanet": 2, "dc_loss_clnms": 2}  # times: they learn more slowly
PROTOCOLS = {
    "synthetic": Protocol(
        title="Built-in images, 128 px",
        seeds=8,
        flags="--preset tiny --num-val 2000".split(),
        epochs={},
    ),
    "bccd": Protocol(
        title="BCCD: photographs of blood cells, 3 classes, 256 px",
        seeds=6,
        flags="--preset tiny --scales 256 --test-scales 256 --max-size 448".split(),
        epochs={method: 12.0 * ONE_STAGE_LONGER.get(method, 1) for method in PAPERS},
    ),
    "fod": Protocol(
        title="FOD-A: photographs of debris on runways, 31 classes, 128 px",
        seeds=4,
        flags="--preset tiny --scales 128 --test-scales 128 --max-size 128 --min-steps 0".split()
        + "--max-steps 0".split(),
        epochs={method: 2.0 * ONE_STAGE_LONGER.get(method, 1) for method in PAPERS},
    ),
}
# Settings that a baseline's row changes, although the pair must have them in common.
AS_THE_METHOD = {"d2det": ("cls_weight", "warmup", "warmup_factor")}


@dataclass
class Job:
    """One training: a method or its baseline, on one data set, with one seed."""

    data: str
    method: str
    baseline: bool
    seed: int
    flags: list[str]
    settings: dict  # those that matter, as they stand in the JSON file

    @property
    def name(self) -> str:
        return f"{self.data}-{self.method}{'-baseline' if self.baseline else ''}-{self.seed}"

    @property
    def folder(self) -> str:
        """Other settings have another folder, so that no run is resumed under changed ones."""
        text = json.dumps(self.settings, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def make_jobs(data: str, methods, seeds, root: str, flags: list[str]) -> list[Job]:
    """The runs of these methods and of their baselines under the protocol of `data`."""
    jobs = []
    for method in methods:
        for baseline in (False, True):
            own, settings = contender(data, method, baseline, root, flags)
            for seed in seeds:
                matter = settings_that_matter(settings.replace(seed=seed), data)
                own_flags = [*own, "--seed", str(seed)]
                jobs.append(Job(data, method, baseline, seed, own_flags, matter))
    return sorted(jobs, key=lambda job: seeds.index(job.seed))  # all methods of a seed first


def contender(
    data: str, method: str, baseline: bool, root: str, flags: list[str]
) -> tuple[list[str], Settings]:
    """A method's flags and settings, or its baseline's."""
    protocol = PROTOCOLS[data]
    own = ["--train", *protocol.flags, "--eval-times", "1", *flags]
    if method in protocol.epochs:
        own += ["--epochs", str(protocol.epochs[method])]
    if data != "synthetic":
        own += ["--data", str(Path(root, data).resolve())]
    settings = settings_of(method, own)
    if baseline:
        same = {name: settings.flat()[name] for name in AS_THE_METHOD.get(method, ())}
        own += [*BASELINES[method], *(word for k, v in same.items() for word in flag(k, v).split())]
        settings = settings_of(method, own)
    return own, settings


def settings_that_matter(settings: Settings, data: str) -> dict:
    """All settings but those of the machine; of the data's folder only the name."""
    saved = as_saved(settings)
    for name in MAY_CHANGE_ON_RESUME:
        saved["run"].pop(name, None)
        saved["data"].pop(name, None)
    saved["data"]["data"] = data
    return saved


# ------------------------------------------------------------------------------ running


def is_done(job: Job, results: Path) -> bool:
    """Whether the run's JSON file exists; says so if it is of other settings."""
    file = results / f"{job.name}.json"
    if not file.exists():
        return False
    if agree(read_json(file)["settings"], job.settings):
        return True
    print(f"{file} was measured with other settings: running again", flush=True)
    return False


def run_job(job: Job, out: Path) -> str:
    """Train, then study the checkpoint, in processes of one thread. "" or what failed."""
    out.mkdir(parents=True, exist_ok=True)
    print(f"{job.name} ...", flush=True)
    train = ["-m", job.method, "--resume", "--out", str(out), *job.flags]
    study = ["-m", "studies.alignment", job.method, "--weights", str(out / "last.pt")]
    if job.data == "synthetic":
        study += ["--num-val", str(min(500, job.settings["data"]["num_val"]))]
    for command in (train, study):
        with open(out / "output.txt", "a") as output:
            code = subprocess.run(
                [sys.executable, *command],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if code:
            last = (out / "output.txt").read_text().strip().splitlines()[-1:]
            return f"{job.name}: exit {code}: {' '.join(last)} (see {out}/output.txt)"
    return ""


def write_result(job: Job, out: Path, results: Path) -> None:
    """The run's JSON file."""
    metrics = read_json(out / "metrics.json")
    (alignment,) = read_json(out / "studies" / "alignment.json").values()
    write_json(
        results / f"{job.name}.json",
        {
            "data": job.data,
            "method": job.method,
            "baseline": job.baseline,
            "seed": job.seed,
            "metrics": metrics,
            "tenths": metrics_of_tenths(job, out),
            "alignment": summary_of(alignment),
            "settings": job.settings,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchvision": torchvision.__version__,
            },
            "machine": machine(),
        },
    )
    shown = "  ".join(f"{k} {v:.3f}" for k in KEYS if (v := metrics[k]) is not None)
    print(f"{job.name}: {shown}", flush=True)


def metrics_of_tenths(job: Job, out: Path) -> list[dict]:
    """KEYS on each tenth of the test images: every tenth one, beginning with the first, ..."""
    test_images = load_data(settings_of(job.method, job.flags), train=False)[1]
    truth, found = test_images.coco(), read_json(out / "predictions.json")
    parts = []
    for first in range(10):
        images = truth["images"][first::10]
        ids = {image["id"] for image in images}
        objects = [a for a in truth["annotations"] if a["image_id"] in ids]
        part = {**truth, "images": images, "annotations": objects}
        metrics = coco_metrics(part, [r for r in found if r["image_id"] in ids])
        parts.append({key: metrics[key] for key in KEYS})
    return parts


def summary_of(alignment: dict) -> dict:
    """Of alignment.json: the oracle's AP, and for the ranking that is used what it lacks to that.

    Pearson's correlation of score and IoU is over the boxes before NMS, the matched ones and all.
    """
    *scores, oracle = alignment["metrics"]
    numbers = alignment[scores[-1]]
    before = numbers["before NMS"]
    return {
        "oracle": alignment["metrics"][oracle]["AP"],
        "cost": numbers["cost"],
        "matched": before["matched"],
        "all": before["all"],
    }


def machine() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{name} ({capability}), {os.cpu_count()} cores, one thread a run"


def run_all(jobs: list[Job], runs: Path, results: Path, at_a_time: int) -> None:
    """Do what is not done yet; raises BadInput with the runs that failed, after all the others."""
    waiting = [job for job in jobs if not is_done(job, results)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    failures = []
    with ThreadPoolExecutor(at_a_time) as pool:
        running = {}
        for job in waiting:
            out = runs.resolve() / job.folder
            running[pool.submit(run_job, job, out)] = job, out
        for ended in as_completed(running):
            if ended.result():
                failures.append(ended.result())
            else:
                write_result(*running[ended], results)
    if failures:
        raise BadInput("\n".join(failures))


# ------------------------------------------------------------------------------ command line


@dataclass
class CompareOptions:
    method: Annotated[Literal[("", *PAPERS)], tyro.conf.Positional] = ""  # the method to compare
    all: bool = False  # compare all five
    table: bool = False  # print the tables and put them into the pages, after runs if any
    pages: tuple[str, ...] = ("README.md", "docs/results.md")  # where marks say which table goes
    data: Literal[tuple(PROTOCOLS)] = "synthetic"  # what to train and test on
    root: str = ""  # folder that holds bccd/ and fod/ (default: the environment's DETECTION_DATA)
    seeds: tuple[int, ...] = ()  # (default: 0, 1, ..., as many as the protocol has)
    jobs: int = 1  # runs at a time, one thread each
    results: str = "docs/results"  # folder of the JSON files
    out: str = "runs/compare"  # folder of checkpoints and logs


def main(argv=None) -> None:
    with reported():
        options, flags = read_options("compare", CompareOptions, __doc__, argv)
        methods = PAPERS if options.all else tuple(filter(None, [options.method]))
        if not (methods or options.table):
            raise BadInput("nothing to do: a method, --all or --table")
        if options.jobs < 1:
            raise BadInput(f"--jobs {options.jobs}: at least 1")
        if len(set(options.seeds)) < len(options.seeds):
            raise BadInput("--seeds: one of them is there twice")
        results, protocol = Path(options.results), PROTOCOLS[options.data]
        root = options.root or os.environ.get("DETECTION_DATA", "")
        if methods and options.data != "synthetic" and not Path(root, options.data).is_dir():
            raise BadInput(f"--root or DETECTION_DATA must name the folder of {options.data}/")
        seeds = options.seeds or tuple(range(protocol.seeds))
        jobs = make_jobs(options.data, methods, seeds, root, flags)
        if jobs:
            run_all(jobs, results_folder(options.out), results, options.jobs)
        if options.table:
            found = tables(read_results(results))
            for page in options.pages:
                fill(Path(page), found)
            print("\n\n".join(f"{name}\n{table}" for name, table in found.items()))


if __name__ == "__main__":
    main()
