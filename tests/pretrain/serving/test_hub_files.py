"""Safetensors files: what we write, its own library reads, and what it writes, we read."""

import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AXK1ForCausalLM

from kernels.fp8_blocks import quantise_blocks
from pretrain.checkpoint.manifest import CheckpointError
from pretrain.serving.hub_files import (
    INDEX_NAME,
    SCALE_SUFFIX,
    SINGLE_NAME,
    HubTensors,
    Planned,
    header_bytes,
    index_json,
    plan_shards,
    read_header,
    write_shard,
)
from tests.pretrain.serving.twin import tiny_spec, transformers_config

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def every_dtype() -> dict[str, Tensor]:
    return {
        "layer.a.weight": draw(6, 5),
        "layer.b.weight": draw(7, 3, dtype=torch.bfloat16),
        "layer.c.weight": draw(5, 3, dtype=torch.float8_e4m3fn),  # an odd number of bytes
        "layer.d.bias": draw(9),
        "layer.e.weight": draw(2, 2, dtype=torch.float64),
        "layer.f.weight": draw(2, 3, 4, dtype=torch.float16),
        "layer.g": torch.arange(4),
    }


def planned(tensors: Mapping[str, Tensor]) -> list[Planned]:
    return [Planned(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in tensors.items()]


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def read_all(folder: Path) -> dict[str, Tensor]:
    with HubTensors(folder) as hub:
        return {name: hub.read(name) for name in hub.tensors}


def write_folder(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int) -> list[str]:
    """Write tensors in pieces of two rows; return the names of the files."""
    shards = plan_shards([[plan] for plan in planned(tensors)], shard_bytes=shard_bytes)
    for name, shard in shards.items():
        pieces = (piece for plan in shard for piece in tensors[plan.name].split(2))
        write_shard(folder / name, shard, pieces)
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(index_json(shards))
    return list(shards)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = every_dtype()
    assert write_folder(tmp_path, tensors, shard_bytes=1 << 20) == [SINGLE_NAME]
    assert_same(load_file(tmp_path / SINGLE_NAME), tensors)
    with safe_open(tmp_path / SINGLE_NAME, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
    assert len(header_bytes(planned(tensors))) % 8 == 0  # the format's alignment


def test_the_library_reads_every_shard_of_ours_by_the_index(tmp_path: Path) -> None:
    tensors = every_dtype()
    names = write_folder(tmp_path, tensors, shard_bytes=100)
    found = {name: load_file(tmp_path / name) for name in names}
    assert len(names) > 2
    assert_same({key: t for shard in found.values() for key, t in shard.items()}, tensors)
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["weight_map"] == {key: name for name, shard in found.items() for key in shard}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / SINGLE_NAME, metadata={"format": "pt", "by": "it"})
    assert_same(read_all(tmp_path), every_dtype())


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of several shards that transformers wrote."""
    folder = tmp_path_factory.mktemp("theirs")
    AXK1ForCausalLM(transformers_config(tiny_spec())).save_pretrained(
        folder, max_shard_size="400KB"
    )
    return folder


def load_shards(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_we_read_the_shards_that_transformers_writes(theirs: Path) -> None:
    assert_same(read_all(theirs), load_shards(theirs))


def test_transformers_reads_the_shards_that_we_write(theirs: Path, tmp_path: Path) -> None:
    tensors = load_shards(theirs)
    assert len(write_folder(tmp_path, tensors, shard_bytes=300_000)) > 2
    (tmp_path / "config.json").write_bytes((theirs / "config.json").read_bytes())
    given: Any = AXK1ForCausalLM.from_pretrained(theirs)
    loaded: Any = AXK1ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    ours, report = loaded
    assert not any(report.values()), report
    assert_same(ours.state_dict(), given.state_dict())
    index, own = (json.loads((f / INDEX_NAME).read_text()) for f in (theirs, tmp_path))
    assert own["metadata"]["total_size"] == index["metadata"]["total_size"]
    assert list(own["weight_map"]) == list(index["weight_map"])


@pytest.mark.parametrize("name", every_dtype())
def test_rows_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    save_file(every_dtype(), tmp_path / SINGLE_NAME)
    whole = every_dtype()[name]
    with HubTensors(tmp_path) as hub:
        for first in range(whole.shape[0]):
            assert_same({"": hub.read(name, first)}, {"": whole[first:]})
            for count in range(1, whole.shape[0] - first + 1):
                assert_same({"": hub.read(name, first, count)}, {"": whole[first : first + count]})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of two shards: a and b in the first, c in the second."""
    save_file({"a.weight": draw(4, 4), "b.weight": draw(3)}, tmp_path / FIRST)
    save_file({"c.weight": draw(2, 2)}, tmp_path / SECOND)
    write_index(tmp_path, {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def cut(folder: Path, num_bytes: int | None) -> None:
    content = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(content[:num_bytes])


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 60])
def test_a_shard_cut_short_in_its_header_is_named(num_bytes: int, folder: Path) -> None:
    cut(folder, num_bytes)
    with pytest.raises(CheckpointError, match=f"{FIRST} .* cut short in its header"):
        HubTensors(folder)


@pytest.mark.parametrize(("lost_bytes", "name"), [(1, "b"), (12, "b"), (13, "a"), (76, "a")])
def test_a_shard_cut_short_in_its_values_is_named_with_the_tensor(
    lost_bytes: int, name: str, folder: Path
) -> None:
    cut(folder, -lost_bytes)
    with pytest.raises(CheckpointError, match=rf"{FIRST} .* inside {name}\.weight: cut short"):
        HubTensors(folder)


def test_bytes_behind_the_values_are_refused(folder: Path) -> None:
    with (folder / FIRST).open("ab") as file:
        file.write(b"0")
    with pytest.raises(CheckpointError, match=rf"{FIRST} has \d+ bytes, its header describes \d+"):
        HubTensors(folder)


def test_a_shard_cut_short_while_it_is_read_is_named_with_the_tensor(folder: Path) -> None:
    with HubTensors(folder) as hub:
        cut(folder, -1)
        with pytest.raises(CheckpointError, match=rf"{FIRST} ends inside b\.weight"):
            hub.read("b.weight")


INDEXED = {"a.weight": FIRST, "b.weight": FIRST, "c.weight": SECOND}


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        (INDEXED | {"d.weight": "lost.safetensors"}, r"d\.weight in lost\.safetensors, which is"),
        (INDEXED | {"d.weight": f"../{FIRST}"}, rf"d\.weight in \.\./{FIRST}, which is not in"),
        (INDEXED | {"d.weight": 1}, r"d\.weight in 1, which is not in the folder"),
        (INDEXED | {"d.weight": SECOND}, rf"{SECOND} does not hold d\.weight"),
        (INDEXED | {"b.weight": SECOND}, rf"{FIRST} holds b\.weight, .* puts in {SECOND}"),
        ({"a.weight": FIRST, "c.weight": SECOND}, rf"{FIRST} holds b\.weight, .* does not list"),
        ({}, "lists no tensor"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused_by_name(
    weight_map: object, message: str, folder: Path
) -> None:
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=message) as raised:
        HubTensors(folder)
    assert INDEX_NAME in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
def test_an_index_that_is_none_is_refused(content: str, folder: Path) -> None:
    (folder / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=f"{INDEX_NAME} cannot be read as an index"):
        HubTensors(folder)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"has neither {INDEX_NAME} nor {SINGLE_NAME}"):
        HubTensors(tmp_path)
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        HubTensors(tmp_path / "nowhere")


