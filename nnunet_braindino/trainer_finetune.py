"""Full fine-tuning, for comparison with the frozen encoder (paper sec. 4.4)."""

from typing import Any

from torch import nn

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.network import EncoderSegmenter, FineTunedSegmenter
from nnunet_braindino.trainer import nnUNetTrainerBrainDINOFrozen

# The encoder's rate of the paper's code release, 3e-5 beside 3e-4; the paper gives none.
ENCODER_RATE = 0.1
LAYER_DECAY = 0.9
"""Each block's rate as a share of the one behind it: early features are the most general. DINOv3's own value for
ViT-L; 1 would be the code release's single rate."""


class nnUNetTrainerBrainDINOFinetune(nnUNetTrainerBrainDINOFrozen):  # noqa: N801
    """Everything is trained: decoder and fusion as in Frozen, the encoder at a tenth of their rate in its last block
    and less in earlier ones. Every checkpoint holds the encoder.
    """

    trains_encoder = True

    @classmethod
    def build_from_encoder(cls, encoder: VisionTransformer, num_input_channels: int, num_classes: int) -> nn.Module:
        return FineTunedSegmenter(encoder, num_input_channels=num_input_channels, num_classes=num_classes)

    def parameter_groups(self, network: EncoderSegmenter) -> list[dict[str, Any]]:
        # nnU-Net logs the rate of the first group.
        others = [*network.fusion.parameters(), *network.decoder.parameters()]
        by_factor: dict[float, list[nn.Parameter]] = {}
        for name, parameter in network.encoder.named_parameters():
            if parameter.requires_grad:
                by_factor.setdefault(encoder_rate(name, network.encoder.depth), []).append(parameter)
        groups = [{"params": parameters, "rate_factor": factor} for factor, parameters in by_factor.items()]
        return [{"params": others, "rate_factor": 1.0}, *groups]


def encoder_rate(name: str, depth: int) -> float:
    """The learning rate of an encoder's parameter as a multiple of the decoder's: ``ENCODER_RATE`` in the last block
    and the norm behind it, ``LAYER_DECAY`` times as much in every block before, and once more in the embedding."""
    head, _, rest = name.partition(".")
    if head == "norm":
        return ENCODER_RATE
    blocks_behind = depth - 1 - int(rest.partition(".")[0]) if head == "blocks" else depth
    return ENCODER_RATE * LAYER_DECAY**blocks_behind
