"""A tokenizer is opened, and the code beside it never is."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from jaxlm.cli.main import main
from jaxlm.core.errors import UserError
from jaxlm.data import corpus
from jaxlm.models.hf import SHIPPED
from jaxlm.models.hf_tokenizer import has_tokenizer, read_tokenizer
from tests.helpers.tiny import make_tokenizer

EVIL = "import pathlib\npathlib.Path({marker!r}).touch()\nclass Evil: pass\n"


def with_code(folder: Path, marker: Path, settings: dict) -> None:
    """A folder whose tokenizer or configuration names a class in a file that leaves a mark."""
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    for name in ("tokenizer_config.json", "config.json"):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | settings))


CODE = {
    "tokenizer": {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"},
    "slow tokenizer": {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    "list": {"auto_map": ["evil.Evil", None], "tokenizer_class": "Evil"},
    "configuration": {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
    "another repository": {"auto_map": {"AutoTokenizer": [None, "a/b--evil.Evil"]}},
}


@pytest.mark.parametrize("kind", CODE)
def test_code_beside_a_tokenizer_never_runs_and_nobody_is_asked(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    make_tokenizer().save_pretrained(folder)
    with_code(folder, marker, CODE[kind])

    def asked(*_):
        raise AssertionError("the user was asked whether code may run")

    monkeypatch.setattr("builtins.input", asked)
    with contextlib.suppress(UserError):  # refused, or opened by a class of transformers
        read_tokenizer(folder)
    assert not marker.exists()


@pytest.mark.parametrize("open_it", ["generate", "pretrain"])
def test_yes_on_standard_input_runs_no_code(
    open_it: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
):
    folder, marker = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(SHIPPED, folder)
    with_code(folder, marker, CODE["tokenizer"])
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 9))
    if open_it == "generate":
        assert main(["generate", str(folder), "--prompt=the"]) == 2
    else:
        with pytest.raises(UserError, match="code from a model folder is never run"):
            corpus.read_tokenizer(folder)
    out, err = capfd.readouterr()
    assert "[y/N]" not in out + err
    assert not marker.exists()


def test_only_this_module_opens_anything_with_transformers():
    root = Path(__file__).parents[2] / "jaxlm"
    users = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if any(
            line.strip().startswith(("from transformers", "import transformers"))
            for line in path.read_text(encoding="utf-8").splitlines()
        )
        and path.name != "hf.py"  # it writes a model card that shows such a line
    }
    # The tokenizer of a GGUF file is built in memory from checked metadata; it opens nothing.
    assert users == {"models/hf_tokenizer.py", "models/gguf_tokenizer.py"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "many", "added_tokens_decoder": 3}'),
    ],
)
def test_a_damaged_tokenizer_ends_in_a_sentence_with_the_folder(
    name: str, text: str, tmp_path: Path
):
    make_tokenizer().save_pretrained(tmp_path)
    assert has_tokenizer(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        read_tokenizer(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: the tokenizer cannot be read (")
