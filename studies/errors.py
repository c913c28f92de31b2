"""What keeps a detector's precision down? COCO's error analysis, as in D2Det's Figure 5.

    python -m studies.errors d2det --weights CKPT
    python -m studies.errors d2det --weights CKPT --data DIR --show all "super animal" cat

Seven precision-recall curves a class, each forgiving one more kind of error. The area between two
of them is what that kind of error costs:

    C75  the detector as it is, at IoU 0.75
    C50  at IoU 0.5: what slightly better boxes would gain
    Loc  at IoU 0.1: errors of place are forgiven, a second box on an object is not
    Sim  boxes on objects of another class of the same supercategory do not count either
    Oth  boxes on objects of any other class do not count either
    BG   boxes on background do not count either: 1 up to the highest recall that is reached
    FN   missed objects do not count either: 1 everywhere

Each number is the mean over 101 recalls, and for a supercategory, or all, the mean over classes.
OUT/errors.json has them for all, each supercategory and each class, by object size; OUT/errors.png
draws those that --show names, one row each. The rules are those of COCO's own MATLAB program: an
object of another class is ignored like one out of a size range, and excuses one box, not several.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import BadInput
from engine.checkpoints import write_json
from engine.metrics import coco_evaluation, complete_truth, detect, to_coco
from engine.pictures import new_figure
from engine.processes import gather, print_once, progress, rank_and_world
from studies.checkpoint import Options as CheckpointOptions
from studies.checkpoint import open_study, read_options, reported

KINDS = ("C75", "C50", "Loc", "Sim", "Oth", "BG", "FN")
AREAS = ("all", "small", "medium", "large")
# of the area that each kind adds, as in the original; black lines surround it
COLOURS = ("white", "white", "#4f82bd", "#bf4f4c", "#5ce661", "#8063a3", "#ff9900")


@dataclass
class Options(CheckpointOptions):
    show: tuple[str, ...] = ("all",)  # what to draw: all, "super NAME" for a supercategory, classes


def class_curves(truth: dict, results: list[dict], category: dict) -> np.ndarray:
    """Precision [7 KINDS, 101 recalls, 4 AREAS] of one class; 0 where it has no object (FN: 1)."""
    mine = [r for r in results if r["category_id"] == category["id"]]
    group = category.get("supercategory", category["name"])
    similar = {c["id"] for c in truth["categories"] if c.get("supercategory", c["name"]) == group}

    def precision(ious, classes: set) -> np.ndarray:
        """[ious, 101, 4], with objects of other `classes` ignored."""
        annotations = []
        for a in truth["annotations"]:
            own = a["category_id"] == category["id"]
            if own or a["category_id"] in classes:
                ignored = a.get("difficult", 0) or not own
                annotations.append({**a, "category_id": category["id"], "difficult": ignored})
        part = {**truth, "annotations": annotations, "categories": [category]}
        found = coco_evaluation(part, mine if annotations else [], ious=ious)
        return found.eval["precision"][:, :, 0, :, -1].clip(0)  # -1: no object

    everything = {c["id"] for c in truth["categories"]}
    curves = [*precision((0.75, 0.5, 0.1), set())]
    curves += [*precision((0.1,), similar), *precision((0.1,), everything)]
    background = (curves[-1] > 0).astype(float)
    return np.stack([*curves, background, np.ones_like(background)])


def error_curves(truth: dict, results: list[dict]) -> dict[str, np.ndarray]:
    """`class_curves` of each class by name, of "super NAME" of each supercategory, and of "all"."""
    truth, groups = complete_truth(truth), {}
    curves: dict[str, np.ndarray] = {}
    for category in progress(truth["categories"], "classes", len(truth["categories"])):
        curves[category["name"]] = found = class_curves(truth, results, category)
        if "supercategory" in category:
            groups.setdefault(f"super {category['supercategory']}", []).append(found)
    means = {name: np.mean(found, 0) for name, found in groups.items()}
    return {"all": np.mean(list(curves.values()), 0), **means, **curves}


def draw_errors(curves: dict[str, np.ndarray], path: Path) -> None:
    """One row a name, one column a size; each kind of error is the area that it adds."""
    figure, axes = new_figure(18, 4.2 * len(curves), len(curves), 4)
    recall = np.linspace(0, 1, 101)
    for row, (name, found) in zip(axes, curves.items()):
        for axis, area, values in zip(row, AREAS, np.moveaxis(found, -1, 0)):
            for kind, colour, precision in reversed([*zip(KINDS, COLOURS, values)]):
                label = f"{precision.mean():.3f} {kind}"
                axis.fill_between(recall, precision, color=colour, label=label)
                axis.plot(recall, precision, "k", lw=0.8)
            title = f"{name}, {area} sizes" if area == "all" else f"{name}, {area}"
            axis.set(title=title, xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
            handles, labels = axis.get_legend_handles_labels()
            legend = axis.legend(handles[::-1], labels[::-1], loc="lower left", fontsize=8)
            for patch in legend.get_patches():
                patch.set_edgecolor("black")
    figure.savefig(path, dpi=80)


def main(argv=None) -> dict:
    with reported():
        options, flags = read_options("errors", Options, __doc__, argv)
        if not options.show:
            raise BadInput("--show: what? all, or names of classes")
        study = open_study(options, flags)
        truth, results = study.data.coco(), []
        names = {"all", *(c["name"] for c in truth["categories"])}
        names |= {f"super {c.get('supercategory')}" for c in truth["categories"]} - {"super None"}
        for name in options.show:
            if name not in names:
                raise BadInput(f"--show {name}: there are {', '.join(sorted(names)[:20])} ...")
        for target, found in detect(study.model, study.data, study.settings):
            results += to_coco(target["image_id"], found, study.data.categories)
        results = [r for share in gather(results) for r in share]
        if rank_and_world()[0]:
            return {}
        curves = error_curves(truth, results)
        numbers = {
            name: {
                area: {kind: round(float(v), 4) for kind, v in zip(KINDS, means)}
                for area, means in zip(AREAS, found.mean(1).T)
            }
            for name, found in curves.items()
        }
        write_json(study.out / "errors.json", numbers)
        draw_errors({name: curves[name] for name in options.show}, study.out / "errors.png")
        for area, means in numbers["all"].items():
            print_once(f"{area:6}  " + "  ".join(f"{kind} {v:.3f}" for kind, v in means.items()))
        print_once(f"results: {study.out}/errors.json, .png")
        return numbers


if __name__ == "__main__":
    main()
