"""A trained mixture as a folder to take away: model, router and tokenizer, for anyone with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mome_utils.artifacts import write_folder_atomic
from mome_utils.config import MomeError
from mome_utils.moe import MomeForCausalLM
from mome_utils.moe_config import VARIANTS
from mome_utils.recipes import moe_spec, student_spec
from mome_utils.runs import STAGE, Run, run_key
from mome_utils.study import Study
from mome_utils.training import TrainSpec

__all__ = ["export_mixture"]


def export_mixture(study: Study, variant: str, seed: int, out: Path) -> MomeForCausalLM:
    """Write a mixture that the study has trained to a folder, with its router and tokenizer. Nothing is trained.

    Args:
        study: an open study.
        variant: ``ple``, ``jeet`` or ``moe_ce``, as notebook 05 trains them.
        seed: of the runs.
        out: a folder that does not exist yet, or is empty.

    Returns:
        The mixture, in evaluation mode.

    Raises:
        MomeError: an unknown variant or seed, a folder that holds something, or runs that are not there yet, or
            damaged; the sentence names the notebook that trains them.
    """
    if variant not in VARIANTS:
        raise MomeError(f"There is no MoE variant '{variant}': choose one of {', '.join(VARIANTS)}.")
    if seed not in study.seeds:
        raise MomeError(f"The study has the seeds {', '.join(map(str, study.seeds))}: choose one of them, not {seed}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MomeError(f"{out} already holds something: name a folder that does not exist yet.")
    model: MomeForCausalLM
    if variant == "ple":
        model = MomeForCausalLM.from_experts({
            language: _model(study, student_spec(study, language, "fixed", seed), "03_kd_alpha_comparison")
            for language in study.languages
        })
    else:
        model = _model(study, moe_spec(study, variant, seed), "05_moe_variants")
    model.set_router(study.router())
    with write_folder_atomic(out) as folder:
        model.save_pretrained(folder)
        study.data().tokenizer.save_pretrained(folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
    return model


def _model(study: Study, spec: TrainSpec, notebook: str) -> Any:
    key = run_key(spec)
    return Run(spec, key, study.store.require(STAGE, key, notebook=notebook)).model()
