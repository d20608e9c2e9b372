"""What every test may rely on: an environment that is not the caller's, and stated skips."""

import gc
import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stream.curriculum import Curriculum, Stage
from parallel.fork_server import enter_fork, fork_context
from parallel.layout import Layout
from parallel.spawn import RankPool
from pretrain.model.load_balance import LoadBalance
from pretrain.model.precision import Precision
from pretrain.model.spec import ModelSpec
from pretrain.monitor.telemetry_config import TelemetryConfig
from pretrain.training.lr_schedule import LrSchedule
from pretrain.training.run import AdamW, CheckpointPolicy, Data, Evaluation, Run
from tests import triton_interpreter
from tests.cpu_times import fill_cache
from tests.tiny_corpus import write_corpus

ROOT = Path(__file__).resolve().parents[1]

# Left over from a torchrun, a batch job or a developer's shell, each of these changes what a test
# sees: a rank that waits for peers, a traceback where one line is expected, a metric sent away.
FOREIGN_PREFIXES = ("HYDRA_", "SLURM_", "TORCHELASTIC_", "NCCL_", "GLOO_", "WANDB_", "NVTE_")
FOREIGN_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
OURS = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "offline",
    "MPLBACKEND": "Agg",
}

TOGETHER = ("tests/chaos/",)
"""Folders that one worker runs: their files share a run of half a minute (chaos/conftest.py)."""

# One dense and three MoE layers: every part of the architecture, few enough parameters for seconds.
TINY_MODEL: Mapping[str, int | float] = {
    "num_layers": 4,
    "num_dense_layers": 1,
    "hidden_size": 64,
    "dense_ffn_size": 160,
    "num_routed_experts": 8,
    "num_experts_per_token": 4,
    "num_shared_experts": 1,
    "expert_ffn_size": 32,
    "num_expert_groups": 4,
    "num_groups_per_token": 2,
    "routed_scaling": 2.5,
    "num_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_size": 16,
    "qk_rope_head_size": 8,
    "v_head_size": 16,
    "vocab_size": 512,
    "max_context_tokens": 256,
    "num_mtp_layers": 1,
    "init_std": 0.02,
}


@pytest.fixture(scope="session", autouse=True)
def clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Remove variables of launchers and of the developer's shell; forbid the network.

    Yields the cache, in which this CPU's times stand: no run of a test measures it. Of the session,
    since fixtures of a session or a module start runs, too.
    """
    cache = tmp_path_factory.mktemp("cache")
    fill_cache(cache)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        for name in list(os.environ):
            if name in FOREIGN_NAMES or name.startswith(FOREIGN_PREFIXES):
                monkeypatch.delenv(name)
        for name, value in OURS.items():
            monkeypatch.setenv(name, value)
        yield cache


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, where it is there
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Return what gives files to workers as `--dist loadfile` does, those of a folder together."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling  # only where workers are asked for

    class FilesTogether(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    return FilesTogether(config, log)


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is none, and say so."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch  # only where GPU tests were collected: it costs seconds

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none here"))


def pytest_collection_finish() -> None:
    """Collect garbage seldom, and never look at what was imported: a tenth of all tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared corpus of two domains (tests/tiny_corpus.py)."""
    return write_corpus(tmp_path_factory.mktemp("corpora"))


def tiny_curriculum(tokens: int = 1_000_000, *, sequences: int = 8, **changes: Any) -> Curriculum:
    """Return a curriculum of one stage in windows of 64, as the corpus has its domains."""
    stage = Stage(tokens=tokens, window_tokens=64, global_sequences=sequences, **changes)
    return Curriculum(stages={"only": stage}, max_epochs=100.0)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    """Yield two local gloo ranks; they start with the first call and serve all of a worker."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    """Yield four local gloo ranks, as `two_ranks`."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def no_rank() -> Iterator[ProcessPoolExecutor]:
    """Yield a process that is no rank, and so may imagine to be any (parallel/imagined.py)."""
    with ProcessPoolExecutor(
        1, mp_context=fork_context(), initializer=enter_fork, initargs=(dict(os.environ),)
    ) as pool:
        yield pool


@pytest.fixture(scope="session")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """Yield a process in which Triton interprets kernels (tests/triton_interpreter.py)."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=triton_interpreter.start) as pool:
        yield pool


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Call a test marked `interpreted` in the interpreter's process instead of here."""
    if pyfuncitem.get_closest_marker("interpreted") is None:
        return None
    pool = pyfuncitem._request.getfixturevalue("interpreter")
    function = pyfuncitem.obj
    names = inspect.signature(function).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    name = function.__name__
    pool.submit(triton_interpreter.call, function.__module__, name, arguments).result()
    return True


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make this process a world of one gloo rank, for the rest of the test run."""
    # Imported only where ranks are needed: it costs seconds.
    import torch
    from torch._C._distributed_c10d import FileStore

    from parallel.groups import join_world, leave_world

    torch.set_num_threads(1)  # as each of two ranks has; more only costs time at these sizes
    store = FileStore(str(tmp_path_factory.mktemp("world") / "store"), 1)
    yield join_world(store=store, rank=0, num_ranks=1)
    leave_world()


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Return what makes a run of a model of four layers, for a layout.

    `spec` changes sizes of the model, `micro` the sequences of a micro-batch; `bf16`, `bias` and
    `overlap` choose those variants; other words replace whole fields of the run.
    """

    def make(
        layout: Layout | None = None,
        *,
        spec: Mapping[str, Any] | None = None,
        micro: int = 2,
        bf16: bool = False,
        bias: bool = False,
        overlap: bool = False,
        **changes: Any,
    ) -> Run:
        balance = LoadBalance(kind="bias", bias_update_rate=1e-3) if bias else LoadBalance()
        run = Run(
            name="tiny",
            output_root=tmp_path_factory.mktemp("runs"),
            seed=1,
            mtp_loss_weight=0.3,
            model=ModelSpec(**{**TINY_MODEL, **(spec or {})}),
            layout=layout or Layout(),
            precision=Precision(kind="bf16" if bf16 else "fp32"),
            load_balance=balance,
            # 20,000 parameters in a bucket: several buckets, as in every real run
            optimizer=AdamW(lr=1e-3, overlap=overlap, bucket_parameters=20_000),
            lr_schedule=LrSchedule(warmup_tokens=0, decay_tokens=0, final_ratio=1.0),
            curriculum=tiny_curriculum(),
            micro_batch_tokens=64 * micro,
            data=Data(corpus=tiny_corpus),
            evaluation=Evaluation(
                interval_steps=0, windows_per_domain=4, final_windows_per_domain=4
            ),
            checkpoints=CheckpointPolicy(interval_steps=0, keep=2),
            telemetry=TelemetryConfig(),
        )
        return replace(run, **changes)

    return make
