"""A store loses nothing that was written, changes nothing, and is not taken for another."""

import contextlib
import dataclasses
import functools
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.gradients.projection import projector
from jaxlm.influence import GradientStore, StoreSpec, projection_name
from jaxlm.influence import shards as files

DIM = 6
ROWS = np.random.default_rng(0).standard_normal((11, DIM)).astype(np.float32)
IDS = [f"example {i}" for i in range(11)]
SPEC = StoreSpec(dim=DIM)


def written(folder, rows=ROWS, ids=IDS, spec=SPEC, *, sizes=(4, 7), progress=None, **options):
    """A complete store, from blocks of these sizes; they are added to `progress` when written."""
    progress = [] if progress is None else progress
    with GradientStore.create(folder, spec, **options) as writer:
        at = 0
        for size in sizes:
            writer.append(rows[at : at + size], ids[at : at + size])
            at += size
            progress.append(size)
        writer.commit()
    return GradientStore.open(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(call, text: str) -> None:
    with pytest.raises(UserError) as found:
        call()
    assert text in str(found.value)


# --- reading


@pytest.mark.parametrize("shard_rows", [1, 3, 100])
def test_a_store_reads_like_the_array(tmp_path, shard_rows):
    store = written(tmp_path / "new" / "store", shard_rows=shard_rows)
    assert (store.shape, len(store), store.ids, store.spec) == ((11, DIM), 11, IDS, SPEC)
    indices = [
        *(slice(i, j) for i in (0, 2, 3, 10, None) for j in (0, 3, 9, 11, 50, -2, None)),
        slice(None, None, 3),
        slice(9, 2, -2),
        *(0, 5, -1),
        np.array([7, 0, 7, -3]),
        np.array([[1, 2], [3, 4]]),
        np.zeros(0, int),
    ]
    for index in indices:
        found = store[index]
        np.testing.assert_array_equal(found, ROWS[index])
        assert found.dtype == np.float32
    for bad in (11, -12, np.array([3, 11])):
        with pytest.raises(IndexError):
            store[bad]
    np.testing.assert_array_equal(np.concatenate(list(store.blocks(4))), ROWS)
    store[0:2][:] = 0  # a copy
    np.testing.assert_array_equal(store[0:2], ROWS[:2])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_rows_of_any_float_are_written_as_float32(tmp_path, dtype):
    import jax.numpy as jnp

    rows = np.asarray(ROWS).astype(jnp.dtype(dtype))
    given = rows if dtype == "float64" else jnp.asarray(rows)
    np.testing.assert_array_equal(written(tmp_path, given)[:], rows.astype(np.float32))


def test_ids_may_be_integers_or_texts(tmp_path):
    ids = [3, "3", "ä\n", -1, 2**40, *IDS[5:]]
    assert written(tmp_path, ids=ids).ids == ids


def test_ids_of_numpy(tmp_path):
    assert written(tmp_path, ids=np.arange(5, 16)).ids == list(range(5, 16))


# --- encodings


def test_rows_of_float32_are_the_numbers_in_order(tmp_path):
    written(tmp_path, shard_rows=100)
    assert (tmp_path / "000-000000.rows").read_bytes() == ROWS.astype("<f4").tobytes()


def spread(rows=9, dim=13):
    """Rows whose sizes lie 60 orders of magnitude apart, with one of zeros."""
    values = np.random.default_rng(1).standard_normal((rows, dim))
    values *= 10.0 ** np.linspace(-30, 30, rows)[:, None]
    values[3] = 0
    values[5, 2] = 0
    return values.astype(np.float32)


def encoded(folder, dtype):
    rows = spread()
    spec = StoreSpec(dim=rows.shape[1], dtype=dtype)
    ids = list(range(len(rows)))
    return rows, written(folder, rows, ids, spec, sizes=(9,), shard_rows=4)[:]


def test_float16_keeps_eleven_bits_of_every_row(tmp_path):
    rows, found = encoded(tmp_path, "float16")
    largest = np.abs(rows).max(axis=1, keepdims=True)
    # Half of the last bit, or of the smallest half-precision number.
    assert (np.abs(found - rows) <= 2.0**-11 * np.abs(rows) + 2.0**-25 * largest).all()
    assert (found[3] == 0).all()


def test_float16_of_halves_is_exact(tmp_path):
    rows = (np.random.default_rng(2).integers(-2047, 2048, (5, DIM)) * 2.0**-70).astype(np.float32)
    np.testing.assert_array_equal(
        written(tmp_path, rows, IDS[:5], StoreSpec(dim=DIM, dtype="float16"), sizes=(5,))[:], rows
    )


def test_int8_is_the_nearest_of_255_multiples_of_the_largest(tmp_path):
    rows, found = encoded(tmp_path, "int8")
    largest = np.abs(rows.astype(np.float64)).max(axis=1, keepdims=True)
    steps = np.divide(rows, largest, out=np.zeros(rows.shape), where=largest > 0) * 127
    np.testing.assert_allclose(found, np.round(steps) * largest / 127, rtol=1e-6)
    raw = (tmp_path / "000-000000.rows").read_bytes()[: 4 + 13]
    scale, *values = struct.unpack("<f13b", raw)
    assert scale == pytest.approx(float(largest[0, 0]) / 127, rel=1e-6)
    assert values == np.round(steps[0]).tolist()


def test_1bit_keeps_signs_and_length(tmp_path):
    rows, found = encoded(tmp_path, "1bit")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    wanted = np.where(rows >= 0, 1, -1) * norms / np.sqrt(13)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (tmp_path / "000-000000.rows").stat().st_size == 4 * (4 + 2)


@pytest.mark.parametrize(("dtype", "size"), [("float16", 16), ("int8", 10), ("1bit", 5)])
def test_bytes_of_a_row(tmp_path, dtype, size):
    written(tmp_path, spec=StoreSpec(dim=DIM, dtype=dtype), shard_rows=2)
    assert (tmp_path / "000-000000.rows").stat().st_size == 2 * size


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "ids", "text"),
    [
        (ROWS[:2, :5], IDS[:2], "rows have shape (2, 5); the store has rows of 6 numbers"),
        (ROWS[0], IDS[:1], "rows have shape (6,); the store has rows of 6 numbers"),
        (ROWS[:2], IDS[:3], "there are 3 ids for 2 rows; give as many"),
        (ROWS[:2], ["x", "x"], "the id 'x' is twice; give every example its own"),
        (ROWS[:1], IDS[1:2], "the id 'example 1' is in"),
        (ROWS[:1], [1.5], "the id 1.5 is no text and no integer"),
        (ROWS[:1], [True], "the id True is no text and no integer"),
        (np.where(ROWS[7, 2] == ROWS, np.nan, ROWS)[6:], IDS[6:], "of example 'example 7' is not"),
        (np.full((1, DIM), 1e39), ["x"], "the row of example 'x' is not finite; leave the example"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path, rows, ids, text):
    writer = GradientStore.create(tmp_path, SPEC)
    writer.append(ROWS[:3], IDS[:3])
    before = content(tmp_path)
    # beartype refuses an id of another type before the writer does
    append = functools.partial(type(writer).append.__wrapped__, writer)
    refused(lambda: append(rows, ids), text)
    assert content(tmp_path) == before
    writer.append(ROWS[3:], IDS[3:])
    writer.commit()
    np.testing.assert_array_equal(GradientStore.open(tmp_path)[:], ROWS)


def test_a_closed_writer_writes_nothing(tmp_path):
    with GradientStore.create(tmp_path, SPEC) as writer:
        pass
    refused(lambda: writer.append(ROWS, IDS), "is closed; call GradientStore.create")
    refused(writer.commit, "is closed; call GradientStore.create")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"writer": 2, "writers": 2}, "writer=2 of 2 is impossible; count from 0"),
        ({"shard_rows": 0}, "shard_rows is 0; give the rows of a shard, 1 or more"),
    ],
)
def test_impossible_writers(tmp_path, options, text):
    refused(lambda: GradientStore.create(tmp_path, SPEC, **options), text)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"dim": 0}, "dim is 0: give the numbers of a row, 1 or more"),
        ({"dtype": "int4"}, "dtype='int4' is no encoding of rows; give float32, float16, int8,"),
        ({"weight": -1.0}, "weight is -1.0: give a learning rate, 0 or more"),
    ],
)
def test_impossible_specs(options, text):
    refused(lambda: StoreSpec(**{"dim": 3, **options}), text)


