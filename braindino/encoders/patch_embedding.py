"""Patch embeddings of one channel for images of several (paper sec. 4.3.1)."""

import torch
import torch.nn.functional as F
from torch import nn


def embed_patches(images: torch.Tensor, projection: nn.Conv3d) -> torch.Tensor:
    """``projection`` of images (B, C, X, Y, Z); for several channels a projection of one is widened to them."""
    weight = projection.weight
    if images.shape[1] != weight.shape[1]:
        weight = widen_patch_embedding(weight, images.shape[1])
    return F.conv3d(images, weight, projection.bias, stride=projection.stride)


def widen_patch_embedding(weight: torch.Tensor, num_channels: int) -> torch.Tensor:
    """(D, C, ...) convolution weights for ``num_channels`` channels from those for one, (D, 1, ...): repeated and
    divided by the number of channels.

    The response to equal channels is the one-channel response to one of them.

    Raises:
        ValueError: the weights are not for one channel.
    """
    if weight.ndim < 3 or weight.shape[1] != 1 or num_channels < 1:
        raise ValueError(
            f"widen_patch_embedding: found weights of shape {tuple(weight.shape)} for {num_channels} channels; "
            "expected (D, 1, ...), those of a patch embedding of one channel, and at least one channel"
        )
    return weight.repeat_interleave(num_channels, dim=1) / num_channels
