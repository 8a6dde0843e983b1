"""The mixture on disk: one file per expert; only what is needed is read, and nothing wrong is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from moe_models import EOS, LANGUAGES, SHAPE, SIZE, build, fitted, mixed_batch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from mome_utils.artifacts import DamagedArtifact, file_digest
from mome_utils.config import MomeError, Shape
from mome_utils.moe import MomeForCausalLM, build_mome
from mome_utils.moe_config import VARIANTS
from mome_utils.moe_shards import INDEX, SHARED, read_index, replace_expert

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def router():
    return fitted()


@pytest.fixture(scope="module")
def mixed():
    return mixed_batch()


@pytest.fixture(params=VARIANTS)
def model(request, router):
    return build(request.param, router)


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def run(code: str, *arguments: object) -> str:
    """What a new process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def test_a_new_process_gives_equal_logits_and_the_same_text(router, mixed, tmp_path):
    expected = {"ids": mixed[0]}
    for variant in VARIANTS:
        model = build(variant, router)
        model.router.abstain_below = 0.45
        model.config.combine = "router"
        model.save_pretrained(tmp_path / variant)
        mask = torch.ones_like(mixed[0])
        text = model.generate(mixed[0], attention_mask=mask, max_new_tokens=5, do_sample=False)
        expected |= {f"{variant} logits": model(mixed[0]).logits.detach(), f"{variant} text": text}
    save_file(expected, tmp_path / "expected.safetensors")
    code = """
import sys, torch, mome_utils
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folder, variants = Path(sys.argv[1]), sys.argv[2:]
expected = load_file(folder / "expected.safetensors")
ids = expected["ids"]
for variant in variants:
    model = AutoModelForCausalLM.from_pretrained(folder / variant)
    text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    logits = model(ids).logits
    print(type(model).__name__, torch.equal(logits, expected[f"{variant} logits"]),
          torch.equal(text, expected[f"{variant} text"]))
"""
    assert run(code, tmp_path, *VARIANTS) == 3 * "MomeForCausalLM True True\n"
    assert not list(tmp_path.rglob("*.py")) and "auto_map" not in (tmp_path / "ple" / "config.json").read_text()


@pytest.mark.parametrize("first", ["import transformers.trainer", "import mome_utils, transformers.pipelines"])
def test_transformers_knows_the_mixture_whatever_is_imported_first(first):
    code = f"{first}\nimport mome_utils\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
    code += "config = AutoConfig.for_model('mome')\n"
    code += "print(AutoModelForCausalLM._model_mapping[type(config)].__name__)"
    assert run(code) == "MomeForCausalLM\n"


def test_the_index_names_every_tensor_once_and_every_hash(model, saved):
    index = read_index(saved)
    found = {}
    for file in saved.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= dict.fromkeys(opened.keys(), file.name)
    assert index.tensors == found
    assert list(index.files) == list(LANGUAGES) and set(index.digests) == {SHARED, *index.files.values()}
    expected = {key for key in model.state_dict() if not key.endswith("lm_head.weight") or key == "lm_head.weight"}
    assert set(found) == expected  # PLE's heads are tied, and so written once
    for i, name in enumerate(LANGUAGES):
        own = {key for key, file in found.items() if file == index.files[name]}
        assert own == {key for key in expected if key.startswith(f"experts.{i}.")}


