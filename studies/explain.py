"""What does a method see in one image? A page of its own tensors, for its best detections.

    python -m studies.explain d2det photo.jpg --weights CKPT
    python -m studies.explain dc_loss_clnms 3 --weights CKPT --data DIR --detection 2

The image is a file, or the number of a validation image, whose objects are then drawn in
white. A page has a row for each detection; each column shows a step of the method
(studies/inside_*_stage.py). Writes OUT/explain_METHOD_IMAGE.png and, as .json, its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from common import BadInput, aligned_iou
from engine.loader import to_device
from engine.predict import Files
from engine.processes import rank_and_world
from studies import checkpoint
from studies import inside_one_stage as one_stage
from studies import inside_two_stage as two_stage
from studies.checkpoint import network_images, open_study, read_options, reported
from studies.seen import ENTERING, FOUND, TRUTH, Seen, look

DRAW = {  # each draws what it saw of a detection
    "d2det": two_stage.draw_d2det,
    "double_head": two_stage.draw_double_head,
    "cpm_rcnn": two_stage.draw_cpm,
    "iou_aware_retinanet": one_stage.draw_iou_aware,
    "dc_loss_clnms": one_stage.draw_dc,
}
COLUMNS = 12  # choice: room for more columns than any method draws


@dataclass
class Options(checkpoint.Options):
    method: Annotated[Literal[tuple(DRAW)], tyro.conf.Positional]  # whose checkpoint
    image: Annotated[str, tyro.conf.Positional] = tyro.MISSING  # a file, or a number
    detection: int = 0  # only the N-th best detection, counted from 1; 0: the best three


def draw_page(picks: dict[int, Seen], names: list[str], draw, path: Path) -> list[dict]:
    """A row for each detection: the image, then what `draw` adds. Returns the numbers drawn.

    picks: place among the detections -> what was seen; names: of the labels.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure((3.1 * COLUMNS, 3.3 * len(picks) + 0.4), layout="constrained")
    grid = figure.add_gridspec(len(picks), COLUMNS)
    for row, (place, seen) in enumerate(picks.items()):
        seen.axes = (figure.add_subplot(grid[row, column]) for column in range(COLUMNS))
        name = names[seen.label]
        seen.numbers = dict(box=seen.box.tolist(), label=name, score=seen.score)
        title = f"{place}. {name} {seen.score:.2f}"
        if seen.truth is not None:
            seen.numbers["iou"] = aligned_iou(seen.box, seen.truth).item()
            title += f", IoU {seen.numbers['iou']:.2f}"
        seen.outlines(seen.photo(title))
        draw(seen)
    meaning = {FOUND: "the box found"}
    if hasattr(seen.model, "rpn"):
        meaning[ENTERING] = "the box that it is made from"
    if len(seen.target["boxes"]):
        meaning[TRUTH] = "the object"
    lines = [Line2D([], [], color=colour, lw=3) for colour in meaning]
    below = dict(loc="outside lower left", ncols=len(lines), facecolor="0.7", framealpha=1)
    figure.legend(lines, meaning.values(), **below)
    figure.savefig(path, dpi=100, bbox_inches="tight")  # cuts off the columns without axes
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
        path = study.out / f"explain_{options.method}_{Path(options.image).stem}"
        names = [c["name"] for c in study.categories]
        numbers = draw_page(picks, names, DRAW[options.method], path.with_suffix(".png"))
        checkpoint.write_results(path.with_suffix(".json"), numbers)
        return numbers


if __name__ == "__main__":
    main()
