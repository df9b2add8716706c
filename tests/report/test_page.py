"""The page of a small project folder: what it says, that it says nothing else, and that it stands alone."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.image import imsave
from PIL import Image

from braindino.manifest import Scan, write_scans
from braindino.report.page import main
from braindino.report.sections import GATE_TITLES
from braindino.scan_quality import ScanQuality, write_quality
from braindino.segmentation_scores import RegionSummary, SegmentationScores, write_scores
from braindino.vision_transformer import vit_tiny
from braindino.volume import save_array
from braindino.weights import save_encoder

SCRIPT = "<script>alert('sub')</script>"
SCAN = Scan("/x/sub-1_ses-1_ce-gadolinium_T1w.nii.gz", "c", "sub-1", "ses-1", "T1c").scan_id
VOID = {"br", "col", "hr", "img", "link", "meta"}
SUMMARY = (
    "encoder ratio variant metric estimate low high baseline baseline_low baseline_high baseline_name "
    "train_subjects test_subjects seeds data"
)


class Page(HTMLParser):
    """Checks that every element is closed in order, and collects addresses and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.addresses.append((name, value))
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("project")
    write_cohort(root / "cohort")
    write_prepared(root)
    write_run(root / "pretrain")
    write_segmentation(root / "nnunet" / "predictions" / "pretrained" / "scores")
    write_evaluation(root / "eval" / "sequence")
    (root / "commands.log").write_text("braindino simulate --out cohort && echo 'a < b'\n")
    assert main([str(root)]) == 0
    return root


@pytest.fixture(scope="module")
def page(project) -> Page:
    return Page((project / "report" / "index.html").read_text(encoding="utf-8"))


def test_the_page_shows_the_numbers_of_the_files(page):
    for words in (
        "subjects 2",
        "years of age 23–71",
        "iterations of 12 12",
        "last loss 7.25",
        "0.812 ± 0.044",
        "0.917 [0.750, 1.000]",
        "0.250 [0.200, 0.300]",
        "most frequent sequence",
        "braindino simulate --out cohort && echo 'a < b'",
    ):
        assert words in page.text


def test_counts_stand_beside_their_words(page):
    tiles = re.findall(r"(scans prepared|quarantined|skipped|slices in the store) ([\d,]+)", page.text)
    assert dict(tiles) == {"scans prepared": "2", "quarantined": "2", "skipped": "0", "slices in the store": "256"}


def test_a_quarantined_scan_is_listed_with_its_reason(page):
    assert "four_dimensional: a series & not a volume" in page.text


def test_pictures_of_quarantined_scans_stand_beside_their_reasons(project):
    text = (project / "report" / "index.html").read_text(encoding="utf-8")
    shown = re.findall(r'<figure><img src="(data:[^"]*)" alt="([^"]*)"><figcaption>([^<]*)', text)
    of_scan = {alt: (source, caption) for source, alt, caption in shown}
    source, caption = of_scan["c sub-4 T1"]
    assert caption == "c sub-4 T1: suspicious_mask: border: 20.0% of it on the faces, expected at most 5%"
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        assert image.convert("RGB").getpixel((3, 3)) == (255, 64, 64)


def test_measured_scans_have_their_distributions_and_the_gate_its_limits(page):
    assert "Voxel sizes and intensities of the 2 scans that could be read" in page.text
    assert "The quality gate on 2 brain masks made here: 1 passed, 1 stopped. Dashed: its limits." in page.text
    for words in ("Voxel size", "Median raw intensity", *(title for title, _ in GATE_TITLES.values())):
        assert words in page.text


def test_a_page_without_measurements_says_nothing_of_them(project, tmp_path):
    shutil.copytree(project / "prepared", tmp_path / "prepared")
    (tmp_path / "prepared" / "quality.tsv").unlink()
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "What was measured" not in text and "c sub-4 T1: suspicious_mask" in text


def test_every_cohort_shows_the_first_page_of_its_montages(tmp_path):
    scans = [Scan("/x_T1.nii.gz", name, "s", sequence="T1", num_slices=1) for name in ("a", "b")]
    (tmp_path / "prepared" / "montages").mkdir(parents=True)
    write_scans(tmp_path / "prepared" / "scans.tsv", scans)
    for name in ("a_001", "a_002", "a_003", "b_001"):
        imsave(tmp_path / "prepared" / "montages" / f"{name}.png", np.zeros((4, 4, 3)))
    assert main([str(tmp_path)]) == 0
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert re.findall(r"<figcaption>(\w+)\.png", text) == ["a_001", "b_001"]
    assert "The first page of each cohort; 2 more pages in prepared/montages." in text


