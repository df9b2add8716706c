"""The table of measurements."""

import pytest

from braindino.scan_quality import COLUMNS, ScanQuality, read_quality, write_quality

ROW = ScanQuality(
    scan_id="0123456789abcdef", shape="182x218x182", spacing="1.000x1.000x1.000", obliqueness=0.0, p01=3.0,
    median=421.5, p99=900.25, foreground=0.625,
)  # fmt: skip
GATED = ScanQuality(
    **{**ROW.__dict__, "scan_id": "fedcba9876543210"} | {
        "stripped_by": "hd-bet", "brain_ml": 1412.5, "components": 3, "largest_component": 0.9975, "border": 0.0,
        "agreement": 0.9125, "covered": 0.96875, "inside": 1.0, "holes": 0.0,
    }
)  # fmt: skip


def test_rows_survive_a_round_trip_with_what_was_not_measured(tmp_path):
    write_quality(tmp_path / "quality.tsv", [ROW, GATED])
    assert read_quality(tmp_path / "quality.tsv") == [ROW, GATED]
    assert "n/a" in (tmp_path / "quality.tsv").read_text().splitlines()[1]


def test_a_missing_column_and_a_number_that_is_none_are_named(tmp_path):
    path = tmp_path / "quality.tsv"
    write_quality(path, [GATED])
    text = path.read_text()
    path.write_text(text.replace("1412.5", "many"))
    with pytest.raises(ValueError, match=r"quality\.tsv, line 2: could not convert string to float: 'many'"):
        read_quality(path)
    path.write_text("\t".join(COLUMNS[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"columns \['holes'\] are missing"):
        read_quality(path)
