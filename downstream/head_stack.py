"""M independent heads with their parameters in one array, and the forward and backward pass by hand.

LayerNorm has no gain and bias of its own, since the linear layer behind it holds both: what it gives is a constant of
the data, computed once, before training, and needs no gradient (docs/decisions.md). What a step costs is its passes
over arrays as large as the weights (2 MB for the paper's head): two products, of which each reads or writes one such
array once, and the optimiser. All that a step computes has its place from step to step: memory that is new in every
step costs as much as what is written into it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class HeadStack:
    """LayerNorm(D) - Linear(D, width) - GELU - Linear(width, K), or LayerNorm(D) - Linear(D, K), M times.

    Attributes:
        flat: (M, P) all parameters; of each, ``hidden_weight`` (M, D, width), ``hidden_bias`` (M, 1, width),
            ``output_weight``, ``output_bias`` are views.
        gradient: (M, P) their gradients after ``backward``.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        num_features: int,
        hidden_width: int | None,
        num_outputs: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start like torch.nn.Linear: uniform within one over the root of the fan-in.

        Args:
            seeds: of each head's start.
            num_features: D.
            hidden_width: None for a linear head.
            num_outputs: K.
            device: of the parameters.
            dtype: of the parameters.
        """
        inner = num_features if hidden_width is None else hidden_width
        shapes: dict[str, tuple[int, int]] = {}
        if hidden_width is not None:
            shapes |= {"hidden_weight": (num_features, hidden_width), "hidden_bias": (1, hidden_width)}
        shapes |= {"output_weight": (inner, num_outputs), "output_bias": (1, num_outputs)}
        total = sum(a * b for a, b in shapes.values())
        self.flat = torch.empty(len(seeds), total, device=device, dtype=dtype)
        self.gradient = torch.zeros_like(self.flat)
        self.parameters = _views(self.flat, shapes)
        self.gradients = _views(self.gradient, shapes)
        self._room: dict[str, Tensor] = {}
        for index, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for layer, fan_in in (("hidden", num_features), ("output", inner)):
                for name in (f"{layer}_weight", f"{layer}_bias"):
                    if name in shapes:
                        start = torch.empty(shapes[name]).uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)
                        self.parameters[name][index] = start

    def outputs(self, normalised: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return (M, B, K) of features after LayerNorm (M, B, D); ``kept`` as for ``backward``."""
        p, x = self.parameters, normalised
        if "hidden_weight" in p:
            x = torch.nn.functional.gelu(torch.baddbmm(p["hidden_bias"], x, p["hidden_weight"]))
        if kept is not None:
            x = x * kept
        return torch.baddbmm(p["output_bias"], x, p["output_weight"])

    def backward(
        self, normalised: Tensor, loss_gradient: Callable[[Tensor], Tensor], kept: Tensor | None = None
    ) -> None:
        """Write the gradients of one batch into ``gradient``.

        Args:
            normalised: (M, B, D) features after LayerNorm.
            loss_gradient: of outputs (M, B, K), with respect to them.
            kept: (M, B, width or D) dropout's factors, 0 or 1 / (1 - p).
        """
        p, g, room = self.parameters, self.gradients, self._room_for(normalised.shape[1])
        inner = normalised
        if "hidden_weight" in p:
            before = torch.baddbmm(p["hidden_bias"], normalised, p["hidden_weight"], out=room["before"])
            inner = torch.ops.aten.gelu.out(before, out=room["inner"])
        if kept is not None:
            inner = torch.mul(inner, kept, out=room["inner"])
        at_outputs = loss_gradient(torch.baddbmm(p["output_bias"], inner, p["output_weight"], out=room["outputs"]))
        torch.bmm(inner.mT, at_outputs, out=g["output_weight"])
        torch.sum(at_outputs, dim=1, keepdim=True, out=g["output_bias"])
        if "hidden_weight" in p:
            at_inner = torch.bmm(at_outputs, p["output_weight"].mT, out=room["at_inner"])
            if kept is not None:
                at_inner *= kept
            at_hidden = torch.ops.aten.gelu_backward.grad_input(at_inner, before, grad_input=room["inner"])
            torch.bmm(normalised.mT, at_hidden, out=g["hidden_weight"])
            torch.sum(at_hidden, dim=1, keepdim=True, out=g["hidden_bias"])

    def _room_for(self, batch: int) -> dict[str, Tensor]:
        """For what ``backward`` computes of ``batch`` cases; ``inner`` serves once more on the way back."""
        if not self._room or self._room["inner"].shape[1] != batch:
            inner, outputs = self.parameters["output_weight"].shape[1:]
            widths = {"before": inner, "inner": inner, "at_inner": inner, "outputs": outputs}
            self._room = {name: self.flat.new_empty(len(self.flat), batch, width) for name, width in widths.items()}
        return self._room


def _views(flat: Tensor, shapes: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    parts = flat.split([a * b for a, b in shapes.values()], dim=1)
    return {name: part.view(len(flat), *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
