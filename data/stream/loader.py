"""Which tokens are sample number t?

A pure function: nothing is remembered between calls, so resuming is knowing one integer, and any
number of ranks can cut the samples among themselves without talking.

The ids of a domain are one flat stream. Window i of a domain begins at token i * S and holds S + 1
ids: S inputs and, one place on, S targets; what is left at the end is dropped. All windows of all
domains form one list of N. Epoch e = t // N goes through it in the order of a keyed permutation
that is never stored (`data/stream/shuffle.py`), so every window occurs exactly once an epoch.

`open_corpus` makes such a stream from a prepared folder after checking its files, their sizes and
the
tokenizer: a model trained with one tokenizer on ids of another learns noise without any error.

Letters: C windows asked for, S window length in tokens.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.corpus.manifest import TOKENIZER_NAME, DomainFiles, Manifest, Split, file_sha256
from data.indexed.closing import Closing
from data.indexed.format import DataError
from data.indexed.reader import IndexedReader
from data.stream.shuffle import permutation_key, permute

MAX_DOMAINS = 2**15 - 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Windows:
    """Consecutive samples.

    Attributes:
        tokens: `[C, S+1]` int32; inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`.
        domain_idx: `[C]` int16, index into the stream's `domains`.
    """

    tokens: NDArray[np.int32]
    domain_idx: NDArray[np.int16]


class WindowStream(Closing):
    """Random access to the windows of several domains, shuffled for training or in fixed order.

    Attributes:
        domains: names of the domains, sorted; `domain_idx` points into it.
        window_tokens: S.
        vocab_size: every id read is checked to lie below it.
        num_windows: N, windows of one epoch.
        num_windows_by_domain: windows of each domain in one epoch.
    """

    def __init__(
        self,
        readers: Mapping[str, IndexedReader],
        *,
        window_tokens: int,
        seed: int,
        vocab_size: int,
    ) -> None:
        """Lay the windows over the readers; the stream closes them with itself.

        Args:
            readers: domain name -> its tokens. The order of the mapping is of no consequence.
            window_tokens: S, >= 1.
            seed: with the epoch, decides the order; any integer.
            vocab_size: number of ids, >= 1.

        Raises:
            ValueError: if there are no domains, too many, or a number is out of range.
            DataError: if no domain is long enough for one window.
        """
        if not 1 <= len(readers) <= MAX_DOMAINS:
            raise ValueError(f"{len(readers)} domains; allowed: 1 .. {MAX_DOMAINS}")
        if window_tokens < 1:
            raise ValueError(f"window_tokens={window_tokens}; allowed: >= 1")
        if vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size}; allowed: >= 1")
        self.domains = tuple(sorted(readers))
        self.window_tokens = window_tokens
        self.vocab_size = vocab_size
        self._seed = seed
        self._readers = tuple(readers[name] for name in self.domains)
        counts = [max(0, (reader.num_tokens - 1) // window_tokens) for reader in self._readers]
        self.num_windows = sum(counts)
        self.num_windows_by_domain = dict(zip(self.domains, counts, strict=True))
        self._ends = np.cumsum(counts, dtype=np.int64)
        if self.num_windows == 0:
            sizes = {name: readers[name].num_tokens for name in self.domains}
            raise DataError(
                f"no domain holds one window of {window_tokens} + 1 tokens: {sizes}; "
                f"use a smaller window_tokens or prepare more text"
            )

    def close(self) -> None:
        """Close the readers; closing twice is allowed, reading afterwards is not."""
        for reader in self._readers:
            reader.close()

    def windows(self, first: int, count: int) -> Windows:
        """Return samples `first .. first + count` of the endless shuffled sequence.

        Args:
            first: number of the first sample since the start of training, >= 0.
            count: samples wanted, >= 0.

        Returns:
            C = count windows. Sample t depends on t, the seed and the data, and on nothing else.

        Raises:
            ValueError: if `first` or `count` is negative.
            DataError: if an id is outside the vocabulary, or a file changed under us.
        """
        _check_range(first, count)
        samples = np.arange(first, first + count, dtype=np.int64)
        epochs, places = np.divmod(samples, self.num_windows)
        items = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            key = permutation_key("windows", self._seed, int(epoch))
            items[chosen] = permute(places[chosen], num_items=self.num_windows, key=key)
        return self._read(items)

    def num_sequential(self, per_domain: int) -> int:
        """Return how many windows `sequential` goes through: at most `per_domain` of each domain.

        Raises:
            ValueError: if `per_domain` < 1.
        """
        return len(self._sequential_items(per_domain))

    def sequential(self, first: int, count: int, *, per_domain: int) -> Windows:
        """Return windows `first .. first + count` of a fixed order, the same for every seed.

        The order goes domain by domain, and takes `per_domain` windows of each, evenly spaced from
        the first to the end (all of them where there are fewer). For validation.

        Args:
            first: >= 0.
            count: >= 0, with first + count <= num_sequential(per_domain).
            per_domain: windows of each domain, >= 1.

        Raises:
            ValueError: if a number is out of range.
            DataError: as `windows`.
        """
        _check_range(first, count)
        items = self._sequential_items(per_domain)
        if first + count > len(items):
            raise ValueError(
                f"windows {first} .. {first + count} of {len(items)} (per_domain={per_domain})"
            )
        return self._read(items[first : first + count])

    def check_ids(self, *, chunk_tokens: int = 1 << 22) -> None:
        """Read every id once and refuse the first that is outside the vocabulary.

        Reading 10 million ids takes a fraction of a second; a corpus of trillions is checked by its
        digests instead.

        Args:
            chunk_tokens: ids read at a time, >= 1.

        Raises:
            DataError: names domain, document and position.
        """
        for domain, reader in enumerate(self._readers):
            for start in range(0, reader.num_tokens, chunk_tokens):
                count = min(chunk_tokens, reader.num_tokens - start)
                ids = reader.tokens(start, count)
                if ids.min() < 0 or ids.max() >= self.vocab_size:
                    self._refuse(ids, start=start, domain=domain)

    def _sequential_items(self, per_domain: int) -> NDArray[np.int64]:
        """Return the items of the fixed order, `[sum of min(per_domain, windows)]`."""
        if per_domain < 1:
            raise ValueError(f"per_domain={per_domain}; allowed: >= 1")
        parts: list[NDArray[np.int64]] = []
        for end, total in zip(self._ends, self.num_windows_by_domain.values(), strict=True):
            chosen = min(per_domain, total)
            places = np.arange(chosen, dtype=np.int64) * total // max(chosen, 1)
            parts.append(end - total + places)
        return np.concatenate(parts)

    def _read(self, items: NDArray[np.int64]) -> Windows:
        """Return the windows with these numbers in the list of all domains."""
        domain_idx = np.searchsorted(self._ends, items, side="right")
        tokens = np.empty((len(items), self.window_tokens + 1), dtype=np.int32)
        for row in range(len(items)):
            domain = int(domain_idx[row])
            start = self._start(int(items[row]), domain)
            ids = self._readers[domain].tokens(start, self.window_tokens + 1)
            if ids.min() < 0 or ids.max() >= self.vocab_size:
                self._refuse(ids, start=start, domain=domain)
            tokens[row] = ids
        return Windows(tokens=tokens, domain_idx=domain_idx.astype(np.int16))

    def _start(self, item: int, domain: int) -> int:
        """Return the position in its domain's stream at which a window begins."""
        before = int(self._ends[domain - 1]) if domain else 0
        return (item - before) * self.window_tokens

    def _refuse(self, ids: NDArray[np.integer], *, start: int, domain: int) -> None:
        """Raise the error for the first id of `ids` that is outside the vocabulary."""
        offset = int(((ids < 0) | (ids >= self.vocab_size)).argmax())
        document, position = self._readers[domain].locate(start + offset)
        raise DataError(
            f"domain {self.domains[domain]!r}, document {document}, position {position}: "
            f"id {ids[offset]}, vocab_size={self.vocab_size} allows 0 .. {self.vocab_size - 1}; "
            f"the data was made with another tokenizer, or the file is damaged"
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PreparedSplit(Closing):
    """One split of a prepared corpus, open for reading. Close it, or use it as a context manager.

    Attributes:
        manifest: what the folder holds.
        stream: the split's windows.
        bytes_by_domain: UTF-8 bytes of text in each domain.
        tokens_by_domain: ids in each domain.
    """

    manifest: Manifest
    stream: WindowStream
    bytes_by_domain: Mapping[str, int]
    tokens_by_domain: Mapping[str, int]

    def close(self) -> None:
        """Close the files."""
        self.stream.close()


def open_corpus(
    folder: Path | str,
    *,
    split: Split,
    window_tokens: int,
    seed: int,
    vocab_size: int,
    tokenizer_digest: str,
) -> PreparedSplit:
    """Return one split of a prepared folder as a stream of windows.

    Args:
        folder: output of `launch/prepare.py`.
        split: `train` or `validation`.
        window_tokens: S of the stream.
        seed: seed of the stream's order.
        vocab_size: ids that the model knows; at least those of the tokenizer. Ids read are checked
            against the tokenizer's vocabulary, which is the narrower of the two.
        tokenizer_digest: SHA-256 of the tokenizer.json in use (`Codec.digest`).

    Raises:
        ValueError: if the model's vocabulary is too small, or a number is out of range.
        DataError: if there is no manifest, a file is missing or has another size, or the tokenizer
            is not the one the data was made with.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    if split not in manifest.splits:
        raise ValueError(f"split={split!r}; allowed: {sorted(manifest.splits)}")
    _check_tokenizer(manifest, folder=folder, tokenizer_digest=tokenizer_digest)
    if vocab_size < manifest.vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} of the model; the tokenizer of {folder} has "
            f"{manifest.vocab_size} ids; give the model at least that many"
        )
    manifest.check_sizes(folder, splits=(split,))
    files: Mapping[str, DomainFiles] = manifest.splits[split]
    if not files:
        raise DataError(f"{folder}: split {split!r} is empty; prepare it from more text")
    stream = _open_stream(
        {name: folder / entry.prefix for name, entry in files.items()},
        window_tokens=window_tokens,
        seed=seed,
        vocab_size=manifest.vocab_size,
    )
    return PreparedSplit(
        manifest=manifest,
        stream=stream,
        bytes_by_domain={name: entry.bytes for name, entry in files.items()},
        tokens_by_domain={name: entry.tokens for name, entry in files.items()},
    )


def _open_stream(
    prefixes: Mapping[str, Path], *, window_tokens: int, seed: int, vocab_size: int
) -> WindowStream:
    """Return a stream that owns its readers; none stays open if one cannot be opened."""
    with ExitStack() as opened:
        readers = {
            name: opened.enter_context(IndexedReader(prefix)) for name, prefix in prefixes.items()
        }
        stream = WindowStream(
            readers, window_tokens=window_tokens, seed=seed, vocab_size=vocab_size
        )
        opened.pop_all()  # from here on the stream owns them
    return stream


def _check_tokenizer(manifest: Manifest, *, folder: Path, tokenizer_digest: str) -> None:
    """Refuse a tokenizer other than the manifest's, in the caller's hand or in the folder."""
    path = folder / TOKENIZER_NAME
    if not path.is_file():
        raise DataError(f"{path}: missing; prepare the folder again")
    for name, digest in (
        (str(path), file_sha256(path)),
        ("the tokenizer in use", tokenizer_digest),
    ):
        if digest != manifest.tokenizer_digest:
            raise DataError(
                f"{name} is not the tokenizer that {folder} was made with: SHA-256 {digest}, "
                f"the data was made with {manifest.tokenizer_digest}"
            )


def _check_range(first: int, count: int) -> None:
    if first < 0 or count < 0:
        raise ValueError(f"first={first}, count={count}; both must be >= 0")
