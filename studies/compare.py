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
import re
import statistics
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

ROOT = Path(__file__).resolve().parent.parent
KEYS = ("AP", "AP50", "AP75", "AP90")
# What the papers gain in AP on COCO, of the same pair.
PRINTED_GAINS = {
    "d2det": "+4.7 (Table 2)",
    "double_head": "+3.5 (Table 4)",
    "cpm_rcnn": "+1.4 (Table 1)",
    "iou_aware_retinanet": "+1.2 (Table 1)",
    "dc_loss_clnms": "+1.6 (Table 2)",
}
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


def agree(some: dict, others: dict) -> bool:
    """Whether two runs' settings have the same values, where both have them at all.

    A setting that came into being after a run was measured does not make it another run.

    >>> agree({"run": {"lr": 0.1}}, {"run": {"lr": 0.1, "newer": 1}}), agree({"a": 1}, {"a": 2})
    (True, False)
    """
    return all(
        agree(some[k], others[k]) if isinstance(some[k], dict) else some[k] == others[k]
        for k in some.keys() & others.keys()
    )


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


def cell(values: list[float]) -> str:
    """A mean with its interval.

    >>> cell([2.0, 2.1, 2.2]), cell([43.25])
    ('2.1 ± 0.2', '43.2')
    """
    found = interval(values)
    if found is None:
        return f"{statistics.mean(values):.1f}" if values else "-"
    return f"{found[0]:.1f} ± {found[1]:.1f}"


def difference(values: list[float], tenths: list[float]) -> str:
    """The mean difference, its interval over seeds and that over tenths of the test images.

    Bold if it exceeds both.

    >>> difference([2.0, 2.1, 2.2], [1.0, 3.0] * 5)
    '**+2.1 ± 0.2, 0.8**'
    >>> difference([1.0, -1.0], [0.0] * 10), difference([1.0], [0.5] * 10)
    ('+0.0 ± 12.7, 0.0', '+1.0 ± ?, 0.0')
    """
    mean = statistics.mean(values)
    over_images = interval(tenths)[1]
    over_seeds = interval(values)
    if over_seeds is None:
        return f"{mean:+.1f} ± ?, {over_images:.1f}"
    text = f"{mean:+.1f} ± {over_seeds[1]:.1f}, {over_images:.1f}"
    return f"**{text}**" if abs(mean) > max(over_seeds[1], over_images) else text


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
        if not agree(settings, theirs):
            raise BadInput(f"{file}: other settings than {other}: run the older one again")
        found[*line, run["seed"]] = run
    return found


def tables(runs: dict[tuple, dict]) -> dict[str, str]:
    """Markdown tables by name: `summary`, and `gains` and `alignment` for each data set."""
    pairs = {
        data: {method: pairs_of(runs, data, method) for method in PAPERS} for data in PROTOCOLS
    }
    measured = [data for data in PROTOCOLS if any(pairs[data].values())]
    titles = [f"{data}: AP | AP90" for data in measured]
    lines = [f"| | the paper's AP | {' | '.join(titles)} |", "|---" * (2 + 2 * len(titles)) + "|"]
    for method, printed in PRINTED_GAINS.items():
        cells = [f"`{method}.py`", printed]
        for data in measured:
            cells += gains(pairs[data][method], ("AP", "AP90"))
        lines.append(f"| {' | '.join(cells)} |")
    found = {"summary": "\n".join(lines)}
    for data in PROTOCOLS:
        if data not in measured:
            found |= {f"gains-{data}": "Not run.", f"alignment-{data}": "Not run."}
            continue
        keys = " | ".join(f"difference in {key}" for key in KEYS)
        lines = [f"| | seeds | AP | its baseline's AP | {keys} |", "|---" * (4 + len(KEYS)) + "|"]
        for method, both in pairs[data].items():
            aps = [cell([100 * run["metrics"]["AP"] for run in side]) for side in zip(*both)]
            cells = [f"`{method}.py`", str(len(both)), *(aps or ["not run"] * 2)]
            lines.append(f"| {' | '.join([*cells, *gains(both, KEYS)])} |")
        found[f"gains-{data}"] = "\n".join(lines)
        titles = "oracle's AP | what the score costs | correlation, matched | all"
        lines = [f"| method, baseline | {titles} |", "|---" * 5 + "|"]
        lines += [alignment_row(method, both) for method, both in pairs[data].items() if both]
        found[f"alignment-{data}"] = "\n".join(lines)
    versions = {f"torch {run['versions']['torch']}; {run['machine']}" for run in runs.values()}
    found["machines"] = "\n".join(f"Measured with {v}." for v in sorted(versions))
    return found


def fill(page: Path, found: dict[str, str]) -> None:
    """Put each table between its marks, `<!-- table NAME -->` and `<!-- end -->`, into a page."""
    text = page.read_text()
    for name, table in found.items():
        marks = re.compile(f"(<!-- table {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = marks.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    page.write_text(text)


def pairs_of(runs: dict[tuple, dict], data: str, method: str) -> list[tuple[dict, dict]]:
    """(the method's run, its baseline's) of every seed that both have."""
    seeds = sorted(s for d, m, baseline, s in runs if (d, m, baseline) == (data, method, False))
    return [
        (runs[data, method, False, seed], runs[data, method, True, seed])
        for seed in seeds
        if (data, method, True, seed) in runs
    ]


def gains(pairs: list[tuple[dict, dict]], keys) -> list[str]:
    """What the method has more than its baseline, in percent; "not run" without a pair."""
    if not pairs:
        return ["not run"] * len(keys)
    cells = []
    for key in keys:
        by_seed = [100 * (own["metrics"][key] - base["metrics"][key]) for own, base in pairs]
        by_tenth = [
            statistics.mean(
                100 * (own["tenths"][i][key] - base["tenths"][i][key]) for own, base in pairs
            )
            for i in range(10)
        ]
        cells.append(difference(by_seed, by_tenth))
    return cells


def alignment_row(method: str, pairs: list[tuple[dict, dict]]) -> str:
    """The oracle's AP, what the ranking lacks to it, and the correlations: method, baseline."""
    cells = [f"`{method}.py`"]
    for key in ("oracle", "cost", "matched", "all"):
        factor, digits = (100, 1) if key in ("oracle", "cost") else (1, 2)
        means = [statistics.mean(run["alignment"][key] for run in side) for side in zip(*pairs)]
        cells.append(", ".join(f"{factor * mean:.{digits}f}" for mean in means))
    return f"| {' | '.join(cells)} |"


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
