"""The encoder in nnU-Net's plans and checkpoints: left out while training, carried at the end, recognised by its hash.

A frozen encoder is the same in every checkpoint of a run, so those saved on the way leave it out (ViT-B: 300 instead of
640 MB). ``checkpoint_final.pth`` holds it, so a finished model needs nothing but its own folder. nnU-Net saves and
loads through ``state_dict`` and ``load_state_dict`` of the network and ``save_checkpoint`` of the trainer; the two
classes here sit exactly there and are not bound to slices.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from braindino.atomic import replace_file
from braindino.vision_transformer import VisionTransformer
from braindino.weights import hash_weights, load_encoder
from nnunet_braindino._startup import ENCODER_VARIABLE, encoder_name
from nnunet_braindino.predictions import write_prediction_source

PLANS_KEY = "braindino"
FINAL_CHECKPOINT = "checkpoint_final.pth"
ENCODER_PREFIX = "encoder."
IDENTITY_KEY = "_extra_state"
"""torch's own key for what a module keeps beside its tensors: here the sha256 of the encoder, 32 bytes."""


def encoder_from_environment(read: Callable[[str], Any] = load_encoder) -> Any:
    """The encoder that BRAINDINO_ENCODER names, read by ``read``.

    Raises:
        ValueError: the variable is not set.
    """
    name = encoder_name()
    if not name:
        raise ValueError(
            f"{ENCODER_VARIABLE} is not set, so there is no encoder to train with. Set it to a folder or file of "
            f"weights, e.g. export {ENCODER_VARIABLE}=RUN/encoder, or to a name such as untrained:vit_tiny. "
            "(Prediction does not need it.)"
        )
    return read(name)


def encoder_identity(encoder: VisionTransformer) -> dict[str, Any]:
    """What the plans keep of an encoder: enough to build it again and to recognise its weights."""
    return {"name": encoder.name, "sha256": encoder.sha256, "architecture": encoder.architecture}


def identity_in(plans: Mapping[str, Any]) -> dict[str, Any]:
    """The identity that a trainer wrote into the plans.

    Raises:
        ValueError: there is none.
    """
    identity = plans.get(PLANS_KEY)
    if identity is None:
        raise ValueError(
            f"the plans hold no {PLANS_KEY!r} entry, so the encoder's architecture is unknown; expected the "
            "plans.json that a BrainDINO trainer wrote into the model folder"
        )
    return identity


class EncoderNetwork(nn.Module):
    """A network with a pretrained part ``encoder``, which has a ``name`` and a ``sha256``.

    Its state holds the hash beside the weights. A state without the encoder's weights loads where those are known:
    already in the network, or in the encoder that BRAINDINO_ENCODER names.
    """

    encoder: Any
    encoder_is_loaded = False
    """Whether the encoder holds pretrained weights, not those of its construction."""
    leaves_encoder_out = False
    """Whether ``state_dict`` leaves out the encoder; see :func:`encoder_left_out`."""

    read_encoder: Callable[[str], Any] = staticmethod(load_encoder)
    """How a missing encoder is read; another kind of encoder brings its own function."""

    def load_encoder_weights(self, encoder: nn.Module) -> None:
        """Take over all weights of ``encoder``, which has the same architecture."""
        self.encoder.load_state_dict(encoder.state_dict())
        self.encoder_is_loaded = True

    def hash_encoder(self) -> str:
        """sha256 of the encoder's weights as they are now."""
        return hash_weights(self.encoder.state_dict())

    def get_extra_state(self) -> torch.Tensor:
        """The encoder's hash; a tensor, since nnU-Net takes every value of a state for one."""
        return torch.frombuffer(bytearray.fromhex(self.encoder.sha256 or "00" * 32), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Nothing to keep: ``load_state_dict`` has compared it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override] # its overloads are torch's own
        state = super().state_dict(*args, **kwargs)
        if self.leaves_encoder_out:
            prefix = kwargs.get("prefix", "") + ENCODER_PREFIX
            for key in [key for key in state if key.startswith(prefix)]:
                del state[key]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """
        Raises:
            ValueError: the weights belong to another encoder, or hold none and none can be found.
            RuntimeError: a tensor is missing, unknown or misshapen.
        """
        state = dict(state_dict)
        if IDENTITY_KEY in state:
            self._compare(bytes(state[IDENTITY_KEY].tolist()).hex())
        is_trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        if not is_trained and not any(key.startswith(ENCODER_PREFIX) for key in state):
            if not self.encoder_is_loaded:
                self._find_encoder()
            state |= {f"{ENCODER_PREFIX}{key}": value for key, value in self.encoder.state_dict().items()}
        result = super().load_state_dict(state, strict, assign)
        self.encoder_is_loaded = True
        return result

    def _compare(self, found: str) -> None:
        if self.encoder.sha256 and found != self.encoder.sha256:
            raise ValueError(
                f"these weights were trained with the encoder of sha256 {found}, but here is {self.encoder.name} "
                f"(sha256 {self.encoder.sha256}). To continue a training, set {ENCODER_VARIABLE} to the first; for a "
                "prediction, keep the plans.json that was written with the checkpoint"
            )

    def _find_encoder(self) -> None:
        """Read the weights from where BRAINDINO_ENCODER says, if they are the right ones."""
        wanted = f"{self.encoder.name} (sha256 {self.encoder.sha256})"
        if not encoder_name():
            raise ValueError(
                f"this checkpoint was saved while training and leaves out the frozen encoder {wanted}. Use "
                f"{FINAL_CHECKPOINT}, which holds it, or say where it is: export {ENCODER_VARIABLE}=RUN/encoder"
            )
        encoder = type(self).read_encoder(encoder_name())
        if encoder.sha256 != self.encoder.sha256:
            raise ValueError(
                f"this checkpoint leaves out its frozen encoder {wanted}, and {ENCODER_VARIABLE} gives another one, "
                f"{encoder.name} (sha256 {encoder.sha256}). Set it to the first, or use {FINAL_CHECKPOINT}"
            )
        self.load_encoder_weights(encoder)


