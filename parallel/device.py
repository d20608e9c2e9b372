# pyright: basic
# (megatron-core and torch.distributed are loosely typed; strict mode would check them, not us)
"""On which device do we run, and what must change in megatron-core so that it runs without CUDA?

megatron-core says `torch.cuda.current_device()` and `device="cuda"` in some seventy files. On a
machine without CUDA `prepare()` gives every `megatron.core` module a view of torch in which those
words mean the CPU; torch itself is not changed but for four Tensor methods that a module's view
cannot reach. On a CUDA machine nothing is patched: megatron runs as NVIDIA ships it, with
Transformer Engine.

Each patch below is a function whose docstring names the line of megatron-core 0.16.1 that needs it.
The patches were measured against that version only, so any other version is refused. Source:
docs/decisions/0001.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.metadata
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any, Literal

import torch

from kernels.adamw import FlatAdamW
from kernels.backend import has_cuda, has_transformer_engine
from parallel import gloo, malloc

TESTED_MEGATRON = "0.16.1"
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What the ranks of this run compute on and talk through."""

    kind: Literal["cpu", "cuda"]
    """Device type, as torch names it."""
    backend: Literal["gloo", "nccl"]
    """Backend of the process groups."""

    @property
    def name(self) -> str:
        """What the device calls itself, as `NVIDIA H200`; `cpu` on a CPU."""
        return "cpu" if self.kind == "cpu" else torch.cuda.get_device_name()

    @property
    def uses_transformer_engine(self) -> bool:
        """Whether layers come from Transformer Engine (CUDA) or are megatron's local ones (CPU)."""
        return self.kind == "cuda"

    def current(self) -> torch.device:
        """Return the device of this rank's tensors."""
        return _CPU if self.kind == "cpu" else torch.device("cuda", torch.cuda.current_device())

    def claim(self, local_rank: int) -> None:
        """Make the node's device number `local_rank` this process's own; nothing to do on a CPU."""
        if self.kind == "cuda":
            torch.cuda.set_device(local_rank)

    def peak_memory_bytes(self) -> int:
        """Return the most bytes this process has held: resident on CPU, allocated on CUDA."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        resource = importlib.import_module("resource")
        return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * 1024


def check_megatron_version(installed: str | None = None) -> None:
    """Refuse a megatron-core that the patches were not measured against.

    Args:
        installed: the version to judge; None asks the installation.

    Raises:
        RuntimeError: if the version is not the tested one.
    """
    installed = installed if installed is not None else importlib.metadata.version("megatron-core")
    if installed != TESTED_MEGATRON:
        raise RuntimeError(
            f"megatron-core {installed} is installed, only {TESTED_MEGATRON} is allowed: the CPU"
            " patches and the known traps were measured on it. Run `make install`, or"
            " `pip install -c constraints.txt megatron-core`."
        )


@functools.cache
def prepare() -> Device:
    """Return this machine's device, having made megatron-core run on it; later calls do nothing.

    Every process calls it before it builds groups or modules (parallel/groups.py does).

    Raises:
        RuntimeError: if megatron-core has another version than the tested one, or the machine has
            CUDA but no Transformer Engine: megatron's local modules have TE-absent bugs on a GPU,
            and FP8 would silently not run.
    """
    check_megatron_version()
    if has_cuda():
        if not has_transformer_engine():
            raise RuntimeError(
                "this machine has CUDA but no usable Transformer Engine: install the extra with"
                " `pip install -c constraints.txt -e '.[gpu]'`, or hide the GPU with"
                " CUDA_VISIBLE_DEVICES="
            )
        return Device(kind="cuda", backend="nccl")
    # torch.compile would cost minutes on toy shapes: for imports to come, and for those done.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    torch.compiler.set_stance("force_eager")
    malloc.share_one_heap()
    for patch in PATCHES:
        patch()
    return Device(kind="cpu", backend="gloo")


class _Stream:
    """A CUDA stream where there is none: everything is already in order."""

    device = _CPU
    cuda_stream = 0

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...
    def wait_stream(self, stream: object) -> None: ...
    def wait_event(self, event: object) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, event: "_Event | None" = None) -> "_Event":
        return event or _Event()


class _Event:
    """A CUDA event where there is none."""

    def __init__(self, *_args: object, **_kwargs: object) -> None: ...
    def record(self, stream: object = None) -> None: ...
    def wait(self, stream: object = None) -> None: ...
    def synchronize(self) -> None: ...


class _CpuCuda:
    """What `torch.cuda` means to megatron.core on a CPU; other names are torch's and raise."""

    Stream, Event = _Stream, _Event
    _stream = _Stream()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def current_stream(self, device: object = None) -> _Stream:
        return self._stream

    def default_stream(self, device: object = None) -> _Stream:
        return self._stream

    @contextlib.contextmanager
    def stream(self, stream: object) -> Iterator[None]:
        yield

    def synchronize(self, device: object = None) -> None: ...
    def empty_cache(self) -> None: ...
    def set_device(self, device: object) -> None: ...
    def device_count(self) -> int:
        return 1

    def get_rng_state(self, device: object = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: object = None) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)


_NEW = ("tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye", "as_tensor")
_LIKE = ("zeros_like", "ones_like", "empty_like", "full_like")
_FACTORIES = (*_NEW, *_LIKE, "rand", "randn", "randint", "randperm")


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)  # pinning needs CUDA
        return factory(*args, **kwargs)

    return create


