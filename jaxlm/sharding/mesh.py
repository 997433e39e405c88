"""The mesh of devices: the same three axes wherever a program runs, unused ones of size 1."""

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
    """A mesh of data * fsdp * model devices with Auto axis types.

    >>> dict(make_mesh(fsdp=-1, devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}

    Args:
      data: copies of the model; each reads its own part of a batch.
      fsdp: devices that share the parameters of a copy and read a part of its batch each.
      model: devices that share each matrix product.
      devices: those to use, all of the process group if None; the first ones where the sizes need
        fewer. One of the sizes may be -1: as many as there are devices for.

    Raises:
      UserError: if a size is not positive, two are to be inferred, or the devices do not suffice.
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
    """The sharding of a batch: its leading axis over data and fsdp, the others whole."""
    return NamedSharding(mesh, PartitionSpec(AXES[:2]))


def mesh_from_text(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh that `data=2,fsdp=2,model=2` means; an axis that is left out has size 1.

    >>> dict(mesh_from_text("fsdp=-1", devices=jax.devices()[:1]).shape)
    {'data': 1, 'fsdp': 1, 'model': 1}

    Raises:
      UserError: the text means none; or as `make_mesh`.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        digits = size.strip().removeprefix("-")
        whole = digits.isdecimal() and len(digits) < 10  # Python reads no thousands of digits
        if name not in AXES or name in sizes or not whole:
            raise UserError(
                f"mesh: is not one (got {show(text)}). Write data=2,fsdp=4,model=1, say."
            )
        sizes[name] = int(size)
    return make_mesh(**sizes, devices=devices)
