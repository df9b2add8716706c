"""BM-MAE: a masked autoencoder's ViT with a tokenizer for each sequence, read at its class token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from braindino.encoders.contract import Layers, Prepared, layer_blocks
from braindino.encoders.cube import CubePreparation
from braindino.encoders.cube_encoder import CubeEncoder, CubeFeatures, as_map
from braindino.encoders.volume_transformer import PATCH, BMMAETransformer
from braindino.volume import Volume

NAME = "bm-mae"
TOKENIZERS = {"T1": "t1", "T1c": "t1ce", "T2": "t2", "FLAIR": "flair"}
"""Our name of a sequence -> the tokenizer for it."""


class BMMAE(CubeEncoder):
    """The global feature is the class token after the final norm.

    Each volume is encoded by itself, through the tokenizer of its sequence; the features of a subject's sequences may
    then be averaged (the paper's late fusion). ``network.tokenize`` also joins several sequences in one pass.
    """

    network: BMMAETransformer

    def __init__(
        self, network: BMMAETransformer, *, name: str = NAME, fit: str = "crop", inner_norm: bool = True
    ) -> None:
        """``fit`` as in ``CubePreparation``; the authors crop. ``inner_norm``: whether the final norm is applied to the
        early and middle layer too, as DINO does; the paper does not say.

        Its authors keep the orientation of BraTS files, which is LPS.
        """
        architecture = network.architecture
        self.blocks, self.inner_norm = layer_blocks(architecture["depth"]), inner_norm
        size = architecture["grid"] * PATCH
        super().__init__(
            network,
            name=name,
            dim=architecture["width"],
            preparation=CubePreparation(size=size, fit=fit, intensity="zscore", orientation="LPS"),
            reading={"feature": "class token", "layers": list(self.blocks), "inner_norm": inner_norm},
        )

    def prepare(self, volume: Volume, *, sequence: str | None = None) -> Prepared:
        """See ``VolumeEncoder``; the sequence chooses the tokenizer."""
        if TOKENIZERS.get(sequence or "", "") not in self.network.tokenizers:
            known = [ours for ours, theirs in TOKENIZERS.items() if theirs in self.network.tokenizers]
            raise ValueError(
                f"{self.identity.name}: found sequence {sequence!r}; this file has tokenizers for {', '.join(known)}: "
                "give the sequence of the scan"
            )
        return super().prepare(volume, sequence=sequence)

    @property
    def num_blocks(self) -> int:
        return len(self.network.blocks)

    @property
    def depth_blocks(self) -> tuple[int, int, int]:
        return self.blocks

    def _features(self, images: Tensor, sequences: Sequence[str | None]) -> CubeFeatures:
        outputs = self.network.intermediate(self._tokenize(images, sequences), self.blocks)
        norm = self.network.norm
        cls = [output.cls for output in outputs if output.cls is not None]
        early, mid, late = (norm(token) if self.inner_norm else token for token in cls)
        return CubeFeatures(norm(cls[-1]), Layers(early, mid, late), as_map(norm(outputs[-1].patches)))

    def _maps(self, images: Tensor, sequences: Sequence[str | None], block: int, *, norm: bool) -> Tensor:
        [output] = self.network.intermediate(self._tokenize(images, sequences), (block,))
        return as_map(self.network.norm(output.patches) if norm else output.patches)

    def _tokenize(self, images: Tensor, sequences: Sequence[str | None]) -> Tensor:
        """(B, N, D) patch tokens, each volume's through the tokenizer of its sequence."""
        return torch.cat(
            [
                self.network.tokenize({TOKENIZERS[sequence or ""]: images[index : index + 1]})
                for index, sequence in enumerate(sequences)
            ]
        )
