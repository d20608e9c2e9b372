"""Tensors of a checkpoint without megatron: what is read and written is what torch reads back.

The oracles are torch.distributed.checkpoint, which reads whole tensors, and megatron's loading.
"""

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.checkpoint.boxes import boxes
from pretrain.checkpoint.chunk_files import finish_folder, write_chunks
from pretrain.checkpoint.chunks import Chunk
from pretrain.checkpoint.manifest import CheckpointError, digest_file, read_manifest, write_manifest
from pretrain.checkpoint.sharded import load_weights
from pretrain.checkpoint.stored import StoredTensors
from pretrain.training.run import Run
from pretrain.training.verify import make_trainer

MakeRun = Callable[..., Run]
Loaded = tuple[str, tuple[int, ...], tuple[int, ...], bool, np.ndarray[Any, Any]]
"""Key, start, size, whether this rank owns it, values."""

ONE = Layout()
EP, PP = Layout(num_ranks=2, ep=2), Layout(num_ranks=2, pp=2)
TP = Layout(num_ranks=2, tp=2, etp=2)  # cuts columns of the experts too
EXPERTS = "decoder.layers.1.mlp.experts.experts.linear_fc2.weight"
ROUTER = "decoder.layers.1.mlp.router.weight"


def save_after_step(run: Run) -> Path:
    """Return the checkpoint written after one step; collective."""
    trainer = make_trainer(run)
    trainer.step(trainer.next_batch())
    trainer.save()
    return run.folder / "checkpoints" / "step_00000001"


def loaded_boxes(run: Run, folder: Path) -> list[Loaded]:
    """Return this rank's part of a model that has read `folder`; collective."""
    trainer = make_trainer(replace(run, seed=run.seed + 1))
    load_weights(folder, chunks=trainer.chunks)
    return [
        (box.key, box.start, box.size, box.is_owner, box.values.float().reshape(box.size).numpy())
        for box in boxes(trainer.chunks)
    ]


@pytest.fixture(scope="module")
def run(tiny_run: MakeRun) -> Run:
    return tiny_run(bf16=True, bias=True)


@pytest.fixture(scope="module")
def folder(run: Run, one_rank: object) -> Path:
    """Return a checkpoint that one rank wrote."""
    return save_after_step(run)


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / folder.name)


