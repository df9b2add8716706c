"""Rows: the paper's are complete, a user's own needs no code, and whatever is wrong in one is named with its place."""

import pickle
import re

import pytest

from braindino.preprocessing.cohort_table import IdRule, list_cohorts, load_cohort
from braindino.preprocessing.discovery import find_candidates
from braindino.preprocessing.list_cohorts import main

MINE = r"""
name: our-study
title: "Our study"
reader: template
sequences: [T1, FLAIR]
patterns:
  - '/(?P<subject>P\d+)/(?P<session>visit\d+)/(?P<sequence>\w+)\.nii(\.gz)?'
subject: {pattern: 'P(?P<id>\d+)', pad: 4, prefix: sub}
sequence_of: {mprage: T1, dark_fluid: FLAIR}
skip:
  - {pattern: '_old\.nii', code: repeat, words: "replaced by a newer one"}
"""


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_table_has_the_papers_20_pretraining_datasets_and_13_downstream_cohorts():
    rows = {row.name: row for row in list_cohorts()}
    assert sorted(name for name, row in rows.items() if "pretraining" in row.roles) == [
        "abide", "acrin-dsc-mr-brain", "acrin-fmiso-brain", "brats2023-men", "brats2023-ped", "brats2023-ssa",
        "brats2025-gli-pre", "cptac-gbm", "fastmri-brain", "glis-rt", "icbm", "id1000", "ivygap", "long579",
        "men-seg-class", "piop", "ppmi", "rembrandt", "remind", "tcga-gbm",
    ]  # fmt: skip
    assert sorted(name for name, row in rows.items() if "downstream" in row.roles) == [
        "abide", "adni", "atlas", "brain-age", "brats-sequence", "brats2021", "brats2023-men", "brats2023-mets",
        "brats2024-goat", "oasis-1", "ppmi", "ucsf-pdgm", "upenn-gbm",
    ]  # fmt: skip


# Task of the paper -> the rows it is tested on.
DOWNSTREAM = {
    "4.3.1": ["brats2021", "brats2023-men", "brats2023-mets", "brats2024-goat"],  # tumour regions
    "4.3.2": ["abide", "adni", "oasis-1", "ppmi"],  # autism, Alzheimer's disease, dementia, Parkinson's disease
    "4.3.3": ["atlas", "brain-age"],  # days after stroke, age
    "4.3.4": ["upenn-gbm"],  # survival
    "4.3.5": ["ucsf-pdgm"],  # IDH
    "4.3.6": ["brats-sequence"],  # which sequence a volume is
}
# What the paper counts as one -> its parts.
MEMBERS = {
    "piop": ("piop1", "piop2"),
    "brain-age": ("ixi", "long579", "pixar"),
    "brats-sequence": ("brats2023-men", "brats2023-ped", "brats2023-ssa"),
}


def test_exactly_20_rows_are_for_pretraining_and_every_task_of_the_paper_has_its_rows():
    rows = list_cohorts()
    pretraining = [row for row in rows if "pretraining" in row.roles]
    assert len(pretraining) == 20
    assert all("4.1.1" in row.paper for row in pretraining)
    assert sum(map(len, DOWNSTREAM.values())) == 13
    assert {row.name: row.roles for row in rows if "downstream" in row.roles}.keys() == {
        name for names in DOWNSTREAM.values() for name in names
    }
    for section, names in DOWNSTREAM.items():
        assert all(section in load_cohort(name).paper for name in names), section
    assert {row.name: row.members for row in rows if row.members} == MEMBERS
    # A part counts only as a part, unless the paper also uses it by itself.
    parts = {name for names in MEMBERS.values() for name in names}
    assert {name for name in parts if not load_cohort(name).roles} == {"piop1", "piop2", "ixi", "pixar"}
    # Named in the paper's statement on data alone.
    assert [row.name for row in rows if not row.roles and row.name not in parts] == ["oasis-3"]


@pytest.mark.parametrize("row", list_cohorts(), ids=lambda row: row.name)
def test_a_row_says_whence_it_comes_and_on_which_terms(row):
    assert row.name == row.path.rpartition("/")[2].removesuffix(".yaml")
    assert row.terms and row.access and row.paper and row.layout
    assert row.url.startswith("http") or row.members
    known = {other.name for other in list_cohorts()}
    assert {name for name, _ in row.overlaps} <= known - {row.name}
    assert pickle.loads(pickle.dumps(row)) == row


