"""Under which name does a checkpoint wait that a run must not go on from? No torch."""

import logging
import os
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)


def set_aside(folder: Path, *, why: Literal["damaged", "rewound"] = "damaged") -> Path | None:
    """Rename a checkpoint that a run must not go on from; None if the disk refuses.

    Args:
        folder: the checkpoint.
        why: what its new name says: it is `damaged`, or the run was `rewound` to an older one.
    """
    number = 0
    while (aside := folder.with_name(f"{why}_{folder.name}.{number}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as error:
        log.warning("%s could not be set aside: %s", folder, error)
        return None
    log.warning("%s is %s and now called %s", folder, why, aside.name)
    return aside
