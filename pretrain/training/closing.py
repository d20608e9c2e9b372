"""What does a finished run tell: how good, how fast, where things are, what to try next?"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from pretrain.monitor.page import PAGE_NAME
from pretrain.monitor.plots import plot_run
from pretrain.monitor.provenance import provenance
from pretrain.monitor.records import METRICS_NAME, read_metrics
from pretrain.monitor.summary import RunSummary, TextScore
from pretrain.monitor.throughput import Throughput
from pretrain.training.comparison import Compared
from pretrain.training.corpus import SUMMARY_NAME, Corpus
from pretrain.training.observe import Observer, Score
from pretrain.training.run import Run
from pretrain.training.trainer import Trainer

_LAST_STEPS = 20


def summarise(
    trainer: Trainer,
    observer: Observer,
    throughput: Throughput,
    scores: Mapping[str, Score],
    *,
    elapsed_s: float,
) -> RunSummary:
    """Return the figures of a finished run.

    Args:
        trainer: the run at its end.
        observer: what it saw of this attempt.
        throughput: the clock of its steps.
        scores: the last validation, by domain and `all`.
        elapsed_s: wall clock of this attempt, in seconds.
    """
    run = trainer.run
    # an attempt that was started to validate alone has no losses of its own
    losses = observer.losses or _recorded_losses(run.folder / METRICS_NAME)
    tokens_per_s, flop_per_s = throughput.average_tokens_per_s, throughput.average_flop_per_s
    last = losses[-_LAST_STEPS:]
    return RunSummary(
        name=run.name,
        step=trainer.position.step,
        total_steps=trainer.total_steps,
        num_tokens=trainer.tokens,
        train_loss=sum(last) / len(last) if last else float("nan"),
        first_train_loss=losses[0] if losses else None,
        validation=_text_score("all", scores, trainer.corpus),
        domains=tuple(
            _text_score(name, scores, trainer.corpus) for name in scores if name != "all"
        ),
        vocabulary_size=run.model.vocab_size,
        tokens_per_s=tokens_per_s,
        achieved_flop_per_s=flop_per_s,
        mfu=None if flop_per_s is None else throughput.mfu(flop_per_s),
        elapsed_s=elapsed_s,
        memory_peak_bytes=observer.memory_peak_bytes,
        precision=run.precision.label,
        places=_places(run),
        next_commands=_next_commands(run, last_step=max(0, trainer.position.step - 1)),
    )


def _recorded_losses(path: Path) -> list[float]:
    """Return the loss of every step that a run has recorded; none without a file."""
    if not path.exists():
        return []
    return [float(record["loss"]) for record in read_metrics(path) if "loss" in record]


def write_summary(summary: RunSummary, compared: Compared, *, folder: Path) -> None:
    """Write the figures as `summary.json`, with the command and commit that made them.

    With it the run is over (corpus.is_over): it comes last. docs/run.md says what is in it.

    Args:
        summary: what came of the run.
        compared: what was predicted of its last start, beside what was measured.
        folder: of the run.
    """
    record = {
        **provenance(),
        **asdict(summary),
        "prediction": asdict(compared),
    }
    writing = folder / ".summary.json"
    writing.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(writing, folder / SUMMARY_NAME)


def draw_curves(run: Run, corpus: Corpus) -> None:
    """Draw the run's metrics into `curves.png`, with gzip and xz as baselines."""
    totals = corpus.manifest.validation_compressed
    num_bytes = sum(text.bytes for text in corpus.manifest.splits["validation"].values())
    baselines = (
        {}
        if totals is None
        else {"gzip": 8 * totals.gzip_bytes / num_bytes, "xz": 8 * totals.xz_bytes / num_bytes}
    )
    plot_run(
        read_metrics(run.folder / METRICS_NAME),
        run.folder / "curves.png",
        title=run.name,
        vocabulary_size=run.model.vocab_size,
        baselines_bits_per_byte=baselines,
    )


def _text_score(name: str, scores: Mapping[str, Score], corpus: Corpus) -> TextScore:
    texts = corpus.manifest.splits["validation"]
    if name == "all":
        compressed = corpus.manifest.validation_compressed
        num_bytes = sum(text.bytes for text in texts.values())
    else:
        compressed = texts[name].compressed
        num_bytes = texts[name].bytes
    return TextScore(
        name=name,
        loss=scores[name].loss,
        bits_per_byte=scores[name].bits_per_byte,
        gzip_bits_per_byte=8 * compressed.gzip_bytes / num_bytes if compressed else None,
        xz_bits_per_byte=8 * compressed.xz_bytes / num_bytes if compressed else None,
    )


def _places(run: Run) -> dict[str, str]:
    names = {
        "page": PAGE_NAME,
        "curves": "curves.png",
        "metrics": METRICS_NAME,
        "summary": SUMMARY_NAME,
        "configuration": "config.yaml",
        "checkpoints": "checkpoints",
    }
    if not run.telemetry.page_interval_s:
        del names["page"]
    return {label: str(run.folder / name) for label, name in names.items()}


def _next_commands(run: Run, *, last_step: int) -> list[str]:
    return [
        f"python launch/generate.py checkpoint={run.folder} prompt='\"def main(\"'",
        f"python launch/inspect_data.py action=explain run={run.folder} step={last_step} rank=0",
        f"torchrun --nproc-per-node 2 launch/pretrain.py name={run.name}_pp2 layout.ep=1"
        f" layout.pp=2",
        f"python launch/pretrain.py -m name={run.name}_lr optimizer.lr=1e-3,2e-3",
    ]
