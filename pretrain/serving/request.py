"""What is asked of a model? No torch, so that a wrong request is refused at once."""

from dataclasses import dataclass, field
from pathlib import Path


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
