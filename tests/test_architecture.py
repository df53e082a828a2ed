"""docs/architecture.md names files and functions that are there; no layer of the rooms knows of one above it."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROOMS = ("extract", "heads", "probe")


def test_every_file_that_the_page_names_is_there():
    named = re.findall(r"`((?:extract|heads|probe|benchmarks)/[\w/.]*)`", PAGE)
    assert len(named) > 30
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_function_that_the_page_names_is_in_the_file_it_names():
    named = re.findall(r"`((?:extract|heads|probe)/[\w/]+\.py)`\s+`(\w+)`", PAGE)
    assert len(named) > 15
    for path, name in named:
        defined = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert name in defined, f"{path} defines no {name}"


def test_every_folder_of_the_rooms_is_in_the_drawing():
    drawing = (ROOT / "docs" / "images" / "architecture.svg").read_text()
    folders = {path.parent.name for room in ROOMS for path in (ROOT / room).rglob("__init__.py")}
    assert {folder for folder in folders if f"{folder}/" not in drawing} == set()


def test_the_cache_knows_of_no_backbone_no_dataset_and_no_pipeline():
    for path in (ROOT / "extract" / "cache").glob("*.py"):
        used = set(re.findall(r"^\s*(?:from|import) whisper_at_cli\.extract\.(\w+)", path.read_text(), re.M))
        assert used.isdisjoint({"backbones", "datasets", "pipeline", "audio"}), path.name
