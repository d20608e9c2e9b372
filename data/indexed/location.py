"""Is a file on this machine's file systems, or behind a URL?

`Path("s3://bucket/a")` loses a slash, so a URL is a value of its own with as much of a path's
behaviour as a dataset needs: a folder, and names below it. Whatever holds `://` is a URL;
`file:///lustre/a` is one, too, and so the way to ask for the block cache in front of a file system.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Url:
    """A file that fsspec opens.

    Attributes:
        text: e.g. `s3://bucket/folder/train.manifest`.
    """

    text: str

    def __str__(self) -> str:
        return self.text

    def __truediv__(self, name: str) -> "Url":
        """Return the file `name` below this one as a folder."""
        return Url(f"{self.text}{name}" if self.text.endswith("/") else f"{self.text}/{name}")

    @property
    def parent(self) -> "Url":
        """The folder."""
        folder = self.text.rpartition("/")[0]
        return Url(f"{folder}/" if folder.endswith("/") else folder)  # what follows the scheme

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.text.rpartition("/")[2]


Location = Path | Url
"""Where a file is."""


def as_location(place: Location | str) -> Location:
    """Return where a file is, a `Url` if `place` is a text with `://`, else a `Path`."""
    if isinstance(place, str):
        return Url(place) if "://" in place else Path(place)
    return place


def with_ending(prefix: Location, ending: str) -> Location:
    """Return `<prefix>.<ending>`; dots inside the prefix are kept."""
    return prefix.parent / f"{prefix.name}.{ending}"
