"""The tables are as printed, what is counted stands beside it, and one's own runs are placed by what they are."""

import csv
import json
import tomllib
from pathlib import Path

import numpy as np
import pytest
from test_cli import run

from planted import planted_cache
from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import build_head, train_head
from whisper_at_cli.heads.checkpoint import HeadDescription, save_head
from whisper_at_cli.heads.tables import cells, paper, paper_table, read_result, render

ROOT = Path(__file__).resolve().parents[1]


def saved(folder, *, head="tl-tr", width=128, classes=527, **changes):
    fields = dict(
        head=head, width=width, layers=4, dim=384, frames=25, class_names=tuple(f"c{i}" for i in range(classes)),
        backbone="tiny.en", weights_sha256="0" * 64, clip_seconds=10.0, loss="bce", metric="mAP", value=0.3214,
        value_of="on 100 clips held out", trained_clips=20_000,
    )  # fmt: skip
    module = build_head(head, layers=4, dim=384, classes=classes, width=width)
    return save_head(module, folder, HeadDescription(**(fields | changes)))


def test_printed_values_are_those_of_the_reference(shared):
    reference = json.loads((shared / "reference" / "paper.json").read_text())
    assert paper() == {name: reference[name] for name in paper()}
    assert {"source", "table1", "table2"} <= set(paper())


def test_the_printed_values_are_packaged():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert "paper.json" in data["whisper_at_cli.heads"]


def test_every_row_of_table_2_is_counted_as_printed():
    rows = paper_table(2)["rows"]
    assert len(rows) == 5
    for row in rows:
        assert row["counted_gflops"] == pytest.approx(row["gflops"], abs=0.006)
        assert row["counted_params_M"] == pytest.approx(row["params_M"], abs=0.06)


def test_every_row_of_table_1_whose_form_is_known_is_counted_as_printed():
    pytest.importorskip("transformers")
    rows = paper_table(1)["rows"]
    counted = [row for row in rows if row["counted_params_M"] is not None]
    assert len(rows) == 17 and len(counted) == 12
    for row in counted:
        rounding = 0.06 if row["at_params_M"] < 1 else 0.5
        assert row["counted_params_M"] == pytest.approx(row["at_params_M"], abs=rounding), row
        printed = row["at_speedup_vs_ast"]
        within = 0.06 if printed < 3 else max(0.5, 0.005 * printed)
        assert row["counted_speedup_vs_ast"] == pytest.approx(printed, abs=within), row


@pytest.mark.parametrize(
    "changes, column",
    [
        ({"trained_clips": 20_000}, "as20k_mAP"),
        ({"trained_clips": 2_000_000}, "as2m_mAP"),
        ({"classes": 50, "metric": "accuracy"}, "esc50_accuracy"),
        ({"classes": 10, "metric": "accuracy"}, None),
        ({"classes": 50, "metric": "mAP"}, None),
    ],
)
def test_a_run_stands_in_the_papers_column_only_if_it_is_of_the_same_task(tmp_path, changes, column):
    row = paper_table(1, [saved(tmp_path / "head", **changes)])["rows"][-1]
    assert row["own"] and (row["system"], row["training"], row["head"]) == ("tiny.en", "frozen", "TL-Tr-128")
    columns = ("as20k_mAP", "as2m_mAP", "esc50_accuracy")
    assert {name: row[name] for name in columns} == dict.fromkeys(columns) | ({column: 32.14} if column else {})
    assert row["value"] == 32.14 and row["at_params_M"] is None


def test_training_error_is_named_and_stands_in_no_column_of_the_papers(tmp_path):
    folder = saved(tmp_path / "head")
    found = {
        "checkpoint": str(folder),
        "mAP": 0.9,
        "accuracy": None,
        "clips": 9,
        "chosen": "all",
        "clips_trained_on": 9,
    }
    (tmp_path / "seen.json").write_text(json.dumps(found))
    (tmp_path / "held.json").write_text(json.dumps(found | {"clips_trained_on": 0}))
    seen, held = paper_table(1, [tmp_path / "seen.json", tmp_path / "held.json"])["rows"][-2:]
    assert seen["as20k_mAP"] is None and "on clips that it was trained on" in seen["result"] and seen["training_error"]
    assert held["as20k_mAP"] == 90 and "trained on" not in held["result"]


