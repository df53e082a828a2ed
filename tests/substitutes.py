"""What in the documents' commands cannot be run as it stands, and the nearest that is run for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Substitute:
    """In commands of one document, `text` is run as `instead`."""

    document: str
    text: str
    instead: str
    reason: str


_LARGE = ("--model large-v1", "--model tiny.en", "the weights are 3 GB and from the network")
_PIP = ("pip install", "pip install --dry-run --no-index", "the network; so run, pip still refuses an unknown extra")
_LONG = "thirty epochs of each training take minutes"

SUBSTITUTES = (
    Substitute(
        "README.md", "make demo", "make -C $PROJECT -n demo", "it installs a second environment; .ci/run runs it whole"
    ),
    Substitute("README.md", "make test", "make -C $PROJECT -n test", "it would run these tests"),
    Substitute("docs/backbones.md", *_PIP),
    Substitute("docs/clusters.md", *_PIP),
    Substitute("docs/clusters.md", *_LARGE),
    Substitute(
        "docs/clusters.md",
        "sbatch job.sh",
        "SLURM_ARRAY_TASK_ID=1 SLURM_ARRAY_TASK_MIN=1 SLURM_ARRAY_TASK_STEP=1 SLURM_ARRAY_TASK_COUNT=16 bash job.sh",
        "a SLURM cluster, which test_slurm.py starts; here the script is run as the first task of its array",
    ),
    Substitute("docs/clusters.md", "HEAD:6379", "$RAY_HEAD", "the address of a cluster that the test starts"),
    Substitute("docs/heads.md", "--search --lr 2e-4 --lr 5e-4", "--search --epochs 2 --lr 2e-4 --lr 5e-4", _LONG),
    Substitute("docs/heads.md", "--unfreeze --model tiny.en", "--unfreeze --epochs 1 --model tiny.en", _LONG),
    Substitute("docs/heads.md", "--nproc-per-node 8", "--nproc-per-node 2", "eight GPUs"),
    Substitute("docs/datasets.md", *_LARGE),
)

# Documents that show commands of other programs outside of sh blocks, which nothing here runs, and why.
SHOWN_ONLY = {
    "docs/install.md": "they make environments from package indexes; .ci/run does it by make, test_packaging.py by pip",
}


def substituted(document: str, command: str) -> str:
    for entry in SUBSTITUTES:
        if entry.document == document:
            command = command.replace(entry.text, entry.instead)
    return command
