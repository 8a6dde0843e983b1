"""The mixture on disk: one file for what is shared, one for each expert, and an index that names them all.

A folder holds ``shared.safetensors`` (router, embeddings, output projection, common expert), an
``expert-<language>.safetensors`` for each expert, and ``model.safetensors.index.json``, transformers' own index of a
model in several files, here with the SHA-256 of each. So one expert can be shipped, replaced or left on disk, any
``from_pretrained`` reads the folder, and a wrong file is found before any of it is used. Each expert's file names in
its metadata the function that the expert computes and, where it is known, the vocabulary that it reads (see
`moe_identity`); files without these, as earlier versions wrote them, are as welcome.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast
from urllib.parse import quote

import safetensors
import safetensors.torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from mome_utils.artifacts import DamagedArtifact, file_digest, write_atomic
from mome_utils.config import MomeError
from mome_utils.moe_config import MomeConfig
from mome_utils.moe_identity import (
    check_tensors,
    expected_tensors,
    expert_digest,
    read_config,
    vocabulary_digest,
    vocabulary_in,
)
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
        metadata: what transformers keeps, and where it is known the digest of the experts' ``vocabulary``.
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
        parts = (files, digests, tensors)
        plain = all(isinstance(part, dict) and all(isinstance(v, str) for v in part.values()) for part in parts)
        complete = plain and {SHARED, *files.values()} == set(digests) == {SHARED, *tensors.values()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:
        raise _unreadable(path, "it is not the index of a mixture")
    if not complete or len({*files.values()}) < len(files) or not all(map(_is_expert, files.values())):
        raise _unreadable(path, "the files that it names do not fit together")
    return Index(Path(folder), files, digests, tensors, metadata)


def replace_expert(folder: Path | str, name: str, source: Path | str, source_name: str | None = None) -> None:
    """Put another expert of the same shape in the place of one, on disk; no other file but the index changes.

    The expert's file is replaced first and the index after it. If the machine stops between the two, the folder
    does not load until the call is repeated; nothing is lost.

    Args:
        folder: of a saved mixture.
        name: language whose expert is replaced. Its file may be missing.
        source: a file of one expert (``expert-….safetensors``), or the folder of another mixture.
        source_name: the expert to take from a folder; by default ``name``.

    Raises:
        MomeError: an unknown expert, or one of another shape, number type, variant, function or tokenizer. A file
            that an earlier version wrote says nothing of the last three.
        DamagedArtifact: the index, the configuration, or the source cannot be used.
    """
    index = read_index(folder)
    if name not in index.files:
        raise MomeError(f"This mixture has no expert '{name}' to replace: its experts are {', '.join(index.files)}.")
    config, source = read_config(index.folder), Path(source)
    _check_order(config, index)
    kind, words = expert_digest(config), index.metadata.get("vocabulary")
    if source.is_dir():
        other, source_name = read_index(source), source_name or name
        if source_name not in other.files:
            raise MomeError(f"The other mixture has no expert '{source_name}': it has {', '.join(other.files)}.")
        facts = {"function": expert_digest(read_config(source)), "vocabulary": other.metadata.get("vocabulary")}
        source = other.check([source_name])[1]
        tensors, _ = _expert_tensors(source)
    else:
        tensors, facts = _expert_tensors(source)
    place = f"experts.{config.languages.index(name)}."
    new = {place + key: tensor for key, tensor in tensors.items()}
    expected = {key: shape for key, shape in expected_tensors(config, index.files).items() if key.startswith(place)}
    same = {key: tuple(tensor.shape) for key, tensor in new.items()} == expected
    if not same or facts.get("function") not in (None, kind):
        raise MomeError(
            f"The expert in '{source.name}' has another shape than those of this mixture, or computes something else: "
            "only an expert of the same variant, depth, width, heads and vocabulary can take the place."
        )
    if config.dtype is not None and any(t.is_floating_point() and t.dtype != config.dtype for t in new.values()):
        raise MomeError(
            f"The numbers of the expert in '{source.name}' are not {config.dtype} as in this mixture: "
            "save the expert's model in that type first."
        )
    if words is not None and facts.get("vocabulary") not in (None, words):
        raise MomeError(
            f"The expert in '{source.name}' was trained with another tokenizer than this mixture: "
            "only an expert that reads the same tokens can take the place."
        )
    data = safetensors.torch.save(new, metadata=_facts(kind, words))
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
            MomeError: ``push_to_hub``, or a folder whose other experts were left on disk and would be deleted.
        """
        if push_to_hub:
            raise MomeError("A mixture is saved to a folder: save it without push_to_hub, then upload the folder.")
        if not is_main_process:
            return
        folder = Path(save_directory)
        files = {name: f"expert-{quote(name, safe='')}.safetensors" for name in self._there}
        earlier = _earlier(folder)
        lost = [name for name in earlier if name in self.languages and name not in files]
        if lost:
            raise MomeError(
                f"Saving here would delete the experts {', '.join(lost)}, which were left on disk: "
                "save to another folder, or load the model with active_experts=None first."
            )
        folder.mkdir(parents=True, exist_ok=True)
        state: dict[str, Tensor] = self.state_dict() if state_dict is None else state_dict  # type: ignore[attr-defined]
        kwargs["max_shard_size"] = max(1, sum(t.numel() * t.element_size() for t in state.values()))
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
            facts = _facts(expert_digest(self.config), self.vocabulary)
            for file, part in parts.items():
                safetensors.torch.save_file(part, Path(work, file), metadata=facts)
                tensors |= dict.fromkeys(part, file)
            written = (SHARED, *parts)
            digests = {file: file_digest(Path(work, file)) for file in written}
            stale = {_WHOLE, *earlier.values()} - set(written)
            for file in (*written, _CONFIG, _GENERATION):
                if Path(work, file).is_file():
                    os.replace(Path(work, file), folder / file)
        metadata = {"format": "pt", "total_size": kwargs["max_shard_size"]}
        if self.vocabulary is not None:
            metadata["vocabulary"] = self.vocabulary
        Index(folder, files, digests, dict(sorted(tensors.items())), metadata).write()
        for file in stale:
            (folder / file).unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any,
        config: MomeConfig | str | os.PathLike[str] | None = None, **kwargs: Any,
    ) -> Self:
        """transformers' ``from_pretrained``; of a folder in shards only those of active experts are read.

        Weights are read from safetensors only: what else lies in the folder is never opened.

        Args:
            pretrained_model_name_or_path: folder that `save_pretrained` wrote.
            config: instead of the folder's.
            kwargs: as in transformers, and fields of `MomeConfig`: ``active_experts=["en"]`` leaves the other
                experts on disk (their files may be missing), ``active_experts=None`` loads all of them.

        Raises:
            DamagedArtifact: a file that is needed is missing, cut short, changed, or another model's; or the
                configuration is not that of the files.
            MomeError: unknown active experts, or none.
        """
        load: Any = super().from_pretrained  # type: ignore[misc]
        kwargs["use_safetensors"] = True
        if pretrained_model_name_or_path is None:
            return load(None, *args, config=config, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        if (folder / INDEX).is_file():
            kwargs.pop("subfolder", None)
            loaded = cls._from_shards(load, folder, args, config, kwargs)
        else:
            loaded = load(pretrained_model_name_or_path, *args, config=config, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if model.vocabulary is None:
            model.vocabulary = vocabulary_digest(vocabulary_in(folder))
        return cast(Self, loaded)

    @classmethod
    def _from_shards(
        cls, load: Any, folder: Path, args: tuple[Any, ...], config: MomeConfig | str | os.PathLike[str] | None,
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``load``, transformers' ``from_pretrained``, makes of a folder with an index."""
        index = read_index(folder)
        if not isinstance(config, MomeConfig):
            own = {key: kwargs.pop(key) for key in MomeConfig.__annotations__ if key in kwargs}
            config = read_config(folder, **own) if config is None else MomeConfig.from_pretrained(config, **own)
        config.check()
        for name in config.active:
            if name not in index.files:
                raise MomeError(f"This folder has no expert '{name}': it was saved with {', '.join(index.files)}.")
        _check_order(config, index)
        needed = index.check(config.active)
        check_tensors(config, needed, shapes=not kwargs.get("ignore_mismatched_sizes"))
        if len(config.active) == len(config.languages):
            loaded = load(folder, *args, config=config, **kwargs)
        else:
            state: dict[str, Tensor] = {}
            for file in needed:
                with safe_open(file, "pt") as opened:
                    state |= {key: opened.get_tensor(key) for key in opened.keys()}
            if (folder / _GENERATION).is_file():
                kwargs.setdefault("generation_config", GenerationConfig.from_pretrained(folder))
            loaded = load(None, *args, config=config, state_dict=state, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.config.name_or_path = str(folder)
        model.vocabulary = index.metadata.get("vocabulary")
        return loaded


def _check_order(config: MomeConfig, index: Index) -> None:
    """Compare the places of the experts in the configuration and in the index.

    Raises:
        DamagedArtifact: they differ.
    """
    names = [name for name in config.languages if name in index.files]
    prefix = {SHARED: ""} | {
        index.files[name]: f"experts.{i}." for i, name in enumerate(config.languages) if name in index.files
    }
    if names != list(index.files) or any(not k.startswith(prefix[file]) for k, file in index.tensors.items()):
        raise DamagedArtifact(
            "The configuration names other experts than the index of the model, or in another order: "
            "copy both again from the saved model."
        )


def _is_expert(file: str) -> bool:
    """Whether a name is one that an expert's file may have: no other file is ever read or deleted."""
    return Path(file).name == file and file.startswith("expert-") and file.endswith(".safetensors")


def _facts(function: str, vocabulary: str | None) -> dict[str, str]:
    """Metadata of an expert's file."""
    return {"format": "pt", "function": function} | ({} if vocabulary is None else {"vocabulary": vocabulary})


def _expert_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of one expert by their names within it, and the metadata of its file."""
    if not file.is_file():
        raise DamagedArtifact(f"There is no file '{file.name}' to take an expert from: give a file, or a folder.")
    try:
        with safe_open(file, "pt") as opened:
            facts = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}
    except (safetensors.SafetensorError, KeyError):  # KeyError: a number type that torch does not have
        raise DamagedArtifact(f"'{file.name}' is damaged or no safetensors file: copy it again.") from None
    places = {tuple(key.split(".", 2)[:2]) for key in tensors}
    if len(places) != 1 or next(iter(places))[0] != "experts":
        raise DamagedArtifact(f"'{file.name}' is not the file of one expert: give an expert-….safetensors file.")
    return {key.split(".", 2)[2]: tensor for key, tensor in tensors.items()}, facts


def _earlier(folder: Path) -> Mapping[str, str]:
    """Files of the experts, by language, that an earlier save into a folder left; none without an index of ours."""
    try:
        return read_index(folder).files
    except DamagedArtifact:
        return {}


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