@pytest.mark.parametrize("loader", [MomeForCausalLM, AutoModelForCausalLM])
def test_only_active_experts_are_read(model, saved, mixed, loader):
    for name in ("fr", "de"):
        (saved / f"expert-{name}.safetensors").unlink()  # not needed, so not missed
    part = loader.from_pretrained(saved, active_experts=["py", "en"])
    assert part.languages == LANGUAGES and part.active == ("en", "py") and not part.training
    model.set_active(["en", "py"])
    assert torch.equal(part(mixed[0]).logits, model(mixed[0]).logits)
    greedy = {"attention_mask": torch.ones_like(mixed[0]), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(part.generate(mixed[0], **greedy), model.generate(mixed[0], **greedy))
    assert part.generation_config.pad_token_id == EOS
    idle = {p for i in (1, 2) for p in model.experts[i].parameters()}
    expected = sum(p.numel() * p.element_size() for p in set(model.parameters()) - idle)
    assert sum(p.numel() * p.element_size() for p in part.parameters()) == expected
    assert part.parameter_counts()["active"] == model.parameter_counts()["active"]
    assert not any(p.is_meta for p in part.parameters())
    with pytest.raises(MomeError, match="'fr' was left on disk: load the model again with active_experts"):
        part.set_active(["en", "fr"])
    with pytest.raises(MomeError, match="'de' was left on disk"):
        part.expert_hidden("de", mixed[0])
    part.set_active(None)
    assert part.active == ("en", "py")  # all that are in memory


def test_a_part_is_saved_as_a_part_and_a_whole_comes_back_whole(model, saved, mixed, tmp_path):
    part = MomeForCausalLM.from_pretrained(saved, active_experts=["fr"])
    part.save_pretrained(tmp_path / "part")
    assert {f.name for f in (tmp_path / "part").glob("*.safetensors")} == {SHARED, "expert-fr.safetensors"}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "part")
    assert again.active == ("fr",) and torch.equal(again(mixed[0]).logits, part(mixed[0]).logits)
    with pytest.raises(MomeError, match="no expert 'en': it was saved with fr"):
        MomeForCausalLM.from_pretrained(tmp_path / "part", active_experts=None)
    before = model(mixed[0]).logits
    model.set_active(["en"])
    model.save_pretrained(tmp_path / "whole")  # what is not active is written all the same
    narrow = MomeForCausalLM.from_pretrained(tmp_path / "whole")
    assert narrow.active == ("en",)
    wide = MomeForCausalLM.from_pretrained(tmp_path / "whole", active_experts=None)
    assert torch.equal(wide(mixed[0]).logits, before)


def test_saving_into_a_folder_leaves_nothing_old_there(model, saved, mixed):
    (saved / "model.safetensors").write_bytes(b"of another version")  # transformers would read this first
    (saved / "notes.txt").write_text("mine")
    model.remove_expert("de")
    model.save_pretrained(saved)
    names = {f.name for f in saved.iterdir()}
    assert "notes.txt" in names and not names & {"expert-de.safetensors", "model.safetensors"}
    assert not [name for name in names if name.startswith(".")]
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(loaded(mixed[0]).logits, model(mixed[0]).logits)


def test_a_part_is_not_saved_over_the_whole(saved, router, tmp_path):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    part = MomeForCausalLM.from_pretrained(saved, active_experts=["en"])
    with pytest.raises(MomeError, match="would delete the experts fr, de, py, which were left on disk"):
        part.save_pretrained(saved)
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before
    facts = json.loads((saved / INDEX).read_text())  # an index that names a file of somebody else
    facts["metadata"]["experts"]["it"] = "thesis.txt"
    facts["metadata"]["sha256"]["thesis.txt"] = ""
    facts["weight_map"]["experts.4.x"] = "thesis.txt"
    (saved / INDEX).write_text(json.dumps(facts))
    (saved / "thesis.txt").write_text("mine")
    build(part.config.variant, router).save_pretrained(saved)
    assert (saved / "thesis.txt").read_text() == "mine"


