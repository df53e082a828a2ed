"""AudioSet-2M on paper: what it takes, by arithmetic from the cache's format and from measured rates.

Nothing here is measured but the two rates of extraction; rows for GPUs are marked as the assumption that they are.
"""

from __future__ import annotations

import math

from record import Result, number

CLIPS, LAYERS, FRAMES, CHANNELS = 2_000_000, 32, 25, 1280
SHARD_MB = 128
MEASURED = "extract-large-v1-bfloat16-cpu.json"
ASSUMED_CLIPS_PER_SECOND = 400  # asked of one H100
GPU_HOUR, CORE_HOUR = 3.0, 0.05  # dollars
GPUS = (1, 8, 64)


def storage_rows() -> list[str]:
    """Bytes, shards and files, for each storage type."""
    values, means = LAYERS * FRAMES * CHANNELS, LAYERS * CHANNELS
    rows = []
    for dtype, clip_bytes, in_shard, files in (
        ("float16", 2 * values + 2 * means, 2 * values, 4),
        ("int8", values + 2 * 2 * means, values, 5),
    ):
        shards = math.ceil(CLIPS / int(SHARD_MB * 1e6 / in_shard))
        sizes = f"{clip_bytes / 1e6:.2f} MB | {CLIPS * clip_bytes / 1e12:.1f} TB"
        rows.append(f"| {dtype} | {sizes} | {shards:,} | {shards * files:,} |")
    npz = 2 * values
    rows.append(
        f"| one npz a clip, as today | {npz / 1e6:.2f} MB uncompressed | {CLIPS * npz / 1e12:.1f} TB | | {CLIPS:,} |"
    )
    return rows


def time_row(name: str, clips_per_second: float, dollars_an_hour: float) -> str:
    hours = CLIPS / clips_per_second / 3600
    return f"| {name} | {number(clips_per_second)} | {number(hours)} | {number(hours * dollars_an_hour)} |"


def paper(results: dict[str, Result]) -> str:
    """Two tables: storage, and time and money."""
    measured = results[MEASURED]
    cores, rates = measured["machine"]["cores"], measured["clips_per_second"]
    lines = ["| storage | bytes a clip (features and mean) | in all | shards | files |", "|---|---|---|---|---|"]
    lines += [*storage_rows(), "", "| devices | clips/s | hours | dollars |", "|---|---|---|---|"]
    lines.append(time_row(f"measured: {cores} cores, bfloat16", rates["pipeline"], cores * CORE_HOUR))
    lines.append(time_row(f"measured: the baseline on {cores} cores", rates["baseline"], cores * CORE_HOUR))
    for gpus in GPUS:
        name = f"**assumed**: {gpus} GPU{'s' * (gpus > 1)}, if each reaches {ASSUMED_CLIPS_PER_SECOND} clips/s"
        lines.append(time_row(name, gpus * ASSUMED_CLIPS_PER_SECOND, gpus * GPU_HOUR))
    return "\n".join(lines)
