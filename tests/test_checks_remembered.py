"""Image files that were found good are not decoded again; a batch larger than the data set."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import run
from test_robust import NO_DOWNLOAD, coco

import data.checks
from common import BadInput
from data import CocoDetection
from data.checks import HEADER, check_images, memory_of, read_memory
from engine.loader import TrainBatches

pytestmark = pytest.mark.usefixtures("unpainted")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six images to train on, six to evaluate on, and a cache folder that is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return coco(tmp_path / "data")


@pytest.fixture
def decoded(monkeypatch):
    """Names of the files that the check decodes, to be cleared by the test."""
    names, original = [], data.checks.open_image

    def spy(path, *rest):
        names.append(Path(path).name)
        return original(path, *rest)

    monkeypatch.setattr(data.checks, "open_image", spy)
    return names


def opened(folder, **changes) -> CocoDetection:
    source = folder / "annotations" / "instances_train2017.json"
    return CocoDetection(source, folder / "train2017", **changes)


def files_decoded(decoded, dataset, check="new", **processes) -> list[str]:
    decoded.clear()
    skipped = check_images(dataset, check=check, **processes)
    assert skipped + len(decoded) == len(dataset) or processes
    return sorted(decoded)


ALL = [f"{i}.jpg" for i in range(1, 7)]


def test_only_new_and_changed_files_are_decoded(folder, decoded):
    assert files_decoded(decoded, opened(folder)) == ALL
    assert files_decoded(decoded, opened(folder)) == []
    assert files_decoded(decoded, opened(folder), "all") == ALL
    assert files_decoded(decoded, opened(folder), "none") == []
    os.utime(folder / "train2017" / "2.jpg", ns=(1, 1))  # another time
    pixels = np.zeros((48, 64, 3), np.uint8)
    before = (folder / "train2017" / "5.jpg").stat()
    Image.fromarray(pixels).save(folder / "train2017" / "5.jpg")  # another size, the same time
    os.utime(folder / "train2017" / "5.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files_decoded(decoded, opened(folder)) == ["2.jpg", "5.jpg"]
    assert files_decoded(decoded, opened(folder)) == []
    folder.rename(folder.with_name("moved"))
    assert files_decoded(decoded, opened(folder.with_name("moved"))) == ALL


def test_what_the_verdict_depends_on_is_part_of_it(folder, decoded):
    source = folder / "annotations" / "instances_train2017.json"
    files_decoded(decoded, opened(folder))
    assert files_decoded(decoded, opened(folder, upright="yes")) == ALL
    with pytest.raises(BadInput, match="1.jpg: .* 3072 pixels"):
        check_images(opened(folder, max_pixels=3000), check="new")
    files_decoded(decoded, opened(folder))
    whole = json.loads(source.read_text())
    whole["images"][3]["height"] = 50  # another size in the annotations
    source.write_text(json.dumps(whole))
    with pytest.raises(BadInput, match="4.jpg: is 48x64 px"):
        check_images(opened(folder), check="new")


def test_broken_files_are_reported_each_time_and_the_others_remembered(folder, decoded):
    (folder / "train2017" / "3.jpg").write_bytes(b"gone")
    for expected in (ALL, ["3.jpg"], ["3.jpg"]):
        decoded.clear()
        with pytest.raises(BadInput, match="3.jpg: cannot read"):
            check_images(opened(folder), check="new")
        assert sorted(decoded) == expected
    shutil.copy(folder / "train2017" / "2.jpg", folder / "train2017" / "3.jpg")
    assert files_decoded(decoded, opened(folder)) == ["3.jpg"]


def test_a_file_that_rots_is_forgotten_once_it_is_found(folder, decoded):
    """Its size and time stay; only --check all can notice, and then --check new knows too."""
    files_decoded(decoded, opened(folder))
    file = folder / "train2017" / "3.jpg"
    status = file.stat()
    file.write_bytes(bytes(status.st_size))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert files_decoded(decoded, opened(folder)) == []
    for check in ("all", "new"):
        with pytest.raises(BadInput, match="3.jpg: cannot read"):
            check_images(opened(folder), check=check)


def test_two_sets_of_one_source_share_a_file(folder, decoded):
    """As where a part of a set is held out: which part depends on the seed."""
    dataset = opened(folder)
    halves = [opened(folder), opened(folder)]
    for half, part in zip(halves, (slice(0, 3), slice(3, 6))):
        half.files, half.sizes, half.image_ids = (
            dataset.files[part],
            dataset.sizes[part],
            dataset.image_ids[part],
        )
        assert len(files_decoded(decoded, half)) == 3
    assert files_decoded(decoded, dataset) == []
    assert len(list(memory_of(dataset.source).parent.iterdir())) == 1


def test_the_first_process_writes_for_all(folder, decoded):
    dataset, shares = opened(folder), {}

    def note(rank):
        def gather(value):
            shares[rank] = value
            return [value]

        return gather

    for rank in (1, 2):  # one after the other, as if each waited for the first process
        check_images(dataset, rank, 3, None, "new", note(rank))
        assert not read_memory(dataset.source)
    check_images(dataset, 0, 3, None, "new", lambda mine: [mine, shares[1], shares[2]])
    assert sorted(decoded) == ALL and len(read_memory(dataset.source)) == 6
    skipped = [check_images(dataset, rank, 3, None, "new") for rank in range(3)]
    assert sorted(decoded) == ALL and skipped == [2, 2, 2]


@pytest.mark.parametrize("change", ["foreign", "empty", "torn", "noise", "folder"])
def test_a_cache_file_of_other_content_is_ignored(folder, decoded, change):
    files_decoded(decoded, opened(folder))
    memory = memory_of(opened(folder).source)
    content = memory.read_bytes()
    assert len(content) == len(HEADER) + 6 * 16
    torn = content[:-3]
    contents = {"foreign": b"{}" * 99, "empty": b"", "torn": torn, "noise": HEADER + b"x" * 99}
    if change == "folder":
        memory.unlink()
        memory.mkdir()
    else:
        memory.write_bytes(contents[change])
    assert files_decoded(decoded, opened(folder)) == (["6.jpg"] if change == "torn" else ALL)
    if change != "folder":
        assert files_decoded(decoded, opened(folder)) == []
    assert [file.name for file in memory.parent.iterdir()] == [memory.name]  # nothing temporary


def test_a_cache_folder_that_cannot_be_written_is_no_error(folder, decoded, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")  # root may write anywhere
    assert files_decoded(decoded, opened(folder)) == ALL
    assert files_decoded(decoded, opened(folder)) == ALL
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which the specification has ignored
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert files_decoded(decoded, opened(folder)) == ALL


def test_where_the_cache_lies(folder, tmp_path, monkeypatch):
    assert memory_of("a").parent == tmp_path / "cache" / "two-task-detection"
    assert memory_of("a") != memory_of("b")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert memory_of("a").parent == tmp_path / "home" / ".cache" / "two-task-detection"


# ------------------------------------------------------------------------------ runs


def test_a_run_says_what_it_did_not_check(folder, decoded, tmp_path, capsys):
    flags = ["--train", "--data", folder, "--out", tmp_path / "r", *NO_DOWNLOAD]
    run(*flags, "--steps", "2")
    assert len(decoded) == 12 and "check" not in capsys.readouterr().out
    run(*flags, "--steps", "2", "--resume")
    assert len(decoded) == 12
    assert "val2017.json: 6 of 6 images unchanged since a check" in capsys.readouterr().out
    run(*flags, "--steps", "2", "--resume", "--check", "none")
    assert "train2017.json: 6 of 6 images not checked (--check none)" in capsys.readouterr().out
    (folder / "train2017" / "4.jpg").write_bytes(b"gone")
    with pytest.raises(SystemExit):
        run(*flags, "--steps", "2", "--resume")
    assert "4.jpg: cannot read the image" in capsys.readouterr().err


def test_rate_and_speed_count_the_images_that_a_step_sees(folder, tmp_path, capsys):
    """Six images: a batch of 16 is one of 6, in every number that is told."""
    logs, states = [], []
    for batch in (6, 16):
        out = tmp_path / f"{batch}"
        run("--train", "--data", folder, "--out", out, *NO_DOWNLOAD, "--batch", batch)
        assert "8 steps of 6 images (1 x 6), 8 epochs of 6" in capsys.readouterr().out
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        logs.append([(line["lr"], line["losses"]) for line in log if "losses" in line])
        states.append(torch.load(out / "last.pt", weights_only=True))
        assert states[-1]["settings"]["run"]["batch"] == batch  # as asked, for --resume
    assert logs[0] == logs[1] and len(logs[0]) == 8
    weights = [state["model"] for state in states]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    run("--train", "--data", folder, "--out", out, *NO_DOWNLOAD, "--batch", 16, "--resume")


def test_a_batch_is_as_large_as_asked_where_the_set_suffices():
    sizes = np.array([[40, 60]] * 5 + [[60, 40]] * 5)
    for batch in (1, 4, 8, 10, 11, 64):
        batches = TrainBatches(sizes, batch, 0, 0, 6)
        assert batches.batch == min(batch, 10)
        assert {len(b) for b in batches} == {batches.batch}
