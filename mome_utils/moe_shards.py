"""The mixture on disk: one file for what is shared, one for each expert, and an index that names them all.

A folder holds ``shared.safetensors`` (router, embeddings, output projection, common expert), an
``expert-<language>.safetensors`` for each expert, and ``model.safetensors.index.json``, transformers' own index of a
model in several files, here with the SHA-256 of each. So one expert can be shipped, replaced or left on disk, any
``from_pretrained`` reads the folder, and a wrong file is found before any of it is used.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import safetensors
import safetensors.torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from mome_utils.artifacts import DamagedArtifact, file_digest, write_atomic
from mome_utils.config import MomeError
from mome_utils.moe_config import MomeConfig
from mome_utils.moe_inference import Inference

__all__ = ["INDEX", "SHARED", "Index", "Shards", "read_index", "replace_expert"]

#: transformers' name for the index of a model in several files.
INDEX = "model.safetensors.index.json"
#: The file of everything that is no expert.
SHARED = "shared.safetensors"
_WHOLE = "model.safetensors"
_CONFIG, _GENERATION = "config.json", "generation_config.json"


@dataclass(frozen=True)
class Index:
    """What the index of a saved mixture says.

    Attributes:
        folder: of the mixture.
        files: file of each expert, by language, in the order of their routes.
        digests: SHA-256 of each file, by name.
        tensors: file of each tensor, by name.
        metadata: sizes that transformers keeps.
    """

    folder: Path
    files: Mapping[str, str]
    digests: Mapping[str, str]
    tensors: Mapping[str, str]
    metadata: Mapping[str, Any]

    def check(self, experts: Iterable[str]) -> list[Path]:
        """The shared file and those of these experts, found to be what the index names.

        Raises:
            DamagedArtifact: a file is missing, cut short, changed, or another model's.
        """
        wanted = {SHARED: "what all experts share"} | {self.files[name]: f"the expert '{name}'" for name in experts}
        for file, what in wanted.items():
            if not (self.folder / file).is_file():
                raise _unusable(self.folder / file, what, "is missing")
            if file_digest(self.folder / file) != self.digests[file]:
                raise _unusable(self.folder / file, what, "is damaged, cut short or another model's")
        return [self.folder / file for file in wanted]

    def write(self) -> None:
        """Replace the index on disk."""
        metadata = {**self.metadata, "experts": dict(self.files), "sha256": dict(self.digests)}
        content = {"metadata": metadata, "weight_map": dict(self.tensors)}
        write_atomic(self.folder / INDEX, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_index(folder: Path | str) -> Index:
    """The index of a mixture that `MomeForCausalLM.save_pretrained` wrote.

    Raises:
        DamagedArtifact: there is none, or it is not one.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        raise _unreadable(path, "it is missing")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        metadata = dict(facts["metadata"])
        files, digests = metadata.pop("experts"), metadata.pop("sha256")
        tensors = facts["weight_map"]
        complete = {SHARED, *files.values()} == set(digests) == {SHARED, *tensors.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise _unreadable(path, "it is not the index of a mixture") from None
    if not complete or any(Path(file).name != file for file in digests):
        raise _unreadable(path, "the files that it names do not fit together")
    return Index(Path(folder), files, digests, tensors, metadata)


def replace_expert(folder: Path | str, name: str, source: Path | str, source_name: str | None = None) -> None:
    """Put another expert of the same shape in the place of one, on disk; no other file but the index changes.

    Args:
        folder: of a saved mixture.
        name: language whose expert is replaced. Its file may be missing.
        source: a file of one expert (``expert-….safetensors``), or the folder of another mixture.
        source_name: the expert to take from a folder; by default ``name``.

    Raises:
        MomeError: an unknown expert, or one of another shape.
        DamagedArtifact: the index, or the source, cannot be used.
    """
    index = read_index(folder)
    if name not in index.files:
        raise MomeError(f"This mixture has no expert '{name}' to replace: its experts are {', '.join(index.files)}.")
    source = Path(source)
    if source.is_dir():
        other, source_name = read_index(source), source_name or name
        if source_name not in other.files:
            raise MomeError(f"The other mixture has no expert '{source_name}': it has {', '.join(other.files)}.")
        source = other.check([source_name])[1]
    place = f"experts.{list(index.files).index(name)}."
    new = {place + key: tensor for key, tensor in _expert_tensors(source).items()}
    own = {key for key, file in index.tensors.items() if file == index.files[name]}
    shapes = _known_shapes(index)
    if set(new) != own or any(shapes.get(_inner(k), tuple(t.shape)) != tuple(t.shape) for k, t in new.items()):
        raise MomeError(
            f"The expert in '{source.name}' has another shape than those of this mixture: "
            "only an expert of the same variant, depth, width and vocabulary can take the place."
        )
    data = safetensors.torch.save(new, metadata={"format": "pt"})
    target = index.folder / index.files[name]
    write_atomic(target, data)
    Index(
        index.folder, index.files, {**index.digests, target.name: file_digest(target)}, index.tensors, index.metadata
    ).write()


class Shards(Inference):
    """Part of `MomeForCausalLM`: `save_pretrained` and `from_pretrained`."""

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None, push_to_hub: bool = False, **kwargs: Any,
    ) -> None:
        """Write the configuration, one file for each expert, one for what they share, and the index.

        All files are written before the first of an earlier save is replaced. A mixture that was loaded with a
        part of its experts is written with that part.

        Args:
            save_directory: folder, made where missing.
            is_main_process: whether this process writes (distributed training).
            state_dict: weights to write instead of the model's own.
            push_to_hub: not supported.
            kwargs: as in transformers; files are never split further, whatever ``max_shard_size`` says.

        Raises:
            MomeError: ``push_to_hub``.
        """
        if push_to_hub:
            raise MomeError("A mixture is saved to a folder: save it without push_to_hub, then upload the folder.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
        kwargs["max_shard_size"] = max(1, sum(t.numel() * t.element_size() for t in state.values()))
        files = {name: f"expert-{quote(name, safe='')}.safetensors" for name in self.active}
        place = {f"experts.{i}.": files[name] for i, name in enumerate(self.languages) if name in files}
        parts: dict[str, dict[str, Tensor]] = {file: {} for file in (SHARED, *files.values())}
        tied: Mapping[str, str] = self.all_tied_weights_keys  # type: ignore[attr-defined]
        for key, tensor in state.items():
            if tied.get(key) not in state:  # a tied weight is written once
                parts[place.get(key[: key.find(".", 8) + 1], SHARED)][key] = tensor.contiguous()
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as work:
            tensors: dict[str, str] = {}
            # transformers writes the configuration and what is shared, with all that it looks after.
            super().save_pretrained(work, state_dict=parts.pop(SHARED), **kwargs)  # type: ignore[misc]
            os.replace(Path(work, _WHOLE), Path(work, SHARED))
            with safe_open(Path(work, SHARED), "pt") as shared:
                tensors |= dict.fromkeys(shared.keys(), SHARED)
            for file, part in parts.items():
                safetensors.torch.save_file(part, Path(work, file), metadata={"format": "pt"})
                tensors |= dict.fromkeys(part, file)
            written = (SHARED, *parts)
            digests = {file: file_digest(Path(work, file)) for file in written}
            stale = {_WHOLE, *_indexed(folder)} - set(written)
            for file in (*written, _CONFIG, _GENERATION):
                if Path(work, file).is_file():
                    os.replace(Path(work, file), folder / file)
        metadata = {"format": "pt", "total_size": kwargs["max_shard_size"]}
        Index(folder, files, digests, dict(sorted(tensors.items())), metadata).write()
        for file in stale:
            (folder / file).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any,
        config: MomeConfig | str | os.PathLike[str] | None = None, **kwargs: Any,
    ) -> Self:
        """transformers' ``from_pretrained``; of a folder in shards only those of active experts are read.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` wrote.
            config: instead of the folder's.
            kwargs: as in transformers, and fields of `MomeConfig`: ``active_experts=["en"]`` leaves the other
                experts on disk (their files may be missing), ``active_experts=None`` loads all of them.

        Raises:
            DamagedArtifact: a file that is needed is missing, cut short, changed, or another model's.
            MomeError: unknown active experts, or none.
        """
        load: Any = super().from_pretrained  # type: ignore[misc]
        folder = None if pretrained_model_name_or_path is None else Path(pretrained_model_name_or_path)
        if folder is None or kwargs.get("subfolder") or not (folder / INDEX).is_file():
            return load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        index = read_index(folder)
        if not isinstance(config, MomeConfig):
            own = {key: kwargs.pop(key) for key in MomeConfig.__annotations__ if key in kwargs}
            config = MomeConfig.from_pretrained(config or folder, **own)
        config.check()
        for name in config.active:
            if name not in index.files:
                raise MomeError(f"This folder has no expert '{name}': it was saved with {', '.join(index.files)}.")
        needed = index.check(config.active)
        if len(config.active) == len(config.languages):
            return load(folder, *args, config=config, **kwargs)
        state: dict[str, Tensor] = {}
        for file in needed:
            with safe_open(file, "pt") as opened:
                state |= {key: opened.get_tensor(key) for key in opened.keys()}
        if (folder / _GENERATION).is_file():
            kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
        model = load(None, *args, config=config, state_dict=state, **kwargs)
        model.config.name_or_path = str(folder)
        return model


