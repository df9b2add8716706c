import csv
import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from braindino.downstream import evaluate, reproduce
from braindino.downstream.cases import Cases
from braindino.downstream.config import EvaluateConfig
from braindino.downstream.finetuning import FineTuner, Finetuning, name_beside
from braindino.downstream.head_stack import HeadStack
from braindino.downstream.heads import Head, train_heads
from braindino.downstream.protocols import Job
from braindino.downstream.scan_inputs import ScanInputs
from braindino.downstream.task_table import task_from
from braindino.downstream.trials import case_features
from braindino.encoder_rates import encoder_rate
from braindino.encoders.bm_mae import BMMAE
from braindino.encoders.brainiac import BrainIAC
from braindino.encoders.catalogue import draw_weights, load_volume_encoder
from braindino.encoders.contract import Identity
from braindino.encoders.slice_encoder import SliceEncoder, SlicePreparation
from braindino.encoders.volume_transformer import BMMAETransformer, BrainIACTransformer
from braindino.feature_table import FeatureTable, FeatureTableMeta, FeatureTableWriter
from braindino.manifest import Scan, load_brain, mask_path, write_scans
from braindino.vision_transformer import VisionTransformer
from braindino.volume import save_array, save_mask_like
from braindino.weights import save_encoder

OPTIONS = ("num_slices=4", "image_size=32")
NUM_SUBJECTS, NUM_TRAIN = 12, 8
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _every_volume_is_prepared_once(monkeypatch):
    """Half a second each, and the same in every test."""
    apply = SlicePreparation.apply

    def cached(self, volume, *, sequence):
        key = (hashlib.sha256(volume.data.tobytes()).hexdigest(), self, sequence)
        if key not in PREPARED:
            PREPARED[key] = apply(self, volume, sequence=sequence)
        return PREPARED[key]

    monkeypatch.setattr(SlicePreparation, "apply", cached)


PREPARED = {}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """12 subjects with T1, three of them with FLAIR too; every other one has a bright spot in a corner of the brain.

    One scan has a mask of ours.
    """
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    scans, lines = [], []
    for number in range(NUM_SUBJECTS):
        for sequence in ("T1", "FLAIR") if number < 3 else ("T1",):
            data = np.zeros((12, 14, 10), np.float32)
            data[1:11, 1:13, 1:9] = rng.uniform(90, 110, (10, 12, 8))
            if number % 2:
                data[1:5, 1:5, 1:9] += 40
            path = folder / f"sub-{number:02d}_{sequence}.nii.gz"
            save_array(data, np.diag([-3.0, -3.0, 4.0, 1.0]), path, dtype=np.float32)
            scans.append(Scan(str(path), "c", f"{number:02d}", "", sequence))
        lines.append(f"sub-{number:02d}\t{number % 2}\t{30 + 20 * (number % 2) + number / 10}")
    (folder / "participants.tsv").write_text("\n".join(["participant_id\tspot\tage", *lines, ""]))
    prepared = folder / "prepared"
    (prepared / "masks").mkdir(parents=True)
    mask = np.zeros((12, 14, 10), bool)
    mask[1:10, 1:13, 1:9] = True
    save_mask_like(mask, scans[0].path, mask_path(prepared, scans[0]))
    write_scans(prepared / "scans.tsv", scans)
    torch.manual_seed(0)
    save_encoder(VisionTransformer(embed_dim=64, depth=2, num_heads=1).eval(), folder / "net")
    torch.manual_seed(0)
    # Layer scales of 1: features differ between scans from the start.
    save_encoder(VisionTransformer(embed_dim=64, depth=2, num_heads=1, layer_scale_init=1.0).eval(), folder / "lively")
    return folder


def all_scans(cohort):
    return [
        Scan(str(cohort / f"sub-{number:02d}_{sequence}.nii.gz"), "c", f"{number:02d}", "", sequence)
        for number in range(NUM_SUBJECTS)
        for sequence in (("T1", "FLAIR") if number < 3 else ("T1",))
    ]


