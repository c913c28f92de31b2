"""The tables of `studies.compare`: what each method gains over its baseline, and how sure that is.

They are made from the JSON files in docs/results alone, and put into pages between marks.
"""

from __future__ import annotations

import re
import statistics
from pathlib import Path

from common import BadInput
from data.files import read_json
from studies.checkpoint import PAPERS

DATA = ("synthetic", "bccd", "fod")
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
    pairs = {data: {method: pairs_of(runs, data, method) for method in PAPERS} for data in DATA}
    measured = [data for data in DATA if any(pairs[data].values())]
    titles = [f"{data}: AP | AP90" for data in measured]
    lines = [f"| | the paper's AP | {' | '.join(titles)} |", "|---" * (2 + 2 * len(titles)) + "|"]
    for method, printed in PRINTED_GAINS.items():
        cells = [f"`{method}.py`", printed]
        for data in measured:
            cells += gains(pairs[data][method], ("AP", "AP90"))
        lines.append(f"| {' | '.join(cells)} |")
    found = {"summary": "\n".join(lines)}
    for data in DATA:
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
