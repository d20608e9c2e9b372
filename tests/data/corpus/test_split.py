"""The split: estimated overlaps against overlaps counted with sets; clusters are not torn."""

import itertools
import random
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from data.corpus.near_duplicates import UnionFind, join_near_duplicates, signatures
from data.corpus.python_stdlib import read_stdlib
from data.corpus.record import Document
from data.corpus.split import SplitConfig, SplitDocuments, split_documents

WORDS = [f"w{number}" for number in range(2000)]


def words(rng: random.Random, count: int) -> list[str]:
    return [rng.choice(WORDS) for _ in range(count)]


def document(text: str, *, domain: str = "d", path: str = "", family: str = "") -> Document:
    return Document(text=text, domain=domain, path=path or text[:20], family=family)


def true_overlap(one: str, other: str) -> float:
    runs = [
        {tuple(split[at : at + 5]) for at in range(max(1, len(split) - 4))}
        for split in (one.split(), other.split())
    ]
    return len(runs[0] & runs[1]) / len(runs[0] | runs[1])


def test_signatures_estimate_the_overlap_of_word_runs() -> None:
    rng = random.Random(0)
    base = words(rng, 400)
    texts = [" ".join(base[:kept] + words(rng, 400 - kept)) for kept in range(0, 401, 50)]

    found = signatures(texts)

    for one, other in itertools.combinations(range(len(texts)), 2):
        estimate = (found[one] == found[other]).mean()
        # 128 draws: standard deviation at most 0.044; four of them
        assert abs(estimate - true_overlap(texts[one], texts[other])) < 0.18


def test_texts_are_joined_when_they_overlap_enough_and_else_not() -> None:
    rng = random.Random(1)
    originals = [" ".join(words(rng, 300)) for _ in range(50)]
    copies = [" ".join([*text.split()[:280], *words(rng, 20)]) for text in originals]  # 0.87
    clusters = UnionFind(100)

    join_near_duplicates(signatures([*originals, *copies]), threshold=0.6, clusters=clusters)

    assert [clusters.find(number + 50) for number in range(50)] == list(range(50))


def test_short_and_wordless_texts_have_signatures_too() -> None:
    found = signatures(["", "\uc548\ub155", "\uc548\ub155", "a b", "  "])

    np.testing.assert_array_equal(found[1], found[2])
    assert (found[1] == found[3]).mean() < 0.1
    np.testing.assert_array_equal(found[0], found[4])


def corpus(*, seed: int = 0, number: int = 400) -> list[Document]:
    rng = random.Random(seed)
    return [
        document(" ".join(words(rng, 60)), domain=rng.choice("ab"), path=f"{at}")
        for at in range(number)
    ]


def members(side: SplitDocuments, name: str) -> set[str]:
    return {one.text for found in getattr(side, name).values() for one in found}


def test_the_sides_are_disjoint_and_complete() -> None:
    texts = {one.text for one in corpus()}

    split = split_documents(corpus(), config=SplitConfig(validation_fraction=0.2))

    train, validation = members(split, "train"), members(split, "validation")
    assert train | validation == texts
    assert not train & validation
    assert 50 <= len(validation) <= 110  # binomial(400, 0.2): mean 80, sd 8


def test_the_order_of_documents_is_of_no_consequence() -> None:
    config = SplitConfig(validation_fraction=0.1)
    shuffled = corpus()
    random.Random(5).shuffle(shuffled)

    assert split_documents(shuffled, config=config) == split_documents(corpus(), config=config)


def test_another_seed_makes_another_choice() -> None:
    sides = [split_documents(corpus(), config=SplitConfig(seed=seed)) for seed in (0, 1)]

    assert members(sides[0], "validation") != members(sides[1], "validation")


def test_documents_keep_their_side_when_others_come() -> None:
    config = SplitConfig(validation_fraction=0.1)
    before = members(split_documents(corpus(), config=config), "validation")

    more = split_documents([*corpus(), *corpus(seed=1, number=100)], config=config)

    assert before <= members(more, "validation")


def test_exact_copies_are_dropped_and_counted() -> None:
    copies = [document("a b c", domain="z", path="1"), document("a b c", domain="b", path="2")]

    split = split_documents([*corpus(number=20), *copies, copies[0]], config=SplitConfig())

    assert split.num_duplicates == {"z": 2}
    assert "z" not in split.train


def test_near_duplicates_and_families_stay_together() -> None:
    rng = random.Random(3)
    documents = corpus()
    groups: list[set[str]] = []
    for number in range(40):
        text = words(rng, 60)
        near = [" ".join([*text[:58], *words(rng, 2)]) for _ in range(3)]
        kin = [" ".join(words(rng, 60)) for _ in range(3)]
        documents += [document(one) for one in near]
        documents += [document(one, family=f"f{number}") for one in kin]
        groups += [set(near), set(kin)]

    split = split_documents(documents, config=SplitConfig(validation_fraction=0.3))

    validation = members(split, "validation")
    assert all(len(group & validation) in {0, len(group)} for group in groups)
    assert any(group <= validation for group in groups)


@pytest.mark.slow
@pytest.mark.skipif(
    not (Path(sysconfig.get_path("stdlib")) / "encodings" / "cp1252.py").exists(),
    reason="this interpreter has no sources of its standard library",
)
def test_the_code_pages_of_the_standard_library_are_on_one_side() -> None:
    documents = [
        one
        for one in read_stdlib(domain="python")
        if isinstance(one, Document) and one.path.startswith(("encodings/", "asyncio/"))
    ]
    assert len([one for one in documents if one.path.startswith("encodings/cp")]) > 30

    for seed in range(5):
        config = SplitConfig(seed=seed, validation_fraction=0.3)
        split = split_documents(documents, config=config)
        sides = {
            side
            for side in ("train", "validation")
            for found in getattr(split, side).values()
            for one in found
            if one.path.startswith("encodings/cp")
        }
        assert len(sides) == 1


def test_one_large_cluster_does_not_make_up_validation() -> None:
    rng = random.Random(4)
    large = document(" ".join(words(rng, 6000)), domain="a")

    for seed in range(20):
        config = SplitConfig(seed=seed, validation_fraction=0.1)
        split = split_documents([*corpus(), large], config=config)
        assert large.text in members(split, "train")


def test_a_small_domain_gets_validation_if_it_has_eight_clusters() -> None:
    rng = random.Random(6)
    for number, expected in ((7, False), (8, True)):
        small = [document(" ".join(words(rng, 50)), domain="small") for _ in range(number)]

        split = split_documents([*corpus(), *small], config=SplitConfig(validation_fraction=0.001))

        assert ("small" in split.validation) == expected
        assert split.num_clusters["small"] == number


@pytest.mark.parametrize(
    ("key", "value"),
    [("validation_fraction", 0.0), ("validation_fraction", 0.5), ("near_duplicate_jaccard", 1.1)],
)
def test_shares_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}={value}; allowed"):
        SplitConfig(**{key: value})  # type: ignore[arg-type]