def test_an_expert_of_a_part_is_replaced_in_its_own_place(model, saved, tmp_path):
    MomeForCausalLM.from_pretrained(saved, active_experts=["py"]).save_pretrained(tmp_path / "part")
    (tmp_path / "part" / "expert-py.safetensors").unlink()  # no other expert tells the shape
    deep = build_mome(model.config.variant, Shape(3, SHAPE.width, 2), languages=LANGUAGES, seed=0, **SIZE)
    deep.save_pretrained(tmp_path / "deep")
    with pytest.raises(MomeError, match="another shape"):
        replace_expert(tmp_path / "part", "py", tmp_path / "deep")
    replace_expert(tmp_path / "part", "py", saved, "en")
    again = MomeForCausalLM.from_pretrained(tmp_path / "part")
    for mine, theirs in zip(again.experts[3].parameters(), model.experts[0].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_files_that_say_nothing_of_their_function_load_and_replace(model, saved, mixed):
    """Earlier versions wrote neither the function nor the vocabulary."""
    index = read_index(saved)
    for file in index.files.values():
        save_file(load_file(saved / file), saved / file, metadata={"format": "pt"})
    facts = json.loads((saved / INDEX).read_text())
    facts["metadata"]["sha256"] |= {file: file_digest(saved / file) for file in index.files.values()}
    (saved / INDEX).write_text(json.dumps(facts))
    loaded, report = MomeForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert torch.equal(loaded(mixed[0]).logits, model(mixed[0]).logits) and not report["missing_keys"]
    replace_expert(saved, "fr", saved / "expert-py.safetensors")
    part, _ = MomeForCausalLM.from_pretrained(saved, active_experts=["fr"], output_loading_info=True)
    assert part.active == ("fr",)


def test_a_folder_within_a_folder_is_checked_and_pickles_are_not_read(model, saved, mixed, tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="model")
    assert torch.equal(loaded(mixed[0]).logits, model(mixed[0]).logits)
    (saved / SHARED).write_bytes(b"")
    with pytest.raises(DamagedArtifact, match="what all experts share is damaged"):
        MomeForCausalLM.from_pretrained(tmp_path, subfolder="model")
    (saved / INDEX).unlink()
    torch.save(model.state_dict(), saved / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        MomeForCausalLM.from_pretrained(saved)


def test_folders_of_one_file_still_load(model, mixed, tmp_path):
    super(MomeForCausalLM.__mro__[1], model).save_pretrained(tmp_path)  # as transformers alone would
    assert (tmp_path / "model.safetensors").is_file()
    loaded = MomeForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(mixed[0]).logits, model(mixed[0]).logits)


# ------------------------------------------------------------------------------------------ replace


def test_an_expert_is_replaced_by_a_file_or_from_a_folder(model, saved, router, mixed, tmp_path):
    ids, languages = mixed
    other = build(model.config.variant, router, seed=9)
    other.save_pretrained(tmp_path / "other")
    untouched = {f: f.read_bytes() for f in saved.glob("*.safetensors") if f.name != "expert-fr.safetensors"}
    for source, name in ((tmp_path / "other" / "expert-py.safetensors", None), (tmp_path / "other", "py")):
        (saved / "expert-fr.safetensors").unlink()
        replace_expert(saved, "fr", source, name)
        loaded = AutoModelForCausalLM.from_pretrained(saved)
        for mine, theirs in zip(loaded.experts[1].parameters(), other.experts[3].parameters(), strict=True):
            assert torch.equal(mine, theirs)
        kept = languages != 1
        assert torch.equal(loaded(ids).logits[kept], model(ids).logits[kept])
        assert not torch.equal(loaded(ids).logits, model(ids).logits)
    assert all(file.read_bytes() == data for file, data in untouched.items())


def test_an_expert_that_does_not_fit_replaces_nothing(saved, model, tmp_path):
    variant = model.config.variant
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    wide = build_mome(variant, Shape(2, 32, 2), languages=LANGUAGES, seed=0, **SIZE)
    wide.save_pretrained(tmp_path / "wide")
    deep = build_mome(variant, Shape(3, SHAPE.width, 2), languages=LANGUAGES, seed=0, **SIZE)
    deep.save_pretrained(tmp_path / "deep")
    heads = build_mome(variant, Shape(2, SHAPE.width, 4), languages=LANGUAGES, seed=0, **SIZE)
    heads.save_pretrained(tmp_path / "heads")
    foreign = build({"ple": "jeet", "jeet": "moe_ce", "moe_ce": "jeet"}[variant])
    foreign.save_pretrained(tmp_path / "foreign")
    halves = build(variant).half()
    halves.save_pretrained(tmp_path / "halves")
    (tmp_path / "cut.safetensors").write_bytes(before["expert-fr.safetensors"][:-100])
    for source, words in (
        (tmp_path / "wide", "another shape"), (tmp_path / "deep", "another shape"),
        (tmp_path / "heads", "computes something else"), (tmp_path / "foreign", "computes something else"),
        (tmp_path / "heads" / "expert-fr.safetensors", "computes something else"),
        (tmp_path / "foreign" / "expert-fr.safetensors", "computes something else"),
        (tmp_path / "halves", "are not torch.float32"),
        (saved / SHARED, "not the file of one expert"), (tmp_path / "cut.safetensors", "damaged or no safetensors"),
        (tmp_path / "none.safetensors", "no file 'none.safetensors'"),
    ):
        with pytest.raises(MomeError, match=words):
            replace_expert(saved, "fr", source)
    with pytest.raises(MomeError, match="no expert 'it' to replace"):
        replace_expert(saved, "it", tmp_path / "wide")
    with pytest.raises(MomeError, match="other mixture has no expert 'it'"):
        replace_expert(saved, "fr", tmp_path / "wide", "it")
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before


# -------------------------------------------------------------------------------------------- wrong


def test_a_wrong_file_gets_one_clear_sentence(saved, router, model, tmp_path):
    other = tmp_path / "other"
    build(model.config.variant, router, seed=9).save_pretrained(other)

    def refused(words: str, file: str, change) -> None:
        folder = tmp_path / "broken"
        shutil.copytree(saved, folder)
        change(folder / file)
        for loader in (MomeForCausalLM, AutoModelForCausalLM):
            with pytest.raises(DamagedArtifact, match=words) as caught:
                loader.from_pretrained(folder)
            assert str(caught.value).count(". ") == 0 and str(folder) not in str(caught.value)
        shutil.rmtree(folder)

    def cut(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:-7])

    expert = "expert-de.safetensors"
    refused("'expert-de.safetensors' of the expert 'de' is missing", expert, Path.unlink)
    refused("of the expert 'de' is damaged, cut short or another model's", expert, cut)
    refused("is damaged, cut short or another", expert, lambda file: shutil.copy(other / file.name, file))
    refused("is damaged, cut short", expert, lambda f: shutil.copy(f.with_name("expert-en.safetensors"), f))
    refused("'shared.safetensors' of what all experts share is missing", SHARED, Path.unlink)
    refused("what all experts share is damaged", SHARED, cut)
    refused("cannot be used, it is not the index", INDEX, lambda file: file.write_text("{"))
    refused("cannot be used, it is not the index", INDEX, lambda file: file.write_text('{"weight_map": []}'))

    def edit(file: Path, key: str, change) -> None:
        facts = json.loads(file.read_text())
        facts["metadata"][key] = change(facts["metadata"][key])
        file.write_text(json.dumps(facts))

    def forget(file: Path) -> None:
        facts = json.loads(file.read_text())
        del facts["metadata"]["sha256"]["expert-fr.safetensors"]
        file.write_text(json.dumps(facts))

    refused("the files that it names do not fit together", INDEX, forget)
    refused("cannot be used, it is not the index", INDEX, lambda file: edit(file, "sha256", list))
    with pytest.raises(MomeError, match="no expert 'it' to be active"):
        AutoModelForCausalLM.from_pretrained(saved, active_experts=["it"])
    with pytest.raises(MomeError, match="At least one expert"):
        MomeForCausalLM.from_pretrained(saved, active_experts=[])
    with pytest.raises(MomeError, match="then upload the folder"):
        model.save_pretrained(saved, push_to_hub=True)


