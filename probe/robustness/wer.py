"""Word error rate in the two ways that this project reports.

wer         after Whisper's text normaliser: digits, abbreviations, spellings and fillers are evened out
wer_paper   as in the paper: upper case, punctuation removed, nothing else; Whisper's digits count as errors

Both are corpus-level: errors of all utterances over words of all references. They exceed 1 where there are more errors,
insertions among them, than words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Errors:
    """Substitutions, deletions and insertions against so many reference words. They add up."""

    errors: int = 0
    words: int = 0

    def __add__(self, other: Errors) -> Errors:
        return Errors(self.errors + other.errors, self.words + other.words)

    @property
    def rate(self) -> float | None:
        """None where there are no reference words: then it is not defined."""
        return self.errors / self.words if self.words else None


def count_errors(references: Iterable[str], hypotheses: Iterable[str], normalise: Callable[[str], str]) -> Errors:
    """Word errors of a corpus. A reference that is empty, before or after `normalise`, still counts insertions."""
    import jiwer

    references = [normalise(text) for text in references]
    hypotheses = [normalise(text) for text in hypotheses]
    if not references:
        return Errors()
    counted = jiwer.process_words(references, hypotheses)
    wrong = counted.substitutions + counted.deletions
    return Errors(wrong + counted.insertions, counted.hits + wrong)


@lru_cache(maxsize=4)
def whisper_normaliser(language: str = "en") -> tuple[str, Callable[[str], str]]:
    """Whisper's normaliser for a language, with the name it has in results."""
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    if language == "en":
        return "whisper", EnglishTextNormalizer()
    return "whisper-basic", BasicTextNormalizer()


@lru_cache(maxsize=1)
def paper_normaliser() -> Callable[[str], str]:
    import jiwer

    return jiwer.Compose([jiwer.ToUpperCase(), jiwer.RemovePunctuation()])
