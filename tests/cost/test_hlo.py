"""The collectives of a program: those that were asked for, as often as they happen."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.cost.hlo import Collective, collectives, costs
from jaxlm.sharding import make_mesh

pytestmark = pytest.mark.optimized

ROWS, WIDTH = 6, 8  # on a device


def talk(x):
    """One collective of each kind, 3 times in each of 4 turns, and one more in a branch."""

    def inner(x, _):
        x = x + 0.5 * lax.psum(x, ("data", "model"))
        x = x + lax.psum_scatter(lax.all_gather(x, "fsdp"), "fsdp")
        x = lax.all_to_all(x.reshape(2, -1), "model", 0, 0).reshape(x.shape)
        return lax.ppermute(x, "data", [(0, 1), (1, 0)]), None

    x = lax.scan(lambda x, _: lax.scan(inner, x, None, length=3), x, None, length=4)[0]
    return lax.cond(x.sum() > 0, lambda: lax.psum(x, "data"), lambda: x)


@pytest.mark.multidevice
def test_every_collective_is_found_as_often_as_it_happens():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    over = P(("data", "fsdp", "model"))
    f = jax.shard_map(talk, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)
    compiled = jax.jit(f).lower(jnp.zeros((8 * ROWS, WIDTH))).compile()
    found = collectives(compiled)
    array = ROWS * WIDTH
    sizes: dict[tuple[str, int, int], int] = {}
    for each in found:
        key = each.op, each.devices, each.times
        sizes[key] = sizes.get(key, 0) + each.size
    assert sizes == {
        ("all-reduce", 4, 12): array,
        ("all-gather", 2, 12): 2 * array,
        ("reduce-scatter", 2, 12): array,
        ("all-to-all", 2, 12): array,  # in two halves
        ("collective-permute", 2, 12): array,
        ("all-reduce", 2, 1): array,
    }
    # In rings of 4, 2, 2, 2 and 2 devices twelve times each, then once in one of 2.
    wanted = 12 * (1.5 + 1 + 1 + 0.5 + 1) + 1
    assert sum(each.moved for each in found) == wanted * 4 * array


def test_a_program_of_one_device_has_none():
    f = jax.jit(lambda x: lax.scan(lambda c, _: (c @ x, None), x, None, length=3))
    assert collectives(f.lower(jnp.ones((4, 4))).compile()) == []


class Text:
    def __init__(self, body: str):
        self.body = body

    def as_text(self):
        return f"""HloModule jit_f, is_scheduled=true, num_partitions=8

%async_computation (p: f32[16,4]) -> f32[2,4] {{
  ROOT %rs = f32[2,4]{{1,0}} reduce-scatter(%p), replica_groups=[1,8]<=[8], to_apply=%add
}}

