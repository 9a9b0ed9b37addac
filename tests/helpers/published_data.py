"""Published files that some tests read: in the folder that ``HKD_TEST_DATA`` names, if it does."""

import os
from pathlib import Path

import pytest

_FOLDER = os.environ.get("HKD_TEST_DATA")
# Of the annotations, and of detections with official scores.
CITYPERSONS = Path(_FOLDER or "HKD_TEST_DATA", "citypersons")

needs_citypersons = pytest.mark.skipif(
    not CITYPERSONS.is_dir(),
    reason="HKD_TEST_DATA names no folder with citypersons/, the published annotations",
)


def published_data() -> Path:
    """The folder; skips the test where there is none."""
    if not _FOLDER or not Path(_FOLDER).is_dir():
        pytest.skip("HKD_TEST_DATA names no folder of published annotations")
    return Path(_FOLDER)
