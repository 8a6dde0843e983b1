"""The log of a run: a few lines of text that say when it began, how each validation went, and how it ended.

It is for people, on this machine or on a node of a cluster. Nothing reads it back: it decides no number, and so it is
no part of any key.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from transformers import TrainerCallback

from mome_utils.distributed import is_main

__all__ = ["LOG", "RunLog"]

#: Name of the log in the folder of a run, finished or not.
LOG = "log.txt"


class RunLog(TrainerCallback):
    """The log of one run, written line by line: what it holds survives whatever happens next.

    Add it to the run's trainer, inside a ``with`` block around the whole run. A run that goes on after a stop goes on
    with its log. Each line begins with the time (UTC).

    Args:
        folder: of the run under way; made where it is missing.
        about: what is run, for the first line.
    """

    def __init__(self, folder: Path, about: str) -> None:
        self.folder = folder
        self.about = about

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.write(f"started: {self.about}")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            said = str(error).strip().splitlines()
            self.write(f"stopped by {type(error).__name__}" + (f": {said[0]}" if said else ""))

    def write(self, text: str) -> None:
        """Append a line; of several processes that train together, the main one does."""
        if not is_main():
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        with open(self.folder / LOG, "a", encoding="utf-8") as stream:
            stream.write(f"{now} {text}\n")

    def keep(self, folder: Path) -> None:
        """Copy the log into the folder of the finished run, closed by a last line."""
        self.write("finished")
        shutil.copyfile(self.folder / LOG, folder / LOG)

    # --- what the trainer tells

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = f", from step {state.global_step} on" if state.global_step else ""
        self.write(f"training: {state.max_steps} steps of {args.train_batch_size * args.world_size} sequences{after}")

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        scores = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        mean = scores.pop("loss")
        parts = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
        self.write(f"step {state.global_step} of {state.max_steps}: {mean:.4f} validation bits per byte ({parts})")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.write(f"trained to step {state.global_step}")