ENTRY %main (p: f32[16,4]) -> f32[2,4] {{
{self.body}
}}
"""


GATHERED = "(f32[2,4]{1,0:T(8,128)(2,1)}, f32[16,4]{1,0:T(8,128)})"
BOTH = "((f32[2], f32[3]), (f32[16], f32[24]))"
CASES = {
    "begun and ended": (
        f"  %a = {GATHERED} all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={{0}}\n"
        "  %b = f32[16,4]{1,0} all-gather-done(%a)",
        [Collective("all-gather", "f32", (16, 4), 8, 1)],
    ),
    "sums of several arrays": (
        "  %a = (bf16[3], u8[2,5]) all-reduce-start(%p, %q), replica_groups={}, to_apply=%add",
        [
            Collective("all-reduce", "bf16", (3,), 8, 1),
            Collective("all-reduce", "u8", (2, 5), 8, 1),
        ],
    ),
    "several arrays are gathered": (
        f"  %a = {BOTH} all-gather-start(%p, %q), replica_groups={{{{0,1}},{{2,3}}}}",
        [Collective("all-gather", "f32", (n,), 2, 1) for n in (16, 24)],
    ),
    "inside a computation of its own": (
        "  %a = ((f32[16,4]), f32[2,4], u32[]) async-start(%p), calls=%async_computation\n"
        "  %b = f32[2,4] async-done(%a), calls=%async_computation",
        [Collective("reduce-scatter", "f32", (2, 4), 8, 1)],
    ),
    "devices by the axes of a mesh": (
        "  %a = f32[4] all-reduce(%p), replica_groups=mesh['x'=4,'y'=2] {'x':(2)2,'y'}, "
        "to_apply=%add",
        [Collective("all-reduce", "f32", (4,), 4, 1)],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_other_compilers_write(case):
    body, wanted = CASES[case]
    assert collectives(Text(body)) == wanted


def test_bytes_that_a_device_sends():
    assert Collective("all-reduce", "bf16", (100,), 4, 3).moved == 3 * 2 * 3 / 4 * 200
    assert Collective("all-gather", "f32", (100,), 4, 1).moved == 3 / 4 * 400
    assert Collective("reduce-scatter", "f32", (25,), 4, 1).moved == 3 / 4 * 400
    assert Collective("all-to-all", "s4", (100,), 2, 1).moved == 1 / 2 * 50
    assert Collective("collective-permute", "pred", (100,), 2, 5).moved == 500
    assert Collective("all-reduce", "f32", (), 1, 1).moved == 0


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def one_by_one(x, ws):
    for w in ws:
        x = jnp.tanh(x @ w)
    return x


def scanned(x, ws):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0]


def of(function, *args):
    compiled = jax.jit(function).lower(*args).compile()
    return costs(compiled), compiled.cost_analysis()


STRAIGHT = {
    "elementwise": (lambda x: x * 2 + 1, (shaped(1000),), 8 * 1000),
    "one product": (jnp.matmul, (shaped(8, 16), shaped(16, 4)), 4 * (8 * 16 + 16 * 4 + 8 * 4)),
    "several products": (lambda x, w: one_by_one(x, [w] * 3), (shaped(4, 8), shaped(8, 8)), None),
    "a slice": (
        lambda x, i: lax.dynamic_slice(x, (i,), (10,)) * 2,
        (shaped(1000), shaped(dtype=jnp.int32)),
        4 + 40 + 40,
    ),
}


@pytest.mark.parametrize("case", STRAIGHT)
def test_without_loops_the_counts_are_the_compilers(case):
    function, args, wanted = STRAIGHT[case]
    found, analysis = of(function, *args)
    assert found.bytes == analysis["bytes accessed"]
    assert wanted in (None, found.bytes)
    assert found.collectives == ()


def test_a_loop_counts_all_its_turns():
    layers, width, rows = 10, 64, 8
    args = shaped(rows, width), shaped(layers, width, width)
    found, _ = of(scanned, *args)
    unrolled, analysis = of(one_by_one, *args)
    assert found.products == unrolled.products == layers * 2 * rows * width**2
    assert unrolled.bytes == analysis["bytes accessed"]
    # Each layer's weights are read once, or copied out of the stack first; never the whole stack.
    weights = 4 * layers * width**2
    assert weights < found.bytes < 4 * weights


def test_the_largest_branch_counts():
    def f(i, x):
        return lax.switch(i, [lambda x: x, lambda x: jnp.tanh(x @ x) @ x], x)

    found, _ = of(f, shaped(dtype=jnp.int32), shaped(32, 32))
    assert found.products == 2 * 2 * 32**3


@pytest.mark.multidevice
def test_costs_are_those_of_one_device():
    mesh = make_mesh(data=2, model=4)
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    w = jax.ShapeDtypeStruct((16, 12), jnp.float32, sharding=NamedSharding(mesh, P(None, "model")))
    out = NamedSharding(mesh, P("data", "model"))
    found = costs(jax.jit(jnp.matmul, out_shardings=out).lower(x, w).compile())
    assert found.products == 2 * 8 * 16 * 12 // 8
    assert found.bytes == 4 * (4 * 16 + 16 * 3 + 4 * 3)
