"""Exposure tables, crosswalks, overlaps: what was pretrained on is found in a test set under any name."""

import csv
from pathlib import Path

import numpy as np
import pytest

from braindino.fingerprint import hamming
from braindino.leakage import (
    LOOKS_THE_SAME,
    SAME_BY_CROSSWALK,
    SAME_SUBJECT,
    SAME_VOXELS,
    Crosswalk,
    Exposure,
    _find_near,
    _table,
    check_test_scans,
    exposure_of_encoder,
    find_overlaps,
    read_exposure,
    write_exposure,
)
from braindino.manifest import Scan, write_scans
from braindino.slice_store import SliceStoreWriter


def scan(cohort: str, subject: str, *, content: str = "", looks: str = "", sequence: str = "T1") -> Scan:
    return Scan("", cohort, subject, sequence=sequence, content_hash=content, appearance_hash=looks)


def looks(number: int, *, flipped: int = 0) -> str:
    """512 random bits of that number, the first few flipped."""
    bits = np.random.default_rng(number).integers(0, 2, 512, dtype=np.uint8)
    bits[:flipped] ^= 1
    return np.packbits(bits).tobytes().hex()


def kinds(exposed: list[Scan], tested: Scan, crosswalk: Crosswalk | None = None) -> list[tuple[str, str]]:
    found = find_overlaps(Exposure(tuple(exposed)), [tested], crosswalk or Crosswalk())
    return [(overlap.kind, overlap.certainty) for overlap in found]


def test_each_kind_of_overlap_is_told_from_the_others() -> None:
    exposed = [scan("a", "1", content="c1", looks=looks(1)), scan("a", "2", content="c2", looks=looks(2))]
    assert kinds(exposed, scan("b", "9", content="c2", looks=looks(2))) == [(SAME_VOXELS, "certain")]
    assert kinds(exposed, scan("b", "9", content="x", looks=looks(2, flipped=60))) == [(LOOKS_THE_SAME, "probable")]
    assert kinds(exposed, scan("a", "2", content="x", looks=looks(7))) == [(SAME_SUBJECT, "certain")]
    assert kinds(exposed, scan("a", "1", content="c2", looks=looks(2))) == [
        (SAME_VOXELS, "certain"),
        (SAME_SUBJECT, "certain"),
    ]
    assert kinds(exposed, scan("b", "1", content="x", looks=looks(7))) == []
    assert kinds(exposed, scan("b", "1")) == [] and kinds([scan("a", "3")], scan("b", "4")) == []


def test_the_nearest_of_several_is_named_with_its_distance_and_their_number() -> None:
    exposed = [scan("a", str(n), looks=looks(1, flipped=flips)) for n, flips in enumerate((90, 30, 400, 128, 129))]
    (found,) = find_overlaps(Exposure(tuple(exposed)), [scan("b", "1", looks=looks(1))], Crosswalk())
    assert (found.seen.subject, found.distance, found.num_seen) == ("1", 30, 3)
    far = find_overlaps(Exposure(tuple(exposed)), [scan("b", "1", looks=looks(1))], Crosswalk(), max_distance=20)
    assert far == []


def test_the_search_in_blocks_gives_what_a_loop_gives() -> None:
    seen = [scan("a", str(n), looks=looks(n)) for n in range(90)] + [scan("a", "blind")]
    tested = [scan("b", "blind"), *(scan("b", str(n), looks=looks(1000 + n)) for n in range(70))]
    found = _find_near(seen, tested, max_distance=228)
    for row, each in enumerate(tested):
        distances = (
            [hamming(each.appearance_hash, s.appearance_hash) for s in seen[:-1]] if each.appearance_hash else []
        )
        within = [d for d in distances if d <= 228]
        assert found.get(row) == ((distances.index(min(within)), min(within), len(within)) if within else None)
    assert 0 < len(found) < 70


