"""A kernel on disk is used only for what it is of, and a killed computation goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from jaxlm import kernels
from jaxlm.artifacts.arrays import fingerprint
from jaxlm.core.errors import UserError
from jaxlm.kernels import KernelOptions, saved
from jaxlm.kernels.blocks import Blocks
from tests.helpers.sentences import refused

RNG = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32),
    "b": jnp.asarray(RNG.standard_normal(3), jnp.float32),
}
X1 = RNG.standard_normal((7, 4)).astype(np.float32)
X2 = RNG.standard_normal((5, 4)).astype(np.float32)


def f(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_there_and_back(tmp_path, dtype):
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda a: a.astype(dtype), PARAMS)
        kernel = kernels.ntk(f, params, X1, X2)
        manifest = kernels.describe(params, X1, X2, template="a review: {text}")
        kernels.save_kernel(tmp_path / "new" / "k", kernel, manifest)
        found = kernels.load_kernel(tmp_path / "new" / "k", manifest)
        assert found.dtype == kernel.dtype == manifest["dtype"] == dtype
        np.testing.assert_array_equal(found, kernel)
    assert saved.read_manifest(tmp_path / "new" / "k") == manifest
    files = {path.name for path in (tmp_path / "new" / "k").iterdir()}
    assert files == {"kernel.safetensors", "manifest.json", "checksums.json"}
    content = load_file(tmp_path / "new" / "k" / "kernel.safetensors")
    np.testing.assert_array_equal(content["kernel"], kernel)


def test_fingerprints():
    one = fingerprint(PARAMS)
    assert one == fingerprint(jax.tree.map(np.asarray, PARAMS))
    bit = np.asarray(PARAMS["b"]).copy()
    bit[0] = np.nextafter(bit[0], 9, dtype=np.float32)
    others = [
        {**PARAMS, "b": bit},
        {**PARAMS, "b": PARAMS["b"].reshape(3, 1)},
        {**PARAMS, "b": np.asarray(PARAMS["b"]).view(np.int32)},
        {"w": PARAMS["w"], "c": PARAMS["b"]},
    ]
    assert len({one, *map(fingerprint, others)}) == 5


def changed(**options):
    base = {"params": PARAMS, "x1": X1, "x2": X2, "template": "plain", "kind": "signgd"}
    return kernels.describe(**{**base, **options})


MISMATCHES = [
    ({"params": {**PARAMS, "b": PARAMS["b"] + 1}}, "model = "),
    ({"template": "other"}, "template = 'plain' (got 'other')"),
    ({"x1": X1[:6]}, "examples1 = "),
    ({"x2": None}, "examples2 = "),
    ({"x2": X2[::-1]}, "examples2 = "),
    ({"kind": "sgd"}, "kind = 'signgd' (got 'sgd')"),
    ({"trace_axes": (-1,)}, "axes = 'full' (got 'trace')"),
    ({"kind": kernels.SignGD(0)}, "sign_threshold = 1e-06 (got 0.0)"),
    ({"select": "w"}, "select = "),
]


@pytest.mark.parametrize(("change", "reason"), MISMATCHES)
def test_a_kernel_of_something_else_is_refused(tmp_path, change, reason):
    kernels.save_kernel(tmp_path, np.ones((7, 3, 5, 3), np.float32), changed())
    other = changed(**change)
    for use in (
        lambda: kernels.load_kernel(tmp_path, other),
        lambda: kernels.save_kernel(tmp_path, np.ones(1, np.float32), other),
    ):
        with refused(str(tmp_path), f"was made with {reason}"):
            use()
    same = changed(kind=kernels.SignGD(1e-6))
    assert kernels.load_kernel(tmp_path, same).shape == (7, 3, 5, 3)


def test_the_state_of_adam_counts(tmp_path):
    tx = optax.adam(1e-3)
    fresh = tx.init(PARAMS)
    later = tx.update(PARAMS, fresh, PARAMS)[1]
    one, two, three = (
        kernels.describe(PARAMS, X1, kind=kernels.Adam(state, eps=eps))
        for state, eps in ((fresh, 1e-8), (later, 1e-8), (fresh, 1e-6))
    )
    reference = kernels.describe(PARAMS, X1, kind=kernels.Adam(fresh, variant="reference"))
    assert len({each["adam"] for each in (one, two, three, reference)}) == 4


def test_damaged_and_missing_files(tmp_path):
    with refused(str(tmp_path), "no complete kernel"):
        kernels.load_kernel(tmp_path)
    kernels.save_kernel(tmp_path, np.ones((2, 2), np.float32), changed())
    path = tmp_path / "kernel.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with refused(str(path), "damaged (differs from its checksum)"):
        kernels.load_kernel(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with refused(str(tmp_path / "manifest.json"), "the field model is missing"):
        kernels.load_kernel(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with refused(str(tmp_path / "manifest.json"), "missing"):
        kernels.load_kernel(tmp_path)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("same", [True, False])
def test_a_killed_computation_goes_on(tmp_path, monkeypatch, same):
    x2 = None if same else X2
    options = {"template": "t", "options": KernelOptions(block_size=2, check=False)}
    wanted = np.asarray(kernels.ntk(f, PARAMS, X1, x2, options=KernelOptions(block_size=2)))
    computed = []
    compute = Blocks.compute

    def counted(self, i, j, limit):
        if len(computed) == limit:
            raise Killed
        computed.append((i, j))
        return compute(self, i, j)

    def run(limit):
        monkeypatch.setattr(Blocks, "compute", lambda self, i, j: counted(self, i, j, limit))
        return kernels.saved_ntk(tmp_path, f, PARAMS, X1, x2, **options)

    with pytest.raises(Killed):
        run(5)
    (tmp_path / "blocks" / "3-3.safetensors.tmp").write_bytes(b"half")
    with refused(str(tmp_path), "no complete kernel"):
        kernels.load_kernel(tmp_path)
    with refused(str(tmp_path), "template"):
        kernels.saved_ntk(tmp_path, f, PARAMS, X1, x2, template="other")
    with refused("options", "[2, 2]", "got [4, "):
        larger = KernelOptions(block_size=4)
        kernels.saved_ntk(tmp_path, f, PARAMS, X1, x2, template="t", options=larger)
    found = run(None)
    # 4 blocks of 7 examples, 3 of 5; of the symmetric kernel 4 * 5 / 2
    assert len(computed) == len(set(computed)) == (10 if same else 12)
    np.testing.assert_array_equal(found, wanted)
    assert not (tmp_path / "blocks").exists()
    np.testing.assert_array_equal(run(0), wanted)


def test_what_is_not_finite_is_not_stored(tmp_path):
    x = X1.copy()
    x[5] = np.nan
    with refused("f", "example 5 of x1"):
        options = KernelOptions(block_size=2)
        kernels.saved_ntk(tmp_path, f, PARAMS, x, template="t", options=options)
    stored = {path.stem for path in (tmp_path / "blocks").iterdir()}
    assert stored == {"0-0", "0-1"}


def test_a_projection_is_not_saved_in_blocks(tmp_path):
    with refused("method", "projected", "save_kernel"):
        kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="t", method="projected")
    assert not list(tmp_path.iterdir())


def test_the_manifest_is_readable(tmp_path):
    kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="It was {label}.", kind="signgd")
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content.keys() == kernels.describe(PARAMS, X1).keys() | {"method", "sizes"}
    assert content["template"] == "It was {label}."
    assert content["model"] == fingerprint(PARAMS)
    assert content["examples1"] == content["examples2"] == fingerprint(X1)


def test_every_changed_byte_is_found(tmp_path):
    kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="t")
    rng = np.random.default_rng(0)
    for name in ("kernel.safetensors", "manifest.json", "checksums.json"):
        path = tmp_path / name
        whole = path.read_bytes()
        for at in rng.integers(0, len(whole), 40):
            changed = bytearray(whole)
            changed[at] ^= 1 << rng.integers(8)
            path.write_bytes(bytes(changed))
            with pytest.raises(UserError, match=str(tmp_path)):
                kernels.load_kernel(tmp_path)
        path.write_bytes(whole)
    assert kernels.load_kernel(tmp_path).shape == (7, 3, 7, 3)


def test_a_damaged_block_is_computed_again(tmp_path, monkeypatch):
    options = KernelOptions(block_size=4)
    wanted = np.asarray(kernels.ntk(f, PARAMS, X1, options=options))
    with monkeypatch.context() as patch:
        patch.setattr(saved, "_complete", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="t", options=options)
    path = tmp_path / "blocks" / "0-1.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 1
    path.write_bytes(bytes(changed))
    found = kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="t", options=options)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"a": 1', "[" * 100_000, "9" * 5000, b"\xff", '{"model": 1}']
)
def test_manifests_of_others_are_refused(tmp_path, content):
    kernels.save_kernel(tmp_path, np.ones((2, 2), np.float32), changed())
    (tmp_path / "manifest.json").write_bytes(getattr(content, "encode", lambda: content)())
    for use in (
        lambda: kernels.load_kernel(tmp_path),
        lambda: kernels.saved_ntk(tmp_path, f, PARAMS, X1, template="t"),
    ):
        with refused(str(tmp_path / "manifest.json")):
            use()


def test_a_kernel_that_is_not_finite_is_not_saved(tmp_path):
    kernel = np.ones((2, 2), np.float32)
    kernel[1, 0] = np.nan
    with refused("kernel", "got nan at [1, 0]"):
        kernels.save_kernel(tmp_path / "k", kernel, changed())
    assert not (tmp_path / "k").exists()
