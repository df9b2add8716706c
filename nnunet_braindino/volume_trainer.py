"""nnU-Net trainers on the paper's 3D baselines: a frozen encoder of volumes, a trained decoder (paper sec. 4.3.1).

Loss, optimiser, augmentation, iterations and epochs are those of ``nnUNetTrainerBrainDINOFrozen``. One thing differs
from the paper on purpose: it ran its 3D baselines for 100 epochs of a schedule laid out for 1,000, so that their
learning rate hardly fell; here the rate falls to 0 over the epochs really run, for every encoder alike.
"""

import math

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from braindino.encoders import bm_mae, brainiac, brainmvp
from nnunet_braindino._startup import ENCODER_VARIABLE, encoder_name
from nnunet_braindino.encoder_checkpoint import PLANS_KEY, EncoderCheckpoints, encoder_from_environment, identity_in
from nnunet_braindino.network import count_parameters
from nnunet_braindino.trainer import (
    BETAS,
    ITERATIONS_PER_EPOCH,
    LEARNING_RATE,
    NUM_EPOCHS,
    VALIDATION_ITERATIONS_PER_EPOCH,
    WEIGHT_DECAY,
)
from nnunet_braindino.trainer_plans import MIN_BATCH_SIZE
from nnunet_braindino.volume_network import (
    FrozenVolumeSegmenter,
    build_encoder,
    cube_edge,
    kind_of,
    read_volume_network,
    volume_identity,
)


class FrozenVolumeTrainer(EncoderCheckpoints):
    """Frozen encoder of cubes, trained decoder, 100 epochs on ``3d_fullres``.

    The encoder comes from the environment variable BRAINDINO_ENCODER while training, ``brainiac:PATH`` and so on, and
    from the final checkpoint ever after. Its kind, architecture, hash and name are kept in the plans under
    ``braindino``.
    """

    kind: str
    """Which encoder, by its name in ``load_volume_encoder``."""
    patch_edge = brainmvp.SIZE
    """Edge of the patches in voxels, where the encoder leaves it open."""
    epochs = NUM_EPOCHS
    iterations = ITERATIONS_PER_EPOCH
    validation_iterations = VALIDATION_ITERATIONS_PER_EPOCH
    learning_rate = LEARNING_RATE
    largest_batch: int | None = None
    """Upper bound of the patches in a batch; None keeps the planner's voxel budget."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature)
    ) -> None:
        encoder = encoder_from_environment(read_volume_network)
        if kind_of(encoder) != self.kind:
            raise ValueError(
                f"{ENCODER_VARIABLE} gives {encoder_name()}, an encoder of kind {kind_of(encoder)!r}, but this trainer "
                f"is for {self.kind!r}: set it to {self.kind}:PATH, or take the trainer for that encoder"
            )
        self.pretrained_encoder = encoder
        plans[PLANS_KEY] = volume_identity(encoder)
        edge = cube_edge(encoder, default=self.patch_edge)
        fit_volume_plans(plans, configuration, edge=edge, largest_batch=self.largest_batch)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = self.validation_iterations
        self.initial_lr = self.learning_rate
        self.weight_decay = WEIGHT_DECAY
        self.enable_deep_supervision = False

    @staticmethod
    def build_network_architecture(
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network that the plans describe; its encoder's weights are not loaded here but by ``initialize``
        (training) or from the checkpoint (prediction). There is no deep supervision, whatever is asked for."""
        return FrozenVolumeSegmenter(
            build_encoder(identity_in(plans_manager.plans)),
            num_input_channels=num_input_channels,
            num_classes=num_output_channels,
            transpose_forward=plans_manager.transpose_forward,
        )

    def initialize(self) -> None:
        super().initialize()
        network = self.plain_network()
        network.load_encoder_weights(self.pretrained_encoder)
        del self.pretrained_encoder  # the network has it, and it takes as much memory again
        identity = self.plans_manager.plans[PLANS_KEY]
        planned = self.configuration_manager
        self.print_to_log_file(f"BrainDINO: {count_parameters(network)}")
        self.print_to_log_file(f"BrainDINO: frozen encoder {identity['name']}, sha256 {identity['sha256']}")
        self.print_to_log_file(f"BrainDINO: patches {planned.patch_size}, batch size {planned.batch_size}")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW on the decoder, its learning rate falling linearly to 0 over the epochs really run."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.initial_lr, weight_decay=self.weight_decay, betas=BETAS)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=1.0)


class nnUNetTrainerBrainMVPFrozen(FrozenVolumeTrainer):  # noqa: N801 (nnU-Net finds trainers by names of this form)
    """BrainMVP's frozen UniFormer on patches of 128 voxels, BRAINDINO_ENCODER=brainmvp:PATH."""

    kind = brainmvp.NAME


class nnUNetTrainerBMMAEFrozen(FrozenVolumeTrainer):  # noqa: N801
    """BM-MAE's frozen ViT on patches of 128 voxels, BRAINDINO_ENCODER=bm-mae:PATH. All channels go through the first of
    its tokenizers, that of T1 in the published files.
    """

    kind = bm_mae.NAME


class nnUNetTrainerBrainIACFrozen(FrozenVolumeTrainer):  # noqa: N801
    """BrainIAC's frozen ViT on patches of 96 voxels, BRAINDINO_ENCODER=brainiac:PATH."""

    kind = brainiac.NAME


def fit_volume_plans(plans: dict, configuration: str, *, edge: int, largest_batch: int | None = None) -> None:
    """Change the configuration in place to cubes of ``edge`` voxels, with at most as many voxels per batch as planned.

    There are never fewer than two patches in a batch, and never more than ``largest_batch``.

    Raises:
        ValueError: the configuration is not three-dimensional.
    """
    planned = PlansManager(plans).get_configuration(configuration)
    if len(planned.patch_size) != 3:
        raise ValueError(
            f"configuration {configuration!r} has {len(planned.patch_size)}-dimensional patches, but the encoder sees "
            "volumes; train with configuration 3d_fullres: nnUNetv2_train DATASET 3d_fullres FOLD -tr TRAINER"
        )
    batch_size = planned.batch_size * math.prod(planned.patch_size) // edge**3
    if largest_batch is not None:
        batch_size = min(batch_size, largest_batch)
    batch_size = int(max(MIN_BATCH_SIZE, batch_size))
    plans["configurations"][configuration].update(patch_size=[edge] * 3, batch_size=batch_size)
