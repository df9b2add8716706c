"""The official DINOv3 step, a side of benchmarks/pretrain_step.py; prints one line of JSON.

``pretrain_step.py --dinov3 CHECKOUT``: a checkout of facebookresearch/dinov3, which is under a licence of its own and
no part of this project; it is called, not copied. Its SSLMetaArch with its own default settings, but for model, crops,
batch, prototypes and drop path (Sinkhorn-Knopp and a head for each loss are its defaults), and what its training loop
does in an iteration: zero_grad, forward_backward, clipping per module, AdamW, moving average. Views are random and
made before, so that reading and augmenting count for nothing. It needs omegaconf and termcolor, which another Python
may have (``--dinov3-python PATH``).

On a GPU as there: FSDP in bfloat16, compiled (``--compile``) or not. On a CPU its code does not run as it stands: here
``Tensor.cuda`` gives the tensor itself, the one process talks to itself over gloo, and the parts that
``prepare_for_distributed_training`` adds (FSDP, compiling) are left out; the precision is float32.
"""

import argparse
import json
import resource
import sys
import time

import torch
import torch.distributed
from torch import nn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", required=True)
    parser.add_argument("--model", choices=("vit_small", "vit_base"), required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--prototypes", type=int, required=True)
    parser.add_argument("--drop-path", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    sys.path.insert(0, options.checkout)
    from dinov3 import distributed
    from dinov3.configs import get_default_config
    from dinov3.data import MaskingGenerator
    from dinov3.data.collate import collate_data_and_cast
    from dinov3.distributed import torch_distributed_wrapper
    from dinov3.train.ssl_meta_arch import SSLMetaArch

    on_gpu = options.device == "cuda"
    if on_gpu:
        distributed.enable(overwrite=True)
    else:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        torch_distributed_wrapper._DEFAULT_PROCESS_GROUP = torch.distributed.group.WORLD
        torch.Tensor.cuda = lambda tensor, *_args, **_kwargs: tensor  # type: ignore[method-assign]
    torch.manual_seed(0)
    cfg = get_default_config()
    cfg.student.arch, cfg.student.drop_path_rate, cfg.student.n_storage_tokens = options.model, options.drop_path, 4
    cfg.student.qkv_bias = False
    cfg.crops.global_crops_size, cfg.crops.local_crops_size = 256, 112
    cfg.dino.head_n_prototypes = cfg.ibot.head_n_prototypes = options.prototypes
    cfg.train.batch_size_per_gpu, cfg.train.compile = options.batch, options.compile
    with torch.device("meta"):
        model = SSLMetaArch(cfg)
    if on_gpu:
        model.prepare_for_distributed_training()
    model.to_empty(device=options.device)
    model.init_weights()
    model.train()
    optimizer = torch.optim.AdamW(model.get_params_groups(), lr=1e-4, weight_decay=0.04)
    crops = {
        "global_crops": [torch.randn(3, 256, 256) for _ in range(2)],
        "local_crops": [torch.randn(3, 112, 112) for _ in range(8)],
    }
    data = collate_data_and_cast(
        [(crops, ())] * options.batch,
        (0.1, 0.5),
        0.5,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        n_tokens=16 * 16,
        mask_generator=MaskingGenerator(input_size=(16, 16), max_num_patches=0.5 * 16 * 16),
    )
    data["global_batch_size"] = options.batch

    def step(iteration: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _metrics = model.forward_backward(data, teacher_temp=0.05, iteration=iteration)
        for module in model.student.values():
            nn.utils.clip_grad_norm_(module.parameters(), max_norm=3.0)
        loss.isnan().item()  # it looks at the loss of every iteration
        optimizer.step()
        model.update_ema(0.994)

    def now() -> tuple[float, float]:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    for iteration in range(options.warmup):
        step(iteration)
    start, start_cpu = now()
    for iteration in range(options.steps):
        step(options.warmup + iteration)
    end, end_cpu = now()
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
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
