"""The trainer that looks at neighbouring slices; beyond the paper."""

from torch import nn

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.context import ContextSegmenter
from nnunet_braindino.trainer import nnUNetTrainerBrainDINOFrozen

NUM_SLICES = 5


class nnUNetTrainerBrainDINOContext(nnUNetTrainerBrainDINOFrozen):  # noqa: N801
    """As Frozen, on stacks of five adjacent slices with ``SliceContext`` between encoder and decoder.

    The configuration stays 2d, preprocessed as before; only its patches become (5, 256, 256), which nnU-Net's own
    loader cuts from the volumes. Every slice of a stack is predicted and counts in the loss, so an epoch encodes as
    many slices as one of Frozen. Augmentation turns and scales a stack in the plane, as a slice. ``nnUNetv2_predict``
    slides overlapping stacks over the volume; ``braindino segment`` sees the whole volume as one stack.
    """

    num_slices = NUM_SLICES

    @classmethod
    def build_from_encoder(cls, encoder: VisionTransformer, num_input_channels: int, num_classes: int) -> nn.Module:
        return ContextSegmenter(encoder, num_input_channels=num_input_channels, num_classes=num_classes)

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if mirror_axes is not None:
            # As for single slices: the head is not turned upside down.
            mirror_axes = tuple(axis for axis in mirror_axes if axis)
            self.inference_allowed_mirroring_axes = mirror_axes
        return rotation, dummy_2d, initial_patch_size, mirror_axes
