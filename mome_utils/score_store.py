"""Tables of scores in the store: computed once for their inputs, their settings and the code that makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mome_utils.artifacts import Store, digest, source_digest

__all__ = ["SCORE_MODULES", "ScoreStore"]

#: Modules that define the scores of documents.
SCORE_MODULES = ("mome_utils.evaluation",)
_STAGE = "scores"


@dataclass(frozen=True)
class ScoreStore:
    """The tables of scores on one data set.

    Attributes:
        store: where they lie.
        data: fingerprint of the data set.
        stride: tokens from one window to the next, see :func:`mome_utils.evaluation.score_documents`.
        touch: called with the folder of each table that is read.
    """

    store: Store
    data: str
    stride: int
    touch: Callable[[Path], None]

    def key(self, name: str, inputs: Mapping[str, Any], modules: Sequence[str] = SCORE_MODULES) -> str:
        """Name of a table in the store.

        Args:
            name: what it is.
            inputs: keys of runs, and settings.
            modules: whose sources decide what it holds.
        """
        return digest({
            "name": name, "inputs": inputs, "data": self.data, "stride": self.stride,
            "sources": [source_digest(m) for m in modules],
        })

    def has(self, key: str) -> bool:
        """Whether the table is there.

        Raises:
            DamagedArtifact: it is, but its bytes have changed.
        """
        return self.store.load(_STAGE, key) is not None

    def save(
        self, key: str, table: pd.DataFrame, parameters: Mapping[str, Any], modules: Sequence[str] = SCORE_MODULES
    ) -> None:
        """Keep a table under its :meth:`key`; ``parameters`` and ``modules`` are noted in its manifest."""
        _save(self.store, self.data, key, table, parameters, modules)

    def read(self, key: str) -> pd.DataFrame:
        """A table that is there, touched."""
        folder = self.store.path(_STAGE, key)
        self.touch(folder)
        return pd.read_parquet(folder / "rows.parquet")

    def compute(
        self, name: str, wanted: Sequence[tuple[Mapping[str, Any], tuple]], function: Callable[..., pd.DataFrame], *,
        workers: int, modules: Sequence[str] = SCORE_MODULES,
    ) -> list[pd.DataFrame]:
        """Several tables of one name, read; those that are not there are computed first, side by side.

        Args:
            name: what they are.
            wanted: of each table the inputs (keys of runs, and settings) and the arguments of ``function``.
            function: gives one table; see :func:`mome_utils.sweeps.in_parallel`.
            workers: processes.
            modules: whose sources decide what the tables hold.
        """
        from mome_utils.sweeps import in_parallel

        keyed = [(self.key(name, inputs, modules), inputs, job) for inputs, job in wanted]
        todo = {
            key: (function, job, self.store, self.data, key, inputs, modules)
            for key, inputs, job in keyed if not self.has(key)
        }
        in_parallel(_compute, list(todo.values()), workers=max(1, min(workers, len(todo))))
        return [self.read(key) for key, *_ in keyed]


def _compute(
    function: Callable[..., pd.DataFrame], job: tuple, store: Store, data: str, key: str,
    parameters: Mapping[str, Any], modules: Sequence[str],
) -> None:
    """Compute a table and keep it at once: what is done when another job fails is not lost."""
    _save(store, data, key, function(*job), parameters, modules)


def _save(
    store: Store, data: str, key: str, table: pd.DataFrame, parameters: Mapping[str, Any], modules: Sequence[str]
) -> None:
    with store.create(_STAGE, key, inputs={"data": data}, parameters=dict(parameters), modules=modules) as result:
        table.to_parquet(result.folder / "rows.parquet", index=False)
