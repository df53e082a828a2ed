"""Word error rates: corpus-level, in two scorings, defined wherever they can be."""

import pytest

from whisper_at_cli.probe.robustness.wer import Errors, count_errors, paper_normaliser, whisper_normaliser

WHISPER, PAPER = whisper_normaliser()[1], paper_normaliser()


def slow_errors(reference: str, hypothesis: str) -> int:
    """Edit distance between words by the textbook's table."""
    a, b = reference.split(), hypothesis.split()
    table = [[i + j if i * j == 0 else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            change = table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
            table[i][j] = min(change, table[i - 1][j] + 1, table[i][j - 1] + 1)
    return table[-1][-1]


def test_digits_are_errors_in_the_papers_scoring_alone():
    reference, hypothesis = "He bought forty-two dogs, Mr. Smith said.", "he bought 42 dogs mister smith said"
    assert count_errors([reference], [hypothesis], WHISPER) == Errors(0, 7)
    assert count_errors([reference], [hypothesis], PAPER) == Errors(2, 7)


def test_upper_case_and_punctuation_are_no_errors_in_either():
    for normalise in (WHISPER, PAPER):
        assert count_errors(["Don't go; “never”!"], ["DONT GO NEVER" if normalise is PAPER else "don't go never"],
                            normalise).errors == 0  # fmt: skip


def test_corpus_level_means_all_errors_over_all_words():
    references, hypotheses = ["A B C D E F G H", "Z"], ["A B C D E F G H", "Y"]
    assert count_errors(references, hypotheses, PAPER).rate == pytest.approx(1 / 9)  # the mean of rates would be 1/2
    apart = [count_errors([r], [h], PAPER) for r, h in zip(references, hypotheses, strict=True)]
    assert sum(apart, Errors()) == count_errors(references, hypotheses, PAPER)


@pytest.mark.parametrize("hypothesis", ["the dog ran", "dog the ran far", "a b c d e f g", "", "THE  DOG "])
def test_counts_equal_the_textbooks(hypothesis):
    reference = "THE DOG RAN FAR AWAY"
    assert count_errors([reference], [hypothesis], PAPER).errors == slow_errors(reference, hypothesis.upper())


def test_empty_texts_count_and_an_endless_one_exceeds_one():
    assert count_errors(["A B"], [""], PAPER) == Errors(2, 2)
    assert count_errors([""], ["so it goes"], PAPER) == Errors(3, 0)
    assert count_errors(["Hmm."], ["uh, yes"], WHISPER) == Errors(1, 0)  # fillers are nothing to Whisper's normaliser
    assert count_errors([""], [""], PAPER).rate is None and count_errors([], [], PAPER).rate is None
    assert count_errors(["stop"], ["stop " * 200], PAPER).rate == 199


def test_another_language_is_not_put_through_the_english_normaliser():
    name, normalise = whisper_normaliser("de")
    assert name == "whisper-basic" and normalise("Mr. Müller!") == "mr müller "
    assert whisper_normaliser("en")[0] == whisper_normaliser()[0] == "whisper"
