"""The manifest: what is none is refused with the way to a good one."""

from pathlib import Path

import pytest

from data.corpus.manifest import CorpusManifest
from data.indexed.format import DataError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no finished corpus; make one with"),
        ("", "cannot be read as a manifest"),
        ("[]", "no JSON object"),
        ('{"schema_version": 99}', "schema_version 99, this program reads 2"),
        ('{"schema_version": 2}', "not a manifest of version 2"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)

    with pytest.raises(DataError, match=message):
        CorpusManifest.load(tmp_path)
