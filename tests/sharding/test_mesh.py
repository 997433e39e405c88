"""The mesh has its three axes whatever the sizes, and says so when they do not fit."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from jaxlm.core.errors import UserError
from jaxlm.sharding import AXES, batch_sharding, make_mesh


def test_one_device_is_a_mesh():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "model": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 3


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ({"data": 8}, (8, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1, "model": 2}, (2, 2, 2)),
        ({"model": -1, "data": 8}, (8, 1, 1)),
        ({"fsdp": 4}, (1, 4, 1)),
    ],
    ids=str,
)
def test_sizes(asked: dict[str, int], sizes: tuple[int, ...]):
    mesh = make_mesh(**asked, devices=jax.devices()[:8])
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == sizes


def test_the_devices_that_are_given_are_used():
    last = jax.devices()[-1]
    assert make_mesh(model=-1, devices=[last]).devices.item() == last


@pytest.mark.multidevice
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            {"data": 3, "fsdp": -1},
            "mesh: there are 8 devices, which do not fit (got data=3, fsdp=-1, model=1). Give "
            "sizes whose product divides them.",
        ),
        (
            {"data": 9, "fsdp": -1},
            "mesh: there are 8 devices, which do not fit (got data=9, fsdp=-1, model=1). Give "
            "sizes whose product divides them.",
        ),
        (
            {"data": 3, "fsdp": 3},
            "mesh: there are 8 devices, which do not fit (got data=3, fsdp=3, model=1). Give fewer "
            "than 9.",
        ),
        (
            {"data": -1, "fsdp": -1},
            "mesh: sizes must be positive, at most one of them -1 (got data=-1, fsdp=-1, model=1). "
            "Correct them.",
        ),
        (
            {"model": 0},
            "mesh: sizes must be positive, at most one of them -1 (got data=1, fsdp=1, model=0). "
            "Correct them.",
        ),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit(asked: dict[str, int], sentence: str):
    with pytest.raises(UserError) as caught:
        make_mesh(**asked, devices=jax.devices()[:8])
    assert str(caught.value) == sentence


@pytest.mark.multidevice
def test_a_batch_is_divided_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, model=2)
    batch = jax.device_put(np.arange(24).reshape(8, 3), batch_sharding(mesh))
    rows = {
        device: index[0] for device, index in batch.sharding.devices_indices_map((8, 3)).items()
    }
    for place, device in np.ndenumerate(mesh.devices):
        start = 2 * (2 * place[0] + place[1])
        assert (rows[device].start, rows[device].stop) == (start, start + 2)