@pytest.mark.parametrize(
    ("seen", "tested", "expected"),
    [
        (("BraTS2025-GLI-PRE", "BraTS-GLI-00001-000"), ("brats2021", "BraTS2021_00001"), "probable"),
        (("BraTS2025-GLI-PRE", "BraTS-GLI-00001-000"), ("brats2021", "BraTS2021_00002"), None),
        (("BraTS2025-GLI-PRE", "BraTS-GLI-00001-000"), ("BraTS2023-GLI", "BraTS-GLI-00001-001"), "certain"),
        (("brats2025-gli-pre", "00001"), ("brats2021", "1"), "probable"),
        (("BraTS2023-MEN", "BraTS-MEN-00004-000"), ("other", "BraTS-MEN-00004-001"), "certain"),
        (("BraTS2023-MEN", "BraTS-MEN-00004-000"), ("BraTS2021", "BraTS2021_00004"), None),
        (("UPENN-GBM", "UPENN-GBM-00007_11"), ("upenn", "7"), "certain"),
        (("ucsf-pdgm", "UCSF-PDGM-0433_FU007d"), ("UCSF", "UCSF-PDGM-433"), "certain"),
        (("TCGA-GBM", "TCGA-02-0006"), ("BraTS-TCGA", "TCGA-02-0006"), "certain"),
        (("CPTAC-GBM", "C3L-00016"), ("x", "C3L-00016"), "certain"),
        (("ADNI1", "002_S_0295"), ("adni", "ADNI002S0295"), "certain"),
        (("OASIS-1", "OAS1_0061_MR1"), ("oasis", "OAS1_0061_MR2"), "certain"),
        (("OASIS-1", "OAS1_0061"), ("OASIS-2", "OAS2_0061"), None),
        (("PPMI", "3001"), ("ppmi-bids", "sub-3001"), "certain"),
        (("ABIDE1", "50455"), ("abide_raw", "0050455"), "certain"),
        (("LONG579", "5003"), ("ds003604", "sub-5003"), "certain"),
        (("LONG579", "5003"), ("other", "5003"), None),
        (("IXI", "IXI002-Guys-0828"), ("ixi-t2", "2"), "certain"),
        (("pixar", "sub-pixar001"), ("ds000228", "pixar001"), "certain"),
        (("oasis-3", "sub-OAS30001"), ("OASIS", "OAS30001_MR_d0757"), "certain"),
        (("acrin-fmiso-brain", "ACRIN-FMISO-Brain-007"), ("ACRIN-FMISO", "7"), "certain"),
        (("ivygap", "W10"), ("IvyGAP", "w10"), "certain"),
        (("piop1", "sub-0001"), ("piop2", "sub-0001"), None),
        (("BraTS2024-GoAT", "BraTS-GoAT-00001"), ("BraTS2021", "BraTS2021_00001"), None),
    ],
)
def test_ids_of_the_named_cohorts_meet_as_their_rules_say(
    seen: tuple[str, str], tested: tuple[str, str], expected: str | None
) -> None:
    wanted = [] if expected is None else [(SAME_BY_CROSSWALK, expected)]
    assert kinds([scan(*seen)], scan(*tested)) == wanted
    assert kinds([scan(*tested)], scan(*seen)) == wanted


def test_the_same_cohort_and_subject_is_the_same_person_without_any_rule() -> None:
    assert kinds([scan("LONG579", "5003", sequence="T1")], scan("LONG579", "5003")) == [(SAME_SUBJECT, "certain")]
    # BIDS readers differ in whether "sub-" belongs to the id.
    assert kinds([scan("mine", "sub-07")], scan("mine", "07")) == [(SAME_SUBJECT, "certain")]
    assert kinds([scan("mine", "sub-07")], scan("yours", "07")) == []


def mapping(path: Path) -> Path:
    """The form of BraTS2021_MappingToTCIA."""
    rows = [
        ["Data Collection (as on TCIA+additional)", "Site No", "TCIA PatientID", "BraTS2021 ID", "MGMT value"],
        ["UPENN-GBM", "6", "UPENN-GBM-00003", "BraTS2021_00005", "1"],
        ["UCSF-PDGM", "7", "UCSF-PDGM-0004", "BraTS2021_00097", ""],
        ["new-not-previously-in-TCIA", "1", "", "BraTS2021_01000", "0"],
    ]
    if path.suffix == ".xlsx":
        import pandas as pd

        pd.DataFrame(rows[1:], columns=rows[0]).to_excel(path, index=False)
    else:
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows(rows)
    return path


