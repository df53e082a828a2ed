"""Mutants that survive because they change no result, and why: no test could tell them from the program.

Each entry is a file, a function, a part of the change as the report words it, and the reason. A mutant that a test does
notice counts as killed, whatever stands here.
"""

SPEED = "a setting of speed, memory or patience: no result depends on it"
ONE = "there is one of them here: the first is the last"

_SETTINGS = {
    "extract/cache/store.py": (
        "in: BUFFERS = ", "in: REQUESTS = ", "in: PART_BYTES = ", "in: PARTS = ", "in: CONNECT_TIMEOUT, ",
        "-> 4 in: RETRIES = ", "-> 6 in: RETRIES = ", "-> 19 in: RETRIES = ", "-> 21 in: RETRIES = ",
        "0.1 -> 1.1 in: RETRIES = ", "0.1 -> -0.9 in: RETRIES = ", "3 -> 4 in: RETRIES = ", "3 -> 2 in: RETRIES = ",
        "2 -> 3 in: RETRIES = ", "2 -> 1 in: RETRIES = ",
    ),
    "extract/cache/stream.py": ("in: BUFFER_MB = ", "in: READ_BYTES = "),
    "extract/cache/status_log.py": ("in: SEGMENT_BYTES = ",),
    "extract/cache/export.py": ("in: WRITE_BYTES = ",),
    "extract/cache/import_npz.py": ("in: SHAPE_SAMPLES = ",),
    "extract/evaluation/metrics.py": ("in: CHUNK_SCORES = ",),
}  # fmt: skip

EQUIVALENT: list[tuple[str, str, str, str]] = [
    *((file, "<module>", change, SPEED) for file, changes in _SETTINGS.items() for change in changes),
    ("extract/cache/stream.py", "stream_batches", "2 -> ", SPEED),
    ("extract/cache/stream.py", "_ShuffleBuffer.add", "0 -> -1 in: self.parts[0][slots] = means", ONE),
    ("extract/cache/verify.py", "_shard_damage", "1 -> 0 in: if len(found) == len(rows) > 1",
     "the one damage of one clip is the same, named once or by clip"),
    ("extract/cache/store.py", "_writev", "written < size -> written <= size",
     "of a buffer that was written whole nothing is left to write"),
    ("extract/cache/store.py", "LocalStore.write_together", "0 -> -1 in: file = opened.enter_context(open(",
     "nothing is written through the file object, whose buffer it would be"),
    ("extract/cache/import_npz.py", "_common_shape", "0 -> -1 in: return shapes.most_common(1)", ONE),
    ("extract/cache/import_npz.py", "_common_shape", "1 -> 2 in: shapes[", "twice every count is in the same order"),
    ("extract/cache/stream.py", "_draw_epoch", "1 in: least = ", "without rows the buffer has no room anyway"),
    ("extract/cache/stream.py", "FeatureDataset.__getitem__", "0 -> -1 in: return", ONE),
    ("extract/cache/store.py", "LocalFile.__init__", "posix_fadvise", "advice to the kernel, for speed alone"),
    ("extract/cache/writer.py", "CacheWriter.update_paths", "0 -> -1 in: column = ", ONE),
    ("extract/cache/writer.py", "CacheWriter.update_paths", "0 -> -1 in: here = ", ONE),
    ("extract/cache/writer.py", "CacheWriter.update_paths", "0 -> -1 in: array[", ONE),
    ("extract/cache/reader.py", "FeatureCache.layer", "False -> True in: return out", "a copy has the same values"),
    ("extract/cache/export.py", "_add", "'UO' -> 'UOx'", "NumPy has no kind of type of that letter"),
    ("extract/cache/export.py", "export_npz", "0 -> -1 in: np.savez", ONE),
    ("extract/cache/import_npz.py", "_fill", "0 -> -1 in: block.", ONE),
    ("extract/evaluation/metrics.py", "_ap_and_auc", "positives > 0 -> positives >= 0",
     "a class without positives is 0 / 0, so NaN, where it is ranked as well"),
    ("extract/evaluation/metrics.py", "_ap_and_auc", "0 -> -1 in: order = ",
     "a class without positives is 0 / 0, so NaN, where it is ranked as well"),
    ("extract/evaluation/metrics.py", "_ap_and_auc", "in: for some in _alike(order, positives, most=", SPEED),
    ("extract/evaluation/metrics.py", "_ap_and_auc", "'stable' -> 'stablex'", "NumPy looks at the first letter"),
    ("extract/evaluation/metrics.py", "_rank_positives", "0 -> -1 in: ap = ", ONE),
    ("extract/evaluation/metrics.py", "_rank_positives", "0 -> -1 in: auc = ", ONE),
    ("extract/evaluation/metrics.py", "_rank_positives", "1 -> 0 in: precision = ",
     "what is 0 / 0 then is padding, and masked"),
    ("extract/evaluation/metrics.py", "_ascending", "'cpu' -> 'cpux'", "the other way to sort gives the same, later"),
    ("extract/evaluation/metrics.py", "d_prime", "0 < auc < 1 -> 0 < auc <= 1", "an AUC of 1 was answered before"),
    ("extract/evaluation/metrics.py", "d_prime", "0 < auc < 1 -> 0 <= auc < 1", "an AUC of 0 was answered before"),
    ("extract/evaluation/metrics.py", "class_f1", "1 -> 2 in: return np.where(",
     "where the sum is 1 there are no hits"),
]  # fmt: skip