def test_scalars_of_numpy_and_jax_are_written(tmp_path):
    import jax.numpy as jnp

    spec = StoreSpec(dim=DIM)
    # The type checker of the tests lets them through nowhere else.
    for name, value in (("dim", np.int64(DIM)), ("checkpoint", np.int32(7))):
        object.__setattr__(spec, name, value)
    object.__setattr__(spec, "weight", jnp.asarray(0.5))
    spec.__post_init__()
    GradientStore.create(tmp_path, spec).commit()
    assert GradientStore.open(tmp_path).spec == StoreSpec(dim=DIM, checkpoint=7, weight=0.5)


FULL = StoreSpec(
    dim=DIM,
    projection=projection_name(projector("srht", dim=DIM, seed=3)),
    parameters="lora",
    gradient="adam",
    model="a" * 64,
    data="b" * 64,
    checkpoint=100,
    weight=2e-5,
)
CHANGES = [
    ({"dim": 7}, "dim (6 and 7)"),
    ({"dtype": "int8"}, "dtype ('float32' and 'int8')"),
    ({"projection": "srht to 6, seed 4"}, "projection ('srht to 6, seed 3' and 'srht to 6, seed 4"),
    ({"parameters": ""}, "parameters ('lora' and '')"),
    ({"gradient": "sgd"}, "gradient ('adam' and 'sgd')"),
    ({"model": "c" * 64}, "model (aaaaaaaa and cccccccc)"),
    ({"data": "c" * 64}, "data (bbbbbbbb and cccccccc)"),
    ({"checkpoint": "100"}, "checkpoint (100 and '100')"),
    ({"weight": 1e-5}, "weight (2e-05 and 1e-05)"),
]


