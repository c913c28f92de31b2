"""Images without ground truth: `load(...).detect(...)`, and `predict_files` for --predict.

Photos are turned upright by their EXIF data, which training and evaluation do not always
do.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import BadInput, check_image
from data.checks import broken_images, refuse_images
from data.contract import make_target
from data.files import IMAGE_ENDINGS, images_in
from data.images import FORMATS, MAX_PIXELS, read_image, rgb_tensor
from data.masks import decode_mask, paste_mask
from engine.checkpoints import find_script, load_checkpoint, load_weights, write_json
from engine.detector import build_detector
from engine.entries import check_size
from engine.folders import sole_writer
from engine.metrics import detect, to_coco
from engine.pictures import draw, drawing
from engine.processes import find_device, gather, print_once, progress, rank_and_world
from engine.settings import Settings


def to_image(source, max_pixels: int = MAX_PIXELS) -> Tensor:
    """uint8 [3, h, w] of a path, open file, PIL image, RGB array [h, w, 3] or tensor.

    Only files are turned upright: an image in memory is as its owner wants it.
    """
    if isinstance(source, (str, Path)):
        return read_image(source, upright=True, max_pixels=max_pixels)
    if isinstance(source, (Image.Image, io.IOBase)):
        try:
            if isinstance(source, io.IOBase):
                source = ImageOps.exif_transpose(Image.open(cast(Any, source), formats=FORMATS))
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
    """Images for `to_image`, as a data set without objects; image_id is the index."""

    def __init__(self, images: list, max_pixels: int = MAX_PIXELS):
        self.images, self.max_pixels = images, max_pixels
        self.sizes = np.ones((len(images), 2))  # unknown: detected in the order given

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        image = to_image(self.images[index], self.max_pixels)
        return image, make_target(torch.zeros(0, 4), [], [], index, tuple(image.shape[1:]))


def some_images_in(folder: Path) -> list[Path]:
    """All image files in a folder and below, sorted; BadInput without any."""
    inside = images_in(folder, below=True)
    if not inside:
        raise BadInput(f"{folder}: no image in this folder ({' '.join(IMAGE_ENDINGS)})")
    return inside


class Files(Images):
    """Image files, and all images in folders, in order of name.

    Skips unreadable files with a message; raises BadInput if none remains.
    """

    def __init__(self, paths, categories: list[dict], max_pixels: int = MAX_PIXELS):
        files: list[Path] = []
        for path in map(Path, paths):
            files += some_images_in(path) if path.is_dir() else [path]
        rank, world = rank_and_world()
        mine = range(rank, len(files), world)
        found = broken_images(files, indices=mine, progress=progress, max_pixels=max_pixels)
        broken = {i: why for share in gather(found) for i, why in share.items()}
        if len(broken) == len(files):
            refuse_images(broken)
        for i in sorted(broken):
            print_once(f"skipped: {broken[i]}")
        self.categories = categories
        self.files = [file for i, file in enumerate(files) if i not in broken]
        super().__init__(self.files, max_pixels)


def predict_files(
    model: nn.Module, paths, categories: list[dict], settings: Settings, out: Path
) -> list[dict]:
    """Detect in files and folders; write OUT/predictions.json and draw OUT/pictures/*.

    Return COCO results in pixels of the upright image, each with its file's and
    category's name.
    """
    data = Files(paths, categories, settings.data.max_pixels)
    with sole_writer(out, set_aside_if="pictures"):
        return _detect_in_files(model, data, settings, out)


def _detect_in_files(model, data: Files, settings: Settings, out: Path) -> list[dict]:
    names = [c["name"] for c in data.categories]
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    results, to_draw = [], []
    for target, found in detect(model, data, settings):
        file = data.files[target["image_id"]]
        mine = to_coco(target["image_id"], found, data.categories, target["size"])
        for result, label in zip(mine, found["labels"].tolist()):
            results.append({**result, "category": names[label], "file_name": str(file)})
        shown = found["scores"] >= settings.test.draw_score
        masks = None
        if "masks" in found:
            masks = [r["segmentation"] for r, drawn in zip(mine, shown) if drawn]
        boxes, labels, scores = (found[k][shown] for k in ("boxes", "labels", "scores"))
        to_draw.append((target["image_id"], file, boxes, labels, scores, masks))
    results = [r for share in gather(results) for r in share]
    if rank_and_world()[0] == 0:
        write_json(out / "predictions.json", sorted(results, key=lambda r: r["image_id"]))
    for image_id, file, boxes, labels, scores, masks in to_draw:
        path = out / "pictures" / f"{image_id:05d}_{file.stem}.jpg"  # stems repeat
        with drawing(path):
            image = to_image(file, data.max_pixels)
            bitmaps = None if masks is None else map(decode_mask, masks)
            picture = draw(image, boxes, labels.tolist(), names, scores.tolist(), bitmaps)
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path, quality=92)
    return results


@dataclass
class Detections:
    """What is seen in one image, best first, on the CPU.

    It unpacks to four: boxes, scores, labels, names = detector.detect(photo).
    """

    boxes: Tensor  # [D, 4] xyxy in pixels of the image as it was given
    scores: Tensor  # [D]
    labels: Tensor  # [D], places in `categories`
    names: list[str]  # the labels' names
    masks: Tensor | None = None  # bool [D, h, w], if the detector makes masks
    mask_scores: Tensor | None = None  # [D], by which masks are ranked, best highest

    def __iter__(self) -> Iterator:
        return iter((self.boxes, self.scores, self.labels, self.names))


class LoadedDetector:
    """A trained detector, ready to use: `model` in eval mode, `settings`, `categories`."""

    def __init__(self, model: nn.Module, settings: Settings, categories: list[dict]):
        self.model, self.settings, self.categories = model.eval(), settings, categories

    def detect(self, images, min_score: float | None = None) -> Detections | list[Detections]:
        """Detections in an image, or in each image of a list or folder, under `settings.test`.

        An image is a file's path or an open binary file (both turned upright by their
        EXIF data), a PIL image, a uint8 array [h, w, 3] or a uint8 tensor [3, h, w], all
        RGB and of any size. Detections whose final score is below `min_score` are left
        out.
        """
        many = isinstance(images, (list, tuple))
        if isinstance(images, (str, Path)) and Path(images).is_dir():
            images, many = some_images_in(Path(images)), True
        settings = self.settings
        if min_score is not None:
            settings = settings.replace(min_score=min_score)
        data = Images(list(images) if many else [images], settings.data.max_pixels)
        found: dict[int, Detections] = {}
        for target, detections in detect(self.model, data, settings, shared=False):
            found[target["image_id"]] = self._named(detections, target["size"])
        return [found[i] for i in range(len(data))] if many else found[0]

    def _named(self, found: dict[str, Tensor], size: tuple[int, int]) -> Detections:
        names = [self.categories[label]["name"] for label in found["labels"].tolist()]
        detections = Detections(found["boxes"], found["scores"], found["labels"], names)
        if "masks" in found:
            pairs = zip(found["masks"], found["boxes"])
            masks = [paste_mask(mask, box, size) for mask, box in pairs]
            detections.masks = torch.stack(masks) if masks else torch.zeros(0, *size).bool()
            detections.mask_scores = found["mask_scores"]
        return detections


def load(path: str | Path, device: str = "auto", method=None, **changes) -> LoadedDetector:
    """The detector in a checkpoint: `load("runs/d2det/last.pt").detect("photo.jpg")`.

    A checkpoint names the script that made it, which is imported here by that name. If it
    is an older one without the name, give `method`, "d2det" or the module. `changes` are
    settings to test under, such as score_threshold=0.3 or test_scales=(600,). No weights
    are downloaded. Raises BadInput.
    """
    state, where = load_checkpoint(path), find_device(device)
    script = find_script(state, path, method)
    # In this process: images are at hand, and other processes would cost more than they
    # read.
    settings = script.Settings.from_dict(state["settings"])
    settings = settings.replace(device=str(where), workers=0)
    try:
        settings = settings.replace(**changes)
    except BadInput as e:
        raise BadInput(f"{path}: {e}") from e
    settings = dataclasses.replace(settings, model=settings.model.without_download())
    check_size(script.Detector, settings.model, state, path)
    model = build_detector(script.Detector, settings.model, len(state["categories"]))
    load_weights(model, state, path)
    return LoadedDetector(model.to(where), settings, state["categories"])
