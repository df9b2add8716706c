"""Slim checkpoints while training, a whole one at the end; resuming, moving to another machine, several processes."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as stock  # noqa: N813
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.parallel import DistributedDataParallel

from braindino import load_encoder, save_encoder
from braindino.vision_transformer import VisionTransformer
from nnunet_braindino import _startup
from nnunet_braindino.predictions import read_prediction_source
from nnunet_braindino.trainer_variants import FULL_TRAINERS

DATASET = "Dataset001_Test"
DATASET_JSON = {
    "channel_names": {"0": "T1", "1": "FLAIR"},
    "labels": {"background": 0, "tumor": 1},
    "file_ending": ".nii.gz",
    "numTraining": 2,
}
FROZEN, FIXED = "nnUNetTrainerBrainDINOFrozen", "nnUNetTrainerBrainDINOFrozenFixedFusion"
FINETUNE, CONTEXT = "nnUNetTrainerBrainDINOFinetune", "nnUNetTrainerBrainDINOContext"
NUM_EPOCHS, ITERATIONS = 4, 2


def make_plans(*, continue_training: bool = False) -> dict:
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [32, 32],
        "batch_size": 2,
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"] * 2,
        "use_mask_for_norm": [True, True],
        "batch_dice": True,
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None},
        "architecture": {"network_class_name": "unused", "arch_kwargs": {}, "_kw_requires_import": []},
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "label_manager": "LabelManager",
        "configurations": {"2d": configuration},
        "continue_training": continue_training,
    }


def save_small_encoder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    save_encoder(VisionTransformer(embed_dim=64, depth=4, num_heads=1, layer_scale_init=1.0), folder)
    return folder


class Batches:
    """Batches that depend on epoch, iteration and rank alone, in place of nnU-Net's random loader."""

    def __init__(self, trainer, offset: int) -> None:
        self.trainer, self.offset, self.drawn = trainer, offset, Counter()

    def __next__(self) -> dict:
        trainer = self.trainer
        epoch = trainer.current_epoch
        rng = np.random.default_rng([epoch, self.offset, self.drawn[epoch], trainer.local_rank])
        self.drawn[epoch] += 1
        shape = trainer.configuration_manager.patch_size
        labels = (rng.random((trainer.batch_size, 1, *shape)) < 0.3).astype(np.int16)
        noise = rng.normal(size=(trainer.batch_size, 2, *shape)).astype(np.float32)
        return {"data": torch.from_numpy(noise + labels), "target": torch.from_numpy(labels)}


def make_trainer(name: str, *, continue_training: bool = False, cuda_is_cpu: bool = False):
    """A trainer of few tiny epochs whose batches need no data set, with nnU-Net's own loop, checkpoints and log."""
    full = FULL_TRAINERS[name]

    class Small(full):
        epochs, iterations, validation_iterations = NUM_EPOCHS, ITERATIONS, 1
        patch_size, largest_batch = (32, 32), 10

        def __init__(self, plans, configuration, fold, dataset_json, device=None):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.save_every = 1
            self.logger.plot_progress_png = lambda folder: None  # a second for every epoch
            if cuda_is_cpu:
                self.device, self.grad_scaler = torch.device("cpu"), None

        def on_train_start(self) -> None:
            if not self.was_initialized:
                self.initialize()
            self.dataloader_train, self.dataloader_val = Batches(self, 0), Batches(self, 1)

        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            if self.current_epoch == getattr(self, "stop_after", None):
                raise KeyboardInterrupt

    Small.__name__ = name
    return Small(make_plans(continue_training=continue_training), "2d", 0, DATASET_JSON, torch.device("cpu"))


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv(_startup.TRAINER_VARIABLE, _startup.TRAINER_DIR)
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(save_small_encoder(tmp_path / "encoder")))
    monkeypatch.setattr(stock, "infer_dataset_class", lambda folder: None)
    (tmp_path / "raw" / DATASET).mkdir(parents=True)
    return tmp_path


def read_checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=False)


def train(name: str, folder: Path, *, stop_after: int | None = None, continue_training: bool = False, seed: int = 0):
    os.environ["nnUNet_results"] = str(folder)  # noqa: SIM112
    torch.manual_seed(seed)
    trainer = make_trainer(name, continue_training=continue_training)
    trainer.stop_after = stop_after
    if continue_training:
        maybe_load_checkpoint(trainer, True, False)
    if stop_after is None:
        trainer.run_training()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run_training()
    return trainer


@pytest.mark.parametrize("name", [FROZEN, FIXED, FINETUNE, CONTEXT])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(name: str, tmp_path: Path):
    straight = train(name, tmp_path / "straight")
    train(name, tmp_path / "stopped", stop_after=2)
    # Another start: everything must come from the checkpoint.
    resumed = train(name, tmp_path / "stopped", continue_training=True, seed=1)
    for key in ("train_losses", "val_losses", "dice_per_class_or_region", "lrs"):
        logs = [trainer.logger.get_value(key, step=None) for trainer in (straight, resumed)]
        assert len(logs[0]) == NUM_EPOCHS
        np.testing.assert_array_equal(*logs)
    states = [trainer.network.state_dict() for trainer in (straight, resumed)]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("name", [FROZEN, FIXED, FINETUNE])
