"""Where results lie, how they are named, and how they are written so that nothing is ever half there.

Every result of the study is a folder ``<root>/<stage>/<key>`` with a ``manifest.json``. The key is the digest of
all that defines the result: its specification, the data it was made from, and the source of the modules that
compute its numbers. Changing a loss therefore changes the key of every run that used it; changing a figure or a
docstring changes nothing. A change of code that cannot change a number of any result there is, is declared as such in
:data:`SAME_NUMBERS`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mome_utils.config import MomeError

__all__ = [
    "SAME_NUMBERS", "DamagedArtifact", "Manifest", "MissingArtifact", "Store", "digest", "file_digest", "read_manifest",
    "source_digest", "write_atomic", "write_folder_atomic",
]

MANIFEST = "manifest.json"
#: Digest of a source, and that of the earlier one whose results are also its own, with the reason. Where there is the
#: least doubt, there is no entry, and the runs are made again.
SAME_NUMBERS: Mapping[str, str] = MappingProxyType({
    # kd_training moves the teacher's matrix to the GPU, where the earlier one failed; on a CPU nothing is moved.
    "6f2537af9abf51cd": "8a94241db897d30f",
})


class MissingArtifact(MomeError):
    """A result that an earlier notebook makes is not there yet."""


class DamagedArtifact(MomeError):
    """A stored result no longer agrees with its manifest."""


def _plain(value: Any) -> Any:
    """``value`` as JSON data; dataclasses become objects, tuples lists, paths are refused (they differ by machine)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be part of a key")


def canonical_json(value: Any) -> str:
    """``value`` as JSON with sorted keys: equal values give equal text."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Sixteen hexadecimal digits that name ``value`` (dataclasses, mappings, sequences, numbers, text)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def source_digest(*modules: str) -> str:
    """Digest of what the named modules compute: their syntax trees without comments and docstrings.

    A source that :data:`SAME_NUMBERS` names has the digest of the earlier one. The modules are found and parsed, not
    imported.
    """
    trees = []
    for name in sorted(modules):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise MomeError(f"The module '{name}', which defines a result, cannot be found: reinstall mome_utils.")
        trees.append(f"{name}\n{_syntax_tree(Path(spec.origin).read_text(encoding='utf-8'))}")
    found = hashlib.sha256("\n".join(trees).encode()).hexdigest()[:16]
    return SAME_NUMBERS.get(found, found)


@cache  # a study asks for the digests of a few dozen sources thousands of times
def _syntax_tree(source: str) -> str:
    """The syntax tree of a module without comments and docstrings, as text."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(
                first.value.value, str
            ):
                node.body = node.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def write_folder_atomic(target: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes ``target`` when the block ends well, and vanishes when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield work
        os.chmod(work, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


@dataclass(frozen=True)
class Manifest:
    """What a stored result is: its name, what it was made from and by, and the hashes of its files."""

    stage: str
    key: str
    #: Manifest digests of the results this one was made from, by a readable name.
    inputs: Mapping[str, str]
    parameters: Mapping[str, Any]
    #: Module name to :func:`source_digest` at the time of making.
    sources: Mapping[str, str]
    #: Relative file name to ``{"sha256": …, "bytes": …}``.
    files: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def is_current(self) -> bool:
        """Whether the modules that made this result still compute the same."""
        return all(source_digest(name) == value for name, value in self.sources.items())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a result's folder; a :class:`DamagedArtifact` when it cannot be read."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DamagedArtifact(
            f"The manifest of {folder.parent.name}/{folder.name} cannot be read ({type(error).__name__}): "
            "delete that folder and run its notebook again."
        ) from None


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets", "scikit-learn")}


class Writer:
    """An open result: write files below ``folder`` and numbers into ``metrics``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics: dict[str, Any] = {}


@dataclass(frozen=True)
class Store:
    """The results below one folder (a profile's), addressed by stage and key."""

    root: Path

    def path(self, stage: str, key: str) -> Path:
        """Folder of a result, whether it exists or not."""
        return self.root / stage / key

    def has(self, stage: str, key: str) -> bool:
        """Whether a finished result is there (its files are checked by :meth:`load`)."""
        return (self.path(stage, key) / MANIFEST).is_file()

    def load(self, stage: str, key: str) -> Path | None:
        """Folder of a finished and undamaged result, or ``None`` where there is none.

        Raises:
            DamagedArtifact: a file is gone, or its content does not match the manifest.
        """
        if not self.has(stage, key):
            return None
        folder = self.path(stage, key)
        for name, entry in read_manifest(folder).files.items():
            file = folder / name
            if not file.is_file():
                problem = "is missing"
            elif file.stat().st_size != entry["bytes"] or file_digest(file) != entry["sha256"]:
                problem = "does not match its hash"
            else:
                continue
            raise DamagedArtifact(
                f"The result {stage}/{key} is damaged ({name} {problem}): "
                "delete that folder and run its notebook again."
            )
        return folder

    def require(self, stage: str, key: str, notebook: str) -> Path:
        """Folder of a result that ``notebook`` makes.

        Raises:
            MissingArtifact: names the notebook to run.
            DamagedArtifact: as :meth:`load`.
        """
        folder = self.load(stage, key)
        if folder is None:
            raise MissingArtifact(
                f"The {stage} of this profile and corpus is not there yet: run notebooks/{notebook}.ipynb first."
            )
        return folder

    @contextmanager
    def create(
        self, stage: str, key: str, *, inputs: Mapping[str, str], parameters: Any, modules: Sequence[str]
    ) -> Iterator[Writer]:
        """Make a result: files written in the block are hashed, listed in a manifest and moved in place at once."""
        with write_folder_atomic(self.path(stage, key)) as work:
            writer = Writer(work)
            yield writer
            files = {
                file.relative_to(work).as_posix(): {"sha256": file_digest(file), "bytes": file.stat().st_size}
                for file in sorted(work.rglob("*")) if file.is_file()
            }
            manifest = Manifest(
                stage=stage, key=key, inputs=dict(inputs), parameters=_plain(parameters),
                sources={name: source_digest(name) for name in modules}, files=files,
                metrics=_plain(writer.metrics), versions=_versions(),
            )
            write_atomic(work / MANIFEST, json.dumps(_plain(manifest), indent=1, ensure_ascii=False) + "\n")
