"""The command line of every script: train, evaluate, predict, list rows."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import torch

from common import BadInput
from engine.checkpoints import check_folder, load_checkpoint, load_weights
from engine.data import load_data
from engine.export import export_file
from engine.metrics import evaluate, show_metrics
from engine.predict import predict_files
from engine.processes import end_processes, rank_and_world, say, start_processes, warn_of_busy_cores
from engine.settings import Config, parse, show_rows, untrained
from engine.train import train


def run(
    name: str,
    config_class,
    detector_class,
    rows: dict,
    paper: dict,
    tiny: dict,
    argv=None,
):
    """A script's `main`: everything the command line can ask for. Returns the metrics.

    `rows`: settings of the rows of the paper's tables, `paper`: their printed numbers; `tiny`: what
    --preset tiny changes.
    """
    try:
        if hasattr(signal, "SIGPIPE") and "--help" in (sys.argv if argv is None else argv):
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` is no error
        config = parse(config_class, rows, tiny, name, argv)
        if config.rows:
            return show_rows(rows, paper)
        if config.row and config.row not in rows:
            raise BadInput(f"--row {config.row}: no such row, see --rows")
        device = start_processes(config.device)
        warn_of_busy_cores(device)
        torch.manual_seed(config.seed)
        return _run(detector_class, config, device)
    except (BadInput, FloatingPointError, OSError) as e:
        # a loader's worker puts its whole traceback into the message; the reason ends it
        print(f"error: {str(e).rpartition('BadInput: ')[2].strip()}", file=sys.stderr)
        sys.exit(2)
    finally:
        end_processes()


def _run(detector_class, config: Config, device: torch.device):
    out, needs_data = Path(config.out), config.train or config.eval
    if not (needs_data or config.predict or config.export):
        raise BadInput("nothing to do: --train, --eval, --predict, --export or --rows (see --help)")
    if config.compile and config.export:
        raise BadInput("--export is not of a compiled model: leave --compile out")
    state = load_checkpoint(config.weights) if config.weights else None
    if not (state or config.train):
        raise BadInput(f"this needs --weights (there is no {out / 'last.pt'})")
    for path in config.predict:
        if not Path(path).exists():
            raise BadInput(f"--predict {path}: no such file or folder")
    check_folder(out)
    train_data = val_data = None
    if needs_data:
        known = None if config.train else state["categories"]
        train_data, val_data = load_data(config, config.train, True, known)
    categories = val_data.categories if val_data is not None else state["categories"]
    loaded = state or (config.resume and (out / "last.pt").exists())
    model = detector_class(untrained(config) if loaded else config, len(categories)).to(device)
    if state:
        load_weights(model, state, config.weights, categories)
    if config.compile:
        model.compile_parts()
    metrics = None
    if config.train:
        metrics = train(model, config, train_data, val_data, out)
        say(f"results: {out}/")
    elif config.eval:
        metrics = evaluate(model, val_data, config, device, out / "eval")
        say(f"{show_metrics(metrics)}\nresults: {out}/eval/")
    if config.predict:
        folder = out / "predict"
        found = predict_files(model, config.predict, categories, config, device, folder)
        drawn = sum(r["score"] >= config.draw_score for r in found)
        say(
            f"{len(found)} detections: {folder}/predictions.json; {drawn} drawn: {folder}/pictures/"
        )
    if config.export and rank_and_world()[0] == 0:
        export_file(model, categories, config.export)
        say(f"exported: {config.export}")
    return metrics
