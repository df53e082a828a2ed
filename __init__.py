"""whisper-at-cli: the layers of Whisper's frozen encoder, extracted once, probed and trained on many times."""

__version__ = "0.1.0"
