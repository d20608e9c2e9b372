"""Do import_hf.py, export_hf.py and score.py do what they say, and lose nothing when they cannot?

Commands run in this process, as `python launch/...` would run them; what they compare with
transformers runs in a process of its own, as always.
"""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from data.tokenizer.bpe import BpeConfig, save_tokenizer, train_bpe
from launch.compose import run
from pretrain.training.start import USER_ERRORS
from tests.pretrain.serving import oracle, twin

ROOT = Path(__file__).resolve().parents[2]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
GATE = "model.layers.2.mlp.experts.3.gate_proj.weight"
SPEC = twin.tiny_spec(vocab_size=300)

Command = Callable[..., int]


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_bpe([path.read_text() for path in [Path(__file__)]], config=BPE), path)
    return path


BPE = BpeConfig(vocab_size=300, num_reserved=14)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: Path) -> Path:
    """Return a folder as on the hub: bf16, in shards, router bias in fp32, a tokenizer."""
    folder = tmp_path_factory.mktemp("hub") / "model"
    oracle.make_hub(folder, SPEC, router_bias=True, dtype=torch.bfloat16, max_shard_size="400KB")
    shutil.copy(tokenizer_json, folder)
    return folder


@pytest.fixture(scope="module")
def imported(hub: Path) -> Path:
    """Return the folder's checkpoint."""
    output = hub.parent / "imported"
    arguments = sys.argv
    sys.argv = ["import_hf.py", f"checkpoint={hub}", f"output={output}"]
    try:
        assert run(importlib.import_module("launch.import_hf").main, user_errors=USER_ERRORS) == 0
    finally:
        sys.argv = arguments
    return output


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return what runs a command in this process and gives its exit code."""

    def call(name: str, **keys: object) -> int:
        monkeypatch.setattr(sys, "argv", [name, *(f"{key}={keys[key]}" for key in keys)])
        main = importlib.import_module(f"launch.{name}").main
        return run(main, user_errors=USER_ERRORS)

    return call


@pytest.fixture
def refuse(command: Command, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return what runs a command and gives the message of its refusal."""

    def call(name: str, **keys: object) -> str:
        assert command(name, **keys) == 2
        [message] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        return message

    return call


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def test_there_and_back_no_bit_changes(
    hub: Path, imported: Path, tmp_path: Path, command: Command
) -> None:
    assert command("export_hf", checkpoint=imported, output=tmp_path / "back") == 0

    before, after = tensors(hub), tensors(tmp_path / "back")
    unused = after.pop("model.layers.0.post_mlp_layernorm.weight")
    assert torch.equal(unused, torch.ones_like(unused))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {t.dtype for n, t in after.items() if n.endswith("bias")} == {torch.float32}
    same = (hub / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == same


@pytest.mark.parametrize("dtype", [pytest.param("bf16", marks=pytest.mark.slow), "fp32"])
def test_transformers_finds_nothing_missing_and_nothing_unexpected(
    imported: Path, tmp_path: Path, command: Command, dtype: str
) -> None:
    keys = {"dtype": dtype, "shard_bytes": 300_000}
    assert command("export_hf", checkpoint=imported, output=tmp_path / "hf", **keys) == 0

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)

    report = loaded[1]
    assert not any(report.values()), report
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3


@pytest.mark.slow
def test_fp8_is_smaller_and_the_same_model(tmp_path: Path, command: Command) -> None:
    spec = twin.tiny_spec(hidden_size=128, expert_ffn_size=128, vocab_size=300)
    oracle.make_hub(tmp_path / "hub", spec)
    assert command("import_hf", checkpoint=tmp_path / "hub", output=tmp_path / "ours") == 0
    places = {"checkpoint": tmp_path / "ours", "output": tmp_path / "fp8"}

    assert command("export_hf", **places, dtype="fp8") == 0  # compares logits with transformers

    kinds = {name: t.dtype for name, t in tensors(tmp_path / "fp8").items()}
    assert kinds[GATE] == torch.float8_e4m3fn
    assert kinds[f"{GATE}_scale_inv"] == torch.float32
    assert kinds["model.layers.2.mlp.gate.weight"] == torch.bfloat16
    again = {"checkpoint": tmp_path / "fp8", "output": tmp_path / "again"}
    assert command("import_hf", **again) == 0


