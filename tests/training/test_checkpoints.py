import json
import shutil

import pytest

from transxssm.training.checkpoints import (
    MANIFEST,
    SaveError,
    keep_latest,
    last_complete_checkpoint,
    publish_files,
    publish_folder,
    save_error,
    step_of,
    why_incomplete,
)


def publish(run_dir, step):
    staged = run_dir / ".unfinished" / f"checkpoint-{step}"
    (staged / "shards").mkdir(parents=True)
    (staged / "model.safetensors").write_bytes(bytes(100))
    (staged / "optimizer.pt").write_bytes(bytes(50))
    (staged / "shards" / "0.distcp").write_bytes(bytes(10))
    publish_folder(staged, run_dir / f"checkpoint-{step}")
    return run_dir / f"checkpoint-{step}"


def test_a_published_checkpoint_is_whole_and_lists_its_files(tmp_path):
    checkpoint = publish(tmp_path, 5)
    assert why_incomplete(checkpoint) is None
    assert json.loads((checkpoint / MANIFEST).read_text()) == {
        "model.safetensors": 100,
        "optimizer.pt": 50,
        "shards/0.distcp": 10,
    }


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "shards/0.distcp", MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_skipped_for_the_one_before(tmp_path, caplog, name, damage):
    earlier, later = publish(tmp_path, 9), publish(tmp_path, 10)
    assert last_complete_checkpoint(tmp_path) == later  # 10 comes after 9
    if damage == "cut":
        path = later / name
        path.write_bytes(path.read_bytes()[:-1])
    else:
        (later / name).unlink()
    assert last_complete_checkpoint(tmp_path) == earlier
    assert "checkpoint-10 is incomplete" in caplog.text
    assert name in caplog.text


@pytest.mark.parametrize(
    ("limit", "also", "left"),
    [
        (None, None, [2, 9, 10, 11]),
        (0, None, [2, 9, 10, 11]),
        (1, None, [10, 11]),  # 11 is damaged and does not count: 10 is what a run would resume from
        (2, None, [9, 10, 11]),
        (1, "elsewhere/checkpoint-2", [2, 10, 11]),
    ],
)
def test_old_checkpoints_go_and_the_last_whole_one_never_does(tmp_path, limit, also, left):
    for step in (2, 9, 10, 11):
        publish(tmp_path, step)
    (tmp_path / "checkpoint-11" / MANIFEST).unlink()
    keep_latest(tmp_path, limit, also)
    assert sorted(step_of(path) for path in tmp_path.glob("checkpoint-*")) == left


def test_no_checkpoint_at_all(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) is None


def test_publishing_again_replaces_a_damaged_checkpoint(tmp_path):
    (publish(tmp_path, 5) / "optimizer.pt").unlink()
    assert why_incomplete(publish(tmp_path, 5)) is None


def test_published_files_replace_those_of_the_same_name_only(tmp_path):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "metrics.jsonl").write_text("kept")
    staged = tmp_path / ".unfinished"
    staged.mkdir()
    (staged / "config.json").write_text("new")
    publish_files(staged, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "config.json": "new",
        "metrics.jsonl": "kept",
    }


def test_a_save_error_is_one_line_with_reason_and_what_is_left(tmp_path):
    publish(tmp_path, 5)
    error = save_error("checkpoint-10", tmp_path, OSError(28, "No space left on device"))
    assert isinstance(error, SaveError)
    message = str(error)
    assert "\n" not in message
    for part in ("checkpoint-10", "No space left on device", "checkpoint-5 is whole", "--resume"):
        assert part in message


def test_a_full_disk_is_recognised_whatever_the_library_calls_it(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    error = save_error(
        "checkpoint-5", tmp_path, RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos")
    )
    assert "No space left on device (0 MB free)" in str(error)
