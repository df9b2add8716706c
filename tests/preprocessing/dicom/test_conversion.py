"""Series to NIfTI with the real dcm2niix: every voxel where it was, and a reason for every series that cannot be."""

import errno
import gzip
import pickle
import shutil
from collections import namedtuple

import dcm2niix
import numpy as np
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from braindino.preprocessing import conversion as module
from braindino.preprocessing.conversion import Conversion, conversion_version, convert, converted_name, source_files
from braindino.preprocessing.dicom_series import find_series
from braindino.preprocessing.discovery import walk_sources
from braindino.preprocessing.sequence_rules import classify
from braindino.volume import VolumeError, load_volume, save_array

DICOM = Conversion(kind="dicom")


def path_in(tmp_path):
    return tmp_path / "out" / "converted" / converted_name("dicom", "c/1.2.3")


def run(source, tmp_path, conversion=DICOM):
    notes = convert(conversion, source, path_in(tmp_path))
    return load_volume(path_in(tmp_path)), notes


def refused(source, tmp_path, conversion=DICOM):
    with pytest.raises(VolumeError) as caught:
        convert(conversion, source, path_in(tmp_path))
    assert not path_in(tmp_path).parent.exists(), "nothing is written of a series that is refused"
    return caught.value


def assert_in_place(volume, voxels, world, plane):
    """Every voxel of the phantom lies at its millimetres."""
    assert sorted(volume.shape) == sorted(voxels.shape)
    to_index = np.linalg.inv(volume.affine)
    indices = list(np.ndindex(voxels.shape))
    places = np.array([to_index[:3] @ [*world(plane, *index), 1] for index in indices])
    nearest = np.rint(places).astype(int)
    assert np.abs(places - nearest).max() < 2e-3
    np.testing.assert_array_equal(volume.data[tuple(nearest.T)], [voxels[index] for index in indices])


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("plane", ["axial", "coronal", "sagittal"])
def test_every_voxel_lands_where_the_dicom_standard_puts_it(tmp_path, series, voxels, world, plane, order):  # noqa: PLR0917
    series(tmp_path / "s", plane=plane, order=order)
    volume, notes = run(tmp_path / "s", tmp_path)
    assert notes == ()
    assert_in_place(volume, voxels, world, plane)


def test_the_left_of_the_patient_stays_on_the_left(tmp_path, series, voxels):
    marked = voxels // 8
    marked[:, 20:, :] = 20000  # columns run to the patient's left
    series(tmp_path / "s", voxels=marked)
    volume, _ = run(tmp_path / "s", tmp_path)
    assert volume.data[:8].min() == 20000 > volume.data[8:].max()  # RAS+: the first indices are leftmost
    assert volume.affine[0, 0] > 0


def test_what_the_converted_file_shows_itself_is_not_noted_twice(tmp_path, series):
    tilted = [1, 0, 0, 0, float(np.cos(0.2)), float(np.sin(0.2))]
    normal = 4 * np.cross(tilted[:3], tilted[3:])
    series(tmp_path / "s", ImageOrientationPatient=tilted, ImagePositionPatient=lambda index: (index * normal).tolist())
    volume, notes = run(tmp_path / "s", tmp_path)
    assert notes == () and volume.notes == ("oblique=11.5deg",)


def test_files_in_any_order_and_under_any_name_make_the_same_volume(tmp_path, series, voxels, world):
    names = ["; touch x", "-o", "$(id)", "a b", "é", "'", "Z", "10", "9", "IM0001", "ima.IMA", "x.dcm"]
    shuffled = np.random.default_rng(0).permutation(12)
    series(tmp_path / "s", first=0, name="{number}")
    for number, name in zip(shuffled, names, strict=True):
        (tmp_path / "s" / str(number)).rename(tmp_path / "s" / f"_{name}")
    volume, _ = run(tmp_path / "s", tmp_path)
    assert_in_place(volume, voxels, world, "axial")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "s"]


def test_one_series_of_a_shared_folder_is_converted_by_its_files(tmp_path, series, voxels, world):
    uid = series(tmp_path / "s")
    series(tmp_path / "s", voxels=voxels[::-1], first=20)
    files = tuple(f"1-{number:03d}.dcm" for number in range(1, 13))
    conversion = Conversion(kind="dicom", files=files, parameters=(("series_uid", uid),))
    volume, _ = run(tmp_path / "s" / files[0], tmp_path, conversion)
    assert_in_place(volume, voxels, world, "axial")


def test_a_folder_that_turns_out_to_hold_two_series_is_refused(tmp_path, series):
    uid = series(tmp_path / "s")
    other = series(tmp_path / "s", first=20)
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "mixed_series" and uid in error.message and f"{other} (12 files)" in error.message
    shutil.rmtree(tmp_path / "s")
    series(tmp_path / "s")
    assert refused(tmp_path / "s", tmp_path, Conversion(kind="dicom", parameters=(("series_uid", uid),))).code == (
        "mixed_series"
    )


