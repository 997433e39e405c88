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

from jaxlm.artifacts.processes import to_host
from jaxlm.core import checks, paths


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


def _arrays(params: Any) -> Iterator[tuple[str, Any]]:
    """Arrays of `params` by name; what else is in it no optimizer moves."""
    for leaf in paths.flatten(params)[0]:
        if hasattr(leaf.value, "dtype"):
            yield leaf.path if leaf.layer is None else f"{leaf.path}[{leaf.layer}]", leaf.value


def parameters(params: Any, *, checksums: bool) -> Iterator[Parameter]:
    """Describes the arrays of `params`; with checksums, brings one after another to the host."""
    for path, value in _arrays(params):
        crc = zlib.crc32(to_host(value).tobytes()) if checksums else None
        yield Parameter(path, tuple(value.shape), str(value.dtype), crc)


def summary(params: Any) -> dict[str, Any]:
    """What tells the end of a run: a CRC-32 of everything, and four values of each parameter.

    `gaps` are the distances of these to their neighbours, in the dtype of the parameter.
    """
    total, values, gaps = 0, [], []
    for path, value in sorted(_arrays(params), key=lambda pair: pair[0]):
        host = to_host(value)
        total = zlib.crc32(host.tobytes(), zlib.crc32(path.encode(), total))
        if host.size and jnp.issubdtype(host.dtype, jnp.floating):
            some = host.ravel()[np.linspace(0, host.size - 1, 4).astype(int)].astype(np.float64)
            values += [float(f"{x:.7g}") for x in some]
            gaps += (float(jnp.finfo(host.dtype).eps) * np.abs(some)).tolist()
    return {"crc32": total, "values": values, "gaps": gaps}


def as_json(settings: dict[str, Any], params: Any) -> dict[str, Any]:
    """Settings as a header holds them: of a function that chooses paths, what it chooses."""
    names = sorted({leaf.path for leaf in paths.flatten(params)[0]})

    def written(value):
        if not callable(value):
            return value
        chosen = [name for name in names if value(name)]
        crc = zlib.crc32("\n".join(chosen).encode())
        return f"a function that takes {len(chosen)} of {len(names)} paths, CRC-32 {crc:08x}"

    return json.loads(json.dumps({name: written(value) for name, value in settings.items()}))


@dataclasses.dataclass(frozen=True)
class Header:
    """What does not change in a run.

    Attributes:
      version: of the jaxlm that made the file.
      key: typed PRNG key that the optimizer began with.
      num_directions: n.
      dtype: of the numbers of a step, "float32" or "float64".
      settings: JSON values of the optimizer, see `as_json`.
      params: the starting parameters.
    """

    version: str
    key: Array
    num_directions: int
    dtype: str
    settings: dict[str, Any]
    params: tuple[Parameter, ...]

    def __post_init__(self):
        checks.whole(self, "num_directions", most=2**24)
        checks.one_of("dtype", self.dtype, ("float32", "float64"))
        if not isinstance(self.settings, dict):
            raise TypeError("settings are no object")
        if not all(isinstance(each.path, str) for each in self.params):
            raise TypeError("a path is no text")

    @property
    def row(self) -> np.dtype:
        """The numbers of a step, as they stand in the file."""
        number = np.dtype(self.dtype).newbyteorder("<")
        return np.dtype(
            [("learning_rate", number), ("projected_grad", number, (self.num_directions,))]
        )

    def encode(self) -> bytes:
        """JSON, filled with spaces to a multiple of 4 bytes."""
        data = np.asarray(jax.random.key_data(self.key)).tolist()
        record = {
            "jaxlm": self.version,
            "key": {"impl": str(jax.random.key_impl(self.key)), "data": data},
            "num_directions": self.num_directions,
            "dtype": self.dtype,
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
            record["dtype"],
            record["settings"],
            tuple(Parameter(**each | {"shape": tuple(each["shape"])}) for each in record["params"]),
        )

    def difference(self, params: Any, settings: dict[str, Any]) -> str | None:
        """The first difference of parameters or settings (`as_json`) from the run, or None."""
        for name in sorted(settings.keys() | self.settings.keys()):
            old, new = (json.dumps(each.get(name)) for each in (self.settings, settings))
            if old != new:
                return (
                    f"the trajectory was made with {name} = {old}, not {new}. Give the settings of "
                    "its run"
                )
        what = self._other_parameter(params)
        return what and f"the run began with {what}. Give the model it began with"

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
