"""What a method sees in one image: a page of its own tensors, for its best detections.

    python -m studies.explain d2det photo.jpg --weights CKPT
    python -m studies.explain dc_loss_clnms 3 --weights CKPT --data DIR --detection 2

The image is a file, or a number: that image of the validation data, whose objects are then drawn
too (in white). A page has a row for each detection; each column shows a step of the method, named
above it (studies/inside_*_stage.py make them). What the detector computes is not computed again for
the page: its modules and methods are listened to, by name, while it runs. Writes
OUT/explain_METHOD_IMAGE.png and, with the numbers that are drawn, .json.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common import BadInput, Resized, aligned_iou
from engine.checkpoints import write_json
from engine.data import to_device
from engine.pictures import new_figure
from engine.predict import Files
from engine.processes import rank_and_world, say
from studies import checkpoint
from studies import inside_one_stage as one_stage
from studies import inside_two_stage as two_stage
from studies.checkpoint import PAPERS, open_study, read_options, reported
from studies.seen import ENTERING, FOUND, TRUTH, Seen, look, outline, show

NOTHING = lambda model: []  # noqa: E731  # to listen to: all is in what outputs and select give
METHODS = {  # names to listen to, of a model; columns, of what was seen and a detection
    "d2det": (two_stage.d2det_record, two_stage.d2det_panels),
    "double_head": (two_stage.double_head_record, two_stage.double_head_panels),
    "cpm_rcnn": (two_stage.cpm_record, two_stage.cpm_panels),
    "iou_aware_retinanet": (NOTHING, one_stage.iou_aware_panels),
    "dc_loss_clnms": (NOTHING, one_stage.dc_panels),
}


@dataclass
class Options(checkpoint.Options):
    image: Annotated[str, tyro.conf.Positional] = tyro.MISSING  # a file, or a number
    detection: int = 0  # only the N-th best detection, counted from 1; 0: the best three


def draw_page(seen: Seen, picks: list[int], panels, path: Path) -> list[dict]:
    """A row for each detection: the image, then `panels(seen, pick)`. Returns what is drawn."""
    from matplotlib.lines import Line2D

    rows, numbers = [], []
    for pick in picks:
        box, truth = seen.detections["boxes"][pick], seen.truth(pick)
        label, score = (seen.detections[k][pick].item() for k in ("labels", "scores"))
        seen.numbers = dict(box=box.tolist(), label=seen.names[label], score=score)
        title = f"{pick + 1}. {seen.names[label]} {score:.2f}"
        if truth is not None:
            seen.numbers["iou"] = aligned_iou(box[None], truth[None]).item()
            title += f", IoU {seen.numbers['iou']:.2f}"

        def whole(axis, box=box, truth=truth):
            show(axis, seen)
            outline(axis, truth, TRUTH)
            outline(axis, box, FOUND)

        rows.append([(title, whole), *panels(seen, pick)])
        numbers.append(seen.numbers)
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
    meaning |= {ENTERING: "the box that it is made of"} if hasattr(seen.model, "rpn") else {}
    meaning |= {TRUTH: "the object"} if len(seen.target["boxes"]) else {}
    lines = [Line2D([], [], color=colour, lw=3) for colour in meaning]
    legend = dict(loc="outside lower center", ncols=len(lines), facecolor="0.7", framealpha=1)
    figure.legend(lines, meaning.values(), **legend)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    return numbers


def main(argv=None) -> list[dict]:
    with reported():
        options, flags = read_options("explain", Options, __doc__, argv)
        if options.method not in PAPERS:
            raise BadInput(f"{options.method}: a page shows what one of {', '.join(PAPERS)} adds")
        study = open_study(options, flags)
        data, name = study.data, Path(options.image).stem
        if options.image.isdecimal():
            index = int(options.image)
            if index >= len(data):
                raise BadInput(f"{options.image}: the validation data have {len(data)} images")
        else:
            data, index = Files([options.image], data.categories), 0
        config = dataclasses.replace(study.config, test_scales=study.config.test_scales[:1])
        (image,), (target,) = to_device([Resized(data, config, False)[index]], study.device)
        record, panels = METHODS[options.method]
        names = [c["name"] for c in study.data.categories]
        try:
            seen = look(study.model, config, image, target, names, record(study.model))
            count = len(seen.detections["boxes"])
            if options.detection < 0 or options.detection > count:
                raise BadInput(f"--detection {options.detection}: there are {count}")
        except BadInput as e:
            raise BadInput(f"{options.image}: {e}") from e
        picks = [options.detection - 1] if options.detection else [*range(min(3, count))]
        if rank_and_world()[0] == 0:
            study.out.mkdir(parents=True, exist_ok=True)
            path = study.out / f"explain_{options.method}_{name}"
            numbers = draw_page(seen, picks, panels, path.with_suffix(".png"))
            write_json(path.with_suffix(".json"), numbers)
            say(f"results: {path}.png, .json")
            return numbers
        return []


if __name__ == "__main__":
    main()
