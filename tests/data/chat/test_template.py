"""Conversations become prompts as servers and parsers expect them, seen as token ids."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.chat.template import (
    CHAT_TEMPLATE,
    CHAT_TOKENS,
    ROLE_END,
    ROLE_START,
    THINK_END,
    THINK_START,
    add_chat_tokens,
)
from data.tokenizer.bpe import BpeConfig, train_bpe

KOREAN = "\uc11c\uc6b8\uc740 \uc5b4\ub514\uc5d0 \uc788\uc2b5\ub2c8\uae4c?"
TEXTS = ["system user assistant Where is it? In the north.\n\nThink first, then answer.\n", KOREAN]
USER = {"role": "user", "content": KOREAN}
ANSWER = {"role": "assistant", "content": "In the north."}
THOUGHT = {"role": "assistant", "content": "<think>\nNorth?\n</think>\n\nIn the north."}


def plain_json(*, num_reserved: int = 6) -> dict[str, Any]:
    config = BpeConfig(vocab_size=300, num_reserved=num_reserved)
    return json.loads(train_bpe(TEXTS, config=config).to_str())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return as_transformers(add_chat_tokens(plain_json()))


def as_transformers(tokenizer_json: dict[str, object]) -> PreTrainedTokenizerFast:
    library = Tokenizer.from_str(json.dumps(tokenizer_json))
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=ROLE_END,
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    )


def rendered(tokenizer: PreTrainedTokenizerFast, *messages: Any, **kwargs: Any) -> list[int]:
    options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False} | kwargs
    ids: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, **options)
    return ids


def pieces(tokenizer: PreTrainedTokenizerFast, *parts: str) -> list[int]:
    """Return the ids of `parts`, put together by hand: a mark is its one id, other text is encoded.

    The library encodes each text alone, so that no mark is recognised inside a text.
    """
    library = Tokenizer.from_str(json.dumps(plain_json()))
    ids: list[int] = []
    for part in parts:
        mark: Any = tokenizer.convert_tokens_to_ids(part) if part in CHAT_TOKENS else None
        ids += library.encode(part).ids if mark is None else [mark]
    return ids


def turn(role: str, text: str) -> list[str]:
    return [ROLE_START, f"{role}\n{text}", ROLE_END, "\n"]


THINK_ON = [ROLE_START, "assistant\n", THINK_START, "\n"]
THINK_OFF = [ROLE_START, "assistant\n", THINK_START, "\n\n", THINK_END, "\n\n"]


@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
@pytest.mark.parametrize(("value", "end"), [(True, THINK_ON), (False, THINK_OFF)])
def test_either_name_switches_thinking(
    tokenizer: PreTrainedTokenizerFast, name: str, value: bool, end: list[str]
) -> None:
    assert rendered(tokenizer, USER, **{name: value}) == pieces(
        tokenizer, *turn("user", KOREAN), *end
    )


def test_without_a_switch_the_prompt_asks_for_no_thoughts(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert rendered(tokenizer, USER) == pieces(tokenizer, *turn("user", KOREAN), *THINK_OFF)


def test_a_system_message_is_the_first_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    system = {"role": "system", "content": "Think first, then answer."}

    assert rendered(tokenizer, system, USER) == pieces(
        tokenizer, *turn("system", system["content"]), *turn("user", KOREAN), *THINK_OFF
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_thoughts_of_past_turns_are_left_out(
    tokenizer: PreTrainedTokenizerFast, thinking: bool
) -> None:
    turns = [*turn("user", KOREAN), *turn("assistant", ANSWER["content"]), *turn("user", KOREAN)]
    expected = pieces(tokenizer, *turns, *(THINK_ON if thinking else THINK_OFF))

    for past in (THOUGHT, ANSWER, ANSWER | {"reasoning": "North?"}):
        assert rendered(tokenizer, USER, past, USER, enable_thinking=thinking) == expected


def test_a_thought_whose_opening_mark_was_in_the_prompt_is_left_out_too(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    generated = {"role": "assistant", "content": "North?\n</think>\n\nIn the north."}

    assert rendered(tokenizer, USER, generated, USER) == rendered(tokenizer, USER, ANSWER, USER)


@pytest.mark.parametrize(
    ("answer", "thinking", "said"),
    [
        (THOUGHT, True, ["North?\n", THINK_END, "\n\nIn the north."]),
        (ANSWER, False, ["In the north."]),
    ],
)
def test_an_example_to_train_on_is_its_prompt_and_the_answer(
    tokenizer: PreTrainedTokenizerFast, answer: dict[str, str], thinking: bool, said: list[str]
) -> None:
    example = rendered(tokenizer, USER, answer, add_generation_prompt=False)

    prompt = rendered(tokenizer, USER, enable_thinking=thinking)
    assert example == prompt + pieces(tokenizer, *said, ROLE_END, "\n")


def test_thinking_marks_stay_in_the_text_and_roles_do_not(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    ids = pieces(tokenizer, "North", THINK_END, "In", ROLE_END)

    assert tokenizer.decode(ids, skip_special_tokens=True) == "North</think>In"


def test_no_other_token_and_no_id_is_changed() -> None:
    before = plain_json()
    kept = json.dumps(before)

    after: Any = add_chat_tokens(before)

    assert json.dumps(before) == kept
    old, new = (Tokenizer.from_str(json.dumps(one)).get_vocab() for one in (before, after))
    names = dict(zip([f"<|reserved_{number}|>" for number in range(4)], CHAT_TOKENS, strict=True))
    assert new == {names.get(token, token): number for token, number in old.items()}
    assert after["model"]["vocab"] == new
    assert [new[name] for name in CHAT_TOKENS] == [2, 3, 4, 5]
    assert after["model"]["merges"] == before["model"]["merges"]


def test_a_tokenizer_that_has_the_tokens_stays_as_it_is() -> None:
    once = add_chat_tokens(plain_json())

    assert add_chat_tokens(once) == once


def test_only_what_is_missing_takes_a_reserved_token() -> None:
    given = plain_json(num_reserved=4)
    text = json.dumps(given).replace("<|reserved_0|>", THINK_START)

    after: Any = add_chat_tokens(json.loads(text))

    ids = {token["content"]: token["id"] for token in after["added_tokens"]}
    assert [ids[name] for name in CHAT_TOKENS] == [3, 4, 2, 5]


def test_too_few_reserved_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"has 3 reserved tokens .* num_reserved=4 or more"):
        add_chat_tokens(plain_json(num_reserved=3))


def test_an_ordinary_token_of_that_name_is_refused() -> None:
    given = plain_json()
    vocab = given["model"]["vocab"]
    vocab[THINK_START] = vocab.pop(next(token for token, number in vocab.items() if number == 299))

    with pytest.raises(ValueError, match=r"holds \['<think>'\] as ordinary tokens"):
        add_chat_tokens(given)
