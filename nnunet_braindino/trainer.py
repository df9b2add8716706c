"""nnU-Net v2 trainers with a frozen BrainDINO encoder (paper sec. 4.3.1); the rest is nnU-Net's default.

Defaults that the paper asks for and nnU-Net already has: Dice + cross-entropy (binary for overlapping regions),
gradient clip at norm 12, mixed precision on CUDA, 250 training and 50 validation iterations per epoch, standard
augmentation.
"""

import math
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from braindino import load_encoder
from braindino.vision_transformer import VisionTransformer
from nnunet_braindino._startup import ENCODER_VARIABLE, encoder_name
from nnunet_braindino.network import FrozenEncoderSegmenter, count_parameters

PLANS_KEY = "braindino"

PATCH_SIZE = (256, 256)
MIN_BATCH_SIZE = 2
NUM_EPOCHS = 100
ITERATIONS_PER_EPOCH = 250
VALIDATION_ITERATIONS_PER_EPOCH = 50
# The paper does not state these three for segmentation; they are those of its code release.
LEARNING_RATE = 3e-4
WEIGHT_DECAY = 5e-2
BETAS = (0.9, 0.98)


class nnUNetTrainerBrainDINOFrozen(nnUNetTrainer):  # noqa: N801 (nnU-Net finds trainers by names of this form)
    """Frozen encoder, trained 1x1 fusion and decoder, 256x256 axial patches, 100 epochs.

    The encoder comes from the environment variable BRAINDINO_ENCODER while training (nnU-Net passes no options to
    trainers) and from the checkpoint ever after: prediction needs neither the variable nor the file. Its
    architecture, hash and name are kept in the plans under ``braindino``. The planner's batch size is rescaled to
    256x256 patches at the same number of pixels.
    """

    epochs = NUM_EPOCHS
    iterations = ITERATIONS_PER_EPOCH
    validation_iterations = VALIDATION_ITERATIONS_PER_EPOCH
    learning_rate = LEARNING_RATE
    patch_size = PATCH_SIZE
    largest_batch: int | None = None
    """Upper bound of the batch size, for machines without a GPU; None keeps the planner's pixel budget."""
    mirroring = True
    """Mirror in augmentation and average over mirrored predictions, as nnU-Net does (4 forward passes per slice)."""

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
        fit_plans(plans, configuration, patch_size=self.patch_size, largest_batch=self.largest_batch)
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
        identity = plans_manager.plans.get(PLANS_KEY)
        if identity is None:
            raise ValueError(
                f"the plans hold no {PLANS_KEY!r} entry, so the encoder's architecture is unknown; expected the "
                "plans.json that nnUNetTrainerBrainDINOFrozen wrote into the model folder"
            )
        return FrozenEncoderSegmenter(
            VisionTransformer(**identity["architecture"]),
            num_input_channels=num_input_channels,
            num_classes=num_output_channels,
        )

    def initialize(self) -> None:
        super().initialize()
        network = self._plain_network()
        network.encoder.load_state_dict(self.pretrained_encoder.state_dict())
        identity = self.plans_manager.plans[PLANS_KEY]
        self.print_to_log_file(f"BrainDINO: {count_parameters(network)}")
        self.print_to_log_file(f"BrainDINO: frozen encoder {identity['name']}, sha256 {identity['sha256']}")
        planned = self.configuration_manager
        self.print_to_log_file(f"BrainDINO: patches {planned.patch_size}, batch size {planned.batch_size}")
        for warning in plan_warnings(self.plans_manager.plans, self.configuration_name):
            self.print_to_log_file(f"WARNING: {warning}")

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PolyLRScheduler]:
        """AdamW on what is trained, learning rate falling linearly to 0 over the epochs."""
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.initial_lr, weight_decay=self.weight_decay, betas=BETAS)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs, exponent=1.0)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: the decoder has one output."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue (``--c``) or validate (``--val``); the encoder must be the one that the checkpoint was trained
        with.
        """
        super().load_checkpoint(filename_or_checkpoint)
        trained_with = self.my_init_kwargs["plans"][PLANS_KEY]
        given = self.plans_manager.plans[PLANS_KEY]
        if trained_with["sha256"] != given["sha256"]:
            raise ValueError(
                f"{filename_or_checkpoint} was trained with encoder {trained_with['name']} "
                f"(sha256 {trained_with['sha256']}), but {ENCODER_VARIABLE} gives {given['name']} "
                f"(sha256 {given['sha256']}); set it to the first"
            )

    def _plain_network(self) -> FrozenEncoderSegmenter:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if self.is_ddp else self.network
        return getattr(network, "_orig_mod", network)


class nnUNetTrainerBrainDINOFrozen_10epochs(nnUNetTrainerBrainDINOFrozen):  # noqa: N801
    """Some minutes on two CPU cores with ViT tiny, for small real datasets: 10 epochs of 25 iterations.

    For speed the patches fit a brain of 1 mm voxels more closely and nothing is mirrored in training or prediction. The
    learning rate is about three times higher, since there are so few iterations; at ten times, training on a briefly
    pretrained encoder stayed at "no tumour anywhere".
    """

    epochs = 10
    iterations = 25
    validation_iterations = 4
    learning_rate = 1e-3
    patch_size = (192, 160)
    largest_batch = 8
    mirroring = False


class nnUNetTrainerBrainDINOFrozen_demo(nnUNetTrainerBrainDINOFrozen_10epochs):  # noqa: N801
    """A minute or two on two CPU cores with ViT tiny, for the simulated cohort: 5 epochs of 25 iterations.

    The final validation of the fold is left out: the demonstration scores subjects that were held out altogether.
    """

    epochs = 5
    validation_iterations = 2
    patch_size = (160, 128)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        self.print_to_log_file("The demonstration leaves out nnU-Net's final validation.")


def encoder_from_environment() -> VisionTransformer:
    """The encoder that BRAINDINO_ENCODER names.

    Raises:
        ValueError: the variable is not set.
    """
    name = encoder_name()
    if not name:
        raise ValueError(
            f"{ENCODER_VARIABLE} is not set, so there is no encoder to train with. Set it to a folder or file of "
            f"weights, e.g. export {ENCODER_VARIABLE}=RUN/encoder, or to a name such as untrained:vit_tiny. "
            "(Prediction does not need it.)"
        )
    return load_encoder(name)


def encoder_identity(encoder: VisionTransformer) -> dict[str, Any]:
    """What the plans keep of an encoder: enough to build it again and to recognise its weights."""
    return {"name": encoder.name, "sha256": encoder.sha256, "architecture": encoder.architecture}


def fit_plans(
    plans: dict, configuration: str, *, patch_size: tuple[int, int] = PATCH_SIZE, largest_batch: int | None = None
) -> None:
    """Change the configuration in place to patches of another size, with at most as many pixels per batch as planned.

    There are never fewer than two patches in a batch, and never more than ``largest_batch``.

    Raises:
        ValueError: the configuration is not two-dimensional.
    """
    planned = PlansManager(plans).get_configuration(configuration)
    if len(planned.patch_size) != 2:
        raise ValueError(
            f"configuration {configuration!r} has {len(planned.patch_size)}-dimensional patches, but the encoder sees "
            "slices; train with configuration 2d: nnUNetv2_train DATASET 2d FOLD -tr nnUNetTrainerBrainDINOFrozen"
        )
    assert all(size % 16 == 0 for size in patch_size), f"patches of {patch_size} are no multiple of 16 pixels"
    batch_size = planned.batch_size * math.prod(planned.patch_size) // math.prod(patch_size)
    if largest_batch is not None:
        batch_size = min(batch_size, largest_batch)
    batch_size = int(max(MIN_BATCH_SIZE, batch_size))
    plans["configurations"][configuration].update(patch_size=list(patch_size), batch_size=batch_size)


def plan_warnings(plans: dict, configuration: str) -> list[str]:
    """What in nnU-Net's plans keeps the encoder from seeing the slices that it was trained on, and what to do about
    it.
    """
    warnings = []
    if list(plans["transpose_forward"]) != [0, 1, 2]:
        warnings.append(
            f"slices are not axial: nnU-Net cuts along the axis with the largest voxels (transpose_forward "
            f"{list(plans['transpose_forward'])}), the encoder was trained on axial slices. Resample the images so "
            "that no axis is coarser than the vertical one, convert with `braindino nnunet`, then plan again"
        )
    if not all(PlansManager(plans).get_configuration(configuration).use_mask_for_norm):
        warnings.append(
            "nnU-Net normalises over the whole image, because zeros make up less than a quarter of it: background is "
            "then not 0, as it is in the slices that the encoder was trained on. Strip the skull before converting"
        )
    return warnings
