"""The last block of the encoder, computed only for the tokens that somebody reads.

The losses of pretraining read the CLS token of every crop and the masked patches of the global ones. Up to the last
block all tokens matter, since they attend to each other; in it, keys and values of all tokens are needed, but queries,
the rest of the attention branch and the MLP only where the output is read. Outputs and gradients are the same as those
of the whole block; about 6 % of a training step is saved at the paper's setting.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from braindino.attention import attention_of_queries, rotate
from braindino.fused_branch import fold_norm
from braindino.lean_linear import linear
from braindino.transfer import send

if TYPE_CHECKING:
    from braindino.vision_transformer import Block


class Kept(NamedTuple):
    """The images of one batch that a residual branch is computed for, when drop path skips the others."""

    order: torch.Tensor
    """(kept,) images, on the CPU, in the order in which their tokens are laid."""
    scale: float
    """Images over kept images: what their branch is multiplied by."""


class ReadPlan(NamedTuple):
    """Which rows the last block works on; R rows are read, in the order of batches, images and tokens.

    Attributes:
        rows: (R,) of the packed tokens.
        is_cls: for each batch, (R of it,) bool on the CPU: CLS token or patch.
        keys: (T_kept,) rows that attention sees; None for all of them.
        queries: (Q,) which of these rows ask.
        query_counts: for each batch, (images that attend,) how many of its tokens ask, on the CPU.
        attended: (Q,) which of the R rows those are.
        attention_scale: (Q, 1), None where nothing is dropped.
        mlp: (P,) rows of the R that the MLP is computed for; None for all.
        mlp_scale: (P, 1), None where nothing is dropped.
    """

    rows: torch.Tensor
    is_cls: list[torch.Tensor]
    keys: torch.Tensor | None
    queries: torch.Tensor
    query_counts: list[torch.Tensor]
    attended: torch.Tensor
    attention_scale: torch.Tensor | None
    mlp: torch.Tensor | None
    mlp_scale: torch.Tensor | None


def plan_reading(
    groups: Sequence[tuple[int, int]],
    read: Sequence[torch.Tensor | None],
    *,
    num_prefix: int,
    attention_kept: Sequence[Kept] | None,
    mlp_kept: Sequence[Kept] | None,
    device: torch.device,
) -> ReadPlan:
    """
    Args:
        groups: (batch, tokens) of each batch of crops.
        read: for each batch, (M,) ascending positions in its flattened (batch * patches) patches on the CPU, or None.
        num_prefix: CLS and storage tokens of an image.
        attention_kept, mlp_kept: what drop path leaves, a part for each batch; None without drop path.
        device: where the block runs.
    """
    rows, is_cls, queries, counts, attended, attention_scale, mlp, mlp_scale, keys = ([] for _ in range(9))
    first_row = first_key = first_read = 0
    for index, ((batch, tokens), positions) in enumerate(zip(groups, read, strict=True)):
        patches = tokens - num_prefix
        inside = [torch.arange(batch) * tokens]
        if positions is not None:
            inside.append(positions // patches * tokens + num_prefix + positions % patches)
        local = torch.cat(inside).sort().values
        image, token = local // tokens, local % tokens
        rows.append(first_row + local)
        is_cls.append(token == 0)
        count = torch.bincount(image, minlength=batch)
        if attention_kept is None:
            queries.append(first_key + local)
            attended.append(first_read + torch.arange(len(local)))
            counts.append(count)
            first_key += batch * tokens
        else:
            order, scale = attention_kept[index]
            place = torch.full((batch,), -1).index_copy(0, order, torch.arange(len(order)))
            asking = (place[image] >= 0).nonzero()[:, 0]
            asking = asking[place[image[asking]].argsort(stable=True)]
            queries.append(first_key + place[image[asking]] * tokens + token[asking])
            attended.append(first_read + asking)
            counts.append(count[order])
            attention_scale.append(torch.full((len(asking), 1), scale))
            keys.append((first_row + order[:, None] * tokens + torch.arange(tokens)).flatten())
            first_key += len(order) * tokens
        if mlp_kept is not None:
            order, scale = mlp_kept[index]
            kept = torch.zeros(batch, dtype=torch.bool).index_fill(0, order, True)
            mlp.append(first_read + kept[image].nonzero()[:, 0])
            mlp_scale.append(torch.full((len(mlp[-1]), 1), scale))
        first_row += batch * tokens
        first_read += len(local)

    def together(parts: list[torch.Tensor]) -> torch.Tensor | None:
        return send(torch.cat(parts), device) if parts else None

    all_rows, all_queries, all_attended = together(rows), together(queries), together(attended)
    assert all_rows is not None and all_queries is not None and all_attended is not None
    return ReadPlan(
        all_rows,
        is_cls,
        together(keys),
        all_queries,
        counts,
        all_attended,
        together(attention_scale),
        together(mlp),
        together(mlp_scale),
    )


def read_last_block(
    block: "Block",
    x: torch.Tensor,
    plan: ReadPlan,
    *,
    rope: torch.Tensor,
    groups: Sequence[tuple[int, int]],
    backend: str,
    normed: torch.Tensor | None,
) -> torch.Tensor:
    """(T, D) packed tokens before the block -> (R, D) tokens after it, those that are read.

    Args:
        block: the last one.
        x: all tokens.
        plan: see :class:`ReadPlan`.
        rope: (2, T_kept, 1, head_dim) of the rows that attention sees.
        groups: (images that attend, tokens) of each batch.
        backend: of ``braindino.attention``.
        normed: (T_kept, D) the rows that attention sees, normalised by the kernels of ``braindino.fused_branch``; None
            to do it here.
    """
    attn = block.attn
    weight: torch.Tensor
    bias: torch.Tensor | None
    if normed is not None:
        weight, bias = fold_norm(block.norm1, attn.qkv)
    else:
        normed = block.norm1(x if plan.keys is None else x[plan.keys])
        weight, bias = attn.qkv.weight, attn.qkv.bias
    width = normed.shape[1]
    q = linear(normed[plan.queries], weight[:width], None if bias is None else bias[:width])
    kv = linear(normed, weight[width:], None if bias is None else bias[width:])
    k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).unbind(dim=1)
    q = rotate(q.unflatten(-1, (attn.num_heads, -1)), rope[:, plan.queries])
    seen = attention_of_queries(q, rotate(k, rope), v.contiguous(), groups, plan.query_counts, backend=backend)
    branch = linear(seen.flatten(1), *block.ls1.folded(attn.proj))
    result = x[plan.rows]
    if plan.attention_scale is None:
        result = result + branch
    else:
        result = result.index_add(0, plan.attended, (branch * plan.attention_scale).to(result.dtype))
    if plan.mlp is None or plan.mlp_scale is None:
        return result + block.mlp(result, norm=block.norm2, out=block.ls2.folded(block.mlp.fc2))
    branch = block.mlp(result[plan.mlp], norm=block.norm2, out=block.ls2.folded(block.mlp.fc2)) * plan.mlp_scale
    return result.index_add(0, plan.mlp, branch.to(result.dtype))