def test_a_run_is_counted_by_its_own_sizes(tmp_path):
    folder = saved(tmp_path / "head", classes=7)
    module = build_head("tl-tr", layers=4, dim=384, classes=7, width=128)
    row = paper_table(2, [folder])["rows"][-1]
    assert row["tl_tr_dim"] == 128
    assert row["counted_params_M"] * 1e6 == pytest.approx(sum(p.numel() for p in module.parameters()))
    table = paper_table(2, [saved(tmp_path / "other", head="wa-mlp", width=None)])
    assert len(table["rows"]) == 5 and "is a wa-mlp, and Table 2 is of tl-tr" in table["notes"][0]


def test_an_encoder_that_was_trained_with_its_head_counts(tmp_path):
    tuned = saved(tmp_path / "tuned", head="last-tr", width=None, encoder={"mels": 80, "heads": 6})
    frozen = saved(tmp_path / "frozen", head="last-tr", width=None)
    rows = paper_table(1, [tuned, frozen])["rows"][-2:]
    assert [row["training"] for row in rows] == ["fine-tuned", "frozen"]
    assert rows[0]["counted_params_M"] > rows[1]["counted_params_M"] + 7


def test_what_the_commands_print_is_a_result_too(capsys, tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 2, 25, 16))
    cache = planted_cache(tmp_path / "a.zarr", features, np.arange(40) % 4, fold=np.arange(40) // 8 + 1)
    arguments = ("train-head", cache.path, "--head", "wa-mlp", "--epochs", "1", "--out", tmp_path / "head", "--json")
    (tmp_path / "trained.json").write_text(run(capsys, *arguments)[1])
    (tmp_path / "evaluated.json").write_text(run(capsys, "evaluate", tmp_path / "head", cache.path, "--json")[1])
    for name in ("head", "head/head.json", "trained.json", "evaluated.json"):
        row = paper_table(1, [tmp_path / name])["rows"][-1]
        assert (row["system"], row["head"], row["metric"]) == ("planted", "WA-MLP", "accuracy") and row["value"] > 0
    (tmp_path / "head").rename(tmp_path / "moved")
    with pytest.raises(WhisperATError, match="which is not there"):
        read_result(tmp_path / "trained.json")
    train_head(cache, head="wa-mlp", changes={"epochs": 1})
    (tmp_path / "trained.json").write_text('{"checkpoint": null}')
    with pytest.raises(UsageError, match="was not saved"):
        read_result(tmp_path / "trained.json")
    (tmp_path / "trained.json").write_text("[]")
    with pytest.raises(UsageError, match="is no result"):
        read_result(tmp_path / "trained.json")


def test_every_format_holds_every_row(tmp_path):
    table = paper_table(1, [saved(tmp_path / "head", backbone="my_50%|encoder")])
    header, rows = cells(table)
    parsed = list(csv.reader(render(table, "csv").splitlines()))
    assert parsed == [list(header), *map(list, rows)]
    markdown = render(table, "markdown").splitlines()
    assert len(markdown) == len(rows) + 2 and r"my_50%\|encoder" in markdown[-1]
    latex = render(table, "latex")
    assert latex.count(r" \\") == len(rows) + 1 and r"my\_50\%|encoder" in latex
    assert latex.startswith(r"\begin{tabular}") and latex.endswith(r"\end{tabular}")
    with pytest.raises(UsageError, match="choose from text, markdown, latex, csv"):
        render(table, "html")


def test_the_command_prints_tables(capsys, tmp_path):
    status, out, err = run(capsys, "table", "1", saved(tmp_path / "head"))
    assert status == 0 and "Whisper-Large" in out and "TL-Tr-128" in out and "32.1" in out and "Gong" in err
    status, out, _ = run(capsys, "table", "2", "--json")
    assert status == 0 and len(json.loads(out)["rows"]) == 5
    status, out, _ = run(capsys, "table", "2", "--format", "markdown")
    assert status == 0 and out.startswith("| TL-Tr channels |")
    for arguments, said in ((("3",), "choose 1 or 2"), (("1", tmp_path / "absent"), "is no result")):
        status, _, err = run(capsys, "table", *arguments)
        assert status == 2 and said in err
