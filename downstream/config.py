"""What ``extract``, ``evaluate``, ``robustness`` and ``represent`` are told on the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from braindino.downstream.finetuning import Finetuning
from braindino.downstream.task_table import RATIOS
from braindino.parts import check_part


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """Run a frozen encoder over all prepared scans and keep the features (paper sec. 4.3).

    Goes on where an earlier run stopped. Exit code 3 when some scans could not be used; FEATURES/quarantined.tsv
    names them.
    """

    prepared: Path
    """Folder made by `braindino prepare`."""
    encoder: str
    """Encoder file or folder, `brainmvp:PATH`, `bm-mae:PATH`, `brainiac:PATH`, `timm:MODEL`, `untrained:` and the name
    of one such as `untrained:vit_tiny`, or `intensity`, the floor without an encoder: docs/encoders.md."""
    out: Path
    """Folder of the features, one per encoder, preparation and precision; evaluate calls the encoder by the name of
    this folder."""
    options: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE")] = ()
    """Of the encoder, such as `num_slices=64 image_size=224` or `fit=resize feature=mean`: docs/encoders.md."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the encoder computes in; auto is bfloat16 on a GPU and float32 on a CPU. Features are kept in float32."""
    batch_size: int | None = None
    """Slices per pass through the encoder, or volumes for an encoder of volumes; by default 32 slices or 1 volume."""
    jobs: int | None = None
    """Threads that load and prepare volumes ahead of the encoder, per GPU; each needs about 0.5 GB. By default one on a
    CPU, where the encoder takes all cores, and up to 16 per GPU, as there are cores."""
    device: str = "auto"
    """`cpu`, `cuda` (all GPUs, a process for each), `cuda:1`...; auto takes all GPUs when there are any."""
    part: Annotated[int | None, tyro.conf.arg(metavar="I")] = None
    """Do only the I-th of N parts (1 to N), as in a job array; when all are done, run once more without it."""
    of: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Number of parts."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: found {value}; expected 1 or more")
        check_part(self.part, self.of)


@dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """A task on features: which cases, who is trained and who is tested on. What ``evaluate`` and ``robustness`` share;
    equal values give the same cases, splits and heads in both.
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """A row of the table of tasks, or a YAML file of your own."""
    features: tuple[Path, ...]
    """Feature folders made by extract, one per encoder; all are scored on the same cases and splits. The first is
    compared with each of the others."""
    out: Path
    """Folder of the results; they go to OUT/TASK/."""
    labels: tuple[Path, ...] = ()
    """BIDS folders or .tsv/.csv tables with the target; needed by tasks whose target is not in the scan itself."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One order of the training subjects and one start of the heads for each; the test sets are the same."""
    protocol: Literal["", "holdout", "repeated", "kfold"] = ""
    """How subjects are divided, instead of the task's own protocol."""
    num_splits: int | None = None
    """Test sets of `repeated`, folds of `kfold`."""
    test_fraction: Annotated[float | None, tyro.conf.arg(metavar="SHARE")] = None
    """Share of the subjects in a test set, instead of the task's own."""
    test_subjects: Path | None = None
    """Subject list (as written by `braindino split`) to test on instead; all other subjects train."""
    crosswalk: tuple[Path, ...] = ()
    """Tables that join ids of different cohorts, as for `braindino audit`."""
    allow_overlap: bool = False
    """Test on subjects that an encoder was pretrained on; the results then say so."""
    allow_subject_leak: bool = False
    """Test on persons that are trained on under another id; the results then say so."""
    split_by_scan: bool = False
    """Divide scans instead of subjects, as some publications do: a subject's scans are then on both sides, and every
    result says so."""
    replace: bool = False
    """Replace results of other settings in OUT/TASK; without it they are refused."""
    device: str = "auto"
    """Where heads are trained, and encoders with --finetune: `auto`, `cpu`, `cuda`..."""

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("--features: found none; expected one folder or more")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds: found {self.seeds}; expected one or more, each once")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(QuestionConfig):
    """Train light heads on frozen features and score them on subjects never seen, beside trivial baselines.

    TASK is a row of the table of tasks (`braindino tasks` lists them) or a YAML file of the same form:
    docs/evaluate.md. The results are a folder that `braindino reproduce` can repeat.
    """

    ratios: tuple[float, ...] = RATIOS
    """Shares of the training subjects to train on; smaller sets lie in larger ones."""
    permutations: int = 20
    """Times that the head is also trained on permuted labels, with all training subjects: a check that nothing but the
    labels makes the score. 0: not at all. An encoder is not fine-tuned on them."""
    finetune: Annotated[str, tyro.conf.arg(metavar="ENCODER")] = ""
    """Also train this encoder itself, jointly with the head, on the same cases, splits, seeds and ratios (paper sec.
    4.4), named as for extract; its results stand beside the others as NAME-finetuned. A killed run goes on with the
    next training."""
    prepared: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder made by `braindino prepare` that holds the scans, for --finetune."""
    finetuning: Finetuning = field(default_factory=Finetuning)
    """Of --finetune."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise ValueError(f"--ratios: found {self.ratios}; expected shares above 0 and up to 1")
        if self.permutations < 0:
            raise ValueError(f"--permutations: found {self.permutations}; expected 0 or more")
        if bool(self.finetune) != (self.prepared is not None):
            raise ValueError("--finetune ENCODER and --prepared DIR belong together: it is trained from volumes")


