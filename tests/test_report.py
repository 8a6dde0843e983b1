"""The report: what is tracked agrees with its tables, and pages open from disk with every figure and link."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from study_results import small_study

from mome_utils.config import MomeError
from mome_utils.ledger import ledger
from mome_utils.pages import notebook_page
from mome_utils.readme import RESULTS, readme_block
from mome_utils.report import FIGURE, ledger_csv, ledger_text, report_disagreements, write_pages, write_report

ROOT = Path(__file__).resolve().parent.parent
SCORES = "03_kd_alpha_comparison/scores.parquet"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what is tracked here, to change."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("data/results", "figures", "notebooks"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "README.md", root / "README.md")
    return root


def test_readme_figure_and_tables_are_those_of_the_tracked_results() -> None:
    assert report_disagreements(ROOT) == []
    assert readme_block(ROOT, ledger(ROOT / RESULTS)) in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_changed_number_in_a_tracked_table_shows(checkout: Path) -> None:
    path = checkout / RESULTS / SCORES
    table = pd.read_parquet(path)
    table.loc[table["arm"] == "adaptive", "nats"] += [500.0] + [0.0] * ((table["arm"] == "adaptive").sum() - 1)
    table.to_parquet(path, index=False)
    found = report_disagreements(checkout)
    assert "README.md does not show the published results." in found
    assert any(sentence.startswith("C1: 03_kd_alpha_comparison/claims.parquet") for sentence in found)
    assert sum("run 'mome report'" in sentence for sentence in found) == 3
    write_report(checkout)
    assert [sentence[:3] for sentence in report_disagreements(checkout)] == ["C1:"]


@pytest.mark.parametrize("gone", [SCORES, "03_kd_alpha_comparison/claims.parquet", "03_kd_alpha_comparison"])
def test_without_a_stages_table_its_claims_read_not_run(gone: str, checkout: Path) -> None:
    path = checkout / RESULTS / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "README.md does not show the published results." in report_disagreements(checkout)
    write_report(checkout)
    readme = (checkout / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[?(C1|C2a|C4|C6)\b.*\| ([a-z ]+) \|$", readme, re.MULTILINE))
    assert rows["C1"] == rows["C2a"] == "not run"
    assert rows["C6"] != "not run" and rows["C4"] != "not run"


def test_an_edited_readme_or_figure_shows(checkout: Path) -> None:
    readme, figure = checkout / "README.md", checkout / FIGURE
    before = readme.read_text(encoding="utf-8")
    readme.write_text(before.replace("| reproduced |", "| not reproduced |", 1), encoding="utf-8")
    assert report_disagreements(checkout) == ["README.md does not show the published results."]
    figure.write_text("<svg/>", encoding="utf-8")
    assert report_disagreements(checkout)[0].startswith(FIGURE)
    write_report(checkout)
    assert report_disagreements(checkout) == [] and readme.read_text(encoding="utf-8") == before


def test_nothing_published_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(MomeError, match="run 'mome study' and 'mome publish' first"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_report_twice_is_the_same(checkout: Path) -> None:
    before = {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()}
    write_report(checkout)
    assert {path: path.read_bytes() for path in checkout.rglob("*") if path.is_file()} == before


def test_the_ledger_as_text_and_csv(tmp_path: Path) -> None:
    entries = ledger(small_study(tmp_path))
    lines = ledger_text(entries).splitlines()
    assert len(lines) == len(entries)
    assert re.fullmatch(r"C3a   reproduced              \+0\.0200 \(\+0\.0000 to \+0\.0400\) points", lines[3])
    assert lines[11] == "C9    not run"
    path = tmp_path / "claims.csv"
    path.write_text(ledger_csv(entries), encoding="utf-8")
    table = pd.read_csv(path)
    assert list(table["claim"]) == list(entries)
    assert table.loc[3, "estimate"] == pytest.approx(0.02)


# --- pages


class Reader(HTMLParser):
    """Everything a page refers to, and its ids."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.ids: set[str] = set()
        self.tags: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids |= {value for name, value in attrs if name == "id" and value}
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))
        if tag == "img":
            self.images.append(found)
        self.loads += [str(found[name]) for name in ("src", "data", "srcset", "poster") if found.get(name)]
        self.loads += [str(found.get("href"))] * (tag == "link")


