"""Each key of a configuration, changed in turn, meets with what its class says."""

import copy
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parallel.cluster import Cluster
from pretrain.checkpoint.continuity import check_same_model, check_same_run, find_differences
from pretrain.checkpoint.key_classes import KEY_CLASS
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.model.precision import Precision
from pretrain.training.change import Change
from pretrain.training.run import Run, as_json

MakeRun = Callable[..., Run]
FOLDER = Path("step_00000001")
MINE, OTHER = "a" * 64, "b" * 64
OF_FP8 = [name for name in Precision.__slots__ if KEY_CLASS[f"precision.{name}"] == "identity"][2:]


@pytest.fixture
def config(tiny_run: MakeRun) -> dict[str, Any]:
    """Return the configuration of a run with every group there is."""
    cluster = Cluster(
        name="one",
        num_nodes=1,
        gpus_per_node=1,
        gpu_memory_bytes=1,
        node_link_bytes_per_s=1,
        network_bytes_per_s=1,
    )
    return as_json(replace(tiny_run(), cluster=cluster))


def at(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Return the group that holds a key, and the key's own name."""
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    return config, name


def another(value: Any) -> Any:
    """Return a value that is not this one, of the same kind where there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, list):
        return [*value, "x"]
    return {**value, "x": 1} if isinstance(value, dict) else "x"


def changed(config: dict[str, Any], key: str) -> dict[str, Any]:
    given = copy.deepcopy(config)
    group, name = at(given, key)
    group[name] = another(group[name])
    return given


def allowing(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {**config, "change": {"reason": "why", "skip": [], "allow": list(keys)}}


def check(
    saved: dict[str, Any], given: dict[str, Any], *, corpus: str = MINE, windows: str = MINE
) -> None:
    check_same_run(
        Manifest(
            step=1,
            sequences=8,
            tokens=512,
            tokenizer_digest=MINE,
            config=saved,
            versions={},
            files={},
        ),
        folder=FOLDER,
        config=given,
        tokenizer_digest=corpus,
        windows_digest=windows,
    )


def test_a_run_goes_on_from_its_own_checkpoint(config: dict[str, Any]) -> None:
    check(config, copy.deepcopy(config))


@pytest.mark.parametrize("key", KEY_CLASS)
def test_a_key_that_was_changed_meets_with_what_its_class_says(
    key: str, config: dict[str, Any]
) -> None:
    given = changed(config, key)
    group, name = at(config, key)
    old = group[name]
    if KEY_CLASS[key] in ("ledger", "run-time"):
        check(config, given)
        return
    with pytest.raises(CheckpointError) as refusal:
        check(config, given)
    said = str(refusal.value)
    assert f"step_00000001 has {key}={old}, {key}={another(old)} given" in said
    assert f"set {key}={'null' if old is None else old}" in said
    if KEY_CLASS[key] == "identity":
        assert "or choose another name" in said
        assert "change.allow" not in said
        with pytest.raises(CheckpointError, match=re.escape(f"has {key}=")):
            check(config, allowing(given, key))  # no allowance helps
    else:
        assert f"change.allow=[{key}] and change.reason" in said
        check(config, allowing(given, key))
        with pytest.raises(CheckpointError, match=re.escape(f"has {key}=")):
            check(config, allowing(given, "optimizer.something_else"))


@pytest.mark.parametrize("key", [key for key, which in KEY_CLASS.items() if which == "schedule"])
def test_an_allowance_is_used_up_by_the_first_checkpoint_under_the_new_value(
    key: str, config: dict[str, Any]
) -> None:
    given = changed(config, key)
    check(config, allowing(given, key))
    saved = allowing(given, key)  # what the next checkpoint holds
    check(saved, given)
    check(saved, allowing(given, key))
    with pytest.raises(CheckpointError, match=re.escape(f"has {key}=")):
        check(saved, config)  # the old value is a change now


@pytest.mark.parametrize(
    ("key", "which"),
    [
        ("seed", "identity"),
        ("model.vocab_size", "identity"),
        ("model.num_layers", "identity"),
        ("precision.kind", "identity"),
        ("load_balance.kind", "identity"),
        ("data.document_attention", "identity"),
        ("optimizer.lr", "schedule"),
        ("optimizer.clip_norm", "schedule"),
        ("lr_schedule.decay_tokens", "schedule"),
        ("mtp_loss_weight", "schedule"),
        ("curriculum.stages", "ledger"),
        ("data.train", "ledger"),
        ("layout.pp", "run-time"),
        ("exchange.dispatcher", "run-time"),
        ("checkpoints.interval_steps", "run-time"),
        ("data.reading.depth", "run-time"),
    ],
)
def test_keys_are_in_the_class_that_people_would_look_for_them(key: str, which: str) -> None:
    assert KEY_CLASS[key] == which


def test_all_keys_of_a_schedule_that_differ_are_named_at_once(config: dict[str, Any]) -> None:
    given = changed(changed(config, "optimizer.lr"), "mtp_loss_weight")
    with pytest.raises(CheckpointError, match=r"change\.allow=\[mtp_loss_weight,optimizer\.lr\]"):
        check(config, given)
    with pytest.raises(CheckpointError, match=r"change\.allow=\[mtp_loss_weight\]"):
        check(config, allowing(given, "optimizer.lr"))


@pytest.mark.parametrize("key", [key for key, which in KEY_CLASS.items() if which == "run-time"])
def test_a_checkpoint_that_is_older_than_a_free_key_is_gone_on_with(
    key: str, config: dict[str, Any]
) -> None:
    older = copy.deepcopy(config)
    group, name = at(older, key)
    del group[name]
    check(older, config)


@pytest.mark.parametrize(
    "key",
    ["data.document_attention", "initial_weights", *(f"precision.{name}" for name in OF_FP8)],
)
def test_a_checkpoint_that_is_older_than_the_key_means_what_there_was(
    key: str, config: dict[str, Any]
) -> None:
    older = copy.deepcopy(config)
    group, name = at(older, key)
    del group[name]
    check(older, config)
    with pytest.raises(CheckpointError, match=re.escape(f"{key}=")):
        check(older, changed(config, key))


def test_a_key_whose_absence_has_no_meaning_is_refused(config: dict[str, Any]) -> None:
    older = copy.deepcopy(config)
    del older["optimizer"]["clip_norm"]
    with pytest.raises(CheckpointError, match=r"optimizer\.clip_norm=nothing \(no such key\)"):
        check(older, config)
    check(older, allowing(config, "optimizer.clip_norm"))


def test_a_key_that_only_other_code_knows_wants_an_allowance_or_that_code(
    config: dict[str, Any],
) -> None:
    newer = copy.deepcopy(config)
    newer["optimizer"]["later"] = 2
    with pytest.raises(CheckpointError, match=r"has optimizer\.later=2, .*use the code that wrote"):
        check(newer, config)
    check(newer, allowing(config, "optimizer.later"))
    newer["model"]["later"] = 2
    with pytest.raises(CheckpointError, match=r"has model\.later=2, .*choose another name"):
        check(newer, allowing(config, "optimizer.later", "model.later"))


def test_a_group_that_is_null_is_no_key_of_its_own(config: dict[str, Any]) -> None:
    without = {**config, "cluster": None}
    assert find_differences(without, config) == find_differences(config, without) == []


@pytest.mark.parametrize(
    ("corpus", "windows"), [(OTHER, OTHER), (MINE, OTHER), (OTHER, MINE)], ids=str
)
def test_another_tokenizer_is_refused_with_all_three_digests(
    corpus: str, windows: str, config: dict[str, Any]
) -> None:
    with pytest.raises(CheckpointError, match=r"data\.corpus.*or choose another name") as refusal:
        check(config, config, corpus=corpus, windows=windows)
    assert (
        f"tokenizers: {corpus[:12]} of the corpus, {windows[:12]} of its training windows,"
        f" {MINE[:12]} of the checkpoint"
    ) in str(refusal.value)


def test_weights_alone_may_be_extended_and_their_schedule_is_nobodys_business(
    config: dict[str, Any],
) -> None:
    given = changed(changed(config, "model.max_context_tokens"), "optimizer.lr")
    manifest = Manifest(
        step=1, sequences=8, tokens=512, tokenizer_digest=MINE, config=config, versions={}, files={}
    )
    check_same_model(manifest, folder=FOLDER, config=given, tokenizer_digest=MINE)
    with pytest.raises(CheckpointError, match=r"have model\.num_heads=4, model\.num_heads=5"):
        check_same_model(
            manifest,
            folder=FOLDER,
            config=changed(config, "model.num_heads"),
            tokenizer_digest=MINE,
        )


@pytest.mark.parametrize(
    ("key", "which"),
    [("model.num_layers", "identity"), ("data.corpus", "ledger"), ("layout.tp", "run-time")],
)
def test_an_allowance_of_another_class_is_refused_when_it_is_written(key: str, which: str) -> None:
    with pytest.raises(ValueError, match=rf"{key} is of the class {which}.*optimizer\.lr"):
        Change(reason="why", allow=(key,))
