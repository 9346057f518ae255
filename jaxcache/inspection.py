"""What a checkpoint of tables holds, as figures and as text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from jaxcache.report import aligned
from jaxcache.saved_tables import SavedTables


def describe_checkpoint(saved: SavedTables) -> dict[str, Any]:
    """What a checkpoint holds, ready for JSON.

    Only the manifest and the sizes of files are looked at. The `bytes` of a table are those of its written rows with
    their state; `disk_bytes` are those of all files, `shared_bytes` those of files that other checkpoints have as well,
    both None in a bucket.
    """
    manifest, tables = saved.manifest, {}
    for name, about in manifest["tables"].items():
        leaves = [("weights", [about["dim"]], about["dtype"]), *about["state"]]
        row_bytes = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, shape, dtype in leaves)
        rows_written = saved[name].rows_written
        tables[name] = {
            **about,
            "state": {leaf: {"shape": shape, "dtype": dtype} for leaf, shape, dtype in about["state"]},
            "scalars": dict(zip(about["scalars"], (value for _, value in manifest["scalars"][name]), strict=True)),
            "rows_written": rows_written,
            "bytes": rows_written * row_bytes,
            "rows_in_cache": manifest["held"].get(name, 0),
        }
    segments = [
        {
            "name": segment["name"],
            "kind": "incremental" if number else "full",
            "rows": {name: about["rows"] for name, about in segment["tables"].items()},
        }
        for number, segment in enumerate(manifest["segments"])
    ]
    sizes = []
    if isinstance(saved.path, Path):
        sizes = [file.stat() for file in saved.path.rglob("*") if file.is_file()]
    return {
        "path": str(saved.path),
        "format": manifest["format"],
        "step": saved.step,
        "seed": saved.seed,
        "tables": tables,
        "features": manifest["features"],
        "slots": saved.slots,
        "segments": segments,
        "loader_state": manifest["loader_state"] is not None,
        "disk_bytes": sum(file.st_size for file in sizes) if sizes else None,
        "shared_bytes": sum(file.st_size for file in sizes if file.st_nlink > 1) if sizes else None,
    }


def format_checkpoint(about: dict[str, Any]) -> str:
    """What `describe_checkpoint` returns, as text.

    >>> import optax, tempfile
    >>> from jaxcache import Checkpoint, HostStore, Table
    >>> store = HostStore({"item": Table(1000, 2)}, optimizer=optax.adam(0.1))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     Checkpoint(store).begin_save(Path(folder))(Path(folder))
    ...     about = describe_checkpoint(SavedTables(folder))
    >>> print(format_checkpoint(about | {"path": "runs/7/tables", "disk_bytes": 1234}))
    runs/7/tables: step 0, seed 0, format 1
    table   rows  dim  dtype    touched  share  bytes  optimizer's state and counts
    item   1,000    2  float32        0     0%      0  0.mu[2] 0.nu[2] 0.count=0
    features: not saved
    cache: not saved
    segments: 1 full of 0 rows
    loader's state: no
    on disk: 1,234 bytes
    """
    head = ["table", "rows", "dim", "dtype", "touched", "share", "bytes"]
    lines = [[*head, *(["in cache"] if about["slots"] else []), "optimizer's state and counts"]]
    for name, table in about["tables"].items():
        written = table["rows_written"]
        share = f"{100 * written / table['rows']:.3g}%"
        figures = [f"{written:,}", share, f"{table['bytes']:,}"]
        if about["slots"]:
            figures.append(f"{table['rows_in_cache']:,}")
        lines.append([name, f"{table['rows']:,}", str(table["dim"]), table["dtype"], *figures, _state(table)])
    features = "; ".join(map(_feature, *zip(*about["features"].items(), strict=True))) if about["features"] else ""
    slots, held = about["slots"], sum(table["rows_in_cache"] for table in about["tables"].values())
    segments = (f"{segment['kind']} of {sum(segment['rows'].values()):,} rows" for segment in about["segments"])
    shared = f", {about['shared_bytes']:,} of them in files of other checkpoints too" if about["shared_bytes"] else ""
    return "\n".join(
        [
            f"{about['path']}: step {about['step']:,}, seed {about['seed']}, format {about['format']}",
            aligned(lines, left=(0, 3, len(lines[0]) - 1)),
            f"features: {'not saved' if about['features'] is None else features or 'the tables'}",
            f"cache: {'not saved' if slots is None else f'{_added(slots)} slots hold {held:,} rows'}",
            f"segments: {', '.join(f'{number} {text}' for number, text in enumerate(segments, 1))}",
            f"loader's state: {'yes' if about['loader_state'] else 'no'}",
            "on disk: " + ("?" if about["disk_bytes"] is None else f"{about['disk_bytes']:,} bytes{shared}"),
        ]
    )


def _state(table: dict[str, Any]) -> str:
    """The leaves of a table's optimizer: `0.mu[2] 0.last[1]:int32 0.count=7`."""
    leaves = [
        f"{name}{leaf['shape']}" + ("" if leaf["dtype"] == "float32" else f":{leaf['dtype']}")
        for name, leaf in table["state"].items()
    ]
    return " ".join([*leaves, *(f"{name}={value}" for name, value in table["scalars"].items())]) or "none"


def _feature(name: str, feature: dict[str, Any]) -> str:
    combined = f"{feature['combiner']} of " if feature["combiner"] else ""
    padding = "" if feature["padding"] is None else f", padding {feature['padding']}"
    return f"{name} = {combined}{feature['table']}{padding}"


def _added(numbers: list[int]) -> str:
    return " + ".join(f"{number:,}" for number in numbers)
