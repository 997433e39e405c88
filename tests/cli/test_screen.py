"""What is written to the screen arrives whole, and the last sentence is there whatever happens."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jaxlm.artifacts.folder import hold
from jaxlm.cli import convert, finetune, screen
from jaxlm.cli.main import PIPE, foreseen, main

COMMAND = [sys.executable, "-m", "jaxlm.cli.main"]


def run(*words: str, stdout: int = subprocess.PIPE, **environment: str):
    return subprocess.run(
        [*COMMAND, *words],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        text=True,
        timeout=120,
        check=False,
    )


def test_where_nobody_reads_on_the_command_ends_as_others_do():
    read, write = os.pipe()
    os.close(read)
    done = run("--help", stdout=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (PIPE, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_said():
    with open("/dev/full", "w") as full:
        done = run("--help", stdout=full.fileno())
    assert done.returncode == 2
    assert done.stderr == (
        "error: a file or standard output: No space left on device. Make room on that disk.\n"
    )


def test_a_closed_standard_output_is_no_file_of_others(tmp_path):
    """Without a guard the next file to be opened would be standard output."""
    code = (
        "import os; from jaxlm.cli import screen; screen.prepare();"
        f"file = open({str(tmp_path / 'f')!r}, 'w'); assert file.fileno() > 2; os.write(1, b'x')"
    )
    words = ["sh", "-c", '"$@" >&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(words, check=False, timeout=120)
    assert done.returncode == 0
    assert (tmp_path / "f").read_text() == ""


def test_what_an_encoding_lacks_is_written_as_json_has_it():
    screen.prepare()
    text = 'é "film" \U0001f600 \ud800'
    written = json.dumps(text, ensure_ascii=False).encode("ascii", errors="jaxlm")
    assert json.loads(written) == text
    ascii_only = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = run("é", **ascii_only)
    assert done.returncode == 2
    assert done.stderr.isascii()
    assert done.stderr.startswith("error: command: is not known (got \\u00e9)")


def test_names_are_no_markup(tiny_model, tmp_path, capsys):
    (tmp_path / "[b]").mkdir()
    (tmp_path / "[b]" / "b]").symlink_to(tiny_model)
    assert main(["info", f"{tmp_path}/[b]/b]"]) == 0
    assert "[b]/b]" in "".join(capsys.readouterr().out.split())
    values = {"accuracy": 0.5}
    summary = dict.fromkeys(("zero_shot", "validation", "test"), values)
    numbers = dict.fromkeys(("steps", "tested_step", "forwards", "backwards", "seconds"), 1)
    summary |= {**numbers, "peak_memory_bytes": 1, "task": ":smile:", "model": "[red]"}
    summary |= {"metric": "accuracy", "checkpoint_bytes": 1}
    finetune.show(summary, "o[/b]")
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("o[/b]", "[red]", ":smile:"))


def broken(args):
    raise KeyError("bits")


def test_what_nobody_foresaw_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(convert, "run", broken)
    assert main(["convert"]) == 1
    assert capsys.readouterr().err == (
        "error: an error that jaxlm did not foresee (KeyError: 'bits'). --debug shows the "
        "traceback. Please report it.\n"
    )
    with pytest.raises(KeyError):
        main(["convert", "--debug"])


def test_the_traceback_goes_into_the_folder_that_is_written(monkeypatch, tmp_path, capsys):
    def held(args):
        with hold(tmp_path):
            broken(args)

    monkeypatch.setattr(convert, "run", held)
    assert main(["convert"]) == 1
    error = capsys.readouterr().err
    assert f"The traceback is in {tmp_path / 'log.txt'}." in error
    assert len(error.splitlines()) == 1
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def test_too_little_memory_is_a_sentence_with_the_size():
    with pytest.raises(MemoryError) as caught:
        np.ones(2**50, np.float64)
    said = foreseen(caught.value)
    assert said is not None
    assert "(asked for 8.00 PiB at once)" in said
    assert "--dry-run" in said
    text = "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."
    assert "4398046511104 bytes" in str(foreseen(RuntimeError(text)))


def test_a_device_that_is_not_here_is_a_sentence():
    done = run("info", JAX_PLATFORMS="cuda")
    assert done.returncode == 2
    assert done.stderr.startswith("error: JAX_PLATFORMS: there is no such device here (got 'cuda'")
    assert len(done.stderr.splitlines()) == 1


def test_a_text_that_the_locale_cannot_name_is_a_sentence():
    with pytest.raises(UnicodeEncodeError) as caught:
        "é".encode("ascii")
    assert "Set LC_ALL=C.UTF-8" in str(foreseen(caught.value))


def test_a_start_says_nothing_of_libraries_that_are_not_needed(tiny_model):
    # Programs from a cache that another machine filled make XLA speak.
    done = run("info", str(tiny_model), JAX_ENABLE_COMPILATION_CACHE="false")
    assert (done.returncode, done.stderr) == (0, "")
