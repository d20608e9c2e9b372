"""What does a run do differently from its next batch on, because its user says so?"""

from dataclasses import dataclass

from pretrain.checkpoint.key_classes import CLASSES, KEY_CLASS, keys_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What a run that goes on does differently from its next batch on.

    What it reads is kept in its ledger.jsonl, how it trains in its changes.jsonl.

    Raises:
        ValueError: if a range is none, a key is none of a schedule, or a change has no reason.
    """

    reason: str = ""
    """One sentence, for whoever reads the ledger in a year. With it another curriculum, or a corpus
    with more text, is followed from the next batch on; without it both are refused."""
    skip: tuple[str, ...] = ()
    """Batches to leave out, as `first:last`, the last not included; numbered by the plan."""
    allow: tuple[str, ...] = ()
    """Keys of the schedule that may have another value than the checkpoint's, such as
    optimizer.lr; needed until the run has saved under the new values, and harmless after that."""

    def __post_init__(self) -> None:
        for text in self.skip:
            range_of(text, key="change.skip")
        for key in self.allow:
            # a key that is not known may be one of the checkpoint's, which other code wrote
            if (which := KEY_CLASS.get(key, "schedule")) != "schedule":
                raise ValueError(
                    f"change.allow={list(self.allow)} given, but {key} is of the class {which}:"
                    f" {CLASSES[which]}; allowed: {', '.join(keys_of('schedule'))}"
                )
        if bool(self.skip or self.allow or self.reason) and not self.reason.strip():
            raise ValueError(
                f"change.skip={list(self.skip)}, change.allow={list(self.allow)},"
                f" change.reason={self.reason!r} given: say why in change.reason"
            )


def range_of(text: str, *, key: str) -> range:
    """Return the numbers that `first:last` means, the last not included.

    Args:
        text: as a user wrote it.
        key: of the configuration, for the message.

    Raises:
        ValueError: if it is no such range.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ValueError(f"{key}={text} given; first:last with first < last is allowed")
    return range(int(first), int(last))
