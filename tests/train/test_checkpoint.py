"""Checkpoints: what is read back is what was written, or a sentence that names the file."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlm.core.errors import UserError
from jaxlm.sharding import make_mesh
from jaxlm.train import checkpoint
from jaxlm.train.checkpoint import Checkpoints, copied_bytes
from jaxlm.train.state import TrainState


class State(NamedTuple):
    """A state as runs have it."""

    params: Any
    opt_state: Any


def state() -> State:
    """Every kind of leaf: several dtypes, no axes, no elements, lists, keys, optax' tuples."""
    params = {
        "w": jnp.arange(12.0).reshape(3, 4),
        "half": jnp.arange(5, dtype=jnp.bfloat16),
        "packed": jnp.arange(7, dtype=jnp.uint8),
        "none": jnp.zeros((0, 3)),
        "list": [jnp.float32(2.5), jnp.ones(2)],
    }
    return State(params, (optax.adam(0.1).init(params), jax.random.key(3)))


def plain(leaf: Any) -> np.ndarray:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def assert_equal(found: Any, wanted: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert plain(a).tobytes() == plain(b).tobytes()


def test_a_state_of_every_kind_of_leaf_is_read_back(tmp_path):
    Checkpoints(tmp_path).save(7, state(), {"seconds": 0.1, "best_step": None})
    step, found, record = Checkpoints(tmp_path).restore(state())
    assert (step, record) == (7, {"seconds": 0.1, "best_step": None})
    assert_equal(found, state())
    read = Checkpoints(tmp_path).read(7)
    np.testing.assert_array_equal(read["params"]["w"], np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(read["params"]["list"][1], np.ones(2))
    assert sorted(Checkpoints(tmp_path).read(7, "params")) == ["params"]


@pytest.mark.parametrize("name", ["lr[1e-3]", "a b", "*", "what?", "[/b]", "é"])
def test_a_folder_of_any_name_holds_checkpoints(name, tmp_path):
    """Brackets, spaces, stars and question marks are patterns to some readers of folders."""
    checkpoints = Checkpoints(tmp_path / name / "checkpoints")
    checkpoints.save(1, state(), {})
    checkpoints.save(2, state(), {})
    assert Checkpoints(tmp_path / name / "checkpoints").steps() == [2]
    assert_equal(Checkpoints(tmp_path / name / "checkpoints").restore(state())[1], state())


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step, best in ((0, 0), (5, 5), (10, 5), (15, 5)):
        held = {"params": {"w": np.full(3, step, np.float32)}}
        checkpoints.save(step, held, {"best_step": best})
    assert checkpoints.steps() == [5, 15]
    np.testing.assert_array_equal(Checkpoints(tmp_path).restore(held)[1]["params"]["w"], 15.0)
    np.testing.assert_array_equal(Checkpoints(tmp_path).best_params()["w"], 5.0)


def test_what_a_process_killed_meanwhile_left_is_removed(tmp_path):
    Checkpoints(tmp_path).save(1, state(), {})
    (tmp_path / "2.tmp" / "0").mkdir(parents=True)
    (tmp_path / "0.old.tmp").mkdir()
    shutil.copytree(tmp_path / "1", tmp_path / "0")  # it was about to be removed
    assert Checkpoints(tmp_path, read_only=True).steps() == [0, 1]
    assert (tmp_path / "2.tmp").is_dir()  # that of another process, say
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state())[0] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.multidevice
def test_parts_of_one_mesh_are_put_together_on_another(tmp_path):
    w = jnp.arange(64.0 * 6).reshape(64, 6)

    def placed(mesh: Any, *axes: str | None) -> jax.Array:
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(w, jax.sharding.NamedSharding(mesh, spec))

    mesh = make_mesh(data=2, fsdp=2, model=2)
    places = [("fsdp", "model"), (("fsdp", "model"), None), (None, "data"), (None, None)]
    for written in places:
        Checkpoints(tmp_path).save(1, {"w": placed(mesh, *written)}, {})
        index = json.loads((tmp_path / "1" / "0" / "index.json").read_text())
        sizes = [int(np.prod(part["shape"])) for part in index["leaves"][0]["parts"]]
        assert sum(sizes) == w.size  # each number once, however many devices hold it
        for like in (*(placed(mesh, *read) for read in places), w):
            found = Checkpoints(tmp_path).restore({"w": like})[1]["w"]
            np.testing.assert_array_equal(found, w)
            assert found.sharding.is_equivalent_to(like.sharding, 2)
        np.testing.assert_array_equal(Checkpoints(tmp_path).read(1)["w"], w)


def test_one_array_at_a_time_is_copied(tmp_path, monkeypatch):
    sizes = (10, 1000, 3, 3000, 2000, 2000)
    params = {f"w{i}": jnp.arange(size) + 0.5 for i, size in enumerate(sizes)}
    state = {"params": params, "key": jax.random.key(1)}
    assert copied_bytes(state) == 2 * 4 * 3000
    assert copied_bytes({"w": params["w0"]}) == 40
    Checkpoints(tmp_path).save(1, state, {})
    live: list[int] = []
    arrays: list[Any] = []
    put = jax.device_put

    def counted(function):
        def call(*args) -> np.ndarray:
            values = function(*args)
            arrays.append(weakref.ref(values))
            alive = {id(a): a.nbytes for ref in arrays if (a := ref()) is not None}
            live.append(sum(alive.values()))
            return values

        return call

    for name in ("_read", "_block"):
        monkeypatch.setattr(checkpoint, name, counted(getattr(checkpoint, name)))
    # JAX lets go of what it has copied at some later time: here it copies a copy.
    monkeypatch.setattr(jax, "device_put", lambda x, *args, **kw: put(np.array(x), *args, **kw))
    like = jax.eval_shape(lambda: params)
    found = Checkpoints(tmp_path).restore({"params": like}, 1)[1]["params"]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    found = Checkpoints(tmp_path).restore(state)[1]["params"]
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert max(live) <= copied_bytes(state)
    found = Checkpoints(tmp_path).best_params()
    jax.tree.map(np.testing.assert_array_equal, found, params)


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "missing", "foreign"])
@pytest.mark.parametrize("name", ["arrays.bin", "index.json", "record.json", "checksums.json"])
def test_a_damaged_file_is_named_with_the_way_on(damage, name, tmp_path):
    """64 flipped bytes in the middle, half a file, none of it, no file, JSON of something else."""
    Checkpoints(tmp_path).save(1, state(), {"best_step": 1})
    Checkpoints(tmp_path).save(2, state(), {"best_step": 1})
    (path,) = (path for path in files(tmp_path / "2") if path.name == name)
    data = path.read_bytes()
    middle = len(data) // 2
    if damage == "flip":
        turned = bytes(255 - byte for byte in data[middle - 32 : middle + 32])
        data = data[: middle - 32] + turned + data[middle + 32 :]
    data = {"cut": data[:middle], "empty": b"", "foreign": b'{"files": 3}'}.get(damage, data)
    path.unlink() if damage == "missing" else path.write_bytes(data)
    for read in (
        lambda: Checkpoints(tmp_path).restore(state()),
        lambda: Checkpoints(tmp_path, read_only=True).read(2),
        lambda: Checkpoints(tmp_path, read_only=True).best_params(),
    ):
        if name == "arrays.bin" and read is not None and "best" in read.__code__.co_names[-1]:
            continue  # the best parameters are those of the other checkpoint
        with pytest.raises(UserError) as caught:
            read()
        said = str(caught.value)
        assert said.startswith(str(tmp_path / "2"))
        assert name in said or damage == "missing" or name == "checksums.json"
        assert said.endswith(f"Remove {tmp_path / '2'} to resume from step 1.")
        assert "\n" not in said
    shutil.rmtree(tmp_path / "2")
    assert_equal(Checkpoints(tmp_path).restore(state())[1], state())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_parameters_that_are_not_finite_are_refused_by_name(value, tmp_path):
    held = {"params": {"layers": {"w": np.array([1.0, value])}}, "opt_state": np.array([np.nan])}
    Checkpoints(tmp_path).save(1, held, {})
    with pytest.raises(UserError, match=r"layers\.w holds numbers that are not finite"):
        Checkpoints(tmp_path).restore(held)
    assert np.isnan(Checkpoints(tmp_path).read(1, "opt_state")["opt_state"]).all()


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    Checkpoints(tmp_path).save(1, {"params": {"w": np.ones(3)}}, {})
    for like in ({"w": np.ones(4)}, {"v": np.ones(3)}, {"w": np.ones(3, np.float32)}):
        with pytest.raises(UserError, match=r"does not fit, since params\."):
            Checkpoints(tmp_path).restore({"params": like})


