"""Projection head shared in form by the DINO (CLS) and the iBOT (patch) objective."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ProjectionHead(nn.Module):
    """Three-layer MLP, L2 normalisation, prototypes: (..., D) features -> (..., K) logits (paper sec. 4.2).

    Linear(D, hidden) - GELU - Linear(hidden, hidden) - GELU - Linear(hidden, bottleneck), normalise, Linear(bottleneck,
    K) without bias. The prototypes carry no weight normalisation. Weights start from a normal of deviation 0.02 cut at
    2 (absolute), biases from 0. Parameter names are those of DINOv3 teacher files (mlp.0, mlp.2, mlp.4, last_layer).
    """

    def __init__(
        self,
        embed_dim: int,
        *,
        num_prototypes: int = 65536,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.last_layer = nn.Linear(bottleneck_dim, num_prototypes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(self.project(features))

    def project(self, features: Tensor) -> Tensor:
        """Unit vectors in the bottleneck, before the prototypes: (..., D) -> (..., bottleneck)."""
        return F.normalize(self.mlp(features), dim=-1, eps=1e-6)
