"""nnU-Net v2 trainers with a frozen BrainDINO encoder (paper sec. 4.3.1); the rest is nnU-Net's default.

Defaults that the paper asks for and nnU-Net already has: Dice + cross-entropy (binary for overlapping regions),
gradient clip at norm 12, mixed precision on CUDA, 250 training and 50 validation iterations per epoch, standard
augmentation.
"""

from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.decoder import LinearDecoder
from nnunet_braindino.encoder_checkpoint import (
    PLANS_KEY,
    EncoderCheckpoints,
    EncoderNetwork,
    encoder_from_environment,
    encoder_identity,
    identity_in,
)
from nnunet_braindino.network import EncoderSegmenter, FrozenEncoderSegmenter, count_parameters
from nnunet_braindino.trainer_plans import PATCH_SIZE, fit_plans, orientation_warnings, plan_warnings

__all__ = [
    "nnUNetTrainer",
    "nnUNetTrainerBrainDINOFrozen",
    "nnUNetTrainerBrainDINOFrozenFixedFusion",
    "nnUNetTrainerBrainDINOLinear",
]

NUM_EPOCHS = 100
ITERATIONS_PER_EPOCH = 250
VALIDATION_ITERATIONS_PER_EPOCH = 50
# The paper does not state these three for segmentation; they are those of its code release.
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 5e-2
BETAS = (0.9, 0.98)

FUSION_SHARE = 0.1
"""Share of the epochs in which the fixed-fusion variant trains the fusion."""


class nnUNetTrainerBrainDINOFrozen(EncoderCheckpoints):  # noqa: N801 (nnU-Net finds trainers by names of this form)
    """Frozen encoder, trained 1x1 fusion and decoder, 256x256 axial patches, 100 epochs.

    The encoder comes from the environment variable BRAINDINO_ENCODER while training (nnU-Net passes no options to
    trainers) and from the final checkpoint ever after: prediction needs neither the variable nor the file. Its
    architecture, hash and name are kept in the plans under ``braindino``. The planner's batch size is rescaled to
    256x256 patches at the same number of pixels.
    """

    epochs = NUM_EPOCHS
    iterations = ITERATIONS_PER_EPOCH
    validation_iterations = VALIDATION_ITERATIONS_PER_EPOCH
    learning_rate = LEARNING_RATE
    patch_size = PATCH_SIZE
    num_slices: int | None = None
    """Slices in a stack, for trainers that look at neighbouring slices; None for single slices."""
    largest_batch: int | None = None
    """Upper bound of the slices in a batch, for machines without a GPU; None keeps the planner's pixel budget."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's own signature)
    ) -> None:
        self.pretrained_encoder = encoder_from_environment()
        plans[PLANS_KEY] = encoder_identity(self.pretrained_encoder)
        fit_plans(
            plans,
            configuration,
            patch_size=self.patch_size,
            largest_batch=self.largest_batch,
            num_slices=self.num_slices,
        )
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = self.validation_iterations
        self.initial_lr = self.learning_rate
        self.weight_decay = WEIGHT_DECAY
        self.enable_deep_supervision = False

    @classmethod
    def build_from_encoder(cls, encoder: VisionTransformer, num_input_channels: int, num_classes: int) -> nn.Module:
        """The network around an encoder; what sets the trainers apart."""
        return FrozenEncoderSegmenter(encoder, num_input_channels=num_input_channels, num_classes=num_classes)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """The network that the plans describe; its encoder's weights are not loaded here but by ``initialize``
        (training) or from the checkpoint (prediction). There is no deep supervision, whatever is asked for."""
        identity = identity_in(plans_manager.plans)
        encoder = VisionTransformer(**identity["architecture"])
        encoder.name, encoder.sha256 = identity["name"], identity["sha256"]
        return cls.build_from_encoder(encoder, num_input_channels, num_output_channels)

    def _do_i_compile(self) -> bool:
        """Never, though nnU-Net compiles on GPUs by itself: what the network is made of are functions with backward
        passes of their own, through which torch 2.11's compiler gave gradients of the fusion that were off by 3 %."""
        return False

    def initialize(self) -> None:
        super().initialize()
        network = self.plain_network()
        assert isinstance(network, EncoderNetwork)
        network.load_encoder_weights(self.pretrained_encoder)
        del self.pretrained_encoder  # the network has it, and it takes as much memory again
        identity = self.plans_manager.plans[PLANS_KEY]
        kind = "trained" if self.trains_encoder else "frozen"
        self.print_to_log_file(f"BrainDINO: {count_parameters(network)}")
        self.print_to_log_file(f"BrainDINO: {kind} encoder {identity['name']}, sha256 {identity['sha256']}")
        planned = self.configuration_manager
        self.print_to_log_file(f"BrainDINO: patches {planned.patch_size}, batch size {planned.batch_size}")
        self._warn(plan_warnings(self.plans_manager.plans, self.configuration_name))

    def on_train_start(self) -> None:
        super().on_train_start()
        first = self.dataset_class(self.preprocessed_dataset_folder)
        properties = first.load_case(first.identifiers[0])[-1]
        self._warn(orientation_warnings(properties, self.plans_manager.transpose_forward))

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW on what is trained, learning rates falling linearly to 0 over the epochs."""
        groups = self.parameter_groups(self.plain_network())
        optimizer = torch.optim.AdamW(groups, lr=self.initial_lr, weight_decay=self.weight_decay, betas=BETAS)
        return optimizer, GroupRates(optimizer, self.initial_lr, self.num_epochs, exponent=1.0)

    def parameter_groups(self, network: EncoderSegmenter) -> list[dict[str, Any]]:
        """What is trained, with ``rate_factor``, the learning rate as a multiple of the trainer's."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return [{"params": trained, "rate_factor": 1.0}]

    def _warn(self, warnings: list[str]) -> None:
        for warning in warnings:
            self.print_to_log_file(f"WARNING: {warning}")