def test_the_changes_have_every_field():
    fields = {field.name for field in dataclasses.fields(StoreSpec)}
    assert {name for change, _ in CHANGES for name in change} == fields


@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_a_folder_with_another_store_is_refused(tmp_path, change, text):
    GradientStore.create(tmp_path, FULL).close()
    other = dataclasses.replace(FULL, **change)
    refused(lambda: GradientStore.create(tmp_path, other), f"this spec differ in {text}")
    GradientStore.create(tmp_path, dataclasses.replace(FULL)).commit()
    assert GradientStore.open(tmp_path).spec == FULL


def test_other_writers_or_shards_are_refused(tmp_path):
    GradientStore.create(tmp_path, SPEC, shard_rows=3).close()
    refused(lambda: GradientStore.create(tmp_path, SPEC, writers=2), "differ in writers (1 and 2)")
    refused(lambda: GradientStore.create(tmp_path, SPEC, shard_rows=4), "in shard_rows (3 and 4)")
    GradientStore.create(tmp_path, SPEC).close()


def test_a_projection_has_a_name():
    names = {projection_name(projector(family, dim=64)) for family in ("srht", "rademacher")}
    names |= {projection_name(projector("srht", dim=64, seed=1)), projection_name(None)}
    assert len(names) == 4


# --- several writers


