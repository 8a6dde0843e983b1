"""The command line: ``mome study``, ``batch``, ``report``, ``status``, ``dataset``, ``export``, ``publish``, ``bench``.

Heavy libraries are imported by the command that needs them, so that help and complaints come at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mome_utils import __version__
from mome_utils.config import MomeError, load_profile, profile_names

__all__ = ["main", "parser"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when it succeeded, 1 when a cell of a notebook failed, 2 when what was asked for is wrong, 130 when
        it was interrupted.
    """
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except MomeError as error:
        print(f"mome: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mome: stopped; give the same command again to go on from here.", file=sys.stderr)
        return 130


def _study(options: argparse.Namespace) -> int:
    from mome_utils.places import project_root
    from mome_utils.runner import CellFailed, run_study

    request = _request(options)
    try:
        run_study(request, root=project_root(), only=_items(options.only), force=options.force)
    except CellFailed as error:
        print(f"mome: {error}", file=sys.stderr)
        return 1
    _show_run(request)
    return 0


def _batch(options: argparse.Namespace) -> int:
    from mome_utils.batch import DONE, grid, run_batch
    from mome_utils.places import project_root

    axes: dict[str, list[Any]] = {}
    if options.grid:
        axes |= _grid_file(options.grid)
    for text in options.vary:
        name, value = _assignment(text, "--vary", "seeds=1,3", plain=True)
        axes[name] = [_value(part) for part in _items(value)]
    if not axes:
        raise MomeError("There is nothing to vary: give --vary NAME=VALUE,VALUE or --grid FILE.json.")
    root, out = project_root(), options.out.expanduser().resolve()
    states = run_batch(grid(axes, _request(options), root), out, root=root, only=_items(options.only))
    failed = [name for name, state in states.items() if state != DONE]
    print(f"{len(states) - len(failed)} of {len(states)} runs are done: {_shown(out / 'index.html')}")
    return 1 if failed else 0


def _grid_file(path: Path) -> dict[str, list[Any]]:
    """The axes of a JSON file: an object of lists."""
    try:
        axes = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MomeError(f"The grid {path} cannot be read as JSON ({type(error).__name__}).") from None
    if not isinstance(axes, dict) or not all(isinstance(values, list) for values in axes.values()):
        raise MomeError(f"The grid {path} must be an object of lists, for example {{\"seeds\": [1, 3]}}.")
    return axes


def _report(options: argparse.Namespace) -> int:
    from mome_utils.places import artifacts_root, project_root
    from mome_utils.readme import RESULTS
    from mome_utils.report import ledger_text, write_pages, write_report

    if options.profile:
        _show_run(_request(options))
        return 0
    root = project_root()
    print(ledger_text(write_report(root)))
    index = write_pages(artifacts_root() / "published", root, root / "notebooks", root / RESULTS)
    print(f"The README, figures/claims.svg and {RESULTS}/claims.csv are up to date; all notebooks: {_shown(index)}")
    return 0


def _show_run(request: Any) -> None:
    """Print the ledger of a run, write its report and print where that is."""
    from mome_utils.ledger import ledger
    from mome_utils.places import project_root
    from mome_utils.report import ledger_text, write_pages

    _, folder = request.resolve()
    print(ledger_text(ledger(folder / "results")))
    print(f"The report is {_shown(write_pages(folder, project_root()))}")


