"""The lines of Python that load an exported encoder in the program that its format is made for.

Each snippet ends with `cls` (B, D) and `patches` (B, N, D), tokens after the final norm: the features that our own
encoder gives, whichever program computes them. What a format leaves to its reader and would go wrong unsaid (LayerNorm
eps, rounded RoPE periods, qkv bias) is written out.
"""

from pathlib import Path
from typing import Any, Literal, get_args

import torch

from braindino.vision_transformer import ARCHITECTURES, RotaryEmbedding, VisionTransformer
from braindino.weights import HEAD_DIM, RELEASED_EPS, TEACHER_EPS, InputContract

Format = Literal["native", "teacher", "dinov3", "timm", "hf"]
FORMATS: tuple[Format, ...] = get_args(Format)

WEIGHTS_FILE: dict[Format, str] = {
    "native": "encoder.safetensors",
    "teacher": "teacher_checkpoint.pth",
    "dinov3": "dinov3.pth",
    "timm": "model.safetensors",
    "hf": "model.safetensors",
}
"""Name of the weights in an export's folder."""

ROPE_BASE = 100.0
_TIMM_NAMES = {
    "vit_small": "vit_small_patch16_dinov3",
    "vit_base": "vit_base_patch16_dinov3",
    "vit_large": "vit_large_patch16_dinov3",
}
_DINOV3_EPS = {TEACHER_EPS: "layernorm", RELEASED_EPS: "layernormbf16"}
_USE = """images = torch.zeros(1, 3, {size}, {size})  # (B, 3, H, W), prepared as the model card says
with torch.inference_mode():
    {forward}
cls, patches = {cls}, {patches}  # (B, D) and (B, N, D)
"""


def architecture_name(architecture: dict[str, Any]) -> str | None:
    """The name among ours with this width, depth, number of heads, patch size and MLP ratio; None if none has them."""
    for name, build in ARCHITECTURES.items():
        with torch.device("meta"):
            known = build().architecture
        if all(
            known[key] == architecture[key] for key in ("embed_dim", "depth", "num_heads", "patch_size", "mlp_ratio")
        ):
            return name
    return None


def check_expressible(encoder: VisionTransformer, format: Format) -> None:
    """Refuse a model that the format, or the program that reads it, cannot hold.

    Raises:
        ValueError: names what does not fit and a format that holds it.
    """
    if format == "native":
        return
    architecture = encoder.architecture
    problem = ""
    if architecture["num_storage_tokens"] == 0:
        problem = "the encoder has no storage tokens, by which this layout is recognised"
    elif format != "hf" and architecture["embed_dim"] != HEAD_DIM * architecture["num_heads"]:
        problem = (
            f"the layout does not say how many heads there are and its readers take embed_dim / {HEAD_DIM} = "
            f"{architecture['embed_dim'] / HEAD_DIM:g}; the encoder has {architecture['num_heads']}"
        )
    elif format == "timm" and architecture["rope_base"] != ROPE_BASE:
        problem = f"its RoPE base is {architecture['rope_base']}, which timm files do not say; their models have 100"
    elif format in ("timm", "hf") and _periods_rounding(encoder) is None:
        problem = "its RoPE periods are not those of its rope_base, which is what this format's program computes"
    if problem:
        raise ValueError(f"--format {format} cannot hold this encoder: {problem}; use --format native")


def loading_snippet(encoder: VisionTransformer, format: Format, folder: Path) -> str:
    """Python source that loads the export in `folder` and computes the features of one image.

    Args:
        encoder: that was exported.
        format: of the export.
        folder: as it is to be written in the snippet; relative ones hold where the snippet is run.
    """
    file = repr(str(folder / WEIGHTS_FILE[format]))
    match format:
        case "native":
            return _native(encoder, folder)
        case "teacher":
            return _official(
                encoder,
                [
                    f'weights = torch.load({file}, map_location="cpu", weights_only=True)["teacher"]',
                    'stem = "backbone."  # the other keys, where there are any, are the heads',
                    "weights = {key.removeprefix(stem): weights[key] for key in weights if key.startswith(stem)}",
                ],
                # Training code masks the key bias only where there is a bias, and these files hold no mask.
                mask_k_bias=not encoder.architecture["qkv_bias"],
                qkv_bias=encoder.architecture["qkv_bias"],
            )
        case "dinov3":
            return _official(
                encoder,
                [f'weights = torch.load({file}, map_location="cpu", weights_only=True)'],
                mask_k_bias=True,
                qkv_bias=True,
            )
        case "timm":
            return _timm(encoder, file)
        case "hf":
            return _hugging_face(encoder, folder)


def _native(encoder: VisionTransformer, folder: Path) -> str:
    lines = [
        "import torch",
        "from braindino import load_encoder",
        "",
        f"encoder = load_encoder({str(folder)!r})  # frozen, float32, in eval mode",
    ]
    return _finish(encoder, lines, forward="tokens = encoder(images)", cls="tokens.cls", patches="tokens.patches")


