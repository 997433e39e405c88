"""Trajectory files against their documented format, and every way to break one."""

import functools
import json
import operator
import resource
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.core.errors import UserError
from jaxlm.zo import Trajectory
from tests.zo.problems import small_params

SETTINGS = {"name": "mezo", "eps": 1e-3, "decay": [0.5, None]}
KEY = jax.random.key(7)
RATES = np.linspace(1e-3, 1e-4, 9, dtype=np.float32)


def begin(path, *, n=1, params=None):
    params = small_params() if params is None else params
    return Trajectory.create(
        path, params, key=KEY, num_directions=n, settings=SETTINGS, version="1.2"
    )


def scalars(count, n=1):
    return np.random.default_rng(count).normal(size=(count, n)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trajectory.zo"


@pytest.fixture
def three(path):
    """A file of 4 + 3 + 2 steps of two directions; its bytes, and where chunks begin."""
    log, values = begin(path, n=2), scalars(9, 2)
    ends = []
    for first, last in ((0, 4), (4, 7), (7, 9)):
        ends.append(path.stat().st_size)
        log.append(first, values[first:last], RATES[first:last])
    return path.read_bytes(), ends, values


def read_with_numpy(data):
    """The documented format, read without the library."""
    assert data[:16] == b"jaxlm trajectory"
    version, length, crc = np.frombuffer(data, "<u4", 3, 16)
    assert (version, length % 4) == (2, 0)
    assert crc == zlib.crc32(data[28 : 28 + length])
    header, at, values = json.loads(data[28 : 28 + length]), 28 + int(length), []
    while at < len(data):
        first, count, crc = np.frombuffer(data, "<u4", 3, at)
        assert first == sum(map(len, values))
        size = int(count) * (1 + header["num_directions"])
        if not count:
            (size,) = np.frombuffer(data, "<u4", 1, at + 12) // 4 + 1
        assert crc == zlib.crc32(data[at : at + 8] + data[at + 12 : at + 12 + 4 * size])
        if not count:
            return header, np.concatenate(values), json.loads(data[at + 16 :])
        values.append(np.frombuffer(data, "<f4", size, at + 12).reshape(count, -1))
        at += 12 + 4 * size
    return header, np.concatenate(values), None


def test_the_file_is_as_documented(three):
    header, values, end = read_with_numpy(three[0])
    np.testing.assert_array_equal(values[:, 1:], three[2])
    np.testing.assert_array_equal(values[:, 0], RATES)
    assert end is None
    assert (header["num_directions"], header["dtype"]) == (2, "float32")
    assert header["key"]["data"] == jax.random.key_data(KEY).tolist()
    assert (header["settings"], header["jaxlm"]) == (SETTINGS, "1.2")
    wanted = {
        "path": "layers.w",
        "shape": [2, 3],
        "dtype": "float32",
        "crc32": zlib.crc32(np.asarray(small_params()["layers"]["w"]).tobytes()),
    }
    assert wanted in header["params"]


def test_what_was_written_is_read(three, path):
    found = Trajectory.open(path)
    np.testing.assert_array_equal(found.projected_grad, three[2])
    assert (found.steps, found.torn, found.header.num_directions) == (9, 0, 2)
    assert jnp.array_equal(jax.random.key_data(found.header.key), jax.random.key_data(KEY))
    found.check(small_params(), SETTINGS)
    assert begin(path).projected_grad.shape == (0, 1)


def test_two_thousand_steps_take_less_than_20_kb(path):
    log = begin(path)
    for first in range(0, 2000, 10):
        log.append(first, scalars(10))
    assert path.stat().st_size < 20_000
    assert Trajectory.open(path).steps == 2000


def test_a_torn_tail_is_dropped_and_written_over(three, path):
    """Cut at every byte of the last chunk, or filled with zeros by a file system."""
    data, ends, values = three
    tails = [data[:end] for end in range(ends[2], len(data))]
    tails += [data[: ends[2]] + bytes(len(data) - ends[2]), data[:-1] + b"\x7f"]
    for tail in tails:
        path.write_bytes(tail)
        log = Trajectory.open(path)
        assert (log.steps, log.torn) == (7, len(tail) - ends[2])
        assert path.read_bytes() == tail
    log.append(7, values[7:], RATES[7:])
    assert log.torn == 0
    assert path.read_bytes() == data


@pytest.mark.parametrize("place", [0, 4, 8, 12, 20])
def test_damage_before_the_last_chunk_is_refused(three, path, place):
    """In the first step, the count, the checksum and the values of a chunk."""
    data, ends, _ = three
    damaged = bytearray(data)
    damaged[ends[1] + place] ^= 0x40
    path.write_bytes(damaged)
    with pytest.raises(
        UserError, match=r"trajectory.zo: the trajectory is damaged after step 4\. "
    ):
        Trajectory.open(path)


def test_a_chunk_out_of_turn_is_refused(three, path):
    data, ends, _ = three
    path.write_bytes(data[: ends[1]] + data[ends[2] :])
    with pytest.raises(UserError, match="damaged after step 4"):
        Trajectory.open(path)


@pytest.mark.parametrize("step", [0, 4, 5, 7, 9])
def test_a_cut_keeps_the_first_steps_and_goes_on(three, path, step):
    data, ends, values = three
    log = Trajectory.open(path)
    log.cut(step)
    assert not list(path.parent.glob("*.tmp"))
    if step in (0, 4, 7):
        assert path.read_bytes() == data[: ends[(0, 4, 7).index(step)]]
    np.testing.assert_array_equal(Trajectory.open(path).projected_grad, values[:step])
    log.append(step, values[step:])
    np.testing.assert_array_equal(Trajectory.open(path).projected_grad, values)
    np.testing.assert_array_equal(log.projected_grad, values)


def test_a_cut_beyond_the_end_and_a_gap_are_refused(three, path):
    log = Trajectory.open(path)
    with pytest.raises(UserError, match=r"at least 10 steps \(got 9\)"):
        log.cut(10)
    for first, values in ((8, scalars(1, 2)), (9, scalars(1, 3))):
        with pytest.raises(UserError, match=r"^values: must follow 9 steps of 2 directions"):
            log.append(first, values)


def test_a_full_disk_leaves_what_was_there(path):
    log, values = begin(path), scalars(100)
    log.append(0, values[:10])
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100, hard))
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*\); its 10 steps are kept"):
            log.append(10, values[10:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.stat().st_size == size + 100
    found = Trajectory.open(path)
    assert (found.steps, found.torn) == (10, 100)
    log.append(10, values[10:])
    np.testing.assert_array_equal(Trajectory.open(path).projected_grad, values)


def test_a_foreign_file_is_refused_with_the_reason(three, path):
    data, ends, _ = three
    for content, reason in (
        (b"", "not a trajectory file"),
        (data[:20], "not a trajectory file"),
        (b"PK" + data, "not a trajectory file"),
        (data[:16] + b"\x01" + data[17:], r"\(got 1, not 2\)"),
        (data[: ends[0] - 4], "the header is damaged"),
        (data[:40] + b"?" + data[41:], "the header is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            Trajectory.open(path)
    with pytest.raises(UserError, match="there is no such file"):
        Trajectory.open(path.parent / "nothing.zo")


def other(**changes):
    return small_params() | changes


@pytest.mark.parametrize(
    ("params", "settings", "reason"),
    [
        (other(), {**SETTINGS, "eps": 0.01}, r"was made with eps = 0.001 \(got 0.01\)\. Give"),
        (other(), SETTINGS | {"n": 2}, r"was made with n = null \(got 2\)\. Give"),
        (other(), {"name": "mezo", "eps": 1e-3}, r"with decay = \[0.5, null\] \(got null\)"),
        (
            other(head={"w": np.zeros((2, 2), "f")}),
            SETTINGS,
            r"head.bias of float32 \[2\] \(got none\)",
        ),
        (other(tail=np.zeros(2)), SETTINGS, r"tail of none \(got float64 \[2\]\)"),
        (
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), small_params()),
            SETTINGS,
            r"head.bias of float32 \[2\] \(got bfloat16 \[2\]\)",
        ),
        (
            other(layers=jax.tree.map(lambda x: x[:1], small_params()["layers"])),
            SETTINGS,
            r"layers.norm.scale of float32 \[2, 1\] \(got float32 \[1, 1\]\)",
        ),
        (
            jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-7), small_params()),
            SETTINGS,
            "other values of head.bias. Give the model it began with",
        ),
    ],
)
def test_another_run_is_refused_with_the_first_difference(path, params, settings, reason):
    log = begin(path)
    log.check(small_params(), SETTINGS)
    with pytest.raises(UserError, match=reason):
        log.check(params, settings)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8])