def spot_cases(cohort, *, sequences=("T1",), kind="class"):
    """Each subject is a case."""
    rows = np.arange(NUM_SUBJECTS)
    targets = {
        "class": rows % 2,
        "number": 30.0 + 20 * (rows % 2) + rows / 10,
        "survival": np.stack([100.0 + 7 * ((5 * rows) % NUM_SUBJECTS), rows % 3 > 0], axis=1).astype(np.float64),
    }
    scans = [tuple(s for s in all_scans(cohort) if s.subject == f"{n:02d}" and s.sequence in sequences) for n in rows]
    return Cases([f"c/{n:02d}" for n in rows], scans, [f"c/{n:02d}" for n in rows], targets[kind], {}, {})


def make_task(kind="class", *, head=None, training=None, inputs=None, **more):
    target = {"kind": kind, "column": "spot"}
    target |= {"classes": ["0", "1"]} if kind == "class" else {"event": "event"} if kind == "survival" else {}
    loss = {"class": "cross_entropy", "number": "squared_error", "survival": "cox"}[kind]
    return task_from(
        {
            "name": "spot",
            "title": "A spot",
            "inputs": {"sequences": ["T1"]} | (inputs or {}),
            "target": target,
            "head": {"hidden_width": 16} | (head or {}),
            "training": {"loss": loss, "steps": 4, "batch_size": 5, "learning_rate": 3e-3} | (training or {}),
            "metrics": ["auc"],
            **more,
        }
    )


def make_jobs(*train_sizes, seed=3):
    return [
        Job(0, seed, size / NUM_TRAIN, np.arange(size), np.arange(NUM_TRAIN, NUM_SUBJECTS), size)
        for size in train_sizes
    ]


def make_tuner(cohort, task, cases, *, encoder="lively", **settings):
    settings = Finetuning(**{"options": OPTIONS, **settings})
    name = str(cohort / encoder) if (cohort / encoder).exists() else encoder
    where = {"prepared_dir": cohort / "prepared", "beside": {}, "device": CPU}
    return FineTuner(task, cases, encoder=name, settings=settings, **where)


def extract(cohort, out, *, encoder="lively", scans=None):
    """A feature table, as `braindino extract` fills it."""
    net = load_volume_encoder(cohort / encoder, num_slices=4, image_size=32)
    with FeatureTableWriter(out, FeatureTableMeta(net.identity, "float32", net.dim, 4)) as writer:
        for scan in scans or all_scans(cohort):
            prepared = net.prepare(load_brain(cohort / "prepared", scan), sequence=scan.sequence)
            writer.add(scan, net.encode([prepared], with_tokens=False)[0])
    return FeatureTable(out)


@pytest.mark.parametrize(
    ("kind", "row", "sequences"),
    [
        ("class", {}, ("T1",)),
        ("class", {"inputs": {"sequences": ["T1", "FLAIR"], "fusion": "mean", "pool": "patches",
                              "slice_range": [0.3, 1.0]}, "training": {"class_weights": "balanced"}}, ("T1", "FLAIR")),
        ("class", {"head": {"kind": "linear", "dropout": 0.3}}, ("T1",)),
        ("number", {"head": {"dropout": 0.5}}, ("T1",)),
        ("number", {"training": {"loss": "log_mixed", "optimiser": "adamw"}}, ("T1",)),
        ("survival", {"training": {"batch_size": None}}, ("T1",)),
        ("class", {"head": {"kind": "attention", "dropout": 0.3}}, ("T1",)),
    ],
    ids=["global", "patches-fused", "linear", "number", "log", "cox", "attention"],
)  # fmt: skip
def test_an_encoder_at_rate_zero_gives_the_results_of_its_frozen_features(cohort, tmp_path, kind, row, sequences):
    task, cases = make_task(kind, **row), spot_cases(cohort, sequences=sequences, kind=kind)
    jobs = make_jobs(5, 8)
    features = case_features(task, cases, extract(cohort, tmp_path / "features", scans=cases.all_scans))
    frozen = train_heads(
        features,
        cases.targets,
        subsets=[job.train for job in jobs],
        seeds=[job.seed for job in jobs],
        num_outputs=len(task.target.classes) or 1,
        head=task.head,
        training=task.training,
    )
    tuned = make_tuner(cohort, task, cases, encoder_rate=0.0).train(jobs, keep_in=None)
    for number, job in enumerate(jobs):
        asked = np.concatenate([job.train, job.test]) if kind == "survival" else job.test
        np.testing.assert_allclose(tuned[number, asked], frozen[number, asked], rtol=2e-4, atol=2e-5)
        assert np.isnan(tuned[number, np.setdiff1d(np.arange(NUM_SUBJECTS), asked)]).all()
    if not row:  # The comparison can fail: with a rate the results are others.
        moved = make_tuner(cohort, task, cases, encoder_rate=0.5).train(jobs, keep_in=None)
        assert np.nanmax(np.abs(moved - tuned)) > 1e-3


