"""The cohort on disk: same bytes, whole sessions, BIDS tables, sides, images that agree with their labels."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from braindino.simulation import simulate
from braindino.simulation.bids import SUFFIXES
from braindino.simulation.protocols import Grid
from braindino.simulation.simulate import main, render_session, simulate_cohort
from braindino.simulation.subjects import draw_subject, visit_generator
from braindino.volume import load_labels, load_volume, save_array


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle, delimiter="\t"))


def sessions_of(cohort):
    """Subject, visit, folder of images and path of labels (None without a tumour) of every session."""
    for subject in cohort.subjects:
        for visit in subject.visits:
            stem = f"{subject.name}_{visit.name}"
            images = cohort.folder / subject.name / visit.name / "anat"
            labels = (
                cohort.folder / "derivatives" / "tumor" / subject.name / visit.name / "anat" / f"{stem}_dseg.nii.gz"
            )
            yield subject, visit, images, labels if visit.tumor is not None else None


def image_path(images: Path, suffix: str) -> Path:
    return images / f"{images.parts[-3]}_{images.parts[-2]}_{suffix}.nii.gz"


# Determinism, resume, refusal


def test_the_same_seed_gives_the_same_bytes_whatever_the_jobs_and_the_size_of_the_cohort(cohort, tmp_path):
    simulate_cohort(tmp_path / "fewer", num_subjects=2, seed=cohort.seed, jobs=1, protocols=cohort.protocols)
    fewer, more = contents(tmp_path / "fewer"), contents(cohort.folder)
    files = [name for name in fewer if "sub-" in name]
    assert len(files) >= 2 * 10
    for name in files:
        assert fewer[name] == more[name], name
    other = draw_subject(cohort.seed + 1, 0, protocols=cohort.protocols, tumor_sites=np.zeros((1, 3)))
    assert not np.array_equal(other.person.displacement, cohort.subjects[0].person.displacement)


def test_a_lost_session_comes_back_alone_and_with_the_same_bytes(cohort):
    before = contents(cohort.folder)
    times = {name: (cohort.folder / name).stat().st_mtime_ns for name in before}
    subject, _, images, labels = next(entry for entry in sessions_of(cohort) if entry[3] is not None)
    lost = {str(path.relative_to(cohort.folder)) for path in (*images.iterdir(), *labels.parent.iterdir())}
    for name in lost:
        (cohort.folder / name).unlink()
    images.rmdir()
    (cohort.folder / ".unfinished" / "left-by-a-kill").mkdir(parents=True)

    simulate_cohort(cohort.folder, num_subjects=6, seed=cohort.seed, jobs=2, protocols=cohort.protocols)

    assert contents(cohort.folder) == before
    touched = {name for name in before if (cohort.folder / name).stat().st_mtime_ns != times[name]}
    assert touched == lost, subject.name


def test_a_single_lost_file_comes_back_and_its_neighbours_are_not_touched(cohort):
    images = next(entry[2] for entry in sessions_of(cohort))
    lost, kept = image_path(images, "T2w"), image_path(images, "T1w")
    lost_bytes, kept_time = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    simulate_cohort(cohort.folder, num_subjects=6, seed=cohort.seed, protocols=cohort.protocols)
    assert lost.read_bytes() == lost_bytes
    assert kept.stat().st_mtime_ns == kept_time


def test_a_session_is_there_whole_or_not_at_all(cohort, tmp_path, monkeypatch):
    written = []

    def fail_at_the_seventh(data, affine, path, *, dtype):
        written.append(path)
        if len(written) == 7:
            raise OSError("No space left on device")
        save_array(data, affine, path, dtype=dtype)

    monkeypatch.setattr(simulate, "save_array", fail_at_the_seventh)
    with pytest.raises(OSError, match="No space left"):
        simulate_cohort(tmp_path, num_subjects=2, seed=cohort.seed, jobs=1, protocols=cohort.protocols)
    monkeypatch.undo()
    finished = list(tmp_path.glob("sub-*/ses-*/anat"))
    assert len(finished) == 1
    assert len(list(finished[0].iterdir())) == 8

    simulate_cohort(tmp_path, num_subjects=2, seed=cohort.seed, jobs=1, protocols=cohort.protocols)
    assert not (tmp_path / ".unfinished").exists()
    reference = contents(cohort.folder)
    for name, content in contents(tmp_path).items():
        assert "sub-" not in name or content == reference[name], name


def test_other_parameters_are_refused(cohort):
    with pytest.raises(ValueError, match="seed = 3, not 4; choose a new folder"):
        simulate_cohort(cohort.folder, num_subjects=6, seed=4, protocols=cohort.protocols)
    with pytest.raises(ValueError, match="num_subjects = 6, not 7"):
        simulate_cohort(cohort.folder, num_subjects=7, seed=3, protocols=cohort.protocols)
    with pytest.raises(ValueError, match="protocols = "):
        simulate_cohort(cohort.folder, num_subjects=6, seed=3)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    assert main(["--out", str(tmp_path), "--subjects", "2", "--seed", "0"]) == 1
    error = capsys.readouterr().err
    assert "thesis.txt" in error and "choose a new folder" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_numbers_out_of_range_are_refused(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "new"), "--subjects", "0"]) == 1
    assert "--subjects is 0; expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    with pytest.raises(SystemExit) as usage:
        main(["--subjects", "2"])
    assert usage.value.code == 2


# Tables and words


def test_participants_have_the_promised_columns_and_tumours_their_outcome(cohort):
    rows = read_table(cohort.folder / "participants.tsv")
    columns = ["participant_id", "age", "sex", "site", "tumor", "idh", "survival_days", "event"]
    assert list(rows[0]) == columns == list(json.loads((cohort.folder / "participants.json").read_text()))
    assert [row["participant_id"] for row in rows] == [f"sub-{number:04d}" for number in range(1, 7)]
    for row in rows:
        assert 20 <= float(row["age"]) <= 85
        assert row["sex"] in "FM" and row["site"] in {protocol.site for protocol in cohort.protocols}
        if row["tumor"] == "1":
            assert row["idh"] in ("mutant", "wildtype") and int(row["survival_days"]) >= 1 and row["event"] in "01"
        else:
            assert row["tumor"] == "0" and {row["idh"], row["survival_days"], row["event"]} == {"n/a"}


def test_a_large_cohort_is_balanced():
    subjects = [
        draw_subject(7, index, protocols=simulate.PROTOCOLS, tumor_sites=np.array([[30.0, 0, 20]]))
        for index in range(40)
    ]
    ill = [subject for subject in subjects if subject.idh]
    assert len(ill) == 24 and sum(subject.idh == "mutant" for subject in ill) == 12
    assert sum(subject.sex == "F" for subject in subjects) == 20
    assert {sum(subject.protocol == protocol for subject in subjects) for protocol in simulate.PROTOCOLS} == {10}
    ages = np.sort([subject.age for subject in subjects])
    assert np.diff([20, *ages, 85]).max() < 6
    assert 0.4 < np.mean([subject.event for subject in ill]) < 1.0
    assert 6 <= sum(len(subject.visits) == 2 for subject in subjects) <= 16


def test_risk_of_death_rises_with_age_and_necrosis():
    rng = np.random.default_rng(0)

    def median_days(age: float, necrosis_share: float) -> float:
        from braindino.simulation.subjects import _draw_survival

        return float(np.median([_draw_survival(rng, age=age, necrosis_share=necrosis_share)[0] for _ in range(400)]))

    assert median_days(30, 0.2) > 1.2 * median_days(75, 0.2)
    assert median_days(50, 0.05) > 1.2 * median_days(50, 0.55)


def test_a_second_visit_is_a_year_or_two_later_with_a_larger_tumour(cohort):
    returning = [subject for subject in cohort.subjects if len(subject.visits) == 2]
    assert returning
    for subject in cohort.subjects:
        rows = read_table(cohort.folder / subject.name / f"{subject.name}_sessions.tsv")
        assert [row["session_id"] for row in rows] == [visit.name for visit in subject.visits]
        assert float(rows[0]["age"]) == subject.age
        if len(rows) == 2:
            assert 0.9 <= float(rows[1]["age"]) - subject.age <= 2.1
    volumes = [
        [
            (load_labels(labels)[0] > 0).sum()
            for subject, _, _, labels in sessions_of(cohort)
            if subject is patient and labels is not None
        ]
        for patient in returning
        if patient.idh
    ]
    assert volumes and all(later > earlier for earlier, later in volumes), volumes


def test_it_says_everywhere_that_it_is_simulated(cohort):
    for description in ("dataset_description.json", "derivatives/tumor/dataset_description.json"):
        found = json.loads((cohort.folder / description).read_text())
        assert "SIMULATED" in found["Name"] and found["BIDSVersion"] and found["GeneratedBy"][0]["Name"]
    assert (cohort.folder / "README").read_text().startswith("SIMULATED")
    images = sorted(cohort.folder.rglob("*.nii.gz"))
    assert len(images) >= 6 * 4
    for path in images:
        sidecar = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())
        assert sidecar["Simulated"] is True
        assert "derivatives" in path.parts or sidecar["SkullStripped"] is True


# Geometry and sides


def test_files_have_the_grid_of_their_site_and_labels_the_grid_of_their_images(cohort):
    for subject, _, images, labels in sessions_of(cohort):
        paths = [image_path(images, suffix) for suffix in SUFFIXES.values()]
        loaded = [nib.load(path) for path in (*paths, *([labels] if labels else []))]
        for image in loaded:
            assert "".join(nib.aff2axcodes(image.affine)) == subject.protocol.orientation
            np.testing.assert_allclose(image.header.get_zooms(), subject.protocol.spacing, rtol=1e-6)
            np.testing.assert_array_equal(image.affine, loaded[0].affine)
            assert image.shape == loaded[0].shape
            assert image.header.get_xyzt_units()[0] == "mm"
        assert {image.get_data_dtype() for image in loaded[:4]} == {np.dtype(np.int16)}
        if labels:
            values = np.asarray(loaded[4].dataobj)
            assert loaded[4].get_data_dtype() == np.uint8
            assert set(np.unique(values)) <= {0, 1, 2, 3} and (values == 2).any()


def test_all_images_of_a_session_have_the_same_brain_with_air_around_it(cohort):
    for _, _, images, labels in sessions_of(cohort):
        brains = [np.asarray(nib.load(image_path(images, suffix)).dataobj) > 0 for suffix in SUFFIXES.values()]
        for brain in brains[1:]:
            np.testing.assert_array_equal(brain, brains[0])
        for axis in range(3):
            assert not np.take(brains[0], [0, -1], axis).any()
        if labels:
            assert brains[0][np.asarray(nib.load(labels).dataobj) > 0].all()


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "LAS", "PIR"])
def test_a_tumour_on_the_right_in_front_is_there_in_every_storage_orientation(orientation, template, coarse, tmp_path):
    subject = draw_subject(0, 3, protocols=coarse, tumor_sites=np.array([[36.0, 30.0, 14.0]]))
    assert subject.visits[0].tumor is not None
    protocol = replace(coarse[0], orientation=orientation, spacing=(3.0, 3.0, 3.0), thickness=3.0)
    subject = replace(subject, protocol=protocol)
    images, labels, grid = render_session(subject, subject.visits[0], visit_generator(0, 3, 1), template)
    assert grid == Grid(protocol)
    for name, array, dtype in (("labels", labels, np.uint8), ("flair", images["FLAIR"], np.int16)):
        save_array(grid.to_storage(array), grid.affine, tmp_path / f"{name}.nii.gz", dtype=dtype)

    stored = nib.load(tmp_path / "labels.nii.gz")
    centre = nib.affines.apply_affine(stored.affine, np.argwhere(np.asarray(stored.dataobj) > 0).mean(axis=0))
    np.testing.assert_allclose(centre, (36, 30, 14), atol=14)
    # And in the reader's frame, from the image itself: FLAIR is brightest where the tumour is.
    flair = load_volume(tmp_path / "flair.nii.gz")
    bright = np.argwhere(flair.data > np.percentile(flair.data[flair.data > 0], 99.5)).mean(axis=0)
    middle = np.argwhere(flair.data > 0).mean(axis=0)
    assert bright[0] - middle[0] > 5 and bright[1] - middle[1] > 5


# Looks


def white_matter_level(t1: np.ndarray) -> float:
    return float(np.percentile(t1[t1 > 0], 85))


def test_the_rim_of_a_tumour_enhances_on_t1c_only_and_oedema_is_bright_on_flair(cohort):
    checked = 0
    for _, _, images, labels_path in sessions_of(cohort):
        if labels_path is None:
            continue
        labels = np.asarray(nib.load(labels_path).dataobj)
        t1, t1c, t2, flair = (
            np.asarray(nib.load(image_path(images, suffix)).dataobj, dtype=float) for suffix in SUFFIXES.values()
        )
        if (labels == 3).sum() < 20:
            continue
        checked += 1
        enhancing, oedema, healthy = labels == 3, labels == 2, (labels == 0) & (t1 > 0)
        assert np.median(t1c[enhancing]) > 1.1 * white_matter_level(t1c)
        assert np.median(t1[enhancing]) < 0.85 * white_matter_level(t1)
        assert np.median(flair[oedema]) > 1.2 * np.median(flair[healthy])
        assert np.median(t2[oedema]) > 1.2 * np.median(t2[healthy])
        assert np.median(t1[oedema]) < 0.9 * white_matter_level(t1)
    assert checked >= 2


def test_t1c_differs_from_t1_in_a_healthy_brain_by_its_vessels(cohort):
    images = next(entry[2] for entry in sessions_of(cohort) if entry[3] is None)
    t1, t1c = (
        np.asarray(nib.load(image_path(images, suffix)).dataobj, dtype=float) for suffix in ("T1w", "ce-gadolinium_T1w")
    )
    share_of_bright = [(image > 1.25 * white_matter_level(image)).sum() / (image > 0).sum() for image in (t1, t1c)]
    assert share_of_bright[1] > 0.001 > 5 * share_of_bright[0], share_of_bright


def test_ventricles_are_dark_on_t1_and_flair_and_bright_on_t2(cohort):
    for _, _, images, labels in sessions_of(cohort):
        if labels is not None:
            continue
        t1, _, t2, flair = (load_volume(image_path(images, suffix)).data for suffix in SUFFIXES.values())
        # The darkest of the brain in the middle of the head on T1 is CSF of ventricles and cisterns.
        middle = tuple(slice(int(0.4 * size), int(0.6 * size)) for size in t1.shape)
        in_brain = t1[middle] > 0
        t1_middle, t2_middle, flair_middle = t1[middle][in_brain], t2[middle][in_brain], flair[middle][in_brain]
        csf = t1_middle <= np.percentile(t1_middle, 3)
        assert np.median(t2_middle[csf]) > 1.4 * np.median(t2_middle)
        assert np.median(flair_middle[csf]) < 0.75 * np.median(flair_middle)
