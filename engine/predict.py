"""Images without ground truth: `load(...).detect(...)` in Python, `predict_files` for --predict.

Photos are turned upright as their EXIF data say, which training and evaluation do not do.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common import BadInput, check_image, make_target, read_image, rgb_tensor
from engine.checkpoints import (
    find_script,
    load_checkpoint,
    load_weights,
    set_aside,
    write_json,
)
from engine.data import broken_images, refuse_images
from engine.detector import paste_mask
from engine.metrics import detect, to_coco
from engine.pictures import draw
from engine.processes import find_device, gather, rank_and_world, say
from engine.settings import Config, saved_settings, untrained
from formats import decode_mask

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm")


def to_image(source) -> Tensor:
    """uint8 [3, h, w] of a file, a PIL image, an array [h, w, 3] (RGB, uint8), or of itself.

    Only a file is turned upright: what is in memory already is as its owner wants it.
    """
    if isinstance(source, (str, Path)):
        return read_image(source, upright=True)
    if isinstance(source, Image.Image):
        try:
            return rgb_tensor(source)
        except Exception as e:  # decoded only now: a decoder may raise anything
            raise BadInput(f"cannot read the image: {e}") from e
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3:
            raise BadInput(f"arrays are [h, w, 3], RGB; this one is {list(source.shape)}")
        source = torch.from_numpy(np.array(source)).permute(2, 0, 1)
    check_image(source)
    return source.cpu()


class Images(Dataset):
    """A list of what `to_image` takes, as a data set without objects; image_id: the place in it."""

    def __init__(self, images: list):
        self.images = images
        self.sizes = np.ones((len(images), 2))  # unknown: detected in the order given

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = to_image(self.images[index])
        empty = torch.zeros(0, 4), [], []
        return image, make_target(*empty, index, tuple(image.shape[1:]))


class Files(Images):
    """Files and folders (searched through, in order of name). Unreadable files are left out, aloud;

    BadInput where nothing is left.
    """

    def __init__(self, paths, categories: list[dict]):
        files, self.categories = [], categories
        for path in map(Path, paths):
            if path.is_dir():
                inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_ENDINGS)
                if not inside:
                    raise BadInput(f"{path}: no image in this folder ({' '.join(IMAGE_ENDINGS)})")
                files += inside
            else:
                files.append(path)
        broken = {i: why for share in gather(broken_images(files)) for i, why in share.items()}
        if len(broken) == len(files):
            refuse_images(broken)
        for i in sorted(broken):
            say(f"skipped: {broken[i]}")
        self.files = [file for i, file in enumerate(files) if i not in broken]
        super().__init__(self.files)


def predict_files(model, paths, categories: list[dict], config: Config, device, out: Path) -> list:
    """Detect in files and folders; draws OUT/pictures/* and writes OUT/predictions.json.

    Returns the COCO results, in pixels of the upright image; each also names its file and category.
    """
    data = Files(paths, categories)
    names = [c["name"] for c in categories]
    set_aside(out, "pictures")
    gather(None)  # the first process has done it
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    results = []
    for target, found in detect(model, data, config, device):
        file = data.files[target["image_id"]]
        mine = to_coco(target["image_id"], found, categories, target["size"])
        called = (names[label] for label in found["labels"].tolist())
        results += [{**r, "category": n, "file_name": str(file)} for r, n in zip(mine, called)]
        sure = found["scores"] >= config.draw_score
        boxes, labels, scores = (found[k][sure] for k in ("boxes", "labels", "scores"))
        segmentations = (r["segmentation"] for r, s in zip(mine, sure) if s)
        masks = map(decode_mask, segmentations) if "masks" in found else None
        picture = draw(to_image(file), boxes, labels.tolist(), names, scores.tolist(), masks)
        name = f"{target['image_id']:05d}_{file.stem}.jpg"  # files of one name may meet
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(out / "pictures" / name, quality=92)
    results = [r for share in gather(results) for r in share]
    if rank_and_world()[0] == 0:
        write_json(out / "predictions.json", sorted(results, key=lambda r: r["image_id"]))
    return results


class Detections(NamedTuple):
    """What is seen in one image, best first, on the CPU."""

    boxes: Tensor  # [D, 4] xyxy in pixels of the image as it was given
    scores: Tensor  # [D]
    labels: Tensor  # [D], places in `categories`
    names: list[str]  # the labels' names


class MaskDetections(Detections):
    """The same four, and beside them the objects' masks."""

    masks: Tensor  # bool [D, h, w] of the image's size
    mask_scores: Tensor  # [D], by which masks are ranked: higher the better they are


class LoadedDetector:
    """A trained detector, ready to use: `model` in eval mode, `config`, `categories`, `device`."""

    def __init__(self, model, config: Config, categories: list[dict], device: torch.device):
        self.model, self.config, self.categories = model.to(device).eval(), config, categories
        self.device = device

    def detect(self, images) -> Detections | list[Detections]:
        """Detections in an image, or in each image of a list, under the settings of its tests.

        `MaskDetections` where the detector makes masks.

        An image is a file's path (turned upright as its EXIF data say), a PIL image, a uint8 array
        [h, w, 3] or a uint8 tensor [3, h, w], all RGB and of any size. Scores start at the
        detector's score_threshold: what to believe is the caller's choice.
        """
        many = isinstance(images, (list, tuple))
        names, found = [c["name"] for c in self.categories], {}
        data = Images(list(images) if many else [images])
        for target, d in detect(self.model, data, self.config, self.device, shared=False):
            called = [names[label] for label in d["labels"].tolist()]
            seen = Detections(d["boxes"], d["scores"], d["labels"], called)
            if "masks" in d:
                masks = [paste_mask(*pair, target["size"]) for pair in zip(d["masks"], d["boxes"])]
                masks = torch.stack(masks) if masks else torch.zeros(0, *target["size"]).bool()
                seen = MaskDetections(*seen)
                seen.masks, seen.mask_scores = masks, d["mask_scores"]
            found[target["image_id"]] = seen
        return [found[i] for i in range(len(data))] if many else found[0]


def load(path: str | Path, device: str = "auto", method=None, **changes) -> LoadedDetector:
    """The detector in a checkpoint: `load("runs/d2det/last.pt").detect("photo.jpg")`.

    A checkpoint names the script that made it, which is imported here by that name. Older ones do
    not: give it as `method`, "d2det" or the module. `changes` are settings to test under, such as
    score_threshold=0.3 or test_scales=(600,). No weights are downloaded. Raises BadInput.
    """
    state, where = load_checkpoint(path), find_device(device)
    script = find_script(state, path, method)
    config = script.Config(**saved_settings(script.Config, state))
    # In this process: images are at hand, and other processes would cost more than they read.
    own = dict(weights=str(path), device=str(where), workers=0)
    unknown = changes.keys() - vars(config).keys()
    if unknown:
        raise BadInput(f"{path}: {', '.join(sorted(unknown))}: no such setting")
    config = dataclasses.replace(untrained(config), **{**own, **changes})
    model = script.Detector(config, len(state["categories"]))
    load_weights(model, state, path)
    return LoadedDetector(model, config, state["categories"], where)
