"""What do transformers and vLLM generate from the same ids, and how far apart are they?

Both greedily, in fp32, without a stop at the end of a turn. transformers is the reference.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.serve.processes import run_logged
from tests.serve.rows import Row, checked, info

CHILD = Path(__file__).with_name("vllm_child.py")
MAX_MODEL_TOKENS = 256
VLLM_TIMEOUT_S = 300
# fp32 sums in another order: 5e-6 were reached. vLLM's faulty rotary kernel moves 2e-4 and more.
LOGPROB_ATOL = 5e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Greedy:
    """Continuations of several prompts."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    """Of the chosen tokens, in nats."""
    prompt_logprobs: list[list[float]]
    """Of the prompt's tokens but the first, in nats."""
    margins: list[list[float]]
    """Over the second best token, in nats; empty where not known."""
    backends: list[str]
    """What computed attention."""


def from_transformers(
    folder: Path, prompts: Sequence[Sequence[int]], *, num_new_tokens: int
) -> Greedy:
    """Return what transformers generates, by `generate` with its cache."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    model.generation_config.eos_token_id = None  # the end of a turn must not stop it
    result = Greedy(tokens=[], logprobs=[], prompt_logprobs=[], margins=[], backends=["eager"])
    for ids in prompts:
        inputs = torch.tensor([list(ids)])
        out = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_new_tokens,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = torch.stack(out.logits)[:, 0].log_softmax(-1).topk(2)
        result.tokens.append(out.sequences[0, len(ids) :].tolist())
        result.logprobs.append(top.values[:, 0].tolist())
        with torch.no_grad():
            prompt = model(inputs[:, :-1]).logits.log_softmax(-1)
        prompt = prompt.gather(-1, inputs[:, 1:, None])[0, :, 0]
        result.prompt_logprobs.append(prompt.tolist())
        result.margins.append((top.values[:, 0] - top.values[:, 1]).tolist())
    return result


def from_vllm(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    num_new_tokens: int,
    native_rotary: bool,
    python: Path,
    environment: Mapping[str, str],
    logs: Path,
) -> Greedy:
    """Return what vLLM generates, in a process of its own.

    Args:
        folder: the Hugging Face folder.
        prompts: ids.
        num_new_tokens: of each continuation.
        native_rotary: by vLLM's plain rotary embedding; False: by its CPU kernel, as shipped.
        python: of the serving environment.
        environment: variables for vLLM.
        logs: folder for request, answer and log.

    Raises:
        ServeError: if vLLM fails, with the end of its log.
    """
    name = f"vllm_{'native' if native_rotary else 'shipped'}"
    request, answer = logs / f"{name}_request.json", logs / f"{name}_answer.json"
    answer.unlink(missing_ok=True)
    body = {
        "folder": str(folder),
        "prompts": [list(ids) for ids in prompts],
        "num_new_tokens": num_new_tokens,
        "max_model_tokens": MAX_MODEL_TOKENS,
        "native_rotary": native_rotary,
    }
    request.write_text(json.dumps(body), encoding="utf-8")
    run_logged(
        [python, "-P", CHILD, request, answer],
        log=logs / f"{name}.log",
        timeout_s=VLLM_TIMEOUT_S,
        folder=logs,
        environment={**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    said = json.loads(answer.read_text(encoding="utf-8"))
    return Greedy(**said, margins=[])


def compare(reference: Greedy, vllm: Greedy, *, mla: bool) -> list[Row]:
    """Return the rows of vLLM beside transformers.

    Args:
        reference: transformers' continuations.
        vllm: vLLM's, by its plain rotary embedding.
        mla: whether the latent is of a size that vLLM has MLA for.
    """
    backends = ", ".join(vllm.backends)
    gaps = (logprob_gap(reference, vllm), prompt_gap(reference, vllm))
    num_distinct = len({token for tokens in reference.tokens for token in tokens})
    num_prompt_tokens = sum(len(values) for values in reference.prompt_logprobs)
    num_tokens = sum(len(tokens) for tokens in reference.tokens)
    smallest = min(min(margins) for margins in reference.margins)
    return [
        checked("vLLM attention", reached=backends, required="CPU_MLA", holds="CPU_MLA" in backends)
        if mla
        else info("vLLM attention", backends),
        checked(
            f"vLLM greedy tokens, {len(reference.tokens)} prompts",
            reached=f"{num_equal(reference, vllm)} of {num_tokens} equal",
            required="all",
            holds=reference.tokens == vllm.tokens,
        ),
        *(
            checked(
                f"vLLM log-probabilities of {what}, largest gap",
                reached=f"{gap:.1e}",
                required=f"<= {LOGPROB_ATOL:.0e}",
                holds=gap <= LOGPROB_ATOL,
            )
            for what, gap in zip(
                (f"{num_tokens} new tokens", f"{num_prompt_tokens} prompt tokens"),
                gaps,
                strict=True,
            )
        ),
        info("distinct tokens among the new ones", num_distinct),
        info("smallest lead of a chosen token", f"{smallest:.1e}"),
    ]


def as_shipped(reference: Greedy, vllm: Greedy) -> list[Row]:
    """Return what vLLM's own rotary kernel does; for information: the fault is not ours."""
    num_tokens = sum(len(tokens) for tokens in reference.tokens)
    return [
        info("vLLM as shipped: tokens", f"{num_equal(reference, vllm)} of {num_tokens} equal"),
        info("vLLM as shipped: gap, new tokens", f"{logprob_gap(reference, vllm):.1e}"),
        info("vLLM as shipped: gap, prompt tokens", f"{prompt_gap(reference, vllm):.1e}"),
    ]


def num_equal(one: Greedy, two: Greedy) -> int:
    """Return how many tokens are equal before the first that differs, over all prompts."""
    return sum(common(a, b) for a, b in zip(one.tokens, two.tokens, strict=True))


def logprob_gap(one: Greedy, two: Greedy) -> float:
    """Return the largest |difference| while the text is the same, the parting token included."""
    gaps = [0.0]
    for a, b, x, y in zip(one.tokens, two.tokens, one.logprobs, two.logprobs, strict=True):
        same = common(a, b) + 1
        gaps += [abs(p - q) for p, q in zip(x[:same], y[:same], strict=False)]
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def prompt_gap(one: Greedy, two: Greedy) -> float:
    """Return the largest |difference| on the prompts, where both see the same text to the end."""
    pairs = zip(one.prompt_logprobs, two.prompt_logprobs, strict=True)
    gaps = [abs(p - q) for a, b in pairs for p, q in zip(a, b, strict=True)]
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common beginning."""
    pairs = zip(a, b, strict=False)
    return next((at for at, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
