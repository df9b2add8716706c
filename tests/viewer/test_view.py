"""What may be looked at, what is refused before anything is served, and the nearest slices."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from braindino.feature_table import FeatureTable, FeatureTableMeta, FeatureTableWriter
from braindino.fingerprint import content_hash
from braindino.manifest import Scan, write_scans
from braindino.viewer import view
from braindino.viewer.neighbours import NUM_NEIGHBOURS, read_tables
from braindino.viewer.scans import GIVEN, ScanShelf, Source, given_source, open_scan, prepared_sources, scan_nifti
from braindino.viewer.session import Session
from braindino.viewer.token_planes import LoadedEncoder
from braindino.volume import load_volume, save_array
from tests.viewer.conftest import AFFINE, SHAPE, write_phantom

NUM_SLICES = 16


def prepare(folder: Path, *, subjects: int, cohorts: int = 1) -> list[Scan]:
    """A prepared folder: one scan with skull and a mask for each subject."""
    scans = []
    for number in range(subjects):
        phantom = write_phantom(folder / "raw" / f"s{number}", seed=number, skull=True)
        scan = Scan(str(phantom.scan), f"cohort{number % cohorts}", f"sub-{number}", sequence="T1")
        mask = folder / "masks" / f"{scan.scan_id}_mask.nii.gz"
        mask.parent.mkdir(exist_ok=True)
        phantom.mask.rename(mask)
        scans.append(scan)
    write_scans(folder / "scans.tsv", [*scans, Scan("/nowhere.nii", "c", "bad", status="quarantined", reason="x: y")])
    return scans


def extract(folder: Path, prepared: Path, scans: list[Scan], loaded: LoadedEncoder) -> Path:
    """The feature table that the verb `extract` would write, of NUM_SLICES slices."""
    encoder = loaded.encoder
    slices = replace(encoder.preparation, num_slices=NUM_SLICES)
    identity = replace(encoder.identity, preparation=slices.describe())
    with FeatureTableWriter(folder, FeatureTableMeta(identity, "float32", encoder.dim, NUM_SLICES)) as table:
        for source in prepared_sources(prepared):
            opened = open_scan(source)
            [features] = encoder.encode([slices.apply(opened.brain, sequence=None)])
            table.add(source.scan, features)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Scan]]:
    folder = tmp_path_factory.mktemp("prepared")
    return folder, prepare(folder, subjects=3, cohorts=2)


@pytest.fixture(scope="module")
def features(prepared, tiny_encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return extract(tmp_path_factory.mktemp("features"), *prepared, tiny_encoder)


def test_the_encoder_sees_the_brain_and_the_page_the_whole_head(prepared) -> None:
    folder, scans = prepared
    opened = open_scan(prepared_sources(folder)[0])
    assert (opened.volume.data != 0).all() and opened.mask is not None
    assert (opened.brain.data != 0).sum() == opened.mask.sum()
    assert opened.warning == ""
    bare = open_scan(given_source(Path(scans[0].path), mask=None, segmentation=None))
    assert "no brain mask" in bare.warning and "--mask" in bare.warning


def test_a_given_scan_that_was_prepared_keeps_its_subject_and_its_mask(prepared, tmp_path) -> None:
    folder, scans = prepared
    source = given_source(Path(scans[1].path), mask=None, segmentation=None, known=prepared_sources(folder))
    assert (source.key, source.scan) == (GIVEN, scans[1])
    assert open_scan(source).mask is not None
    # A copy under another name is the same scan, by its voxels.
    copy = tmp_path / "renamed.nii.gz"
    copy.write_bytes(Path(scans[1].path).read_bytes())
    hashed = replace(scans[1], content_hash=content_hash(load_volume(copy)))
    known = [Source("x", scans[0], folder), Source("y", hashed, folder)]
    source = given_source(copy, mask=None, segmentation=None, known=known)
    assert (source.scan.subject_key, source.scan.path) == (scans[1].subject_key, str(copy))
    np.testing.assert_array_equal(open_scan(source).mask, open_scan(prepared_sources(folder)[1]).mask)
    stranger = given_source(Path(scans[2].path), mask=None, segmentation=None, known=known)
    assert (stranger.scan.subject_key, stranger.mask) == ("/scan", None)


def test_only_scans_that_were_done_are_offered(prepared) -> None:
    folder, scans = prepared
    assert [source.scan for source in prepared_sources(folder)] == scans
    assert [source.key for source in prepared_sources(folder)] == [scan.scan_id for scan in scans]


def test_a_segmentation_on_its_own_grid_is_laid_over_the_scan(phantom) -> None:
    opened = open_scan(given_source(phantom.scan, mask=None, segmentation=phantom.segmentation))
    labels = opened.segmentation.labels
    assert labels.shape == opened.volume.shape
    x, y, z = phantom.voxel
    assert labels[x, y, z] == 2
    # 7 x 5 x 9 mm around the mark, of voxels of 2 x 1.5 x 3 mm.
    assert (labels == 2).sum() == 3 * 3 * 3
    # The block at the back: 18 to 28 mm behind the mark.
    behind = y - np.argwhere(labels == 7)[:, 1]
    assert behind.min() * 1.5 >= 17 and behind.max() * 1.5 <= 30
    assert opened.segmentation.millilitres == {2: pytest.approx(0.315), 7: pytest.approx(1.8)}


def test_the_page_gets_the_scan_as_it_is(phantom, tmp_path) -> None:
    opened = open_scan(given_source(phantom.scan, mask=None, segmentation=None))
    (tmp_path / "sent.nii").write_bytes(scan_nifti(opened))
    sent = load_volume(tmp_path / "sent.nii")
    np.testing.assert_array_equal(sent.data, opened.volume.data)
    np.testing.assert_allclose(sent.affine, opened.volume.affine, atol=1e-5)
    assert len(scan_nifti(opened)) == 352 + 2 * np.prod(SHAPE), "whole numbers go as int16"
    save_array(np.linspace(0, 1, int(np.prod(SHAPE))).reshape(SHAPE), AFFINE, tmp_path / "f.nii", dtype=np.float32)
    fractions = open_scan(given_source(tmp_path / "f.nii", mask=None, segmentation=None))
    assert len(scan_nifti(fractions)) == 352 + 4 * np.prod(SHAPE)


def test_nearest_slices_are_those_of_other_subjects_one_of_each(prepared, features, tiny_encoder, serve) -> None:
    folder, scans = prepared
    session = Session(ScanShelf(prepared_sources(folder)), [tiny_encoder], read_tables([features], [tiny_encoder]))
    client = serve(session)
    question = {"scan": scans[0].scan_id, "encoder": "encoder-0", "layer": 14, "otherCohorts": False}
    answer = client.json("/api/neighbours", question)
    assert answer["searched"] == 3 * NUM_SLICES
    rows = answer["neighbours"]
    assert sorted(row["subject"] for row in rows) == ["sub-1", "sub-2"] and len(rows) < NUM_NEIGHBOURS
    assert [row["similarity"] for row in rows] == sorted((row["similarity"] for row in rows), reverse=True)
    feature = session.planes.slice_feature(tiny_encoder, session.shelf.open(scans[0].scan_id), 14)
    feature = feature / np.linalg.norm(feature)
    for row in rows:
        [scan] = [scan for scan in scans if scan.subject == row["subject"]]
        [slices] = FeatureTable(features).slices([scan])
        cosines = slices @ feature / np.linalg.norm(slices, axis=1)
        assert row["similarity"] == pytest.approx(cosines.max(), abs=1e-4)
        assert row["slice"] == 8 + 16 * cosines.argmax(), "the middles of 16 equal parts of 256"
    for row in rows:
        status, headers, png = client.ask(f"/api/thumbnails/{row['key']}/{row['slice']}")
        assert (status, headers["Content-Type"], png[:8]) == (200, "image/png", b"\x89PNG\r\n\x1a\n")
    others = client.json("/api/neighbours", question | {"otherCohorts": True})["neighbours"]
    assert [row["cohort"] for row in others] == ["cohort1"]
    assert client.json("/api/neighbours", question | {"layer": 0}).keys() == {"outside"}
    assert client.error(f"/api/thumbnails/{scans[0].scan_id}/256")[0] == 422


def test_a_slice_of_the_table_finds_itself_in_another_s_place(prepared, features, tiny_encoder) -> None:
    """The feature of a click is the feature of the table: asked without leaving its subject out, similarity is 1."""
    folder, scans = prepared
    table = read_tables([features], [tiny_encoder])["encoder-0"]
    session = Session(ScanShelf(prepared_sources(folder)), [tiny_encoder], {})
    opened = session.shelf.open(scans[2].scan_id)
    found = set()
    for layer in range(2, 23):
        feature = session.planes.slice_feature(tiny_encoder, opened, layer)
        [nearest] = table.index.nearest(feature, count=1)
        if nearest.similarity > 0.99999:
            assert nearest.scan.scan_id == scans[2].scan_id
            found.add(nearest.place)
    # 21 layers over 256 slices, of which the table has 8, 24, 40...: layer 14 lies on slice 152.
    assert found == {9}


def test_a_neighbour_whose_file_was_not_given_cannot_be_opened(
    prepared, features, tiny_encoder, serve, phantom
) -> None:
    session = Session(
        ScanShelf([given_source(phantom.scan, mask=None, segmentation=None)]),
        [tiny_encoder],
        read_tables([features], [tiny_encoder]),
    )
    client = serve(session)
    question = {"scan": GIVEN, "encoder": "encoder-0", "layer": 14}
    rows = client.json("/api/neighbours", question)["neighbours"]
    assert len(rows) == 3 and all(row["key"] is None for row in rows)
    scan = prepared[1][0]
    for address in (f"scans/{scan.scan_id}", f"scans/{scan.scan_id}/volume", f"thumbnails/{scan.scan_id}/9"):
        assert client.error(f"/api/{address}")[0] == 404, "known to the table, not given"


def test_features_of_another_encoder_are_refused(features, tiny_encoder, prepared) -> None:
    encoder = tiny_encoder.encoder
    other = type(encoder)(encoder.network, image_size=224)
    with pytest.raises(ValueError, match=r"features of encoder 'tiny'.*the encoders given are small: give --encoder"):
        read_tables([features], [LoadedEncoder("encoder-0", "small", other)])
    with pytest.raises(ValueError, match="the encoders given are none"):
        read_tables([features], [])
    with pytest.raises(ValueError, match="features of the same encoder as"):
        read_tables([features, features], [tiny_encoder])
    with pytest.raises(ValueError, match=r"no features\.json"):
        read_tables([prepared[0]], [tiny_encoder])


def run(*words: object, capsys) -> tuple[int, str]:
    code = view.main([str(word) for word in (*words, "--no-browser")])
    return code, capsys.readouterr().err


def test_what_cannot_be_shown_is_told_before_anything_is_served(phantom, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(view, "ViewServer", lambda *_, **__: pytest.fail("nothing may be served"))
    text = tmp_path / "text.nii.gz"
    text.write_text("no NIfTI")
    wrong = tmp_path / "mask.nii.gz"
    save_array(np.ones((9, 9, 9)), AFFINE, wrong, dtype=np.uint8)
    empty = tmp_path / "empty.nii.gz"
    save_array(np.zeros(SHAPE), AFFINE, empty, dtype=np.uint8)
    elsewhere = tmp_path / "elsewhere.nii.gz"
    away = AFFINE.copy()
    away[0, 3] += 5000
    save_array(np.ones(SHAPE), away, elsewhere, dtype=np.uint8)
    for words, message in (
        ([tmp_path / "gone.nii.gz"], "gone.nii.gz"),
        ([text], "text.nii.gz: not a NIfTI file but text"),
        ([phantom.scan, "--mask", wrong], "mask.nii.gz: grid (9, 9, 9)"),
        ([phantom.scan, "--mask", empty], "the mask is empty"),
        ([phantom.scan, "--segmentation", elsewhere], "none of its labels lies within the scan"),
        ([phantom.scan, "--segmentation", phantom.scan.parent], "labels"),
        (["--prepared", tmp_path], "no scans.tsv here"),
        ([phantom.scan, "--encoder", tmp_path / "none"], "none"),
        ([phantom.scan, "--encoder", "intensity"], "no direction to compare"),
        ([phantom.scan, "--encoder", "untrained:vit_tiny", "--options", "patch=4"], "no encoder has 'patch'"),
        ([phantom.scan, "--encoder", "untrained:vit_tiny", "--device", "tpu"], "--device tpu"),
    ):
        code, error = run(*words, capsys=capsys)
        assert code == 1, words
        assert message in error if message != "labels" else error.startswith("braindino view: "), words
        assert "Traceback" not in error


def test_words_that_do_not_belong_together_are_told(phantom, tmp_path, capsys) -> None:
    for words, message in (
        ([], "nothing to look at: give a scan, or --prepared"),
        (["--mask", phantom.mask, "--prepared", tmp_path], "--mask belongs to a scan"),
        ([phantom.scan, "--features", tmp_path], "give it with --encoder"),
        ([phantom.scan, "--port", "80"], "--port: found 80; expected 1024"),
        ([phantom.scan, "--sequence", "T3"], "expected one of T1, T1c, T2, FLAIR"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(*words, capsys=capsys)
        said = " ".join(capsys.readouterr().err.replace("|", " ").split())
        assert ended.value.code == 2
        assert message in said, words


def test_a_port_that_is_taken_is_told(phantom, phantom_session, serve, capsys) -> None:
    port = serve(phantom_session).server.server_port
    code, error = run(phantom.scan, "--port", port, capsys=capsys)
    assert (code, f"port {port}" in error) == (1, True), error


def test_the_browser_is_opened_unless_told_not_to(phantom, monkeypatch, capsys) -> None:
    opened: list[str] = []
    monkeypatch.setattr(view.webbrowser, "open", lambda address: opened.append(address) is None)
    monkeypatch.setattr(view.ViewServer, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert view.main([str(phantom.scan), "--no-browser"]) == 0
    assert not opened
    assert view.main([str(phantom.scan)]) == 0
    printed = capsys.readouterr().out
    assert opened[0] in printed and opened[0].startswith("http://127.0.0.1:")
