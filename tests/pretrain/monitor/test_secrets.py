"""What counts as a secret, what does not, and how long does looking for one take?"""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.monitor.secrets import (
    guard_tracebacks,
    is_secret_name,
    scrub,
    scrubbed,
    secret_values,
)

ROOT = Path(__file__).resolve().parents[3]
HEX_40 = "0123456789abcdef0123456789abcdef01234567"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"
SCRUBBED = [
    (f"key {HEX_40} of the environment", {"WANDB_API_KEY": HEX_40}, "key *** of the environment"),
    ("ab correct-horse cd", {"DB_PASSWORD": "correct-horse"}, "ab *** cd"),
    ("a8888888 a88888889", {"B_TOKEN": "a8888888", "A_TOKEN": "a88888889"}, "*** ***"),
    ("https://me:pa@ss:w@host/a?b=c", {}, "https://***@host/a?b=c"),
    ("s3://token@host/a and ftp://u:p'w@h", {}, "s3://***@host/a and ftp://***@h"),
    ("hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345.", {}, "***."),
    (f"wandb_v1_{HEX_40}", {}, "***"),
    ("AKIAIOSFODNN7EXAMPLE", {}, "***"),
    ("x=ghp_0123456789abcdefghijABCDEFGHIJ012345", {}, "x=***"),
    ("github_pat_11ABCDEFG0abcdefghijkl_mn", {}, "***"),
    ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_X", {}, "***"),
    (f"a\n{PEM}\nb", {}, "a\n***\nb"),
    ("-----BEGIN PRIVATE KEY-----\ncut short", {}, "***"),
    (f"WANDB_API_KEY={HEX_40} python", {}, "WANDB_API_KEY=*** python"),
    (f"'wandb_api_key': '{HEX_40}', 'b': 1", {}, "'wandb_api_key': '***', 'b': 1"),
    ("+cluster.environment.MY_TOKEN=abcdefgh12", {}, "+cluster.environment.MY_TOKEN=***"),
    ("password: x1", {}, "password: ***"),
    ("https://host/a?X-Amz-Signature=abc&b=c", {}, "https://host/a?X-Amz-Signature=***&b=c"),
    ("https://h/a?sv=1&sig=ab%2Bc", {}, "https://h/a?sv=1&sig=***"),
    ("Authorization: Bearer abcdefghijklmnop", {}, "Authorization: Bearer ***"),
]


@pytest.mark.parametrize(("text", "environment", "expected"), SCRUBBED)
def test_a_secret_is_replaced_by_stars(
    text: str, environment: dict[str, str], expected: str
) -> None:
    assert scrub(text, environment=environment) == expected


LEFT_ALONE = [
    "commit 28b8ab4fa481+ and d670460b4b4aece5915caf5c68d12f560a9fe3e4",
    "sha256 70fa67cd6a7eab0caccafadd45f55df71f50c374a48fb679f7651a0b6a1c2d3e",
    f"git rev-parse gave {HEX_40}",
    "num_experts_per_token: 4",
    "seconds_per_token: 0.00012345678901",
    "model.num_experts_per_token=16777216",
    "tokenizer: runs/corpus/demo/tokenizer.json",
    "micro_batch_tokens=16777216, tokens=1099511627776",
    "end_of_document: <|end_of_document|>",
    "s3://bucket/folder/train.manifest",
    "hf://datasets/owner/name@revision/data.parquet",
    "mailto: someone@example.org",
    "hf_format.py and sk-learn and wandb_settings",
    "pretrain.serving.hf_format.spec_from_config",
    "optimizer.lr: no such key; nearest: optimizer.eps",
    "Missing key(s) in state_dict: decoder.layers.0.mlp.router.weight",
    "secret: null",
    "file:///lustre/a/b.manifest",
    "/tmp/pytest-of-me/pytest-1/a@b/c",
]


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_is_no_secret_stays_as_it_was(text: str) -> None:
    assert scrub(text, environment={}) == text


