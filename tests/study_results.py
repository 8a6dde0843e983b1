"""A small folder of result tables with known effects, as the notebooks would leave it."""

from __future__ import annotations

from collections.abc import Mapping
from math import log
from pathlib import Path

import numpy as np
import pandas as pd

SEEDS, DOCUMENTS, LANGUAGES = 3, 12, ("en", "fr")


def score_rows(effect: float, noise: float = 0.01, **columns: object) -> pd.DataFrame:
    """Scores of one arm, ``effect`` bits per byte above two, with chance of seeds, documents and both."""
    chance = np.random.default_rng(len(str(columns)))
    of_documents = np.random.default_rng(1).normal(0, 0.2, DOCUMENTS)  # of the text, so the same for all arms
    rows = []
    for seed in range(SEEDS):
        of_seed = chance.normal(0, noise)
        for language in LANGUAGES:
            for number, document in enumerate(of_documents):
                size = 1000 + 50 * number
                bits = (2 + effect + document + of_seed + chance.normal(0, noise)) * size
                rows.append({"seed": seed, "language": language, "document": f"d{number}", "nats": bits * log(2),
                             "bytes": size, "tokens": size // 3} | columns)
    return pd.DataFrame(rows)


def report(*rows: tuple[str, float, float, float], seeds: int = SEEDS, documents: int = DOCUMENTS) -> pd.DataFrame:
    """A table of claims: id, estimate, low, high."""
    table = pd.DataFrame(rows, columns=["claim", "estimate", "low", "high"])
    return table.assign(seeds=seeds, documents=documents)


def write_results(folder: Path, tables: Mapping[str, pd.DataFrame]) -> Path:
    """Tables by ``notebook/table`` below ``folder``."""
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table.to_parquet(path, index=False)
    return folder


def small_study(folder: Path) -> Path:
    """Evidence on C1 (equal), C2a (combined clearly better), C3a (reported) and C6 (forgets strongly)."""
    kd, course = "03_kd_alpha_comparison", "06_forgetting_curves"
    arms = [score_rows(0.0, 0.001, arm="fixed"), score_rows(0.0, 0.001, arm="adaptive"),
            score_rows(0.5, 0.001, arm="alternating")]
    stages = [score_rows(0.0 if language == after else 1.0, 0.001, arm="sequential", stage=stage).query(
              "language == @language") for stage, after in enumerate(LANGUAGES, 1) for language in LANGUAGES]
    return write_results(folder, {
        f"{kd}/scores": pd.concat(arms), f"{kd}/claims": report(("C1", 0, -0.01, 0.01), ("C2a", -0.5, -0.6, -0.4)),
        "04_router_bakeoff/claims": report(("C3a", 0.02, 0.0, 0.04), documents=40),
        f"{course}/scores": pd.concat(stages), f"{course}/claims": report(("C6", 1.0, 0.9, 1.1)),
    })
