"""What a trajectory says of its run: key, settings, and which parameters it began with."""

import dataclasses
import json
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlm.core import paths
from jaxlm.artifacts.processes import to_host


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What tells one starting parameter from another.

    Attributes:
      path: with the index of its layer where layers are apart.
      shape, dtype: of the values.
      crc32: of their bytes, in C order; None where nobody looked.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int | None = None


def parameters(params: Any, *, checksums: bool) -> Iterator[Parameter]:
    """Describes the leaves of `params`; with checksums, brings one after another to the host."""
    for leaf in paths.flatten(params)[0]:
        path = leaf.path if leaf.layer is None else f"{leaf.path}[{leaf.layer}]"
        value = leaf.value
        crc = zlib.crc32(to_host(value).tobytes()) if checksums else None
        yield Parameter(path, tuple(value.shape), str(value.dtype), crc)


@dataclasses.dataclass(frozen=True)
class Header:
    """What does not change in a run.

    Attributes:
      version: of the jaxlm that made the file.
      key: typed PRNG key that the optimizer began with.
      num_directions: n.
      settings: JSON values of the optimizer.
      params: the starting parameters.
    """

    version: str
    key: Array
    num_directions: int
    settings: dict[str, Any]
    params: tuple[Parameter, ...]

    def encode(self) -> bytes:
        """JSON, filled with spaces to a multiple of 4 bytes."""
        data = np.asarray(jax.random.key_data(self.key)).tolist()
        record = {
            "jaxlm": self.version,
            "key": {"impl": str(jax.random.key_impl(self.key)), "data": data},
            "num_directions": self.num_directions,
            "settings": self.settings,
            "params": [dataclasses.asdict(each) for each in self.params],
        }
        text = json.dumps(record, separators=(",", ":")).encode()
        return text + b" " * (-len(text) % 4)

    @classmethod
    def decode(cls, text: bytes) -> "Header":
        """Inverse of `encode`."""
        record = json.loads(text)
        key, data = record["key"], jnp.asarray(record["key"]["data"], jnp.uint32)
        return cls(
            record["jaxlm"],
            jax.random.wrap_key_data(data, impl=key["impl"]),
            record["num_directions"],
            record["settings"],
            tuple(Parameter(**each | {"shape": tuple(each["shape"])}) for each in record["params"]),
        )

    def difference(self, params: Any, settings: dict[str, Any]) -> str | None:
        """The first thing in which parameters or settings are not those of the run, or None."""
        given = json.loads(json.dumps(settings))
        for name in sorted(given.keys() | self.settings.keys()):
            old, new = (json.dumps(each.get(name)) for each in (self.settings, given))
            if old != new:
                return (
                    f"the trajectory was made with {name} = {old}, not {new}: give the settings of "
                    "its run"
                )
        what = self._other_parameter(params)
        return what and f"the run began with {what}: give the model it began with"

    def _other_parameter(self, params: Any) -> str | None:
        known = {each.path: each for each in self.params}
        seen = {each.path: each for each in parameters(params, checksums=False)}
        for path in [*known, *seen]:
            if path not in seen:
                return f"{path}, which is missing here"
            if path not in known:
                return f"no {path}, which is here"
            old, new = (f"{x.dtype} {list(x.shape)}" for x in (known[path], seen[path]))
            if old != new:
                return f"{path} as {old}, which is {new} here"
        for each in parameters(params, checksums=True):
            if each.crc32 != known[each.path].crc32:
                return f"other values of {each.path}"
        return None
