"""URLs keep their slashes, and have folders and names below them as paths do."""

from pathlib import Path, PurePosixPath

import pytest

from data.indexed.location import Url, as_location, with_ending


@pytest.mark.parametrize(
    "text",
    ["s3://bucket/a.b/train.manifest", "memory://a", "file:///a", "file:///a/b", "local::s3://b/c"],
)
def test_a_text_with_a_scheme_is_a_url_and_stays_as_it_is(text: str) -> None:
    place = as_location(text)

    assert isinstance(place, Url)
    assert str(place) == text
    assert place.name == PurePosixPath(text).name
    assert str(place.parent / place.name) == text
    assert as_location(place) == place


def test_any_other_text_is_a_path() -> None:
    assert as_location("a/b.c") == Path("a/b.c")
    assert as_location(Path("/a")) == Path("/a")


@pytest.mark.parametrize("prefix", ["s3://bucket/a/b.c", "a/b.c", "b.c"])
def test_an_ending_is_added_and_dots_are_kept(prefix: str) -> None:
    assert str(with_ending(as_location(prefix), "win")) == f"{prefix}.win"