class nnUNetTrainerBrainDINOFrozenFixedFusion(nnUNetTrainerBrainDINOFrozen):  # noqa: N801
    """As Frozen, and faster: the fusion is trained in the first tenth of the epochs (at least one) and then fixed, so
    that the encoder needs no backward pass.
    """

    @property
    def fusion_epochs(self) -> int:
        """How many epochs train the fusion."""
        return max(1, round(FUSION_SHARE * self.num_epochs))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= self.fusion_epochs and self.plain_network().fusion.weight.requires_grad:
            self._fix_fusion()
        super().on_train_epoch_start()

    def _fix_fusion(self) -> None:
        self.plain_network().fix_fusion()
        if isinstance(self.network, DistributedDataParallel):
            # The old wrapper waits for the fusion's gradient in every step; a new one knows that there is none.
            devices = [self.local_rank] if self.device.type == "cuda" else None
            self.network = DistributedDataParallel(self.network.module, device_ids=devices)
        self.print_to_log_file(f"BrainDINO: fusion fixed after {self.current_epoch} epochs, encoder without a graph")
        self.print_to_log_file(f"BrainDINO: {count_parameters(self.plain_network())}")


class nnUNetTrainerBrainDINOLinear(nnUNetTrainerBrainDINOFrozen):  # noqa: N801
    """A floor: one linear layer on the patch tokens of the last block, enlarged, in place of the decoder."""

    @classmethod
    def build_from_encoder(cls, encoder: VisionTransformer, num_input_channels: int, num_classes: int) -> nn.Module:
        return FrozenEncoderSegmenter(
            encoder, num_input_channels=num_input_channels, num_classes=num_classes, decoder=LinearDecoder
        )


class GroupRates(PolyLRScheduler):
    """nnU-Net's schedule, times the ``rate_factor`` of each parameter group."""

    def step(self, current_step: int | None = None) -> None:
        super().step(current_step)
        for group in self.optimizer.param_groups:
            group["lr"] *= group["rate_factor"]
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
