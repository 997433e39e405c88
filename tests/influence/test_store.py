"""A store loses nothing that was written, changes nothing, and is not taken for another."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxlm.gradients.projection import projector
from jaxlm.influence import GradientStore, StoreSpec, projection_name
from jaxlm.influence import store as module
from tests.helpers.sentences import refused

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


def first_file(folder: Path) -> Path:
    return folder / "000-000000000000.safetensors"


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
    store[0:2][:] = 0  # a copy
    np.testing.assert_array_equal(store[0:2], ROWS[:2])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_rows_of_any_float_are_written_as_float32(tmp_path, dtype):
    rows = np.asarray(ROWS).astype(jnp.dtype(dtype))
    given = rows if dtype == "float64" else jnp.asarray(rows)
    np.testing.assert_array_equal(written(tmp_path, given)[:], rows.astype(np.float32))


@pytest.mark.parametrize("ids", [[3, "3", "ä\n", -1, 2**40, *IDS[5:]], np.arange(5, 16)])
def test_ids_are_integers_or_texts(tmp_path, ids):
    assert written(tmp_path, ids=ids).ids == list(ids)


# --- encodings


def test_a_file_is_read_by_safetensors(tmp_path):
    written(tmp_path, shard_rows=100)
    tensors = load_file(first_file(tmp_path))
    np.testing.assert_array_equal(tensors["values"], ROWS)
    assert json.loads(tensors["ids"].tobytes()) == IDS
    written(tmp_path / "8 bits", spec=StoreSpec(dim=DIM, dtype="int8"), shard_rows=100)
    tensors = load_file(first_file(tmp_path / "8 bits"))
    steps = ROWS / np.abs(ROWS).max(axis=1, keepdims=True) * 127
    np.testing.assert_array_equal(tensors["values"], np.round(steps))
    np.testing.assert_allclose(tensors["scale"], np.abs(ROWS).max(axis=1) / 127, rtol=1e-6)


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


def test_1bit_keeps_signs_and_length(tmp_path):
    rows, found = encoded(tmp_path, "1bit")
    norms = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    wanted = np.where(rows >= 0, 1, -1) * norms / np.sqrt(13)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 24), ("float16", 16), ("int8", 10), ("1bit", 5)]
)
def test_bytes_of_a_row(tmp_path, dtype, size):
    assert module.row_bytes(dtype, DIM) == size
    written(tmp_path, spec=StoreSpec(dim=DIM, dtype=dtype), shard_rows=2)
    tensors = load_file(first_file(tmp_path))
    assert sum(x.nbytes for name, x in tensors.items() if name != "ids") == 2 * size


# --- what is refused


NAN = ROWS.copy()
NAN[7, 2] = np.nan


@pytest.mark.parametrize(
    ("rows", "ids", "key", "part"),
    [
        (ROWS[:2, :5], IDS[:2], "rows", "[N, 6] (got (2, 5))"),
        (ROWS[:2], IDS[:3], "ids", "(got 3)"),
        (ROWS[:2], ["x", "x"], "ids", "(got 'x' again)"),
        (ROWS[:1], IDS[1:2], "ids", "(got 'example 1' again)"),
        (ROWS[:1], np.array([1.5]), "ids", "(got 1.5)"),
        (ROWS[:1], [True], "ids", "(got True)"),
        (ROWS[:2], ["x", "\ud800"], "ids", "row 1"),
        (ROWS[:1], [10**5000], "ids", "row 0"),
        (NAN[6:], IDS[6:], "rows", "'example 7' is not finite"),
        (np.full((1, DIM), 1e39), ["x"], "rows", "'x' is not finite"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_written(tmp_path, rows, ids, key, part):
    writer = GradientStore.create(tmp_path, SPEC)
    writer.append(ROWS[:3], IDS[:3])
    before = content(tmp_path)
    with refused(key, part):
        writer.append(rows, ids)
    assert content(tmp_path) == before
    writer.append(ROWS[3:], IDS[3:])
    writer.commit()
    np.testing.assert_array_equal(GradientStore.open(tmp_path)[:], ROWS)


def test_a_closed_writer_writes_nothing(tmp_path):
    with GradientStore.create(tmp_path, SPEC) as writer:
        pass
    for call in (lambda: writer.append(ROWS, IDS), writer.commit):
        with refused(str(tmp_path), "closed"):
            call()


def test_impossible_writers_and_specs(tmp_path):
    for key, options in (
        ("writer", {"writer": 2, "writers": 2}),
        ("writers", {"writers": 0}),
        ("shard_rows", {"shard_rows": 0}),
    ):
        with refused(key):
            GradientStore.create(tmp_path, SPEC, **options)
    assert not list(tmp_path.iterdir())
    for key, value in (("dim", 0), ("dtype", "int4"), ("weight", -1.0), ("weight", np.inf)):
        with refused(key):
            StoreSpec(**{"dim": 3, key: value})


def test_scalars_of_numpy_and_jax_are_written(tmp_path):
    spec = StoreSpec(dim=DIM, checkpoint=np.int32(7), weight=jnp.asarray(0.5))
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
OTHER = StoreSpec(
    dim=7,
    dtype="int8",
    projection="srht to 6, seed 4",
    parameters="",
    gradient="sgd",
    model="c" * 64,
    data="c" * 64,
    checkpoint="100",
    weight=1e-5,
)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(StoreSpec)])
def test_a_folder_with_another_store_is_refused(tmp_path, field):
    GradientStore.create(tmp_path, FULL).close()
    before = content(tmp_path)
    with refused(str(tmp_path), f"spec.{field} = "):
        GradientStore.create(tmp_path, dataclasses.replace(FULL, **{field: getattr(OTHER, field)}))
    assert content(tmp_path) == before
    GradientStore.create(tmp_path, FULL).commit()
    assert GradientStore.open(tmp_path).spec == FULL


def test_other_writers_or_shards_are_refused(tmp_path):
    GradientStore.create(tmp_path, SPEC, shard_rows=3).close()
    with refused(str(tmp_path), "writers = 1 (got 2)"):
        GradientStore.create(tmp_path, SPEC, writers=2)
    with refused(str(tmp_path), "shard_rows = 3 (got 4)"):
        GradientStore.create(tmp_path, SPEC, shard_rows=4)
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
    with refused(str(tmp_path), "writer 0 has not committed"):
        GradientStore.open(tmp_path)
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
    first, second = (tmp_path / f"00{writer}-000000000000.safetensors" for writer in range(2))
    with refused(str(second), f"the id 'example 1' is in {first} too"):
        GradientStore.open(tmp_path)


def test_a_writer_is_open_once(tmp_path):
    first = GradientStore.create(tmp_path, SPEC)
    with refused("writer 0", str(tmp_path)):
        GradientStore.create(tmp_path, SPEC)
    first.close()
    GradientStore.create(tmp_path, SPEC).close()


def test_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path, tmp_path / "file"):
        with refused(str(folder / "000.json"), "is missing"):
            GradientStore.open(folder)
    with refused(str(tmp_path / "file"), "cannot be written"):
        GradientStore.create(tmp_path / "file", SPEC)


# --- resume


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
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # nothing here pulls the plug
    wanted, sizes = tmp_path / "wanted", (2, 4, 1, 1, 3)
    written(wanted, sizes=sizes, shard_rows=5)
    for limit in range(100):
        folder = tmp_path / str(limit)
        with monkeypatch.context() as patch:
            left, counted = steps(patch, limit)
            # All that a store does to its files: `write_atomic` is `replace`, and `unlink` removes
            # pieces that were joined. What is killed before `replace` leaves a temporary file.
            patch.setattr(Path, "replace", counted(Path.replace, after))
            patch.setattr(Path, "unlink", counted(Path.unlink, after))
            progress: list[int] = []
            with contextlib.suppress(Killed):
                written(folder, sizes=sizes, shard_rows=5, progress=progress)
        with GradientStore.create(folder, SPEC, shard_rows=5) as writer:
            done = len(writer)
            assert writer.ids == IDS[:done]
            # Blocks whose writing was over are there, and the next one may be in part.
            assert sum(progress) <= done <= sum(sizes[: len(progress) + 1])
            writer.append(ROWS[done:], IDS[done:])
            writer.commit()
        assert content(folder) == content(wanted), limit
        if left[0] > 0:
            break
    assert 10 < limit < 40


def test_a_file_has_the_rows_of_the_longer_pieces_before_it(tmp_path):
    """So that few files are written again: after 1, 2, 3, ... rows as the bits of the number."""
    with GradientStore.create(tmp_path, SPEC) as writer:
        for row in range(11):
            writer.append(ROWS[row : row + 1], IDS[row : row + 1])
            assert len(list(tmp_path.glob("*.safetensors"))) == (row + 1).bit_count()


def test_half_a_file_is_removed(tmp_path):
    folder = tmp_path / "found"
    with GradientStore.create(folder, SPEC) as writer:
        writer.append(ROWS[:4], IDS[:4])
    for name in ("000-000000000004.safetensors.tmp", "000.json.tmp"):
        (folder / name).write_bytes(b"half")
    written(folder, ROWS[4:], IDS[4:], sizes=(7,))
    assert content(folder) == content(written(tmp_path / "wanted").directory)


def test_a_store_without_rows(tmp_path):
    GradientStore.create(tmp_path, SPEC).commit()
    store = GradientStore.open(tmp_path)
    assert (store.shape, store.ids, store[:].shape) == ((0, DIM), [], (0, DIM))
    assert sorted(content(tmp_path)) == ["000.json"]


def test_a_committed_store_resumes(tmp_path):
    wanted = content(written(tmp_path / "wanted", shard_rows=4).directory)
    folder = tmp_path / "found"
    for start, stop in ((0, 2), (2, 8), (8, 8), (8, 11)):
        with GradientStore.create(folder, SPEC, shard_rows=4) as writer:
            assert writer.ids == IDS[:start]
            writer.append(ROWS[start:stop], IDS[start:stop])
            writer.commit()
        np.testing.assert_array_equal(GradientStore.open(folder)[:], ROWS[:stop])
    assert content(folder) == wanted


def test_a_store_that_resumes_is_not_complete(tmp_path):
    written(tmp_path, ROWS[:4], IDS[:4], sizes=(4,))
    with GradientStore.create(tmp_path, SPEC) as writer:
        GradientStore.open(tmp_path)
        writer.append(ROWS[4:5], IDS[4:5])
        with refused(str(tmp_path), "has not committed"):
            GradientStore.open(tmp_path)


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
    with refused("writer 1", "process "):
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
        step = max(1, len(original) // 40)
        for at in range(0, len(original), step):
            damaged = bytearray(original)
            damaged[at] ^= 1 << at % 8
            (whole / name).write_bytes(bytes(damaged))
            for use in (
                lambda: GradientStore.open(whole)[:],
                lambda: GradientStore.open(whole).verify(),
            ):
                with refused(str(whole / name), "is damaged"):
                    use()
        (whole / name).write_bytes(original)
    np.testing.assert_array_equal(GradientStore.open(whole)[:], ROWS)


def test_a_file_is_checked_when_it_is_read(whole):
    path = whole / "000-000000000004.safetensors"
    original = path.read_bytes()
    store = GradientStore.open(whole)
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    np.testing.assert_array_equal(store[:4], ROWS[:4])
    np.testing.assert_array_equal(store[8:], ROWS[8:])
    for index in (4, slice(3, 5), np.array([0, 7])):
        with refused(str(path), "is damaged"):
            store[index]
    path.write_bytes(original)
    np.testing.assert_array_equal(store[:], ROWS)


@pytest.mark.parametrize("name", ["000-000000000004.safetensors", "000.json"])
def test_missing_and_short_files_are_named(whole, name):
    path = whole / name
    original = path.read_bytes()
    path.write_bytes(original[:-1])
    with refused(str(path), "is damaged"):
        GradientStore.open(whole)
    path.unlink()
    with refused(str(path), "is missing"):
        GradientStore.open(whole)
    path.write_bytes(original)


@pytest.mark.parametrize("part", ["ids", "values", "record"])
def test_a_writer_does_not_resume_after_damage(tmp_path, part):
    with GradientStore.create(tmp_path, SPEC) as writer:
        writer.append(ROWS[:2], IDS[:2])
        writer.append(ROWS[2:4], IDS[2:4])
    path = tmp_path / "000.json" if part == "record" else first_file(tmp_path)
    damaged = bytearray(path.read_bytes())
    at = {"ids": damaged.find(b"example 1"), "values": ROWS[3].tobytes(), "record": 9}[part]
    damaged[at if isinstance(at, int) else damaged.find(at)] ^= 1
    path.write_bytes(bytes(damaged))
    with refused(str(path), "is damaged"):
        GradientStore.create(tmp_path, SPEC)


def test_the_record_is_readable(whole):
    record = json.loads((whole / "000.json").read_text())
    assert record["spec"] == dataclasses.asdict(FULL)
    assert (record["writers"], record["shard_rows"], record["rows"]) == (1, 4, 11)


FOREIGN = ["", "[]", "null", "{}", '{"checksum": 1}', "[" * 100_000, "9" * 5000, b"\xff"]
SEALED = [{}, {"spec": 3}, {"spec": {"dim": 0}, "writers": 1, "shard_rows": 1, "rows": 1}]


@pytest.mark.parametrize("name", ["000.json", "000-000000000004.safetensors"])
def test_files_of_others_are_refused_by_name(whole, name):
    path = whole / name
    original = path.read_bytes()
    texts = [text if isinstance(text, bytes) else text.encode() for text in FOREIGN]
    for text in [*texts, *(module._seal(record).encode() for record in SEALED)]:
        path.write_bytes(text)
        with refused(str(path), "is damaged"):
            GradientStore.open(whole)
    path.write_bytes(original)
