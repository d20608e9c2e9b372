"""Do transformers and vLLM answer from our export as transformers computes it, over HTTP too?

    python tests/serve/serve_check.py [--json FILE] [--folder DIR] [--venv DIR]

Trains a small model with A.X K1's own latent sizes (vLLM has its MLA kernels for these alone, and
the path without them is not the one that serves A.X K1), exports it, and compares: greedy tokens
and log-probabilities of transformers and vLLM in fp32, then the chat answers of vLLM's OpenAI
server and of `transformers serve`, with and without thinking. Exit code 1 if anything differs.

Both servers live in .venv-serve, made on the first call: about 3.5 GB, one to five minutes.
"""

# ruff: noqa: E402  the line that puts the root on sys.path comes before our imports

import argparse
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.chat.template import THINK_END, THINK_START
from tests.serve.environment import VLLM_ENVIRONMENT, serving_python
from tests.serve.greedy import MAX_MODEL_TOKENS, as_shipped, compare, from_transformers, from_vllm
from tests.serve.processes import ServeError, free_port, run_logged, serving
from tests.serve.replies import prompt_ids, transformers_replies, vllm_replies
from tests.serve.rows import Row, format_rows

NAME = "serve_check"
RUNS = ROOT / "runs"
LOGS = RUNS / f"{NAME}_logs"
CORPUS = RUNS / "corpus" / "demo"
MODEL = "axk1"  # the name that vLLM serves it by
NUM_NEW_TOKENS = 24
START_TIMEOUT_S = 240
MLA_SIZE = 576  # kv_lora_rank + qk_rope_head_size of A.X K1, which vLLM's MLA is compiled for
# A.X K1's sizes of MLA, the rest small. With latents this wide the demo's learning rate diverges.
# A router bias, because its fp32 values are what exports lose most often.
TRAINING = (
    "model=axk1_tiny",
    "model.q_lora_rank=1536",
    "model.kv_lora_rank=512",
    "model.qk_nope_head_size=128",
    "model.qk_rope_head_size=64",
    "model.v_head_size=128",
    "load_balance=bias",
    "optimizer.lr=1e-3",
    "curriculum=plain",
    "curriculum.stages.all.tokens=81920",
    "lr_schedule.warmup_tokens=8192",
    "lr_schedule.decay_tokens=40960",
    "evaluation.final_windows_per_domain=4",
    "telemetry=offline",
)
TEXTS = (
    "def main(",
    "The file is",
    "\ub3c4\uc6c0\ub9d0\uc744 \ubcf4\uc5ec\uc8fc\uace0",
    "\uc774 \uba85\ub839\uc740 \ud30c\uc77c\uc744 \uc77d\uace0, 1234",
    "import os\n\n\nclass Loader:\n    def read(self, path):\n        return open(path).read()\n"
    * 5,
)


def export(progress: Callable[[str], None]) -> Path:
    """Train a small checkpoint and return the folder that it was exported to.

    Raises:
        ServeError: if preparing, training or exporting fails.
    """
    run, folder = RUNS / NAME, RUNS / f"{NAME}_hf"
    if not (CORPUS / "manifest.json").is_file():
        progress("preparing the demo corpus")
        launched("prepare.py", f"output={CORPUS}")
    for old in (run, folder):
        shutil.rmtree(old, ignore_errors=True)
    progress("training a small model with A.X K1's latent sizes, about a minute")
    places = (f"name={NAME}", f"output_root={RUNS}", f"data.corpus={CORPUS}")
    launched("pretrain.py", *places, *TRAINING)
    progress("exporting it")
    launched("export_hf.py", f"checkpoint={run}", f"output={folder}")
    return folder


def launched(file: str, *words: str) -> None:
    """Run a launch file to its end."""
    run_logged(
        [sys.executable, ROOT / "launch" / file, *words],
        log=LOGS / f"{Path(file).stem}.log",
        timeout_s=900,
        folder=ROOT,
    )