def test_training_leaves_the_bytes_of_a_frozen_encoder_alone(name: str, tmp_path: Path):
    trainer = train(name, tmp_path / "results")
    encoder = load_encoder(tmp_path / "encoder").state_dict()
    trained = trainer.network.encoder.state_dict()
    same = {key for key in encoder if encoder[key].numpy().tobytes() == trained[key].numpy().tobytes()}
    assert (same == set(encoder)) == (name != FINETUNE)
    trainer.network.train()
    assert trainer.network.encoder.training == (name == FINETUNE)
    assert not torch.equal(trainer.network.fusion.weight, torch.full((3, 2, 1, 1), 0.5))


def test_checkpoints_are_slim_on_the_way_and_whole_at_the_end(tmp_path: Path):
    trainer = train(FROZEN, tmp_path / "results")
    folder = Path(trainer.output_folder)
    assert sorted(path.name for path in folder.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_final.pth"]
    best, final = (read_checkpoint(folder / f"checkpoint_{name}.pth")["network_weights"] for name in ("best", "final"))
    assert not [key for key in best if key.startswith("encoder.")]
    assert {key for key in final if not key.startswith("encoder.")} == set(best)
    for key, value in load_encoder(tmp_path / "encoder").state_dict().items():
        assert torch.equal(final[f"encoder.{key}"], value)
    assert (folder / "checkpoint_best.pth").stat().st_size < (folder / "checkpoint_final.pth").stat().st_size
    assert not list(folder.glob(".tmp-*"))
    assert trainer.weights_are_of == "checkpoint_final.pth"
    trainer.load_checkpoint(str(folder / "checkpoint_best.pth"))  # as --val_best does before it validates
    assert trainer.weights_are_of == "checkpoint_best.pth"
    whole = read_checkpoint(Path(train(FINETUNE, tmp_path / "tuned").output_folder) / "checkpoint_best.pth")
    assert any(key.startswith("encoder.") for key in whole["network_weights"])


def test_validation_tells_which_checkpoint_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = train(FROZEN, tmp_path / "results")
    folder = Path(trainer.output_folder)
    # nnU-Net's own predicts and scores whole volumes, and makes the folder.
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda *_: (folder / "validation").mkdir())
    trainer.perform_actual_validation()
    assert read_prediction_source(folder / "validation") == "checkpoint_final.pth"


@pytest.mark.fault
def test_a_checkpoint_that_cannot_be_written_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = train(FROZEN, tmp_path / "results", stop_after=1)
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    before = path.read_bytes()

    def fail(content: object, filename: str) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(str(path))
    assert path.read_bytes() == before
    assert not list(path.parent.glob(".tmp-*"))
    trainer.disable_checkpointing = True
    trainer.save_checkpoint(str(path.with_name("none.pth")))
    assert not path.with_name("none.pth").exists()


def test_a_frozen_encoder_that_changed_is_never_saved_as_final(tmp_path: Path):
    trainer = train(FROZEN, tmp_path / "results", stop_after=1)
    with torch.no_grad():
        trainer.network.encoder.norm.bias += 1e-3
    with pytest.raises(RuntimeError, match=r"frozen encoder .* has changed during training: sha256"):
        trainer.save_checkpoint(str(tmp_path / "checkpoint_final.pth"))
    assert not (tmp_path / "checkpoint_final.pth").exists()


def test_continuing_with_another_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = train(FROZEN, tmp_path / "results", stop_after=2)
    first, other = trainer.network.encoder.sha256, save_small_encoder(tmp_path / "other", seed=1)
    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(other))
    again = make_trainer(FROZEN, continue_training=True)
    message = rf"checkpoint_latest.pth: these weights were trained with the encoder of sha256 {first}, but here is"
    with pytest.raises(ValueError, match=message) as caught:
        maybe_load_checkpoint(again, True, False)
    assert load_encoder(other).sha256 in str(caught.value)


def model_folder(trainer, tmp_path: Path) -> Path:
    """What nnU-Net's on_train_start and final validation would have left beside the checkpoints."""
    folder = Path(trainer.output_folder_base)
    stock.save_json(trainer.plans_manager.plans, str(folder / "plans.json"), sort_keys=False)
    stock.save_json(DATASET_JSON, str(folder / "dataset.json"), sort_keys=False)
    (folder / "dataset_fingerprint.json").write_text("{}")
    (folder / "fold_0" / "progress.png").touch()
    (folder / "fold_0" / "validation").mkdir(exist_ok=True)
    (folder / "fold_0" / "validation" / "summary.json").write_text("{}")
    return folder


