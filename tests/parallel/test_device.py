"""The machine's device, and patches that must not outlive megatron-core's lines they are for."""

import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path

import megatron.core
import pytest
import torch

from parallel import device
from parallel.device import Device, check_megatron_version, prepare

MEGATRON = Path(megatron.core.__file__).parent

# file and line of megatron-core 0.16.1 -> what stands there that does not work without CUDA
REASONS = {
    "transformer/moe/token_dispatcher.py:445": "torch.cuda.Stream()",
    "transformer/moe/router.py:169": "device=torch.cuda.current_device()",
    "distributed/param_and_grad_buffer.py:806": "device=torch.cuda.current_device()",
    "pipeline_parallel/schedules.py:596": 'device="cuda"',
    "pipeline_parallel/p2p_communication.py:313": "device=torch.cuda.current_device()",
    "optimizer/optimizer.py:375": "p.data.cuda()",
    "optimizer/optimizer.py:380": "v.cuda()",
    "transformer/moe/moe_utils.py:1098": "tensor.record_stream(",
    "optimizer/distrib_optimizer.py:361": ".type() in ['torch.cuda.HalfTensor'",
    "optimizer/distrib_optimizer.py:420": ".type() == 'torch.cuda.FloatTensor'",
    "optimizer/distrib_optimizer.py:582": ".type() in ['torch.cuda.HalfTensor'",
    "optimizer/optimizer.py:671": ".type() in ['torch.cuda.HalfTensor'",
    "optimizer/optimizer.py:690": ".type() == 'torch.cuda.FloatTensor'",
    "optimizer/clip_grads.py:167": ".type() == 'torch.cuda.FloatTensor'",
    "tensor_parallel/random.py:66": "torch.cuda.default_generators[",
    "tensor_parallel/random.py:103": "torch.cuda.default_generators[",
    "transformer/moe/token_dispatcher.py:876": "maybe_move_tensor_to_cpu(",
    "transformer/moe/moe_utils.py:1093": "tensor.is_cuda",
    "transformer/multi_latent_attention.py:62": "HAVE_TE = True",
    "transformer/multi_latent_attention.py:185": "isinstance(self.linear_proj, TELinear)",
    "transformer/moe/moe_utils.py:1192": "te_general_gemm is not None",
    "tensor_parallel/random.py:636": "self.fp8 = fp8 is not None",
    "optimizer/distrib_optimizer.py:640": "if not HAVE_APEX_OR_TE:",
    "optimizer/distrib_optimizer.py:818": "if not HAVE_APEX_OR_TE:",
    "distributed/param_and_grad_buffer.py:285": "dist_all_gather_func(",
    "distributed/param_and_grad_buffer.py:443": "dist_reduce_scatter_func(",
    "tensor_parallel/mappings.py:150": "torch.distributed.all_gather(output_tensor_list",
    "transformer/moe/token_dispatcher.py:732": "sort_chunks_by_idxs(",
    "transformer/moe/token_dispatcher.py:767": "sort_chunks_by_idxs(",
}


def cited_lines(docstring: str) -> set[tuple[str, str]]:
    """Return (file name, line) of every `file.py:12, :13` in a text."""
    found: set[tuple[str, str]] = set()
    for file, first, others in re.findall(r"(\w+\.py):(\d+)((?:(?:,| and)? :\d+)*)", docstring):
        found |= {(file, line) for line in (first, *re.findall(r"\d+", others))}
    return found


@pytest.mark.parametrize(("place", "code"), REASONS.items(), ids=REASONS)
def test_the_line_a_patch_is_for_still_says_it(place: str, code: str) -> None:
    file, line = place.split(":")
    assert code in (MEGATRON / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]


@pytest.mark.parametrize("patch", device.PATCHES, ids=lambda patch: patch.__name__)
def test_every_patch_names_its_lines(patch: Callable[[], None]) -> None:
    cited = cited_lines(inspect.getdoc(patch) or "")
    known = {(Path(file).name, line) for file, line in (place.split(":") for place in REASONS)}
    assert cited
    assert cited <= known


def test_every_reason_belongs_to_a_patch() -> None:
    cited = set().union(*(cited_lines(inspect.getdoc(patch) or "") for patch in device.PATCHES))
    assert {(Path(p.split(":")[0]).name, p.split(":")[1]) for p in REASONS} == cited


def test_another_megatron_is_refused_with_the_cure() -> None:
    with pytest.raises(RuntimeError, match=r"megatron-core 0\.17\.0 is installed, only 0\.16\.1"):
        check_megatron_version("0.17.0")
    with pytest.raises(RuntimeError, match=r"pip install -c constraints\.txt megatron-core"):
        check_megatron_version("0.16.0")
    check_megatron_version("0.16.1")
    check_megatron_version()


def forbidden_patch() -> None:
    raise AssertionError("a patch was applied on a machine with CUDA")


@pytest.fixture
def machine_with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_cuda", lambda: True)
    monkeypatch.setattr(device, "PATCHES", (forbidden_patch,))


@pytest.mark.usefixtures("machine_with_cuda")
def test_nothing_is_patched_where_cuda_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_transformer_engine", lambda: True)
    methods = (torch.Tensor.cuda, torch.Tensor.record_stream, torch.Tensor.type)
    finders = list(sys.meta_path)
    found = prepare.__wrapped__()  # past the cache: this process may have been prepared for a CPU
    assert found == Device(kind="cuda", backend="nccl")
    assert found.uses_transformer_engine
    assert (torch.Tensor.cuda, torch.Tensor.record_stream, torch.Tensor.type) == methods
    assert sys.meta_path == finders


@pytest.mark.usefixtures("machine_with_cuda")
def test_cuda_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_transformer_engine", lambda: False)
    with pytest.raises(RuntimeError, match=r"no usable Transformer Engine.*\[gpu\].*CUDA_VISIBLE"):
        prepare.__wrapped__()


def test_a_cpu_speaks_gloo_and_uses_local_modules(one_rank: Device) -> None:
    assert one_rank == Device(kind="cpu", backend="gloo")
    assert not one_rank.uses_transformer_engine
    assert one_rank.current() == torch.device("cpu")
    assert 10**7 < one_rank.peak_memory_bytes() < 10**12


def test_only_megatrons_optimizers_see_the_changed_type_name(one_rank: Device) -> None:
    tensor = torch.zeros(1)
    assert tensor.type() == "torch.FloatTensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    seen: dict[str, object] = {"__name__": "megatron.core.optimizer.any", "tensor": tensor}
    exec("name = tensor.type(); double = tensor.type('torch.DoubleTensor')", seen)
    assert seen["name"] == "torch.cuda.FloatTensor"
    assert isinstance(seen["double"], torch.Tensor)
    assert seen["double"].dtype == torch.float64


def test_torch_itself_is_not_changed_by_the_view(one_rank: Device) -> None:
    from megatron.core.transformer.moe import router

    assert router.torch is not torch
    assert router.torch.zeros(2, device="cuda").device.type == "cpu"
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.zeros(2, device="cuda")
