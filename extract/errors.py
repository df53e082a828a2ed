"""Errors that a user should read: each message says what was found, what was asked and what to do."""

MISSING = "missing: "  # how the error of a clip begins whose file is not there


class WhisperATError(Exception):
    """The work failed. Base of every error that the command line prints as one line."""

    exit_status = 1


class UsageError(WhisperATError):
    """What was asked for cannot be done as asked: a missing file, an unknown name, a value out of range."""

    exit_status = 2


class CacheError(WhisperATError):
    """A feature cache is damaged, incomplete, in use, or at odds with what was asked of it."""


class StoreError(WhisperATError):
    """The place where a cache lies cannot be reached or refuses; that says nothing about the cache itself."""


class AudioError(WhisperATError):
    """One audio file cannot be read. The clip is marked failed; the other clips go on."""


class MissingAudioError(AudioError):
    """There is no such audio file. A dataset may list what nobody has any more; it is picked up once it is there."""

    def __init__(self, reason: str):
        super().__init__(f"{MISSING}{reason}")


class WeightsError(WhisperATError):
    """A file of model weights is damaged, incomplete or of an unknown kind."""
