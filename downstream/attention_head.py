"""Attention pooling over the slices of a scan, then LayerNorm-Linear-GELU-Linear."""

import torch
from torch import Tensor, nn


class AttentionHead(nn.Module):
    """Weights softmax(w . LN(x_s)) of the slices x_s, their weighted mean, and the head of pooled features on it.

    w starts at zero: training starts from the plain mean, the paper's pooling. As in ``HeadStack``, LayerNorm has no
    gain and bias: what follows holds both.
    """

    def __init__(self, *, num_features: int, hidden_width: int, num_outputs: int) -> None:
        super().__init__()
        self.slice_norm = nn.LayerNorm(num_features, elementwise_affine=False)
        self.query = nn.Parameter(torch.zeros(num_features))
        self.hidden = nn.Sequential(
            nn.LayerNorm(num_features, elementwise_affine=False), nn.Linear(num_features, hidden_width), nn.GELU()
        )
        self.output = nn.Linear(hidden_width, num_outputs)

    def weights(self, features: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return (B, S) weights that sum to 1 and are 0 where the mask (B, S) is False."""
        scores = self.slice_norm(features) @ self.query
        return (scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(dim=-1)

    def forward(self, features: Tensor, mask: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """Return (B, K) of features (B, S, D); ``kept`` (B, width) holds dropout's factors on the hidden layer."""
        if mask is not None:
            features = features.masked_fill(~mask[..., None], 0.0)
        hidden = self.hidden(torch.einsum("bs,bsd->bd", self.weights(features, mask), features))
        outputs: Tensor = self.output(hidden if kept is None else hidden * kept)
        return outputs


def start_attention_head(seed: int, *, num_features: int, hidden_width: int, num_outputs: int) -> AttentionHead:
    """A head whose linear layers start like torch.nn.Linear, drawn by the seed alone."""
    head = AttentionHead(num_features=num_features, hidden_width=hidden_width, num_outputs=num_outputs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if name.startswith(("hidden.1.", "output.")):
                fan_in = num_features if name.startswith("hidden") else hidden_width
                start = torch.empty(parameter.shape).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                parameter.copy_(start)
    return head
