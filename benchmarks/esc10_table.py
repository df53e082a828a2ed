"""The whole table of ESC-10 in one command: layers, heads, random weights, log-mel statistics, chance; with intervals.

    python benchmarks/esc10_table.py ../shared/data/esc10 --model tiny.en --out esc10-table

Runs `extract`, `probe`, `train-head`, `compare` and `report`; probes and heads only where their file is not there
yet, so that a run that was stopped goes on. Leaves in --out: caches, predictions (.npz), table.json, table.md and
report.html; prints table.md. Heads take most of the time (--heads leaves some out).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HEADS = ("concat-linear", "last-mlp", "wa-mlp", "wa-pool", "wa-tr", "tl-tr-128")


def run(*arguments: object, into: Path | None = None) -> None:
    """One command; what it prints goes into a file, whole or not at all. Raises CalledProcessError where it fails."""
    line = [sys.executable, "-m", "whisper_at_cli.cli", *map(str, arguments)]
    print("$ whisper-at-cli", *map(str, arguments), file=sys.stderr)
    printed = subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout
    if into:
        into.write_bytes(printed)


def caches(data: Path, model: str, out: Path) -> dict[str, Path]:
    """By the name in the table: the encoder, the same with random weights, and the spectrogram alone."""
    found = {}
    for name, weights in (("layers", model), ("random", f"random:{size_of(model)}"), ("log-mel", "log-mel")):
        found[name] = out / f"{name}.zarr"
        run("--quiet", "extract", data, found[name], "--model", weights)
    return found


def size_of(model: str) -> str:
    """The size that random weights are to have: of weights in a folder or a file, tiny.en."""
    return "tiny.en" if Path(model).exists() else model


def head_options(name: str) -> list[str]:
    form, _, dim = name.rpartition("-") if name[-1].isdigit() else (name, "", "")
    return ["--head", form, *(["--dim", dim] if dim else [])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="The folder of ESC-10 or ESC-50.")
    parser.add_argument("--model", default="tiny.en", help="As extract's.")
    parser.add_argument("--out", type=Path, default=Path("esc10-table"), help="Folder of all results.")
    parser.add_argument("--heads", nargs="*", default=HEADS, help="Heads to train; a width follows a dash.")
    parser.add_argument("--seeds", type=int, default=3, help="Trainings of each head.")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    made = caches(options.data, options.model, out)
    predictions = []
    for name, cache in made.items():
        predictions.append(out / f"{name}.npz")
        if not predictions[-1].exists():
            run("--quiet", "probe", cache, "--nested", "--predictions", predictions[-1], "--json",
                into=out / f"{name}.json")  # fmt: skip
    for name in options.heads:
        predictions.append(out / f"{name}.npz")
        if not predictions[-1].exists():
            run("--quiet", "train-head", made["layers"], *head_options(name), "--seeds", options.seeds, "--out",
                out / name, "--predictions", predictions[-1], "--json", into=out / f"{name}.json")  # fmt: skip
    run("compare", *predictions, "--chance", "--json", into=out / "table.json")
    run("compare", *predictions, "--chance", "--table", "markdown", into=out / "table.md")
    given = [part for path in predictions for part in ("--predictions", path)]
    run("report", out / "layers.json", *given, "--out", out / "report.html")
    print((out / "table.md").read_text(), end="")


if __name__ == "__main__":
    main()