def read_whole(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a folder, read by torch."""
    metadata = read_metadata(folder).state_dict_metadata
    state: dict[str, Any] = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    load(state, checkpoint_id=folder)
    return state


def read_metadata(folder: Path) -> Metadata:
    return FileSystemReader(folder).read_metadata()


def place(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))


def assert_any_box_is_read(folder: Path) -> None:
    draw = np.random.default_rng(0)
    whole = read_whole(folder)
    with StoredTensors(folder) as stored:
        assert stored.tensors.keys() == whole.keys()
        for key, tensor in whole.items():
            shape = tuple(tensor.shape)
            assert (stored.tensors[key].shape, stored.tensors[key].dtype) == (shape, tensor.dtype)
            places = [((0,) * len(shape), shape)]
            for _ in range(3):
                start = tuple(int(draw.integers(n)) for n in shape)
                room = [n - a for n, a in zip(shape, start, strict=True)]
                places.append((start, tuple(int(draw.integers(n)) + 1 for n in room)))
            for start, size in places:
                read = stored.read(key, start, size)
                part = tensor[place(start, size)].contiguous()
                assert read.dtype == part.dtype
                # by their bytes: megatron leaves what is between two parameters of a bucket as the
                # memory was, which may be NaN
                assert torch.equal(read.view(torch.uint8), part.view(torch.uint8)), (key, start)


def test_any_box_of_a_checkpoint_of_one_rank_is_what_torch_reads(folder: Path) -> None:
    whole = read_whole(folder)
    assert {tensor.dim() for tensor in whole.values()} == {1, 2, 3}
    assert {tensor.dtype for tensor in whole.values()} == {
        torch.bfloat16,
        torch.float32,
        torch.uint8,
    }
    assert_any_box_is_read(folder)


@pytest.mark.parametrize(
    ("layout", "num_parts"),
    [(EP, [8, 1, 1]), (PP, [8, 1, 1]), (TP, [8, 1, 2])],
    ids=["ep2", "pp2", "tp2 etp2"],
)
def test_any_box_of_a_checkpoint_of_two_ranks_is_what_torch_reads(
    layout: Layout,
    num_parts: list[int],
    tiny_run: MakeRun,
    one_rank: object,
    two_ranks: RankPool,
) -> None:
    folder, _ = two_ranks.run(save_after_step, tiny_run(layout, bf16=True, bias=True))
    experts: Any = read_metadata(folder).state_dict_metadata[EXPERTS]
    starts = zip(*(chunk.offsets for chunk in experts.chunks), strict=True)
    assert [len(set(along_dim)) for along_dim in starts] == num_parts
    assert_any_box_is_read(folder)


@pytest.fixture(scope="module")
def weights(folder: Path) -> dict[str, Tensor]:
    """Return the model's tensors, without the optimizer's."""
    kept = ("embedding.", "decoder.", "mtp.", "output_layer.")
    return {key: tensor for key, tensor in read_whole(folder).items() if key.startswith(kept)}


def odd_chunks(
    weights: Mapping[str, Tensor],
) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """Return `weights` cut along every dimension, at places drawn from a seed, and shuffled."""
    draw = np.random.default_rng(0)
    chunks: list[tuple[str, tuple[int, ...], Tensor]] = []
    for key, tensor in weights.items():
        borders = [
            sorted({0, n, *(int(border) for border in draw.integers(1, n, 2))})
            for n in tensor.shape
        ]
        for corner in product(*(list(pairwise(along_dim)) for along_dim in borders)):
            start = tuple(a for a, _ in corner)
            box = place(start, [b - a for a, b in corner])
            chunks.append((key, start, tensor[box].contiguous()))
    return [chunks[i] for i in draw.permutation(len(chunks))]


def write_files(folder: Path, chunks: Sequence[tuple[str, tuple[int, ...], Tensor]]) -> list[Chunk]:
    written: list[Chunk] = []
    for number in range(3):
        name = f"__0_{number}.distcp"
        found, record = write_chunks(folder / name, iter(chunks[number::3]))
        assert record == digest_file(folder / name)
        written += found
    return written


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


@pytest.fixture(scope="module")
def odd_folder(
    folder: Path, weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a checkpoint of the same weights that we wrote in odd chunks."""
    odd = tmp_path_factory.mktemp("odd")
    finish_folder(odd, shapes(weights), write_files(odd, odd_chunks(weights)))
    sign(odd, manifest_of=folder)
    return odd


def sign(folder: Path, *, manifest_of: Path) -> None:
    """Give a folder a manifest that knows its files as they are."""
    own = ("manifest.json", "manifest.sha256")
    files = {p.name: digest_file(p) for p in folder.iterdir() if p.name not in own}
    write_manifest(folder, replace(read_manifest(manifest_of), files=files))


def test_any_box_of_a_folder_of_odd_chunks_is_what_torch_reads(
    odd_folder: Path, weights: dict[str, Tensor]
) -> None:
    read = read_whole(odd_folder)
    assert [k for k in read.keys() | weights if not torch.equal(read[k], weights[k])] == []
    assert_any_box_is_read(odd_folder)


def test_one_rank_loads_a_folder_of_odd_chunks(
    odd_folder: Path, weights: dict[str, Tensor], run: Run
) -> None:
    assert_owned_once([loaded_boxes(run, odd_folder)], weights)


@pytest.mark.parametrize(
    "layout",
    [EP, PP, pytest.param(TP, marks=pytest.mark.slow)],
    ids=["ep2", "pp2", "tp2 etp2"],
)
def test_two_ranks_load_a_folder_of_odd_chunks(
    layout: Layout, odd_folder: Path, weights: dict[str, Tensor], run: Run, two_ranks: RankPool
) -> None:
    ranks = two_ranks.run(loaded_boxes, replace(run, layout=layout), odd_folder)
    assert_owned_once(ranks, weights)


def assert_owned_once(ranks: Sequence[Sequence[Loaded]], weights: Mapping[str, Tensor]) -> None:
    """Check that every rank holds the right values, and of each value there is one owner."""
    owners = {key: np.zeros(tensor.shape) for key, tensor in weights.items()}
    for key, start, size, is_owner, values in (box for held in ranks for box in held):
        where = place(start, size)
        np.testing.assert_array_equal(values, weights[key][where].float().numpy(), err_msg=key)
        owners[key][where] += is_owner
    assert all((count == 1).all() for count in owners.values())


def test_a_model_of_another_vocabulary_is_refused(
    odd_folder: Path, tiny_run: MakeRun, one_rank: object
) -> None:
    other = make_trainer(tiny_run(spec={"vocab_size": 640}))
    with pytest.raises(CheckpointError, match=r"shape \(512, 64\), .* set model.vocab_size=512"):
        load_weights(odd_folder, chunks=other.chunks)


@pytest.mark.parametrize("key", [EXPERTS, ROUTER])
def test_a_folder_that_lacks_a_part_of_a_tensor_is_not_finished(
    key: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    chunks = odd_chunks(weights)
    chunks.remove(next(chunk for chunk in chunks if chunk[0] == key))
    files = write_files(tmp_path, chunks)
    with pytest.raises(CheckpointError, match=rf"{re.escape(key)} has \d+ of \d+ values"):
        finish_folder(tmp_path, shapes(weights), files)
    assert not (tmp_path / ".metadata").exists()


def test_a_tensor_that_nobody_wrote_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lost has 0 of 4 values"):
        finish_folder(tmp_path, {"lost": (2, 2)}, [])


def test_chunks_that_overlap_do_not_make_up_for_a_hole(tmp_path: Path) -> None:
    chunks = [("key", (start,), torch.ones(4)) for start in (0, 2)]
    with pytest.raises(CheckpointError, match="key"):
        finish_folder(tmp_path, {"key": (8,)}, write_files(tmp_path, chunks))


def test_chunks_of_two_dtypes_are_not_one_tensor(tmp_path: Path) -> None:
    chunks = [("key", (0,), torch.ones(4)), ("key", (4,), torch.ones(4, dtype=torch.bfloat16))]
    with pytest.raises(CheckpointError, match="key"):
        finish_folder(tmp_path, {"key": (8,)}, write_files(tmp_path, chunks))


def test_a_folder_without_a_manifest_is_refused(copied: Path) -> None:
    (copied / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"not a checkpoint: manifest\.json is missing"):
        StoredTensors(copied)


@pytest.mark.parametrize("lost_from", ["manifest", "folder"])
def test_a_folder_without_its_table_is_refused(lost_from: str, copied: Path) -> None:
    if lost_from == "manifest":
        write_manifest(copied, replace(read_manifest(copied), files={}))
    else:
        (copied / "chunks.json").unlink()
    with pytest.raises(CheckpointError, match=r"chunks\.json is missing"):
        StoredTensors(copied)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_never_opened(copied: Path, tmp_path: Path) -> None:
    """`.metadata` and torch's items are for other readers; ours opens neither."""
    sprung = tmp_path / "sprung"
    for name in (".metadata", "common.pt"):
        (copied / name).write_bytes(pickle.dumps(Trap(sprung)))
    sign(copied, manifest_of=copied)
    read_all(copied)
    assert not sprung.exists()
    pickle.loads((copied / ".metadata").read_bytes())
    assert sprung.exists()


def test_a_table_that_was_exchanged_is_not_parsed(copied: Path) -> None:
    path = copied / "chunks.json"
    path.write_bytes(path.read_bytes().replace(b"float32", b"float64"))
    with pytest.raises(CheckpointError, match=r"chunks\.json has another SHA-256"):
        StoredTensors(copied)


def test_a_table_that_names_files_of_others_is_refused(copied: Path) -> None:
    change_table(copied, lambda table: table["files"].__setitem__(0, "../../etc/passwd"))
    with pytest.raises(CheckpointError, match=r"names \.\./\.\./etc/passwd, which the manifest"):
        StoredTensors(copied)


def read_all(folder: Path) -> None:
    with StoredTensors(folder) as stored:
        for key, tensor in stored.tensors.items():
            stored.read(key, (0,) * len(tensor.shape), tensor.shape)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_file_cut_short_is_named(kept: float, copied: Path) -> None:
    (path,) = copied.glob("*.distcp")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=path.name):
        read_all(copied)


def test_a_file_cut_short_after_it_was_opened_is_named(copied: Path) -> None:
    (path,) = copied.glob("*.distcp")
    with StoredTensors(copied) as stored:
        stored.read(ROUTER, (0, 0), (1, 1))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CheckpointError, match=f"{path.name} ends before"):
            stored.read(ROUTER, (0, 0), (1, 1))


