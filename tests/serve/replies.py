"""Do servers put thoughts and answers where a client looks for them?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat.template import THINK_END
from tests.serve.greedy import from_transformers
from tests.serve.processes import ask
from tests.serve.rows import Row, checked, equal

NUM_NEW_TOKENS = 16
REPLY_TIMEOUT_S = 120
KOREAN = "\uc11c\uc6b8\uc740 \uc5b4\ub514\uc5d0 \uc788\uc2b5\ub2c8\uae4c?"
QUESTION = {"role": "user", "content": KOREAN}
# Drawn as generation_config.json says, so that the text is more than a base model's favourite word;
# what must be where follows from the ids that come back.
VLLM_WORDS = {"seed": 0, "ignore_eos": True, "return_token_ids": True}
UNDECODED = "\ufffd"  # stands for bytes that are no character, as half a Korean one


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A chat request and what its switch means."""

    what: str
    switch: dict[str, bool]
    """The request's chat_template_kwargs."""
    thinks: bool
    budget_tokens: int | None = None
    """vLLM ends the thoughts after so many; a base model would not."""


REQUESTS = (
    Request(what="enable_thinking=true", switch={"enable_thinking": True}, thinks=True),
    Request(what="thinking=true, ended", switch={"thinking": True}, thinks=True, budget_tokens=6),
    Request(what="enable_thinking=false", switch={"enable_thinking": False}, thinks=False),
    Request(what="no switch", switch={}, thinks=False),
)


def prompt_ids(tokenizer: Any, switch: dict[str, bool]) -> list[int]:
    """Return the question as transformers' own template engine makes it, in ids."""
    return tokenizer.apply_chat_template(
        [QUESTION], tokenize=True, add_generation_prompt=True, return_dict=False, **switch
    )


def vllm_replies(url: str, *, model: str, tokenizer: Any) -> list[Row]:
    """Return the rows of vLLM's OpenAI server, started with --reasoning-parser deepseek_v3.

    Args:
        url: of the server.
        model: the name it serves the model by.
        tokenizer: transformers' tokenizer of the same folder.

    Raises:
        ServeError: if a request is refused or not answered.
    """
    rows: list[Row] = []
    for request in REQUESTS:
        body = chat(model, request.switch) | VLLM_WORDS
        if request.budget_tokens is not None:
            body["thinking_token_budget"] = request.budget_tokens
        reply = ask(f"{url}/v1/chat/completions", body, timeout_s=REPLY_TIMEOUT_S)
        choice = reply["choices"][0]
        name = f"vLLM server, {request.what}"
        ids = prompt_ids(tokenizer, request.switch)
        rows += [
            checked(
                f"{name}: prompt",
                reached=f"{len(reply['prompt_token_ids'])} ids",
                required="transformers' ids",
                holds=reply["prompt_token_ids"] == ids,
            ),
            *where(name, request, choice, tokenizer),
        ]
    return rows


def where(name: str, request: Request, choice: dict[str, Any], tokenizer: Any) -> list[Row]:
    """Return the rows of `reasoning` and `content` beside what the generated ids say."""
    text = decoded(tokenizer, complete(tokenizer, choice["token_ids"]))
    thought, mark, answer = text.partition(THINK_END) if request.thinks else ("", "", text)
    message = choice["message"]
    rows = [
        equal(
            f"{name}: {field}",
            reached=None if message[field] is None else message[field].replace(UNDECODED, ""),
            required=expected or None,
        )
        for field, expected in (("reasoning", thought), ("content", answer))
    ]
    if request.budget_tokens is not None:
        ended = bool(mark and thought and answer)
        rows.append(
            checked(
                f"{name}: {THINK_END}",
                reached="between both" if ended else "missing",
                required="between both",
                holds=ended,
            )
        )
    return rows


def transformers_replies(url: str, *, folder: Path, tokenizer: Any) -> list[Row]:
    """Return the rows of `transformers serve`, which has no parser: all text is in `content`.

    Args:
        url: of the server.
        folder: the Hugging Face folder; the server knows the model by its path.
        tokenizer: transformers' tokenizer of it.

    Raises:
        ServeError: if a request is refused or not answered.
    """
    requests = [request for request in REQUESTS if request.budget_tokens is None]
    prompts = [prompt_ids(tokenizer, request.switch) for request in requests]
    own = from_transformers(folder, prompts, num_new_tokens=NUM_NEW_TOKENS)
    rows: list[Row] = []
    for request, ids, tokens in zip(requests, prompts, own.tokens, strict=True):
        body = chat(str(folder), request.switch) | {"temperature": 0}
        reply = ask(f"{url}/v1/chat/completions", body, timeout_s=REPLY_TIMEOUT_S)
        name = f"transformers serve, {request.what}"
        num_ids = reply["usage"]["prompt_tokens"]
        content = reply["choices"][0]["message"]["content"]
        rows += [
            checked(
                f"{name}: prompt",
                reached=f"{num_ids} ids",
                required=f"{len(ids)} ids",
                holds=num_ids == len(ids),
            ),
            equal(
                f"{name}: content",
                reached=content.replace(UNDECODED, ""),
                required=decoded(tokenizer, until_stop(tokens, stop_ids(folder))),
            ),
        ]
    return rows


def chat(model: str, switch: dict[str, bool]) -> dict[str, Any]:
    """Return the body of a chat request."""
    return {
        "model": model,
        "messages": [QUESTION],
        "max_tokens": NUM_NEW_TOKENS,
        "chat_template_kwargs": switch,
    }


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of ids as servers show it: without special tokens, with thinking marks."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).replace(UNDECODED, "")


def complete(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return ids without last ones that end in half a character; vLLM waits for its other half."""
    while ids and tokenizer.decode(ids).endswith(UNDECODED):
        ids = ids[:-1]
    return ids


def stop_ids(folder: Path) -> set[int]:
    """Return the ids that end an answer, from generation_config.json."""
    config = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    given = config["eos_token_id"]
    return set(given if isinstance(given, list) else [given])


def until_stop(tokens: list[int], stops: set[int]) -> list[int]:
    """Return the ids before the first that ends an answer."""
    return tokens[: next((at for at, token in enumerate(tokens) if token in stops), len(tokens))]
