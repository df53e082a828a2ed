"""A saved head comes back with the same logits and all that is needed to use it; a damaged one does not come back."""

import json

import numpy as np
import pytest
import torch

from whisper_at_cli.extract.errors import UsageError, WhisperATError
from whisper_at_cli.heads import build_head, load_head
from whisper_at_cli.heads.checkpoint import (
    HeadDescription,
    id_hashes,
    load_encoder_weights,
    save_head,
    trained_id_hashes,
)
from whisper_at_cli.heads.forms import FORMS

FORMS_AND_WIDTHS = [
    *((head, None) for head in FORMS),
    ("tl-tr", 8),
]


def describe(head="wa-mlp", width=None, **changes) -> HeadDescription:
    fields = dict(
        head=head, width=width, layers=3, dim=16, frames=25, class_names=("dog", "rooster"), backbone="planted",
        weights_sha256="0" * 64, clip_seconds=5.0, loss="ce", recipe={"lr": 0.1, "betas": [0.9, 0.99]}, seed=4,
    )  # fmt: skip
    return HeadDescription(**(fields | changes))


def new_head(head="wa-mlp", width=None):
    return build_head(head, layers=3, dim=16, classes=2, width=width)


@pytest.fixture
def saved(tmp_path):
    return save_head(new_head(), tmp_path / "head", describe())


@pytest.mark.parametrize("head, width", FORMS_AND_WIDTHS)
@torch.no_grad()
def test_a_saved_head_gives_the_same_logits(tmp_path, head, width):
    module = new_head(head, width)
    description = describe(head, width)
    save_head(module, tmp_path / "head", description)
    loaded = load_head(tmp_path / "head")
    features = torch.randn(2, 3, 25, 16)
    assert torch.equal(loaded(features), module.eval()(features))
    assert loaded.description == description and not loaded.training
    assert loaded.description.class_names == ("dog", "rooster")


def test_a_folder_holds_two_files_and_no_temporary_ones(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["head.json", "head.safetensors"]


def test_saving_again_replaces_the_head(saved):
    module = new_head("tl-tr")
    save_head(module, saved, describe("tl-tr"))
    assert load_head(saved).description.head == "tl-tr"


def test_a_folder_without_a_head_is_refused(tmp_path):
    for folder, said in ((tmp_path / "absent", "absent does not exist"), (tmp_path, "holds no head")):
        with pytest.raises(UsageError, match=said):
            load_head(folder)


def damage_weights(folder):
    content = bytearray((folder / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "head.safetensors").write_bytes(content)


def truncate_weights(folder):
    content = (folder / "head.safetensors").read_bytes()
    (folder / "head.safetensors").write_bytes(content[: len(content) // 2])


def weights_of_another_run(folder):
    """As after a kill between the two renames of a second training into the same folder."""
    other = save_head(new_head(), folder.parent / "other", describe())
    (other / "head.safetensors").replace(folder / "head.safetensors")


def edit_record(**changes):
    def edit(folder):
        record = json.loads((folder / "head.json").read_text())
        (folder / "head.json").write_text(json.dumps(record | changes))

    return edit


@pytest.mark.parametrize(
    "harm, message",
    [
        (damage_weights, "not the file that head.json describes"),
        (truncate_weights, "not the file that head.json describes"),
        (weights_of_another_run, "not the file that head.json describes"),
        (lambda folder: (folder / "head.safetensors").unlink(), "no weights to read"),
        (lambda folder: (folder / "head.json").write_text('{"format": '), "head.json is damaged"),
        (lambda folder: (folder / "head.json").write_text("[]"), "head.json is damaged"),
        (edit_record(format_version=99), "of version 99; this version reads 1"),
        (edit_record(format="something else"), "is a 'something else'"),
        (edit_record(layers=5), "does not fit its weights"),
        (edit_record(head="mlp"), "does not fit its weights"),
        (edit_record(surprise=1), "does not fit its weights"),
    ],
)
def test_a_damaged_head_is_refused(saved, harm, message):
    harm(saved)
    with pytest.raises(WhisperATError, match=message):
        load_head(saved)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WhisperATError, match="cannot write the head to .*file"):
        save_head(new_head(), tmp_path / "file" / "head", describe())


def test_the_clips_that_a_head_was_trained_on_are_kept_by_their_ids_and_go_with_the_next_head(tmp_path):
    folder = save_head(new_head(), tmp_path / "head", describe(), trained_ids=["b", "a", "c"])
    hashes = trained_id_hashes(folder)
    assert np.isin(id_hashes(["a", "b", "c", "d"]), hashes).tolist() == [True, True, True, False]
    assert len(id_hashes([f"clip{i}" for i in range(10_000)])) == len(set(id_hashes(f"clip{i}" for i in range(10_000))))
    damage = bytearray((folder / "trained_on.safetensors").read_bytes())
    damage[-1] ^= 1
    (folder / "trained_on.safetensors").write_bytes(damage)
    with pytest.raises(WhisperATError, match="trained_on.safetensors is not the file that head.json describes"):
        trained_id_hashes(folder)
    load_head(folder)  # which needs the head alone
    save_head(new_head(), folder, describe())
    assert trained_id_hashes(folder) is None
    assert sorted(path.name for path in folder.iterdir()) == ["head.json", "head.safetensors"]


def test_a_head_of_an_earlier_version_is_read(saved):
    """Fields that came later have defaults."""
    record = json.loads((saved / "head.json").read_text())
    for name in ("class_names_known", "source", "encoder"):
        del record[name]
    (saved / "head.json").write_text(json.dumps(record))
    description = load_head(saved).description
    assert description.class_names_known and description.encoder is None
    with pytest.raises(UsageError, match="no encoder of its own"):
        load_encoder_weights(saved)
