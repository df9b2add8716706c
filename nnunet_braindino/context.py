"""Neighbouring slices: a light trained module between the frozen features of adjacent slices.

The paper's first limitation is that each slice is seen by itself. Here every slice of a stack is encoded by itself, as
before, and then each patch looks at the patches around it in its own and the two adjacent slices.
"""

import torch
from torch import nn

from braindino.vision_transformer import VisionTransformer
from nnunet_braindino.network import FrozenEncoderSegmenter

REACH = 1
"""Slices to each side that a patch looks at; as many patches in the plane."""
NARROWING = 12
"""The features are compressed by this factor where slices are compared: 3072 to 256 for ViT-B."""


class SliceContext(nn.Module):
    """Features (B, S, h, w, F) of S adjacent slices, each with what its neighbourhood adds to it.

    F -> F / 12, 3x3x3 convolution over slices, rows and columns, GELU, back to F, added. The last layer starts at 0,
    so that training starts from the network without context. What lies outside the stack counts as 0.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        width = num_features // NARROWING
        self.narrow = nn.Linear(num_features, width)
        self.compare = nn.Conv3d(width, width, kernel_size=2 * REACH + 1, padding=REACH)
        self.widen = nn.Linear(width, num_features)
        nn.init.zeros_(self.widen.weight)
        nn.init.zeros_(self.widen.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        compared = self.compare(self.narrow(features).movedim(-1, 1)).movedim(1, -1)
        return features + self.widen(nn.functional.gelu(compared))


class ContextSegmenter(FrozenEncoderSegmenter):
    """Logits (B, num_classes, S, H, W) from stacks of adjacent slices (B, num_input_channels, S, H, W), any S."""

    def __init__(self, encoder: VisionTransformer, *, num_input_channels: int, num_classes: int) -> None:
        super().__init__(encoder, num_input_channels=num_input_channels, num_classes=num_classes)
        self.context = SliceContext(len(self.blocks) * encoder.embed_dim)

    def forward(self, stacks: torch.Tensor) -> torch.Tensor:
        batch, _, num_slices, *_ = stacks.shape
        features = self.encode(stacks.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, num_slices))
        logits = self.decode(self.context(features).flatten(0, 1))
        return logits.unflatten(0, (batch, num_slices)).transpose(1, 2)