@pytest.mark.parametrize("name", ["map.xlsx", "map.csv"])
def test_a_mapping_table_joins_collections_with_certainty(tmp_path: Path, name: str) -> None:
    crosswalk = Crosswalk([mapping(tmp_path / name)])
    upenn = scan("UPENN-GBM", "UPENN-GBM-00003_11")
    assert kinds([scan("BraTS2021", "BraTS2021_00005")], upenn, crosswalk) == [(SAME_BY_CROSSWALK, "certain")]
    # Two steps, and the first of them, the equal number, is probable.
    assert kinds([scan("BraTS2025", "BraTS-GLI-00005-000")], upenn, crosswalk) == [(SAME_BY_CROSSWALK, "probable")]
    # A site's number is no patient's.
    assert kinds([scan("BraTS2021", "BraTS2021_00005")], scan("UPENN-GBM", "6"), crosswalk) == []
    assert kinds([scan("BraTS2021", "BraTS2021_00005")], upenn) == []


def test_the_mapping_of_years_makes_equal_numbers_certain(tmp_path: Path) -> None:
    (tmp_path / "m.tsv").write_text("BraTS2023\tBraTS2021\tSite No\nBraTS-GLI-00001-000\tBraTS2021_00001\t3\n")
    crosswalk = Crosswalk([tmp_path / "m.tsv"])
    exposed = [scan("gli", "BraTS-GLI-00001-000"), scan("gli", "BraTS-GLI-00002-000")]
    assert kinds(exposed, scan("b", "BraTS2021_00001"), crosswalk) == [(SAME_BY_CROSSWALK, "certain")]
    assert kinds(exposed, scan("b", "BraTS2021_00002"), crosswalk) == [(SAME_BY_CROSSWALK, "probable")]


def test_ucsfs_own_table_joins_by_the_bare_number(tmp_path: Path) -> None:
    (tmp_path / "ucsf.csv").write_text(
        "ID,IDH,BraTS21 ID,BraTS21 Segmentation Cohort\nUCSF-PDGM-004,wildtype,97,Training\n"
    )
    crosswalk = Crosswalk([tmp_path / "ucsf.csv"])
    assert kinds([scan("b", "BraTS2021_00097")], scan("UCSF", "UCSF-PDGM-0004"), crosswalk) == [
        (SAME_BY_CROSSWALK, "certain")
    ]


def test_a_table_without_known_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"no row with two ids that are known here; found columns \['a', 'b'\]"):
        Crosswalk([tmp_path / "m.csv"])


def test_pairs_that_ids_cannot_decide_are_told_until_a_table_decides_them(tmp_path: Path) -> None:
    seen, tested = [scan("BraTS2025", "BraTS-GLI-00005-000")], [scan("UPENN-GBM", "UPENN-GBM-00003_11")]
    (line,) = Crosswalk().undecided(seen, tested)
    assert line.startswith("brats-gli against upenn-gbm: 447 cases") and "BraTS2021_MappingToTCIA.xlsx" in line
    assert Crosswalk([mapping(tmp_path / "m.csv")]).undecided(seen, tested) == []
    (line,) = Crosswalk().undecided([scan("x", "BraTS-GoAT-00001")], [scan("y", "BraTS2021_00001")])
    assert line.startswith("brats-goat against brats2021: GoAT re-uses") and line.endswith(
        "only the fingerprints can tell"
    )
    assert Crosswalk().undecided([scan("IXI", "IXI002")], tested) == []


def test_every_rule_compiles_and_names_its_source() -> None:
    for name in ("persons.tsv", "same_number.tsv", "undecided.tsv"):
        rows = _table(name)
        assert rows and all(None not in row and None not in row.values() for row in rows), name
        assert all(row.get("source") or row.get("why") for row in rows), name
    spaces = {row["space"] for row in _table("persons.tsv")}
    for row in _table("same_number.tsv"):
        assert {row["space"], row["other"]} <= spaces and row["certainty"] == "probable"


