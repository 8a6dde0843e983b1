"""What a notebook opens: the profile, the corpus, the store of results, and how results are shown and kept.

Where things lie says :mod:`mome_utils.places`; its names are here for notebooks.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import Image, Markdown, display

from mome_utils.artifacts import Store, canonical_json, digest, file_digest, source_digest, write_atomic
from mome_utils.config import MomeError, Profile, load_profile
from mome_utils.corpus import Corpus, load_corpus
from mome_utils.display import SweepProgress, markdown_table, rounded
from mome_utils.memory import keep_freed_memory
from mome_utils.places import artifacts_root, project_root, study_folder
from mome_utils.records import EVERY, listing, seconds_saved
from mome_utils.score_store import SCORE_MODULES, ScoreStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mome_utils.dataset import StudyData
    from mome_utils.intervals import Interval
    from mome_utils.routing import TokenRouter
    from mome_utils.runs import Run
    from mome_utils.training import TrainSpec

__all__ = ["Study", "artifacts_root", "project_root", "study_folder"]

DATASET_MODULES = tuple(f"mome_utils.{m}" for m in ("corpus", "tokenization", "balance", "dataset"))
ROUTER_MODULES = tuple(f"mome_utils.{m}" for m in ("router_fit", "router_trials", "router_calibration", "routing"))
#: What a verdict rests on besides the rows: a changed margin makes the notebooks that settle claims stale.
CLAIM_MODULES = tuple(f"mome_utils.{m}" for m in ("claims", "crossed", "intervals"))
#: The same for the notebook that reads the results of all others.
LEDGER_MODULES = tuple(f"mome_utils.{m}" for m in ("evidence", "ledger", "calibration"))
#: Profile fields that decide the data set, and so its key.
DATASET_FIELDS = (
    "topics", "vocab_size", "block_size", "validation_fraction", "test_fraction", "max_diff_percent",
    "common_documents",
)


@dataclass
class Study:
    """One notebook's view of the study. Open it with :meth:`open`, close it with :meth:`finish`."""

    notebook: str
    profile: Profile
    corpus: Corpus
    seeds: tuple[int, ...]
    store: Store
    #: Manifests read or made so far, relative to the store, with their SHA-256: what staleness is judged by.
    touched: dict[str, str] = field(default_factory=dict)
    #: Seconds of training behind each run, 0 for those trained by this notebook, by manifest.
    loaded: dict[str, float] = field(default_factory=dict)
    #: Seconds of training behind each run of the extended arms, and those of them trained by this notebook.
    extra: dict[str, float] = field(default_factory=dict)
    extra_trained: set[str] = field(default_factory=set)
    #: Modules that define the tables kept here, beyond those of claims.
    modules: tuple[str, ...] = ()
    _tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    _data: StudyData | None = None

    @classmethod
    def open(
        cls, notebook: str, *, profile: str = "laptop", corpus: str = "embedded", languages: Sequence[str] = (),
        seeds: int = 0, overrides: Mapping[str, Any] | None = None, quiet: bool = False,
    ) -> Study:
        """Check the parameters, read the corpus and say what is about to be studied.

        Args:
            notebook: name of the calling notebook, without suffix.
            profile: a preset of :mod:`mome_utils.config`.
            corpus: ``embedded`` or a folder.
            languages: codes in the order wanted; empty for all.
            seeds: number of seeds; 0 for the profile's.
            overrides: fields of the profile to replace.

        Raises:
            MomeError: one sentence about the first parameter that cannot be used.
        """
        if not isinstance(seeds, int) or seeds < 0:
            raise MomeError(f"seeds must be 0 (the profile's) or a positive number, not {seeds!r}.")
        chosen = load_profile(profile, dict(overrides or {}))
        if seeds:
            chosen = dataclasses.replace(chosen, seeds=seeds)
        documents = load_corpus(corpus, list(languages) or None, topics=chosen.topics, root=project_root())
        study = cls(notebook, chosen, documents, tuple(range(chosen.seeds)), Store(study_folder(profile, corpus)))
        keep_freed_memory()  # a training step takes and frees the same large blocks over and over
        if not quiet:
            study._introduce()
        return study

    @property
    def languages(self) -> tuple[str, ...]:
        """Language codes in the study's order."""
        return self.corpus.languages

    def _introduce(self) -> None:
        import torch

        from mome_utils.compilation import compiler
        from mome_utils.sweeps import quiet
        from mome_utils.training import resolve_dtype

        # Bars that transformers draws while it loads a model would stay in the notebook for good, and it warns of
        # masks that are missing wherever a full block happens to end with </s>, our padding token.
        quiet()
        device = "GPU" if torch.cuda.is_available() else "CPU"
        rows = [
            ("profile", self.profile.name),
            ("corpus", f"{self.corpus.name}, {len(self.corpus.documents):,} documents in {', '.join(self.languages)}"),
            ("device", f"{device}, {resolve_dtype(self.profile.dtype)}"),
            *([("compilation", "no C++ compiler was found: everything runs eagerly")]
              if self.profile.compile and not compiler() else []),
            ("seeds", ", ".join(map(str, self.seeds))),
        ]
        display(Markdown("| | |\n|---|---|\n" + "\n".join(f"| **{a}** | {b} |" for a, b in rows)))

    # ------------------------------------------------------------------ data

    def dataset_key(self) -> str:
        """Name of the data set that this profile makes of this corpus."""
        fields = {name: getattr(self.profile, name) for name in DATASET_FIELDS}
        return digest({
            "corpus": self.corpus.fingerprint, "languages": self.languages, **fields,
            "sources": [source_digest(m) for m in DATASET_MODULES],
        })

    def build_data(self) -> StudyData:
        """The study's data set, made if it is not there or damaged (notebook 01)."""
        from mome_utils.artifacts import DamagedArtifact
        from mome_utils.dataset import build_dataset

        key = self.dataset_key()
        try:
            present = self.store.load("dataset", key) is not None
        except DamagedArtifact:
            present = False
        if not present:
            with self.store.create(
                "dataset", key, inputs={"corpus": self.corpus.fingerprint}, parameters=self.profile,
                modules=DATASET_MODULES,
            ) as result:
                build_dataset(self.corpus, self.profile, result.folder)
        return self.data()

    def data(self) -> StudyData:
        """The study's data set; an error that names notebook 01 where it has not been made."""
        if self._data is None:
            from mome_utils.dataset import StudyData

            folder = self.store.require("dataset", self.dataset_key(), notebook="01_dataset_creation")
            self.touch(folder)
            self._data = StudyData.load(folder)
        return self._data

    # ------------------------------------------------------------------ runs

    def runs(self, specs: Sequence[TrainSpec], *, extra: bool = False) -> list[Run]:
        """The finished runs of ``specs``, in order; what is not in the store is trained, side by side.

        ``extra`` marks runs beyond a notebook's core set, whose time is reported apart.

        Raises:
            MissingArtifact: names the notebook that trains a teacher the specs need, before anything starts.
        """
        from mome_utils.continual import run_key, train_or_load
        from mome_utils.runs import STAGE, Run, cache_folder
        from mome_utils.sweeps import in_parallel, train_job, training_cost

        keys = [run_key(spec) for spec in specs]
        for teacher, language, cache in {(s.teacher, g, s.cache) for s in specs if s.teacher for g in s.languages}:
            if cache is None:  # else the teacher may be any model, and its cache is all there is of it
                self.touch(self.store.require(STAGE, teacher, notebook="02_teacher_training"))
            self.touch(cache_folder(self.store, teacher, self.data().fingerprint, language, cache))
        todo = {k: s for k, s in zip(keys, specs, strict=True) if not self.store.has(STAGE, k)}
        for groups, language in {(s.groups, g) for s in todo.values() if s.groups for g in s.languages}:
            for split in ("train", "validation"):  # a corpus too small for its groups says so before anything starts
                self.data().blocks_of_groups(split, language, groups)
        loaded = len(set(keys)) - len(todo)
        if todo:
            longest_first = sorted(todo.values(), key=training_cost, reverse=True)
            jobs = [(spec, self.store.root, self.data().path) for spec in longest_first]
            with SweepProgress(list(todo), self.store.root / STAGE) as progress:
                in_parallel(train_job, jobs, workers=min(self.profile.jobs, len(jobs)), watch=progress.update)
        runs = [
            train_or_load(spec, self.store, self.data()) if key not in todo  # checked against its hashes
            else Run(spec, key, self.store.path(STAGE, key))
            for key, spec in zip(keys, specs, strict=True)
        ]
        for run in {run.key: run for run in runs}.values():
            self.count_run(run.folder, run.metrics, trained=run.key in todo, extra=extra)
        if not todo:
            display(Markdown(f"*{loaded} run{'s' * (loaded != 1)} loaded from the store.*"))
        return runs

    def count_run(self, folder: Path, metrics: Mapping[str, Any], *, trained: bool, extra: bool = False) -> None:
        """Note that this notebook used the run in ``folder``, and the seconds of training behind it.

        Args:
            folder: the run's.
            metrics: the run's; ``seconds`` is read.
            trained: by this notebook, just now.
            extra: as in :meth:`runs`.
        """
        self.touch(folder)
        name, seconds = self._name(folder), float(metrics["seconds"]) / self.profile.jobs
        if extra:
            self.extra.setdefault(name, seconds)
            self.extra_trained |= {name} if trained else set()
        else:  # zero for what was trained here: the notebook's own time already holds it, also when asked again
            self.loaded.setdefault(name, 0.0 if trained else seconds)

    def cache_teachers(self, teachers: Sequence[Run]) -> None:
        """Cache every teacher's states for every language, side by side (notebook 02)."""
        from mome_utils.runs import STATES, states_key
        from mome_utils.sweeps import cache_job, in_parallel

        jobs = [(run.spec, language, self.store.root, self.data().path)
                for run in teachers for language in self.languages]
        in_parallel(cache_job, jobs, workers=min(self.profile.jobs, len(jobs)))
        for run in teachers:
            for language in self.languages:
                key = states_key(run.key, self.data().fingerprint, language)
                self.touch(self.store.path(STATES, key))

    # --------------------------------------------------------------- scores

    @property
    def scores(self) -> ScoreStore:
        """The tables of scores on this data set that the store holds; what is read there is touched."""
        return ScoreStore(self.store, self.data().fingerprint, self.profile.stride, self.touch)

    def score(
        self, runs: Run | Sequence[Run], languages: Sequence[str] | None = None, *, step: int | None = None,
        split: str = "test",
    ) -> pd.DataFrame:
        """Every document of a split scored by each run: columns ``run, seed, language, document, nats, bytes, tokens``.

        Args:
            runs: one run or several.
            languages: which documents; by default those of the languages a run was trained on.
            step: a snapshot instead of the final model.
            split: ``test`` or ``validation``.
        """
        from mome_utils.runs import Run

        some = [runs] if isinstance(runs, Run) else runs
        return pd.concat(self.score_snapshots([(run, step) for run in some], languages, split), ignore_index=True)

    def score_snapshots(
        self, snapshots: Sequence[tuple[Run, int | None]], languages: Sequence[str] | None = None, split: str = "test"
    ) -> list[pd.DataFrame]:
        """A table of :meth:`score` for each run and step (``None`` for the final model), all scored side by side."""
        from mome_utils.sweeps import score_job

        wanted: list[tuple[dict[str, Any], tuple]] = []
        for run, step in snapshots:
            codes = tuple(languages or run.spec.languages)
            inputs = {"run": run.key, "languages": codes, "step": step, "split": split}
            job = (run.spec, run.folder, step, codes, split, self.profile.stride, self.data().path)
            wanted.append((inputs, job))
        tables = self.cached_tables("documents", wanted, score_job)
        return [table.assign(run=run.key, seed=run.spec.seed)
                for (run, _), table in zip(snapshots, tables, strict=True)]

    def score_arms(
        self, arms: Mapping[str, Sequence[Run]], languages: Sequence[str] | None = None, *, step: int | None = None
    ) -> pd.DataFrame:
        """:meth:`score` for several arms at once, with a column ``arm``; each document of a test split once per run."""
        rows = self.score([run for runs in arms.values() for run in runs], languages, step=step)
        arm_of = {run.key: arm for arm, runs in arms.items() for run in runs}
        return rows.drop_duplicates().assign(arm=lambda table: table["run"].map(arm_of))

    def curves(self, arms: Mapping[str, Sequence[Run]]) -> pd.DataFrame:
        """Validation curves of runs by arm: ``step, value`` (bits per byte), ``language, arm, seed``."""
        pieces = []
        for arm, runs in arms.items():
            for run in runs:
                table = run.history().dropna(subset=["val_mean"])
                values = {f"val_{language}": language for language in self.languages}
                long = table.rename(columns=values).melt(
                    "step", [c for c in values.values() if f"val_{c}" in table], "language", "value"
                )
                pieces.append(long.assign(arm=arm, seed=run.spec.seed))
        return pd.concat(pieces, ignore_index=True)

    def cached_rows(
        self, name: str, inputs: Mapping[str, Any], compute: Callable[[], pd.DataFrame],
        modules: Sequence[str] = SCORE_MODULES,
    ) -> pd.DataFrame:
        """A table computed once: ``inputs`` (keys of runs, settings) and the sources of ``modules`` are its key."""
        scores = self.scores
        key = scores.key(name, inputs, modules)
        if not scores.has(key):
            scores.save(key, compute(), inputs, modules)
        return scores.read(key)

    def cached_tables(
        self, name: str, wanted: Sequence[tuple[Mapping[str, Any], tuple]], function: Callable[..., pd.DataFrame],
        modules: Sequence[str] = SCORE_MODULES,
    ) -> list[pd.DataFrame]:
        """:meth:`cached_rows` of several inputs, each with the arguments of ``function``, computed side by side."""
        return self.scores.compute(name, wanted, function, workers=self.profile.jobs, modules=modules)

    # --------------------------------------------------------------- router

    def _router_key(self) -> str:
        return digest({"data": self.data().fingerprint, "source": source_digest(*ROUTER_MODULES)})

    def save_router(self, router: TokenRouter) -> None:
        """Keep the fitted router for the notebooks that follow (notebook 04)."""
        inputs = {"data": self.data().fingerprint}
        with self.store.create(
            "router", self._router_key(), inputs=inputs, parameters={}, modules=ROUTER_MODULES
        ) as result:
            router.save(result.folder)
        self.touch(self.store.path("router", self._router_key()))

    def router(self) -> TokenRouter:
        """The router that notebook 04 fitted on this data."""
        from mome_utils.routing import TokenRouter

        folder = self.store.require("router", self._router_key(), notebook="04_router_bakeoff")
        self.touch(folder)
        return TokenRouter.load(folder)

    # ---------------------------------------------------------- show and keep

    def show(self, figure: Figure, name: str, *, caption: str, alt: str) -> None:
        """Save a figure as ``figures/<notebook>/<name>.svg`` of the run and display it with its caption."""
        from mome_utils.figures import png_bytes, save_svg

        target = self.store.root / "figures" / self.notebook / f"{name}.svg"
        target.parent.mkdir(parents=True, exist_ok=True)
        save_svg(figure, target)
        width = int(figure.get_figwidth() * 100)
        display(Image(data=png_bytes(figure), format="png", alt=alt, width=width))
        display(Markdown(f"*{caption}*"))

    def table(self, table: pd.DataFrame, *, caption: str = "", digits: int = 3) -> None:
        """Display a table with its numbers rounded and its caption below."""
        shown = rounded(table, digits)
        display(Markdown(markdown_table(shown if isinstance(shown.index, pd.RangeIndex) else shown.reset_index())))
        if caption:
            display(Markdown(f"*{caption}*"))

    def save(self, table: pd.DataFrame, name: str) -> None:
        """Keep a result table; :meth:`finish` writes all of them at once."""
        self._tables[name] = table.reset_index(drop=isinstance(table.index, pd.RangeIndex))

    def settle(self, effects: Mapping[str, Interval | None]) -> pd.DataFrame:
        """Verdicts on the claims whose effects were measured here: displayed, kept and returned."""
        from mome_utils.claims import verdict_table

        table = verdict_table(effects)
        self._tables["claims"] = table
        shown = table.assign(effect=[
            "–" if pd.isna(row.estimate) else f"{row.estimate:+.4f} [{row.low:+.4f}, {row.high:+.4f}] {row.unit}"
            for row in table.itertuples()
        ])
        self.table(shown[["claim", "statement", "effect", "margin", "verdict", "reason"]])
        return table

    def say(self, text: str) -> None:
        """Display a computed sentence as Markdown."""
        display(Markdown(text))

    def touch(self, folder: Path) -> None:
        """Note that this notebook read or made the result in ``folder``."""
        self.touched[self._name(folder)] = file_digest(folder / "manifest.json")

    def touch_results(self) -> Path:
        """Note that this notebook reads the tables of all others, whichever there are; the folder they lie in."""
        results = self.store.root / "results"
        for manifest in sorted(results.glob("*/manifest.json")):
            if manifest.parent.name != self.notebook:
                self.touch(manifest.parent)
        self.touched[f"results/{EVERY}"] = listing(results, self.notebook)
        self.modules = (*CLAIM_MODULES, *LEDGER_MODULES)
        return results

    def _name(self, folder: Path) -> str:
        """A result's manifest, relative to the store."""
        return (folder / "manifest.json").relative_to(self.store.root).as_posix()

    def finish(self) -> None:
        """Write the result tables, and what this notebook touched; the last cell of every notebook."""
        settled = CLAIM_MODULES if "claims" in self._tables else ()
        with self.store.create(
            "results", self.notebook, inputs=dict(self.touched), parameters=self.profile,
            modules=list(dict.fromkeys((*settled, *self.modules))),
        ) as result:
            for name, table in self._tables.items():
                table.to_parquet(result.folder / f"{name}.parquet", index=False)
        self.touch(self.store.path("results", self.notebook))
        extra = {name: seconds for name, seconds in self.extra.items() if name not in self.loaded}
        records = self.store.root / "notebooks"
        inside = sum(seconds for name, seconds in extra.items() if name in self.extra_trained)  # of the notebook's time
        record = {
            "notebook": self.notebook, "manifests": self.touched, "extended": sorted(extra),
            "run_seconds": seconds_saved(records, self.notebook, self.loaded) - inside,
            "extra_seconds": seconds_saved(records, self.notebook, extra),
        }
        target = records / f"{self.notebook}.touched.json"
        write_atomic(target, json.dumps(json.loads(canonical_json(record)), indent=1) + "\n")
        names = ", ".join(self._tables) or "no tables"
        display(Markdown(f"Saved for the notebooks that follow: {names}."))