def test_every_notebook_is_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    """All executed notebooks of the repository: each figure inside its page, each link to a page that is there."""
    index = write_pages(tmp_path / "run", ROOT, ROOT / "notebooks", ROOT / RESULTS)
    pages = {path.name: Reader(path) for path in index.parent.glob("*.html")}
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert set(pages) == {"index.html"} | {f"{path.stem}.html" for path in notebooks}
    for path in notebooks:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        drawn = sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
        images = pages[f"{path.stem}.html"].images
        assert len(images) == drawn
        assert all(len(image.get("alt") or "") > 10 for image in images)
    for name, page in pages.items():
        assert not page.tags & {"script", "iframe", "object", "embed", "link"}
        assert all(source.startswith("data:image/") for source in page.loads), name
        assert "url(" not in "".join(re.findall(r"<style>.*?</style>", (index.parent / name).read_text("utf-8"), re.S))
        for link in page.links:
            target, _, anchor = link.partition("#")
            if "://" not in link:
                assert not target or (index.parent / target).is_file(), (name, link)
                if target.endswith(".html") and anchor:
                    assert anchor in pages[target].ids, (name, link)
    assert set(pages) - {"index.html"} <= set(pages["index.html"].links)
    assert "svg" in pages["index.html"].tags


def toy(source: str, title: str = "# 1 · A toy") -> nbformat.NotebookNode:
    new = nbformat.v4
    return new.new_notebook(cells=[
        new.new_markdown_cell(title), new.new_markdown_cell(source),
        new.new_code_cell("6 * 7", metadata={"tags": ["solution"]}),
    ])


def test_what_a_page_makes_of_formulas_links_and_solutions() -> None:
    source = ("Of $x_1$ and `$HOME`: [next](02_two.ipynb#there), [main](../README.md#what), [data](../data/x.csv), "
              "[paper](https://arxiv.org/abs/1), $\\unheard x$\n\n$$\\frac{1}{2}$$")
    page = notebook_page(toy(source), "01_toy", {"index.html": "Claims", "01_toy.html": "A toy", "02_two.html": "Two"})
    assert page.count("<math") == 2 and '<math display="block">' in page
    assert "<code>$HOME</code>" in page and "<code>$\\unheard x$</code>" in page
    assert '<a href="02_two.html#there">next</a>' in page and '<a href="index.html">main</a>' in page
    assert "data/x.csv" not in page and 'href="https://arxiv.org/abs/1"' in page
    assert page.count('<details class="solution">') == 1
    assert '<a href="01_toy.html" aria-current=page>' in page


def test_pages_are_made_again_only_when_they_have_changed(tmp_path: Path) -> None:
    root, run = tmp_path / "root", tmp_path / "run"
    for folder in (root / "notebooks", run / "notebooks"):
        folder.mkdir(parents=True)
        for name in ("01_one", "02_two"):
            nbformat.write(toy(name, f"# {name}"), folder / f"{name}.ipynb")
    index = write_pages(run, root)
    assert "not run" in index.read_text(encoding="utf-8")
    (index.parent / "09_of_another_study.html").write_text("old", encoding="utf-8")
    times = {path.name: path.stat().st_mtime_ns for path in index.parent.glob("0*.html")}
    nbformat.write(toy("changed", "# 02_two"), run / "notebooks" / "02_two.ipynb")
    write_pages(run, root)
    now = {path.name: path.stat().st_mtime_ns for path in index.parent.glob("0*.html")}
    assert set(now) == {"01_one.html", "02_two.html"}
    assert now["01_one.html"] == times["01_one.html"] and now["02_two.html"] != times["02_two.html"]
    (run / "notebooks" / "02_two.ipynb").unlink()
    write_pages(run, root)
    assert not (index.parent / "02_two.html").exists()
    assert "02_two" not in (index.parent / "01_one.html").read_text(encoding="utf-8")
