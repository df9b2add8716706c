"""The segmentation network of the paper: sequences fused to three channels, a frozen ViT, a trained decoder (sec.
4.3.1).
"""

from typing import NamedTuple

import torch
from torch import nn

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.decoder import PatchDecoder


class ParameterCount(NamedTuple):
    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters trained ({100 * self.trainable / self.total:.2f} %)"


class FrozenEncoderSegmenter(nn.Module):
    """Logits (B, num_classes, H, W) from images (B, num_input_channels, H, W); H and W are multiples of 16.

    ``fusion`` is a 1x1 convolution to the encoder's three channels that starts as the average of the input channels.
    The encoder is frozen: its parameters need no gradient and it stays in ``eval()`` whatever ``train()`` is called
    with. Its graph is kept all the same, because the fusion sits before it and is trained through it.

    The decoder sees the patch tokens of four evenly spaced blocks ({2, 5, 8, 11} for twelve), each after the
    encoder's final norm, concatenated along the channels.
    """

    def __init__(self, encoder: VisionTransformer, *, num_input_channels: int, num_classes: int) -> None:
        super().__init__()
        if encoder.patch_size != 16:
            raise ValueError(
                f"FrozenEncoderSegmenter: the decoder doubles four times and needs patches of 16 pixels, "
                f"the encoder has {encoder.patch_size}"
            )
        self.blocks = decoder_blocks(encoder.depth)
        self.fusion = nn.Conv2d(num_input_channels, 3, kernel_size=1, bias=False)
        nn.init.constant_(self.fusion.weight, 1 / num_input_channels)
        self.encoder = encoder.requires_grad_(False)
        self.decoder = PatchDecoder(encoder.embed_dim, num_classes)
        self.train()

    def train(self, mode: bool = True) -> "FrozenEncoderSegmenter":
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        height, width = (size // self.encoder.patch_size for size in images.shape[-2:])
        tokens = self.encoder.intermediate(self.fusion(images), blocks=self.blocks, norm=True)
        features = torch.cat([block.patches for block in tokens], dim=-1)
        return self.decoder(features.transpose(1, 2).unflatten(2, (height, width)))


def decoder_blocks(depth: int) -> tuple[int, int, int, int]:
    """The last block of each quarter of the encoder: (2, 5, 8, 11) for the paper's twelve blocks."""
    if depth < 4:
        raise ValueError(f"decoder_blocks: the decoder reads four blocks, the encoder has {depth}")
    first, second, third, fourth = (depth // 4 * quarter - 1 for quarter in (1, 2, 3, 4))
    return first, second, third, fourth


def count_parameters(network: nn.Module) -> ParameterCount:
    """Parameters that a training step may change, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