def test_the_former_checkpoint_stays_until_the_new_one_has_been_read_back(tmp_path, monkeypatch):
    """A disk that keeps other bytes than it was given."""
    Checkpoints(tmp_path).save(1, state(), {})
    write = checkpoint._write

    def damaged(folder: Path, held: Any) -> None:
        write(folder, held)
        data = bytearray((folder / "arrays.bin").read_bytes())
        data[3] ^= 1
        (folder / "arrays.bin").write_bytes(data)

    monkeypatch.setattr(checkpoint, "_write", damaged)
    with pytest.raises(UserError, match=r"arrays\.bin: is damaged"):
        Checkpoints(tmp_path).save(2, state(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


def test_a_checkpoint_that_a_run_replaces_meanwhile_is_read_anew(tmp_path, monkeypatch):
    """The latest one goes away between the look at the folder and the reading."""
    run = Checkpoints(tmp_path)
    run.save(1, {"params": {"w": np.ones(2)}}, {})
    reader = Checkpoints(tmp_path, read_only=True)
    read = Checkpoints.read

    def slow(self, step, *names):
        if step == 1:
            run.save(2, {"params": {"w": np.full(2, 2.0)}}, {})
        return read(self, step, *names)

    monkeypatch.setattr(Checkpoints, "read", slow)
    np.testing.assert_array_equal(reader.best_params()["w"], 2.0)


def test_a_checkpoint_of_what_is_selected_takes_the_rest_from_the_run(tmp_path):
    params = {"base": jnp.arange(1000.0), "adapter": jnp.ones(3)}
    trained = TrainState(params | {"adapter": jnp.full(3, 7.0)}, {"count": jnp.ones((), int)})
    whole, part = Checkpoints(tmp_path / "whole"), Checkpoints(tmp_path / "part", select="adapter")
    for checkpoints in (whole, part):
        checkpoints.save(5, trained, {})
    assert part.size(5) < whole.size(5) - 3900  # the 1000 numbers of the base are not there
    assert set(part.read(5, "params")["params"]) == {"adapter"}
    other = TrainState(params | {"base": jnp.zeros(1000)}, trained.opt_state)
    for like in (TrainState(params, trained.opt_state), other):
        base = np.asarray(like.params["base"])
        _, state, _ = part.restore(like, donate=True)
        np.testing.assert_array_equal(state.params["base"], base)
        np.testing.assert_array_equal(state.params["adapter"], 7.0)
    np.testing.assert_array_equal(part.in_place_of(trained, 5)["adapter"], 7.0)


def test_checkpoints_of_multiples_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_every=4)
    for step in range(0, 11, 2):
        checkpoints.save(step, state(), {"best_step": 2})
    assert checkpoints.steps() == [2, 4, 8, 10]