def rows_of(
    folder: Path, *, python: Path, progress: Callable[[str], None]
) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each part of the check, as it is done.

    Args:
        folder: the Hugging Face folder.
        python: of the serving environment.
        progress: told what is done next.

    Raises:
        ServeError: if a child or a server fails.
    """
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    prompts.append(prompt_ids(tokenizer, {"enable_thinking": True}))
    environment = vllm_environment(folder)
    mla = "VLLM_MLA_DISABLE" not in environment
    progress(f"transformers {transformers.__version__}: {len(prompts)} prompts, greedy, fp32")
    reference = from_transformers(folder, prompts, num_new_tokens=NUM_NEW_TOKENS)
    for native in (True, False):
        progress(f"vLLM: the same, {'plain rotary embedding' if native else 'as shipped'}")
        vllm = from_vllm(
            folder,
            prompts,
            num_new_tokens=NUM_NEW_TOKENS,
            native_rotary=native,
            python=python,
            environment=environment,
            logs=LOGS,
        )
        yield tuple(compare(reference, vllm, mla=mla) if native else as_shipped(reference, vllm))
    yield from replies(folder, python=python, tokenizer=tokenizer, progress=progress)


def replies(
    folder: Path, *, python: Path, tokenizer: Any, progress: Callable[[str], None]
) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of both servers, which run one after the other.

    Args:
        folder: the Hugging Face folder.
        python: of the serving environment.
        tokenizer: transformers' tokenizer of the folder.
        progress: told what is done next.

    Raises:
        ServeError: if a server fails.
    """
    port = free_port()
    progress(f"vLLM's OpenAI server on port {port}")
    with serving(
        vllm_command(folder, python=python, port=port),
        port=port,
        log=LOGS / "vllm_server.log",
        timeout_s=START_TIMEOUT_S,
        folder=LOGS,
        environment=vllm_environment(folder),
    ) as url:
        yield tuple(vllm_replies(url, model=MODEL, tokenizer=tokenizer))
    port = free_port()
    progress(f"transformers serve on port {port}")
    with serving(
        transformers_command(folder, python=python, port=port),
        port=port,
        log=LOGS / "transformers_server.log",
        timeout_s=START_TIMEOUT_S,
        folder=LOGS,
        environment={"HF_HUB_OFFLINE": "1"},
    ) as url:
        yield tuple(transformers_replies(url, folder=folder, tokenizer=tokenizer))


def vllm_environment(folder: Path) -> dict[str, str]:
    """Return vLLM's variables; other latent sizes than A.X K1's it can serve without MLA only."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    mla = config["kv_lora_rank"] + config["qk_rope_head_dim"] == MLA_SIZE
    return VLLM_ENVIRONMENT | ({} if mla else {"VLLM_MLA_DISABLE": "1"})


def vllm_command(folder: Path, *, python: Path, port: int) -> list[str]:
    """Return the command of vLLM's server; `vllm serve` looks for a package of another name."""
    marks = {"reasoning_start_str": THINK_START, "reasoning_end_str": THINK_END}
    words = f"""
        --served-model-name {MODEL} --dtype float32 --enforce-eager --attention-backend CPU_MLA
        --max-num-seqs 2 --max-model-len {MAX_MODEL_TOKENS} --reasoning-parser deepseek_v3
        --host 127.0.0.1 --port {port}
    """
    start = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    return [*start, *words.split(), "--reasoning-config", json.dumps(marks)]


def transformers_command(folder: Path, *, python: Path, port: int) -> list[str]:
    """Return the command of transformers' server, which preloads the model."""
    words = f"serve --host 127.0.0.1 --port {port} --device cpu --dtype float32"
    return [str(python.with_name("transformers")), *words.split(), str(folder)]


def machine() -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    return {
        "command": " ".join(["python", "tests/serve/serve_check.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "serving": (Path(__file__).with_name("requirements.txt").read_text("utf-8").split("\n")),
        "cores": os.cpu_count(),
    }


def parsed() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", type=Path, help="write the result here as well")
    parser.add_argument(
        "--folder", type=Path, help="check this Hugging Face folder; nothing is trained"
    )
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv-serve", help="the servers' environment"
    )
    return parser.parse_args()


def main() -> int:
    """Run the check; 0 if all holds, 1 if not."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended, too
    start = time.monotonic()

    def progress(text: str) -> None:
        print(f"{time.monotonic() - start:5.0f} s  {text}", flush=True)

    rows: list[Row] = []
    folder: Path | None = options.folder and options.folder.resolve()
    failure = next_command = ""
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
        progress(f"the servers' environment, {options.venv} (if absent: 3.5 GB, minutes)")
        python = serving_python(options.venv.absolute(), log=LOGS / "install.log")
        folder = folder or export(progress)
        if not (folder / "config.json").is_file():
            raise ServeError(f"--folder {folder} given, but it has no config.json: no export")
        for some in rows_of(folder, python=python, progress=progress):
            rows += some
        names = [f"{name}={value}" for name, value in vllm_environment(folder).items()]
        command = vllm_command(folder, python=python, port=8000)
        next_command = " ".join([*names, shlex.join(command)])
    except (ServeError, OSError) as error:
        failure = str(error)
    progress("done" if not failure else "failed")
    print(f"\n{format_rows(rows)}\n" if rows else "")
    if options.json:
        result = machine() | {"failure": failure, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    differing = [row.what for row in rows if row.verdict == "DIFFERS"]
    if failure or differing:
        said = failure or f"{len(differing)} of {len(rows)} differ: {'; '.join(differing)}"
        print(f"{said}\nlogs: {LOGS}", file=sys.stderr)
        if folder:
            print(f"next, without training anew: make serve-check ARGS='--folder {folder}'")
        return 1
    print(f"all of {len(rows)} rows hold. Next, to talk to it (port 8000):")
    print(f"  {next_command}")
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()
    sys.exit(main())
