"""The command line of every script: where settings come from, and what is done."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
import tyro

import data
from common import BadInput
from data.checks import check_images
from data.files import counted
from data.settings import Data
from engine.checkpoints import (
    load_checkpoint,
    load_weights,
    read_settings,
    script_name,
    start_from,
)
from engine.detector import build_detector
from engine.entries import check_size
from engine.export import export_file
from engine.folders import check_folder, sole_writer
from engine.loader import worker_problem
from engine.metrics import evaluate, show_metrics, show_per_class
from engine.predict import predict_files
from engine.processes import (
    end_processes,
    gather,
    keep_memory,
    print_once,
    progress,
    rank_and_world,
    start_processes,
    warn_of_busy_cores,
)
from engine.rows import ROWS, beside_baseline, check_row, read_rows, show_rows, without_choices
from engine.settings import TINY_PHOTOS, Run, Settings, choices
from engine.signals import Signals, signals_answered
from engine.train import train


@dataclass
class Command:
    """What to do."""

    train: bool = False  # train, then evaluate
    eval: bool = False  # evaluate --weights on the validation set
    predict: tuple[str, ...] = ()  # detect in these image files and folders with --weights
    export: str = ""  # write the network up to NMS into this file: .pt2 (torch) or .onnx
    rows: bool = False  # print the paper's tables and the flags of each row
    row: str = ""  # take the settings of this row of the paper's tables (see --rows)
    preset: Literal["auto", "paper", "tiny"] = "auto"  # auto: tiny for synthetic data, else paper
    weights: str = ""  # checkpoint to evaluate, to predict with, or to start training from
    resume: bool = False  # go on from OUT/last.pt, if there is one


# ------------------------------------------------------------------------------ parsing


# Where the data lie. If one of the first three is given, all come from the command line.
PLACES = (
    "data train_json val_json train_images val_images train_split val_split val_share upright"
).split()


def parse(
    name: str, settings_class: type[Settings], argv: list[str] | None = None
) -> tuple[Command, Settings]:
    """Flags over the checkpoint's settings over the row over the preset over the defaults.

    Raises BadInput for a row or a checkpoint that does not exist or does not fit.
    """
    argv = sys.argv[1:] if argv is None else list(argv)

    def read(settings: Settings, args: list[str], partly: bool = False):
        parts = [
            ("command", Command, field(default_factory=Command)),
            ("settings", settings_class, field(default_factory=lambda: settings)),
        ]
        return cast(Any, tyro.cli)(
            dataclasses.make_dataclass("CommandLine", parts),
            args=args,
            prog=f"{name}.py",
            description=f"{settings_class.__doc__} Defaults follow from these flags.",
            config=(tyro.conf.AvoidSubcommands, tyro.conf.OmitArgPrefixes),
            return_unknown_args=partly,
        )

    # What is asked for decides the defaults, also those that --help shows.
    without_help = [a for a in argv if a not in ("-h", "--help")]
    asked, _ = read(settings_class(), without_help, partly=True)
    command, flags = asked.command, asked.settings
    rows, _ = read_rows(name)
    if command.row and command.row not in rows:
        raise BadInput(f"--row {command.row}: no such row, see --rows")
    row = rows.get(command.row, {})
    synthetic = flags.data.data == "synthetic" and not (
        flags.data.train_json or flags.data.val_json
    )
    tiny = command.preset == "tiny" or (command.preset == "auto" and synthetic)

    chosen = choices(settings_class, row)
    for k, value in choices(settings_class, flags.flat()).items():
        if value != getattr(settings_class(), k):
            chosen[k] = value
    settings = settings_class(**chosen)
    if tiny:
        settings = settings.replace(**settings.tiny)
    if tiny and not synthetic:
        settings = settings.replace(**TINY_PHOTOS)
    settings = settings.replace(**without_choices(settings, row))

    out = Path(flags.run.out or f"runs/{name}")
    weights, source = command.weights, None
    if command.train:
        files = filter(Path.exists, (out / "last.pt", out / "config.json"))
        source = next(files, None) if command.resume else None
    elif command.eval or command.predict or command.export:
        if not weights and (out / "last.pt").exists():
            weights = str(out / "last.pt")
        source = weights
    if source:
        places_given = any(getattr(flags.data, k) != getattr(Data(), k) for k in PLACES[:3])
        settings = saved_settings(name, settings_class, source, settings, places_given)
        if row:
            own_test = {k: v for k, v in row.items() if hasattr(settings.test, k)}
            settings = settings.replace(**own_test)

    defaults, parsed = settings, read(settings, argv)
    command, settings = parsed.command, parsed.settings
    for k, value in choices(settings_class, settings.flat()).items():
        if value != getattr(defaults, k):
            raise BadInput(f"--{k} {value}: the row or checkpoint has {getattr(defaults, k)}")
    if source and command.row:
        check_row(name, command.row, settings, settings.tiny, source)
    command = dataclasses.replace(command, weights=weights)
    return command, settings.replace(out=str(out))


def saved_settings(
    name: str, settings_class: type[Settings], source, given: Settings, places_given: bool
) -> Settings:
    """A checkpoint's or config.json's settings, without those that belong to a machine.

    Raises BadInput for the checkpoint of another script: its weights might fit, and would
    then be tested or trained further as the wrong method.
    """
    if str(source).endswith(".json"):  # of a run that was killed before its first checkpoint
        saved = read_settings(Path(source), settings_class)
    else:
        state = load_checkpoint(source)
        made_by = str(state.get("method", name)).rpartition(".")[2]  # older ones do not say
        files = [*ROWS.glob("*.toml"), *(ROWS.parent / "baselines").glob("*.py")]
        if made_by != name and {made_by, name} <= {file.stem for file in files}:
            raise BadInput(f"{source}: a checkpoint of {made_by}, not of {name}")
        saved = settings_class.from_dict(state["settings"])
    machine = {k: getattr(Run(), k) for k in ("out", "device", "workers", "check", "compile")}
    saved = saved.replace(**machine)
    if places_given:
        saved = saved.replace(**{k: getattr(given.data, k) for k in PLACES})
    return saved


# ------------------------------------------------------------------------------ running


def run(name: str, settings_class: type[Settings], detector, argv: list[str] | None = None):
    """A script's `main`: do what the command line asks for, and return the metrics.

    detector(model, num_classes): the script's `Detector`; rows are read from
    rows/<name>.toml.
    """
    try:
        if hasattr(signal, "SIGPIPE") and "--help" in (sys.argv if argv is None else argv):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
        untouched = "nothing was changed; the same command starts again"
        with signals_answered(untouched, own_process=argv is None) as signals:
            command, settings = parse(name, settings_class, argv)
            if command.rows:
                return show_rows(name)
            device = start_processes(settings.run.device)
            if device.type == "cpu":
                keep_memory()
            warn_of_busy_cores(device)
            torch.manual_seed(settings.run.seed)
            return execute(command, settings, detector, device, signals)
    except torch.OutOfMemoryError:
        less = "--batch, --scales or --roi-samples, in testing --eval-batch or --test-scales"
        print(f"error: out of memory on the GPU; smaller: {less}", file=sys.stderr)
        sys.exit(2)
    except (BadInput, FloatingPointError, OSError, RuntimeError) as e:
        problem = worker_problem(e) if isinstance(e, RuntimeError) else str(e)
        if isinstance(e, RuntimeError) and not problem:  # a fault of the program
            raise
        # a loader's worker puts its whole traceback into the message; the reason ends it
        print(f"error: {problem.rpartition('BadInput: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    finally:
        end_processes()


def read_once(read: Callable[[], Any]) -> Any:
    """The first process reads; all get what it returns or raises.

    Reading the annotations of 100,000 images takes a minute and gigabytes. The parts that
    are kept take much less.
    """
    found = None
    if rank_and_world()[0] == 0:
        try:
            found = read()
        except (BadInput, OSError) as e:
            found = e
    if rank_and_world()[1] > 1:
        sent = [found]
        dist.broadcast_object_list(sent)
        found = sent[0]
    if isinstance(found, Exception):
        raise found
    return found


def load_data(settings: Settings, train: bool, categories=None):
    """(training set or None, validation set), with image files checked as `Run.check` asks."""
    check = settings.run.check
    loaded = read_once(
        lambda: data.load(
            settings.data,
            seed=settings.run.seed,
            masks=settings.model.masks,
            train=train,
            categories=categories,
        )
    )
    for dataset in loaded:
        if isinstance(dataset, data.CocoDetection):
            if dataset.note:
                print_once(dataset.note)
            skipped = check_images(dataset, *rank_and_world(), progress, check, gather)
            images = f"{dataset.source}: {skipped} of {counted(len(dataset), 'image')}"
            if check == "none":
                print_once(f"{images} not checked (--check none)")
            elif skipped:
                print_once(f"{images} unchanged since a check (--check all repeats it)")
    return loaded


def execute(command: Command, settings: Settings, detector, device, signals: Signals):
    """Do what is asked: train, evaluate, predict, export."""
    out, needs_data = Path(settings.run.out), command.train or command.eval
    if not (needs_data or command.predict or command.export):
        raise BadInput("nothing to do: --train, --eval, --predict, --export or --rows (see --help)")
    if settings.run.compile and command.export:
        raise BadInput("--export is not of a compiled model: leave --compile out")
    state = load_checkpoint(command.weights) if command.weights else None
    if not (state or command.train):
        raise BadInput(f"this needs --weights (there is no {out / 'last.pt'})")
    for path in command.predict:
        if not Path(path).exists():
            raise BadInput(f"--predict {path}: no such file or folder")
    check_folder(out)
    if command.train:
        with sole_writer(out):  # `train` asks as well, but only once the images are checked
            pass
    train_data = val_data = None
    if needs_data:
        known = None if command.train else state["categories"]
        train_data, val_data = load_data(settings, command.train, known)
    categories = val_data.categories if val_data is not None else state["categories"]
    model_settings = settings.model
    resumed = command.resume and (out / "last.pt").exists()
    if state or resumed:
        model_settings = model_settings.without_download()
    if command.train and resumed:
        check_size(detector, model_settings, load_checkpoint(out / "last.pt"), out / "last.pt")
    elif state and not command.train:
        check_size(detector, model_settings, state, command.weights)
    model = build_detector(detector, model_settings, len(categories)).to(device)
    if state and command.train:
        start_from(model, state, command.weights, categories, detector)
    elif state:
        load_weights(model, state, command.weights, categories)
    if settings.run.compile:
        model.compile_parts()
    metrics = None
    if command.train:
        metrics = train(model, settings, train_data, val_data, out, resume=command.resume)
        name = script_name(model)
        if metrics.get("AP") is not None:
            print_once(show_per_class(metrics) + beside_baseline(name, settings))
        script = f"python -m {name}" if "." in name else f"python {name}.py"
        print_once(
            f"results: {out}/\n"
            f"look at {out}/detections.png (found, false and missed objects) and {out}/curves.png\n"
            f"next: {script} --predict PHOTO.jpg --weights {out}/best.pt"
        )
    signals.outcome = "its results are not complete; the same command starts again"
    if command.train:
        ended = f"training has ended, with {out / 'last.pt'}"
        signals.outcome = f"{ended}; what follows is incomplete"
    elif command.eval:
        with sole_writer(out / "eval"):
            metrics = evaluate(model, val_data, settings, out / "eval")
        print_once(f"{show_metrics(metrics)}\nresults: {out}/eval/")
    if command.predict:
        folder = out / "predict"
        results = predict_files(model, command.predict, categories, settings, folder)
        drawn = sum(r["score"] >= settings.test.draw_score for r in results)
        print_once(f"{len(results)} detections: {folder}/predictions.json")
        print_once(f"{drawn} drawn: {folder}/pictures/")
    if command.export and rank_and_world()[0] == 0:
        export_file(model, categories, command.export, settings.test)
    return metrics
