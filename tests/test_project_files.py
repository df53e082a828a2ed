"""CITATION.cff, CHANGELOG.md and CONTRIBUTING.md agree with the code."""

import json
import re
from pathlib import Path

import yaml

from whisper_at_cli import __version__

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def test_the_citation_has_what_the_format_demands_and_is_of_this_version():
    assert {"cff-version", "message", "title", "authors"} <= set(CITATION)
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    assert str(CITATION["version"]) == __version__
    assert CITATION["license"] == "MIT" and (ROOT / "LICENSE").read_text().startswith("MIT License")


def test_both_papers_are_cited_whole():
    papers = [CITATION["preferred-citation"], *CITATION["references"]]
    for paper in papers:
        assert {"type", "title", "authors", "year", "url"} <= set(paper)
        assert all({"family-names", "given-names"} <= set(author) for author in paper["authors"])
        number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
        assert paper["url"].endswith(number)
    assert [paper["identifiers"][0]["value"] for paper in papers] == ["arXiv:2307.03183", "arXiv:2212.04356"]


def test_the_cited_paper_is_the_one_that_the_reference_values_are_from(shared):
    source = json.loads((shared / "reference" / "paper.json").read_text())["source"]
    names, title, venue = re.fullmatch(r"(.*): (.*), (.*)", source).groups()
    cited = CITATION["preferred-citation"]
    assert [author["family-names"] for author in cited["authors"]] == names.split(", ")
    assert cited["title"].startswith(title) and cited["collection-title"] == venue


def test_the_changelog_has_this_version_and_what_is_to_come():
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.MULTILINE)
    assert sections[0] == ("Unreleased", "")
    assert __version__ in [name for name, _ in sections]
    assert all(date for name, date in sections[1:]), "every release has its date"


def test_every_command_is_in_the_changelog():
    from whisper_at_cli.cli import cli

    assert [name for name in cli.commands if not re.search(rf"`{name}[` ]", CHANGELOG)] == []


def test_every_file_that_the_contributors_guide_names_is_there():
    """By its room and name: files move within a room."""
    for named in re.findall(r"`((?:extract|heads|probe|tests|benchmarks)/[\w/]+(?:\.py|/)?)`", CONTRIBUTING):
        room, name = named.split("/")[0], named.rstrip("/").rsplit("/", 1)[-1]
        assert any(path.name == name for path in (ROOT / room).rglob("*")), named
    for name in re.findall(r"`(\w+\.py)`", CONTRIBUTING):
        assert any(path.name == name for path in ROOT.rglob("*.py") if ".venv" not in path.parts), name


def test_links_of_these_files_lead_somewhere():
    for text in (CONTRIBUTING, CHANGELOG):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (ROOT / target).exists(), target


def test_what_the_guide_runs_is_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"(?:^|`)make ([\w-]+)", CONTRIBUTING, re.MULTILINE)
    assert len(set(targets)) >= 9
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