def predict(folder: Path, checkpoint: str, image: torch.Tensor) -> torch.Tensor:
    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(folder), (0,), checkpoint)
    return predictor.predict_logits_from_preprocessed_data(image)


def test_an_exported_model_predicts_the_same_where_the_encoder_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trainer = train(FROZEN, tmp_path / "results")
    folder = model_folder(trainer, tmp_path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    here = predict(folder, "checkpoint_final.pth", image)
    export_pretrained_model(DATASET, str(tmp_path / "model.zip"), ("2d",), FROZEN, folds=(0,))

    (tmp_path / "encoder").rename(tmp_path / "gone")
    monkeypatch.delenv(_startup.ENCODER_VARIABLE)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    install_model_from_zip_file(str(tmp_path / "model.zip"))
    there = predict(tmp_path / "elsewhere" / folder.relative_to(tmp_path / "results"), "checkpoint_final.pth", image)
    assert torch.equal(here, there)
    assert here.abs().max() > 0


def test_a_slim_checkpoint_predicts_with_the_right_encoder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trainer = train(FROZEN, tmp_path / "results")
    folder = model_folder(trainer, tmp_path)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    # The last epoch's weights, slim: the same network as the final checkpoint.
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_latest.pth"))
    whole, slim = (predict(folder, f"checkpoint_{name}.pth", image) for name in ("final", "latest"))
    assert torch.equal(whole, slim)

    monkeypatch.setenv(_startup.ENCODER_VARIABLE, str(save_small_encoder(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match=r"BRAINDINO_ENCODER gives another one, .*checkpoint_final.pth"):
        predict(folder, "checkpoint_latest.pth", image)
    assert torch.equal(predict(folder, "checkpoint_final.pth", image), whole)
    monkeypatch.delenv(_startup.ENCODER_VARIABLE)
    with pytest.raises(
        ValueError, match=r"leaves out the frozen encoder .*sha256 [0-9a-f]{64}.*Use checkpoint_final.pth"
    ):
        predict(folder, "checkpoint_latest.pth", image)

    other_plans = trainer.plans_manager.plans | {
        "braindino": trainer.plans_manager.plans["braindino"] | {"sha256": "ab" * 32}
    }
    stock.save_json(other_plans, str(folder / "plans.json"), sort_keys=False)
    with pytest.raises(ValueError, match=r"keep the plans.json that was written with the checkpoint"):
        predict(folder, "checkpoint_final.pth", image)


def test_a_finished_model_can_start_another_training(tmp_path: Path):
    """nnUNetv2_train -pretrained_weights: the same encoder, another data set."""
    final = Path(train(FROZEN, tmp_path / "results").output_folder) / "checkpoint_final.pth"
    trainer = make_trainer(FROZEN)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(final))
    weights = read_checkpoint(final)["network_weights"]
    assert all(torch.equal(value, weights[key]) for key, value in trainer.network.state_dict().items())


def _run_rank(rank: int, names: tuple[str, ...], folder: str) -> None:
    """What nnU-Net's ``run_ddp`` does, on CPUs: it hard-codes the backend nccl and the device cuda."""
    torch.set_num_threads(1)
    stock.infer_dataset_class = lambda folder: None
    stock.DDP = lambda network, device_ids: DistributedDataParallel(network)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    for name in names:
        torch.manual_seed(rank)
        trainer = make_trainer(name, cuda_is_cpu=True)
        trainer.run_training()
        state = trainer.plain_network().state_dict()
        own = {key: value for key, value in state.items() if value.is_floating_point()}
        losses = trainer.logger.get_value("train_losses", step=None)
        torch.save({"weights": own, "losses": losses}, f"{folder}/{name}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_one_network_over_gloo(tmp_path: Path):
    names = (FROZEN, FIXED, FINETUNE, CONTEXT)
    torch.multiprocessing.spawn(_run_rank, args=(names, str(tmp_path)), nprocs=2)
    encoder = load_encoder(tmp_path / "encoder").state_dict()
    for name in names:
        ranks = [torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=False) for rank in (0, 1)]
        assert all(torch.equal(value, ranks[1]["weights"][key]) for key, value in ranks[0]["weights"].items())
        assert ranks[0]["losses"] == ranks[1]["losses"] and len(ranks[0]["losses"]) == NUM_EPOCHS
        untouched = all(torch.equal(ranks[0]["weights"][f"encoder.{key}"], value) for key, value in encoder.items())
        assert untouched == (name != FINETUNE)
        assert not torch.equal(ranks[0]["weights"]["fusion.weight"], torch.full((3, 2, 1, 1), 0.5))
        final = next((tmp_path / "results").rglob(f"{name}__*/fold_0/checkpoint_final.pth"))
        weights = read_checkpoint(final)["network_weights"]
        assert all(torch.equal(weights[key], value) for key, value in ranks[0]["weights"].items())