@dataclass(frozen=True, kw_only=True)
class RobustnessConfig(QuestionConfig):
    """Train the heads of a task on clean scans, as evaluate does, and ask them about perturbed ones (paper sec. 4.5).

    Nothing is trained on a perturbed scan. docs/robustness.md has the way from `braindino perturb` to here.
    """

    conditions: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder with a folder of features for every condition and encoder: DIR/gamma-0.5/NAME, made by extract, with NAME
    that of the encoder's folder in --features. A folder called clean there is passed over."""
    ratio: float = 1.0
    """Share of the training subjects to train on (the paper: all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise ValueError(f"--ratio: found {self.ratio}; expected a share above 0 and up to 1")


@dataclass(frozen=True, kw_only=True)
class RepresentConfig:
    """Compare how encoders describe the same scans, from their features (paper sec. 4.6): layer-wise linear CKA of
    every two, how their features are spread, whether neighbours share a cohort, and who the neighbours of a scan are.
    """

    features: tuple[Path, ...]
    """Feature folders made by extract, one per encoder; the scans that all of them have are compared."""
    out: Path
    """Folder of the tables."""
    sequences: tuple[str, ...] = ()
    """Only scans of these sequences, such as `T1 T2`; by default all. Where subjects have several, much of what differs
    between scans is the sequence."""
    per_cohort: Annotated[int, tyro.conf.arg(metavar="N")] = 1000
    """The first N scans of each cohort, in the order of subjects and without shuffling, as in the paper; 0: all."""
    neighbours: Annotated[int, tyro.conf.arg(metavar="K")] = 10
    """How many nearest scans, or slices."""
    queries: Annotated[tuple[str, ...], tyro.conf.arg(metavar="SCAN[:SLICE]")] = ()
    """Whose neighbours to list: paths as in scans.tsv, or scan ids, with `:SLICE` for one slice of the features' S,
    counted from 0 at the bottom. By default the first scan of each cohort. For slices the features of all slices are
    read into memory: 0.4 GB for 1,000 scans of ViT-B."""
    replace: bool = False
    """Replace results of other settings in OUT; without it they are refused."""

    def __post_init__(self) -> None:
        if not self.features:
            raise ValueError("--features: found none; expected one folder or more")
        if self.per_cohort < 0:
            raise ValueError(f"--per-cohort: found {self.per_cohort}; expected 0 (all) or more")
        if self.neighbours < 1:
            raise ValueError(f"--neighbours: found {self.neighbours}; expected 1 or more")


@dataclass(frozen=True, kw_only=True)
class ReproduceConfig:
    """Repeat an evaluation from its folder and compare every prediction and every number.

    Exit code 0: the same; 4: something differs, and what is told.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of a task's results, OUT/TASK of `braindino evaluate`."""
    features: tuple[str, ...] = ()
    """ENCODER=FOLDER where the features of an encoder have moved since."""
    finetune: Annotated[str, tyro.conf.arg(metavar="ENCODER")] = ""
    """Where the encoder that was fine-tuned has moved since."""
    prepared: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where its prepared folder has moved since."""
    device: str = "auto"
    """Where the heads are trained; another device rounds differently."""
    tolerance: float = 1e-5
    """Largest difference of a prediction that counts as the same, relative to the largest prediction."""