def test_writers_have_shards_of_their_own(tmp_path):
    writers = [GradientStore.create(tmp_path, SPEC, writer=w, writers=3) for w in range(3)]
    for i in (4, 0, 9, 5):
        writers[i % 2].append(ROWS[i : i + 1], IDS[i : i + 1])
    writers[1].commit()
    refused(lambda: GradientStore.open(tmp_path), f"{tmp_path}: writer 0 has not committed. Let")
    writers[0].commit()
    writers[2].commit()  # without rows
    store = GradientStore.open(tmp_path)
    order = [4, 0, 9, 5]
    assert store.ids == [IDS[i] for i in order]
    np.testing.assert_array_equal(store[:], ROWS[order])


def test_one_id_of_two_writers_is_refused(tmp_path):
    for writer in range(2):
        with GradientStore.create(tmp_path, SPEC, writer=writer, writers=2) as one:
            one.append(ROWS[writer : writer + 2], IDS[writer : writer + 2])
            one.commit()
    with pytest.raises(UserError) as found:
        GradientStore.open(tmp_path)
    paths = [tmp_path / f"00{writer}-000000.rows" for writer in range(2)]
    assert str(found.value).startswith(f"{paths[1]}: the id 'example 1' is in {paths[0]} too. ")


def test_a_writer_is_open_once(tmp_path):
    first = GradientStore.create(tmp_path, SPEC)
    refused(lambda: GradientStore.create(tmp_path, SPEC), f"writer 0 of {tmp_path} is open already")
    first.close()
    GradientStore.create(tmp_path, SPEC).close()


def test_no_store(tmp_path):
    path = tmp_path / "manifest.json"
    refused(
        lambda: GradientStore.open(tmp_path),
        f"{path}: is missing. Give the folder of a gradient store",
    )
    (tmp_path / "file").write_text("")
    refused(lambda: GradientStore.open(tmp_path / "file"), "Give the folder of a gradient store")
    refused(lambda: GradientStore.create(tmp_path / "file", SPEC), "file: cannot be written")


# --- what is killed goes on


class Killed(BaseException):
    pass


def steps(monkeypatch, limit):
    """Lets `limit` changes of files happen, and kills just before or just after the next."""
    left = [limit]

    def counted(function, after):
        def call(*args, **options):
            left[0] -= 1
            if left[0] < 0 and not after:
                raise Killed
            result = function(*args, **options)
            if left[0] < 0:
                raise Killed
            return result

        return call

    return left, counted


@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_step_it_resumes_to_the_same_bytes(tmp_path, monkeypatch, after):
    from jaxlm.influence import writer as writing

    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here pulls the plug
    wanted = tmp_path / "wanted"
    written(wanted, sizes=(2, 4, 1, 4), shard_rows=3)
    for limit in range(100):
        folder = tmp_path / str(limit)
        with monkeypatch.context() as patch:
            left, counted = steps(patch, limit)
            patch.setattr(writing, "_write_at", counted(writing._write_at, after))
            patch.setattr(files, "write_atomic", counted(files.write_atomic, after))
            patch.setattr(writing, "write_atomic", counted(writing.write_atomic, after))
            patch.setattr(Path, "unlink", counted(Path.unlink, after))
            progress: list[int] = []
            with contextlib.suppress(Killed):
                written(folder, sizes=(2, 4, 1, 4), shard_rows=3, progress=progress)
        with GradientStore.create(folder, SPEC, shard_rows=3) as writer:
            done = len(writer)
            assert writer.ids == IDS[:done]
            # Blocks whose writing was over are there, and the next one may be in part.
            assert sum(progress) <= done <= sum((2, 4, 1, 4)[: len(progress) + 1])
            writer.append(ROWS[done:], IDS[done:])
            writer.commit()
        assert content(folder) == content(wanted), limit
        if left[0] > 0:
            break
    assert 20 < limit < 60


def test_half_written_blocks_are_written_over(tmp_path):
    wanted = content(written(tmp_path / "wanted", shard_rows=100).directory)
    for what, junk in ((".rows", b"half a row"), (".log", b'{"ids": ["exa')):
        folder = tmp_path / what
        with GradientStore.create(folder, SPEC, shard_rows=100) as writer:
            writer.append(ROWS[:4], IDS[:4])
        with (folder / f"000-000000{what}").open("ab") as file:
            file.write(junk)
        written(folder, ROWS[4:], IDS[4:], sizes=(7,), shard_rows=100)
        assert content(folder) == wanted