@contextmanager
def encoder_left_out(network: EncoderNetwork) -> Iterator[None]:
    """Within it, the state of the network has no encoder."""
    network.leaves_encoder_out = True
    try:
        yield
    finally:
        network.leaves_encoder_out = False


class EncoderCheckpoints(nnUNetTrainer):
    """The trainer's side: slim checkpoints on the way, a whole one at the end, each whole or absent on the disk.

    No deep supervision, and mirroring that can be left out.
    """

    network: Any
    inference_allowed_mirroring_axes: Any
    weights_are_of = "weights that were not saved"
    """The checkpoint that was saved of, or loaded into, the network last."""
    mirroring = True
    """Mirror in augmentation and average over mirrored predictions, as nnU-Net does (4 forward passes per slice, 8 per
    cube)."""
    trains_encoder = False
    """Whether the encoder's weights change, so that every checkpoint must hold them."""

    def save_checkpoint(self, filename: str) -> None:
        if self.local_rank != 0 or self.disable_checkpointing:
            super().save_checkpoint(filename)
            return
        network = self.plain_network()
        is_final = Path(filename).name == FINAL_CHECKPOINT
        if is_final and not self.trains_encoder:
            self._check_frozen(network)
        slim = nullcontext() if is_final or self.trains_encoder else encoder_left_out(network)
        with replace_file(filename) as temporary, slim:
            super().save_checkpoint(str(temporary))
        if is_final:
            self.weights_are_of = FINAL_CHECKPOINT

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """Continue (``--c``) or validate (``--val``); the encoder must be the one that the checkpoint was trained
        with.
        """
        try:
            super().load_checkpoint(filename_or_checkpoint)
        except ValueError as error:
            raise ValueError(f"{filename_or_checkpoint}: {error}") from error
        if isinstance(filename_or_checkpoint, str | Path):
            self.weights_are_of = Path(filename_or_checkpoint).name

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """nnU-Net's, and beside the predictions the checkpoint that made them, which nnU-Net does not tell."""
        super().perform_actual_validation(save_probabilities)
        if self.local_rank == 0:
            write_prediction_source(Path(self.output_folder) / "validation", self.weights_are_of)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Nothing to switch: the decoder has one output."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 (nnU-Net's name)
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if not self.mirroring:
            mirror_axes = self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def plain_network(self) -> Any:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network
        if isinstance(network, DistributedDataParallel):
            network = network.module
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def _check_frozen(self, network: EncoderNetwork) -> None:
        now = network.hash_encoder()
        if now != network.encoder.sha256:
            raise RuntimeError(
                f"the frozen encoder {network.encoder.name} has changed during training: sha256 {now}, expected "
                f"{network.encoder.sha256}"
            )
