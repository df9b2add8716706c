"""lightly-train's DINOv2 step on a DINOv3 ViT, a side of benchmarks/pretrain_step.py; prints one line of JSON.

Run by the Python of an environment in which lightly-train is installed (it is under the AGPL and no part of this
project): ``pretrain_step.py --lightly-python PATH``. Its own method, optimiser, clipping, moving average and training
loop (Lightning's) run on random views, so that reading and augmenting count for nothing. A step is the time from the
start of one to the start of the next.

Its DINOv3 models have no drop path of their own; the rate asked for is set in their blocks, which then compute a branch
for a subset of the images as DINOv3 does. ``--lightly-defaults`` keeps its head shared by both losses and its centring
by a moving average, which do less; without it both sides have a head for each loss and Sinkhorn-Knopp.
"""

import argparse
import json
import resource
import time

import torch
from lightly_train._methods.dinov2.dinov2 import DINOv2, DINOv2AdamWViTArgs, DINOv2Args
from lightly_train._models.dinov3.dinov3_package import DINOv3Package
from lightly_train._models.embedding_model import EmbeddingModel
from pytorch_lightning import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

NAMES = {"vit_small": "vits16-notpretrained", "vit_base": "vitb16-notpretrained"}


class Views(Dataset):
    """Batches of random views that have been made before."""

    def __init__(self, batch: int) -> None:
        self.views = [torch.randn(batch, 3, size, size) for size in [256] * 2 + [112] * 8]

    def __len__(self) -> int:
        return DINOv2.RECOMMENDED_MIN_STEPS * len(self.views[0])  # fewer draw a warning; not all are run

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"views": self.views, "filename": [str(index)] * len(self.views[0])}


class Watch(Callback):
    """Wall and processor seconds at the start of every step and at the end of all."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_args: object) -> None:
        self.look()

    def on_train_end(self, *_args: object) -> None:
        self.look()

    def look(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append((time.perf_counter(), time.process_time()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(NAMES), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prototypes", type=int, required=True)
    parser.add_argument("--drop-path", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--lightly-defaults", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    fair = {} if options.lightly_defaults else {"ibot_separate_head": True, "center_method": "sinkhorn_knopp"}
    arguments = DINOv2Args(output_dim=options.prototypes, **fair)
    optimizer = DINOv2AdamWViTArgs()
    wrapped = DINOv3Package.get_model_wrapper(DINOv3Package.get_model(NAMES[options.model], load_weights=False))
    arguments.resolve_auto(scaling_info=None, optimizer_args=optimizer, wrapped_model=wrapped)
    method = DINOv2(
        method_args=arguments,
        optimizer_args=optimizer,
        embedding_model=EmbeddingModel(wrapped),
        global_batch_size=options.batch,
        num_input_channels=3,
    )
    for block in method.student_embedding_model.wrapped_model.get_model().blocks:
        block.sample_drop_ratio = options.drop_path
    watch = Watch()
    trainer = Trainer(
        accelerator=options.device,
        devices=1,
        precision="32-true" if options.device == "cpu" else "bf16-mixed",
        max_epochs=1,
        limit_train_batches=options.warmup + options.steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[watch],
    )
    total = options.warmup + options.steps
    trainer.fit(method, DataLoader(Views(options.batch), batch_size=None, sampler=range(total)))
    (start, start_cpu), (end, end_cpu) = watch.times[options.warmup], watch.times[total]
    on_gpu = options.device == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        json.dumps(
            {
                "device": torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} threads",
                "seconds": (end - start) / options.steps,
                "cpu_seconds": (end_cpu - start_cpu) / options.steps,
                "rate": options.batch * options.steps / (end - start),
                "peak_gb": peak / 1e9,
                "stages": {},
            }
        )
    )


if __name__ == "__main__":
    main()
