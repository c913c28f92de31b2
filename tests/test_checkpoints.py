"""Checkpoints that a disk has damaged or somebody has edited are refused by name."""

import copy
import functools
import random
import re

import pytest
import torch
from methods import build, settings_of
from PIL import Image
from test_cli import run

import d2det
import engine
import iou_aware_retinanet
from common import BadInput
from data import SyntheticDetection
from data.images import read_image
from engine.checkpoints import RunState, load_checkpoint, resume_or_start, save_checkpoint
from engine.entries import load_optimizer
from engine.train import make_optimizer

pytestmark = pytest.mark.usefixtures("unpainted")


RUN = ["--train", "--steps", 4, "--save-every", 2, "--num-val", 1, "--log-every", 5]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run that was killed after two steps, whose losses no line of the log has yet."""
    out = tmp_path_factory.mktemp("checkpoints") / "r"
    take_step, steps = engine.train.__globals__["take_step"], []

    def killed(*args):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return take_step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(engine.train.__globals__, "take_step", killed)
        run(*RUN, "--out", out)
    return out


def test_flipped_bits_are_noticed(small, tmp_path):
    whole, chance = (small / "last.pt").read_bytes(), random.Random(0)
    good = load_checkpoint(small / "last.pt")
    noticed = 0
    for _ in range(60):
        damaged, at = bytearray(whole), chance.randrange(8 * len(whole))
        damaged[at // 8] ^= 1 << at % 8
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            state = load_checkpoint(tmp_path / "x.pt")
            assert all(torch.equal(v, good["model"][k]) for k, v in state["model"].items()), at
        except BadInput as e:
            noticed += str(e).startswith(f"{tmp_path / 'x.pt'}: the file is damaged: ")
    assert noticed > 30  # bits of the padding between two tensors matter to nobody


# ------------------------------------------------------------------------------ edited entries


def change(state: dict, place: str, value) -> None:
    *path, last = (int(key) if key.isdigit() else key for key in place.split("."))
    entry = functools.reduce(lambda inner, key: inner[key], path, state)
    if value is KeyError:
        del entry[last]
    else:
        entry[last] = value


FIRST = "backbone.stem.0.weight"
USED = {  # by all that reads a checkpoint: entry -> values, and a word of the refusal
    "model": ([], None, "x", {}, {1: torch.ones(1)}, {FIRST: "x"}, KeyError),
    "categories": ([], None, {}, "x", [1], [{"id": 1}], [{"id": [], "name": "a"}], KeyError),
    "settings": ([], None, "x", 3, {1: 2}, {"model": 3, "test": {}}, {"model": {"norm": {}}}),
    "method": (3, None, ["d2det"]),
    "data": (3, None, []),
}
RESUMED = {  # by resuming alone
    "step": (KeyError, None, "2", -1, 2.0, True, 2**70, torch.ones(1)),
    "rng": (KeyError, None, [], 3, [None], [[]], [[torch.ones(9)]], [[torch.zeros(5, 5)]], "x"),
    "optimizer": (KeyError, None, [], {}, "x", {"state": 3}, {"state": {"a": {}}}),
    "optimizer.state.0": (None, {}, {"exp_avg": torch.ones(1)}),
    "optimizer.state.999": ({},),
    "window": ("x", 3, [1], {}, torch.ones(3), [torch.ones(3).to_sparse()]),
}


@pytest.mark.parametrize("place", USED)
def test_edited_entries_are_refused_by_name(small, tmp_path, place, capsys):
    for value in USED[place]:
        state = load_checkpoint(small / "last.pt")
        change(state, place, value)
        save_checkpoint(tmp_path / "last.pt", state)
        with pytest.raises(BadInput, match=f"last.pt: .*{place[:7]}"):
            engine.load(tmp_path / "last.pt")
    with pytest.raises(SystemExit) as end:
        run(*RUN, "--resume", "--out", tmp_path)
    assert end.value.code == 2 and place[:7] in capsys.readouterr().err


@pytest.mark.parametrize("place", RESUMED)
def test_edited_entries_of_a_run_are_refused_on_resuming(small, tmp_path, place):
    good = load_checkpoint(small / "last.pt")
    settings = d2det.Settings.from_dict(good["settings"])

    def resume() -> RunState:
        run = RunState(settings, good["categories"], good["data"])
        model = d2det.Detector(settings.model, len(good["categories"]))
        resume_or_start(tmp_path, True, model, make_optimizer(model, settings.run), run)
        return run

    for value in RESUMED[place]:
        state = load_checkpoint(small / "last.pt")
        change(state, place, value)
        save_checkpoint(tmp_path / "last.pt", state)
        with pytest.raises(BadInput, match=f"last.pt: cannot resume.* {place.partition('.')[0]}"):
            resume()
        engine.load(tmp_path / "last.pt")  # needs none of it
    save_checkpoint(tmp_path / "last.pt", good)
    run = resume()
    assert run.step == 2 and torch.equal(torch.stack(run.window), good["window"])


@pytest.mark.parametrize("flat", [{"momentum": 0.9}, {"momentum": 0.0}, {"optimizer": "adamw"}])
def test_every_optimiser_goes_on_where_it_was(flat):
    def made():
        torch.manual_seed(0)
        layer = torch.nn.Linear(2, 1)
        return layer, make_optimizer(layer, engine.Settings().replace(**flat).run)

    def step(layer, optimizer):
        optimizer.zero_grad()
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    layer, optimizer = made()
    step(layer, optimizer)
    other, resumed = made()
    other.load_state_dict(layer.state_dict())
    load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()), "last.pt")
    for pair in ((layer, optimizer), (other, resumed)):
        step(*pair)
    assert torch.equal(layer.weight, other.weight)
    if flat != {"momentum": 0.0}:
        wrong = optimizer.state_dict()
        wrong["state"][0] = {k: torch.ones(7) for k in wrong["state"][0]}
        with pytest.raises(BadInput, match="state 0 does not fit its weight of"):
            load_optimizer(resumed, wrong, "last.pt")


def test_losses_of_another_detector_are_refused(small, tmp_path, capsys):
    state = {**load_checkpoint(small / "last.pt"), "window": torch.ones(2, 99)}
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(SystemExit):
        run(*RUN, "--resume", "--out", tmp_path)
    assert "error: last.pt: its window has [99] losses a step, here are" in capsys.readouterr().err


ODD_TENSORS = {
    "meta": lambda t: torch.empty_like(t, device="meta"),
    "sparse": lambda t: t.to_sparse(),
    "expanded": lambda t: torch.ones(1).expand(10**12),
    "complex": lambda t: t.to(torch.complex64),
    "other shape": lambda t: t[:1],
    "not finite": lambda t: t / 0,
}


@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_odd_tensors_are_refused_by_name(small, tmp_path, kind):
    state = load_checkpoint(small / "last.pt")
    state["model"][FIRST] = ODD_TENSORS[kind](state["model"][FIRST])
    if kind == "meta":
        state["model"] = {FIRST: state["model"][FIRST]}
    save_checkpoint(tmp_path / "x.pt", state)
    with pytest.raises(BadInput, match=re.escape(FIRST)):
        engine.load(tmp_path / "x.pt")


@pytest.mark.parametrize("name, value", [("num_convs", 10**6), ("fpn_channels", 2**30)])
def test_settings_cannot_ask_for_more_than_there_are_weights(small, tmp_path, name, value, capsys):
    state = load_checkpoint(small / "last.pt")
    state["settings"]["model"][name] = value
    save_checkpoint(tmp_path / "last.pt", state)
    with pytest.raises(BadInput, match="last.pt: (its settings|does not fit)"):
        engine.load(tmp_path / "last.pt")
    for flags in (["--eval"], ["--train", "--resume"]):
        with pytest.raises(SystemExit):
            d2det.main([*flags, "--out", f"{tmp_path}"])
        assert "last.pt: " in capsys.readouterr().err


def test_weights_of_half_precision_are_read_but_not_resumed(small, tmp_path, capsys):
    state = load_checkpoint(small / "last.pt")
    halved = {k: v.half() if v.is_floating_point() else v for k, v in state["model"].items()}
    save_checkpoint(tmp_path / "last.pt", {**state, "model": halved})
    model = engine.load(tmp_path / "last.pt").model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with pytest.raises(SystemExit):
        run(*RUN, "--resume", "--out", tmp_path)
    assert "last.pt: cannot resume: its model is not of" in capsys.readouterr().err


# ------------------------------------------------------------------------------ precision, colour


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_detecting_with_other_than_float32_is_refused_by_name(dtype):
    settings = settings_of(iou_aware_retinanet, fpn_channels=8, tower_convs=1, device="cpu")
    model = build(iou_aware_retinanet, settings, 2).to(dtype).eval()
    image = SyntheticDetection(1, 64)[0][0]
    detector = engine.predict.LoadedDetector(model, settings, [{"id": 1, "name": "a"}] * 2)
    for detect in (detector.detect, lambda image: model.predict([image])):
        with pytest.raises(BadInput, match=f"weights are {dtype}"):
            detect(image)


def test_what_is_transparent_is_white_and_not_the_hidden_colour(tmp_path):
    pixels = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    pixels.putpixel((1, 0), (255, 0, 0, 255))
    pixels.putpixel((2, 0), (0, 0, 0, 128))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    pixels.save(tmp_path / "a.png")
    palette.save(tmp_path / "b.png", transparency=0)
    Image.new("LA", (1, 1), (0, 0)).save(tmp_path / "c.png")
    want = {
        "a": [[255, 255, 255], [255, 0, 0], [127, 127, 127]],
        "b": [[255, 255, 255], [0, 255, 0]],
        "c": [[255, 255, 255]],
    }
    for name, colours in want.items():
        assert read_image(tmp_path / f"{name}.png").permute(1, 2, 0)[0].tolist() == colours
