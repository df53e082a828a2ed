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

SUBSTITUTES = (
    Substitute("README.md", "make demo", "make -n demo", "it installs a second environment; .ci/run runs it whole"),
    Substitute("README.md", "make test", "make -n test", "it would run these tests"),
    Substitute("docs/backbones.md", *_PIP),
    Substitute("docs/clusters.md", *_PIP),
    Substitute("docs/clusters.md", *_LARGE),
    Substitute("docs/datasets.md", *_LARGE),
)


def substituted(document: str, command: str) -> str:
    for entry in SUBSTITUTES:
        if entry.document == document:
            command = command.replace(entry.text, entry.instead)
    return command
