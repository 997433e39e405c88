"""A folder has one writer, says what it was made from, and is whole or unfinished."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxlm.artifacts.folder import (
    CHECKSUMS,
    LOCK,
    MANIFEST,
    check_inputs,
    claim,
    crc32,
    ensure_folder,
    failure,
    hold,
    mark_failed,
    replacing,
    seal,
    stage,
    verify,
)
from jaxlm.core.errors import UserError

HOLDER = """
import sys, time
from pathlib import Path
from jaxlm.artifacts.folder import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_writer_is_told_who_the_first_is(tmp_path, holder):
    with pytest.raises(UserError, match=f"^output: .*process {holder.pid} on "), hold(tmp_path):
        pytest.fail("two writers in one folder")


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert (tmp_path / LOCK).exists()
    with hold(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_lock_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), hold(tmp_path):
        raise KeyError
    with hold(tmp_path), pytest.raises(UserError), hold(tmp_path):
        pytest.fail("two writers in one folder")
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]  # with the traceback
    (tmp_path / "log.txt").unlink()
    with pytest.raises(UserError), hold(tmp_path):
        raise UserError("foreseen")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_claimed_by_its_kind(tmp_path):
    folder = tmp_path / "a" / "b"
    with claim(folder, "run.json", "run"):
        (folder / "run.json").write_text("{}")
    with claim(folder, "run.json", "run"), pytest.raises(UserError), hold(folder):
        pytest.fail("two writers in one folder")
    with (
        pytest.raises(UserError, match=r"^output: the folder has files but no study"),
        claim(folder, "study.json", "study"),
    ):
        pytest.fail("a folder of another kind")
    with pytest.raises(UserError), claim(tmp_path / "c", "run.json", "run"):
        raise UserError("before any work")
    assert not (tmp_path / "c").exists()


class Calls:
    """Work that can be told to stop in the middle."""

    def __init__(self):
        self.places, self.stop = [], False

    def __call__(self, place: Path) -> dict:
        self.places.append(place)
        if self.stop:
            raise KeyboardInterrupt
        return {"value": len(self.places)}


def test_a_stage_is_done_once_for_its_inputs(tmp_path) -> None:
    work, said = Calls(), []
    place, first = stage(tmp_path, "a", {"x": (1, 2)}, work, log=said.append)
    again = stage(tmp_path, "a", {"x": [1, 2]}, work, log=said.append)
    assert again == (place, first) == (place, {"value": 1})
    other, second = stage(tmp_path, "a", {"x": [1, 3]}, work)
    assert second == {"value": 2}
    assert stage(tmp_path, "a", {"x": [1, 2]}, work)[1] == first
    assert work.places == [place, other]
    assert [line.split(",")[0] for line in said] == ["a: starts", "a: nothing has changed"]


def test_a_stage_that_was_stopped_goes_on_in_its_folder(tmp_path) -> None:
    work, said = Calls(), []
    work.stop = True
    with pytest.raises(KeyboardInterrupt):
        stage(tmp_path, "a", {"x": 1}, work)
    work.stop = False
    place, result = stage(tmp_path, "a", {"x": 1}, work, log=said.append)
    assert (work.places, result) == ([place, place], {"value": 2})
    assert said[0].startswith("a: resumes")
    (place / "manifest.json").write_text('{"inputs": {"x": 2}}')
    with pytest.raises(UserError, match=r"was made with x = 2 \(got 1\)"):
        stage(tmp_path, "a", {"x": 1}, work)
    (place / MANIFEST).write_text('{"inputs": {"x": 1}, "result": 3}')
    with pytest.raises(UserError, match="damaged"):
        stage(tmp_path, "a", {"x": 1}, work)


def test_the_first_input_that_differs_is_named(tmp_path):
    model = "ab12cd34" * 8
    check_inputs(tmp_path, {"a": (1, 2), "m": model}, {"m": model, "a": [1, 2]})
    with pytest.raises(UserError, match=r"^out: .* with a\.m = ab12cd34 \(got 0{8}\)\. Choose"):
        check_inputs(tmp_path, {"a": {"m": model}, "z": 1}, {"a": {"m": "0" * 64}}, key="out")


def test_a_failure_is_told_by_its_marker(tmp_path):
    assert failure(tmp_path) is None
    mark_failed(tmp_path, "diverged")
    assert failure(tmp_path) == "diverged"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "cache" / "a"

    def write(text: str, place: Path) -> None:
        (place / "x").write_text(text)
        if text == "half":
            raise KeyboardInterrupt

    def refuse() -> str:
        raise UserError("text: is bad (got this). Write it again.")

    def whole(text: str) -> str:
        ensure_folder(folder, lambda: text, write)
        return (folder / "x").read_text()

    with pytest.raises(UserError):
        ensure_folder(folder, refuse, write)
    assert not folder.parent.exists()
    assert whole("old") == whole("new") == "old"
    (folder / "x").write_text("bad")
    with pytest.raises(KeyboardInterrupt):
        whole("half")
    assert not folder.exists()
    assert whole("new") == "new"


def test_sealed_files_are_told_from_damaged_ones(tmp_path):
    (tmp_path / "sub").mkdir()
    data = bytes(range(256)) * 64
    (tmp_path / "sub" / "a.bin").write_bytes(data)
    (tmp_path / "b").write_bytes(b"123456789")
    assert crc32(tmp_path / "b") == 0xCBF43926  # the check value of CRC-32
    seal(tmp_path)
    verify(tmp_path)
    (tmp_path / "sub" / "a.bin").write_bytes(data[:5] + b"x" + data[6:])
    with pytest.raises(UserError, match=r"a\.bin: damaged \(differs from its checksum"):
        verify(tmp_path)
    verify(tmp_path, below="b")
    (tmp_path / "sub" / "a.bin").unlink()
    with pytest.raises(UserError, match="No such file"):
        verify(tmp_path)
    for content in ("{", '{"files": {"b": 3}}', '{"files": 3}'):
        (tmp_path / CHECKSUMS).write_text(content)
        with pytest.raises(UserError, match=CHECKSUMS):
            verify(tmp_path)
    (tmp_path / CHECKSUMS).unlink()
    with pytest.raises(UserError, match="is missing"):
        verify(tmp_path)


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_a_stop_at_any_moment_leaves_no_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every call that changes the disk is the last one once; then the folder is read."""
    steps = {"count": 0, "most": 0}

    def counted(function):
        def call(*args, **options):
            steps["count"] += 1
            if steps["count"] > steps["most"]:
                raise KeyboardInterrupt
            return function(*args, **options)

        return call

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, counted(getattr(Path, name)))
    seen = set()
    for most in range(20):
        old = {"config": "old", "a": "old", "b": "old", "mine": "mine"}
        target = fill(tmp_path / f"target{most}", **old)
        new = {"config": "new", "a": "new", "c": "new"}
        steps |= {"count": 0, "most": most}
        with (
            contextlib.suppress(KeyboardInterrupt),
            replacing(target, last="config", stale=lambda path: path.name in "abc") as source,
        ):
            fill(source, **new)
        found = {path.name: path.read_text() for path in target.iterdir()}
        assert found["mine"] == "mine"
        if "config" in found:
            assert found in (old, new | {"mine": "mine"})
        seen.add(found.get("config"))
    assert seen == {"old", None, "new"}
