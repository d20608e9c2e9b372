"""Does a layout train the same model?

`loss_curve` runs the real trainer for a few steps without telemetry and returns what can be compared: losses and
gradient norms as exact floats. Two layouts of one configuration must agree to rounding; two starts of one layout, the
second from the first's checkpoint, must agree to the bit.
"""

from dataclasses import dataclass

from data.stream.loader import open_corpus
from data.tokenizer.codec import Codec
from parallel import groups
from pretrain.checkpoint.resume import find_newest
from pretrain.training.run import Run
from pretrain.training.trainer import Corpus, Trainer


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """What a short run measured; the same on every rank."""

    first_step: int
    """Steps done before the first entry."""
    losses: tuple[float, ...]
    """Nats per token of each step."""
    gradient_norms: tuple[float, ...]
    """Global norm of each step, before the clip."""
    validation: float
    """Validation loss after the last step."""


def open_run_corpus(run: Run) -> Corpus:
    """Return the corpus of a run, open for reading.

    Raises:
        DataError: if a file is missing, damaged or not of the tokenizer.
        ValueError: if the model's vocabulary is too small for the tokenizer.
    """
    digest = Codec(run.data.corpus / "tokenizer.json").digest
    train, validation = (
        open_corpus(
            run.data.corpus,
            split=split,
            window_tokens=run.data.sequence_tokens,
            seed=run.seed,
            vocab_size=run.model.vocab_size,
            tokenizer_digest=digest,
        )
        for split in ("train", "validation")
    )
    return Corpus(manifest=train.manifest, train=train.stream, validation=validation.stream)


def loss_curve(run: Run, *, num_steps: int, save_after: int | None = None, resume: bool = False) -> Curve:
    """Train a few steps and return what was measured.

    Args:
        run: the configuration; its layout must be for the ranks that run.
        num_steps: steps to take from where it starts.
        save_after: write a checkpoint after this step; None: never.
        resume: start from the newest checkpoint of the run's folder.

    Collective: every rank calls it.
    """
    device = groups.join_world()
    trainer = Trainer(run, device=device, corpus=open_run_corpus(run))
    if resume:
        found = find_newest(run.folder / "checkpoints")
        assert found is not None, f"no checkpoint below {run.folder}"
        trainer.load(*found)
    first_step = trainer.position.step
    losses: list[float] = []
    norms: list[float] = []
    for _ in range(num_steps):
        result = trainer.step(trainer.next_batch())
        losses.append(result.loss)
        norms.append(result.gradient_norm)
        if trainer.position.step == save_after:
            trainer.save({})
    validation = trainer.validate(windows_per_domain=4).loss
    return Curve(
        first_step=first_step, losses=tuple(losses), gradient_norms=tuple(norms), validation=validation
    )