def test_the_page_says_that_the_data_are_simulated(page):
    assert "Simulated data. The cohort calls itself “SIMULATED brains, seed 0”" in page.text


def test_what_is_not_known_about_pretraining_stands_beside_the_numbers(page):
    assert "Pretraining overlap. pretrained: unknown" in page.text


def test_text_from_files_is_escaped(project, page):
    assert "script" not in page.tags
    assert SCRIPT in page.text
    assert "<script" not in (project / "report" / "index.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_elsewhere(project, page):
    text = (project / "report" / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    for name, address in page.addresses:
        if name == "src" or address.startswith("data:"):
            assert address.startswith("data:image/png;base64,")
        elif address.startswith("#"):
            assert address[1:] in page.ids
        else:
            assert (project / "report" / unquote(address.partition("#")[0])).is_file(), address


def test_every_id_is_given_once(page):
    assert len(page.ids) == len(set(page.ids))


def test_maps_show_both_encoders_at_the_tumour_and_two_more_points(project):
    text = (project / "report" / "index.html").read_text(encoding="utf-8")
    for encoder in ("pretrained", "untrained"):
        for name in ("tumour", "darkest (CSF-like)", "brightest (white-matter-like)"):
            assert f"{encoder} encoder: similarity with the {name} patch" in text
        assert f"{encoder} encoder: principal components" in text
    assert "where the tumour is largest" in text


def test_building_again_gives_the_same_bytes(project):
    path = project / "report" / "index.html"
    before = path.read_bytes()
    assert main([str(project)]) == 0
    assert path.read_bytes() == before


def test_what_is_missing_is_said_in_one_line_each(tmp_path, capsys):
    write_cohort(tmp_path / "cohort")
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report" / "index.html")
    text = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).text
    for words in (
        "No prepared/scans.tsv here",
        "No pretrain/metrics.jsonl here",
        "No pretrained encoder with prepared scans here",
        "No nnunet/**/scores.json here",
        "No eval/*/summary.tsv here",
    ):
        assert words in text


def test_maps_are_left_out_when_the_scans_have_gone(tmp_path):
    write_run(tmp_path / "pretrain")
    (tmp_path / "prepared").mkdir()
    write_scans(tmp_path / "prepared" / "scans.tsv", [Scan(str(tmp_path / "gone.nii.gz"), "c", "s", sequence="T1")])
    assert main([str(tmp_path)]) == 0
    assert "None of the prepared scans is at its place any more" in (tmp_path / "report" / "index.html").read_text()


def test_a_damaged_file_is_named_on_the_page_and_by_the_exit_code(tmp_path, capsys):
    write_cohort(tmp_path / "cohort")
    write_run(tmp_path / "pretrain")
    path = tmp_path / "pretrain" / "metrics.jsonl"
    path.write_text("{broken\n" + path.read_text())
    assert main([str(tmp_path)]) == 1
    assert "metrics.jsonl, line 1: not a JSON object" in capsys.readouterr().err
    text = Page((tmp_path / "report" / "index.html").read_text(encoding="utf-8")).text
    assert "metrics.jsonl, line 1: not a JSON object" in text and "subjects 2" in text


def test_an_estimate_leads_to_its_cases_worst_first(project):
    index = (project / "report" / "index.html").read_text(encoding="utf-8")
    (address,) = re.findall(r'<a href="([^"]*)">0\.917 \[0\.750, 1\.000\]</a>', index)
    assert address == "cases/sequence-pretrained.html#labels-1"
    text = (project / "report" / "cases" / "sequence-pretrained.html").read_text(encoding="utf-8")
    cases = Page(text)
    assert "labels-1" in cases.ids and "script" not in cases.tags
    # The truth, T1c, was given 0.25 in the first case; the truth, T1, 0.5 in the second.
    assert re.search(rf"1 {SCAN} c/sub-1 T1c T1 0\.250 2 .* 2 other c/<script>.* T1 T1 0\.500 2 gone", cases.text)


def test_a_case_leads_to_the_row_of_its_scan_and_a_quarantined_scan_has_one(project):
    text = (project / "report" / "cases" / "sequence-pretrained.html").read_text(encoding="utf-8")
    assert f'<a href="../scans.html#scan-{SCAN}">sub-1 ses-1 T1c</a>' in text
    scans = Page((project / "report" / "scans.html").read_text(encoding="utf-8"))
    assert f"scan-{SCAN}" in scans.ids and "four_dimensional: a series & not a volume" in scans.text
    assert "x_T1.nii.gz" not in scans.text, "no case refers to it"


def test_every_link_of_every_page_leads_somewhere(project):
    pages = sorted((project / "report").rglob("*.html"))
    assert len(pages) == 4
    ids = {path: Page(path.read_text(encoding="utf-8")).ids for path in pages}
    for path in pages:
        for name, address in Page(path.read_text(encoding="utf-8")).addresses:
            if name == "href":
                file, _, fragment = unquote(address).partition("#")
                target = (path.parent / file).resolve() if file else path
                assert target.is_file(), f"{path.name}: {address}"
                assert not fragment or fragment in ids[target], f"{path.name}: {address}"


def test_dice_leads_to_the_cases_of_the_predictions(project):
    index = (project / "report" / "index.html").read_text(encoding="utf-8")
    assert '<a href="cases/segmentation-predictions-pretrained.html">0.812 ± 0.044</a>' in index
    cases = Page(
        (project / "report" / "cases" / "segmentation-predictions-pretrained.html").read_text(encoding="utf-8")
    )
    assert re.search(r"1 case_2 case_2 0\.781 n/a .* 2 case_1 case_1 0\.843 n/a", cases.text)
    assert "No outlines" in cases.text


def test_a_second_report_replaces_the_first_and_nothing_else(project, tmp_path):
    shutil.copytree(project, tmp_path / "copy")
    copy = tmp_path / "copy"

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(copy)): path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file()}

    assert main([str(copy)]) == 0
    before = content()
    for stale in ("cases/old-task.html", "figures/old.pdf"):
        (copy / "report" / stale).parent.mkdir(exist_ok=True)
        (copy / "report" / stale).write_text("of an earlier run")
    (copy / "report" / "my-notes.txt").write_text("mine")
    assert main([str(copy)]) == 0
    after = content()
    assert after.pop("report/my-notes.txt") == b"mine"
    assert after == before


