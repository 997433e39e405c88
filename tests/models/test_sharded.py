"""A model over eight devices: loaded in parts, it gives the numbers of the whole one."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlm
from jaxlm.core.paths import flatten
from jaxlm.models import LanguageModel, ModelConfig, hf, hf_tensors, init_params, param_shapes
from jaxlm.models.families import family
from jaxlm.models.hf_config import read_config
from jaxlm.models.hf_tensors import Checkpoint
from jaxlm.sharding import batch_sharding, make_mesh, param_shardings
from tests.helpers import reference
from tests.helpers.models import GOLDEN

MESHES = [{"data": 8}, {"fsdp": 8}, {"model": 8}, {"data": 2, "fsdp": 2, "model": 2}]
DIVIDES = ModelConfig(
    family="qwen3", kind="decoder", head="lm", vocab_size=48, hidden_size=32, num_layers=2,
    num_heads=8, num_kv_heads=8, head_size=8, intermediate_size=40, max_positions=32,
    embedding_size=32, activation="silu", gated_mlp=True, norm="rmsnorm", positions="rotary",
    query_key_norm="head", attention_bias=False, output_bias=False, mlp_bias=False,
    tie_embeddings=False,
)  # fmt: skip
NEOX = family("gpt_neox").read_config(reference.NEOX)
GEMMA2 = family("gemma2").read_config(
    {**reference.GEMMA2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"num_hidden_layers": 4}
)


def random_model(config: ModelConfig) -> LanguageModel:
    """Every parameter random, so that a part in the wrong place shows."""
    params = init_params(config, jax.random.key(3))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(4), len(leaves))
    noise = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return LanguageModel(config, jax.tree.map(jnp.add, params, structure.unflatten(noise)))


SLOW = pytest.mark.slow
# Those in the default run: whole axes, queries in groups, spans of a tensor, a norm that is absent.
FOLDERS = ["divides", "gpt_neox", "phi3", "modernbert"]
FOLDERS += [pytest.param(name, marks=SLOW) for name in ("gemma2", "gpt2", "llama", "bert")]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in several files each; most have axes that eight devices do not divide."""
    made = {"divides": DIVIDES, "gpt_neox": NEOX, "gemma2": GEMMA2}
    if request.param in made:
        lm = random_model(made[request.param])
    else:
        lm = jaxlm.from_pretrained(GOLDEN / request.param)
    folder = tmp_path_factory.mktemp("sharded") / request.param
    jaxlm.save_pretrained(lm, folder, max_shard_size="8KB")
    return folder


def assert_equal(found, wanted) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.multidevice
@pytest.mark.parametrize(
    "sizes", [*(pytest.param(m, marks=SLOW) for m in MESHES[:-1]), MESHES[-1]], ids=str
)
def test_loading_into_a_mesh_equals_loading_without(sizes: dict[str, int], folder: Path):
    mesh = make_mesh(**sizes)
    whole = jaxlm.from_pretrained(folder, param_dtype="bfloat16")
    lm = jaxlm.from_pretrained(folder, param_dtype="bfloat16", mesh=mesh)
    assert lm.config == whole.config
    assert_equal(lm.params, whole.params)
    places = param_shardings(whole.params, mesh)
    for leaf, place in zip(flatten(lm.params)[0], jax.tree.leaves(places), strict=True):
        assert leaf.value.sharding == place
        assert len(leaf.value.sharding.device_set) == 8
    if "fsdp" in sizes:
        table = lm.params["embed"]["tokens"]["embedding"]
        assert table.addressable_shards[0].data.size < table.size


