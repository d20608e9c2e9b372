"""How fast is a checkpoint written as a Hugging Face folder, and in how much memory?

    python tests/bench/bench_export.py [--json FILE] [--folder DIR]

A random checkpoint of two billion parameters, three layers of it, is made and then, in processes of
their own so that each one's peak memory is its own:

(a) verified: the SHA-256 of every file, as every export does first;
(b) exported: to bf16, fp32 and FP8 by blocks, without the comparison with transformers;
(c) copied: the bytes of the bf16 folder, by read and write and fsync. Nothing can be faster.

What follows for the 519B model is bytes by measured speed; the memory does not depend on sizes.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor

from data.tokenizer.bpe import BpeConfig, save_tokenizer, train_bpe
from pretrain.checkpoint.chunk_files import finish_folder, write_chunks
from pretrain.checkpoint.manifest import (
    Manifest,
    digest_file,
    find_damage,
    read_manifest,
    write_manifest,
)
from pretrain.model.count import count_parameters
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.serving.names import name_table, stored_shapes
from pretrain.serving.request import Export
from pretrain.serving.to_hub import export
from pretrain.serving.trained import TrainedModel
from tests.bench.provenance import parser, write_result

MIB = 1 << 20
TARGET_MIB = 1024
FULL_PARAMETERS = 518_983_052_288
SPEC = ModelSpec(
    num_layers=3,
    num_dense_layers=1,
    hidden_size=2048,
    dense_ffn_size=8192,
    num_routed_experts=64,
    num_experts_per_token=4,
    num_shared_experts=1,
    expert_ffn_size=2048,
    num_expert_groups=4,
    num_groups_per_token=2,
    routed_scaling=2.5,
    num_heads=16,
    q_lora_rank=768,
    kv_lora_rank=512,
    qk_nope_head_size=128,
    qk_rope_head_size=64,
    v_head_size=128,
    vocab_size=65_536,
    max_context_tokens=4096,
    num_mtp_layers=0,
)
TRAINED = TrainedModel(
    model=SPEC,
    precision=Precision(kind="bf16"),
    load_balance=LoadBalance(),
    mtp_loss_weight=0.3,
    sequence_tokens=4096,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured job."""

    name: str
    gigabytes: float
    """Written, or read where nothing is written."""
    seconds: float
    peak_mib: float
    """Largest resident memory of its process."""


def make_checkpoint(folder: Path) -> int:
    """Write a random bf16 checkpoint in one chunk for each tensor; return its parameters."""
    folder.mkdir(parents=True)
    table = name_table(SPEC, router_bias=False)
    generator = torch.Generator().manual_seed(0)

    def chunks() -> Iterator[tuple[str, Sequence[int], Tensor]]:
        for row in table:
            values = torch.empty(row.size, dtype=torch.bfloat16)
            yield row.stored, row.start, values.normal_(0.0, 0.02, generator=generator)

    written, _ = write_chunks(folder / "__0_0.distcp", chunks())
    finish_folder(folder, stored_shapes(table), written)
    names = sorted(path.name for path in folder.iterdir())
    manifest = Manifest(
        step=0,
        sequences=0,
        tokens=0,
        tokenizer_digest="",
        config={},
        versions={},
        files={name: digest_file(folder / name) for name in names},
    )
    write_manifest(folder, manifest)
    return sum(prod(row.shape) for row in table)


def make_tokenizer(path: Path) -> None:
    """Write a tokenizer.json whose padding ids fill the vocabulary."""
    config = BpeConfig(vocab_size=272, num_reserved=14)
    save_tokenizer(train_bpe(["def main():\n    return 0\n" * 50], config=config), path)
    tokenizer = json.loads(path.read_text())
    last = {"id": SPEC.vocab_size - 1, "content": "<|last|>", "special": True}
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | last)
    path.write_text(json.dumps(tokenizer))


