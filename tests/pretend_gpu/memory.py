"""Count a detector's memory at the paper's size: `run.py memory.py BATCH METHOD [WEIGHTS]`.

    PRETEND_LIGHT=3000000 tests/pretend_gpu/run.py tests/pretend_gpu/memory.py 2 d2det

Printed is the most that torch's allocator held in a training step of BATCH images of 800 x 1333 px
with 130 objects each, ResNet-50, SGD with momentum, bf16, and in a prediction of one image. Beside
it a real GPU holds its context, cuDNN's and cuBLAS's workspaces, and blocks that the allocator
keeps: about 1 GiB.
"""

import importlib
import sys

import torch

from engine.processes import autocast
from engine.train import make_optimizer

OBJECTS, HEIGHT, WIDTH = 130, 800, 1333


def target(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(OBJECTS, 2, generator=generator) * torch.tensor([WIDTH - 100, HEIGHT - 100])
    side = 16 + 80 * torch.rand(OBJECTS, 2, generator=generator)
    labels = torch.randint(0, 80, (OBJECTS,), generator=generator)
    ignore = torch.zeros(OBJECTS, dtype=torch.bool)
    one = dict(boxes=torch.cat([corner, corner + side], 1), labels=labels, ignore=ignore)
    return {k: v.cuda() for k, v in one.items()} | dict(image_id=seed, size=(HEIGHT, WIDTH))


def main(batch: int, name: str, weights: str = "random") -> None:
    method = importlib.import_module(name)
    settings = method.Settings().replace(backbone_weights=weights)
    model = method.Detector(settings.model, 80).cuda()
    optimizer = make_optimizer(model, settings.run)
    images = [torch.zeros(3, HEIGHT, WIDTH, dtype=torch.uint8, device="cuda")] * batch
    targets = [target(i) for i in range(batch)]
    for _ in range(2):  # the momentum exists from the first step on
        torch.cuda.reset_peak_memory_stats()
        with autocast("bf16", torch.device("cuda")):
            losses = model.loss(images, targets)
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
    step = torch.cuda.max_memory_allocated() >> 20
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    with autocast("bf16", torch.device("cuda")):
        model.eval().predict(images[:1])
    predict = torch.cuda.max_memory_allocated() >> 20
    print(f"{name} {weights}: step of {batch} {step} MiB, prediction {predict} MiB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