def write_file(folder: Path, header: bytes, *, num_bytes: int) -> None:
    content = len(header).to_bytes(8, "little") + header + bytes(num_bytes)
    (folder / SINGLE_NAME).write_bytes(content)


@pytest.mark.parametrize("header", [b"no JSON", b"[]", b"1", b"\xff", b"{"])
def test_a_header_that_is_none_is_refused(header: bytes, tmp_path: Path) -> None:
    write_file(tmp_path, header, num_bytes=8)
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME} has a header that cannot be read"):
        HubTensors(tmp_path)


@pytest.mark.parametrize(
    "fault",
    [
        {"dtype": "F4"},
        {"shape": [3]},
        {"shape": [-1, -2]},
        {"data_offsets": [0, 4]},
        {"data_offsets": [4, 12]},
        {"data_offsets": [-8, 0]},
    ],
    ids=str,
)
def test_a_faulty_entry_of_a_header_is_refused_by_file_and_tensor(
    fault: dict[str, Any], tmp_path: Path
) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_file(tmp_path, json.dumps({"a.weight": entry}).encode(), num_bytes=8)
    assert read_all(tmp_path).keys() == {"a.weight"}
    write_file(tmp_path, json.dumps({"a.weight": entry | fault}).encode(), num_bytes=8)
    with pytest.raises(CheckpointError, match=SINGLE_NAME) as raised:
        HubTensors(tmp_path)
    assert "a.weight" in str(raised.value)


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    write_file(tmp_path, json.dumps({"a": entry, "b": entry}).encode(), num_bytes=8)
    with pytest.raises(CheckpointError, match=f"{SINGLE_NAME}: b begins at byte"):
        read_header(tmp_path / SINGLE_NAME)


