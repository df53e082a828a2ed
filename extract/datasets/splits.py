"""What splits are called, and by which of our names they go."""

SPLITS = {
    "train": "train", "training": "train",
    "val": "valid", "valid": "valid", "validation": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "eval", "evaluation": "eval",
}  # fmt: skip