def _inner(key: str) -> str:
    """Name of an expert's tensor within the expert."""
    return key.split(".", 2)[2]


def _expert_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of one expert by their names within it, read from its file."""
    if not file.is_file():
        raise DamagedArtifact(f"There is no file '{file.name}' to take an expert from: give a file, or a folder.")
    try:
        tensors = safetensors.torch.load(file.read_bytes())
    except (safetensors.SafetensorError, KeyError):  # KeyError: a number type that torch does not have
        raise DamagedArtifact(f"'{file.name}' is damaged or no safetensors file: copy it again.") from None
    places = {tuple(key.split(".", 2)[:2]) for key in tensors}
    if len(places) != 1 or next(iter(places))[0] != "experts":
        raise DamagedArtifact(f"'{file.name}' is not the file of one expert: give an expert-….safetensors file.")
    return {_inner(key): tensor for key, tensor in tensors.items()}


def _known_shapes(index: Index) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of an expert by its name within it, from the first expert whose file is there."""
    for file in index.files.values():
        if (index.folder / file).is_file():
            return {key: tuple(tensor.shape) for key, tensor in _expert_tensors(index.folder / file).items()}
    return {}


def _indexed(folder: Path) -> set[str]:
    """Files of an earlier save into a folder; none where there is no index of ours."""
    try:
        return set(read_index(folder).digests)
    except DamagedArtifact:
        return set()


def _unusable(file: Path, what: str, why: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"The file '{file.name}' of {what} {why}: copy it again from the saved model, "
        "or put another expert in its place with moe_shards.replace_expert."
        if file.name != SHARED else f"The file '{file.name}' of {what} {why}: copy it again from the saved model."
    )


def _unreadable(file: Path, why: str) -> DamagedArtifact:
    return DamagedArtifact(
        f"The index '{file.name}' of the model cannot be used, {why}: copy it again, or save the model again."
    )
