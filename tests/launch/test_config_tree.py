from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from launch.compose import ConfigError, build, from_yaml, to_yaml


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    hidden_size: int
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.hidden_size % 2:
            raise ValueError(f"hidden_size={self.hidden_size} is odd; allowed: even numbers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    name: str
    model: Model
    backend: Literal["gloo", "nccl"] = "gloo"
    seed: int | None = None
    folder: Path = Path("runs")
    betas: tuple[float, float] = (0.9, 0.95)
    stages: tuple[Model, ...] = ()
    weights: dict[str, float] = field(default_factory=lambda: dict[str, float]())
    resume: bool = False
    batch: int | Literal["auto"] = "auto"
    teacher: Model | None = None


def tree(**changes: object) -> dict[str, object]:
    return {"name": "first", "model": {"hidden_size": 4}, **changes}


# --- build ----------------------------------------------------------------------------------------


def test_build_fills_every_kind_of_field() -> None:
    cfg = OmegaConf.create(
        tree(
            backend="nccl",
            seed=7,
            folder="elsewhere/runs",
            betas=[0.8, 1],
            stages=[{"hidden_size": 2}, {"hidden_size": 8, "rms_norm_eps": "1e-5"}],
            weights={"web": 1, "code": "3e-1"},
            resume=True,
            batch=16,
            teacher={"hidden_size": "${model.hidden_size}"},
        )
    )
    assert build(Run, cfg) == Run(
        name="first",
        model=Model(hidden_size=4),
        backend="nccl",
        seed=7,
        folder=Path("elsewhere/runs"),
        betas=(0.8, 1.0),
        stages=(Model(hidden_size=2), Model(hidden_size=8, rms_norm_eps=1e-5)),
        weights={"web": 1.0, "code": 0.3},
        resume=True,
        batch=16,
        teacher=Model(hidden_size=4),
    )


def test_build_uses_the_defaults_of_the_dataclass() -> None:
    assert build(Run, tree()) == Run(name="first", model=Model(hidden_size=4))


def test_an_int_given_for_a_float_becomes_a_float() -> None:
    eps = build(Model, {"hidden_size": 4, "rms_norm_eps": 1}).rms_norm_eps
    assert type(eps) is float


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "1e9", "+2.5e3", ".5e1", "1_000e3"])
def test_text_with_an_exponent_is_a_float(text: str) -> None:
    eps = build(Model, {"hidden_size": 4, "rms_norm_eps": text}).rms_norm_eps
    assert eps == float(text)


REFUSED = [
    pytest.param(tree(nmae="x"), ["nmae: unknown key", "nearest: name", "'x' (str)"], id="unknown"),
    pytest.param(
        tree(model={"hiden_size": 4}),
        [
            "model.hiden_size: unknown key",
            "nearest: model.hidden_size",
            "allowed here: hidden_size",
        ],
        id="unknown-nested",
    ),
    pytest.param({"name": "x"}, ["model: missing", "keys hidden_size"], id="missing-mapping"),
    pytest.param(tree(model={}), ["model.hidden_size: missing; allowed: int"], id="missing"),
    pytest.param(tree(model=None), ["model: got null", "keys hidden_size"], id="null-mapping"),
    pytest.param(tree(name="???"), ["name: no value given yet"], id="mandatory"),
    pytest.param(tree(name=3), ["name: got 3 (int); allowed: str", '"3"'], id="int-for-str"),
    pytest.param(tree(model={"hidden_size": 4.0}), ["got 4.0 (float)"], id="float-for-int"),
    pytest.param(tree(model={"hidden_size": True}), ["True (bool); allowed: int"], id="bool-int"),
    pytest.param(
        tree(model={"hidden_size": 4, "rms_norm_eps": True}),
        ["model.rms_norm_eps: got True (bool); allowed: float"],
        id="bool-for-float",
    ),
    pytest.param(
        tree(model={"hidden_size": 4, "rms_norm_eps": "0.1"}), ["'0.1' (str)"], id="text-for-float"
    ),
    pytest.param(tree(resume=1), ["resume: got 1 (int); allowed: bool"], id="int-for-bool"),
    pytest.param(
        tree(backend="mpi"), ["backend: got 'mpi' (str)", "one of 'gloo', 'nccl'"], id="choice"
    ),
    pytest.param(tree(seed="x"), ["seed: got 'x' (str); allowed: int or null"], id="optional"),
    pytest.param(tree(batch="all"), ["batch: got 'all'", "int or one of 'auto'"], id="union"),
    pytest.param(tree(folder=""), ["folder: got '' (str); allowed: a path, not empty"], id="path"),
    pytest.param(tree(betas=[0.9]), ["betas: got [0.9] (list)", "list of 2"], id="length"),
    pytest.param(tree(betas=[0.9, "x"]), ["betas[1]: got 'x' (str); allowed: float"], id="item"),
    pytest.param(tree(stages="ab"), ["stages: got 'ab' (str); allowed: a list of"], id="text-list"),
    pytest.param(
        tree(stages=[{"hidden_size": 3}]), ["stages[0]: hidden_size=3 is odd"], id="post-init-item"
    ),
    pytest.param(tree(weights={"web": "x"}), ["weights.web: got 'x'"], id="dict-value"),
    pytest.param(tree(weights={1: 1.0}), ["weights.1: key 1 (int)"], id="dict-key"),
    pytest.param(tree(weights=[1]), ["weights: got [1] (list)", "a mapping from names"], id="dict"),
    pytest.param(tree(teacher={"hidden_size": "x"}), ["teacher.hidden_size: got 'x'"], id="inside"),
    pytest.param(
        tree(model={"hidden_size": 4, "_target_": "os.system"}),
        ["model._target_: got 'os.system'", "no _target_ anywhere"],
        id="target",
    ),
    pytest.param(tree(stages=[{"_target_": "x"}]), ["stages[0]._target_"], id="target-in-list"),
    pytest.param(tree(name="${nope}"), ["name: Interpolation key 'nope' not found"], id="dangling"),
]


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_build_refuses_by_key_what_was_given_and_what_is_allowed(
    values: Mapping[str, object], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        build(Run, OmegaConf.create(dict(values)))
    assert [part for part in said if part not in str(refused.value)] == []


def test_all_missing_keys_of_a_mapping_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"name: missing(.|\n)*model: missing"):
        build(Run, {})