def test_slice_and_volume_features_with_gradients_are_those_of_extraction(cohort):
    volume = load_brain(cohort / "prepared", all_scans(cohort)[0])
    for encoder in (
        load_volume_encoder(cohort / "lively", num_slices=4, image_size=32),
        load_volume_encoder("untrained:brainmvp", size=32),
        BMMAE(draw_weights(lambda: BMMAETransformer(modalities=("t1",), width=192, depth=2, mlp_dim=64, grid=2))),
        BrainIAC(draw_weights(lambda: BrainIACTransformer(width=128, depth=2, mlp_dim=64, grid=2))),
    ):
        prepared = encoder.prepare(volume, sequence="T1")
        expected = encoder.encode([prepared], with_tokens=False)[0]
        encoder.network.requires_grad_(True)
        if isinstance(encoder, SliceEncoder):
            found = encoder.slice_features(prepared.data)
            torch.testing.assert_close(found.cls, expected.slices.cls, rtol=0, atol=1e-6)
            torch.testing.assert_close(found.patches, expected.slices.patches, rtol=0, atol=1e-6)
            found = found.cls.mean(dim=0)
        else:
            found = encoder.volume_features(prepared.data[None], ["T1"])[0]
        torch.testing.assert_close(found, expected.global_, rtol=1e-5, atol=1e-6)
        assert found.requires_grad and not expected.global_.requires_grad


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_training_in_parts_equals_one_large_pass_through_plain_torch_layers(cohort, dropout):
    task, cases = make_task(head={"dropout": dropout}), spot_cases(cohort)
    (job,) = make_jobs(NUM_TRAIN)
    rates = {"encoder_rate": 0.5, "layer_decay": 0.8}
    outputs = {
        size: make_tuner(cohort, task, cases, pass_size=size, **rates).train([job], keep_in=None) for size in (3, 100)
    }
    np.testing.assert_allclose(outputs[3], outputs[100], rtol=1e-4, atol=1e-5)

    encoder = load_volume_encoder(cohort / "lively", num_slices=4, image_size=32)
    network = encoder.network.requires_grad_(True)
    images = torch.stack(
        [encoder.prepare(load_brain(cohort / "prepared", group[0]), sequence="T1").data for group in cases.scans]
    )
    start = HeadStack([job.seed], num_features=64, hidden_width=16, num_outputs=2).parameters
    head = nn.Sequential(nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 2))
    with torch.no_grad():
        for layer, name in ((head[1], "hidden"), (head[3], "output")):
            layer.weight.copy_(start[f"{name}_weight"][0].T)
            layer.bias.copy_(start[f"{name}_bias"][0, 0])
    rates = {"norm": 0.5, "blocks.1": 0.5, "blocks.0": 0.5 * 0.8, "": 0.5 * 0.8**2}
    groups = [{"params": list(head.parameters()), "lr": 3e-3}]
    for name, parameter in network.named_parameters():
        rate = next(value for prefix, value in rates.items() if name.startswith(prefix))
        groups.append({"params": [parameter], "lr": 3e-3 * rate})
    optimiser = torch.optim.Adam(groups, weight_decay=1e-5)
    generator = torch.Generator().manual_seed(job.seed)
    stream = torch.cat([torch.randperm(NUM_TRAIN, generator=generator) for _ in range(3)])[:20]

    def look(rows, kept=1.0):
        features = network(images[rows].flatten(0, 1)).cls.unflatten(0, (-1, 4)).mean(dim=1)
        return head[3](head[:3](features) * kept)

    dropper = torch.Generator().manual_seed(job.seed)

    for rows in stream.split(5):
        kept = (torch.rand(5, 16, generator=dropper) >= dropout) / (1 - dropout)
        loss = nn.functional.cross_entropy(look(rows, kept), torch.from_numpy(cases.targets)[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        expected = look(torch.from_numpy(job.test)).softmax(dim=-1).numpy()
    np.testing.assert_allclose(outputs[3][0, job.test], expected, rtol=2e-3, atol=1e-4)


def test_joint_training_learns_what_a_head_on_features_that_hardly_differ_cannot(cohort, tmp_path):
    task = make_task(training={"steps": 50, "batch_size": 8})
    cases, (job,) = spot_cases(cohort), make_jobs(NUM_TRAIN, seed=0)
    features = case_features(task, cases, extract(cohort, tmp_path / "features", encoder="net", scans=cases.all_scans))
    # With layer scales of 1e-5 the features differ in their fifth digit, and a head's loss stays at log 2.
    (frozen,) = train_heads(
        features, cases.targets, subsets=[job.train], seeds=[0], num_outputs=2, head=task.head, training=task.training
    )
    (tuned,) = make_tuner(cohort, task, cases, encoder="net", encoder_rate=3.0).train([job], keep_in=None)
    truth = cases.targets[job.test]
    losses = [-np.log(outputs[job.test, truth]).mean() for outputs in (frozen, tuned)]
    assert losses[0] == pytest.approx(np.log(2), abs=0.01)
    assert losses[1] < 0.1


def test_a_killed_run_goes_on_with_the_next_training_and_ends_where_it_would_have(cohort, tmp_path, monkeypatch):
    task, cases, jobs = make_task(), spot_cases(cohort), make_jobs(3, 5, 8)
    whole = make_tuner(cohort, task, cases).train(jobs, keep_in=None)
    step, steps = FineTuner._step, []

    def counted(self, *arguments, where):
        steps.append(where)
        if len(steps) == 7:
            raise KeyboardInterrupt
        step(self, *arguments, where=where)

    monkeypatch.setattr(FineTuner, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        make_tuner(cohort, task, cases).train(jobs, keep_in=tmp_path / "jobs")
    (kept,) = (tmp_path / "jobs").iterdir()
    assert kept.name == "split-0_seed-3_ratio-0.375.safetensors"
    again = make_tuner(cohort, task, cases).train(jobs, keep_in=tmp_path / "jobs")
    assert [where.split(",")[0] for where in steps[7:]] == ["job 2"] * 4 + ["job 3"] * 4
    np.testing.assert_array_equal(again, whole)
    # All are there now; other settings, targets or scans are another training, other memory is not.
    steps.clear()
    make_tuner(cohort, task, cases, memory=0.0, pass_size=2).train(jobs, keep_in=tmp_path / "jobs")
    assert not steps
    for changed in (
        make_tuner(cohort, task, cases, slices=2),
        make_tuner(cohort, replace(task, head=Head(hidden_width=8)), cases),
        make_tuner(cohort, task, replace(cases, targets=1 - cases.targets)),
    ):
        assert changed._read(tmp_path / "jobs", jobs[0]) is None
    kept.write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"ratio-0.375.safetensors: damaged .*; delete it"):
        make_tuner(cohort, task, cases).train(jobs, keep_in=tmp_path / "jobs")


def test_volumes_beyond_the_memory_are_prepared_again_and_decide_nothing(cohort, capsys):
    task, cases, jobs = make_task(), spot_cases(cohort), make_jobs(NUM_TRAIN)
    volume = 4 * 32 * 32 * 4 / 2**30
    all_kept = make_tuner(cohort, task, cases)
    expected = all_kept.train(jobs, keep_in=None)
    assert "prepared volumes" not in capsys.readouterr().out
    some = make_tuner(cohort, task, cases, memory=3.5 * volume)
    np.testing.assert_array_equal(some.train(jobs, keep_in=None), expected)
    assert "3 of 12 prepared volumes were kept in memory, the others prepared" in capsys.readouterr().out


def test_the_digest_of_the_scans_changes_with_a_scan_or_a_mask_and_not_with_their_place(cohort, tmp_path):
    scans = all_scans(cohort)[:2]

    def digest(folder):
        inputs = ScanInputs(None, folder / "prepared", scans, memory=0.0)
        return inputs.digest()

    for name in ("here", "there"):
        shutil.copytree(cohort / "prepared", tmp_path / name / "prepared")
        moved = [replace(scan, path=shutil.copy(scan.path, tmp_path / name)) for scan in scans]
        write_scans(tmp_path / name / "prepared" / "scans.tsv", moved)
    first = digest(tmp_path / "here")
    assert digest(tmp_path / "there") == first
    with Path(moved[1].path).open("ab") as handle:
        handle.write(b" ")
    assert digest(tmp_path / "there") != first
    mask_path(tmp_path / "here" / "prepared", scans[0]).unlink()
    assert digest(tmp_path / "here") != first


def test_drawn_slices_differ_from_step_to_step_and_come_again_with_the_seed(cohort):
    task, cases, jobs = make_task(), spot_cases(cohort), make_jobs(NUM_TRAIN)
    tuner = make_tuner(cohort, task, cases, slices=2)
    seen = []
    encode = tuner._encode
    tuner._encode = lambda piece: seen.append(piece[1]) or encode(piece)
    first = tuner.train(jobs, keep_in=None)
    # Five cases, twice each, in four steps, but for one that a step has twice; four test cases with all their slices.
    counts = [len(part) for part in seen]
    assert counts[-4:] == [4] * 4 and set(counts[:-4]) == {2} and 2 * 5 * 4 - 8 <= len(counts[:-4]) <= 2 * 5 * 4
    np.testing.assert_array_equal(make_tuner(cohort, task, cases, slices=2).train(jobs, keep_in=None), first)
    assert np.nanmax(np.abs(make_tuner(cohort, task, cases).train(jobs, keep_in=None) - first)) > 1e-5
    draw = torch.Generator().manual_seed(0)
    drawn = [tuner._draw_slices([0, 1], draw) for _ in range(20)]
    assert {tuple(rows.tolist()) for each in drawn for rows in each.values()} == {
        (a, b) for a in range(4) for b in range(a + 1, 4)
    }


def test_brainmvp_keeps_the_statistics_of_its_norms_and_trains_its_weights(cohort):
    task = make_task(training={"steps": 1, "batch_size": 2})
    cases = spot_cases(cohort)
    tuner = make_tuner(cohort, task, cases, encoder="untrained:brainmvp", options=("size=32",))
    before = {name: value.clone() for name, value in tuner._network.state_dict().items()}
    tuner.train([Job(0, 0, 1.0, np.arange(2), np.arange(2, 4), 2)], keep_in=None)
    after = tuner._network.state_dict()
    statistics = [name for name in before if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert statistics and all(torch.equal(before[name], after[name]) for name in statistics)
    assert not torch.equal(before["patch_embed1.proj.weight"], after["patch_embed1.proj.weight"])


def test_scans_that_are_not_finite_are_named_and_stop_the_training(cohort, monkeypatch):
    stream = ScanInputs.stream

    def spoilt(self, scans):
        for scan, data in stream(self, scans):
            yield scan, data * float("nan") if scan.subject == "02" else data

    monkeypatch.setattr(ScanInputs, "stream", spoilt)
    tuner = make_tuner(cohort, make_task(training={"batch_size": 8}), spot_cases(cohort))
    with pytest.raises(ValueError, match=r"job 1, step 1: features are not finite; scans \S*sub-02_T1.nii.gz\. Look"):
        tuner.train(make_jobs(NUM_TRAIN), keep_in=None)


def test_a_scan_that_was_lost_since_its_features_were_made_stops_the_training(cohort, tmp_path):
    cases = spot_cases(cohort)
    (scan,) = cases.scans[0]
    torn = tmp_path / f"sub-00_{scan.sequence}.nii.gz"
    torn.write_bytes(b"no scan")
    write_scans(tmp_path / "scans.tsv", [replace(scan, path=str(torn)), *(group[0] for group in cases.scans[1:])])
    settings = Finetuning(options=OPTIONS)
    tuner = FineTuner(
        make_task(),
        cases,
        encoder=str(cohort / "net"),
        prepared_dir=tmp_path,
        settings=settings,
        beside={},
        device=CPU,
    )
    with pytest.raises(ValueError, match=r"sub-00_T1.nii.gz: .* It had features once; put the file back"):
        tuner.train(make_jobs(NUM_TRAIN), keep_in=None)


def test_the_rates_of_blocks_fall_towards_the_input():
    assert encoder_rate("norm.weight", 12) == encoder_rate("blocks.11.ls1.gamma", 12) == 0.1
    assert encoder_rate("blocks.10.ls1.gamma", 12, share=0.5, layer_decay=0.8) == pytest.approx(0.5 * 0.8)
    assert encoder_rate("patch_embed.proj.weight", 12) == pytest.approx(0.1 * 0.9**12)


def test_a_fine_tuned_encoder_is_called_after_its_features_and_must_read_as_they_do():
    same, other = Identity("vit", "a", {"n": 1}, {}), Identity("x", "b", {"n": 1}, {})
    assert name_beside(same, {"mine": same, "other": other}) == "mine-finetuned"
    assert name_beside(same, {"other": other}) == "vit-finetuned"
    with pytest.raises(ValueError, match=r"mine has the same weights, but was prepared as .*--finetuning.options"):
        name_beside(replace(same, preparation={"n": 2}), {"mine": same})
    with pytest.raises(ValueError, match="there are features called vit-finetuned; rename their folder"):
        name_beside(same, {"vit-finetuned": other})


def test_what_cannot_be_fine_tuned_is_refused_with_what_to_do(cohort, tmp_path):
    cases = spot_cases(cohort)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_tuner(cohort, make_task(), cases, encoder="nowhere")
    with pytest.raises(ValueError, match="intensity: has no network, so there is nothing to train"):
        make_tuner(cohort, make_task(), cases, encoder="intensity", options=())
    with pytest.raises(ValueError, match="looks for nearest neighbours; there is no head"):
        make_tuner(cohort, make_task(knn={}), cases)
    with pytest.raises(ValueError, match=r"takes whole volumes, and task spot reads slices \(pool cls"):
        make_tuner(cohort, make_task(inputs={"pool": "cls"}), cases, encoder="untrained:brainmvp", options=())
    with pytest.raises(ValueError, match="takes whole volumes; leave it out"):
        make_tuner(cohort, make_task(), cases, encoder="untrained:brainmvp", options=(), slices=2)
    with pytest.raises(ValueError, match=r"training.smote: needs features that stay as they are .* smote: false"):
        make_tuner(cohort, make_task(training={"smote": True}), cases)
    with pytest.raises(ValueError, match=r"--finetuning.pass-size: found 0; expected 1 or more"):
        Finetuning(pass_size=0)
    with pytest.raises(ValueError, match="--finetune ENCODER and --prepared DIR belong together"):
        EvaluateConfig(task="adni", features=(tmp_path,), out=tmp_path, finetune="net")
    write_scans(tmp_path / "scans.tsv", all_scans(cohort)[2:])
    asked = {"encoder": str(cohort / "net"), "settings": Finetuning(options=OPTIONS), "beside": {}, "device": CPU}
    with pytest.raises(ValueError, match=r"1 of the 12 scans of the cases are not there .* T1 of c/00 .*--prepared"):
        FineTuner(make_task(), cases, prepared_dir=tmp_path, **asked)
    with pytest.raises(ValueError, match=r"no scans.tsv; expected the folder that `braindino prepare` made"):
        FineTuner(make_task(), cases, prepared_dir=cohort, **asked)


def test_evaluate_puts_the_fine_tuned_encoder_beside_the_frozen_one_and_reproduces_both(cohort, tmp_path, capsys):
    t1 = [scan for scan in all_scans(cohort) if scan.sequence == "T1"]
    extract(cohort, tmp_path / "features" / "net", encoder="net", scans=t1)
    (tmp_path / "spot.yaml").write_text(
        "title: A spot\ninputs: {sequences: [T1]}\nmetrics: [auc]\nhead: {hidden_width: 16}\n"
        'target: {kind: class, column: spot, classes: ["0", "1"]}\n'
        "training: {loss: cross_entropy, steps: 6, batch_size: 4, learning_rate: 3.0e-3}\n"
    )
    features, out = str(tmp_path / "features" / "net"), tmp_path / "eval"
    asked = [str(tmp_path / "spot.yaml"), "--features", features, "--labels", str(cohort), "--out", str(out)]
    asked += ["--seeds", "0", "--test-fraction", "0.4", "--permutations", "2", "--device", "cpu"]
    tuned = ["--finetune", str(cohort / "net"), "--finetuning.encoder-rate", "1"]
    tuned += ["--finetuning.options", *OPTIONS]
    tuned += ["--prepared", str(cohort / "prepared")]
    assert evaluate.main([*asked, *tuned, "--ratios", "0.5", "1"]) == 0
    printed = capsys.readouterr().out
    assert "net-finetuned: 0 of 2 trainings are there already; 6 steps each, encoder at 1 of the head's" in printed
    assert "net - net-finetuned" in printed

    folder = out / "spot"
    with (folder / "summary.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [(r["encoder"], r["ratio"]) for r in rows] == [
        (name, ratio) for ratio in ("0.5", "1") for name in ("net", "net-finetuned")
    ]
    assert rows[3]["permutation_p"] == "n/a" and rows[2]["permutation_p"] != "n/a"
    assert rows[3]["pretraining_overlap"] == "unknown: encoder net-finetuned has no pretrained_on.tsv"
    with (folder / "net-finetuned" / "predictions.csv").open(newline="") as handle:
        predicted = list(csv.DictReader(handle))
    with (folder / "net" / "predictions.csv").open(newline="") as handle:
        beside = list(csv.DictReader(handle))
    assert [(r["case"], r["ratio"]) for r in predicted] == [(r["case"], r["ratio"]) for r in beside]
    about = json.loads((folder / "run.json").read_text())["encoders"]["net-finetuned"]
    assert about["settings"]["encoder_rate"] == 1 and len(about["scans_sha256"]) == 64

    assert evaluate.main([*asked, *tuned, "--ratios", "0.5", "1"]) == 0
    assert "net-finetuned: 2 of 2 trainings are there already" in capsys.readouterr().out
    assert reproduce.main([str(folder), "--device", "cpu"]) == 0
    assert "every prediction and every number is the same" in capsys.readouterr().out
    assert reproduce.main([str(folder), "--device", "cpu", "--finetune", str(cohort / "lively")]) == 1
    assert "net-finetuned: other identity than in the run; give the encoder" in capsys.readouterr().err