def test_counts_of_the_papers_text_add_up():
    numbers = {row.name: dict(row.numbers) for row in list_cohorts()}
    for name, parts in {
        "abide": (956, 240),
        "oasis-1": (195, 40),
        "upenn-gbm": (482, 121),
        "ucsf-pdgm": (360, 92),
    }.items():
        row = numbers[name]
        assert (row["train"], row["test"]) == parts
        for split in ("train", "test"):
            classes = [count for words, count in row.items() if re.fullmatch(rf"{split} (?!Cox).+", words)]
            assert sum(classes) == row[split], (name, split)
    assert sum(numbers["adni"][f"scans {group}"] for group in ("CN", "MCI", "AD")) == numbers["adni"]["scans"] == 2182
    sequence = numbers["brats-sequence"]
    assert sequence["train"] + sequence["test"] == sequence["volumes"] == 4824
    assert sum(sequence[f"test {name}"] for name in ("T1c", "T1", "FLAIR", "T2")) == sequence["test"]
    parts = [numbers[f"brats2023-{name}"]["volumes in the sequence task"] for name in ("men", "ped", "ssa")]
    assert sum(parts) == sequence["volumes"]
    assert numbers["ppmi"]["PD"] + numbers["ppmi"]["controls"] == numbers["ppmi"]["train"] + numbers["ppmi"]["test"]


def test_a_users_own_file_is_a_cohort_like_any_other(tmp_path):
    row = load_cohort(write(tmp_path / "mine.yaml", MINE))
    for name in (
        "P7/visit1/MPRAGE.nii.gz",
        "P7/visit1/dark_fluid.nii",
        "P7/visit1/mprage_old.nii",
        "P7/visit1/swi.nii",
    ):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).touch()
    found = find_candidates([str(tmp_path / "data")], out_dir=tmp_path / "out", cohort=row)
    assert [(c.scan.cohort, c.scan.subject, c.scan.session, c.scan.sequence) for c in found[:2]] == [
        ("our-study", "sub0007", "visit1", "FLAIR"),
        ("our-study", "sub0007", "visit1", "T1"),
    ]
    assert [c.scan.reason for c in found[2:]] == [
        "repeat: replaced by a newer one",
        "other_modality: 'swi' is none of mprage, dark_fluid",
    ]


def test_a_file_can_change_single_keys_of_a_row(tmp_path):
    text = "extends: ppmi\nname: ppmi-baseline\nsequences: [T1]\nrepeats: {keep: first, per: subject}\n"
    row, ppmi = load_cohort(write(tmp_path / "baseline.yaml", text)), load_cohort("ppmi")
    assert (row.name, row.sequences, row.repeats.per, row.roles) == ("ppmi-baseline", ("T1",), "subject", ())
    assert (row.reader, row.sequence_rules, row.labels) == (ppmi.reader, ppmi.sequence_rules, ppmi.labels)
    for day in ("2012-02-01", "2011-01-25"):
        folder = tmp_path / f"PPMI/3102/MPRAGE_GRAPPA/{day}_10_03_54.0/S1"
        folder.mkdir(parents=True)
        (folder / "scan.nii").touch()
    found = find_candidates([str(tmp_path / "PPMI")], out_dir=tmp_path / "out", cohort=row)
    assert [(c.scan.session, c.scan.status) for c in found] == [("2011-01-25", "done"), ("2012-02-01", "skipped")]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("skip:", "skipp:", r"mine.yaml: the file: unknown key 'skipp', did you mean 'skip'\? accepted are .*known_by"),
        ("code: repeat,", "kode: repeat,", r"skip\[0\]: code is missing; expected text"),
        ("words:", "wrods: x, words:", r"skip\[0\]: unknown key 'wrods', did you mean 'words'\?"),
        ("reader: template", "reader: nifti", r"reader: found 'nifti'; expected bids, template, loni, dicom, fastmri"),
        (r"_old\.nii", "_old(", r"skip\[0\]: pattern: '_old\(' is no regular expression: missing \)"),
        ("(?P<subject>", "(?P<person>", r"has the groups \['person', 'sequence', 'session'\]; expected \(\?P<subject>"),
        ("(?P<sequence>", "(?:", r"has no group 'sequence' and the row has the sequences \['T1', 'FLAIR'\]"),
        ("mprage: T1", "mprage: T1w", r"sequence_of.mprage: found 'T1w'; expected T1, T1c, T2, FLAIR"),
        ("name: our-study", "name: Our Study", r"name: found 'Our Study'; expected"),
        ('title: "Our study"', "", r"title is missing; expected text"),
        ("pad: 4", "pad: four", r"subject: pad: found 'four'; expected a whole number"),
        ("reader: template", "members: [ixi]\nreader: template", r"expected one of the two"),
        ("reader: template", "members: [adni]", r"member 'adni' is read by 'loni'; expected bids or template"),
        ("reader: template", "reader: bids", r"reader 'bids' takes no patterns"),
        ("patterns:", "title: [", r"is not YAML in UTF-8"),
    ],
)
def test_a_mistake_in_a_row_is_named_with_its_place(tmp_path, old, new, message):
    assert old in MINE
    with pytest.raises(ValueError, match=message):
        load_cohort(write(tmp_path / "mine.yaml", MINE.replace(old, new)))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("columns: {Age: {column: AGE}}", r"labels\[0\].columns.Age: found the name 'Age'; expected lower-case"),
        ("columns: {age_years: {column: AGE, unit: y}}", r"columns.age_years: unknown key 'unit'"),
        ("columns: {age_years: {kind: number}}", r"columns.age_years: expected either column or derive"),
        ("columns: {day: {column: D, kind: date}}", r"columns.day: a column of kind date needs its format"),
        (
            "columns: {age_years: {derive: years_between, start: a, end: b}}",
            r"columns.age_years is made from 'a'; expected one further up: \[\]",
        ),
        ("columns: {age: {derive: older_than}}", r"derive: found 'older_than'; expected first_of, years_between"),
        ("contradictions: ignore", r"contradictions: found 'ignore'; expected error, missing"),
        ("session: {column: DAY, within_days: 9}", r"labels\[0\].session: within_days needs the format"),
    ],
)
def test_a_mistake_in_a_label_table_is_named_with_its_place(tmp_path, table, message):
    text = f"{MINE}\nlabels:\n  - files: 'a.csv'\n    subject: {{column: ID}}\n    {table}\n"
    with pytest.raises(ValueError, match=message):
        load_cohort(write(tmp_path / "mine.yaml", text))


