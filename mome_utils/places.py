"""Where things lie: the checkout, and the folders that runs write to."""

from __future__ import annotations

import os
from pathlib import Path

from mome_utils.artifacts import digest

__all__ = ["artifacts_root", "project_root", "study_folder"]


def project_root() -> Path:
    """The checkout: the nearest folder above the working one that holds the notebooks, else where the package lies."""
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "notebooks").is_dir() and (folder / "mome_utils").is_dir():
            return folder
    return Path(__file__).resolve().parent.parent


def artifacts_root() -> Path:
    """Where runs write: ``data/artifacts`` of the checkout, or the folder that ``MOME_ARTIFACTS`` names."""
    named = os.environ.get("MOME_ARTIFACTS")
    return Path(named).expanduser().resolve() if named else project_root() / "data" / "artifacts"


def study_folder(profile: str, corpus: str = "embedded") -> Path:
    """Folder of everything one profile makes on one corpus; other corpora than the embedded lie beside it."""
    name = profile if corpus == "embedded" else f"{profile}-{digest(str(Path(corpus).expanduser().resolve()))[:8]}"
    return artifacts_root() / name
