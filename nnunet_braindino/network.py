"""The segmentation network of the paper: sequences fused to three channels, a ViT, a trained decoder (sec. 4.3.1)."""

from typing import NamedTuple

import torch
from torch import nn

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.decoder import LinearDecoder, PatchDecoder, decoder_blocks
from nnunet_braindino.encoder_checkpoint import EncoderNetwork

__all__ = [
    "EncoderSegmenter",
    "FineTunedSegmenter",
    "FrozenEncoderSegmenter",
    "ParameterCount",
    "count_parameters",
    "decoder_blocks",
]


class ParameterCount(NamedTuple):
    trainable: int
    total: int

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} parameters trained ({100 * self.trainable / self.total:.2f} %)"


class EncoderSegmenter(EncoderNetwork):
    """Logits (B, num_classes, H, W) from images (B, num_input_channels, H, W); H and W are multiples of 16.

    ``fusion`` is a 1x1 convolution to the encoder's three channels that starts as the average of the input channels.
    The decoder sees patch tokens after the encoder's final norm: for the paper's decoder, those of four evenly spaced
    blocks ({2, 5, 8, 11} for twelve), concatenated along the channels.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        num_input_channels: int,
        num_classes: int,
        decoder: type[PatchDecoder] | type[LinearDecoder] = PatchDecoder,
    ) -> None:
        super().__init__()
        if encoder.patch_size != 16:
            raise ValueError(
                f"{type(self).__name__}: the decoder doubles four times and needs patches of 16 pixels, "
                f"the encoder has {encoder.patch_size}"
            )
        self.blocks = decoder.blocks_read(encoder.depth)
        self.fusion = nn.Conv2d(num_input_channels, 3, kernel_size=1, bias=False)
        nn.init.constant_(self.fusion.weight, 1 / num_input_channels)
        self.encoder = encoder
        self.decoder = decoder(encoder.embed_dim, num_classes)

    def fix_fusion(self) -> None:
        """Train the fusion no further; a frozen encoder then runs without a graph."""
        self.fusion.requires_grad_(False)
        self.fusion.weight.grad = None

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(B, H / 16, W / 16, F): what the decoder reads of every patch."""
        height, width = (size // self.encoder.patch_size for size in images.shape[-2:])
        # Nothing before the decoder is trained: nothing to keep for a backward pass.
        trained = self.fusion.weight.requires_grad or self.encoder.norm.weight.requires_grad
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            tokens = self.encoder.intermediate(self.fusion(images), blocks=self.blocks, norm=True)
            features = torch.cat([block.patches for block in tokens], dim=-1)
        return features.unflatten(1, (height, width))

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes, 16 h, 16 w) from features (B, h, w, F): of a whole grid or of any part of it, since
        the decoder looks at each patch by itself."""
        return self.decoder(features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(images))


class FrozenEncoderSegmenter(EncoderSegmenter):
    """The encoder is frozen: its parameters need no gradient and it stays in ``eval()`` whatever ``train()`` is called
    with. Its graph is kept while the fusion, which sits before it, is trained through it.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        num_input_channels: int,
        num_classes: int,
        decoder: type[PatchDecoder] | type[LinearDecoder] = PatchDecoder,
    ) -> None:
        super().__init__(
            encoder.requires_grad_(False),
            num_input_channels=num_input_channels,
            num_classes=num_classes,
            decoder=decoder,
        )
        self.train()

    def train(self, mode: bool = True) -> "FrozenEncoderSegmenter":
        super().train(mode)
        self.encoder.eval()
        return self


class FineTunedSegmenter(EncoderSegmenter):
    """Everything is trained (paper sec. 4.4), but for the mask token, which segmentation does not use."""

    def __init__(self, encoder: VisionTransformer, *, num_input_channels: int, num_classes: int) -> None:
        super().__init__(encoder.requires_grad_(True), num_input_channels=num_input_channels, num_classes=num_classes)
        # Under DDP a parameter that never gets a gradient stops the training.
        encoder.mask_token.requires_grad_(False)


def count_parameters(network: nn.Module) -> ParameterCount:
    """Parameters that a training step may change, and all of them."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in network.parameters()]
    return ParameterCount(sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes))
