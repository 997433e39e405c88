"""Files that would be read for ever, or fill the memory, are refused at once."""

import gzip
import os
import random
import socket
from pathlib import Path

import pytest

from jaxlm.core.errors import UserError
from jaxlm.data import corpus, files
from jaxlm.data.sources import read_rows


@pytest.fixture
def bomb(monkeypatch):
    """`bomb(path)` writes zeros, packed a thousandfold, which are too many."""
    monkeypatch.setattr(files, "_FREE", 2**20)
    return lambda path: path.write_bytes(gzip.compress(bytes(2**22)))


def both_readers(path: Path):
    yield lambda: read_rows(str(path), key="train")
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        yield lambda: list(corpus.documents(path))


@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.jsonl.gz", "a.parquet"])
def test_only_regular_files_are_read(tmp_path, monkeypatch, kind, name) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket has at most 107 bytes
    path = Path(name)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)
    for read in both_readers(path):
        with pytest.raises(UserError, match=r"not a regular file|cannot be read"):
            read()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path, bomb, name) -> None:
    path = tmp_path / name
    bomb(path)
    for read in both_readers(path):
        with pytest.raises(UserError, match=f"{name}: unpacks to more than 200 times its size"):
            read()


def test_text_that_packs_well_is_read(tmp_path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 2_000))
    assert len(read_rows(str(path), key="train")) == 2_000


def test_files_larger_than_their_share_of_the_memory_are_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files, "room", lambda: 2**20)
    draw = random.Random(0)
    text = "".join(f'{{"text": "{draw.randbytes(2000).hex()}"}}\n' for _ in range(300))
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=f"{name}: has more than 1 MiB, 1/16 of the memory"):
            read_rows(str(tmp_path / name), key="train")
    assert sum(1 for _ in corpus.documents(tmp_path / "a.jsonl.gz")) == 300


def test_a_parquet_file_that_unpacks_to_more_than_its_share_is_refused(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    from jaxlm.data import sources

    monkeypatch.setattr(sources, "room", lambda: 2**20)
    table = pyarrow.table({"text": pyarrow.array(["x" * 2**16] * 50).dictionary_encode()})
    pyarrow.parquet.write_table(
        table.cast(pyarrow.schema({"text": pyarrow.string()})), tmp_path / "a.parquet"
    )
    assert (tmp_path / "a.parquet").stat().st_size < 2**19
    with pytest.raises(UserError, match=r"a.parquet: has more than"):
        read_rows(str(tmp_path / "a.parquet"), key="train")


def test_the_room_is_a_share_of_the_memory_that_the_process_may_have() -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    whole = files.room()
    assert whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 16
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (whole * 8, before[1]))
        assert files.room() == whole // 2
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.parametrize("name", ["x.zip", "inner/x.zst", "x.gz", "x.fifo", "x.jsonl"])
def test_a_folder_is_looked_through_before_a_library_reads_it(tmp_path, bomb, name) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "good.jsonl").write_text('{"text": "a"}\n')
    files.check_folder(tmp_path, "data")
    if name.endswith(".gz"):
        bomb(path)
    elif name == "x.fifo":
        os.mkfifo(path)
    elif name == "x.jsonl":
        path.symlink_to("/dev/zero")
    else:
        path.write_bytes(b"PK")
    with pytest.raises(UserError, match=f"data: {name}"):
        files.check_folder(tmp_path, "data")