def verify(checkpoint: Path) -> int:
    """Compare every digest; return the bytes read."""
    manifest = read_manifest(checkpoint)
    assert not find_damage(checkpoint, manifest, digests=True)
    return sum(record.size_bytes for record in manifest.files.values())


def write_hub(checkpoint: Path, output: Path, dtype: Any) -> int:
    """Export; return the bytes written."""
    request = Export(
        checkpoint=checkpoint,
        output=output,
        dtype=dtype,
        tokenizer=checkpoint.parent / "tokenizer.json",
    )
    export(
        request,
        trained=TRAINED,
        folder=checkpoint,
        manifest=read_manifest(checkpoint),
        progress=lambda *_: None,
        check=lambda _: "",
    )
    return sum(path.stat().st_size for path in output.iterdir())


def copy(source: Path, output: Path) -> int:
    """Copy a folder's files through a buffer of 32 MiB, synced; return the bytes written."""
    output.mkdir()
    buffer = bytearray(32 * MIB)
    for path in source.iterdir():
        with path.open("rb", buffering=0) as given, (output / path.name).open("wb", 0) as taken:
            while num := given.readinto(buffer):
                taken.write(memoryview(buffer)[:num])
            os.fsync(taken.fileno())
    return sum(path.stat().st_size for path in output.iterdir())


def _in_process(link: Any, job: Callable[..., int], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(2)
    begun = time.perf_counter()
    num_bytes = job(*args)
    seconds = time.perf_counter() - begun
    link.send((num_bytes, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def measured(name: str, job: Callable[..., int], *args: Any) -> Row:
    """Run a job in a new process and return what it took."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_in_process, args=(theirs, job, args))
    process.start()
    theirs.close()
    num_bytes, seconds, peak_mib = ours.recv()
    process.join()
    return Row(name=name, gigabytes=num_bytes / 1e9, seconds=seconds, peak_mib=peak_mib)


def format_rows(rows: Sequence[Row], *, num_parameters: int) -> str:
    """Return the table for people."""
    head = f"{'job':<16} {'GB':>6} {'s':>7} {'GB/s':>6} {'peak MiB':>9} {'519B: hours':>12}"
    lines = [
        f"{r.name:<16} {r.gigabytes:>6.2f} {r.seconds:>7.1f} {r.gigabytes / r.seconds:>6.2f}"
        f" {r.peak_mib:>9.0f} {r.seconds * FULL_PARAMETERS / num_parameters / 3600:>12.1f}"
        for r in rows
    ]
    return "\n".join([head, *lines])


def main() -> int:
    """Run the bench; 1 if an export needed more memory than the target."""
    arguments = parser(__doc__)
    arguments.add_argument("--folder", type=Path, help="where 20 GB may be written; default: tmp")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        checkpoint = folder / "checkpoint"
        num_parameters = make_checkpoint(checkpoint)
        count = count_parameters(SPEC)
        assert num_parameters == count.total
        largest = count.moe_layer
        make_tokenizer(folder / "tokenizer.json")
        rows = [measured("verify digests", verify, checkpoint)]
        for dtype in ("bf16", "fp8", "fp32"):
            output = folder / dtype
            rows.append(measured(f"export {dtype}", write_hub, checkpoint, output, dtype))
            if dtype == "bf16":
                rows.append(measured("plain copy", copy, output, folder / "copy"))
                shutil.rmtree(folder / "copy")
            shutil.rmtree(output)
    print(f"{num_parameters:,} parameters, largest layer {largest:,}")
    print(format_rows(rows, num_parameters=num_parameters))
    worst = max(row.peak_mib for row in rows)
    print(f"target: at most {TARGET_MIB} MiB; largest {worst:.0f} MiB")
    write_result(options.json, num_parameters=num_parameters, rows=[asdict(row) for row in rows])
    return int(worst > TARGET_MIB)


if __name__ == "__main__":
    sys.exit(main())
