"""The kNN probe against a hand loop and planted features; alarms on real collapse and on none."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from braindino.label_table import Label
from braindino.leakage import read_exposure
from braindino.manifest import Scan
from braindino.metrics_log import read_metrics
from braindino.pretrain.alarms import PATIENCE, CollapseAlarms
from braindino.pretrain.probes import KnnProbe, NothingToAskError, read_probe_labels
from braindino.pretrain.train import main
from braindino.slice_store import SliceStore, SliceStoreWriter
from braindino.vision_transformer import Tokens

SEQUENCES = ("T1", "T2")


def make_store(folder: Path, *, constant: bool = False, sequences: tuple[str, ...] = SEQUENCES) -> Path:
    """Eight subjects, a scan of each sequence with 4 slices; T2 is bright where T1 is dark."""
    writer, rng = SliceStoreWriter(folder), np.random.default_rng(0)
    rows, columns = np.mgrid[:256, :256]
    for number in range(8):
        disc = (rows - 128) ** 2 + (columns - 100 - 8 * number) ** 2 < (50 + 3 * number) ** 2
        for sequence in sequences:
            slices = np.stack([np.where(disc, 2.0 if sequence == "T1" else -2.0, 0.0)] * 4)
            slices = slices + 0.1 * rng.standard_normal(slices.shape)
            scan = Scan(path=f"/data/{number}_{sequence}.nii.gz", cohort="c", subject=f"s{number}", sequence=sequence)
            writer.add(scan, np.ones_like(slices) if constant else slices, [100, 120, 140, 160])
    writer.publish()
    return folder


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("probes") / "store")


class Planted(torch.nn.Module):
    """CLS features, and patch tokens, that are a function of the image."""

    def __init__(self, function, of_patches=None) -> None:
        super().__init__()
        self.function, self.of_patches = function, of_patches or function

    def forward(self, x: torch.Tensor) -> Tokens:
        patches = self.of_patches(x)
        # Two tokens that differ, with this mean.
        return Tokens(self.function(x), torch.empty(0), torch.stack([patches + 1, patches - 1], dim=1))


def probe_of(store: Path, **options) -> KnnProbe:
    opened = SliceStore(store)
    return KnnProbe(opened, np.arange(len(opened)), **{"num_scans": 16, "k": 3, "seed": 0, **options})


def test_features_that_tell_the_sequence_are_always_right_and_noise_is_at_chance(store) -> None:
    probe = probe_of(store)
    cpu = torch.device("cpu")
    planted = probe.measure(Planted(lambda x: x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([[1.0, 0.5]])), cpu)
    assert planted["probe_knn_sequence"] == 1.0 and planted["probe_knn_sequence_floor"] == 0.5
    assert planted["probe_knn_sequence_intensity"] == 1.0
    generator = torch.Generator().manual_seed(0)
    noise = probe.measure(Planted(lambda x: torch.randn(len(x), 8, generator=generator)), cpu)
    assert 0.0 < noise["probe_knn_sequence"] < 1.0 and noise["probe_neighbour_distance"] > 0
    assert planted["probe_knn_sequence_patches"] == 1.0


def test_the_mean_of_the_patch_tokens_is_asked_beside_the_cls_token(store) -> None:
    generator = torch.Generator().manual_seed(0)
    row = probe_of(store).measure(
        Planted(
            lambda x: torch.randn(len(x), 8, generator=generator),
            lambda x: x.mean(dim=(1, 2, 3))[:, None] * torch.tensor([[1.0, 0.5]]),
        ),
        torch.device("cpu"),
    )
    assert row["probe_knn_sequence"] < row["probe_knn_sequence_patches"] == 1.0


def test_memory_and_questions_share_no_subject_and_slices_are_of_the_middle_half(store) -> None:
    opened = SliceStore(store)
    probe = probe_of(store, num_scans=6)
    slices = {opened.read_float16(i).tobytes(): i for i in range(len(opened))}
    chosen = [slices[part.numpy().tobytes()] for part in probe._slices[:, 0]]
    assert chosen == probe.indices and {opened.position_of(i) for i in chosen} == {120, 140}
    assert len(probe.scans) == 6 == len({opened.scan_of(i).path for i in chosen})
    sides = [{scan.subject for scan, a in zip(probe.scans, probe.is_asked, strict=True) if a == side}
             for side in (True, False)]  # fmt: skip
    assert sides[0].isdisjoint(sides[1]) and all(sides)


def test_a_scan_is_the_centred_mean_of_its_slices(store) -> None:
    probe = probe_of(store, num_scans=4)
    features = torch.randn(len(probe.indices), 3, generator=torch.Generator().manual_seed(0))
    opened = SliceStore(store)
    paths = [opened.scan_of(index).path for index in probe.indices]
    means = torch.stack(
        [features[[i for i, path in enumerate(paths) if path == scan.path]].mean(dim=0) for scan in probe.scans]
    )
    torch.testing.assert_close(probe._by_scan(features), means - means.mean(dim=0))


def test_accuracy_equals_a_hand_loop_with_ties_to_the_larger_summed_similarity(store) -> None:
    probe = probe_of(store, k=4, num_scans=16)
    features = torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    right = 0
    asked, memory = (probe.is_asked == side for side in (True, False))
    for query, label in zip(features[asked], probe.questions[0].answers[asked].tolist(), strict=True):
        cosines = [float(torch.cosine_similarity(query, other, dim=0)) for other in features[memory]]
        nearest = sorted(range(len(cosines)), key=lambda i: -cosines[i])[:4]
        labels = [int(probe.questions[0].answers[memory][i]) for i in nearest]
        pairs = [(own, cosines[i]) for i, own in zip(nearest, labels, strict=True)]
        scores = {(labels.count(each), sum(cosine for own, cosine in pairs if own == each), each) for each in labels}
        right += max(scores)[2] == label
    assert probe._answer(probe.questions[0], features)[0] == pytest.approx(right / int(asked.sum()))


def test_a_store_of_one_sequence_cannot_be_probed(tmp_path) -> None:
    opened = SliceStore(make_store(tmp_path / "store", sequences=("T1",)))
    with pytest.raises(NothingToAskError, match="sequence: all known slices have one and the same answer"):
        KnnProbe(opened, np.arange(len(opened)), num_scans=4, k=3, seed=0)


def labels_in(folder: Path, table: str) -> Path:
    path = folder / "labels.csv"
    path.write_text(table)
    return path


def test_labels_of_a_table_are_asked_as_classes_or_numbers(store, tmp_path) -> None:
    opened = SliceStore(store)
    rows = [f"s{n},{'f' if n % 2 else 'm'},{20.5 + n}" for n in range(8)]
    table = labels_in(tmp_path, "\n".join(["subject,sex,age", *rows]))
    labels = read_probe_labels([f"sex={table}", f"age={table}"], opened.scans)
    probe = KnnProbe(opened, np.arange(len(opened)), num_scans=16, k=2, seed=0, labels=labels)
    # Eight ages are few enough to be codes of classes; as numbers they are asked below.
    assert [question.name for question in probe.questions] == ["knn_sequence", "knn_sex", "knn_age"]
    number = torch.tensor([int(scan.subject[1:]) for scan in probe.scans])
    by_sex = torch.nn.functional.one_hot(number % 2, 2).float()
    sex, age = probe.questions[1:]
    assert probe._answer(sex, by_sex)[0] == 1.0
    assert probe._answer(age, by_sex)[0] == 0.0  # no asked subject has the age of one in the memory


def test_numbers_are_answered_by_the_mean_of_the_neighbours(store) -> None:
    opened = SliceStore(store)
    ages = {
        scan.scan_id: Label(str(30 + int(scan.subject[1:]) + 0.25 * (scan.sequence == "T2")), "here")
        for scan in opened.scans
    }
    probe = KnnProbe(opened, np.arange(len(opened)), num_scans=16, k=1000, seed=0, labels={"age": ages})
    (question,) = [question for question in probe.questions if question.name == "mae_age"]
    values = np.array([float(ages[scan.scan_id].text) for scan in probe.scans])
    asked = probe.is_asked.numpy()
    expected = np.abs(values[asked] - values[~asked].mean()).mean()
    features = torch.randn(len(values), 3, generator=torch.Generator().manual_seed(0))
    assert probe._answer(question, features)[0] == pytest.approx(expected, rel=1e-5)
    median = np.sort(values[~asked])[(np.count_nonzero(~asked) - 1) // 2]
    assert question.floor == pytest.approx(np.abs(values[asked] - median).mean(), rel=1e-5)


def test_subjects_named_are_asked_and_kept_out_of_training(store, tmp_path) -> None:
    path = tmp_path / "asked.txt"
    path.write_text("c/s1\nc/s6\n")
    opened = SliceStore(store)
    others = np.array([i for i in range(len(opened)) if opened.scan_of(i).subject not in ("s1", "s6")])
    probe = KnnProbe(opened, others, num_scans=16, k=3, seed=0, asked={"c/s1", "c/s6"})
    assert {scan.subject for scan, asked in zip(probe.scans, probe.is_asked, strict=True) if asked} == {"s1", "s6"}
    assert len({scan.subject for scan, asked in zip(probe.scans, probe.is_asked, strict=True) if not asked}) == 6
    rows = run(store, tmp_path / "run", "--iterations", "2", "--probe-every", "2", "--probe-subjects", str(path))
    assert "probe_knn_sequence" in rows[-1]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["excluded_subjects"]["subjects"] == ["c/s1", "c/s6"] and record["num_slices"] == 48
    assert {scan.subject for scan in read_exposure(tmp_path / "run").scans} == {"s0", "s2", "s3", "s4", "s5", "s7"}


def test_a_question_that_cannot_be_asked_leaves_the_others(store, tmp_path) -> None:
    opened = SliceStore(store)
    table = labels_in(tmp_path, "subject,site\ns0,a\ns1,b\n")
    labels = read_probe_labels([f"site={table}"], opened.scans)
    probe = KnnProbe(opened, np.arange(len(opened)), num_scans=4, k=3, seed=0, labels=labels)
    assert probe.unasked == ["site: it is known of 2 subjects, and 4 are needed"]
    assert [question.name for question in probe.questions] == ["knn_sequence"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("labels.csv", r"expected column=table, such as sex=participants\.tsv"),
        ("sequence={table}", "not 'sequence', which is asked anyhow"),
        ("sex={table}", "has a 'sex' for none of the scans; its subjects must be those of the store, such as 's0'"),
        ("age={table}", "no label table has a column 'age'"),
    ],
)
def test_label_settings_that_lead_nowhere_are_refused(store, tmp_path, setting: str, message: str) -> None:
    table = labels_in(tmp_path, "subject,sex\nsomebody,f\n")
    with pytest.raises(ValueError, match=message):
        read_probe_labels([setting.format(table=table)], SliceStore(store).scans)


def run(store: Path, out: Path, *more: str) -> list[dict]:
    command = ["debug", "--store", str(store), "--out", str(out), "--device", "cpu", *more]
    assert main(command) == 0
    return read_metrics(out / "metrics.jsonl")


def test_probing_changes_no_number_of_the_run(store, tmp_path) -> None:
    options = ("--iterations", "4")
    plain = run(store, tmp_path / "plain", *options)
    probed = run(store, tmp_path / "probed", *options, "--probe-every", "2", "--probe-scans", "4")
    skipped = ("slices_per_second", "eta_seconds")
    for row, other in zip(plain, probed, strict=True):
        assert {k: v for k, v in row.items() if k not in skipped} == {
            k: v for k, v in other.items() if k not in skipped and not k.startswith("probe_")
        }
    assert [row["iteration"] for row in probed if "probe_knn_sequence" in row] == [1, 2, 4]


FIFTY_STEPS = ("--iterations", "50", "--log-every", "10", "--model.depth", "2")


def test_constant_images_raise_the_alarm_within_50_steps(tmp_path, capsys) -> None:
    rows = run(make_store(tmp_path / "store", constant=True), tmp_path / "run", *FIFTY_STEPS)
    assert [(row["iteration"], row["alarms"]) for row in rows if "alarms" in row] == [(36, ["same_features"])]
    assert "ALARM iteration 36: all slices of a batch have the same features" in capsys.readouterr().out


def test_a_run_in_order_raises_none(store, tmp_path) -> None:
    rows = run(store, tmp_path / "run", *FIFTY_STEPS)
    assert not [row for row in rows if "alarms" in row]


def row_of(iteration: int, **changes: float) -> dict[str, float]:
    sound = {"teacher_std": 0.3, "feature_rank": 5.0, "prototype_entropy": 4.0, "teacher_entropy": 3.0}
    return {"iteration": iteration, **sound, "neighbour_distance": 0.4, **changes}


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"neighbour_distance": 1e-3}, "few_points"),
        ({"teacher_entropy": float(np.log(128))}, "uniform_teacher"),
        ({"teacher_std": 0.0}, "same_features"),
    ],
)
def test_each_sign_has_its_alarm(changes: dict[str, float], kind: str) -> None:
    alarms = CollapseAlarms(128, before=[row_of(1, **changes)])
    assert [alarm.kind for alarm in alarms.check(row_of(1 + PATIENCE, **changes))] == [kind]


def test_an_alarm_needs_patience_is_told_once_and_again_after_recovery() -> None:
    alarms = CollapseAlarms(128)
    told = [alarms.check(row_of(i, feature_rank=1.0)) for i in range(1, 2 * PATIENCE)]
    assert [len(new) for new in told].index(1) == PATIENCE and sum(map(len, told)) == 1
    assert alarms.check(row_of(100)) == []
    again = [alarms.check(row_of(i, feature_rank=1.0)) for i in range(101, 102 + PATIENCE)]
    assert [new[0].kind for new in again if new] == ["one_direction"]
    few = CollapseAlarms(128, before=[row_of(1, prototype_entropy=0.01)])
    assert [alarm.kind for alarm in few.check(row_of(1 + PATIENCE, prototype_entropy=0.01))] == ["few_prototypes"]