def test_a_truncated_image_is_named(tmp_path, series):
    series(tmp_path / "s")
    image = tmp_path / "s" / "1-004.dcm"
    size = image.stat().st_size
    image.write_bytes(image.read_bytes()[:-800])
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "unreadable_dicom"
    assert f"1-004.dcm is cut short: {size - 800} bytes; its header and pixels need {size - 12}" in error.message


@pytest.mark.parametrize("keep", [0, 60, 400])
def test_an_image_without_a_readable_header_is_named_and_not_dropped(tmp_path, series, keep):
    series(tmp_path / "s")
    image = tmp_path / "s" / "1-012.dcm"
    image.write_bytes(image.read_bytes()[:keep])
    error = refused(tmp_path / "s", tmp_path)
    assert error.code in ("unreadable_dicom", "mixed_series", "no_image") and (keep == 400 or "1-012" in error.message)


def test_a_missing_slice_is_noticed_by_its_gap(tmp_path, series):
    series(tmp_path / "s", skip=[5])
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "missing_slices"
    assert "11 slices 4.00 mm apart and a gap of 8.00 mm: about 1 missing" in error.message
    series(tmp_path / "t", skip=[2, 6, 7])
    assert "about 3 missing" in refused(tmp_path / "t", tmp_path).message


def test_a_missing_end_is_noticed_where_the_images_were_counted(tmp_path, series):
    series(tmp_path / "s", skip=[0, 11])
    counted = Conversion(kind="dicom", parameters=(("num_images", 12),))
    assert "10 images; expected the 12 that metadata.csv counts" in refused(tmp_path / "s", tmp_path, counted).message
    volume, _ = run(tmp_path / "s", tmp_path)
    assert volume.shape == (28, 24, 10)


def test_uneven_distances_are_refused_and_rounded_ones_are_not(tmp_path, series, voxels, world):
    def place(shifts):
        return lambda index: [-20.0, -30.0, -10.0 + 4 * index + shifts[index % 3]]

    series(tmp_path / "uneven", ImagePositionPatient=place([0, 1.2, 0]))
    error = refused(tmp_path / "uneven", tmp_path)
    assert error.code == "irregular_spacing" and "2.80 to 5.20 mm apart" in error.message
    series(tmp_path / "rounded", ImagePositionPatient=place([0, 0.004, -0.004]))
    volume, _ = run(tmp_path / "rounded", tmp_path)
    assert volume.shape == (28, 24, 12) and volume.spacing == pytest.approx((2, 3, 4), abs=5e-3)


def write_directions(series, folder, voxels):
    uid = ""
    for number, plane in enumerate(("axial", "coronal", "sagittal")):
        uid = series(folder, plane=plane, voxels=voxels, uid=uid, first=1 + 40 * number)


def test_a_localiser_of_three_directions_is_too_few_slices(tmp_path, series, voxels):
    write_directions(series, tmp_path / "s", voxels[:, :, :3])
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "too_few_slices" and "expected at least 8 slices" in error.message


def test_several_whole_directions_are_ambiguous_and_named(tmp_path, series, voxels):
    write_directions(series, tmp_path / "s", voxels)
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "ambiguous_series" and error.message.count("24") >= 3 and "3 volumes" in error.message


def test_scouts_beside_the_volume_are_left_with_a_note(tmp_path, series, voxels, world):
    uid = series(tmp_path / "s")
    series(tmp_path / "s", plane="sagittal", voxels=voxels[:, :, :3], uid=uid, first=50)
    volume, notes = run(tmp_path / "s", tmp_path)
    assert_in_place(volume, voxels, world, "axial")
    assert len(notes) == 1 and notes[0].startswith("left_out=s") and notes[0].endswith("(too_few_slices)")


def test_several_echoes_are_ambiguous(tmp_path, series, voxels):
    uid = series(tmp_path / "s", EchoTime=20, EchoNumbers=1)
    series(tmp_path / "s", voxels=voxels[::-1], uid=uid, first=13, EchoTime=90, EchoNumbers=2)
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "ambiguous_series"
    assert "s_e1 28x24x12, s_e2 28x24x12" in error.message


def test_a_series_over_time_is_four_dimensional(tmp_path, series, voxels):
    uid = series(tmp_path / "s")
    series(tmp_path / "s", voxels=voxels[::-1], uid=uid, first=13, AcquisitionNumber=2)
    assert refused(tmp_path / "s", tmp_path).code == "four_dimensional"