def test_a_configuration_of_another_model_loads_nothing(saved, model, tmp_path):
    config = json.loads((saved / "config.json").read_text())
    expert = config["expert"]

    def refused(words: str, changed: dict, **options) -> None:
        (saved / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(DamagedArtifact, match=words):
            MomeForCausalLM.from_pretrained(saved, **options)

    refused("other experts than the index", {"languages": ["fr", "en", "de", "py"]})
    refused("other experts than the index", {"languages": ["fr", "en", "de", "py"]}, active_experts=["en"])
    refused("other experts than the index", {"languages": ["en", "fr", "de"]})
    for changed in (
        {"expert": expert | {"n_layer": 3}}, {"expert": expert | {"n_layer": 1}}, {"expert": expert | {"n_head": 4}},
        {"expert": expert | {"n_embd": 32}},
        {"variant": {"ple": "jeet", "jeet": "moe_ce", "moe_ce": "jeet"}[model.config.variant]},
    ):
        refused("describes another model than the one in these files", changed)
        refused("describes another model", changed, active_experts=["en"])
    (saved / "config.json").write_text("{")
    with pytest.raises(DamagedArtifact, match="'config.json' is missing, damaged or not that of a mixture"):
        MomeForCausalLM.from_pretrained(saved)


# ----------------------------------------------------------------------------------- memory and ties


@pytest.mark.parametrize("variant", ["jeet", "moe_ce"])
def test_a_tied_projection_is_the_embedding_everywhere(variant, router, mixed, tmp_path):
    free, tied = build(variant, router), build(variant, router, tie_projection=True)
    assert tied.lm_head.weight is tied.wte.weight and free.lm_head.weight is not free.wte.weight
    assert tied.parameter_counts()["total"] == free.parameter_counts()["total"] - free.lm_head.weight.numel()
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / SHARED)
    for active in (None, ["en", "py"]):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=active)
        assert loaded.lm_head.weight is loaded.wte.weight
        tied.set_active(active)
        assert torch.equal(loaded(mixed[0]).logits, tied(mixed[0]).logits)
    assert AutoConfig.from_pretrained(tmp_path).tie_word_embeddings is True