def test_a_report_of_a_thousand_subjects_stays_small(tmp_path):
    folder = tmp_path / "eval" / "sequence"
    write_evaluation(folder)
    rows = [
        f"0,{seed},{ratio},,s{subject},c/{subject},T1,{'T1' if subject % 3 else 'T2'},{0.5 + subject / 4000},0.1,T1,"
        for ratio in ("0.1", "0.2", "0.4", "0.6", "0.8", "1")
        for seed in (0, 1, 2)
        for subject in range(1500)
    ]
    header = "split,seed,ratio,variant,case,subject,target,predicted,probability_T1,probability_T2,baseline,clinical"
    (folder / "pretrained" / "predictions.csv").write_text("\n".join([header, *rows]) + "\n")
    assert main([str(tmp_path)]) == 0
    size = sum(path.stat().st_size for path in (tmp_path / "report").rglob("*") if path.is_file())
    assert size < 1_500_000
    text = (tmp_path / "report" / "cases" / "sequence-pretrained.html").read_text(encoding="utf-8")
    assert "1500 cases, worst first; 500 more in predictions.csv" in text
    assert "1500 cases, worst first; 1450 more in predictions.csv" in text


def test_what_was_audited_stands_on_the_page(project, page):
    assert "sequence 5 test subjects pretrained unknown" in page.text
    assert "segmentation predictions/pretrained 2 scored subjects predictions/pretrained unknown" in page.text


def test_every_task_says_how_to_get_its_numbers_again(page):
    assert "braindino reproduce eval/sequence" in page.text


def test_an_empty_folder_is_an_error_that_names_what_was_expected(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}: nothing to report" in error and "prepared/scans.tsv" in error
    assert not (tmp_path / "report").exists()


def test_a_folder_that_does_not_exist_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def write_cohort(folder: Path) -> None:
    folder.mkdir(parents=True)
    about = {"Name": "SIMULATED brains, seed 0", "BIDSVersion": "1.10.0"}
    (folder / "dataset_description.json").write_text(json.dumps(about))
    rows = ("participant_id\tage\tsex\tsite", f"{SCRIPT}\t23.4\tF\tA", "sub-2\t70.9\tn/a\tB")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")


