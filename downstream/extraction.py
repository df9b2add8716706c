"""From prepared scans to the files of a feature table: load and prepare ahead, encode, write behind."""

import math
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import connection
from pathlib import Path
from typing import Any, cast

import torch

from braindino.child_process import end_with_parent
from braindino.downstream.loading import load_ahead
from braindino.encoders.catalogue import load_volume_encoder
from braindino.encoders.contract import Prepared, VolumeEncoder
from braindino.encoders.slice_encoder import BATCH_SIZE, SliceEncoder
from braindino.feature_table import FeatureTableMeta, save_features
from braindino.manifest import Scan, load_brain, mask_path
from braindino.volume import VolumeError

VOLUMES_PER_CALL = 4
"""At least so many volumes are encoded in one call: between two calls a GPU waits."""
MAX_UNUSED = 0.05
"""Share of the slices of a call by which its last pass may fall short."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be done with scans, in any process.

    Attributes:
        encoder: name or path, as ``load_volume_encoder`` takes it.
        options: its keyword arguments.
        prepared_dir: the scans' prepared folder.
        table_dir: where their features go.
        meta: of that table.
        batch_size: slices, or volumes, in one pass; None for the encoder's own choice.
        jobs: threads that load and prepare volumes.
    """

    encoder: str
    options: dict[str, Any]
    prepared_dir: Path
    table_dir: Path
    meta: FeatureTableMeta
    batch_size: int | None
    jobs: int


def table_meta(encoder: VolumeEncoder, *, precision: str) -> FeatureTableMeta:
    """What a table of this encoder's features says of them; ``precision``: of ``choose_precision``."""
    num_slices = encoder.preparation.num_slices if isinstance(encoder, SliceEncoder) else None
    return FeatureTableMeta(encoder.identity, precision, encoder.dim, num_slices)