def test_a_wrong_name_lists_the_close_ones():
    with pytest.raises(
        ValueError, match=r"--cohort 'brats2023-meningioma': no such cohort, did you mean brats2023-men"
    ):
        load_cohort("brats2023-meningioma")
    with pytest.raises(ValueError, match=r"--cohort 'nowhere.yaml': no such file"):
        load_cohort("nowhere.yaml")
    assert load_cohort("UPENN_GBM") is load_cohort("upenn-gbm")


def test_identifiers_are_brought_to_one_form():
    assert (
        IdRule(pattern=re.compile(r"UCSF-PDGM-0*(?P<id>\d+)"), pad=4, prefix="X-").read(" UCSF-PDGM-004 ") == "X-0004"
    )
    assert IdRule(date=("%m/%d/%Y",)).read("4/18/2006") == IdRule(date=("%m/%d/%Y",)).read("2006-04-18") == "2006-04-18"
    assert IdRule(case="upper").read("ixi002") == "IXI002"
    assert IdRule(pattern=re.compile(r"\d+"), optional=True).read("x") == ""
    with pytest.raises(ValueError, match=r"found 'x'; expected '\\\\d\+'"):
        IdRule(pattern=re.compile(r"\d+")).read("x")
    with pytest.raises(ValueError, match=r"found '31.12.1999'; expected a date as %m/%d/%Y"):
        IdRule(date=("%m/%d/%Y",)).read("31.12.1999")


def test_the_list_names_every_row_and_a_row_is_shown_in_full(tmp_path, capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()[1:-3]] == [row.name for row in list_cohorts()]
    assert "20 datasets of pretraining, 13 downstream cohorts" in listed
    assert re.search(r"^ixi +part of brain-age +template +open +T1 T2 +502 subjects", listed, re.MULTILINE)
    assert main(["oasis-1", write(tmp_path / "mine.yaml", MINE)]) == 0
    shown = capsys.readouterr().out
    for words in (
        "dementia = CDR (0 is 0, 0.5 is 1, 1 is 1, 2 is 1, 3 is 1)",
        "geometry    affine ((0, 0, -1, 80), (1, 0, 0, -128), (0, 1, 0, -128))",
        "repeats     the first of a subject and sequence",
        "our-study: Our study",
        "subject     read by P(?P<id>\\d+), filled up to 4 digits, prefix sub",
    ):
        assert words in shown
    assert main(["ixxi"]) == 1
    assert "did you mean ixi?" in capsys.readouterr().err


@pytest.mark.parametrize("row", list_cohorts(), ids=lambda row: row.name)
def test_every_row_can_be_shown_in_full(row, capsys):
    assert main([row.name]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"{row.name}: {row.title}")
    told = " ".join(shown.split())
    for words in (row.terms, *(" ".join(note.split()) for note in row.notes), *(rule.reason for rule in row.skip)):
        assert words in told
