"""docs/cohorts.md: every row on the page is one, and what it says becomes of files and tables does."""

import csv
import re
from itertools import pairwise
from pathlib import Path

import pytest

from braindino.manifest import Scan, write_scans
from braindino.preprocessing import labels, list_cohorts, prepare
from braindino.preprocessing.cohort_table import READERS, load_cohort
from braindino.preprocessing.discovery import find_candidates

PAGE = (Path(__file__).parents[2] / "docs" / "cohorts.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
ROWS = {re.search(r"^name: (\S+)$", text, re.MULTILINE)[1]: text for kind, text in BLOCKS if kind == "yaml"}
# Row -> the tree that follows it.
TREES = {
    re.search(r"^name: (\S+)$", row, re.MULTILINE)[1]: tree
    for (kind, row), (other, tree) in pairwise(BLOCKS)
    if (kind, other) == ("yaml", "tree")
}


def write_row(folder: Path, name: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(ROWS[name], encoding="utf-8")
    return str(path)


def write_tree(folder: Path, tree: str) -> dict[str, tuple[str, ...]]:
    """Empty files; path -> subject, session and sequence, or the code of the reason to leave it."""
    outcomes = {}
    for line in tree.splitlines():
        name, *outcome = line.split()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        outcomes[name] = tuple("" if word == "-" else word for word in outcome if word != "left:")
    return outcomes


def test_the_page_has_an_example_of_every_reader():
    assert {re.search(r"^reader: (\w+)$", text, re.MULTILINE)[1] for text in ROWS.values() if "reader:" in text} == set(
        READERS
    )
    assert TREES.keys() == {"our-glioma", "our-children", "our-loni-project", "our-fastmri"}
    assert len(ROWS) == sum(kind == "yaml" for kind, _ in BLOCKS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_page_is_a_cohort(tmp_path, capsys, name):
    path = write_row(tmp_path, name)
    assert load_cohort(path).name == name
    assert list_cohorts.main([path]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")


@pytest.mark.parametrize("name", TREES)
def test_what_the_page_says_becomes_of_files_does(tmp_path, name):
    expected = write_tree(tmp_path / "in", TREES[name])
    cohort = load_cohort(write_row(tmp_path, name))
    found = find_candidates([str(tmp_path / "in")], out_dir=tmp_path / "out", cohort=cohort)
    outcomes = {
        str(Path(candidate.origin).relative_to(tmp_path / "in")): (scan.subject, scan.session, scan.sequence)
        if (scan := candidate.scan).status == "done"
        else (scan.reason.partition(":")[0],)
        for candidate in found
    }
    assert outcomes == expected


def test_the_dry_run_prints_what_the_page_shows(tmp_path, capsys):
    write_tree(tmp_path / "in", TREES["our-glioma"])
    row = write_row(tmp_path, "our-glioma")
    options = ["--cohort", row, str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--dry-run", "--probe", "0"]
    assert prepare.main(options) == 0
    assert capsys.readouterr().out == next(text for kind, text in BLOCKS if kind == "text")
    assert not (tmp_path / "out").exists()


def test_the_tables_of_the_page_become_the_labels_that_it_shows(tmp_path):
    tables = [text for kind, text in BLOCKS if kind == "csv"]
    (tmp_path / "tables").mkdir()
    for name, text in zip(("outcome_2024.csv", "visits.csv"), tables, strict=True):
        assert f"`{name}`" in PAGE
        (tmp_path / "tables" / name).write_text(text)
    scan = Scan("/in/P7/2020-03-01/t1.nii.gz", "our-outcomes", "P7", "2020-03-01", "T1")
    write_scans(tmp_path / "scans.tsv", [scan])
    options = ["--cohort", write_row(tmp_path, "our-outcomes"), "--out", str(tmp_path / "labels.tsv")]
    assert labels.main([*options, "--scans", str(tmp_path / "scans.tsv"), str(tmp_path / "tables")]) == 0
    header, _, *lines = [line for line in PAGE.splitlines() if line.startswith("|")]
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *lines)]
    with (tmp_path / "labels.tsv").open(newline="", encoding="utf-8") as handle:
        assert list(csv.reader(handle, delimiter="\t")) == shown


def test_the_variant_changes_what_it_says_and_keeps_the_rest(tmp_path):
    row, ppmi = load_cohort(write_row(tmp_path, "ppmi-baseline")), load_cohort("ppmi")
    assert (row.sequences, row.repeats.per, row.roles, row.numbers) == (("T1",), "subject", (), ())
    assert (row.reader, row.labels) == (ppmi.reader, ppmi.labels)


def test_the_readme_leads_to_the_page():
    assert "(docs/cohorts.md)" in (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