def choose_precision(asked: str, encoder: VolumeEncoder, *, on_gpu: bool) -> str:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where bfloat16 is slower if the processor lacks the
    instructions; without a network there is nothing to round.

    Raises:
        ValueError: bfloat16 was asked for, and the encoder has no network.
    """
    if encoder.network is None:
        if asked == "bfloat16":
            raise ValueError(
                f"--precision bfloat16: {encoder.identity.name} has no network and computes in float32; leave it out"
            )
        return "float32"
    if asked == "auto":
        return "bfloat16" if on_gpu else "float32"
    return asked


def last_change(prepared_dir: Path, scan: Scan) -> float:
    """Modification time of the scan or its mask, seconds since 1970; 0 where the file is gone (loading will say so)."""
    paths = (Path(scan.path), mask_path(prepared_dir, scan))
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def encode_scans(encoder: VolumeEncoder, scans: Sequence[Scan], work: Work) -> Iterator[Scan]:
    """Yield each scan once its file is in the table; one that cannot be used as a quarantined row with its reason.

    Threads load volumes ahead of the encoder, another writes behind it. Passes run over the borders of volumes.

    Raises:
        OSError: the table cannot be written, or the disk is full.
    """
    _use_device(encoder.device)
    size = _volumes_per_call(work.meta.num_slices, work.batch_size)
    autocast = torch.autocast(encoder.device.type, torch.bfloat16, enabled=work.meta.precision == "bfloat16")
    writing: deque[tuple[Scan, Future[None]]] = deque()
    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(work.jobs, initializer=_start_loader, initargs=(encoder.device, work.jobs)) as loaders,
        ThreadPoolExecutor(1) as writer,
    ):
        try:
            ahead = load_ahead(loaders, lambda scan: _load(scan, work, encoder), scans, depth=work.jobs + size)
            loading = (_loaded(*each) for each in ahead)
            while group := _take(loading, size):
                usable = [(scan, loaded) for scan, loaded in group if isinstance(loaded, Prepared)]
                yield from (_quarantine(scan, error) for scan, error in group if isinstance(error, Exception))
                with autocast:
                    features = encoder.encode(
                        [prepared for _, prepared in usable], batch_size=work.batch_size, with_tokens=False
                    )
                for (scan, _), each in zip(usable, features, strict=True):
                    writing.append((scan, writer.submit(save_features, work.table_dir, work.meta, scan, each)))
                # Who writes slower than the encoder works is waited for: memory stays bounded.
                while writing and (writing[0][1].done() or len(writing) > 2 * size):
                    yield _written(*writing.popleft())
            while writing:
                yield _written(*writing.popleft())
        finally:
            loaders.shutdown(wait=False, cancel_futures=True)
            torch.set_num_threads(threads)


def encode_on(devices: Sequence[str], scans: Sequence[Scan], work: Work) -> Iterator[Scan]:
    """As ``encode_scans``, with a process for each device over every n-th scan; scans come as they are finished.

    Raises:
        ValueError: what a process says of the encoder.
        OSError: a process died, or cannot write.
    """
    context = multiprocessing.get_context("spawn")
    workers: dict[connection.Connection, tuple[str, multiprocessing.process.BaseProcess]] = {}
    threads = max(1, (os.cpu_count() or 1) // len(devices))
    try:
        for number, device in enumerate(devices):
            share = scans[number :: len(devices)]
            if not share:
                continue
            pipe, far_end = context.Pipe(duplex=False)
            process = context.Process(target=_serve, args=(work, share, device, threads, far_end), daemon=True)
            process.start()
            # With the far end closed here, the death of the process reads as the end of the pipe.
            far_end.close()
            workers[pipe] = (device, process)
        while workers:
            for ready in connection.wait(list(workers)):
                pipe = cast(connection.Connection, ready)
                device, worker = workers[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, ConnectionResetError) as error:
                    worker.join()
                    raise ChildProcessError(
                        f"the process for {device} ended with code {worker.exitcode}, as when memory runs out; "
                        "what is finished is kept, the same command goes on"
                    ) from error
                if message is None:
                    del workers[pipe]
                    worker.join()
                elif isinstance(message, Scan):
                    yield message
                else:
                    raise ValueError(f"the process for {device}: {message}")
    finally:
        for _, worker in workers.values():
            worker.terminate()
            worker.join()


def _serve(work: Work, scans: Sequence[Scan], device: str, threads: int, pipe: connection.Connection) -> None:
    """Life of a process: scans as they are finished, then None; an error as its text."""
    # Ctrl-C reaches the whole process group; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    torch.set_num_threads(threads)
    try:
        encoder = load_volume_encoder(work.encoder, device=device, **work.options)
        if encoder.identity.key != work.meta.identity.key:
            raise ValueError(f"{work.encoder}: the weights were changed while extraction was starting; run it again")
        for scan in encode_scans(encoder, scans, work):
            pipe.send(scan)
        pipe.send(None)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _start_loader(device: torch.device, jobs: int) -> None:
    _use_device(device)
    if device.type == "cuda":
        # By itself each would share its work out to all cores, and stand in the way of the others.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))


def _use_device(device: torch.device) -> None:
    """Of this thread: what pins memory or launches a kernel would otherwise also open the first GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _volumes_per_call(num_slices: int | None, batch_size: int | None) -> int:
    """Few volumes that fill the last pass, too, or nearly so."""
    each = 1 if num_slices is None else num_slices
    size = batch_size or (1 if num_slices is None else BATCH_SIZE)
    return next(
        volumes
        for volumes in count(VOLUMES_PER_CALL)
        if math.ceil(volumes * each / size) * size <= (1 + MAX_UNUSED) * volumes * each
    )


def _load(scan: Scan, work: Work, encoder: VolumeEncoder) -> Prepared:
    prepared = encoder.prepare(load_brain(work.prepared_dir, scan), sequence=scan.sequence)
    if encoder.device.type == "cuda":
        # From pinned memory the copy to the GPU goes on beside its work.
        prepared = replace(prepared, data=prepared.data.pin_memory())
    return prepared


def _loaded(scan: Scan, future: "Future[Prepared]") -> tuple[Scan, Prepared | Exception]:
    try:
        return scan, future.result()
    except (ValueError, OSError) as error:
        return scan, error


def _take(loading: Iterator[tuple[Scan, Prepared | Exception]], size: int) -> list[tuple[Scan, Prepared | Exception]]:
    """The next scans, until ``size`` of them are usable."""
    group: list[tuple[Scan, Prepared | Exception]] = []
    usable = 0
    while usable < size and (each := next(loading, None)) is not None:
        group.append(each)
        usable += isinstance(each[1], Prepared)
    return group


def _written(scan: Scan, future: "Future[None]") -> Scan:
    try:
        future.result()
    except ValueError as error:
        return _quarantine(scan, error)
    return scan


def _quarantine(scan: Scan, error: Exception) -> Scan:
    code = error.code if isinstance(error, VolumeError) else type(error).__name__
    return replace(scan, status="quarantined", reason=f"{code}: {error}")