def _shown(path: Path) -> str:
    """A path as short as it can be given from here."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _status(options: argparse.Namespace) -> int:
    from mome_utils.overview import in_words
    from mome_utils.places import project_root
    from mome_utils.runner import plan_study, select_notebooks

    request = _request(options)
    resolved, folder = request.resolve()
    notebooks = select_notebooks(project_root())
    plans = plan_study(notebooks, request, resolved, folder)
    for plan in plans:
        print(f"{plan.name:<32}{plan.reason or f'up to date, took {in_words(plan.seconds)}'}")
    stages = sorted(path for path in folder.glob("*") if path.is_dir() and path.name != "notebooks")
    for stage in stages:
        results = list(stage.glob("*/manifest.json"))
        size = sum(file.stat().st_size for file in stage.rglob("*") if file.is_file())
        print(f"{stage.name:<32}{len(results)} stored, {size / 1e6:.1f} MB")
    return 0


def _dataset(options: argparse.Namespace) -> int:
    from mome_utils.corpus import load_corpus
    from mome_utils.places import project_root
    from mome_utils.resource import create_resource

    corpus = load_corpus(_corpus(options.corpus), _items(options.langs) or None, root=project_root())
    manifest = create_resource(
        corpus, max_diff_percent=options.max_diff_percent, common=options.common,
        vocab_size=options.vocab_size, out=options.out, seed=options.seed,
    )
    reached = max(value for split, value in manifest["difference_percent"].items() if split != "asked")
    codes = ", ".join(corpus.languages)
    print(f"The data set is in {options.out}: {codes}, at most {reached:.1f} % apart in tokens.")
    return 0


def _export(options: argparse.Namespace) -> int:
    import transformers

    from mome_utils.export import export_mixture
    from mome_utils.study import Study

    transformers.utils.logging.disable_progress_bar()

    study = Study.open("export", **_request(options).parameters(), quiet=True)
    model = export_mixture(study, options.variant, options.seed, options.out)
    sizes = model.parameter_counts()
    print(f"The mixture is in {options.out}: experts {', '.join(model.languages)}, {sizes['total']:,} parameters, "
          f"{sizes['active']:,} of them active for one text.")
    return 0


def _publish(options: argparse.Namespace) -> int:
    from mome_utils.places import project_root
    from mome_utils.publish import publish
    from mome_utils.runner import Request

    print(publish(project_root(), Request(arms=options.arms)))
    return 0


def _bench(options: argparse.Namespace) -> int:
    from mome_utils.bench import run_benchmark, table
    from mome_utils.places import project_root

    root = project_root()
    out = options.out or root / "data" / "benchmarks" / f"{options.name}.json"
    print(table(run_benchmark(options.name, out, root=root, rounds=options.rounds)))
    return 0


def _request(options: argparse.Namespace) -> Any:
    from mome_utils.runner import Request

    return Request(
        profile=options.profile, corpus=_corpus(options.corpus), languages=tuple(_items(options.languages)),
        seeds=options.seeds, overrides=dict(_assignment(text) for text in options.set), arms=options.arms,
    )


def _corpus(source: str) -> str:
    """A corpus folder as an absolute path: the notebooks run from another working directory."""
    return source if source == "embedded" else str(Path(source).expanduser().resolve())


def _items(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _assignment(
    text: str, option: str = "--set", example: str = "max_diff_percent=3", plain: bool = False
) -> tuple[str, Any]:
    """``FIELD=VALUE``, the value read by :func:`_value`, or ``plain`` as it is."""
    field, equals, value = text.partition("=")
    if not equals:
        raise MomeError(f"{option} needs FIELD=VALUE, for example {example}, not '{text}'.")
    return field.strip(), value if plain else _value(value)


def _value(text: str) -> Any:
    """A value as JSON where it is that, as text where not."""
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


def parser() -> argparse.ArgumentParser:
    """The command line as argparse sees it."""
    parser = argparse.ArgumentParser(
        prog="mome",
        description="Mixture of modular experts: a study of distillation, routing and forgetting.",
    )
    parser.add_argument("--version", action="version", version=f"mome {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    study = commands.add_parser("study", help="run the notebooks in order; what is up to date is skipped")
    _common(study)
    study.add_argument("--only", default="", metavar="NN[,NN]", help="only these notebooks")
    study.add_argument("--force", action="store_true", help="run notebooks that are up to date, too")
    study.set_defaults(command=_study)

    batch = commands.add_parser("batch", help="run the study over a grid of settings, with a page over all of them",
                                description="Every combination of the values is a run of the study with outputs of its "
                                            "own in --out; trained models are shared. Given again, it goes on.")
    _common(batch)
    batch.add_argument("--vary", action="append", default=[], metavar="NAME=A,B",
                       help="values of a parameter or of a field of the profile; may be given several times "
                            "(languages: en+fr,en+de)")
    batch.add_argument("--grid", type=Path, metavar="FILE", help="the same as JSON: {\"seeds\": [1, 3]}")
    batch.add_argument("--only", default="", metavar="NN[,NN]", help="only these notebooks")
    batch.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the batch")
    batch.set_defaults(command=_batch)

    report = commands.add_parser("report", help="write the ledger, the README's results and all notebooks as web pages",
                                 description="Without --profile: the published report, from the tracked tables. With "
                                             "it: the report of that run, below its own folder.")
    _common(report, profile="")
    report.set_defaults(command=_report)

    status = commands.add_parser("status", help="say which notebooks are up to date and what is stored")
    _common(status)
    status.set_defaults(command=_status)

    study_defaults = load_profile("laptop")
    dataset = commands.add_parser("dataset", help="make a balanced, split, tokenized multilingual data set")
    dataset.add_argument("--langs", default="", metavar="EN,FR", help="language codes (default: all)")
    dataset.add_argument("--max-diff-percent", type=float, default=study_defaults.max_diff_percent, metavar="P",
                         help="no language has more than P %% more tokens than the smallest (default: %(default)g)")
    dataset.add_argument("--common", action="store_true",
                         help="keep only documents that exist in every language, and keep them aligned")
    dataset.add_argument("--corpus", default="embedded", metavar="FOLDER",
                         help="folder with one .jsonl, .parquet or folder of .txt files per language")
    dataset.add_argument("--vocab-size", type=int, default=study_defaults.vocab_size, metavar="N",
                         help="entries of the shared tokenizer (default: %(default)d, as in the laptop study)")
    dataset.add_argument("--seed", type=int, default=0, help="seed of splits and choices (default: 0)")
    dataset.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    dataset.set_defaults(command=_dataset)

    export = commands.add_parser("export", help="write a trained mixture, its router and tokenizer to a folder")
    export.add_argument("variant", metavar="VARIANT", help="ple, jeet or moe_ce")
    export.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the runs (default: %(default)d)")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    _common(export)
    export.set_defaults(command=_export)

    publish = commands.add_parser("publish", help="copy the finished laptop run to its tracked places")
    _arms(publish)
    publish.set_defaults(command=_publish)

    bench = commands.add_parser("bench", help="time a part of the package, and say what it needs")
    bench.add_argument("name", metavar="NAME", help="which benchmark: router, moe or similarity")
    bench.add_argument("--rounds", type=int, default=7, metavar="N",
                       help="how often each is timed, in turn (default: %(default)d)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: data/benchmarks/NAME.json)")
    bench.set_defaults(command=_bench)
    return parser


def _common(parser: argparse.ArgumentParser, profile: str = "laptop") -> None:
    """The options that name a run of the study; ``profile`` is the default."""
    parser.add_argument("--profile", default=profile, metavar="NAME",
                        help=f"how large to run it: {', '.join(profile_names())} (default: {profile or 'none'})")
    parser.add_argument("--corpus", default="embedded", metavar="FOLDER",
                        help="folder with one .jsonl, .parquet or folder of .txt files per language")
    parser.add_argument("--languages", default="", metavar="EN,FR",
                        help="language codes in order (default: all)")
    parser.add_argument("--seeds", type=int, default=0, metavar="N",
                        help="number of seeds (default: the profile's)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE",
                        help="replace a field of the profile; may be given several times")
    _arms(parser)


def _arms(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", default="core", choices=("core", "extended"),
                        help="extended: also what notebooks keep beyond their budget (default: core)")


if __name__ == "__main__":
    sys.exit(main())
