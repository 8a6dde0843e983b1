"""The files around the package agree with each other: requirements, pins, environment, commands, documentation."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from mome_utils.__main__ import parser

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, str]:
    """Package to pinned version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def requirements() -> list[Requirement]:
    """What the project asks for, all extras included."""
    lines = PROJECT["dependencies"] + [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in lines]


def closure() -> dict[str, str]:
    """Every package that a full installation on this machine consists of, with its version."""
    found: dict[str, str] = {}
    wanted = [(requirement.name, tuple(requirement.extras)) for requirement in requirements()]
    seen = set()
    while wanted:
        name, extras = wanted.pop()
        if (canonicalize_name(name), extras) in seen:
            continue
        seen.add((canonicalize_name(name), extras))
        package = importlib.metadata.distribution(name)
        found[canonicalize_name(name)] = package.version
        for requirement in map(Requirement, package.requires or ()):
            if any(requirement.marker is None or requirement.marker.evaluate({"extra": extra})
                   for extra in ("", *extras)):
                wanted.append((requirement.name, tuple(requirement.extras)))
    return found


def test_every_package_of_an_installation_is_pinned_at_its_version() -> None:
    # CUDA builds of torch bring libraries that torch itself pins exactly.
    platform = re.compile(r"nvidia-|cuda-|triton")
    installed = {name: version.split("+")[0] for name, version in closure().items() if not platform.match(name)}
    pinned = pins()
    assert {name: pinned.get(name) for name in installed} == installed


def test_pins_satisfy_what_the_project_asks_for() -> None:
    pinned = pins()
    for requirement in requirements():
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement
    assert list(pinned) == sorted(pinned)
    assert all(name == canonicalize_name(name) for name in pinned)


def test_everything_the_package_and_its_tests_import_is_asked_for() -> None:
    asked = {canonicalize_name(requirement.name) for requirement in requirements()}
    providers = importlib.metadata.packages_distributions()
    pattern = re.compile(r"^\s*(?:from|import) (\w+)", re.MULTILINE)
    for path in sorted((ROOT / "mome_utils").glob("*.py")):
        for module in pattern.findall(path.read_text(encoding="utf-8")):
            if module in sys.stdlib_module_names or module in ("mome_utils", "__future__"):
                continue
            names = {canonicalize_name(name) for name in providers.get(module, ())}
            assert names & asked, f"{path.name} imports {module}"


def test_the_conda_environment_tells_the_same_story() -> None:
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    assert "- --constraint constraints.txt" in text
    assert f"- --editable .[{','.join(PROJECT['optional-dependencies'])}]" in text
    python = SpecifierSet(re.search(r"- python(\S+)", text).group(1))  # type: ignore[union-attr]
    assert not python.contains("3.10") and python.contains("3.11") and python.contains("3.12")
    assert SpecifierSet(PROJECT["requires-python"]).contains(Version("3.11"))


def test_each_make_target_is_one_line() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipes = dict(re.findall(r"^(study|test|lab): \.venv/\.ready\n((?:\t.*\n)+)", makefile, re.MULTILINE))
    assert {target: recipe.count("\n") for target, recipe in recipes.items()} == {"study": 1, "test": 1, "lab": 1}
    assert re.search(r"^\.venv/\.ready: pyproject\.toml constraints\.txt$", makefile, re.MULTILINE)


def test_ci_runs_exactly_the_test_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines[1:] if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "make test"]
    assert sys.platform == "win32" or (ROOT / ".ci" / "run").stat().st_mode & 0o111


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = [line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`((?:mome|make) [^`]+)`", text)
    return [command for command in fenced + inline if command.startswith(("mome ", "make "))]


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_readme_exist(command: str) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "mome":
        parser().parse_args([*words[1:], "--out", "x"] if words[1:] == ["dataset"] else words[1:])
        return
    if shutil.which("make") is None:
        pytest.skip("this machine has no make: the README says how to do without")
    shown = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="this machine has no make: the README says how to do without")
def test_make_study_passes_its_variables_on() -> None:
    command = ["make", "--dry-run", "study", "PROFILE=smoke", "CORPUS=my texts", "SEEDS=2"]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of another make
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, check=True)
    shown = done.stdout.splitlines()[-1]
    words = shlex.split(shown.lstrip("@"))
    assert words[0].endswith("mome")
    options = parser().parse_args(words[1:])
    assert (options.profile, options.corpus, options.seeds) == ("smoke", "my texts", 2)


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_importing_the_package_is_light() -> None:
    code = "import sys, mome_utils; print(len([m for m in ('torch', 'pandas', 'numpy') if m in sys.modules]))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "0\n"


def test_no_text_names_a_place_of_the_machine_it_was_written_on() -> None:
    here = "|".join(re.escape(str(place)) for place in (ROOT, Path.home(), Path(sys.prefix)) if len(str(place)) > 2)
    place = re.compile(rf"(?:{here})[/\\]|/(?:home|Users)/[a-z]\w+/|\.\.[/]shared/")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    kinds = (".py", ".md", ".toml", ".yml", ".txt", ".ipynb", ".json", ".svg")
    texts = [name for name in listed if name.endswith(kinds) and not name.startswith("tests/")]
    for name in texts:
        if (ROOT / name).is_file():
            found = place.search((ROOT / name).read_text(encoding="utf-8"))
            assert found is None, f"{name}: {found}"
