import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxlm.core.errors import UserError
from jaxlm.data.sources import read_rows, stream_rows
from tests.helpers.sentences import refused

ROWS = [{"text": "a joy", "label": 1}, {"text": "naïve, 東京", "label": 0}]


def values(source: str, folder: Path, key: str = "train") -> list[dict]:
    return [dict(row.values) for row in read_rows(source, key=key, base_dir=folder)]


def write(folder: Path, name: str, text: str) -> str:
    data = text.encode()
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    return name


JSONL = '{"text": "a joy", "label": 1}\n\n{"text": "naïve, 東京", "label": 0}'
CSV = 'text,label\r\na joy,1\r\n"naïve, 東京",0\r\n'
TSV = "text\tlabel\na joy\t1\n\nnaïve, 東京\t0\n"
STRINGS = [{"text": "a joy", "label": "1"}, {"text": "naïve, 東京", "label": "0"}]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [("a.jsonl", JSONL, ROWS), ("a.csv", CSV, STRINGS), ("a.tsv", TSV, STRINGS)],
)
def test_text_formats(tmp_path, ending: str, start: str, name: str, text: str, expected) -> None:
    assert values(write(tmp_path, name + ending, start + text), tmp_path) == expected


def test_jsonl_lines_end_at_newlines_alone(tmp_path) -> None:
    source = write(tmp_path, "a.jsonl", '{"text": "a\u2028b"}\r\n{"text": "c"}\r\n')
    assert values(source, tmp_path) == [{"text": "a\u2028b"}, {"text": "c"}]


def test_csv_values_may_hold_newlines(tmp_path) -> None:
    rows = read_rows(
        write(tmp_path, "a.csv", 'text,label\n"a\nb",0\nc,1\n'), key="train", base_dir=tmp_path
    )
    assert [(row.values["text"], row.number) for row in rows] == [("a\nb", 2), ("c", 4)]