def test_an_image_that_lies_there_twice_counts_once(tmp_path, series, voxels, world):
    series(tmp_path / "s")
    shutil.copy(tmp_path / "s" / "1-003.dcm", tmp_path / "s" / "2-003.dcm")
    volume, notes = run(tmp_path / "s", tmp_path)
    assert notes == ("repeated_images=1",)
    assert_in_place(volume, voxels, world, "axial")


def test_intensities_survive_beyond_what_16_bits_with_sign_hold(tmp_path, series, voxels):
    bright = voxels.astype(np.uint16) * 8
    assert bright.max() > 60000
    series(tmp_path / "s", voxels=bright)
    volume, _ = run(tmp_path / "s", tmp_path)
    assert sorted(volume.data.ravel().tolist()) == sorted(bright.ravel().tolist())


def test_no_text_of_the_source_gets_into_the_file(tmp_path, series):
    series(tmp_path / "s", ImageComments="Doe Jane", SeriesDescription="Doe")
    run(tmp_path / "s", tmp_path)
    raw = gzip.decompress(path_in(tmp_path).read_bytes())
    assert b"Doe" not in raw and b"1015" not in raw[:352] and raw[148:252] == bytes(104)


def test_the_same_series_gives_the_same_bytes(tmp_path, series):
    series(tmp_path / "s")
    run(tmp_path / "s", tmp_path)
    first = path_in(tmp_path).read_bytes()
    run(tmp_path / "s", tmp_path)
    assert path_in(tmp_path).read_bytes() == first


def test_settings_of_the_user_change_nothing(tmp_path, series, voxels, world, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".dcm2nii.ini").write_text("isGZ=1\nisFlipY=0\nisCreateBIDS=1\nfilename=%n\n")
    series(tmp_path / "s")
    assert_in_place(run(tmp_path / "s", tmp_path)[0], voxels, world, "axial")


def test_by_products_of_dcm2niix_are_left_by_their_names(tmp_path):
    shown = np.random.default_rng(0).integers(0, 99, (9, 10, 11)).astype(np.int16)
    for name in ("s", "s_Eq_1", "s_Tilt_1", "s_ROI1", "s_ph", "s_Crop_1", "s_e2_ph", "s_real"):
        save_array(shown, np.eye(4), tmp_path / f"{name}.nii", dtype=np.int16)
    save_array(np.stack([shown, shown], -1), np.eye(4), tmp_path / "sa.nii", dtype=np.int16)
    image = module._only_volume(sorted(tmp_path.glob("*.nii")), tmp_path, ())
    np.testing.assert_array_equal(image.data, shown)
    assert image.notes == (
        "left_out=s_Crop_1 (cropped),s_Eq_1 (equalised),s_ROI1 (overlay),s_Tilt_1 (tilt-corrected),s_e2_ph (phase),"
        "s_ph (phase),s_real (phase),sa (four_dimensional)",
    )
    (tmp_path / "s.nii").unlink()
    with pytest.raises(VolumeError, match="is a series") as caught:
        module._only_volume(sorted(tmp_path.glob("*.nii")), tmp_path, ())
    assert caught.value.code == "four_dimensional"


def stand_in(tmp_path, monkeypatch, script):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(dcm2niix, "bin", str(program))


def test_what_dcm2niix_says_last_is_told(tmp_path, series, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo 'Chris Rorden version'; echo 'Error: no luck'; echo 'Found 12 DICOM'; exit 4")
    series(tmp_path / "s")
    error = refused(tmp_path / "s", tmp_path)
    assert error.code == "unreadable_dicom" and "ended with code 4: Error: no luck" in error.message


def test_a_hanging_dcm2niix_is_stopped(tmp_path, series, monkeypatch):
    stand_in(tmp_path, monkeypatch, "exec sleep 100")
    monkeypatch.setattr(module, "DCM2NIIX_SECONDS", 0.2)
    series(tmp_path / "s")
    assert "not done after 0.2 s" in refused(tmp_path / "s", tmp_path).message


def test_a_full_disk_is_no_fault_of_the_scan(tmp_path, series, monkeypatch):
    stand_in(tmp_path, monkeypatch, "exit 1")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(10, 10, 0))
    series(tmp_path / "s")
    with pytest.raises(OSError, match="No space left") as caught:
        convert(DICOM, tmp_path / "s", path_in(tmp_path))
    assert caught.value.errno == errno.ENOSPC


def test_an_empty_or_missing_folder_is_unreadable(tmp_path):
    (tmp_path / "s").mkdir()
    assert "holds no DICOM file" in refused(tmp_path / "s", tmp_path).message
    assert refused(tmp_path / "gone", tmp_path).code == "unreadable_dicom"


