"""Full fine-tuning, for comparison with the frozen encoder (paper sec. 4.4)."""

from typing import Any

from torch import nn

from braindino.encoder_rates import encoder_rate
from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.network import EncoderSegmenter, FineTunedSegmenter
from nnunet_braindino.trainer import nnUNetTrainerBrainDINOFrozen


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
