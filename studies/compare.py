"""The five methods and their own baselines under one protocol, over seeds, and the tables.

    python -m studies.compare --all --data synthetic --jobs 2
    python -m studies.compare d2det --data bccd --root DIR       # DIR/bccd; or DETECTION_DATA=DIR
    python -m studies.compare --table                            # docs/results/tables.md

A run is the method's own command, `python METHOD.py --train`, with the flags of PROTOCOLS. A method
and its baseline have the same loss weights, the same length, the same images and, with the same
seed, the same order of images and the same random numbers. All methods of one seed come before the
next seed, so the tables are complete early and only their intervals shrink.

Every finished run leaves one JSON file in docs/results: metrics, all settings that matter, seconds,
versions and machine. A run whose file exists with the same settings is skipped, and an interrupted
run continues from its checkpoint. Every run has one thread; --jobs says how many run at a time.

In the tables ± is a 95 % interval of the mean (Student's t over the seeds). Differences are taken
seed by seed; bold ones exclude zero.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torchvision
import tyro

from common import BadInput
from data.files import read_json
from engine.checkpoints import as_saved, write_json
from engine.settings import MAY_CHANGE_ON_RESUME, Settings, flag
from studies.checkpoint import BASELINES, PAPERS, read_options, reported, settings_of

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("AP", "AP50", "AP75", "AP90")
# Student's t: 97.5 % of its values lie below, for 1, 2, ... degrees of freedom
T_975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179]
T_975 += [2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093]


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
        flags="--preset tiny".split(),
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
    own = ["--train", *protocol.flags, "--eval-every", "0", *flags]
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
    if read_json(file)["settings"] == job.settings:
        return True
    print(f"{file} was measured with other settings: running again", flush=True)
    return False


def run_job(job: Job, runs: Path, results: Path) -> str:
    """Train in a process of its own with one thread, and write the JSON file. "" or what failed."""
    out = runs.resolve() / job.folder
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", job.method, "--resume", "--out", str(out)]
    print(f"{job.name} ...", flush=True)
    with open(out / "output.txt", "a") as output:
        code = subprocess.run(
            [*command, *job.flags],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        last = (out / "output.txt").read_text().strip().splitlines()[-1:]
        return f"{job.name}: exit {code}: {' '.join(last)} (see {out}/output.txt)"
    metrics = read_json(out / "metrics.json")
    write_json(
        results / f"{job.name}.json",
        {
            "data": job.data,
            "method": job.method,
            "baseline": job.baseline,
            "seed": job.seed,
            "metrics": metrics,
            "training_seconds": round(training_seconds(out), 1),
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
    return ""


def training_seconds(out: Path) -> float:
    """The time that a run's steps took, from its log: also right if the run was resumed."""
    batch = read_json(out / "config.json")["run"]["batch"]
    seconds, done = 0.0, 0
    for text in (out / "log.jsonl").read_text().splitlines():
        line = json.loads(text)
        if "images_per_s" in line:
            seconds += (line["step"] - done) * batch / line["images_per_s"]
            done = line["step"]
    return seconds