def _official(encoder: VisionTransformer, load: list[str], *, qkv_bias: bool, mask_k_bias: bool) -> str:
    architecture = encoder.architecture
    eps = architecture["layer_norm_eps"]
    lines = [
        "import torch",
        "# DINOv3's own code, under its own licence: github.com/facebookresearch/dinov3",
        "from dinov3.models.vision_transformer import DinoVisionTransformer",
        "",
        "encoder = DinoVisionTransformer(",
        f"    patch_size={architecture['patch_size']}, embed_dim={architecture['embed_dim']}, "
        f"depth={architecture['depth']}, num_heads={architecture['num_heads']}, ffn_ratio={architecture['mlp_ratio']},",
        f"    n_storage_tokens={architecture['num_storage_tokens']}, "
        f"layerscale_init={architecture['layer_scale_init']}, qkv_bias={qkv_bias}, mask_k_bias={mask_k_bias},",
        f'    norm_layer="{_DINOV3_EPS.get(eps, "layernorm")}",  # LayerNorm eps {eps}',
        f'    pos_embed_rope_base={architecture["rope_base"]}, pos_embed_rope_dtype="fp32",',
        ")",
        *load,
        "encoder.load_state_dict(weights, strict=True)",
        "encoder.eval()",
    ]
    if eps not in _DINOV3_EPS:
        lines += [
            "for module in encoder.modules():",
            "    if isinstance(module, torch.nn.LayerNorm):",
            f"        module.eps = {eps}",
        ]
    return _finish(
        encoder,
        lines,
        forward="tokens = encoder.forward_features(images)",
        cls='tokens["x_norm_clstoken"]',
        patches='tokens["x_norm_patchtokens"]',
    )


def _timm(encoder: VisionTransformer, file: str) -> str:
    architecture = encoder.architecture
    name = _TIMM_NAMES.get(architecture_name(architecture) or "", "")
    other = [] if name else [f"{key}={architecture[key]}" for key in ("embed_dim", "depth", "num_heads")]
    # The settings in which an encoder may differ from every model that has a name.
    for theirs, ours, usual in (
        ("patch_size", "patch_size", 16),
        ("mlp_ratio", "mlp_ratio", 4),
        ("num_reg_tokens", "num_storage_tokens", 4),
    ):
        if architecture[ours] != usual:
            other.append(f"{theirs}={architecture[ours]}")
    name = (name or _TIMM_NAMES["vit_small"]) + ("_qkvb" if architecture["qkv_bias"] else "")
    lines = [
        "from functools import partial",
        "",
        "import timm",
        "import torch",
        "from safetensors.torch import load_file",
        "",
        "encoder = timm.create_model(",
        f'    "{name}",',
        "    num_classes=0,",
        f"    norm_layer=partial(timm.layers.LayerNorm, eps={architecture['layer_norm_eps']}),  # timm's own is 1e-5",
        *[f"    {', '.join(other)}," for _ in other[:1]],
        ")",
        f"encoder.load_state_dict(load_file({file}), strict=True)",
    ]
    if _periods_rounding(encoder) == "bfloat16":
        lines.append("encoder.rope.periods.copy_(encoder.rope.periods.bfloat16())  # rounded when these were trained")
    lines.append("encoder.eval()")
    return _finish_sequence(encoder, lines, "tokens = encoder.forward_features(images)")


def _hugging_face(encoder: VisionTransformer, folder: Path) -> str:
    # A relative name without a dot would be looked up on the Hub.
    place = str(folder) if folder.is_absolute() or str(folder).startswith(".") else f"./{folder}"
    lines = [
        "import torch",
        "from transformers import DINOv3ViTModel",
        "",
        f"encoder = DINOv3ViTModel.from_pretrained({place!r}).eval()",
    ]
    if _periods_rounding(encoder) == "bfloat16":
        lines += [
            "rope = encoder.rope_embeddings",
            "rope.inv_freq.copy_(1 / (1 / rope.inv_freq).bfloat16().float())  # rounded when these were trained",
        ]
    return _finish_sequence(encoder, lines, "tokens = encoder(images).last_hidden_state")


def _finish_sequence(encoder: VisionTransformer, lines: list[str], forward: str) -> str:
    first_patch = 1 + encoder.num_storage_tokens
    return _finish(encoder, lines, forward=forward, cls="tokens[:, 0]", patches=f"tokens[:, {first_patch}:]")


def _finish(encoder: VisionTransformer, lines: list[str], *, forward: str, cls: str, patches: str) -> str:
    size = (encoder.contract or InputContract()).image_size
    return "\n".join([*lines, ""]) + _USE.format(size=size, forward=forward, cls=cls, patches=patches)


def _periods_rounding(encoder: VisionTransformer) -> Literal["none", "bfloat16"] | None:
    """How the RoPE periods differ from those that `rope_base` gives; None if by more than a rounding to bfloat16."""
    architecture = encoder.architecture
    head_dim = architecture["embed_dim"] // architecture["num_heads"]
    computed = RotaryEmbedding(head_dim, architecture["rope_base"]).periods
    periods = encoder.rope_embed.periods.cpu()
    if torch.equal(periods, computed):
        return "none"
    return "bfloat16" if torch.equal(periods, computed.bfloat16().float()) else None
