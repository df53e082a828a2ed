"""Results as `probe`, `robustness` and `train-head` print them, small enough to check by eye."""

CLASSES = ["dog", "rain", "sea_waves"]
F1 = [[0.5, 0.6, None], [0.9, 0.6, None], [0.7, 0.2, None]]  # by layer; the best layers are 2 and, of a tie, 1


def probe_result(**more):
    rows = [
        {
            "layer": layer, "accuracy": 0.5 + layer / 10, "accuracy_std": 0.01 * layer, "macro_f1": 0.6,
            "folds": [{"fold": f, "accuracy": a + layer / 10, "clips": 3} for f, a in ((1, 0.4), (2, 0.6))],
            "class_f1": dict(zip(CLASSES, values, strict=True)),
            "confusion": {"dog": {"dog": 2, "rain": 1}, "rain": {"rain": 3}},
        }
        for layer, values in enumerate(F1, 1)
    ]  # fmt: skip
    return {
        "metric": "accuracy", "layers": rows, "best_layer": 3, "clips": 6, "backbone": "tiny.en", "strength": 1.0,
        "seed": 0, "device": "cpu", "warnings": ["1 of 3 classes have no clip"],
    } | more  # fmt: skip


def noise_result(**more):
    def level(snr, wer, dog, rain):
        return {"snr": snr, "wer": wer, "wer_paper": wer + 0.1, "class_wer": {"dog": dog, "rain": rain, "wind": 0.5},
                "class_wer_paper": {}, "utterances": 4}  # fmt: skip

    levels = [level(20.0, 0.1, 0.1, 0.1), level(-10.0, 0.7, 0.5, 0.9), level(-20.0, 1.2, 1.1, None)]
    return {
        "model": "tiny.en", "kind": "robustness", "parameters": 37184640, "normaliser": "whisper",
        "clean": {"wer": 0.05, "wer_paper": 0.08}, "results": levels, "settings": {"mixing": "exact"},
    } | more  # fmt: skip


HEAD = {"head": "wa-mlp", "dim": 384, "params": 4622, "metric": "accuracy", "value": 0.93, "std": 0.02, "folds": []}