@pytest.mark.parametrize("piece", [2**23, 50])
def test_a_part_of_a_leaf_is_that_part(piece: int, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Random boxes of every leaf, and that no more is read from the files than they hold."""
    monkeypatch.setattr(hf_tensors, "PIECE", piece)
    config, module = read_config(folder)
    checkpoint = hf._open(folder, module)
    config = checkpoint.match(config)
    rng = np.random.default_rng(0)
    read = 0

    class Counting:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return Counting(self.file.__enter__())

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def get_slice(self, name):
            part = self.file.get_slice(name)

            class Slice:
                def __getitem__(self, index):
                    nonlocal read
                    value = part[index]
                    read += value.size
                    return value

            return Slice()

    counted = Checkpoint(
        folder, module, checkpoint.tensors, lambda path: Counting(checkpoint.open(path))
    )
    for leaf in flatten(jaxlm.from_pretrained(folder).params)[0]:
        for _ in range(4):
            ends = [sorted(rng.choice(n + 1, 2, replace=False)) for n in leaf.value.shape]
            index = tuple(slice(int(a), int(b)) for a, b in ends)
            read = 0
            found = counted.read(config, leaf.path, np.float32, index)
            np.testing.assert_array_equal(found, np.asarray(leaf.value)[index])
            without = hf_tensors._absent(config, leaf.path, 0) and index[0].start == 0
            assert read == (found[1:] if without else found).size  # layer 0 has no such tensor


@pytest.mark.multidevice
def test_saving_from_a_mesh_equals_saving_without(folder: Path, tmp_path: Path):
    lm = jaxlm.from_pretrained(folder, mesh=make_mesh(data=2, fsdp=2, model=2))
    jaxlm.save_pretrained(lm, tmp_path / "again", max_shard_size="8KB")
    for path in folder.glob("model*"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("folder", "meshes"),
    [
        ("gemma2", MESHES[-1:]),
        pytest.param("divides", MESHES, marks=SLOW),
        *(pytest.param(name, MESHES[-2:], marks=SLOW)
          for name in ("gpt_neox", "gpt2", "llama", "bert", "phi3", "modernbert")),
    ],
    indirect=["folder"],
)  # fmt: skip
def test_logits_and_tokens_over_a_mesh_equal_those_of_one_device(folder: Path, meshes):
    lm = jaxlm.from_pretrained(folder)
    rng = np.random.default_rng(1)
    mask = np.ones((8, 6), np.int32)
    mask[1, 4:] = mask[2, :3] = mask[5, 1:] = 0
    batch = {"input_ids": np.where(mask, rng.integers(4, 37, mask.shape), 1).astype(np.int32),
             "attention_mask": mask}  # fmt: skip
    wanted = np.asarray(jax.jit(lm.apply)(lm.params, **batch))
    decodes = lm.config.family in ("qwen3", "gemma2")
    options = {"max_new_tokens": 5, "eos_id": ()}
    tokens = lm.generate(lm.params, **batch, **options) if decodes else None
    for sizes in meshes:
        mesh = make_mesh(**sizes)
        params = jaxlm.from_pretrained(folder, mesh=mesh).params
        placed = jax.device_put(batch, batch_sharding(mesh))
        found = jax.jit(lm.apply)(params, **placed)
        assert len(found.sharding.device_set) == 8
        np.testing.assert_allclose(
            np.where(mask[..., None], found, wanted), wanted, rtol=1e-5, atol=2e-5
        )
        if decodes:
            again = lm.generate(params, **placed, **options)
            np.testing.assert_array_equal(again.tokens, tokens.tokens)
            np.testing.assert_allclose(again.log_probs, tokens.log_probs, rtol=1e-5, atol=1e-4)


MEASURE = """
import json, sys
import jax
import safetensors
jax.config.update("jax_num_cpu_devices", 8)
from jaxlm.models import from_pretrained
from jaxlm.sharding import make_mesh

def resident(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

mesh = make_mesh(fsdp=8)
jax.block_until_ready(jax.device_put(1.0, jax.sharding.NamedSharding(mesh, jax.P())))
before = resident("VmRSS")
lm = from_pretrained(sys.argv[1], mesh=mesh)
jax.block_until_ready(lm.params)
held = sum(s.data.nbytes for x in jax.tree.leaves(lm.params) for s in x.addressable_shards)
print(json.dumps({"before": before, "peak": resident("VmHWM") - before, "arrays": held}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_no_second_copy_of_a_checkpoint_stands_on_the_host(tmp_path: Path):
    config = DIVIDES.replace(
        vocab_size=32000, hidden_size=1024, num_layers=16, head_size=128,
        intermediate_size=2816, embedding_size=1024,
    )  # fmt: skip
    flat = {p: np.broadcast_to(np.float32(0.5), shape) for p, shape in param_shapes(config).items()}
    jaxlm.save_pretrained(LanguageModel(config, flat), tmp_path, max_shard_size="200MB")
    files = list(tmp_path.glob("model-*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    assert len(files) > 4
    assert size > 1e9
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    print({"checkpoint": size, **found, "ratio": round(found["peak"] / size, 3)})
    assert found["arrays"] >= 0.99 * size
    assert found["peak"] <= 1.2 * size
