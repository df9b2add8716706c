"""A compact vision transformer (ViT-S/B/L/16 and a tiny one) with the parameter names of official DINOv3 weights.

Patch embedding, CLS and storage tokens, rotary position encoding (RoPE) on the patch tokens, pre-norm blocks with
LayerScale. Crops of different sizes run through the blocks in one pass, packed on one token axis (see
``braindino.attention``). Paper sec. 4.2: ViT-B/16, RoPE, 4 storage tokens, one grey channel replicated to three.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from braindino.attention import BACKENDS, attention, attention_of_images, choose_backend, split_and_rotate
from braindino.fused_branch import (
    Following,
    Rows,
    add_branch,
    fold_norm,
    fold_scale,
    mlp_of_normed,
    normalize,
    turned_qkv,
)
from braindino.last_block import Kept, plan_reading, read_last_block
from braindino.lean_linear import gelu_linear, linear, norm_linear, product_dtype
from braindino.own_kernels import own_kernels
from braindino.pieces import Piece, add_in_pieces, divide
from braindino.transfer import send

if TYPE_CHECKING:
    from braindino.weights import InputContract

INPUT_CHANNELS = 3
INIT_STD = 0.02


class Tokens(NamedTuple):
    """What the encoder makes of a batch of B images with D features per token."""

    cls: torch.Tensor
    """(B, D) class token."""
    storage: torch.Tensor
    """(B, S, D) storage tokens (called registers elsewhere)."""
    patches: torch.Tensor
    """(B, N, D) patch tokens, row-major over the (H / 16, W / 16) grid."""


class ReadTokens(NamedTuple):
    """Some of the tokens of a batch of B images."""

    cls: torch.Tensor
    """(B, D) class token."""
    patches: torch.Tensor
    """(M, D) the patch tokens asked for, in their order."""


class VisionTransformer(nn.Module):
    """The encoder. ``encoder(x)`` gives ``Tokens``; see ``forward``, ``forward_crops`` and ``intermediate``.

    ``layer_scale_init`` is the start of every LayerScale gamma; ``drop_path`` is the fraction of images that every
    residual branch skips in training, the same for all blocks; ``attention`` is a backend of ``braindino.attention`` or
    "auto". Parameters start as DINOv3's do, drawn from torch's global generator; ``initialize(generator)`` draws them
    anew from a generator of one's own.
    """

    name: str = ""
    """Where the weights come from; set by ``braindino.load_encoder``."""
    sha256: str = ""
    """Hash of the weights as loaded; set by ``braindino.load_encoder``."""
    checkpointing: bool = False
    """Whether training forgets what is inside each block and computes it again in the backward pass: about a third more
    time, a tenth of the memory. The last block of ``forward_read`` is kept."""
    _compiled: bool = False
    contract: "InputContract | None" = None
    """What the weights expect of their input; set by ``braindino.load_encoder``."""

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int = 16,
        num_storage_tokens: int = 4,
        mlp_ratio: int = 4,
        layer_scale_init: float = 1e-5,
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        rope_base: float = 100.0,
        drop_path: float = 0.0,
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if embed_dim % (4 * num_heads):
            raise ValueError(
                f"embed_dim {embed_dim} must be a multiple of 4 x num_heads ({num_heads}): RoPE turns quarters"
            )
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"drop_path must lie in [0, 1), found {drop_path}")
        if attention != "auto" and attention not in BACKENDS:
            raise ValueError(f"attention must be one of auto, {', '.join(BACKENDS)}; found {attention!r}")
        self.embed_dim = embed_dim
        self.depth = depth
        self.patch_size = patch_size
        self.num_storage_tokens = num_storage_tokens
        self.drop_path = drop_path
        self.attention = attention
        self._architecture: dict[str, Any] = {
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "patch_size": patch_size,
            "num_storage_tokens": num_storage_tokens,
            "mlp_ratio": mlp_ratio,
            "layer_scale_init": layer_scale_init,
            "layer_norm_eps": layer_norm_eps,
            "qkv_bias": qkv_bias,
            "rope_base": rope_base,
        }
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.storage_tokens = nn.Parameter(torch.empty(1, num_storage_tokens, embed_dim))
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.patch_embed = PatchEmbedding(embed_dim, patch_size)
        self.rope_embed = RotaryEmbedding(embed_dim // num_heads, rope_base)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, layer_norm_eps, qkv_bias) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.initialize()

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor values that decide parameters and features: ``VisionTransformer(**encoder.architecture)`` is
        the same network. How it is run (drop_path, attention) is left out."""
        return dict(self._architecture)

    @torch.no_grad()
    def initialize(self, generator: torch.Generator | None = None) -> None:
        """Draw all parameters anew, as DINOv3 starts: linear weights normal with std 0.02 (cut at +-2), their biases 0;
        patch embedding uniform within 1 / sqrt(fan in); CLS and storage tokens normal with std 0.02; mask token 0;
        LayerNorm 1 and 0; LayerScale at its start value."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INIT_STD, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                nn.init.constant_(module.gamma, self._architecture["layer_scale_init"])
        projection = self.patch_embed.proj
        bound = 1.0 / math.sqrt(projection.weight[0].numel())
        nn.init.uniform_(projection.weight, -bound, bound, generator=generator)
        assert projection.bias is not None
        nn.init.uniform_(projection.bias, -bound, bound, generator=generator)
        nn.init.normal_(self.cls_token, std=INIT_STD, generator=generator)
        nn.init.normal_(self.storage_tokens, std=INIT_STD, generator=generator)
        nn.init.zeros_(self.mask_token)

    def compile_blocks(self) -> None:
        """torch.compile every block, at its first call; ``forward_read`` computes its part of the last uncompiled."""
        self._compiled = True
        for block in self.blocks:
            block.compile()

    def forward(self, x: torch.Tensor) -> Tokens:
        """Tokens after the final norm.

        x: (B, 1, H, W) or (B, 3, H, W), H and W multiples of the patch size (else ValueError); one channel counts as
        three equal ones.
        """
        return self.forward_crops([x])[0]

    def forward_crops(
        self,
        crops: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tokens]:
        """Tokens after the final norm for every batch in ``crops``, all sizes in one packed pass.

        crops: (B, 1 or 3, H, W) each, B and size of their own. masks: for each batch (B, N) bool or None; where true,
        the patch is replaced by the mask token. ``generator`` draws the images that drop path skips (training only).
        """
        packed, groups = self._encode(crops, masks, generator, blocks={self.depth - 1})
        return self._unpack(self.norm(packed[self.depth - 1]), groups)

    def forward_read(
        self,
        crops: Sequence[torch.Tensor],
        read: Sequence[torch.Tensor | None],
        masks: Sequence[torch.Tensor | None] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[ReadTokens]:
        """As :meth:`forward_crops`, for the CLS tokens and some patch tokens; the last block computes no others.

        read: for each batch, (M,) ascending positions in its flattened (B * N) patches, on the CPU; None for none.
        ``generator``: on the CPU, as the images that drop path leaves decide what is computed.
        """
        start = self._start(crops, masks, generator, draw_on=torch.device("cpu"))
        x, normed = start.x, None
        for index in range(self.depth - 1):
            x, normed = self._run(x, normed, start, index, follows=True)
        last = 2 * (self.depth - 1)
        plan = plan_reading(
            start.groups,
            read,
            num_prefix=1 + self.num_storage_tokens,
            attention_kept=start.kept(last),
            mlp_kept=start.kept(last + 1),
            device=x.device,
        )
        block = self.blocks[-1]
        assert isinstance(block, Block)
        packing = start.packing
        if packing.fused is not None and normed is None:
            normed = normalize(x, plan.keys, eps=block.norm1.eps)
        rows = self.norm(
            read_last_block(
                block, x, plan, rope=packing.rope, groups=packing.groups, backend=packing.backend, normed=normed
            )
        )
        tokens = []
        for part, is_cls in zip(rows.split([len(flags) for flags in plan.is_cls]), plan.is_cls, strict=True):
            cls, patches = (send(flags.nonzero()[:, 0], x.device) for flags in (is_cls, ~is_cls))
            tokens.append(ReadTokens(part[cls], part[patches]))
        return tokens

    def intermediate(self, x: torch.Tensor, blocks: Sequence[int] = (2, 5, 8, 11), norm: bool = True) -> list[Tokens]:
        """Tokens after each of ``blocks`` (from 0), in the order asked for; with ``norm`` the final norm is applied."""
        outside = [index for index in blocks if not 0 <= index < self.depth]
        if outside:
            raise ValueError(f"blocks {outside} do not exist: this encoder has blocks 0 to {self.depth - 1}")
        packed, groups = self._encode([x], None, None, blocks=set(blocks))
        return [self._unpack(self.norm(packed[i]) if norm else packed[i], groups)[0] for i in blocks]

    def _encode(
        self,
        crops: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None,
        generator: torch.Generator | None,
        blocks: Collection[int],
    ) -> tuple[dict[int, torch.Tensor], list[tuple[int, int]]]:
        """The packed tokens (T, D) after each of ``blocks``, and the groups (batch, tokens) they are laid in."""
        start = self._start(crops, masks, generator)
        x, normed, wanted = start.x, None, {}
        last = max(blocks, default=-1)
        for index in range(last + 1):
            x, normed = self._run(x, normed, start, index, follows=index < last)
            if index in blocks:
                wanted[index] = x
        return wanted, start.groups

    def _run(
        self, x: torch.Tensor, normed: torch.Tensor | None, start: "_Start", index: int, *, follows: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens after a block. Fused blocks hand on what the norm of the next makes of them, if one ``follows``."""
        block = cast(Block, self.blocks[index])
        subsets = start.subsets[2 * index], start.subsets[2 * index + 1]
        if start.packing.fused is not None:
            if normed is None:
                normed = normalize(x, None if subsets[0] is None else subsets[0].rows, eps=block.norm1.eps)
            following = None
            if follows:
                following = Following(start.subsets[2 * index + 2], cast(Block, self.blocks[index + 1]).norm1.eps)
            # Called as a module, for the hooks of FSDP.
            return cast(Any, block(x, start.packing, subsets, normed, following))
        if self.checkpointing and torch.is_grad_enabled():
            # Drop path is drawn before the blocks, so that nothing random happens when one is computed again.
            result = checkpoint(block, x, start.packing, subsets, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(result, torch.Tensor)
            return result, None
        return block(x, start.packing, subsets), None

    def _start(
        self,
        crops: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor | None] | None,
        generator: torch.Generator | None,
        draw_on: torch.device | None = None,
    ) -> "_Start":
        """All that the blocks need; drop path is drawn on ``draw_on``, by default where the tokens are."""
        if masks is not None and len(masks) != len(crops):
            raise ValueError(f"{len(crops)} batches of crops but {len(masks)} masks; give None where there is no mask")
        embedded = [self._embed(crop, masks[i] if masks else None) for i, crop in enumerate(crops)]
        groups = [(tokens.shape[0], tokens.shape[1]) for tokens in embedded]
        x = torch.cat([tokens.flatten(0, 1) for tokens in embedded])
        prefix = 1 + self.num_storage_tokens
        p = self.patch_size
        tables = [self.rope_embed(crop.shape[-2] // p, crop.shape[-1] // p, prefix) for crop in crops]
        # Autocast turns q, k, v to half precision inside the blocks, so the kernel is chosen for that dtype.
        backend = self.attention
        if backend == "auto":
            backend = choose_backend(x.device, product_dtype(x), num_groups=len(groups))

        plain = not self._compiled and not torch.compiler.is_compiling()
        fused = plain and own_kernels(x)
        subsets: list[Rows | None] = [None] * (2 * self.depth)
        attended, orders = groups, None
        if self.training and self.drop_path > 0:
            attended = [(_num_kept(batch, self.drop_path), tokens) for batch, tokens in groups]
            place = generator.device if generator is not None else draw_on or x.device
            orders = _draw_orders(groups, attended, 2 * self.depth, place, generator)
            subsets = _subsets_of(orders, groups, x, with_place=fused)
        in_pieces = x.device.type == "cpu" and not self.checkpointing and plain
        scales = [batch / kept for (batch, _), (kept, _) in zip(groups, attended, strict=True)]
        pieces = divide(attended, scales) if in_pieces else None
        recompute = self.checkpointing if fused else None
        packing = _Packing(attended, _pack_rope(tables, attended), backend, pieces, recompute)
        return _Start(x, groups, packing, subsets, orders)

    def _embed(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """(B, 1 + S + N, D): CLS, storage and patch tokens before the first block."""
        if x.ndim != 4 or x.shape[1] not in (1, INPUT_CHANNELS):
            raise ValueError(f"the encoder takes (B, 1, H, W) or (B, 3, H, W), found shape {tuple(x.shape)}")
        batch, _, height, width = x.shape
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image height and width must be multiples of the patch size {self.patch_size}, "
                f"found {height} x {width}; crop, pad or resize the image first"
            )
        patches = self.patch_embed(x)
        if mask is not None:
            if mask.shape != patches.shape[:2] or mask.dtype != torch.bool:
                raise ValueError(
                    f"a mask must be bool of shape {tuple(patches.shape[:2])} (images, patches), "
                    f"found {mask.dtype} of shape {tuple(mask.shape)}"
                )
            patches = torch.where(mask[..., None], self.mask_token.to(patches.dtype), patches)
        cls, storage = self.cls_token.expand(batch, -1, -1), self.storage_tokens.expand(batch, -1, -1)
        return torch.cat([cls, storage, patches], dim=1)

    def _unpack(self, packed: torch.Tensor, groups: Sequence[tuple[int, int]]) -> list[Tokens]:
        parts = packed.split([batch * tokens for batch, tokens in groups])
        sequences = [part.unflatten(0, group) for part, group in zip(parts, groups, strict=True)]
        first_patch = 1 + self.num_storage_tokens
        return [Tokens(x[:, 0], x[:, 1:first_patch], x[:, first_patch:]) for x in sequences]


class PatchEmbedding(nn.Module):
    """Non-overlapping patches, each mapped linearly to D features."""

    def __init__(self, embed_dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(INPUT_CHANNELS, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, N, D). For one channel the weights are summed over channels: the same linear map as on
        three equal channels, at a third of the input."""
        weight = self.proj.weight
        if x.shape[1] == 1:
            weight = weight.sum(dim=1, keepdim=True)
        if x.is_cuda:
            # One product instead of cuDNN's convolution, which changes the layout of all pixels and all tokens.
            (batch, channels, height, width), (p, _) = x.shape, self.proj.kernel_size
            pixels = x.reshape(batch, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
            return F.linear(pixels.reshape(batch, -1, channels * p * p), weight.flatten(1), self.proj.bias)
        return F.conv2d(x, weight, self.proj.bias, stride=self.proj.stride).flatten(2).transpose(1, 2)


class RotaryEmbedding(nn.Module):
    """Rotary position encoding over the patch grid.

    angle = 2 pi coordinate / period; patch centres lie in [-1, 1] along rows and along columns, each by its own length;
    periods are base^(4 i / head_dim) for i < head_dim / 4, once for the row and once for the column coordinate.
    """

    periods: torch.Tensor

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        periods = base ** (2.0 * torch.arange(head_dim // 4, dtype=torch.float32) / (head_dim // 2))
        self.register_buffer("periods", periods)
        self._tables: dict[tuple[int, int, int], torch.Tensor] = {}

    def forward(self, rows: int, columns: int, num_prefix: int) -> torch.Tensor:
        """(2, num_prefix + rows * columns, head_dim): cosines and sines; the prefix tokens are not turned (1 and 0)."""
        key = (rows, columns, num_prefix)
        if key not in self._tables:
            self._tables[key] = _rope_table(self.periods, rows, columns, num_prefix)
        return self._tables[key]

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "RotaryEmbedding":
        kept = self.periods
        super()._apply(fn, recurse)
        # Rounding the periods to half precision moves features by 1e-2, so a half-precision encoder keeps them whole.
        if self.periods.dtype in (torch.float16, torch.bfloat16):
            self.periods = kept.to(self.periods.device)
        self._tables = {}
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tables = {}


class Block(nn.Module):
    """Pre-norm transformer block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x)))."""

    def __init__(self, embed_dim: int, num_heads: int, mlp_ratio: int, layer_norm_eps: float, qkv_bias: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.attn = SelfAttention(embed_dim, num_heads, qkv_bias)
        self.ls1 = LayerScale(embed_dim)
        self.norm2 = nn.LayerNorm(embed_dim, eps=layer_norm_eps)
        self.mlp = Mlp(embed_dim, mlp_ratio * embed_dim)
        self.ls2 = LayerScale(embed_dim)

    def forward(
        self,
        x: torch.Tensor,
        packing: "_Packing",
        subsets: tuple[Rows | None, Rows | None],
        normed: torch.Tensor | None = None,
        following: Following | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """(T, D) -> (T, D). The subsets restrict the attention branch and the MLP to some images; ``packing`` is what
        attention then sees.

        With ``normed``, the tokens that the attention branch sees, normalised, by the kernels of ``fused_branch``:
        then also returns those of the result that the branch after this block sees, if one is ``following``.
        """
        if normed is not None:
            return self._fused(x, normed, packing, subsets, following)
        # Once for all pieces.
        attn_out, mlp_out = self.ls1.folded(self.attn.proj), self.ls2.folded(self.mlp.fc2)

        def attend(rows: torch.Tensor, piece: Piece | None = None) -> torch.Tensor:
            seen = packing if piece is None else packing.of(piece)
            return cast(torch.Tensor, self.attn(rows, seen, norm=self.norm1, out=attn_out))

        def transform(rows: torch.Tensor, _piece: Piece | None = None) -> torch.Tensor:
            return cast(torch.Tensor, self.mlp(rows, norm=self.norm2, out=mlp_out))

        if packing.pieces is None:
            return _add_branch(_add_branch(x, attend, subsets[0]), transform, subsets[1])
        for branch, modules, out, subset in (
            (attend, (self.norm1, self.attn.qkv), attn_out, subsets[0]),
            (transform, (self.norm2, self.mlp.fc1), mlp_out, subsets[1]),
        ):
            parameters = [*(parameter for module in modules for parameter in module.parameters()), *out]
            x = add_in_pieces(x, branch, parameters, packing.pieces, rows=None if subset is None else subset.rows)
        return x

    def _fused(
        self,
        x: torch.Tensor,
        normed: torch.Tensor,
        packing: "_Packing",
        subsets: tuple[Rows | None, Rows | None],
        following: Following | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        assert packing.fused is not None
        into, out = fold_norm(self.norm1, self.attn.qkv), fold_scale(self.attn.proj, self.ls1.gamma)
        x, for_mlp = add_branch(
            x,
            normed,
            lambda seen: self.attn.of_normed(seen, packing, into=into, out=out),
            (*into, *out),
            subset=subsets[0],
            eps=self.norm1.eps,
            following=Following(subsets[1], self.norm2.eps),
            recompute=packing.fused,
        )
        assert for_mlp is not None
        first, second = fold_norm(self.norm2, self.mlp.fc1), fold_scale(self.mlp.fc2, self.ls2.gamma)
        return add_branch(
            x,
            for_mlp,
            lambda seen: mlp_of_normed(seen, first, second),
            (*first, *second),
            subset=subsets[1],
            eps=self.norm2.eps,
            following=following,
            recompute=packing.fused,
        )


class SelfAttention(nn.Module):
    """Multi-head self-attention with rotary position encoding."""

    def __init__(self, embed_dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self, x: torch.Tensor, packing: "_Packing", *, norm: nn.LayerNorm, out: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """(T, D) -> (T, D), the norm before it included; ``out`` is its last map with LayerScale folded into it."""
        qkv = norm_linear(x, norm, self.qkv.weight, self.qkv.bias)
        q, k, v = split_and_rotate(qkv, packing.rope, num_heads=self.num_heads)
        seen = attention(q, k, v, packing.groups, backend=packing.backend)
        return linear(seen.flatten(1), *out)

    def of_normed(
        self,
        normed: torch.Tensor,
        packing: "_Packing",
        *,
        into: tuple[torch.Tensor, torch.Tensor],
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """As forward, of tokens normalised before; the norm's weights are folded into the first map, ``into``."""
        # Groups that attention takes one by one need no common gradient of q, k and v put together first.
        in_groups = packing.backend == "sdpa"
        groups = packing.groups if in_groups else [(1, len(normed))]
        parts = turned_qkv(normed, *into, packing.rope, num_heads=self.num_heads, groups=groups)
        if in_groups:
            outputs = [attention_of_images(*qkv).transpose(1, 2).flatten(0, 1) for qkv in parts]
            seen = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        else:
            q, k, v = (part[0].transpose(0, 1) for part in parts[0])
            seen = attention(q, k, v, packing.groups, backend=packing.backend)
        return linear(seen.flatten(1), *out)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, embed_dim)

    def forward(self, x: torch.Tensor, *, norm: nn.LayerNorm, out: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """(T, D) -> (T, D), the norm before it included; ``out`` is its last map with LayerScale folded into it."""
        return gelu_linear(norm_linear(x, norm, self.fc1.weight, self.fc1.bias), *out)


class LayerScale(nn.Module):
    """A learned factor per feature of the linear map before it."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(embed_dim))

    def folded(self, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the map and this factor in one: (D, D') and (D,). Scaling the weights instead of every
        token spares a pass over the tokens and what autograd would keep of it."""
        return linear.weight * self.gamma[:, None], linear.bias * self.gamma


def vit_tiny(**overrides: Any) -> VisionTransformer:
    """192 features, 12 blocks, 3 heads: for tests and demonstrations."""
    return VisionTransformer(**{"embed_dim": 192, "depth": 12, "num_heads": 3, **overrides})


def vit_small(**overrides: Any) -> VisionTransformer:
    """384 features, 12 blocks, 6 heads."""
    return VisionTransformer(**{"embed_dim": 384, "depth": 12, "num_heads": 6, **overrides})


def vit_base(**overrides: Any) -> VisionTransformer:
    """768 features, 12 blocks, 12 heads: the encoder of the paper (sec. 4.2)."""
    return VisionTransformer(**{"embed_dim": 768, "depth": 12, "num_heads": 12, **overrides})


def vit_large(**overrides: Any) -> VisionTransformer:
    """1024 features, 24 blocks, 16 heads."""
    return VisionTransformer(**{"embed_dim": 1024, "depth": 24, "num_heads": 16, **overrides})


ARCHITECTURES: dict[str, Callable[..., VisionTransformer]] = {
    "vit_tiny": vit_tiny,
    "vit_small": vit_small,
    "vit_base": vit_base,
    "vit_large": vit_large,
}


class _Packing(NamedTuple):
    """How the tokens that attention sees are laid out."""

    groups: list[tuple[int, int]]
    rope: torch.Tensor  # (2, T, 1, head_dim)
    backend: str
    pieces: list[Piece] | None  # what a block works on at a time; None = on everything
    fused: bool | None  # by the kernels of ``fused_branch``: False, or True to compute its inside again; None = not

    def of(self, piece: Piece) -> "_Packing":
        return _Packing([piece.group], self.rope[:, piece.rows], self.backend, None, None)


def _num_kept(batch: int, drop_path: float) -> int:
    return max(int(batch * (1.0 - drop_path)), 1)


class _Start(NamedTuple):
    """What the blocks begin with."""

    x: torch.Tensor  # (T, D)
    groups: list[tuple[int, int]]
    packing: _Packing
    subsets: "list[Rows | None]"
    orders: list[torch.Tensor] | None  # for each group (branches, kept) images; None without drop path

    def kept(self, branch: int) -> list[Kept] | None:
        """What drop path leaves of each batch in one residual branch."""
        if self.orders is None:
            return None
        return [
            Kept(order[branch], batch / order.shape[1])
            for order, (batch, _) in zip(self.orders, self.groups, strict=True)
        ]


def _draw_orders(
    groups: Sequence[tuple[int, int]],
    kept_groups: Sequence[tuple[int, int]],
    num_branches: int,
    device: torch.device,
    generator: torch.Generator | None,
) -> list[torch.Tensor]:
    """For each group (num_branches, kept): ``kept`` of its images at random for every residual branch."""
    return [
        torch.rand(num_branches, batch, generator=generator, device=device).argsort(dim=1)[:, :kept]
        for (batch, _), (kept, _) in zip(groups, kept_groups, strict=True)
    ]


def _subsets_of(
    orders: Sequence[torch.Tensor], groups: Sequence[tuple[int, int]], x: torch.Tensor, *, with_place: bool
) -> list[Rows | None]:
    """The tokens of the images drawn, all branches at once: one transfer to the device of ``x`` instead of one each.

    Their scale, batch / kept, keeps the mean of a branch over draws. Where they are found (``place``) only kernels ask.
    """
    rows, scales = [], []
    start = 0
    device, dtype = x.device, torch.promote_types(x.dtype, torch.float32)  # bfloat16 would round batch / kept by 0.4 %
    for (batch, tokens), order in zip(groups, orders, strict=True):
        kept = order.shape[1]
        first_rows = start + tokens * send(order, device)
        rows.append((first_rows[..., None] + torch.arange(tokens, device=device)).flatten(1))
        scales.append(torch.full((kept * tokens,), batch / kept, device=device, dtype=dtype))
        start += batch * tokens
    scale, every = torch.cat(scales), torch.cat(rows, dim=1)
    if not with_place:
        return [Rows(branch_rows, None, scale) for branch_rows in every]
    place = torch.full((len(every), start), -1, dtype=torch.int32, device=device)
    place.scatter_(1, every, torch.arange(every.shape[1], dtype=torch.int32, device=device).expand_as(every))
    return [Rows(branch_rows, branch_place, scale) for branch_rows, branch_place in zip(every, place, strict=True)]


def _add_branch(x: torch.Tensor, branch: Callable[[torch.Tensor], torch.Tensor], subset: Rows | None) -> torch.Tensor:
    """x + branch(x); with a subset the branch is computed and added for those rows only."""
    if subset is None:
        return x + branch(x)
    return x.index_add(0, subset.rows, (branch(x[subset.rows]) * subset.scale[:, None]).to(x.dtype))


def _rope_table(periods: torch.Tensor, rows: int, columns: int, num_prefix: int) -> torch.Tensor:
    """(2, num_prefix + rows * columns, 4 * len(periods)) cosines and sines, in the dtype of ``periods``."""
    along_rows, along_columns = (
        torch.arange(0.5, n, device=periods.device, dtype=periods.dtype) / n * 2.0 - 1.0 for n in (rows, columns)
    )
    grid = torch.stack(torch.meshgrid(along_rows, along_columns, indexing="ij"), dim=-1).flatten(0, 1)
    angles = (2 * math.pi * grid[:, :, None] / periods).flatten(1).tile(2)
    angles = torch.cat([angles.new_zeros(num_prefix, angles.shape[1]), angles])
    return torch.stack([angles.cos(), angles.sin()])


def _pack_rope(tables: Sequence[torch.Tensor], groups: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(2, T, 1, head_dim): every sequence's table, laid out as the tokens are."""
    repeated = [table.repeat(1, batch, 1) for table, (batch, _) in zip(tables, groups, strict=True)]
    return torch.cat(repeated, dim=1)[:, :, None]