def machine() -> str:
    """The processor's name and its number of cores."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = names[0].partition(":")[2].strip() if names else name
    return f"{name}, {os.cpu_count()} cores, one thread a run"


def run_all(jobs: list[Job], runs: Path, results: Path, at_a_time: int) -> None:
    """Do what is not done yet; raises BadInput with the runs that failed, after all the others."""
    waiting = [job for job in jobs if not is_done(job, results)]
    print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done", flush=True)
    with ThreadPoolExecutor(at_a_time) as pool:
        outcomes = pool.map(lambda job: run_job(job, runs, results), waiting)
        failures = [outcome for outcome in outcomes if outcome]
    if failures:
        raise BadInput("\n".join(failures))


# ------------------------------------------------------------------------------ tables


def interval(values: list[float]) -> tuple[float, float] | None:
    """Mean and half of the 95 % interval of the mean; None of fewer than two values.

    >>> interval([1.0, 3.0])  # mean 2, standard error 1
    (2.0, 12.706)
    """
    if len(values) < 2:
        return None
    t = T_975[min(len(values) - 2, len(T_975) - 1)]
    return statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5


def cell(values: list[float], signed: bool = False) -> str:
    """A mean with its interval; a signed one is a difference, bold if it excludes 0.

    >>> cell([2.0, 2.1, 2.2], signed=True), cell([1.0, -1.0], signed=True), cell([43.25])
    ('**+2.1 ± 0.2**', '+0.0 ± 12.7', '43.2')
    """
    sign = "+" if signed else ""
    found = interval(values)
    if found is None:
        return f"{statistics.mean(values):{sign}.1f}" if values else "-"
    mean, half = found
    text = f"{mean:{sign}.1f} ± {half:.1f}"
    return f"**{text}**" if signed and abs(mean) > half else text


def read_results(folder: Path) -> dict[tuple, dict]:
    """(data, method, baseline, seed) -> a run's JSON file.

    Raises BadInput if runs of one line differ in more than the seed: their mean is no experiment.
    """
    found: dict[tuple, dict] = {}
    first: dict[tuple, tuple] = {}
    for file in sorted(folder.glob("*.json")):
        run = read_json(file)
        line = (run["data"], run["method"], run["baseline"])
        settings = {**run["settings"], "run": {**run["settings"]["run"], "seed": 0}}
        other, theirs = first.setdefault(line, (file, settings))
        if settings != theirs:
            raise BadInput(f"{file}: other settings than {other}: run the older one again")
        found[*line, run["seed"]] = run
    return found


def tables(runs: dict[tuple, dict]) -> str:
    """One Markdown table for each data set."""
    lines = []
    for data, protocol in PROTOCOLS.items():
        rows = [row for method in PAPERS if (row := table_row(runs, data, method))]
        if rows:
            title = "| | seeds | AP | its baseline's AP | "
            gains = " | ".join(f"difference in {key}" for key in KEYS)
            lines += [f"## {protocol.title}", "", f"{title}{gains} | minutes a run |"]
            lines += ["|---" * (5 + len(KEYS)) + "|", *rows, ""]
    versions = {f"torch {run['versions']['torch']}; {run['machine']}" for run in runs.values()}
    return "\n".join([*lines, *(f"Measured with {v}." for v in sorted(versions)), ""])


def table_row(runs: dict[tuple, dict], data: str, method: str) -> str:
    """A pair's line, from the seeds that both have; "" if there is none."""
    seeds = [s for d, m, baseline, s in runs if (d, m, baseline) == (data, method, False)]
    pairs = [
        (runs[data, method, False, seed], runs[data, method, True, seed])
        for seed in sorted(seeds)
        if (data, method, True, seed) in runs
    ]
    if not pairs:
        return ""
    aps = [[100 * run["metrics"]["AP"] for run in side] for side in zip(*pairs)]
    gains = [
        [100 * (own["metrics"][key] - base["metrics"][key]) for own, base in pairs] for key in KEYS
    ]
    minutes = [statistics.mean(r["training_seconds"] / 60 for r in side) for side in zip(*pairs)]
    cells = [f"`{method}.py`", str(len(pairs)), *map(cell, aps)]
    cells += [cell(values, signed=True) for values in gains]
    return f"| {' | '.join([*cells, f'{minutes[0]:.1f}, {minutes[1]:.1f}'])} |"


# ------------------------------------------------------------------------------ command line


@dataclass
class CompareOptions:
    method: Annotated[Literal[("", *PAPERS)], tyro.conf.Positional] = ""  # the method to compare
    all: bool = False  # compare all five
    table: bool = False  # write the tables, after the runs if some are asked for
    data: Literal[tuple(PROTOCOLS)] = "synthetic"  # what to train and test on
    root: str = ""  # folder that holds bccd/ and fod/ (default: the environment's DETECTION_DATA)
    seeds: tuple[int, ...] = ()  # (default: 0, 1, ..., as many as the protocol has)
    jobs: int = 1  # runs at a time, one thread each
    results: str = "docs/results"  # folder of the JSON files and tables
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
            run_all(jobs, Path(options.out), results, options.jobs)
        if options.table:
            text = tables(read_results(results))
            (results / "tables.md").write_text(text)
            print(f"{text}\nresults: {results}/tables.md")


if __name__ == "__main__":
    main()