def test_parameters_of_any_dtype_and_layout(path, dtype):
    params = {
        "layers": [{"w": jnp.ones((2, 2), dtype)}, {"w": jnp.zeros((2, 2), dtype)}],
        "scale": jnp.float32(1),
    }
    log = begin(path, params=params)
    assert [each.path for each in log.header.params] == ["layers.w[0]", "layers.w[1]", "scale"]
    log.check(params, SETTINGS)
    params["layers"].reverse()
    with pytest.raises(UserError, match=r"other values of layers.w\[0\]"):
        log.check(params, SETTINGS)


def test_the_end_of_a_run_is_in_the_file_until_the_run_goes_on(three, path):
    data, _, values = three
    params = small_params()
    log = Trajectory.open(path)
    assert log.end is None
    log.finish(params)
    end = read_with_numpy(path.read_bytes())[2]
    total = 0
    for name in ("head.bias", "head.w", "layers.norm.scale", "layers.w"):
        leaf = functools.reduce(operator.getitem, name.split("."), params)
        total = zlib.crc32(np.asarray(leaf).tobytes(), zlib.crc32(name.encode(), total))
    assert end["crc32"] == total
    found = Trajectory.open(path)
    assert (found.steps, found.torn, found.end["crc32"]) == (9, 0, total)
    whole = path.read_bytes()
    for size in range(len(data), len(whole), 29):  # torn while it was written
        path.write_bytes(whole[:size])
        torn = Trajectory.open(path)
        assert (torn.steps, torn.end, torn.torn) == (9, None, size - len(data))
    path.write_bytes(whole)
    found.append(9, values[:1])
    assert found.end is Trajectory.open(path).end is None
    assert Trajectory.open(path).steps == 10
    log.cut(9)
    assert path.read_bytes() == data


