"""What a method sees in one image: a page of its own tensors, for its best detections.

    python -m studies.explain d2det photo.jpg --weights CKPT
    python -m studies.explain dc_loss_clnms 3 --weights CKPT --data DIR --detection 2

The image is a file, or a number: that image of the validation data, whose objects are then drawn
too, in white. A page has one row a detection; each column shows a step of the method
(studies/inside_*_stage.py). Writes OUT/explain_METHOD_IMAGE.png, and its numbers as .json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import BadInput, aligned_iou
from engine.checkpoints import write_json
from engine.loader import to_device
from engine.pictures import new_figure
from engine.predict import Files
from engine.processes import print_once, rank_and_world
from studies import checkpoint
from studies import inside_one_stage as one_stage
from studies import inside_two_stage as two_stage
from studies.checkpoint import network_images, open_study, read_options, reported
from studies.seen import ENTERING, FOUND, TRUTH, Seen, look

PANELS = {  # what was seen of a detection -> the columns of its row
    "d2det": two_stage.d2det_panels,
    "double_head": two_stage.double_head_panels,
    "cpm_rcnn": two_stage.cpm_panels,
    "iou_aware_retinanet": one_stage.iou_aware_panels,
    "dc_loss_clnms": one_stage.dc_panels,
}


@dataclass
class Options(checkpoint.Options):
    method: Annotated[Literal[tuple(PANELS)], tyro.conf.Positional]  # whose checkpoint
    image: Annotated[str, tyro.conf.Positional] = tyro.MISSING  # a file, or a number
    detection: int = 0  # only the N-th best detection, counted from 1; 0: the best three


def draw_page(picks: dict[int, Seen], names: list[str], panels, path: Path) -> list[dict]:
    """One row a detection: the image, then its `panels`. Returns the numbers drawn.

    picks: place among the detections -> what was seen; names: of the labels.
    """
    from matplotlib.lines import Line2D

    rows = []
    for place, seen in picks.items():
        name = names[seen.label]
        seen.numbers = dict(box=seen.box.tolist(), label=name, score=seen.score)
        title = f"{place}. {name} {seen.score:.2f}"
        if seen.truth is not None:
            seen.numbers["iou"] = aligned_iou(seen.box, seen.truth).item()
            title += f", IoU {seen.numbers['iou']:.2f}"

        def whole(axis, seen=seen):
            seen.show(axis)
            seen.outlines(axis)

        rows.append([(title, whole), *panels(seen)])
    columns = max(map(len, rows))
    figure, axes = new_figure(3.1 * columns, 3.3 * len(rows) + 0.4, len(rows), columns)
    figure.set_layout_engine("constrained")
    for row, drawings in zip(axes, rows):
        for axis in row[len(drawings) :]:
            axis.axis("off")
        for axis, (title, draw) in zip(row, drawings):
            draw(axis)
            axis.set_title(title, fontsize=10)
    meaning = {FOUND: "the box found"}
    if hasattr(seen.model, "rpn"):
        meaning[ENTERING] = "the box that it is made from"
    if len(seen.target["boxes"]):
        meaning[TRUTH] = "the object"
    lines = [Line2D([], [], color=colour, lw=3) for colour in meaning]
    below = dict(loc="outside lower center", ncols=len(lines), facecolor="0.7", framealpha=1)
    figure.legend(lines, meaning.values(), **below)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    return [seen.numbers for seen in picks.values()]


def main(argv=None) -> list[dict]:
    with reported():
        options, flags = read_options("explain", Options, __doc__, argv)
        study = open_study(options, flags)
        data, index = study.data, 0
        if options.image.isdecimal():
            index = int(options.image)
            if index >= len(data):
                raise BadInput(f"{options.image}: the validation data have {len(data)} images")
        else:
            data = Files([options.image], data.categories)
        if rank_and_world()[0]:
            return []  # the first process draws
        (image,), (target,) = to_device(network_images(study, data)[index], study.device)
        try:
            found = look(study.model, study.settings.test, image, target)
            if not 0 <= options.detection <= len(found):
                raise BadInput(f"--detection {options.detection}: there are {len(found)}")
        except BadInput as e:
            raise BadInput(f"{options.image}: {e}") from e
        picks = dict(enumerate(found[:3], 1))
        if options.detection:
            picks = {options.detection: found[options.detection - 1]}
        study.out.mkdir(parents=True, exist_ok=True)
        path = study.out / f"explain_{options.method}_{Path(options.image).stem}"
        names = [c["name"] for c in study.categories]
        numbers = draw_page(picks, names, PANELS[options.method], path.with_suffix(".png"))
        write_json(path.with_suffix(".json"), numbers)
        print_once(f"results: {path}.png, .json")
        return numbers


if __name__ == "__main__":
    main()
