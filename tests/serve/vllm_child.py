"""What does vLLM generate from a folder, greedily and in fp32?

    .venv-serve/bin/python tests/serve/vllm_child.py REQUEST.json ANSWER.json

Started by serve_check.py in the serving environment, where only vLLM and its dependencies are;
hence nothing of ours is imported. The request says the folder, the prompts as ids, the number of
new tokens, and whether rotary embeddings take vLLM's plain path: its CPU kernel (0.32) reads the
strided query and key slices of MLA as if they were packed, and so rotates the wrong numbers.
"""

# vLLM is in another environment than the one that is type-checked.
# pyright: reportMissingImports=false

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding


def attention_backends(llm: Any) -> list[str]:
    """Return the names of the attention layers' backends, each once."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    found = {
        type(module).__name__ + " " + module.get_attn_backend().get_name()
        for module in model.modules()
        if hasattr(module, "get_attn_backend")
    }
    return sorted(found)


def chosen(tokens: Sequence[int], logprobs: Sequence[Any]) -> list[float]:
    """Return each token's own log-probability."""
    return [at[token].logprob for token, at in zip(tokens, logprobs, strict=True)]


def main() -> int:
    """Answer one request; 0, or an exception."""
    request_path, answer_path = (Path(word) for word in sys.argv[1:])
    request = json.loads(request_path.read_text(encoding="utf-8"))
    if request["native_rotary"]:
        RotaryEmbedding.forward_cpu = RotaryEmbedding.forward_native
    llm = LLM(
        model=request["folder"],
        dtype="float32",
        enforce_eager=True,
        attention_backend="CPU_MLA",  # AMX machines would take AMX_MLA, which has no fp32
        max_model_len=request["max_model_tokens"],
        max_num_seqs=len(request["prompts"]),
        enable_prefix_caching=False,
        seed=0,
    )
    outputs = llm.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(
            temperature=0.0,
            max_tokens=request["num_new_tokens"],
            ignore_eos=True,
            logprobs=0,
            prompt_logprobs=0,
        ),
    )
    completions = [output.outputs[0] for output in outputs]
    answer = {
        "backends": attention_backends(llm),
        "tokens": [list(one.token_ids) for one in completions],
        "logprobs": [chosen(one.token_ids, one.logprobs) for one in completions],
        "prompt_logprobs": [
            chosen(output.prompt_token_ids[1:], output.prompt_logprobs[1:]) for output in outputs
        ],
    }
    answer_path.write_text(json.dumps(answer) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
