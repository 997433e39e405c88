"""What is read from a file is what it says, or a sentence that names it."""

import json
import math
import os

import pytest

from jaxlm.artifacts.files import (
    file_path,
    folder_name,
    inside,
    parse_json,
    read_json,
    to_json,
    write_atomic,
)
from jaxlm.core.errors import UserError


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"a": 1', "[" * 100_000, "9" * 5000, r'"\ud800"', r'{"a": ["\uDC00"]}', "\x00",
     '[{"a": 1, "b": 1, "a": 1}]'],
    ids=range(9),
)  # fmt: skip
def test_json_that_is_none_is_refused_by_name(text):
    with pytest.raises(UserError, match=r"^rows\.jsonl, line 3: not valid JSON"):
        parse_json(text, "rows.jsonl, line 3")


def test_escapes_that_form_a_character_are_read():
    assert parse_json(r'"\ud83d\ude00"', "x") == "\N{GRINNING FACE}"


def test_a_record_has_the_fields_that_are_relied_on(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"n": 1, "x": 2, "flag": true}')
    assert read_json(path, n=int, x=float, flag=bool)["n"] == 1
    for fields in ({"m": int}, {"n": str}, {"flag": int}):
        with pytest.raises(UserError, match=f"a.json: the field {next(iter(fields))}"):
            read_json(path, **fields)
    path.write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        read_json(path)


def test_json_that_is_written_has_no_nan():
    text = to_json({"a": [math.nan, (math.inf, 1.5)], "b": {"c": -math.inf}})
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]],
        "b": {"c": None},
    }


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "path", [" ", "a\0b", "a" * 300, "é" * 128, "a/" * 3000, "~nosuchuser/x"], ids=range(6)
)
def test_a_path_that_cannot_be_is_refused_by_its_key(path):
    with pytest.raises(UserError, match=r"^output: .{1,120}\. \w"):
        file_path(path, "output")


@pytest.mark.parametrize(
    "name", ["../a", "/a", "a/../../b", "..", "", "a\0", 3, None, "C:\\a", "\\\\h\\a"]
)
def test_a_name_in_a_file_does_not_leave_its_folder(tmp_path, name):
    with pytest.raises(UserError, match="outside its folder"):
        inside(tmp_path, name, "index.json")


def test_names_inside_a_folder(tmp_path):
    assert inside(tmp_path, "a/b.safetensors", "index.json") == tmp_path / "a" / "b.safetensors"
    assert folder_name("lr[1e-3] b", "methods") == "lr[1e-3] b"
    for name in ("..", ".", "", "a/b", "a\\b", "\0", "x" * 300):
        with pytest.raises(UserError, match=r"^methods: cannot name a folder"):
            folder_name(name, "methods")


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(file_path("~/x", "output")) == "/somewhere/x"
    for text in ("", " ", "a\0b", "~nosuchuser/x"):
        with pytest.raises(UserError, match=r"^output: "):
            file_path(text, "output")


def test_a_file_without_permission_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("{}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        path.mkdir()  # root reads everything, but no folder as a file
    with pytest.raises(UserError, match=r"a\.json: cannot be read"):
        read_json(path)
