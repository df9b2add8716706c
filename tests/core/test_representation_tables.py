"""Tables of representation analysis: what is written is read."""

import dataclasses
import math

import pytest

from braindino import representation_tables as tables

CKA = tables.CkaRow(
    group="all", unit="scan", depth="late", encoder_a="a", encoder_b="b", n=12, subjects=6, dim_a=768, dim_b=512,
    cka=0.953125, low=0.9, high=math.nan, debiased=-0.015625, debiased_low=-0.5, debiased_high=1.0,
    method="95 % jackknife",
)  # fmt: skip
SPREAD = tables.SpreadRow(
    group="ixi", encoder="a", depth="global", n=12, subjects=12, dim=768, effective_rank=10.5, participation_ratio=3.25,
    mean_cosine=0.999, first_share=0.5, between_within=math.nan,
)  # fmt: skip
SHARE = tables.CohortShareRow(
    encoder="a", bank="same sequence", cohort="ixi", k=10, n=12, subjects=12, share=0.75, low=0.5, high=1.0,
    chance=0.25, method="bootstrap",
)  # fmt: skip
NEIGHBOUR = tables.NeighbourRow(
    encoder="a", among="other cohorts", query="0" * 16, query_cohort="ixi", query_subject="s1", query_sequence="T1",
    query_slice="64", rank=1, scan="1" * 16, cohort="oasis", subject="s2", session="", sequence="T1", slice="63",
    similarity=0.875, path="/data/with space.nii.gz",
)  # fmt: skip
KINDS = [
    (CKA, tables.write_cka, tables.read_cka),
    (SPREAD, tables.write_spread, tables.read_spread),
    (SHARE, tables.write_cohort_share, tables.read_cohort_share),
    (NEIGHBOUR, tables.write_neighbours, tables.read_neighbours),
]


@pytest.mark.parametrize(("row", "write", "read"), KINDS)
def test_rows_come_back_as_they_were_written(row, write, read, tmp_path):
    write(tmp_path / "table.tsv", [row, row])
    found = read(tmp_path / "table.tsv")
    assert [str(dataclasses.asdict(each)) for each in found] == [str(dataclasses.asdict(row))] * 2  # NaN is not NaN


def test_what_is_not_defined_stands_as_such_in_the_file(tmp_path):
    tables.write_cka(tmp_path / "cka.tsv", [CKA])
    header, line = (tmp_path / "cka.tsv").read_text().splitlines()
    cells = dict(zip(header.split("\t"), line.split("\t"), strict=True))
    assert cells["high"] == "n/a" and cells["cka"] == "0.953125"
    assert header.startswith("group\tunit\tdepth\tencoder_a\tencoder_b\tn\t")


def test_a_number_that_is_none_is_named_with_its_line(tmp_path):
    path = tmp_path / "cka.tsv"
    tables.write_cka(path, [CKA, CKA])
    path.write_text(path.read_text().replace("0.953125", "high", 1))
    with pytest.raises(ValueError, match=r"cka\.tsv, line 2: could not convert.*'high'.*`braindino represent`"):
        tables.read_cka(path)
    with pytest.raises(ValueError, match=r"columns \['effective_rank'"):
        tables.write_spread(tmp_path / "spread.tsv", [SPREAD])
        text = (tmp_path / "spread.tsv").read_text().replace("effective_rank", "rank")
        (tmp_path / "spread.tsv").write_text(text)
        tables.read_spread(tmp_path / "spread.tsv")
