"""What is asked of a model? No torch, so that a wrong request is refused at once."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from parallel.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is drawn from the model's distribution.

    Raises:
        ValueError: if a value is out of range.

    Source: nucleus sampling, Holtzman et al., arXiv 1904.09751.
    """

    temperature: float = 0.8
    """Divides the logits; 0: always the most likely token."""
    top_p: float = 0.95
    """The smallest set of tokens with this share of the probability is drawn from, 0 < top_p <=
    1."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.seed < 0:
            raise ValueError(
                f"sampling.temperature={self.temperature}, top_p={self.top_p}, seed={self.seed}"
                f" given; 0 or more, above"
                " 0 and at most 1, and 0 or more are allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One text to continue.

    Raises:
        ValueError: if there is no prompt, or two.
    """

    checkpoint: Path
    """A checkpoint, or a run's folder: its newest whole one."""
    prompt: str = ""
    """Text to continue."""
    prompt_file: Path | None = None
    """File with the text to continue, UTF-8."""
    max_new_tokens: int = 120
    """At most so many tokens are added."""
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if bool(self.prompt) == (self.prompt_file is not None):
            raise ValueError(
                "give one of prompt and prompt_file, as prompt='\"def main(\"' (the inner quotes"
                " let Hydra take commas"
                " and brackets)"
            )
        if self.prompt_file is not None and not self.prompt_file.is_file():
            raise ValueError(f"prompt_file={self.prompt_file} given, but there is no such file")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} given, at least 1 is allowed")

    @property
    def text(self) -> str:
        """The text to continue."""
        return (
            self.prompt
            if self.prompt_file is None
            else self.prompt_file.read_text(encoding="utf-8")
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Scoring:
    """A batch to be run through a checkpoint.

    Raises:
        ValueError: if there is no input, the output is there already, or the layout cannot score.
    """

    checkpoint: Path
    """A checkpoint of ours, a run's folder, or a Hugging Face folder."""
    input: Path
    """.npz with `input_ids` `[B, S]` and, if wanted, `labels` `[B, S]` as transformers takes them:
    the loss at position t is that of label t + 1, -100 does not count. Without: `input_ids`."""
    output: Path
    """.npz that is written."""
    layout: Layout
    """How ranks divide the model."""
    gradients: bool = False
    """Also the norm of the loss's gradient for every tensor, by hub name."""

    def __post_init__(self) -> None:
        if not self.input.is_file():
            raise ValueError(f"input={self.input} given, but there is no such file")
        if self.output.exists():
            raise ValueError(f"output={self.output} exists: choose another name or remove it")


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """A checkpoint to be written as a Hugging Face folder.

    Raises:
        ValueError: if the output is there already or a value is out of range.
    """

    checkpoint: Path
    """A checkpoint, or a run's folder: its newest whole one."""
    output: Path
    """The folder that is written; must not exist."""
    dtype: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Of the matrices; fp8: by blocks of 128 x 128, what is no block of a linear layer in bf16."""
    mtp: bool = False
    """Also the MTP module, as layer L in DeepSeek-V3's layout; transformers' class has no place for
    it and lists it as unexpected."""
    zero_router_bias: bool = False
    """A model trained without router bias gets one of zeros: vLLM 0.32 ranks expert groups by
    their best two experts only if there is one."""
    shard_bytes: int = 5_000_000_000
    """A safetensors file holds at most so many bytes of values."""
    tokenizer: Path | None = None
    """tokenizer.json to ship; None: the one the checkpoint was trained with."""
    verify: Literal["auto", "whole", "layers"] = "auto"
    """How the result is compared with transformers: as a whole where it fits in memory, or layer by
    layer."""

    def __post_init__(self) -> None:
        _refuse_existing(self.output)
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes={self.shard_bytes} given, at least 1 is allowed")
        if self.tokenizer is not None and not self.tokenizer.is_file():
            raise ValueError(f"tokenizer={self.tokenizer} given, but there is no such file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """A Hugging Face folder to be written as a checkpoint.

    Raises:
        ValueError: if the output is there already.
    """

    checkpoint: Path
    """A folder with config.json and safetensors, one file or shards with an index."""
    output: Path
    """The checkpoint that is written; must not exist."""
    dtype: Literal["keep", "bf16", "fp32"] = "keep"
    """Of the stored weights; keep: as they come, FP8 blocks as bf16."""
    verify: Literal["auto", "whole", "layers"] = "auto"
    """As for Export."""

    def __post_init__(self) -> None:
        _refuse_existing(self.output)


def _refuse_existing(output: Path) -> None:
    if output.exists():
        raise ValueError(
            f"output={output} exists: choose another name, or move the folder away; nothing is"
            " ever written over"
        )