MEMORY = """
import gc, os, sys, torch, mome_utils
from mome_utils.moe import MomeForCausalLM
torch.set_num_threads(1)

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

small, folder = sys.argv[1:]
MomeForCausalLM.from_pretrained(small, active_experts=["en"])  # code and tables that any first load brings
before = resident()
model = MomeForCausalLM.from_pretrained(folder, active_experts=["en"])
sum(p.sum().item() for p in model.parameters())  # what is mapped from a file is in memory once it is read
print(resident() - before, sum(p.numel() * p.element_size() for p in {*model.parameters()}),
      sum(b.numel() * b.element_size() for b in model.buffers()))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is read from /proc")
def test_one_of_four_experts_takes_the_memory_of_one(tmp_path):
    """At 6 x 768: the parameters in memory are the expert's and the shared ones, and resident memory grows by these."""
    small = build("jeet")
    small.save_pretrained(tmp_path / "small")
    model = build_mome(
        "jeet", Shape(6, 768, 12), languages=LANGUAGES, seed=0, vocab_size=2048, block_size=128, bos=1, eos=2
    )
    shared = sum(p.numel() for part in (model.wte, model.wpe, model.lm_head) for p in part.parameters())
    expected = 4 * (shared + sum(p.numel() for p in model.experts[0].parameters()))
    model.save_pretrained(tmp_path / "large")
    grown, parameters, buffers = map(int, run(MEMORY, tmp_path / "small", tmp_path / "large").split())
    assert parameters == expected
    assert 0.8 * parameters <= grown <= 1.1 * (parameters + buffers)