def test_a_lost_file_is_named(copied: Path) -> None:
    (path,) = copied.glob("*.distcp")
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        read_all(copied)


def change_table(folder: Path, change: Callable[[Any], None]) -> None:
    table = json.loads((folder / "chunks.json").read_text())
    change(table)
    (folder / "chunks.json").write_text(json.dumps(table))
    sign(folder, manifest_of=folder)


def test_a_hole_between_chunks_is_named(odd_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(odd_folder, tmp_path / "holed")
    change_table(folder, lambda table: table["tensors"][EXPERTS]["chunks"].pop())
    with pytest.raises(CheckpointError, match=rf"{re.escape(EXPERTS)} has \d+ of \d+ values"):
        StoredTensors(folder)


def test_a_box_beyond_the_tensor_is_refused(odd_folder: Path) -> None:
    with (
        StoredTensors(odd_folder) as stored,
        pytest.raises(CheckpointError, match="hold 64 of the 128 values"),
    ):
        stored.read(ROUTER, (7, 0), (2, 64))


class Sluggish(io.FileIO):  # 100 bytes at a time; Linux gives at most 2 GiB
    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:100])


def test_what_the_system_reads_in_parts_is_put_together(
    odd_folder: Path, weights: dict[str, Tensor]
) -> None:
    with StoredTensors(odd_folder) as stored:
        stored._files |= {path.name: Sluggish(path) for path in odd_folder.glob("*.distcp")}
        assert torch.equal(
            stored.read(EXPERTS, (0, 0, 0), weights[EXPERTS].shape), weights[EXPERTS]
        )
