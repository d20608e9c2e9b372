"""How does a conversation become a prompt?

ChatML: each turn is `<|im_start|>role`, a line end, the text, `<|im_end|>`, a line end. An answer
begins with its thoughts between `<think>` and `</think>`; the empty pair says "answer at once".
The prompt fixes which of the two it is, so a reasoning parser sees only what comes after: with
thinking everything up to `</think>` is reasoning, without it all is the answer. Thoughts of past
turns are left out. The turn that ends an example keeps its own, so that the prompt is a prefix of
what is trained on.

The template's switch has two names, `enable_thinking` (SKT's own example, vLLM, SGLang's qwen3
parser) and `thinking` (SGLang's deepseek-v3 parser); either turns it on. It is off by default:
vLLM's parser deepseek_v3 looks at the request alone, and a template that thinks unasked would show
thoughts as answers.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

ROLE_START = "<|im_start|>"
ROLE_END = "<|im_end|>"
THINK_START = "<think>"
THINK_END = "</think>"

# Name to whether decoding may leave it out (`special`). Thinking marks must stay in the text: the
# reasoning parsers of vLLM and SGLang search it for `</think>` after special tokens are gone.
CHAT_TOKENS: Mapping[str, bool] = {
    ROLE_START: True,
    ROLE_END: True,
    THINK_START: False,
    THINK_END: False,
}

# Line ends between the marks matter; those of this text do not: every tag strips around itself.
CHAT_TEMPLATE = r"""
{%- set thinks = (enable_thinking | default(false)) or (thinking | default(false)) -%}
{%- for message in messages -%}
  {%- set text = message['content'] or '' -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- set thought = '' -%}
    {%- if '</think>' in text -%}
      {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
      {%- set text = text.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if loop.last and not add_generation_prompt -%}
      {{- '<think>\n' + thought + '\n</think>\n\n' -}}
    {%- endif -%}
  {%- endif -%}
  {{- text + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n<think>\n' -}}
  {%- if not thinks -%}
    {{- '\n</think>\n\n' -}}
  {%- endif -%}
{%- endif -%}
"""

_RESERVED = re.compile(r"<\|reserved_\d+\|>")


def add_chat_tokens(tokenizer_json: Mapping[str, object]) -> dict[str, object]:
    """Return a tokenizer.json that has the chat tokens, in the place of reserved ones.

    The chat tokens that are missing take the ids of the first reserved tokens, in the order of
    `CHAT_TOKENS`; no id changes its number, and a tokenizer that has them all is returned as it is.

    Note: text passes through such a tokenizer as users of chat models expect, `<think>` in it is
    the mark. Corpora are encoded with the tokenizer as it was trained.

    Args:
        tokenizer_json: parsed file of the tokenizers library; not changed.

    Raises:
        ValueError: if fewer reserved tokens are left than chat tokens are missing.
    """
    changed = copy.deepcopy(dict(tokenizer_json))
    added = cast("Sequence[dict[str, Any]]", changed.get("added_tokens", ()))
    model = cast("dict[str, Any]", changed.get("model", {}))
    present = {token["content"] for token in added}
    missing = [name for name in CHAT_TOKENS if name not in present]
    if not missing:
        return changed
    reserved = [token for token in added if _RESERVED.fullmatch(token["content"])]
    reserved.sort(key=lambda token: token["id"])
    if len(reserved) < len(missing):
        raise ValueError(
            f"the tokenizer lacks {missing} and has {len(reserved)} reserved tokens"
            f" (<|reserved_0|> ...) to rename; needed: {len(missing)}. Prepare the corpus with"
            f" num_reserved={len(missing)} or more (conf/prepare.yaml)"
        )
    renamed: dict[str, str] = {}
    for token, name in zip(reserved, missing, strict=False):
        renamed[token["content"]] = name
        token |= {"content": name, "special": CHAT_TOKENS[name]}
    vocab: Mapping[str, int] = model.get("vocab", {})
    if taken := sorted(set(missing) & set(vocab)):
        raise ValueError(
            f"the vocabulary holds {taken} as ordinary tokens; allowed: as added tokens or not at"
            " all. Train the tokenizer anew"
        )
    model["vocab"] = {renamed.get(token, token): number for token, number in vocab.items()}
    return changed
