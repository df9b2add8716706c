"""One attention function over packed tokens, and the kernels it may run on.

Crops of different sizes go through the encoder in one pass: their tokens are laid one after another on a single axis
of length T. ``groups`` says how: a sequence of (batch, tokens) pairs, each ``batch`` sequences of ``tokens`` tokens. A
token only attends to tokens of its own sequence.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from braindino.transfer import send

BACKENDS = ("sdpa", "varlen", "xformers")
"""``sdpa``: torch's scaled dot product attention, once per group; any device and dtype.
``varlen``: ``torch.nn.attention.varlen``, all groups in one kernel; CUDA, half precision.
``xformers``: memory-efficient attention with a block-diagonal mask, all groups in one kernel; the optional package."""

_PACKED_PREFERENCE = ("varlen", "xformers")
_HALF_DTYPES = (torch.bfloat16, torch.float16)

# Up to so many tokens an image cuDNN and flash attention, which work on 64 or 128 at a time, are slower than the
# memory-efficient kernel (benchmarks/RESULTS.md).
SHORT = 64
_FOR_SHORT = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

Groups = Sequence[tuple[int, int]]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups, *, backend: str = "auto"
) -> torch.Tensor:
    """Softmax attention within every sequence of a packed batch: softmax(q k^T / sqrt(head_dim)) v.

    q, k, v: (T, heads, head_dim), T = sum of batch * tokens over ``groups``. Returns (T, heads, head_dim).
    ``backend``: one of ``BACKENDS``, or "auto" (see ``choose_backend``). Raises ValueError when the groups do not add
    up to T or the backend cannot run on this device and dtype.
    """
    total = sum(batch * tokens for batch, tokens in groups)
    if total != q.shape[0]:
        raise ValueError(f"attention: groups {list(groups)} hold {total} tokens, but q has {q.shape[0]}")
    if backend == "auto":
        backend = choose_backend(q.device, q.dtype, num_groups=len(groups))
    if backend == "sdpa":
        return _sdpa(q, k, v, groups)
    _require(backend, q.device, q.dtype)
    return _KERNELS[backend](q, k, v, groups)


def attention_of_images(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Torch's scaled dot product attention of (batch, heads, tokens, head_dim), by the kernel that is fastest here."""
    if q.is_cuda and q.dtype in _HALF_DTYPES and q.shape[2] <= SHORT and not torch.compiler.is_compiling():
        with sdpa_kernel(_FOR_SHORT, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def rotate(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of x (T, ..., head_dim) by their angles, in the table's precision.

    rope: (2, T, ..., head_dim) cosines and sines, the same for both halves of head_dim.
    """
    turned: torch.Tensor = _Rotate.apply(x, rope)
    return turned


def split_and_rotate(
    qkv: torch.Tensor, rope: torch.Tensor, *, num_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T, 3 * heads * head_dim) -> q and k, turned by their angles, and v, (T, heads, head_dim) each."""
    return _SplitAndRotate.apply(qkv.unflatten(-1, (3, num_heads, -1)), rope)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rope)
        return _turned(x, rope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rope,) = ctx.saved_tensors
        return _turned(gradient, rope, back=True), None


class _SplitAndRotate(torch.autograd.Function):
    """Keeps nothing of its input, and writes its gradient into one array."""

    @staticmethod
    def forward(ctx: Any, qkv: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(rope)
        # As a copy of its own, v does not keep q and k alive from before they were turned.
        return _turned(qkv[:, 0], rope), _turned(qkv[:, 1], rope), qkv[:, 2].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rope,) = ctx.saved_tensors
        by_q, by_k, by_v = gradients
        joined = by_v.new_empty(by_v.shape[0], 3, *by_v.shape[1:])
        for place, gradient in enumerate((by_q, by_k)):
            joined[:, place] = _turned(gradient, rope, back=True)
        joined[:, 2] = by_v
        return joined, None


def _turned(x: torch.Tensor, rope: torch.Tensor, *, back: bool = False) -> torch.Tensor:
    cosines, sines = rope
    half = x.shape[-1] // 2
    sign = -1.0 if back else 1.0
    turned = x * cosines
    turned[..., :half].addcmul_(x[..., half:], sines[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sines[..., half:], value=sign)
    return turned.to(x.dtype)


def attention_of_queries(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: Groups,
    query_counts: Sequence[torch.Tensor],
    *,
    backend: str,
) -> torch.Tensor:
    """As :func:`attention`, for some of the tokens only: q (Q, heads, head_dim) lies sequence after sequence.

    ``query_counts``: for each group, (batch,) on the CPU: how many queries each of its sequences has, one or more.
    Returns (Q, heads, head_dim).
    """
    # xformers' block-diagonal bias gains nothing for so few queries.
    if backend != "xformers" and q.dtype in _HALF_DTYPES and not _probe("varlen", q.device):
        # Whatever serves whole sequences: the longest of these differs from step to step, and cuDNN, which torch's
        # attention may be, makes a plan for every shape.
        return _varlen_of_queries(q, k, v, groups, query_counts)
    return _sdpa_of_queries(q, k, v, groups, query_counts)


def choose_backend(device: torch.device | str, dtype: torch.dtype, *, num_groups: int) -> str:
    """The backend that "auto" runs.

    For half precision on CUDA with crops of several sizes it is the first of varlen and xformers that works, because
    one kernel then serves all of them; otherwise sdpa (for a single size it is the same flash kernel). From Hopper on
    it is sdpa in any case: there torch has cuDNN's kernels, which one after another are faster than the flash kernel
    for all (benchmarks/RESULTS.md).
    """
    device = torch.device(device)
    if device.type == "cuda" and dtype in _HALF_DTYPES and num_groups > 1 and not _has_cudnn_attention(device):
        for name in _PACKED_PREFERENCE:
            if not _probe(name, device):
                return name
    return "sdpa"


@functools.cache
def _has_cudnn_attention(device: torch.device) -> bool:
    return torch.backends.cuda.cudnn_sdp_enabled() and torch.cuda.get_device_capability(device) >= (9, 0)


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The names in ``BACKENDS`` that work on ``device``, found by a tiny forward and backward (once per process)."""
    return tuple(name for name in BACKENDS if not _probe(name, torch.device(device)))


def explain(device: torch.device | str = "cpu") -> str:
    """One line per backend, saying whether it works on ``device`` and if not why; then what "auto" would use."""
    device = torch.device(device)
    lines = [f"attention on {device}:"]
    for name in BACKENDS:
        reason = _probe(name, device)
        lines.append(f"  {name}: {'no (' + reason + ')' if reason else 'works'}")
    half = choose_backend(device, torch.bfloat16, num_groups=2)
    full = choose_backend(device, torch.float32, num_groups=2)
    lines.append(f"  auto uses: {half} in bfloat16, {full} in float32 (crops of several sizes)")
    return "\n".join(lines)


def _require(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    reason = _probe(backend, device)
    if reason:
        raise ValueError(f"attention backend {backend!r} does not work on {device}: {reason}; use 'auto' or 'sdpa'")
    if backend == "varlen" and dtype not in _HALF_DTYPES:
        raise ValueError(f"attention backend 'varlen' needs bfloat16 or float16, found {dtype}; use 'auto' or 'sdpa'")


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    sizes = [batch * tokens for batch, tokens in groups]
    outputs = []
    for group, *parts in zip(groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        heads_first = (part.unflatten(0, group).transpose(1, 2) for part in parts)
        outputs.append(attention_of_images(*heads_first).transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _sdpa_of_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups, query_counts: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Sequences with one query (the CLS token) go together; those with more are filled up to the longest."""
    outputs = []
    first_query = first_key = 0
    for (batch, tokens), counts in zip(groups, query_counts, strict=True):
        num_queries = int(counts.sum())
        queries = q[first_query : first_query + num_queries]
        keys, values = (
            part[first_key : first_key + batch * tokens].unflatten(0, (batch, tokens)).transpose(1, 2)
            for part in (k, v)
        )
        result = torch.empty_like(queries)
        starts = counts.cumsum(0) - counts
        for several in (False, True):
            sequences = ((counts > 1) == several).nonzero()[:, 0]
            if not len(sequences):
                continue
            longest = int(counts[sequences].max())
            ladder = torch.arange(longest)
            places = starts[sequences, None] + ladder.clamp(max=counts[sequences, None] - 1)
            real = (ladder < counts[sequences, None]).flatten().nonzero()[:, 0]
            everything = len(sequences) == batch
            chosen = send(sequences, q.device)
            places_here = send(places, q.device)
            attended = F.scaled_dot_product_attention(
                queries[places_here].transpose(1, 2),
                keys if everything else keys[chosen],
                values if everything else values[chosen],
            )
            found = attended.transpose(1, 2).flatten(0, 1)
            if len(real) < places.numel():
                found = found[send(real, q.device)]
            target = send(places.flatten()[real], q.device)
            result = result.index_copy(0, target, found)
        outputs.append(result)
        first_query += num_queries
        first_key += batch * tokens
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _varlen_of_queries(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups, query_counts: Sequence[torch.Tensor]
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    counts = torch.cat(list(query_counts))
    query_starts = send(F.pad(counts.cumsum(0), (1, 0)).to(torch.int32), q.device)
    longest = max(tokens for _, tokens in groups)
    output = varlen_attn(q, k, v, query_starts, _sequence_starts(tuple(groups), q.device), int(counts.max()), longest)
    assert isinstance(output, torch.Tensor)  # a tuple only when extra outputs are asked for
    return output


def _varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    starts = _sequence_starts(tuple(groups), q.device)
    longest = max(tokens for _, tokens in groups)
    output = varlen_attn(q, k, v, starts, starts, longest, longest)
    assert isinstance(output, torch.Tensor)  # a tuple only when extra outputs are asked for
    return output


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: Groups) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    bias = _block_diagonal(tuple(groups), q.device)
    output: torch.Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias)[0]
    return output


_KERNELS = {"sdpa": _sdpa, "varlen": _varlen, "xformers": _xformers}


@functools.lru_cache(maxsize=32)
def _sequence_starts(groups: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """(sequences + 1,) int32: where every sequence begins, and the end of the last. Every block asks again, so kept."""
    # Tensors made under inference_mode cannot be saved for a later backward, and this one outlives the call.
    with torch.inference_mode(False):
        lengths = [tokens for batch, tokens in groups for _ in range(batch)]
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return starts.to(device)


@functools.lru_cache(maxsize=32)
def _block_diagonal(groups: tuple[tuple[int, int], ...], device: torch.device) -> object:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    with torch.inference_mode(False):
        return BlockDiagonalMask.from_seqlens([tokens for batch, tokens in groups for _ in range(batch)], device=device)


@functools.cache
def _probe(backend: str, device: torch.device) -> str:
    """Empty when ``backend`` ran a forward and a backward on ``device``, else the reason in one line."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    groups = ((2, 8), (1, 16))
    try:
        with warnings.catch_warnings(), torch.inference_mode(False), torch.enable_grad():
            warnings.simplefilter("ignore")
            q, k, v = (torch.ones(32, 1, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
            output = _KERNELS[backend](q, k, v, groups)
            output.sum().backward()
            if not torch.allclose(output.float(), torch.ones_like(output, dtype=torch.float32)):
                return "it ran, but its output was wrong"
    except Exception as error:  # a kernel may fail in any way its package likes; the reason is reported, not swallowed
        first_line = next(iter(str(error).strip().splitlines()), "")
        return f"{type(error).__name__}: {first_line[:160]}"
    return ""
