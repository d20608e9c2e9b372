"""Which documents are for training and which for validation?

A document that stands on both sides, or nearly, makes validation a memory test. So documents are
first gathered into clusters (same family, or nearly the same text), exact copies are dropped, and
whole clusters go to one side: to validation if a hash of (seed, cluster) falls below the wanted
fraction. The outcome does not depend on the order of sources or files, and a cluster that does not
change keeps its side when other documents come or go (the corrections below apart).

Two corrections, per domain. A cluster of more than a quarter of what validation should hold stays
in training, or a single one would be most of the measurement. If a domain of at least eight
clusters is then left without validation, its smallest-hashed cluster of at most a quarter of the
domain is moved.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from data.corpus.near_duplicates import UnionFind, join_near_duplicates, signatures
from data.corpus.record import Document

LEAST_CLUSTERS = 8
LARGEST_SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """How documents are divided.

    Attributes:
        validation_fraction: expected share of clusters in validation, 0 < fraction < 0.5.
        near_duplicate_jaccard: estimated overlap of five-word runs from which two documents are
            near duplicates, 0 < overlap <= 1.
        seed: another seed, another choice.
    """

    validation_fraction: float = 0.04
    near_duplicate_jaccard: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shares outside their range."""
        if not 0 < self.validation_fraction < 0.5:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}; allowed: 0 < fraction < 0.5"
            )
        if not 0 < self.near_duplicate_jaccard <= 1:
            raise ValueError(
                f"near_duplicate_jaccard={self.near_duplicate_jaccard}; allowed: 0 < overlap <= 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitDocuments:
    """Documents divided. Inside a domain they stand in the order of a hash of their text.

    Attributes:
        train: domain -> documents.
        validation: domain -> documents; a domain without any is not a key.
        num_duplicates: domain -> exact copies dropped.
        num_clusters: domain -> clusters among its documents.
    """

    train: Mapping[str, tuple[Document, ...]]
    validation: Mapping[str, tuple[Document, ...]]
    num_duplicates: Mapping[str, int]
    num_clusters: Mapping[str, int]


def split_documents(documents: Sequence[Document], *, config: SplitConfig) -> SplitDocuments:
    """Return the documents without exact copies, divided so that no cluster is on both sides.

    Of equal texts in several places, the one whose domain and path sort first is kept.

    Args:
        documents: in any order.
        config: how to divide.
    """
    kept, identities, num_duplicates = _distinct(documents)
    clusters = UnionFind(len(kept))
    _join_families(kept, clusters=clusters)
    texts = [document.text for document in kept]
    join_near_duplicates(
        signatures(texts), threshold=config.near_duplicate_jaccard, clusters=clusters
    )
    roots = [clusters.find(number) for number in range(len(kept))]
    held_out = _held_out(kept, roots, identities, config=config)
    sides: dict[bool, dict[str, list[Document]]] = {
        True: defaultdict(list),
        False: defaultdict(list),
    }
    for document, root in zip(kept, roots, strict=True):
        sides[root in held_out][document.domain].append(document)
    pairs = {(document.domain, root) for document, root in zip(kept, roots, strict=True)}
    return SplitDocuments(
        train={name: tuple(found) for name, found in sides[False].items()},
        validation={name: tuple(found) for name, found in sides[True].items()},
        num_duplicates=num_duplicates,
        num_clusters=Counter(domain for domain, _ in pairs),
    )


def _distinct(
    documents: Sequence[Document],
) -> tuple[list[Document], list[bytes], Mapping[str, int]]:
    """Return the distinct documents in order of their texts' digests, the digests, and copies."""
    digests = [
        hashlib.blake2b(one.text.encode("utf-8"), digest_size=16).digest() for one in documents
    ]
    order = sorted(
        range(len(documents)),
        key=lambda number: (digests[number], documents[number].domain, documents[number].path),
    )
    kept: list[Document] = []
    identities: list[bytes] = []
    copies: Counter[str] = Counter()
    for number in order:
        if identities and identities[-1] == digests[number]:
            copies[documents[number].domain] += 1
            continue
        kept.append(documents[number])
        identities.append(digests[number])
    return kept, identities, copies


def _join_families(documents: Sequence[Document], *, clusters: UnionFind) -> None:
    """Join the documents that their source says belong together."""
    first: dict[tuple[str, str], int] = {}
    for number, document in enumerate(documents):
        if document.family:
            clusters.join(first.setdefault((document.domain, document.family), number), number)


def _held_out(
    documents: Sequence[Document],
    roots: Sequence[int],
    identities: Sequence[bytes],
    *,
    config: SplitConfig,
) -> set[int]:
    """Return the roots of the clusters that go to validation."""
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    for document, root in zip(documents, roots, strict=True):
        sizes[document.domain][root] += len(document.text.encode("utf-8"))
    draws = {root: _draw(identities[root], seed=config.seed) for root in set(roots)}
    too_large = {
        root
        for found in sizes.values()
        for root, size in found.items()
        if size > LARGEST_SHARE * config.validation_fraction * found.total()
    }
    chosen = {
        root
        for root, draw in draws.items()
        if draw < config.validation_fraction and root not in too_large
    }
    for domain in sorted(sizes):
        found = sizes[domain]
        if len(found) < LEAST_CLUSTERS or chosen.intersection(found):
            continue
        limit = LARGEST_SHARE * found.total()
        small = [root for root, size in found.items() if size <= limit]
        if small:
            chosen.add(min(small, key=_by(draws)))
    return chosen


def _draw(identity: bytes, *, seed: int) -> float:
    """Return a number in [0, 1) that depends on the cluster and the seed alone."""
    digest = hashlib.blake2b(f"split:{seed}:".encode() + identity, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _by(draws: Mapping[int, float]) -> Callable[[int], float]:
    return draws.__getitem__
