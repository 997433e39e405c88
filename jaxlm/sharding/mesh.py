"""The mesh of devices. It always has the same three axes; unused ones have size 1."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxlm.core.checks import show
from jaxlm.core.errors import UserError

AXES = ("data", "fsdp", "model")


def make_mesh(
    data: int = 1,
    fsdp: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Return a mesh of data * fsdp * model devices, with Auto axis types.

    >>> dict(make_mesh(fsdp=-1, devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}

    Args:
      data: number of copies of the model; each reads its own part of a batch.
      fsdp: number of devices that share the parameters of a copy; each reads a part of its batch.
      model: number of devices that share each matrix product. One of the three sizes may be -1, to
        use all remaining devices.
      devices: devices to use; if fewer are needed, the first ones. None for all devices of all
        processes.

    Raises:
      UserError: a size is not positive, two are -1, or there are too few devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {"data": data, "fsdp": fsdp, "model": model}
    asked = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"mesh: sizes must be positive, at most one of them -1 (got {asked}). Correct them."
        )
    if free:
        sizes[free[0]] = len(devices) // known
    count = math.prod(sizes.values())
    if count == 0 or count > len(devices) or (free and count < len(devices)):
        wanted = "sizes whose product divides them" if free else f"fewer than {count}"
        raise UserError(
            f"mesh: there are {len(devices)} devices, which do not fit (got {asked}). Give "
            f"{wanted}."
        )
    types = (AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=types, devices=devices[:count])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(AXES[:2]))


def mesh_from_text(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh of a text such as `data=2,fsdp=2,model=2`; other axes have size 1.

    >>> dict(mesh_from_text("fsdp=-1", devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}

    Raises:
      UserError: the text cannot be parsed; or as `make_mesh`.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        digits = size.strip().removeprefix("-")
        whole = digits.isdecimal() and len(digits) < 10  # Python refuses thousands of digits
        if name not in AXES or name in sizes or not whole:
            raise UserError(
                f"mesh: not a mesh (got {show(text)}). Write, for example, data=2,fsdp=4,model=1."
            )
        sizes[name] = int(size)
    return make_mesh(**sizes, devices=devices)