def write_prepared(root: Path) -> None:
    """One T1c volume with a tumour, one row without a file, one quarantined."""
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, 48),) * 3, indexing="ij")
    brain = x**2 + y**2 + z**2 < 1
    data = np.where(brain, 400 + 300 * x + 100 * np.sin(9 * y), 0)
    labels = ((x + 0.4) ** 2 + y**2 + (z - 0.2) ** 2 < 0.1).astype(np.uint8)
    affine = np.diag([3.0, 3, 3, 1])
    session = Path("sub-1") / "ses-1" / "anat"
    image = root / "cohort" / session / "sub-1_ses-1_ce-gadolinium_T1w.nii.gz"
    save_array(data, affine, image, dtype=np.int16)
    label = root / "cohort" / "derivatives" / "tumor" / session / "sub-1_ses-1_dseg.nii.gz"
    save_array(labels, affine, label, dtype=np.uint8)
    montage = root / "prepared" / "montages" / "batch.png"
    montage.parent.mkdir(parents=True)
    imsave(montage, np.zeros((4, 4, 3)))
    scans = [
        Scan(str(image), "c", "sub-1", "ses-1", "T1c", num_slices=128),
        Scan("/nowhere/x_T1.nii.gz", "c", SCRIPT, "ses-1", "T1", num_slices=128),
        Scan(
            "/nowhere/y.nii.gz", "c", "sub-3", status="quarantined", reason="four_dimensional: a series & not a volume"
        ),
        Scan(
            "/nowhere/z.nii.gz",
            "c",
            "sub-4",
            sequence="T1",
            status="quarantined",
            reason="suspicious_mask: border: 20.0% of it on the faces, expected at most 5%",
        ),
    ]
    write_scans(root / "prepared" / "scans.tsv", scans)
    measured = {"shape": "48x48x48", "obliqueness": 0.0, "p01": 100.0, "p99": 800.0, "foreground": 0.5}
    seen = {"stripped_by": "hd-bet", "components": 1, "largest_component": 1.0, "agreement": 0.9, "covered": 0.95}
    seen |= {"inside": 1.0, "holes": 0.0}
    rows = [
        ScanQuality(scan_id=scans[0].scan_id, spacing="3x3x3", median=4e2, brain_ml=1400, border=0, **measured, **seen),
        ScanQuality(
            scan_id=scans[3].scan_id, spacing="1x1x5", median=90, brain_ml=1200, border=0.2, **seen, **measured
        ),
    ]
    write_quality(root / "prepared" / "quality.tsv", rows)
    picture = root / "prepared" / "quarantine" / f"{scans[3].scan_id}.png"
    picture.parent.mkdir()
    Image.new("RGB", (900, 300), (255, 64, 64)).save(picture)


def write_run(run: Path) -> None:
    rows = [
        {"iteration": i, "loss": 8.5 - i / 8 + 0.25, "dino": 4.0, "lr": 1e-3, "crop_sizes": [64, 32]}
        for i in range(1, 13)
    ]
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 13, "lo')
    (run / "config.yaml").write_text("iterations: 12\nmodel:\n  architecture: vit_tiny\n  num_prototypes: 4096\n")
    save_encoder(vit_tiny(layer_scale_init=1e-5), run / "encoder", data_fingerprint="f00d")


def write_segmentation(folder: Path) -> None:
    folder.mkdir(parents=True)
    nan = float("nan")
    regions = {"WT": RegionSummary(0.812, 0.044, 2, 0.123), "ET": RegionSummary(nan, nan, 0, nan)}
    cases = {"case_1": {"WT": 0.843, "ET": nan}, "case_2": {"WT": 0.781, "ET": nan}}
    write_scores(SegmentationScores(cases, regions), folder)
    imsave(folder / "overlay.png", np.zeros((4, 4, 3)))


def write_evaluation(folder: Path) -> None:
    floor = ["0.250", "0.200", "0.300", "most frequent sequence", "11", "5", "1", "SIMULATED data"]
    rows = [
        ["pretrained", "1", "", "accuracy", "0.917", "0.750", "1.000", *floor],
        ["untrained-vit_tiny", "1", "", "accuracy", "0.667", "n/a", "n/a", *floor],
    ]
    folder.mkdir(parents=True)
    (folder / "summary.tsv").write_text("\n".join("\t".join(row) for row in [SUMMARY.split(), *rows]) + "\n")
    (folder / "pretrained").mkdir()
    (folder / "pretrained" / "predictions.csv").write_text(
        "split,seed,ratio,variant,case,subject,target,predicted,probability_T1,probability_T1c,baseline,clinical\n"
        + "".join(f"0,{seed},1,,{case},c/{subject},{target},T1,{p},{1 - p},T1,\n" for seed in (0, 1)
                  for case, subject, target, p in ((SCAN, "sub-1", "T1c", 0.75), ("other", SCRIPT, "T1", 0.5)))
    )  # fmt: skip
    (folder / "cases.tsv").write_text(
        f"case\tsubject\tscans\ttarget\n{SCAN}\tc/sub-1\t{SCAN}\tT1c\nother\t{SCRIPT}\tgone\tT1\n"
    )
    (folder / "run.json").write_text(json.dumps({"provenance": {"command": ["braindino", "evaluate", "sequence"]}}))