def test_a_run_is_exported_with_chat_tokens_and_every_stop_id(
    tiny_corpus: Path, tmp_path: Path, command: Command
) -> None:
    places = {"data.corpus": tiny_corpus, "output_root": tmp_path, "name": "r"}
    train(places)

    keys = {"checkpoint": tmp_path / "r", "output": tmp_path / "hf", "mtp": "true"}
    assert command("export_hf", **keys) == 0

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    ends = [tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|endoftext|>")]
    assert GenerationConfig.from_pretrained(tmp_path / "hf").eos_token_id == ends
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
    )
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert "model.layers.2.eh_proj.weight" in tensors(tmp_path / "hf")


def train(places: dict[str, Any]) -> None:
    """Train two steps of a small model with MTP."""
    from tests.launch.conftest import SMALL, STEP_TOKENS, TOKENS

    words = [*SMALL, *(f"{key}={value}" for key, value in places.items())]
    done = subprocess.run(
        [sys.executable, "launch/pretrain.py", *words, f"{TOKENS}={2 * STEP_TOKENS}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_an_export_that_is_not_the_model_is_no_success(
    imported: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_hub = importlib.import_module("pretrain.serving.to_hub")
    honest = to_hub.pieces

    def exchanged(weight: Any, stored: Any) -> Iterator[torch.Tensor]:
        for piece in honest(weight, stored):
            yield piece.flip(0) if weight.planned[0].name == GATE else piece

    monkeypatch.setattr(to_hub, "pieces", exchanged)
    with pytest.raises(Exception, match=GATE.replace(".", r"\.")):
        command("export_hf", checkpoint=imported, output=tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow
def test_a_killed_export_goes_on(imported: Path, tmp_path: Path) -> None:
    output, writing = tmp_path / "hf", tmp_path / ".writing_hf"
    places = [f"checkpoint={imported}", f"output={output}", "shard_bytes=100_000"]
    words = [sys.executable, "launch/export_hf.py", *places]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE) as first:
        deadline = time.monotonic() + 60
        while not list(writing.glob("model-0000*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    whole = {path: os.stat(path).st_mtime_ns for path in writing.glob("model-0000*")}
    assert whole
    assert not output.exists()

    subprocess.run(words, cwd=ROOT, check=True, capture_output=True)

    kept = {path: os.stat(output / path.name).st_mtime_ns for path in whole}
    assert kept == whole
    assert not writing.exists()


def damaged(hub: Path, folder: Path) -> Path:
    shutil.copytree(hub, folder)
    return folder


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> str:
    """Change one tensor of a folder (None: drop it from its file); return its file's name."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = index["weight_map"][name]
    state = load_file(folder / file)
    changed = change(state.pop(name))
    save_file(state | ({} if changed is None else {name: changed}), folder / file)
    return str(file)


def cut_short(folder: Path) -> list[str]:
    path = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(path, path.stat().st_size - 100)
    return [path.name, "cut short"]


def drop_tensor(folder: Path) -> list[str]:
    return [change_tensor(folder, GATE, lambda _: None), GATE]


def reshape_tensor(folder: Path) -> list[str]:
    change_tensor(folder, GATE, lambda t: t[:-1].contiguous())
    return [str(folder), GATE, "shape"]


def round_bias(folder: Path) -> list[str]:
    change_tensor(folder, BIAS, lambda t: t.bfloat16())
    return [BIAS, "bfloat16", "float32"]


def other_type(folder: Path) -> list[str]:
    change_config(folder, model_type="deepseek_v3")
    return ["config.json", "deepseek_v3", "axk1"]


def other_vocabulary(folder: Path) -> list[str]:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["<|one too many|>"] = 300
    path.write_text(json.dumps(tokenizer))
    return ["tokenizer.json", "301", "vocab_size=300"]


def no_config(folder: Path) -> list[str]:
    (folder / "config.json").unlink()
    return [str(folder), "config.json"]


def change_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        drop_tensor,
        reshape_tensor,
        round_bias,
        other_type,
        other_vocabulary,
        no_config,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_bad_folder_is_not_imported(
    hub: Path, tmp_path: Path, refuse: Callable[..., str], damage: Callable[[Path], list[str]]
) -> None:
    folder = damaged(hub, tmp_path / "bad")
    named = damage(folder)

    message = refuse("import_hf", checkpoint=folder, output=tmp_path / "out")

    assert all(word in message for word in named), message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("name", ["import_hf", "export_hf"])
def test_an_output_that_exists_is_never_touched(
    name: str, imported: Path, hub: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "out").mkdir()
    source = hub if name == "import_hf" else imported
    assert "exists" in refuse(name, checkpoint=source, output=tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_that_is_no_checkpoint_is_not_exported(
    hub: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    message = refuse("export_hf", checkpoint=hub, output=tmp_path / "out")
    assert str(hub) in message
    assert "manifest.json" in message


@pytest.mark.parametrize("part", ["tokenizer", "weights"])
def test_a_checkpoint_that_was_damaged_is_not_exported(
    imported: Path, tmp_path: Path, refuse: Callable[..., str], part: str
) -> None:
    folder = damaged(imported, tmp_path / "bad")
    name = "hugging_face/tokenizer.json" if part == "tokenizer" else "__0_1.distcp"
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    assert name in refuse("export_hf", checkpoint=folder, output=tmp_path / "out")


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"ids": np.zeros((1, 4), int)}, ["input_ids"]),
        ({"input_ids": np.zeros(4, int)}, ["input_ids", "(4,)"]),
        ({"input_ids": np.zeros((1, 4))}, ["input_ids", "float64"]),
        ({"input_ids": np.full((1, 4), 300)}, ["300", "299"]),
        ({"input_ids": np.zeros((1, 4), int), "labels": np.zeros((1, 3), int)}, ["labels"]),
        ({"input_ids": np.zeros((1, 999), int)}, ["999", "128"]),
    ],
    ids=["no_ids", "one_dimension", "floats", "unknown_id", "short_labels", "too_long"],
)
def test_a_bad_batch_is_not_scored(
    imported: Path, tmp_path: Path, arrays: dict[str, Any], named: list[str]
) -> None:
    from pretrain.serving.score_job import read_batch

    np.savez(tmp_path / "batch.npz", **arrays)
    with pytest.raises(ValueError, match=r"batch\.npz") as refusal:
        read_batch(tmp_path / "batch.npz", vocab_size=300, max_tokens=128, data_ranks=1)
    assert all(word in str(refusal.value) for word in named), refusal.value


@pytest.mark.slow
def test_a_checkpoint_and_its_export_score_alike(
    hub: Path, imported: Path, tmp_path: Path, command: Command
) -> None:
    np.savez(tmp_path / "batch.npz", input_ids=np.arange(64).reshape(2, 32))
    for name, folder in (("ours", imported), ("theirs", hub)):
        keys = {"input": tmp_path / "batch.npz", "output": tmp_path / f"{name}.npz"}
        assert command("score", checkpoint=folder, **keys) == 0
    with (
        np.load(tmp_path / "ours.npz", allow_pickle=False) as ours,
        np.load(tmp_path / "theirs.npz", allow_pickle=False) as theirs,
    ):
        assert sorted(ours) == sorted(theirs)
        assert all(np.array_equal(ours[key], theirs[key]) for key in ours)