class _CpuTorch(types.ModuleType):
    """The module `torch` as megatron.core sees it on a CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.__dict__["cuda"] = _CpuCuda()
        self.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_CPU_TORCH = _CpuTorch()


def _is_megatron(module_name: str) -> bool:
    return module_name == "megatron.core" or module_name.startswith("megatron.core.")


def _give_cpu_view(module: types.ModuleType | None) -> None:
    if module is not None and module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = _CPU_TORCH


class _CpuViewFinder(importlib.abc.MetaPathFinder):
    """Gives megatron.core modules the CPU view of torch as they are imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        if not _is_megatron(fullname):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_give_view(module: types.ModuleType) -> None:
            execute(module)
            _give_cpu_view(module)

        spec.loader.exec_module = execute_then_give_view
        return spec


def patch_module_views() -> None:
    """Give every megatron.core module, imported or to be imported, the CPU view of torch.

    Needed by some 37 sites, among them token_dispatcher.py:445 (side stream), router.py:169
    (buffers), param_and_grad_buffer.py:806 (buffers), schedules.py:596 (token count),
    p2p_communication.py:313 (what a stage receives).
    """
    sys.meta_path.insert(0, _CpuViewFinder())
    for name, module in list(sys.modules.items()):
        if _is_megatron(name):
            _give_cpu_view(module)


def patch_tensor_methods() -> None:
    """Make Tensor.cuda and Tensor.record_stream do nothing.

    Needed by optimizer.py:375 and :380 (`p.data.cuda()`), moe_utils.py:1098 (`record_stream`).
    """
    torch.Tensor.cuda = lambda self, *_args, **_kwargs: self  # type: ignore[method-assign]  see the docstring
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign]  see the docstring


def patch_tensor_type_names() -> None:
    """Let megatron's optimizers read 'torch.cuda.FloatTensor' from `Tensor.type()`.

    Needed by distrib_optimizer.py:361, :420, :582, optimizer.py:671, :690 and clip_grads.py:167,
    which compare the name. The caller's module decides, so that nobody else sees the changed name.
    """
    type_of = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        asks_name = not args and not kwargs
        if asks_name and sys._getframe(1).f_globals.get("__name__", "").startswith(
            "megatron.core.optimizer"
        ):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]  see the docstring


def patch_rng_state() -> None:
    """Let megatron's random-state tracker keep the CPU generator's state.

    Needed by tensor_parallel/random.py:66 and :103, which index torch.cuda.default_generators.
    """
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )


def patch_split_sizes() -> None:
    """Turn the dispatcher's split sizes into numpy arrays although they already are on the CPU.

    Needed by token_dispatcher.py:876: moe_utils.py:1093 converts CUDA tensors only, and
    all_to_all_single refuses tensors as split sizes.
    """
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = to_host
    dispatcher.maybe_move_tensor_to_cpu = to_host


def patch_absent_transformer_engine() -> None:
    """Tell MLA, the router and recomputation that Transformer Engine is absent.

    Needed by multi_latent_attention.py:62 and :185 (its imports succeed with mocks, and
    isinstance(x, MagicMock) raises), moe_utils.py:1192 (`te_general_gemm` is undefined) and
    random.py:636 (takes its default, False, for FP8).
    """
    extensions: Any = importlib.import_module("megatron.core.extensions.transformer_engine")
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    attention.HAVE_TE = extensions.HAVE_TE
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    init = random.CheckpointWithoutOutput.__init__
    random.CheckpointWithoutOutput.__init__ = lambda self, fp8=None: init(self, fp8=fp8 or None)


def patch_optimizer() -> None:
    """Give megatron an AdamW with FusedAdam's state layout, as TE and apex would.

    Needed by distrib_optimizer.py:640 and :818: with torch's AdamW, loading a distributed
    optimizer fails.
    """
    optimizer: Any = importlib.import_module("megatron.core.optimizer")
    distributed: Any = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer.Adam = distributed.Adam = FlatAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = distributed.USING_PYTORCH_OPTIMIZER = False
    distributed.HAVE_APEX_OR_TE = distributed.USING_APEX_OPTIMIZER = True


def patch_lone_collectives() -> None:
    """Let a group of one rank exchange nothing, where gloo copies whole buffers onto themselves.

    Needed by param_and_grad_buffer.py:285 and :443, for speed alone: the one rank's shard is the
    buffer itself, so there is nothing to sum or to gather.
    """
    buffers: Any = importlib.import_module("megatron.core.distributed.param_and_grad_buffer")
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(buffers, name, gloo.unless_alone(getattr(buffers, name)))


def patch_uneven_parts() -> None:
    """Pad what expert tensor ranks gather: gloo takes parts of one size only.

    Needed by mappings.py:150: with ep > 1 each of them has another number of tokens.
    """
    mappings: Any = importlib.import_module("megatron.core.tensor_parallel.mappings")
    mappings._gather_along_first_dim = gloo.pad_gather(mappings._gather_along_first_dim)


def patch_chunk_order() -> None:
    """Leave tokens alone whose chunks are in order already, as they are with one expert rank.

    Needed by token_dispatcher.py:732 and :767, for speed alone: they cut and join all tokens of a
    layer, there and back, to put them where they were.
    """
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    reorder = dispatcher.sort_chunks_by_idxs

    def reorder_if_needed(
        tokens: torch.Tensor, sizes: torch.Tensor, order: torch.Tensor, **options: Any
    ) -> Any:
        if bool((order.diff() == 1).all()):
            return tokens, options.get("probs")
        return reorder(tokens, sizes, order, **options)

    dispatcher.sort_chunks_by_idxs = reorder_if_needed


PATCHES: tuple[Callable[[], None], ...] = (
    patch_module_views,
    patch_tensor_methods,
    patch_tensor_type_names,
    patch_rng_state,
    patch_split_sizes,
    patch_absent_transformer_engine,
    patch_optimizer,
    patch_lone_collectives,
    patch_uneven_parts,
    patch_chunk_order,
)
"""Applied in this order, on machines without CUDA only."""