def test_messages_begin_with_the_place_of_the_part_that_is_built() -> None:
    with pytest.raises(ConfigError, match=r"^pretrain\.model\.hidden_size: got"):
        build(Model, {"hidden_size": "x"}, at="pretrain.model")


def test_a_value_error_of_the_dataclass_keeps_its_cause() -> None:
    with pytest.raises(ConfigError, match=r"^model: hidden_size=3 is odd") as refused:
        build(Run, tree(model={"hidden_size": 3}))
    assert type(refused.value.__cause__) is ValueError


def test_a_message_that_names_its_place_is_not_given_it_twice() -> None:
    @dataclass(frozen=True, slots=True, kw_only=True)
    class Placed:
        num_layers: int

        def __post_init__(self) -> None:
            raise ValueError(f"model.num_layers={self.num_layers} given, at least 1 is allowed")

    with pytest.raises(ConfigError, match=r"^model\.num_layers=0 given"):
        build(Placed, {"num_layers": 0}, at="model")


def test_an_annotation_outside_the_list_is_our_mistake() -> None:
    @dataclass(frozen=True)
    class Odd:
        items: list[int]

    with pytest.raises(TypeError, match=r"items: .* does not know the annotation"):
        build(Odd, {"items": [1]})


# --- to_yaml --------------------------------------------------------------------------------------

TEXTS = [
    "3e-4",
    "null",
    "true",
    "on",
    "1_000",
    "",
    " a b ",
    "${x}",
    r"\${x}",
    "a: b",
    "\ud55c",
    "~",
]


@pytest.mark.parametrize("text", TEXTS)
def test_yaml_brings_text_back_unchanged(text: str) -> None:
    config = Run(name=text, model=Model(hidden_size=4), weights={text: 1.0})
    assert from_yaml(Run, to_yaml(config)) == config


@pytest.mark.parametrize("number", [1e-5, 3e-4, 0.1, 1e22, -0.0, 5e-324, float("inf"), 1 / 3])
def test_yaml_brings_numbers_back_to_the_last_bit(number: float) -> None:
    config = Run(
        name="x",
        model=Model(hidden_size=2**70, rms_norm_eps=number),
        folder=Path("a/b c"),
        stages=(Model(hidden_size=2), Model(hidden_size=4)),
        betas=(number, 1.0),
        seed=0,
    )
    back = from_yaml(Run, to_yaml(config))
    assert back == config
    assert back.model.rms_norm_eps.hex() == number.hex()


def test_yaml_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: a YAML mapping"):
        from_yaml(Run, "- 1\n- 2\n")


def test_yaml_refuses_a_value_that_cannot_be_read_back() -> None:
    with pytest.raises(TypeError, match="does not know"):
        to_yaml(Run(name="x", model=Model(hidden_size=4), weights={"web": 1j}))  # type: ignore[dict-item] # the wrong type is what is tested