def test_an_exposure_survives_a_round_trip_and_is_found_from_everywhere_it_lies(tmp_path: Path) -> None:
    rows = (scan("b", "2", content="c", looks=looks(1)), scan("#a", "1"), scan("#a", "1"))
    run = tmp_path / "run"
    write_exposure(run / "encoder" / "pretrained_on.tsv", Exposure(rows, ("another run",)))
    (run / "encoder" / "encoder.safetensors").write_bytes(b"")
    for place in (run, run / "encoder", run / "encoder" / "encoder.safetensors", run / "encoder" / "pretrained_on.tsv"):
        back = read_exposure(place)
        assert back == Exposure((rows[1], rows[0]), ("another run",)), place
        assert exposure_of_encoder(place) == back
    first = (run / "encoder" / "pretrained_on.tsv").read_bytes()
    write_exposure(tmp_path / "again.tsv", back)
    assert (tmp_path / "again.tsv").read_bytes() == first


def test_a_store_and_a_prepared_folder_are_exposures_too(tmp_path: Path) -> None:
    done = Scan("/x/1.nii.gz", "a", "1", sequence="T1", content_hash="c")
    write_scans(
        tmp_path / "prepared" / "scans.tsv", [done, Scan("/x/2.nii", "a", "2", status="quarantined", reason="r")]
    )
    assert [each.subject for each in read_exposure(tmp_path / "prepared").scans] == ["1"]
    writer = SliceStoreWriter(tmp_path / "prepared" / "store")
    writer.add(done, np.ones((2, 256, 256), np.float32), [3, 4])
    writer.publish()
    assert [(each.subject, each.content_hash) for each in read_exposure(tmp_path / "prepared" / "store").scans] == [
        ("1", "c")
    ]


def test_what_is_no_exposure_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected an encoder"):
        read_exposure(tmp_path / "nothing")
    with pytest.raises(ValueError, match="nobody wrote down"):
        read_exposure(tmp_path)
    assert exposure_of_encoder(tmp_path) is None
    assert exposure_of_encoder("untrained:vit_tiny") == exposure_of_encoder("intensity") == Exposure()
    (tmp_path / "pretrained_on.tsv").write_text("# braindino pretrained_on.tsv version 9\n")
    with pytest.raises(ValueError, match=r"found '# braindino pretrained_on\.tsv version 9'"):
        read_exposure(tmp_path)
    write_exposure(tmp_path / "pretrained_on.tsv", Exposure((scan("a", "1"),)))
    text = (tmp_path / "pretrained_on.tsv").read_text()
    (tmp_path / "pretrained_on.tsv").write_text(text[:-5])
    with pytest.raises(ValueError, match=r"line 3: expected 6 cells"):
        read_exposure(tmp_path)


def test_an_overlap_is_refused_by_name_or_stamped() -> None:
    exposure = Exposure((scan("a", "1", content="c1"), scan("a", "2", content="c2")))
    tested = [scan("a", "1", content="x"), scan("a", "1", content="y"), scan("b", "7", content="c2"), scan("b", "8")]
    with pytest.raises(
        ValueError, match=r"2 of 3 test subjects .* RUN .*: a/1 \(same_subject: a/1\), b/7 \(same_voxels"
    ):
        check_test_scans(exposure, tested, model="RUN", allow_overlap=False)
    stamp = check_test_scans(exposure, tested, model="RUN", allow_overlap=True)
    assert stamp == (
        "2 of 3 test subjects: same_voxels 1, same_subject 1; "
        "1 of 4 test scans have no fingerprint, compared by ids alone"
    )
    assert check_test_scans(exposure, [scan("b", "7", content="z")], model="RUN", allow_overlap=False) == "none"
    assert check_test_scans(Exposure(), tested, model="untrained", allow_overlap=False) == "none"
    assert check_test_scans(None, tested, model="RUN", allow_overlap=False) == "unknown: RUN has no pretrained_on.tsv"
    partly = Exposure((scan("a", "1"),), ("weights it started from",))
    assert check_test_scans(partly, [scan("b", "7", content="z")], model="RUN", allow_overlap=False) == (
        "unknown; weights it started from"
    )
