"""Every setting of a pretraining run, with its unit and its source; the defaults are those of recipe `stage1`.

"paper" is sec. 4.2 of the BrainDINO paper. Where it is silent the value is the one its ancestors use: "DINOv3" is that
code's ViT-L ImageNet-1k setting (the file MedDINOv3's author names as his), "DINOv3 7B" that of its largest model.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from braindino.pretrain.schedules import LrScaling

PATCH_SIZE = 16
SLICE_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Encoder and heads."""

    architecture: Literal["vit_tiny", "vit_small", "vit_base", "vit_large"] = "vit_base"
    """Encoder, patches of 16 px, rotary positions (paper: ViT-B/16)."""
    depth: int | None = None
    """Blocks, where the architecture's own number is too many, as in a demonstration on a CPU."""
    num_storage_tokens: int = 4
    """Learned storage tokens beside the CLS token (paper)."""
    layer_scale_init: float = 1e-5
    """Start of the learned factor of each residual branch (DINOv3)."""
    drop_path: float = 0.2
    """Fraction of images each residual branch of the student skips, the same in every block (the paper is silent; the
    loaders of MedDINOv3 and BrainDINO say 0.2, DINOv3 0.3)."""
    layer_norm_eps: float | None = None
    """Eps of the encoder's LayerNorms. None takes over that of the encoder or run in --init-from (released DINOv3 1e-5,
    their training code 1e-6), or else is 1e-6 (DINOv3); config.yaml then holds the number."""
    num_prototypes: int = 65536
    """Prototypes K of the DINO and of the iBOT head (paper)."""
    head_hidden_dim: int = 2048
    """Hidden width of the three-layer heads (paper)."""
    head_bottleneck_dim: int = 256
    """Width of the normalised bottleneck in front of the prototypes (paper)."""

    def __post_init__(self) -> None:
        if self.depth is not None:
            _check(self, "depth", 1)
        _check(self, "num_storage_tokens", 0)
        _check(self, "layer_scale_init", 0)
        _check(self, "drop_path", 0, 0.9)
        if self.layer_norm_eps is not None:
            _check(self, "layer_norm_eps", 1e-12, 1e-2)
        _check(self, "num_prototypes", 2)
        _check(self, "head_hidden_dim", 1)
        _check(self, "head_bottleneck_dim", 1)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How often slices are drawn. The expected share of a cohort (or sequence) in the batches is proportional to its
    weight times its number of slices: all 1 draws every slice equally often, 2 draws those slices twice as often as
    others, 0 never; weights of 1 / (number of slices) make groups equal. A slice weighs cohort times sequence."""

    cohort_weights: tuple[str, ...] = ()
    """Weights as `cohort=weight`, such as `ixi=2.0 oasis=0.5`; 1 for cohorts not named (ours; the paper has none)."""
    sequence_weights: tuple[str, ...] = ()
    """Weights as `sequence=weight`, such as `FLAIR=1.5`; 1 for sequences not named (ours)."""

    def __post_init__(self) -> None:
        _named_weights("sampling.cohort_weights", self.cohort_weights)
        _named_weights("sampling.sequence_weights", self.sequence_weights)

    @property
    def by_cohort(self) -> dict[str, float]:
        """Cohort -> weight."""
        return _named_weights("sampling.cohort_weights", self.cohort_weights)

    @property
    def by_sequence(self) -> dict[str, float]:
        """Sequence -> weight."""
        return _named_weights("sampling.sequence_weights", self.sequence_weights)


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """Views of a slice: two global crops and several local ones. One pair of crop sizes is drawn per iteration."""

    global_sizes: tuple[int, ...] = (256,)
    """Side of the global crops of each pair, px (paper). Rounded down to whole patches of 16."""
    local_sizes: tuple[int, ...] = (112,)
    """Side of the local crops of each pair, px (paper). Rounded down to whole patches: 168 becomes 160."""
    pair_ratios: tuple[float, ...] = (1.0,)
    """Probability of each pair; sums to 1 (paper, high-resolution stage)."""
    num_local: int = 8
    """Local crops per slice (paper)."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Area of a global crop, fraction of the slice (paper)."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a local crop, fraction of the slice (paper)."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop's box, width / height, log-uniform (DINOv3)."""
    canvas_size: int = SLICE_SIZE
    """Side of the canvas on which boxes are drawn, px. 1024 stands for slices interpolated to 1024 before cropping
    (paper, high-resolution stage): bicubic, and composed with the crop's own resampling into one product."""
    flip_probability: float = 0.5
    """Probability of a left-right flip (paper: random; 0.5 in DINOv3)."""
    blur_probabilities: tuple[float, float, float] = (0.0, 0.9, 0.5)
    """Probability of Gaussian blur for the first global, the second global and each local crop. What DINOv2's and
    DINOv3's released code really does: its settings read 1.0, 0.1, 0.5, but are applied inverted."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, px of the resized crop, uniform (DINOv3); the kernel has 9 taps."""

    def __post_init__(self) -> None:
        if not len(self.global_sizes) == len(self.local_sizes) == len(self.pair_ratios) > 0:
            raise ValueError(
                f"crops: global_sizes {self.global_sizes}, local_sizes {self.local_sizes} and pair_ratios "
                f"{self.pair_ratios} describe pairs; give as many of each, one at least"
            )
        if min(self.pair_ratios) < 0 or abs(sum(self.pair_ratios) - 1) > 1e-6:
            raise ValueError(f"crops.pair_ratios: found {self.pair_ratios}; expected probabilities that sum to 1")
        for name in ("global_sizes", "local_sizes"):
            if min(getattr(self, name)) < 2 * PATCH_SIZE:
                raise ValueError(f"crops.{name}: found {getattr(self, name)}; expected {2 * PATCH_SIZE} px or more")
        _check(self, "num_local", 0)
        _check(self, "canvas_size", PATCH_SIZE)
        _check(self, "flip_probability", 0, 1)
        for name in ("global_scale", "local_scale"):
            _check_range(self, name, 1e-6, 1.0)
        _check_range(self, "aspect", 1e-3, 1e3)
        _check_range(self, "blur_sigma", 1e-3, 1e3)
        if not all(0 <= probability <= 1 for probability in self.blur_probabilities):
            raise ValueError(f"crops.blur_probabilities: found {self.blur_probabilities}; expected values in [0, 1]")

    def sizes(self, pair: int) -> tuple[int, int]:
        """Sides of the global and local crops of a pair, px, in whole patches."""
        return tuple(size // PATCH_SIZE * PATCH_SIZE for size in (self.global_sizes[pair], self.local_sizes[pair]))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Masks of the global crops for the iBOT objective."""

    probability: float = 0.5
    """Fraction of the global crops that are masked (paper)."""
    ratios: tuple[float, float] = (0.1, 0.5)
    """Range of the masked fraction of a masked crop, uniform over the batch (paper)."""

    def __post_init__(self) -> None:
        _check(self, "probability", 0, 1)
        _check_range(self, "ratios", 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Objective: DINO + ibot_weight * iBOT + koleo_weight * (KoLeo of both global crops)."""

    student_temperature: float = 0.1
    """Temperature of the student's softmax (DINOv3)."""
    teacher_temperature: tuple[float, float] = (0.04, 0.07)
    """Temperature of the teacher at the start and after its warm-up (DINOv3)."""
    teacher_temperature_iterations: int = 30_000
    """Length of that linear warm-up, iterations (DINOv3: 30 epochs of 1,000)."""
    centering: Literal["sinkhorn_knopp", "softmax"] = "sinkhorn_knopp"
    """What keeps the teacher from preferring few prototypes: Sinkhorn-Knopp over the global batch (DINOv3), or a moving
    mean of its logits, taken off before the softmax (DINO, DINOv2). The paper says "centered"."""
    sinkhorn_iterations: int = 3
    """Sinkhorn-Knopp iterations (DINOv3)."""
    centre_momentum: float = 0.9
    """Of that moving mean, per iteration (DINO); softmax centring only."""
    ibot_weight: float = 1.0
    """Lambda of Eq. 3 (paper)."""
    koleo_weight: float = 0.1
    """Weight of KoLeo on the student's CLS token, per global crop (paper)."""
    gram_weight: float = 0.0
    """Weight of Gram anchoring: patch similarities are held to those of an earlier encoder (paper: none; DINOv3 7B: 2).
    All patches are then computed to the end."""
    gram_teacher: Path | None = None
    """That encoder: a file, a folder or a run that load_encoder knows; needed when gram_weight is not 0."""

    def __post_init__(self) -> None:
        _check(self, "student_temperature", 1e-3)
        if min(self.teacher_temperature) < 1e-3:
            raise ValueError(f"loss.teacher_temperature: found {self.teacher_temperature}; expected 0.001 or more")
        _check(self, "teacher_temperature_iterations", 0)
        _check(self, "sinkhorn_iterations", 1)
        _check(self, "ibot_weight", 0)
        _check(self, "koleo_weight", 0)
        _check(self, "centre_momentum", 0, 1)
        _check(self, "gram_weight", 0)
        if (self.gram_weight > 0) != (self.gram_teacher is not None):
            raise ValueError(
                f"loss.gram_weight {self.gram_weight:g} and loss.gram_teacher {self.gram_teacher}: give both or none"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, its schedules, and the moving average that is the teacher."""

    base_lr: float = 1e-4
    """Peak learning rate before scaling with the batch (paper: "peak base learning rate")."""
    lr_scaling: LrScaling = "dinov3"
    """How the batch size B scales it: "dinov3" 4 sqrt(B / 1024), "sqrt" sqrt(B / 1024), "none" 1. The paper does not
    say; DINOv3's rule makes 4e-4 of 1e-4 at the paper's B = 1024."""
    min_lr: float = 1e-6
    """Learning rate at the last iteration, not scaled (DINOv3)."""
    warmup_iterations: int = 10_000
    """Linear warm-up of the learning rate, iterations (paper); half a cosine follows."""
    weight_decay: float = 0.04
    """Constant (paper). Tokens decay too; biases, norms and layer scales do not (DINOv3)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Momenta of AdamW (DINOv3)."""
    layer_decay: float = 0.9
    """Factor on the learning rate per block below the top (paper)."""
    patch_embed_lr_multiplier: float = 0.2
    """Further factor for the patch embedding (DINOv3)."""
    clip_norm: float = 3.0
    """Largest gradient norm (paper), for the encoder and for each head separately (DINOv3)."""
    last_layer_freeze_iterations: int = 1_000
    """Iterations during which the prototypes keep still (DINOv3: one epoch of 1,000)."""
    teacher_momentum: float = 0.994
    """Teacher = momentum * teacher + (1 - momentum) * student after each step, constant (paper)."""

    def __post_init__(self) -> None:
        _check(self, "base_lr", 0)
        _check(self, "min_lr", 0)
        _check(self, "warmup_iterations", 0)
        _check(self, "weight_decay", 0)
        _check(self, "layer_decay", 1e-3, 1)
        _check(self, "patch_embed_lr_multiplier", 0)
        _check(self, "clip_norm", 1e-6)
        _check(self, "last_layer_freeze_iterations", 0)
        _check(self, "teacher_momentum", 0, 1)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas: found {self.betas}; expected values in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One run."""

    store: Path | None = None
    """Slice store to learn from, made by `braindino prepare`. Recipe `demo` simulates one when it is not given."""
    out: Path
    """Folder of the run. If it holds checkpoints of the same settings the run goes on from the newest."""
    exclude_subjects: Path | None = None
    """Text file of subjects that must not be seen, one `cohort/subject` per line (downstream test subjects)."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of one person in different cohorts, as for `braindino audit`: whom they (or the built-in
    rules, or equal fingerprints) make one of the excluded subjects is excluded as well."""
    init_from: Path | None = None
    """What student and teacher start from: a run (its teacher, encoder and heads), or any encoder that
    `braindino.load_encoder` knows (DINOv3 in the official, timm or Hugging Face layout, a BrainDINO or MedDINOv3
    teacher file with or without heads, our own); heads that it lacks start fresh, with a notice."""
    iterations: int = 500_000
    """Length of the run (paper)."""
    batch_size: int = 256
    """Slices per process and micro-batch (paper: 256 on each of 4 GPUs). The global batch of an iteration, by which the
    learning rate is scaled, is processes x accumulate x batch_size: 1,024 in the paper, with torchrun
    --nproc-per-node 4 or, on one GPU, --accumulate 4. A run may be resumed with another division of the same global
    batch. KoLeo compares the slices of one micro-batch (DINOv3: of one GPU)."""
    accumulate: int = 1
    """Micro-batches per process and iteration. Gradients are averaged over all of them, and Sinkhorn-Knopp centres
    the teacher over the whole global batch, so that one process with --accumulate 4 does what four processes do."""
    seed: int = 0
    """Decides the initial weights, the order of slices, crops, masks and drop path."""
    checkpoint_every: int = 2_500
    """Iterations between checkpoints; the two newest are kept."""
    log_every: int = 10
    """Iterations between rows of metrics.jsonl."""
    probe_every: int = 2_500
    """Iterations between looks at what the teacher has learnt: nearest neighbours for the sequence type, and the labels
    of probe_labels, on a fixed set of scans; maps of some slices (ours). 0: never. Nearest neighbours need two
    answers and four subjects. Not with sharded networks (fsdp)."""
    probe_scans: int = 128
    """Scans of that set, by twelve slices of each."""
    probe_k: int = 5
    """Neighbours."""
    probe_subjects: Path | None = None
    """List of the subjects that are asked, as in exclude_subjects: they are kept out of training like those, and the
    memory is made of the others. Without it half of the subjects are asked, all of whom the run learns from."""
    probe_labels: tuple[str, ...] = ()
    """What else to ask of them, as `column=table`, such as `sex=participants.tsv age=ages.csv`; tables as for
    `braindino evaluate`. More than ten different numbers are a quantity (mean absolute error), all else is classes."""
    probe_maps: int = 4
    """Slices of which patch similarity and principal components are drawn at each look (maps.png); 0: none."""
    tensorboard: bool | None = None
    """Write RUN/tensorboard as well; by default if TensorBoard is installed."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to as well; by default none."""
    num_workers: int = 4
    """Processes that read slices; 0 reads in the main process. Does not change results."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: whole copies of student and teacher in each ("ddp"), or both, and the optimiser, sharded
    over all ("fsdp": the memory of ViT-L and larger). "auto" takes fsdp for vit_large. Does not change results."""
    max_bad_steps: int = 3
    """Steps in a row that are skipped because the loss or a gradient is not finite; one more stops the run, with the
    last good state saved. 0 stops at the first (ours)."""
    dry_run_steps: int = 10
    """Steps of each pair of crop sizes that --dry-run measures, after two that are not timed."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train: bfloat16 autocast on cuda, float32 on cpu; "auto" prefers cuda."""
    activation_checkpointing: bool = False
    """Forget what is inside each block of the student and compute it again in the backward pass: a third more time for
    a tenth of the activations. For the large crops of the high-resolution stage. Does not change results."""
    compile: bool = False
    """torch.compile the blocks of student and teacher: minutes at the start, fewer passes over the tokens then."""
    model: ModelConfig = field(default_factory=ModelConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        _check(self, "iterations", 1)
        _check(self, "accumulate", 1)
        _check(self, "max_bad_steps", 0)
        _check(self, "probe_every", 0)
        _check(self, "probe_scans", 4)
        _check(self, "probe_k", 1)
        _check(self, "probe_maps", 0)
        _check(self, "checkpoint_every", 1)
        _check(self, "log_every", 1)
        _check(self, "num_workers", 0)
        _check(self, "dry_run_steps", 1)
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size: found {self.batch_size}; expected 2 or more, since KoLeo spreads the slices of a batch "
                "apart and one slice has no neighbour"
            )


# Settings that may differ between a run and its resumption: they say where and how, not what is computed. The store and
# the subjects kept out are compared by their content instead of by their paths, and of the division of the batch only
# the global batch counts.
RUNTIME_SETTINGS = frozenset(
    {
        "store",
        "out",
        "exclude_subjects",
        "crosswalk",
        "num_workers",
        "dry_run_steps",
        "device",
        "checkpoint_every",
        "log_every",
        "batch_size",
        "accumulate",
        "parallel",
        "max_bad_steps",
        "probe_every",
        "probe_scans",
        "probe_k",
        "probe_labels",
        "probe_subjects",
        "probe_maps",
        "tensorboard",
        "wandb_project",
        "activation_checkpointing",
        "compile",
    }
)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionary of plain values (paths as text, tuples as lists): what config.yaml holds."""
    return {item.name: _plain(getattr(config, item.name)) for item in dataclasses.fields(config)}


def overlay(config: Any, values: dict[str, Any], *, source: str) -> Any:
    """A copy of a config with the values of a nested dictionary laid over it.

    Raises:
        ValueError: a key that does not exist, or a value of the wrong type; names `source` and the dotted key.
    """
    return _overlay(config, values, source, prefix="")


def dump_config(config: PretrainConfig) -> str:
    """The resolved settings as YAML."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def changed_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Dotted keys with their two values where two runs would compute different things; runtime settings are ignored."""
    before, after = _flatten(old), _flatten(new)
    return [
        f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"
        for key in {**before, **after}
        if key not in RUNTIME_SETTINGS and before.get(key) != after.get(key)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return config_to_dict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _overlay(config: Any, values: dict[str, Any], source: str, prefix: str) -> Any:
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: unknown setting {prefix}{key}; known here: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{source}: {prefix}{key}: found {value!r}; expected settings as `name: value`")
            changes[key] = _overlay(getattr(config, key), value, source, f"{prefix}{key}.")
        else:
            try:
                changes[key] = _convert(value, hints[key])
            except (TypeError, ValueError):
                raise ValueError(
                    f"{source}: {prefix}{key}: found {value!r}; expected {_type_name(hints[key])}"
                ) from None
    return dataclasses.replace(config, **changes)


def _convert(value: Any, hint: Any) -> Any:
    """A YAML value as the type of a field; ValueError or TypeError if it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise ValueError
        return value
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _convert(value, arguments[0])
    if origin is tuple:
        kinds = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return tuple(_convert(item, kind) for item, kind in zip(value, kinds, strict=True))
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError
    # YAML reads 1e-4 (no point) as text: float() takes both.
    return hint(value)


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint).replace("typing.", "")


def _check(config: Any, name: str, low: float, high: float = float("inf")) -> None:
    value = getattr(config, name)
    if not low <= value <= high:
        limits = f"{low:g} or more" if high == float("inf") else f"a value in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: found {value}; expected {limits}")


def _check_range(config: Any, name: str, low: float, high: float) -> None:
    first, last = getattr(config, name)
    if not low <= first <= last <= high:
        raise ValueError(f"{name}: found {first} to {last}; expected a rising range within [{low:g}, {high:g}]")


def _named_weights(setting: str, items: tuple[str, ...]) -> dict[str, float]:
    weights: dict[str, float] = {}
    for item in items:
        name, _, text = item.rpartition("=")
        try:
            weight = float(text)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < float("inf"):
            raise ValueError(f"{setting}: found {item!r}; expected name=weight with a weight of 0 or more, as in ixi=2")
        if name in weights:
            raise ValueError(f"{setting}: {name!r} is given twice, {weights[name]:g} and {weight:g}; give it once")
        weights[name] = weight
    return weights
