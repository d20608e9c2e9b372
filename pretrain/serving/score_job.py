"""How does one rank score a batch, from reading the file to writing the result?"""

import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.indexed.atomic import flush_to_disk, publish, temporary_file
from parallel import groups
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.model.precision import Precision
from pretrain.serving.request import Scoring
from pretrain.serving.scorer import IGNORED_LABEL, Scores, build_for_reading, load, score
from pretrain.serving.trained import TrainedModel

USER_ERROR_CODE = 2


def read_batch(
    path: Path, *, vocab_size: int, max_tokens: int, data_ranks: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return ids and labels, both `[B, S]` int64.

    Args:
        path: the .npz.
        vocab_size: ids are below.
        max_tokens: S is at most this.
        data_ranks: B is a multiple of it.

    Raises:
        ValueError: names the array and what is wrong with it.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            if "input_ids" not in arrays:
                raise ValueError(f"{path} has {arrays.files}, but no input_ids")
            ids: NDArray[Any] = arrays["input_ids"]
            labels: NDArray[Any] = arrays.get("labels", ids)
    except (OSError, zipfile.BadZipFile, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error
    for name, array in (("input_ids", ids), ("labels", labels)):
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape != ids.shape:
            raise ValueError(
                f"{path}: {name} of {array.dtype} and shape {array.shape} given, integers of one"
                " shape [B, S] are allowed"
            )
        counted = array[array != IGNORED_LABEL] if name == "labels" else array
        if counted.size and not 0 <= int(counted.min()) <= int(counted.max()) < vocab_size:
            raise ValueError(
                f"{path}: {name} from {counted.min()} to {counted.max()} given, 0 to"
                f" {vocab_size - 1} is allowed by the model's vocabulary"
            )
    num_sequences, num_tokens = ids.shape
    if not 1 < num_tokens <= max_tokens or num_sequences == 0 or num_sequences % data_ranks:
        raise ValueError(
            f"{path}: {num_sequences} sequences of {num_tokens} tokens given; a multiple of the"
            f" {data_ranks} data ranks, and 2 to {max_tokens} tokens, are allowed"
        )
    return ids.astype(np.int64), labels.astype(np.int64)


def run_scoring(scoring: Scoring, trained: TrainedModel, folder: Path, from_hub: bool) -> int:
    """Score a batch on this rank and, on rank 0, write the result; return the exit code.

    Args:
        scoring: what is asked for, its layout on the ranks that run.
        trained: the checkpoint's model.
        folder: the checkpoint.
        from_hub: whether it is a Hugging Face folder.

    Every rank calls it.
    """
    device = groups.join_world()
    layout = scoring.layout
    try:
        spec = trained.model
        ids, labels = read_batch(
            scoring.input,
            vocab_size=spec.vocab_size,
            max_tokens=spec.max_context_tokens,
            data_ranks=layout.dp,
        )
        parts = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        if ids.shape[1] % parts:
            raise ValueError(
                f"{scoring.input}: sequences of {ids.shape[1]} tokens given, a multiple of {parts}"
                f" is allowed: layout.tp={layout.tp} tensor ranks and layout.cp={layout.cp} context"
                " ranks, each with two chunks, divide a sequence"
            )
        chunks = build_for_reading(
            trained, layout=layout, device=device, precision=Precision(kind="fp32")
        )
        load(folder, chunks=chunks, trained=trained, from_hub=from_hub)
    except (ValueError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR_CODE
    scores = score(
        chunks,
        trained=trained,
        layout=layout,
        ids=ids,
        labels=labels,
        gradients=scoring.gradients,
    )
    if scores is not None:
        write_scores(scoring.output, scores)
        print(summary(scores, scoring.output), flush=True)
    return 0


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as .npz, all at once; arrays are named as in `launch/score.py`."""
    arrays: dict[str, Any] = {
        "logits": scores.logits,
        "token_loss": scores.token_loss,
        "loss": np.float64(scores.loss),
    }
    arrays |= {f"experts/{layer}": array for layer, array in scores.experts.items()}
    arrays |= {f"expert_weights/{layer}": array for layer, array in scores.expert_weights.items()}
    arrays |= {f"gradient_norm/{n}": np.float64(v) for n, v in scores.gradient_norms.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path.parent) as (stream, temporary):
        np.savez(stream, **arrays)
        flush_to_disk(stream)
        publish(temporary, path)


def summary(scores: Scores, output: Path) -> str:
    """Return what was scored, for people."""
    batch, sequence, vocabulary = scores.logits.shape
    lines = [
        f"{batch} sequences of {sequence} tokens, vocabulary {vocabulary:,}",
        f"loss          {scores.loss:.6f} nats per counted token",
        f"logits        {scores.logits.min():.3f} to {scores.logits.max():.3f}",
        f"MoE layers    {len(scores.experts)}",
    ]
    if scores.gradient_norms:
        total = sum(norm**2 for norm in scores.gradient_norms.values()) ** 0.5
        lines.append(f"gradient norm {total:.6f} over {len(scores.gradient_norms):,} tensors")
    lines.append(f"next: python -c \"import numpy; print(numpy.load('{output}').files)\"")
    return "\n".join(lines)
