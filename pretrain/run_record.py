"""What a run is: RUN/config.yaml (settings) and RUN/run.json (recipe, data, versions), written once, then compared."""

from typing import Any

from braindino.atomic import write_json, write_text
from braindino.pretrain.config import PretrainConfig, changed_settings, config_to_dict, dump_config
from braindino.pretrain.distributed import Division
from braindino.pretrain.exclusion import Exclusion
from braindino.provenance import code_commit, versions
from braindino.records import read_json, read_yaml


def record_run(
    config: PretrainConfig,
    *,
    recipe: str,
    store_fingerprint: str,
    num_slices: int,
    exclusion: Exclusion | None,
    division: Division,
) -> None:
    """Write the record of a new run, or make sure that an old one is being continued with what it was started with.

    Raises:
        ValueError: settings, slices or excluded subjects are not those of the run in that folder; names them.
    """
    config_path, record_path = config.out / "config.yaml", config.out / "run.json"
    record: dict[str, Any] = {
        "recipe": recipe,
        "store_fingerprint": store_fingerprint,
        "num_slices": num_slices,
        "global_batch": division.global_batch,
        "excluded_subjects": {
            "sha256": exclusion.sha256 if exclusion else None,
            "subjects": sorted(exclusion.subjects) if exclusion else [],
            "joined": exclusion.joined if exclusion else {},
        },
        "commit": code_commit(),
        "versions": versions(),
    }
    if config_path.exists() and record_path.exists():
        changes = changed_settings(read_yaml(config_path), config_to_dict(config))
        changes += _changed_data(read_json(record_path), record)
        if changes:
            raise ValueError(
                f"{config.out} holds a run with other settings ({'; '.join(changes)}); "
                "repeat its settings to resume it, or give another --out"
            )
        return
    write_json(record_path, record)
    write_text(config_path, dump_config(config))


def _changed_data(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    changes = []
    if old["store_fingerprint"] != new["store_fingerprint"]:
        changes.append(
            f"slices of the store: fingerprint {old['store_fingerprint'][:12]} -> {new['store_fingerprint'][:12]}"
        )
    if old.get("global_batch") != new["global_batch"]:
        changes.append(
            f"global batch (processes x accumulate x batch_size): {old.get('global_batch')} -> {new['global_batch']}"
        )
    before, after = old["excluded_subjects"], new["excluded_subjects"]
    if before["subjects"] != after["subjects"]:
        changes.append(f"excluded subjects: {len(before['subjects'])} -> {len(after['subjects'])}, not the same ones")
    return changes
