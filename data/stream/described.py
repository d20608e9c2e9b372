"""Which buckets would a corpus have that is only described yet?

Tokens of each domain, divided by language and tiers as shares: enough to plan a run, its epochs and
its bytes, months before the text is there.
"""

from dataclasses import dataclass
from itertools import product

from data.indexed.dataset_manifest import Bucket


@dataclass(frozen=True, kw_only=True, slots=True)
class DescribedCorpus:
    """Sizes of a corpus.

    Raises:
        ValueError: if a size is below 1 or a share negative.
    """

    domains: dict[str, int]
    """Tokens of each domain."""
    languages: dict[str, float]
    """Share of each language, divided by their sum; in every domain the same."""
    quality: tuple[float, ...]
    """Share of each quality tier, lowest first."""
    difficulty: tuple[float, ...]
    """Share of each difficulty tier, simplest first."""
    window_tokens: dict[str, float]
    """Window length -> share of the tokens that is packed at it."""

    def __post_init__(self) -> None:
        shares = (*self.languages.values(), *self.quality, *self.difficulty)
        if min(self.domains.values(), default=0) < 1 or min((0.0, *shares)) < 0:
            raise ValueError(
                f"described: domains {self.domains} and shares {list(shares)} given; at least 1"
                " token each and shares of 0 or more are allowed"
            )
        parts = {
            "languages": tuple(self.languages.values()),
            "quality": self.quality,
            "difficulty": self.difficulty,
        }
        for name, given in parts.items():
            if not sum(given) > 0:
                raise ValueError(f"described.{name} given without a share above 0")
        for length, share in self.window_tokens.items():
            if not length.isdecimal() or int(length) < 1 or not share >= 0:
                raise ValueError(
                    f"described.window_tokens: {length}: {share} given; a length of at least 1 and"
                    " a share of 0 or more are allowed"
                )

    def windows(self) -> dict[Bucket, int]:
        """Return the windows of each bucket; those without a whole one are left out."""
        found: dict[Bucket, int] = {}
        for (domain, tokens), (language, spoken), quality, difficulty, (length, packed) in product(
            self.domains.items(),
            self.languages.items(),
            range(len(self.quality)),
            range(len(self.difficulty)),
            self.window_tokens.items(),
        ):
            share = packed * spoken / sum(self.languages.values())
            share *= self.quality[quality] / sum(self.quality)
            share *= self.difficulty[difficulty] / sum(self.difficulty)
            windows = int(tokens * share) // int(length)
            if windows:
                bucket = Bucket(
                    domain=domain,
                    language=language,
                    quality_tier=quality,
                    difficulty_tier=difficulty,
                    window_tokens=int(length),
                )
                found[bucket] = windows
        return found
