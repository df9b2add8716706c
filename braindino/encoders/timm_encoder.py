"""Any timm model behind the contract, slice by slice."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from braindino.encoders.contract import Layers, layer_blocks
from braindino.encoders.slice_encoder import BatchFeatures, SliceEncoder, SlicePreparation
from braindino.weights import hash_weights, read_weight_file

FEATURES = ("cls", "pooled")


class TimmEncoder(SliceEncoder):
    """The global feature is the mean over slices of the class token (``cls``) or of what the model itself pools to
    (``pooled``).

    The feature is the class token where the model has one, although timm pools the patch tokens of some of them, such
    as DINOv3, by default. Layers are class tokens, or means of the maps, at three of the model's depths.
    """

    network: Any

    def __init__(
        self,
        network: Any,
        *,
        name: str,
        feature: str | None = None,
        image_size: int | None = None,
        inner_norm: bool = True,
        **preparation: Any,
    ) -> None:
        """``network``: of ``build_timm``. ``feature``: None for ``cls`` where there is a class token. ``image_size``:
        None for the size that the model was made for. ``inner_norm``: whether inner layers get the final norm, in
        models where it fits them. ``preparation``: other fields of ``SlicePreparation``.
        """
        if not hasattr(network, "forward_intermediates"):
            raise ValueError(
                f"timm model {name!r} has no forward_intermediates, so its layers and tokens cannot be read; "
                "choose another model, such as a ViT, a ResNet or a ConvNeXt"
            )
        has_cls = getattr(network, "cls_token", None) is not None
        feature = feature or ("cls" if has_cls else "pooled")
        if feature not in FEATURES or (feature == "cls" and not has_cls):
            choices = "cls or pooled" if has_cls else "pooled, as this model has no class token"
            raise ValueError(f"feature: found {feature!r}; expected {choices}")
        config = network.pretrained_cfg
        prepared_as = SlicePreparation(image_size=image_size or config["input_size"][-1], **preparation)
        self.feature, self.inner_norm = feature, inner_norm
        self.levels = layer_blocks(len(network.feature_info))
        self._takes_prefix = "return_prefix_tokens" in inspect.signature(network.forward_intermediates).parameters
        super().__init__(
            network,
            name=name,
            sha256=hash_weights(network.state_dict()),
            dim=network.num_features,
            preparation=prepared_as,
            reading={
                "feature": f"{feature}, mean over slices",
                "layers": list(self.levels),
                "inner_norm": inner_norm,
            },
        )

    @property
    def num_blocks(self) -> int:
        return len(self.network.feature_info)

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        return self.levels

    def _features(self, slices: Tensor) -> BatchFeatures:
        slices = slices.expand(-1, 3, -1, -1)
        options = {"return_prefix_tokens": True} if self._takes_prefix else {}
        last, levels = self.network.forward_intermediates(
            slices, indices=list(self.levels), norm=self.inner_norm, output_fmt="NCHW", **options
        )
        maps = [level[0] if isinstance(level, tuple) else level for level in levels]
        if self.feature == "cls":
            early, mid, late = (prefix[:, 0] for _, prefix in levels)
            global_ = last[:, 0]
        else:
            early, mid, late = (each.mean(dim=(2, 3)) for each in maps)
            global_ = self.network.forward_head(last, pre_logits=True)
        tokens = maps[-1]
        if last.ndim == 3:  # a transformer's sequence, after the final norm whatever the maps are
            rows, columns = tokens.shape[-2:]
            tokens = last[:, -rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))
        return BatchFeatures(global_, Layers(early, mid, late), tokens)

    def _maps(self, slices: Tensor, block: int, *, norm: bool) -> Tensor:
        [level] = self.network.forward_intermediates(
            slices.expand(-1, 3, -1, -1), indices=[block], norm=norm, output_fmt="NCHW", intermediates_only=True
        )
        assert isinstance(level, Tensor)
        return level


def build_timm(name: str, *, pretrained: bool, weights: str | Path | None = None) -> nn.Module:
    """The model without classes: with timm's own weights (downloaded or from its cache), with those of a file, or,
    if neither, random ones.

    Raises:
        ValueError: no such model; no weights, or no way to get them; a file that does not fit.
    """
    # Takes seconds, and every program that knows the encoders by name would wait for it.
    import timm

    try:
        network = timm.create_model(name, pretrained=pretrained and weights is None, num_classes=0)
    except (RuntimeError, OSError, ValueError) as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"timm:{name}: {type(error).__name__}: {first}. timm.list_models(pretrained=True) lists the names; without "
            f"network give a file, weights=PATH, or take random weights, untrained:timm:{name}"
        ) from error
    if weights is not None:
        state = read_weight_file(Path(weights))
        expected = network.state_dict()
        unknown, missing = sorted(set(state) - set(expected)), sorted(set(expected) - set(state))
        if unknown or missing:
            raise ValueError(
                f"{weights}: not the weights of timm's {name} without classes: unknown keys {unknown[:5]}, missing "
                f"keys {missing[:5]}; save them with timm.create_model({name!r}, num_classes=0)"
            )
        shapes = {key: (tuple(expected[key].shape), tuple(state[key].shape)) for key in expected}
        misshapen = [
            f"{key!r}: expected {ours}, found {theirs}" for key, (ours, theirs) in shapes.items() if ours != theirs
        ]
        if misshapen:
            raise ValueError(f"{weights}: misshapen keys {'; '.join(misshapen[:5])}")
        if not all(torch.isfinite(value).all() for value in state.values()):
            raise ValueError(f"{weights}: values that are not finite")
        network.load_state_dict(state)
    return network