def fp8_folder(folder: Path, **changes: Tensor | None) -> Tensor:
    """Write a weight of 3 x 2 blocks, its last ones smaller, and another; return it in bf16."""
    values, scales = quantise_blocks(draw(300, 200) * torch.linspace(0.1, 9, 300)[:, None])
    tensors = {
        "a.weight": values,
        f"a.weight{SCALE_SUFFIX}": scales,
        "b.weight": draw(3, dtype=torch.bfloat16),
    }
    names = {"scales": f"a.weight{SCALE_SUFFIX}", "orphan": f"c.weight{SCALE_SUFFIX}"}
    names |= {"norm": f"b.weight{SCALE_SUFFIX}"}
    changed = tensors | {names[key]: value for key, value in changes.items()}
    save_file({k: t for k, t in changed.items() if t is not None}, folder / SINGLE_NAME)
    each = np.kron(scales.numpy(), np.ones((128, 128), np.float32))[:300, :200]
    return torch.from_numpy(values.float().numpy() * each).bfloat16()


def test_rows_of_a_weight_in_fp8_are_those_of_the_whole(tmp_path: Path) -> None:
    whole = fp8_folder(tmp_path)
    assert len(set(load_file(tmp_path / SINGLE_NAME)[f"a.weight{SCALE_SUFFIX}"].flatten())) == 6
    with HubTensors(tmp_path) as hub:
        assert hub.shapes() == {"a.weight": (300, 200), "b.weight": (3,)}
        assert torch.equal(hub.read_weight("a.weight"), whole)
        for first in (0, 1, 127, 128, 129, 255, 256, 299):
            assert torch.equal(hub.read_weight("a.weight", first), whole[first:])
            for end in (first + 1, first + 2, 128, 129, 256, 257, 300):
                if first < end <= 300:
                    rows = hub.read_weight("a.weight", first, end - first)
                    assert torch.equal(rows, whole[first:end]), (first, end)
        assert torch.equal(hub.read_weight("b.weight", 1, 1), hub.read("b.weight")[1:2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": None}, r"a\.weight is torch\.float8_e4m3fn; weights in"),
        ({"scales": torch.ones(2, 2)}, r"a\.weight_scale_inv .* \(2, 2\) given, .* \(3, 2\)"),
        ({"scales": torch.ones(3, 1)}, r"a\.weight_scale_inv .* \(3, 1\) given, .* \(3, 2\)"),
        ({"scales": torch.ones(3, 2).bfloat16()}, r"a\.weight_scale_inv of torch\.bfloat16"),
        ({"orphan": torch.ones(1, 1)}, r"c\.weight_scale_inv .* given"),
        ({"norm": torch.ones(1)}, r"b\.weight is torch\.bfloat16; weights in"),
    ],
    ids=["none", "rows", "columns", "dtype", "no weight", "weight in bf16"],
)
def test_scales_that_do_not_fit_are_refused_by_file_and_tensor(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    fp8_folder(tmp_path, **changes)
    with HubTensors(tmp_path) as hub, pytest.raises(CheckpointError, match=message) as raised:
        hub.shapes()
    assert str(tmp_path / SINGLE_NAME) in str(raised.value)


def failing() -> Iterator[Tensor]:
    yield draw(2, 4)
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (failing, OSError, "No space"),
        (lambda: iter([draw(3, 4)]), ValueError, "got 48 bytes of values, 64 were planned"),
        (lambda: iter([draw(4, 4), draw(1)]), ValueError, "got 68 bytes of values, 64 were"),
        (lambda: iter([draw(4, 4).bfloat16()]), ValueError, "got 32 bytes of values, 64 were"),
    ],
    ids=["disk", "too few", "too many", "dtype"],
)
def test_a_file_that_could_not_be_written_whole_does_not_get_its_name(
    values: Callable[[], Iterator[Tensor]], error: type[Exception], message: str, tmp_path: Path
) -> None:
    path = tmp_path / SINGLE_NAME
    shard = [Planned(name="a.weight", shape=(4, 4), dtype=torch.float32)]
    with pytest.raises(error, match=message):
        write_shard(path, shard, values())
    assert not path.exists()
    assert all(name.name.startswith(".tmp-") for name in tmp_path.iterdir())
    write_shard(path, shard, iter([draw(4, 4)]))
    assert [name.name for name in tmp_path.iterdir()] == [SINGLE_NAME]
    with pytest.raises(error):
        write_shard(path, shard, values())
    assert_same(load_file(path), {"a.weight": draw(4, 4)})


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_together_in_files_below_the_limit(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 90, (40, 4))
    groups = [
        [Planned(name=f"{group}", shape=(int(n),), dtype=torch.float32) for n in of_group]
        for group, of_group in enumerate(sizes)
    ]
    limit = int(4 * sizes.sum(1).max()) - 1  # bytes; one group at least is larger
    shards = plan_shards(groups, shard_bytes=limit)
    num_files = len(shards)
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    assert list(shards) == names
    assert [t for shard in shards.values() for t in shard] == [t for g in groups for t in g]
    held = [sorted({int(tensor.name) for tensor in shard}) for shard in shards.values()]
    assert sum(map(len, held)) == len(groups)  # none is in two files
    num_bytes = [int(4 * sizes[of_file].sum()) for of_file in held]
    assert all(n <= limit or len(of_file) == 1 for n, of_file in zip(num_bytes, held, strict=True))
    following = [int(4 * sizes[of_file[0]].sum()) for of_file in held[1:]]
    assert all(n + more > limit for n, more in zip(num_bytes[:-1], following, strict=True))


def test_what_fits_into_one_file_needs_no_index() -> None:
    group = planned(every_dtype())
    num_bytes = sum(tensor.nbytes for tensor in every_dtype().values())
    assert plan_shards([group[:3], group[3:]], shard_bytes=num_bytes) == {SINGLE_NAME: group}
    assert len(plan_shards([group[:3], group[3:]], shard_bytes=num_bytes - 1)) == 2


class Sluggish(io.FileIO):
    """A file that gives at most 5 bytes at a time; Linux gives at most 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:5])


def test_what_the_system_reads_in_parts_is_put_together(folder: Path) -> None:
    with HubTensors(folder) as hub:
        hub._files[FIRST] = Sluggish(folder / FIRST)
        assert torch.equal(hub.read("a.weight"), draw(4, 4))
