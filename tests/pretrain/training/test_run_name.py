"""Which names and places are refused before they become a folder?"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pretrain.training.run import Data, Run, Storage
from pretrain.training.run_name import check_run_name

REFUSED = [
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "a/../b",
    "../a",
    "a..b",
    "/etc",
    "a/b/c",
    "a//b",
    "a/",
    "/a",
    "a b",
    "a\nb",
    "a\x00b",
    "$(touch x)",
    "`id`",
    "a;b",
    "a|b",
    "a&b",
    "a'b",
    'a"b',
    "a\\b",
    "a*",
    "~a",
    "a:b",
    "\u7f16",
    "a\u202eb",
    "a\u0661",
    "a" * 129,
    f"a/{'b' * 129}",
]


@pytest.mark.parametrize("name", REFUSED, ids=repr)
def test_a_name_that_is_no_plain_folder_is_refused(tiny_run: Callable[..., Run], name: str) -> None:
    with pytest.raises(ValueError, match=r"name=.* given, allowed: letters, digits"):
        replace(tiny_run(), name=name)


@pytest.mark.parametrize(
    "name", ["a", "axk1", "2026-11-22", "a.1", "lr=1e-3,2e-3", "a+b_c", "first/layout=a", "a" * 128]
)
def test_a_plain_name_is_taken(tiny_run: Callable[..., Run], name: str) -> None:
    run = replace(tiny_run(), name=name)
    assert run.folder.relative_to(run.output_root) == Path(name)


def test_a_name_that_holds_a_secret_is_refused_without_saying_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STORE_TOKEN", "abcd1234efgh")
    with pytest.raises(ValueError, match="holds a secret") as caught:
        check_run_name("run-abcd1234efgh")
    assert "abcd1234efgh" not in str(caught.value)


@pytest.mark.parametrize("character", ["\x00", "\n", "\r", "\x1b", "\x7f"], ids=repr)
def test_a_place_with_control_characters_is_refused_by_its_key(
    tiny_run: Callable[..., Run], character: str
) -> None:
    run, place = tiny_run(), Path(f"a{character}b")
    changes = {
        "output_root": {"output_root": place},
        "initial_weights": {"initial_weights": place},
        "data.corpus": {"data": Data(corpus=place)},
        "data.train": {"data": Data(corpus=Path("a"), train=f"s3://{place}")},
        "data.storage.cache_folder": {
            "data": Data(corpus=Path("a"), storage=Storage(cache_folder=place))
        },
    }
    for key, change in changes.items():
        with pytest.raises(ValueError, match=f"^{key}=.* given, allowed: a path without"):
            replace(run, **change)  # type: ignore[arg-type]  fields of it