@pytest.mark.parametrize("seed", range(3))
def test_noise_after_a_header_is_read_in_a_moment(path, seed):
    begin(path)
    head = path.read_bytes()
    rng = np.random.default_rng(seed)
    noise = {
        0: rng.integers(0, 2**32, 2**20, "u4"),  # 4 MB
        1: rng.integers(0, 2**16, 2**20, "u4"),  # counts that fit at every place
        2: np.tile(np.array([0, 2**19, 0], "u4"), 2**18),
    }[seed]
    path.write_bytes(head + noise.tobytes())
    start = time.perf_counter()
    try:
        assert Trajectory.open(path).steps == 0
    except UserError as error:
        assert "damaged after step 0" in str(error)  # noqa: PT017
    assert time.perf_counter() - start < 10


def headed(record):
    text = record if isinstance(record, bytes) else json.dumps(record).encode()
    text += b" " * (-len(text) % 4)
    return b"jaxlm trajectory" + np.array([2, len(text), zlib.crc32(text)], "<u4").tobytes() + text


def test_a_header_of_another_shape_is_refused_in_a_sentence(three, path):
    data, ends, _ = three
    good = json.loads(data[28 : ends[0]])
    params = good["params"]
    for record in (
        b"",
        b"not json",
        b"\xff\xfe",
        b"[" * 100_000,
        [],
        3,
        None,
        {},
        *({name: x for name, x in good.items() if name != left} for left in good),
        *(good | {name: bad} for name in ("key", "settings", "params") for bad in (None, 3, "x")),
        *(good | {"num_directions": bad} for bad in (0, -1, 1.5, "2", None, 10**12, [1])),
        good | {"dtype": "int8"},
        good | {"key": {"impl": "none", "data": [0, 1]}},
        good | {"key": {"impl": "threefry2x32", "data": [0]}},
        good | {"key": {"impl": "threefry2x32", "data": [-1, 10**30]}},
        good | {"params": [3]},
        good | {"params": [params[0] | {"path": [1]}]},
        good | {"params": [params[0] | {"shape": 3}]},
        good | {"params": [params[0] | {"more": 1}]},
    ):
        path.write_bytes(headed(record))
        with pytest.raises(UserError, match=r"trajectory.zo: the header is not that of a traj"):
            Trajectory.open(path)
    path.write_bytes(headed(good))
    assert Trajectory.open(path).steps == 0


def test_a_file_beyond_every_run_and_one_that_may_not_be_read_are_refused(three, path):
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(UserError, match=r"trajectory.zo: is larger than"):
        Trajectory.open(path)
    with pytest.raises(UserError, match="there is no such file"):
        Trajectory.open(path.parent)
