"""Learning rates of an encoder that is trained together with what stands on it (paper sec. 4.4)."""

# The encoder's rate of the paper's code release, 3e-5 beside 3e-4; the paper gives none.
ENCODER_RATE = 0.1
LAYER_DECAY = 0.9
"""Each block's rate as a share of the one behind it: early features are the most general. DINOv3's own value for
ViT-L; 1 would be the code release's single rate."""


def encoder_rate(name: str, depth: int, *, share: float = ENCODER_RATE, layer_decay: float = LAYER_DECAY) -> float:
    """The learning rate of a parameter of a ``VisionTransformer`` as a multiple of the head's or decoder's: ``share``
    in the last block and the norm behind it, ``layer_decay`` times as much in every block before, and once more in the
    embedding."""
    head, _, rest = name.partition(".")
    if head == "norm":
        return share
    blocks_behind = depth - 1 - int(rest.partition(".")[0]) if head == "blocks" else depth
    return share * layer_decay**blocks_behind