def test_parquet_and_where_a_row_stands(tmp_path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert values("a.parquet", tmp_path) == ROWS
    rows = read_rows("a.parquet", key="train", base_dir=tmp_path)
    assert [row.where for row in rows] == ["a.parquet, row 1", "a.parquet, row 2"]
    rows = read_rows(write(tmp_path, "a.jsonl", JSONL), key="train", base_dir=tmp_path)
    assert [row.where for row in rows] == ["a.jsonl, line 1", "a.jsonl, line 3"]


def test_folder_of_the_yaml_file_first_then_the_working_directory(tmp_path, monkeypatch) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, text in ((here, '{"text": "here"}'), (there, '{"text": "there"}')):
        folder.mkdir()
        write(folder, "a.jsonl", text)
    monkeypatch.chdir(here)
    assert values("a.jsonl", there) == [{"text": "there"}]
    (there / "a.jsonl").unlink()
    assert values("a.jsonl", there) == [{"text": "here"}]
    assert [row.values["text"] for row in read_rows("a.jsonl", key="train")] == ["here"]
    assert values(str(here / "a.jsonl"), there) == [{"text": "here"}]


@pytest.fixture
def hub_folder(tmp_path, monkeypatch) -> Path:
    """A data set as a repository of the hub holds it: two configurations, two splits."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "pair"
    folder.mkdir()
    for config in ("one", "two"):
        for split in ("train", "validation"):
            table = pyarrow.Table.from_pylist([{"text": f"{config} {split} {i}"} for i in range(3)])
            pyarrow.parquet.write_table(table, folder / f"{config}-{split}.parquet")
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {config}-{split}.parquet\n"
            for split in ("train", "validation")
        )
        for config in ("one", "two")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return folder


def test_data_set(hub_folder) -> None:
    base = hub_folder.parent
    assert values("pair/two", base)[0] == {"text": "two train 0"}
    assert values("pair/one", base, "validation")[2] == {"text": "one validation 2"}
    assert values("pair/one:validation", base, "test")[0] == {"text": "one validation 0"}
    assert values("pair/one:train[1:2]", base, "test") == [{"text": "one train 1"}]
    rows = read_rows("pair/two", key="train", base_dir=base)
    assert rows[2].where == "pair/two, row 3"
    for source, split in (("pair/three", "train"), ("pair/one", "test")):
        with refused(f"task.{split}", repr(source), f"a data set with a split {split!r}"):
            values(source, base, split)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("none.jsonl", "there is no such file (got 'none.jsonl')"),
        ("jaxlm:subj/none.jsonl.gz", "there is no such file (got 'jaxlm:subj/none.jsonl.gz')"),
        ("nobody-has-this/none", "is neither a file nor a data set with a split 'test'"),
        ("a.txt", "its ending is not known (got 'a.txt')"),
        ("a.jsonl", "a.jsonl: not a regular file (got a folder)"),
        ("~nosuchuser/a.jsonl", "no such user"),
        ("a\0.jsonl", "NUL"),
        (" ", "empty"),
        ("x" * 300 + ".jsonl", ""),
        ("jaxlm:../../pyproject.jsonl", "outside"),
    ],
)
def test_missing(tmp_path, source: str, said: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "a.jsonl").mkdir()
    with refused("task.test", said):
        read_rows(source, key="test", base_dir=tmp_path)


# name: (content, key, part of the message). The key is the option or the place in the file.
DAMAGED = [
    ("a.jsonl", b"", "task.train", "is empty (got a.jsonl)"),
    ("a.jsonl", b"\n \n", "task.train", "is empty (got a.jsonl)"),
    ("a.csv", b"text,label\n", "task.train", "is empty (got a.csv)"),
    ("a.parquet", b"", "task.train", "is empty (got a.parquet)"),
    ("a.jsonl.gz", b"", "task.train", "is empty (got a.jsonl.gz)"),
    ("a.jsonl", b"\x80\x04\x95", "a.jsonl, line 1", "not a text file in UTF-8"),
    ("a.csv", b"text\nab\0c\n", "a.csv", "not a text file in UTF-8"),
    ("a.parquet", b"PAR1 but no more", "a.parquet", "not a whole Parquet file"),
    ("a.jsonl.gz", b'{"text": "plain"}\n', "task.train", "not a whole gzip file"),
    (
        "a.jsonl.gz",
        gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9],
        "task.train",
        "not a whole gzip",
    ),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2", "Expecting value at character 9"),
    (
        "a.jsonl",
        b'{"a": 1}\n{"a": ' + b"9" * 5000 + b"}\n",
        "a.jsonl, line 2",
        "thousands of digits",
    ),
    (
        "a.jsonl",
        b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud800"}\n',
        "a.jsonl, line 2",
        "its other half",
    ),
    ("a.json", b'[{"text": "a"}, 3]', "a.json, row 2", "not a JSON object"),
    ("a.json", b'[{"text": "a"}', "a.json", "Expecting ',' delimiter at character 14"),
    ("a.jsonl", b'{"text": "a"}\n["text"]\n', "a.jsonl, line 2", "not a JSON object"),
    ("a.jsonl", b"\xef\xbb\xbf\n", "task.train", "is empty"),
    ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "a.jsonl, line 1", "not a text file in UTF-8"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1", "nested too deeply"),
    ("a.csv", b"text,label\na,0\nb, c,1\n", "a.csv, line 3", "must have 2 values (got 3)"),
    ("a.csv", b"text,text\na,0\n", "a.csv, line 1", "names a column twice"),
]


@pytest.mark.parametrize(("name", "data", "key", "said"), DAMAGED)
def test_unreadable(tmp_path, name: str, data: bytes, key: str, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with refused(key, said):
        read_rows(name, key="train", base_dir=tmp_path)


def test_json_is_an_array_or_lines(tmp_path) -> None:
    assert values(write(tmp_path, "a.json", json.dumps(ROWS, indent=2)), tmp_path) == ROWS
    assert values(write(tmp_path, "b.json.gz", JSONL), tmp_path) == ROWS
    rows = read_rows("a.json", key="train", base_dir=tmp_path)
    assert [row.where for row in rows] == ["a.json, row 1", "a.json, row 2"]


def test_a_column_twice_in_a_parquet_file_is_named(tmp_path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with refused("a.parquet", "names a column twice (got 'text')"):
        values("a.parquet", tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "a.jsonl", JSONL)
    assert values("~/a.jsonl", tmp_path / "elsewhere") == ROWS


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """A folder with one split and a folder with two, as `save_to_disk` writes them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    split = datasets.Dataset.from_list(ROWS, features=features)
    split.save_to_disk(str(tmp_path / "one"))
    both = datasets.DatasetDict({"train": split, "test": split.select([1])})
    both.save_to_disk(str(tmp_path / "two"))
    return tmp_path


def test_what_datasets_saves_to_disk_is_read(saved) -> None:
    assert values("one", saved) == values("one", saved, "test") == values("two", saved) == ROWS
    assert values("two:test", saved) == ROWS[1:]
    (row, _) = read_rows("one", key="train", base_dir=saved)
    assert row.class_names == {"label": ("bad", "good")}
    with pytest.raises(
        UserError, match=r"has no such split \(got 'validation'\). Name one of train, test after"
    ):
        values("two", saved, "validation")


def test_a_saved_data_set_may_not_name_files_elsewhere(saved) -> None:
    state = json.loads((saved / "one" / "state.json").read_text(encoding="utf-8"))
    state["_data_files"][0]["filename"] = "../two/train/" + state["_data_files"][0]["filename"]
    (saved / "one" / "state.json").write_text(json.dumps(state), encoding="utf-8")
    with pytest.raises(UserError, match="names a file outside its folder"):
        values("one", saved)


def test_a_readme_may_not_name_files_elsewhere(hub_folder) -> None:
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["secret"]}), hub_folder.parent / "x.parquet"
    )
    (hub_folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: ../x.parquet\n---\n"
    )
    with pytest.raises(UserError):
        values("pair", hub_folder.parent)