def test_names_are_digits_whatever_the_identity_says():
    name = converted_name("dicom", "../../etc/passwd")
    assert name == converted_name("dicom", "../../etc/passwd") != converted_name("fastmri", "../../etc/passwd")
    assert len(name) == 16 + len(".nii.gz") and set(name.removesuffix(".nii.gz")) <= set("0123456789abcdef")


def test_a_conversion_travels_between_processes_and_stays_in_its_folder(tmp_path):
    conversion = Conversion(kind="dicom", files=("a.dcm",), parameters=(("series_uid", "1.2"),))
    assert pickle.loads(pickle.dumps(conversion)) == conversion
    with pytest.raises(ValueError, match="expected names without folders"):
        Conversion(kind="dicom", files=("../a.dcm",))
    with pytest.raises(ValueError, match="expected one of"):
        Conversion(kind="nrrd")
    with pytest.raises(ValueError, match="expected a name of 16 hexadecimal digits"):
        convert(DICOM, tmp_path, tmp_path / "P1.nii.gz")


def test_an_outcome_depends_on_all_files_of_its_input(tmp_path, series):
    series(tmp_path / "s", skip=range(2, 12))
    (tmp_path / "s/notes.txt").write_text("no image")
    both = [tmp_path / "s/1-001.dcm", tmp_path / "s/1-002.dcm"]
    assert source_files(DICOM, tmp_path / "s") == both
    named = Conversion(kind="dicom", files=("1-001.dcm", "1-002.dcm"))
    assert source_files(named, tmp_path / "s") == source_files(named, both[0]) == both
    assert source_files(Conversion(kind="analyze"), tmp_path / "A.IMG") == [tmp_path / "A.HDR", tmp_path / "A.IMG"]
    assert source_files(Conversion(kind="fastmri"), tmp_path / "a.h5") == [tmp_path / "a.h5"]


def test_the_version_names_the_program():
    assert conversion_version().startswith(f"{module.CONVERSION_VERSION}, dcm2niix 1.")


def write_enhanced(path, voxels, *, skip=()):
    """One multi-frame file in place of a series (Enhanced MR Image Storage)."""
    kept = [index for index in range(voxels.shape[2]) if index not in skip]
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = image.SOPClassUID = EnhancedMRImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = image.SOPInstanceUID = generate_uid()
    image.SeriesInstanceUID, image.StudyInstanceUID = "1.2.3", "1.2"
    image.PatientID, image.Modality, image.Manufacturer, image.SeriesDescription = "P1", "MR", "Philips", "AX"
    image.ScanningSequence, image.NumberOfFrames, image.InstanceNumber, image.SeriesNumber = "SE", len(kept), 1, 1
    image.ImageType, image.PatientPosition = ["ORIGINAL", "PRIMARY", "T2", "NONE"], "HFS"
    image.Rows, image.Columns, image.SamplesPerPixel = *voxels.shape[:2], 1
    image.BitsAllocated = image.BitsStored = 16
    image.HighBit, image.PixelRepresentation, image.PhotometricInterpretation = 15, 0, "MONOCHROME2"

    def group(**values):
        item = Dataset()
        for keyword, value in values.items():
            setattr(item, keyword, value)
        return [item]

    image.SharedFunctionalGroupsSequence = group(
        MRTimingAndRelatedParametersSequence=group(RepetitionTime=4000, FlipAngle=90),
        MREchoSequence=group(EffectiveEchoTime=100),
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=[3, 2], SliceThickness=4, SpacingBetweenSlices=4),
    )
    image.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(ImagePositionPatient=[-20, -30, -10 + 4 * index]),
            FrameContentSequence=group(InStackPositionNumber=number, StackID="1", DimensionIndexValues=[1, number]),
        )[0]
        for number, index in enumerate(kept, start=1)
    ]
    image.PixelData = np.ascontiguousarray(voxels[:, :, kept].transpose(2, 0, 1)).astype("<u2").tobytes()
    path.parent.mkdir(parents=True)
    image.save_as(path, enforce_file_format=True)


def test_a_multi_frame_file_is_a_series(tmp_path, voxels, world):
    write_enhanced(tmp_path / "s/1-1.dcm", voxels)
    volume, notes = run(tmp_path / "s", tmp_path)
    assert notes == ()
    assert_in_place(volume, voxels, world, "axial")
    ((series, _),) = find_series(walk_sources([str(tmp_path / "s")], exclude_dir=tmp_path / "out"))
    assert series.num_images == 12
    assert classify(series).sequence == "T2", "by its times, which stand in the shared groups"


def test_a_gap_between_frames_is_noticed(tmp_path, voxels):
    write_enhanced(tmp_path / "s/1-1.dcm", voxels, skip=[4])
    assert "about 1 missing" in refused(tmp_path / "s", tmp_path).message
