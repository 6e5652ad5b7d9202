"""Commands of the recipe: train in pieces, write weights.

``python -m recallseg.export.demo_model segmenter --work DIR --minutes 9``
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Sam2VideoModel

from recallseg.export.demo_model.checkpoints import save_tensors, save_weights
from recallseg.export.demo_model.corrector_training import CorrectorTrainer, generate
from recallseg.export.demo_model.embedder_training import EmbedderTrainer
from recallseg.export.demo_model.recipe import load_recipe
from recallseg.export.demo_model.segmenter_training import SegmenterTrainer, evaluate_segmenter
from recallseg.export.demo_model.workers import rank_and_count, run_workers

__all__ = ["main"]


def _append(path: Path, record: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _rounded(record: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in record.items()}


def _train(
    trainer: SegmenterTrainer | EmbedderTrainer | CorrectorTrainer,
    name: str,
    arguments: argparse.Namespace,
) -> None:
    """Train for a while, log every tenth step, and leave a checkpoint to go on from."""
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    log, checkpoint = work / f"{name}.jsonl", work / name
    if checkpoint.exists():
        trainer.load(checkpoint)
    first = rank_and_count()[0] == 0
    saved = time.monotonic()
    sums: dict[str, float] = {}
    count = 0
    for figures in trainer.pieces(arguments.minutes):
        if not first:
            continue
        count += 1
        sums = {key: sums.get(key, 0.0) + value for key, value in figures.items()}
        if trainer.step % 10 == 0:
            means = _rounded({key: value / count for key, value in sums.items()})
            record: dict[str, Any] = {"step": trainer.step, "size": trainer.size, **means}
            if isinstance(trainer, SegmenterTrainer):
                record["families"] = _rounded(trainer.scores)
            if isinstance(trainer, CorrectorTrainer) and trainer.step % 1000 == 0:
                record["held_out"] = trainer.evaluate()
            _append(log, record)
            print(json.dumps(record), file=sys.stderr, flush=True)
            sums, count = {}, 0
        if time.monotonic() - saved > 60.0 * arguments.save_minutes:
            trainer.save(checkpoint)
            saved = time.monotonic()
    if first:
        trainer.save(checkpoint)


def train_segmenter(arguments: argparse.Namespace) -> None:
    """Train the SAM 2 part."""
    trainer = SegmenterTrainer(load_recipe(arguments.config), arguments.device)
    if arguments.start:
        trainer.start_from(Path(arguments.start), arguments.start_step)
    _train(trainer, "segmenter", arguments)


def train_embedder(arguments: argparse.Namespace) -> None:
    """Train the DINOv2 part."""
    recipe = load_recipe(arguments.config)
    _train(EmbedderTrainer(recipe, arguments.device), "embedder", arguments)


def _segmenter_of(arguments: argparse.Namespace) -> Sam2VideoModel:
    """Return the finished segmenter that a corrector belongs to."""
    model: Sam2VideoModel = Sam2VideoModel.from_pretrained(arguments.segmenter, dtype=torch.float32)
    return model.eval()


def generate_for_corrector(arguments: argparse.Namespace) -> None:
    """Keep what the segmenter makes of generated images."""
    model = _segmenter_of(arguments)
    size: Any = model.config.image_size
    seed = int(load_recipe(arguments.config)["corrector"]["seed"])
    generate(model, Path(arguments.work) / "cache", int(size), seed, arguments.minutes)


def train_corrector(arguments: argparse.Namespace) -> None:
    """Train what corrects."""
    work = Path(arguments.work)
    recipe = load_recipe(arguments.config)
    _train(
        CorrectorTrainer(recipe, _segmenter_of(arguments), work / "cache"), "corrector", arguments
    )


def export_corrector(arguments: argparse.Namespace) -> None:
    """Write the tensors of a checkpoint as half-precision safetensors."""
    work = Path(arguments.work)
    recipe = load_recipe(arguments.config)
    trainer = CorrectorTrainer(recipe, _segmenter_of(arguments), work / "cache")
    trainer.load(work / "corrector")
    save_tensors(trainer.tensors(), Path(arguments.output))


def export_segmenter(arguments: argparse.Namespace) -> None:
    """Write the weights of a checkpoint as a model folder."""
    recipe = load_recipe(arguments.config)
    trainer = SegmenterTrainer(recipe)
    checkpoint = Path(arguments.work) / "segmenter"
    if checkpoint.exists():
        trainer.load(checkpoint)
    size = arguments.size or int(recipe["sam2"]["image_size"])
    model = trainer.finished_model(recipe, size, averaged=arguments.averaged)
    save_weights(model, Path(arguments.output))
    if arguments.evaluate:
        scores = evaluate_segmenter(model, size)
        record = {"step": trainer.step, "size": size, "held_out": scores}
        _append(Path(arguments.work) / "held_out.jsonl", record)
        print(json.dumps(record))


def export_embedder(arguments: argparse.Namespace) -> None:
    """Write the weights of a checkpoint as a model folder."""
    trainer = EmbedderTrainer(load_recipe(arguments.config))
    trainer.load(Path(arguments.work) / "embedder")
    save_weights(trainer.best, Path(arguments.output))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command of the recipe."""
    parser = argparse.ArgumentParser(prog="recallseg.export.demo_model", description=__doc__)
    parser.add_argument("--config", type=Path, default=None, help="another config.toml")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: torch decides)")
    commands = parser.add_subparsers(required=True)
    segmenter = commands.add_parser("segmenter", help="train the SAM 2 part")
    segmenter.set_defaults(run=train_segmenter)
    segmenter.add_argument("--workers", type=int, default=1, help="processes of one CPU thread")
    segmenter.add_argument("--start", help="model folder to begin from where no checkpoint is")
    segmenter.add_argument(
        "--start-step",
        type=int,
        default=0,
        help="step of the recipe at which --start's weights are",
    )
    embedder = commands.add_parser("embedder", help="train the DINOv2 part")
    embedder.set_defaults(run=train_embedder)
    keep = commands.add_parser("generate", help="keep what 'corrector' is trained on")
    keep.set_defaults(run=generate_for_corrector)
    corrector = commands.add_parser("corrector", help="train what corrects")
    corrector.set_defaults(run=train_corrector)
    for command in (segmenter, embedder, keep, corrector):
        command.add_argument("--minutes", type=float, default=9.0)
        command.add_argument("--save-minutes", type=float, default=4.0)
        command.add_argument("--device", default="cpu")
    export = commands.add_parser("export-segmenter", help="write the segmenter's weights")
    export.add_argument("--averaged", action="store_true", help="the averaged weights (mid-way)")
    export.add_argument("--size", type=int, default=0, help="image size (0: the recipe's)")
    export.add_argument("--evaluate", action="store_true", help="Dice on held-out tasks as well")
    export.set_defaults(run=export_segmenter)
    write = commands.add_parser("export-embedder", help="write the embedder's weights")
    write.set_defaults(run=export_embedder)
    tensors = commands.add_parser("export-corrector", help="write what corrects")
    tensors.set_defaults(run=export_corrector)
    for command in (keep, corrector, tensors):
        command.add_argument("--segmenter", required=True, help="folder of the finished segmenter")
    for command in (export, write):
        command.add_argument("--output", required=True, help="model folder to write")
    tensors.add_argument("--output", required=True, help="file to write")
    for command in (segmenter, embedder, export, write, keep, corrector, tensors):
        command.add_argument("--work", required=True, help="folder of checkpoint and log")
    parsed = parser.parse_args(arguments)
    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    run_workers(getattr(parsed, "workers", 1), parsed.run, parsed)
    return 0