def test_a_writer_that_was_killed_at_once_may_have_no_rows(tmp_path):
    GradientStore.create(tmp_path, SPEC).close()
    for what in (".rows", ".log"):
        (tmp_path / f"000-000000{what}").write_bytes(b"[" * 3)
    GradientStore.create(tmp_path, SPEC).commit()
    assert GradientStore.open(tmp_path).shape == (0, DIM)
    assert sorted(content(tmp_path)) == ["000.json", "000.lock", "manifest.json"]


def test_a_committed_store_goes_on(tmp_path):
    wanted = content(written(tmp_path / "wanted", shard_rows=4).directory)
    folder = tmp_path / "found"
    for start, stop in ((0, 2), (2, 8), (8, 8), (8, 11)):
        with GradientStore.create(folder, SPEC, shard_rows=4) as writer:
            assert writer.ids == IDS[:start]
            writer.append(ROWS[start:stop], IDS[start:stop])
            writer.commit()
        np.testing.assert_array_equal(GradientStore.open(folder)[:], ROWS[:stop])
    assert content(folder) == wanted


def test_a_store_that_goes_on_is_not_complete(tmp_path):
    written(tmp_path, ROWS[:4], IDS[:4], sizes=(4,))
    with GradientStore.create(tmp_path, SPEC) as writer:
        GradientStore.open(tmp_path)
        writer.append(ROWS[4:5], IDS[4:5])
        refused(lambda: GradientStore.open(tmp_path), "has not committed")


RUN = """
import sys, time
import numpy as np
from jaxlm.influence import GradientStore, StoreSpec

folder, number = sys.argv[1], int(sys.argv[2])
rows = np.random.default_rng(number).standard_normal((1000, 64))
spec = StoreSpec(dim=64, dtype="int8")
writer = GradientStore.create(folder, spec, writer=number, writers=2, shard_rows=7)
print("begun", flush=True)
for start in range(0, 1000, 3):
    ids = [f"{number}-{i}" for i in range(start, min(1000, start + 3))]
    writer.append(rows[start : start + 3], ids)
    if start == 24:
        print("written", flush=True)
    time.sleep(0.01)
"""


def start(folder: Path, number: int) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", RUN, str(folder), str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


def test_processes_that_are_killed_resume_to_the_same_bytes(tmp_path, monkeypatch):
    runs = [start(tmp_path / "found", number) for number in range(2)]
    assert all(run.stdout.readline() == "begun\n" for run in runs)
    with pytest.raises(UserError, match=r"writer 1 of .* is open already, here or in another"):
        create(tmp_path / "found", 1)
    assert all(run.stdout.readline() == "written\n" for run in runs)
    for run in runs:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for number in range(2):
        rows = np.random.default_rng(number).standard_normal((1000, 64))
        ids = [f"{number}-{i}" for i in range(1000)]
        for folder in ("found", "wanted"):
            with create(tmp_path / folder, number) as writer:
                done = len(writer)
                assert (27 <= done < 1000) if folder == "found" else done == 0
                writer.append(rows[done:], ids[done:])
                writer.commit()
    assert content(tmp_path / "found") == content(tmp_path / "wanted")


def create(folder, number):
    spec = StoreSpec(dim=64, dtype="int8")
    return GradientStore.create(folder, spec, writer=number, writers=2, shard_rows=7)


# --- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return written(folder, spec=FULL, shard_rows=4).directory