def test_no_script_of_a_folder_is_run(tmp_path) -> None:
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    for source in ("evil", "evil/config", "evil:train"):
        with pytest.raises(UserError, match=r"^task.train: "):
            values(source, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_tables_of_a_folder_lose_no_rows_to_stray_quotes(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tables"
    folder.mkdir()
    write(folder, "train.tsv", 'id\ttext\n1\t"a 5 in\n2\tb"\n3\tc\n')
    texts = [row["text"] for row in values("tables", tmp_path)]
    assert texts == ['"a 5 in', 'b"', "c"]


def test_class_names_of_a_parquet_file_are_read(tmp_path) -> None:
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    datasets.Dataset.from_list(ROWS, features=features).to_parquet(str(tmp_path / "a.parquet"))
    (row, _) = read_rows("a.parquet", key="train", base_dir=tmp_path)
    assert row.class_names == {"label": ("bad", "good")}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_streamed_rows_are_those_of_the_whole_file(tmp_path, name: str) -> None:
    if name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
    else:
        write(tmp_path, name, CSV if name.endswith("csv") else JSONL)
    source = str(tmp_path / name)
    assert list(stream_rows(source, key="rows")) == read_rows(source, key="rows")


def test_a_row_is_yielded_before_the_next_one_is_read(tmp_path) -> None:
    source = str(tmp_path / write(tmp_path, "a.jsonl", '{"text": "a"}\n{'))
    rows = stream_rows(source, key="rows")
    assert next(rows).values == {"text": "a"}
    with refused(f"{source}, line 2"):
        next(rows)
    empty = str(tmp_path / write(tmp_path, "b.jsonl", "\n"))
    with refused("rows"):
        next(stream_rows(empty, key="rows"))