def test_our_own_configurations_and_documents_hold_nothing_that_looks_like_one() -> None:
    """Thousands of lines of real text: a pattern that is too wide shows here."""
    files = [*ROOT.glob("conf/**/*.yaml"), *ROOT.glob("docs/**/*.md")]
    assert len(files) > 50
    changed: list[str] = []
    for path in files:
        if path.name != "security.md":  # it is about them
            text = path.read_text(encoding="utf-8")
            pairs = zip(text.splitlines(), scrub(text, environment={}).splitlines(), strict=True)
            changed += [f"{path.name}: {before}" for before, after in pairs if before != after]
    assert changed == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(
            (name, True)
            for name in (
                "WANDB_API_KEY",
                "HF_TOKEN",
                "PRETRAIN_WEBHOOK_URL",
                "AWS_SECRET_ACCESS_KEY",
            )
        ),
        *((name, True) for name in ("PGPASSWORD", "CLIENT_SECRET", "API_KEY", "password")),
        *((name, True) for name in ("AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID", "DB_PASSWD_2")),
        *((name, False) for name in ("TOKENIZERS_PARALLELISM", "AWS_REGION", "KEYBOARD", "PATH")),
        *((name, False) for name in ("AWS_PROFILE", "micro_batch_tokens", "monkey", "hotkeys")),
    ],
)
def test_names_say_whether_a_value_is_secret(name: str, expected: bool) -> None:
    assert is_secret_name(name) is expected


def test_values_that_stand_everywhere_are_no_secrets_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.touch()
    environment = {
        "SHORT_TOKEN": "train",
        "EMPTY_KEY": "",
        "CACHE_KEY": "16777216",
        "GOOGLE_APPLICATION_CREDENTIALS": str(path),
        "GOOD_TOKEN": "one-that-counts",
        "LONG_KEY": "1234567890123456",
        "SLASHED_SECRET": "/+abcdefgh",
    }
    assert secret_values(environment) == ("1234567890123456", "one-that-counts", "/+abcdefgh")


def test_trees_keep_their_form_and_numbers() -> None:
    tree = {
        "data": {"train": "https://a:b@c/d", "corpus": "runs/x"},
        "environment": {"MY_API_KEY": "x", "CUDA": "1"},
        "num_experts_per_token": 4,
        "list": ["password=abc", 1.5, None, True],
        "secret": 3,
    }
    assert scrubbed(tree, environment={}) == {
        "data": {"train": "https://***@c/d", "corpus": "runs/x"},
        "environment": {"MY_API_KEY": "***", "CUDA": "1"},
        "num_experts_per_token": 4,
        "list": ["password=***", 1.5, None, True],
        "secret": 3,
    }
    assert tree["environment"]["MY_API_KEY"] == "x"  # type: ignore[index]  the given tree stays


def test_scrubbing_twice_is_scrubbing_once() -> None:
    for text, environment, expected in SCRUBBED:
        assert scrub(expected, environment=environment) == expected, text


HOSTILE = [
    "eyJ" * 340_000,
    "eyJaaaaaaaaa." * 80_000,
    "-----BEGIN PRIVATE KEY-----" * 40_000,
    "://" * 340_000,
    "://" + "@" * 1_000_000,
    "://" + "a" * 1_000_000,
    "key=" * 260_000,
    "_key : " * 150_000,
    "?" + "a-" * 500_000,
    "?token" * 170_000,
    "sk-" * 340_000,
    "bearer " * 150_000,
    "hf_" + "a" * 1_000_000,
    "a" * 1_000_000,
    " " * 1_000_000,
    "password" * 125_000,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_a_hostile_line_of_a_megabyte_takes_less_than_a_second_of_a_processor(text: str) -> None:
    began = time.process_time()
    scrub(text, environment={"A_TOKEN": "aaaaaaaab"})
    assert time.process_time() - began < 1.0


WORDS = "no answer to https://me:correct-horse@host/"
CRASH = """
import logging, sys, threading
from pretrain.monitor.secrets import guard_tracebacks, start_log
guard_tracebacks()
logging.getLogger("x").warning("%s", sys.argv[1])
start_log(level=logging.WARNING, format="%(message)s")
try:
    raise ValueError(sys.argv[1])
except ValueError:
    logging.getLogger("x").exception("with a traceback")
def fail():
    raise OSError(sys.argv[1])
thread = threading.Thread(target=fail)
thread.start()
thread.join()
raise RuntimeError(sys.argv[1])
"""


def test_a_log_and_uncaught_errors_of_every_thread_are_said_without_secrets() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, WORDS], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 1
    assert "correct-horse" not in done.stderr
    assert done.stderr.count("no answer to https://***@host/") == 4
    for kind in ("ValueError", "OSError", "RuntimeError"):
        assert f"{kind}: no answer to https://***@host/" in done.stderr


def test_a_guard_is_taken_away_again() -> None:
    before = (sys.excepthook, logging.lastResort and logging.lastResort.formatter)
    put_back = guard_tracebacks()
    assert sys.excepthook is not before[0]
    put_back()
    assert (sys.excepthook, logging.lastResort and logging.lastResort.formatter) == before
