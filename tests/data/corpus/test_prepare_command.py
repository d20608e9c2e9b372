"""The command `launch/prepare.py` and its configuration file, from an empty folder elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED = ROOT.parent / "shared" / "data" / "text"


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_configuration_file_says_what_the_dataclass_says() -> None:
    from hydra import compose, initialize_config_dir

    from data.corpus.prepare_config import PrepareConfig
    from launch.compose import build

    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = build(PrepareConfig, compose("prepare"))

    default = PrepareConfig()
    manual = {"man": config.sources["man"]}
    assert config.sources["python"] == default.sources["python"]
    assert manual["man"].max_bytes == default.sources["man"].max_bytes
    assert config == PrepareConfig(sources={**default.sources, **manual})


def test_the_command_prepares_what_it_is_given(tmp_path: Path) -> None:
    rows = [json.dumps({"q": f"question {n * 7919}", "a": f"answer {n * n}"}) for n in range(300)]
    (tmp_path / "mine.jsonl").write_text("\n".join(rows))

    done = command(
        tmp_path,
        "output=out",
        "vocab_size=300",
        "~sources.python",
        "~sources.man",
        "+sources.mine.kind=jsonl",
        "+sources.mine.path=mine.jsonl",
        "+sources.mine.fields=[q,a]",
    )

    assert done.returncode == 0, done.stderr
    assert "mine" in done.stdout
    assert "next: python launch/pretrain.py" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.jsonl", "out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vocab_size=5"], "vocab_size=5; allowed"),
        (["sources.man.max_byte=1"], "sources.man.max_byte"),
        (["+sources.mine.kind=jsonl", "+sources.mine.path=nope"], "sources.mine.path=nope"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    tmp_path: Path, words: list[str], message: str
) -> None:
    done = command(tmp_path, "output=out", *words)

    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data/text is not beside the repository")
def test_the_shared_texts_are_prepared_whole(tmp_path: Path) -> None:
    done = command(
        tmp_path,
        "output=out",
        "~sources.python",
        "~sources.man",
        "+sources.math.kind=jsonl",
        f"+sources.math.path={SHARED / 'gsm8k_train.jsonl'}",
        "+sources.math.fields=[question,answer]",
        "+sources.chat.kind=csv",
        f"+sources.chat.path={SHARED / 'chatbot_ko.csv'}",
        "+sources.chat.fields=[Q,A]",
    )

    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    documents = {
        name: sum(manifest["splits"][split][name]["documents"] for split in manifest["splits"])
        + manifest["intake"][name]["duplicates"]
        for name in ("chat", "math")
    }
    rows = len((SHARED / "gsm8k_train.jsonl").read_text("utf-8").splitlines())
    assert documents["math"] == rows
    assert documents["chat"] > 11_000
    assert manifest["intake"]["chat"]["undecodable"] == 0
