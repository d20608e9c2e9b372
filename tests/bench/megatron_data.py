"""What do megatron-core's GPTDataset and BlendedDataset take for the same documents?

    python tests/bench/megatron_data.py PREFIX ...

As a program: builds all indices of a blend of the pairs at the prefixes, in one process without
torch.distributed, until the indices of the first sample are there. Prints JSON. The indices of a
GPTDataset are written to a folder beside its pair, as in a run; those of the blend are not, which
needs torch.distributed and costs more.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore")  # of megatron-core at import: about what a CPU has not

import numpy as np
import torch
from megatron.core.datasets import helpers  # noqa: F401  compiled, or the bench means nothing
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from tests.bench.corpora import END_ID, VOCAB_SIZE, WINDOW_TOKENS
from tests.bench.memory import peak_mib


class Ids:
    """The little of a tokenizer that a GPTDataset asks for; no id is padding."""

    eod = END_ID
    pad = -1
    vocab_size = VOCAB_SIZE
    unique_identifiers = {"class": "Ids"}  # noqa: RUF012  megatron-core reads it so


def built(prefixes: Sequence[Path], *, window_tokens: int, num_samples: int | None) -> Any:
    """Return the training split of one pair or of a blend of several.

    Args:
        prefixes: of the pairs, without a suffix; a blend takes alike from each.
        window_tokens: S.
        num_samples: of the blend; None: one epoch of one pair.
    """
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=window_tokens,
        blend=([str(p) for p in prefixes], [1.0] * len(prefixes) if num_samples else None),
        split="1,0,0",
        tokenizer=cast(Any, Ids()),
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
    )
    sizes = cast(list[int], [num_samples, 0 if num_samples else None, 0 if num_samples else None])
    splits = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return splits[0]


def bench_build(prefixes: Sequence[Path]) -> dict[str, Any]:
    """Return seconds and memory of the indices of a blend of nearly one epoch."""
    before = peak_mib()
    num_bytes = sum(Path(f"{prefix}.bin").stat().st_size for prefix in prefixes)
    num_samples = num_bytes // 4 // WINDOW_TOKENS * 99 // 100
    start, cpu = time.perf_counter(), time.process_time()
    blend = built(prefixes, window_tokens=WINDOW_TOKENS, num_samples=num_samples)
    sample = int(blend.dataset_sample_index[0])
    dataset = blend.datasets[int(blend.dataset_index[0])]
    first = dataset.sample_index[dataset.shuffle_index[sample]]
    document = int(dataset.document_index[first[0]])
    return {
        "wall_s": time.perf_counter() - start,
        "cpu_s": time.process_time() - cpu,
        "samples": num_samples,
        "first_document": document,
        "peak_mib": peak_mib(),
        "peak_mib_before": before,
    }


def sample_reader(prefix: Path, *, window_tokens: int) -> tuple[GPTDataset, int]:
    """Return one epoch of a pair, opened and its indices built, and its samples."""
    torch.set_num_threads(1)
    dataset = cast(GPTDataset, built([prefix], window_tokens=window_tokens, num_samples=None))
    return dataset, len(dataset)


def expected_positions(tokens_S: np.ndarray) -> np.ndarray:
    """Return positions that start again behind each end of a document, from ids alone."""
    begins = np.concatenate(([0], np.flatnonzero(tokens_S[:-1] == END_ID) + 1))
    lengths = np.diff(begins, append=len(tokens_S))
    return np.arange(len(tokens_S)) - np.repeat(begins, lengths)


if __name__ == "__main__":
    print(json.dumps(bench_build([Path(name) for name in sys.argv[1:]])))