def test_a_flipped_byte_is_found_and_its_file_named(whole, tmp_path):
    for name, original in content(whole).items():
        step = max(1, len(original) // 12)
        for at in range(0, len(original), step):
            damaged = bytearray(original)
            damaged[at] ^= 1 << at % 8
            (whole / name).write_bytes(bytes(damaged))
            for use in (
                lambda: GradientStore.open(whole)[:],
                lambda: GradientStore.open(whole).verify(),
            ):
                refused(use, f"{whole / name}: is damaged. Remove the store")
        (whole / name).write_bytes(original)
    np.testing.assert_array_equal(GradientStore.open(whole)[:], ROWS)


def test_a_shard_is_checked_when_it_is_read(whole):
    path = whole / "000-000001.rows"
    original = path.read_bytes()
    store = GradientStore.open(whole)
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    np.testing.assert_array_equal(store[:4], ROWS[:4])
    np.testing.assert_array_equal(store[8:], ROWS[8:])
    for index in (4, slice(3, 5), np.array([0, 7])):
        refused(lambda index=index: store[index], f"{path}: is damaged")
    path.write_bytes(original)
    np.testing.assert_array_equal(store[:], ROWS)


@pytest.mark.parametrize("name", ["000-000001.rows", "000-000001.json", "000.json"])
def test_missing_and_short_files_are_named(whole, name):
    path = whole / name
    original = path.read_bytes()
    path.write_bytes(original[:-1])
    refused(lambda: GradientStore.open(whole)[:], f"{path}: is damaged")
    path.unlink()
    missing = "writer 0" if name == "000.json" else f"{path}: is missing. Compute its rows again"
    refused(lambda: GradientStore.open(whole)[:], missing)
    path.write_bytes(original)


@pytest.mark.parametrize("name", ["000-000000.rows", "000-000000.log"])
def test_a_writer_does_not_go_on_after_damage(tmp_path, name):
    with GradientStore.create(tmp_path, SPEC) as writer:
        writer.append(ROWS[:2], IDS[:2])
        writer.append(ROWS[2:4], IDS[2:4])
    path = tmp_path / name
    damaged = bytearray(path.read_bytes())
    damaged[1] ^= 1
    path.write_bytes(bytes(damaged))

    def go_on():
        with GradientStore.create(tmp_path, SPEC) as writer:
            writer.append(ROWS[4:], IDS[4:])

    refused(go_on, f"{path}: is damaged. Remove the store")


def test_the_manifest_is_readable(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    assert manifest["spec"] == dataclasses.asdict(FULL)
    assert (manifest["writers"], manifest["shard_rows"]) == (1, 4)


FOREIGN = ["", "[]", "null", "{}", '{"checksum": 1}', "[" * 100_000, "9" * 5000, b"\xff"]
SEALED = [{}, {"spec": 3}, {"shards": "1", "rows": 1}, {"ids": 3, "rows_checksum": 1}]


@pytest.mark.parametrize("name", ["manifest.json", "000.json", "000-000001.json"])
def test_files_of_others_are_refused_by_name(whole, name):
    path = whole / name
    original = path.read_bytes()
    texts = [getattr(text, "encode", lambda text=text: text)() for text in FOREIGN]
    for text in [*texts, *(files.sealed(each).encode() for each in SEALED)]:
        path.write_bytes(text)
        refused(lambda: GradientStore.open(whole), f"{path}: is damaged. Remove the store")
    path.write_bytes(original)


def test_a_changed_id_in_a_log_is_found(tmp_path):
    with GradientStore.create(tmp_path, SPEC) as writer:
        writer.append(ROWS[:2], IDS[:2])
    path = tmp_path / "000-000000.log"
    text = path.read_text()
    path.write_text(text.replace(json.dumps(IDS[1]), json.dumps("x" * len(str(IDS[1])))))
    assert path.read_text() != text
    refused(lambda: GradientStore.create(tmp_path, SPEC), f"{path}: is damaged. Remove the store")


@pytest.mark.parametrize("name", ["\ud800", 10**5000], ids=["surrogate", "digits"])
def test_ids_that_json_does_not_give_back_are_refused(tmp_path, name):
    with GradientStore.create(tmp_path, SPEC) as writer:
        refused(lambda: writer.append(ROWS[:2], ["a", name]), "the id of row 1 is no Unicode text")
