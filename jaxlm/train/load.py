"""Load models by name: a Hugging Face folder, a hub id, the shipped model, or a run's folder."""

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh

from jaxlm import models, zo
from jaxlm.artifacts.arrays import fingerprint
from jaxlm.artifacts.files import file_path
from jaxlm.core import paths
from jaxlm.core.errors import UserError
from jaxlm.core.precision import quantize
from jaxlm.data import DATA_FORMS
from jaxlm.data.corpus import read_tokenizer
from jaxlm.data.tokens import matched
from jaxlm.models import LanguageModel, add_classifier, init_params
from jaxlm.models.hf import float_dtype, local_model, model_choices
from jaxlm.peft import TUNINGS, Tuning, head_selection, load_adapter
from jaxlm.peft.adapters import adapter_base, check_base, is_adapter
from jaxlm.sharding import abstract, place_params, placed_like
from jaxlm.train.optimizers import OPTIMIZERS, ZerothOrder
from jaxlm.train.pretraining import DecoderSizes
from jaxlm.train.run_folder import Digest, RunFolder
from jaxlm.typing import Params

Bits = Literal[8, 4]
T = TypeVar("T")


def from_pretrained(
    name_or_path: str | Path | None = None,
    param_dtype: Any = "float32",
    mesh: Mesh | None = None,
    *,
    base: str | Path | None = None,
    compute_dtype: Any = None,
    attention: str = "xla",
    remat: str = "dots",
    bits: Bits | None = None,
) -> LanguageModel:
    """Load a model as `jaxlm.models.from_pretrained` does; also of a run or a PEFT adapter.

    Args:
        name_or_path: what that function takes; or the folder of a run, whose tested parameters are
            loaded; or a folder with adapter_config.json.
        base: where the model is that a run or an adapter began with; by default where it was then.
        param_dtype, mesh, compute_dtype, attention, remat, bits: see that function.

    Raises:
        UserError: see that function; or the model that the run or the adapter began with is not
            there, or is another one.
    """
    choices = model_choices(compute_dtype, attention, remat)
    if not isinstance(param_dtype, str) or param_dtype != "auto":
        param_dtype = str(float_dtype(param_dtype))
    lm = load_model(name_or_path, param_dtype=param_dtype, bits=bits, mesh=mesh, base=base)
    if compute_dtype is None:  # a run has one
        del choices["compute_dtype"]
    return lm.replace(config=lm.config.replace(**choices))


def load_model(
    name: str | Path | None,
    *,
    param_dtype: str = "float32",
    bits: Bits | None = None,
    mesh: Mesh | None = None,
    base: str | Path | None = None,
    shapes_only: bool = False,
) -> LanguageModel:
    """Load a model by the name that a command takes; for None, the one of the package.

    Of a run, the parameters that were best on validation are loaded, or the last ones if it had no
    validation. Parameters that were trained quantized stay quantized. If only `config.yaml` and
    `trajectory.zo` of a zeroth-order run are left, its steps are replayed on the model that it
    began with. The run may have had any mesh.

    Args:
        name: a folder, a hub id, or the folder of a run; models and PEFT adapters have both.
        param_dtype, bits, mesh, base: see `jaxlm.from_pretrained`.
        shapes_only: return `jax.ShapeDtypeStruct`s as parameters, and read no weights.

    Raises:
        UserError: if there is no model, or the run has neither a checkpoint nor a trajectory.
    """
    folder = RunFolder(name, "model") if name is not None else None
    # It may be a hub id, perhaps that of an adapter.
    if name is not None and folder is not None and not folder.path.exists():
        folder = RunFolder(local_model(name, weights=not shapes_only), "model")
    stored = folder.config() if folder is not None else None
    if folder is not None and stored is None and is_adapter(folder.path):
        options: dict[str, Any] = {"bits": bits, "mesh": mesh, "shapes_only": shapes_only}
        name = base or adapter_base(folder.path)
        if is_adapter(RunFolder(name, "base").path):
            raise UserError(
                f"base: is an adapter itself (got {name}). Give the model without adapters."
            )
        lm = _load_base(name, folder.path, param_dtype=param_dtype, **options)
        if bits is None and not shapes_only:
            check_base(lm, folder.path)
        dtype = "float32" if param_dtype == "auto" else param_dtype
        load = functools.partial(load_adapter, directory=folder.path, dtype=dtype)
        return changed(lm, lambda lm: (None, load(lm)), mesh)[1]
    pretrained = "corpus" in (stored or {})
    if base is not None and (stored is None or pretrained):
        raise UserError(
            f"base: only a run of finetune and an adapter have one (got {base} for {name}). Leave "
            "it out."
        )
    if folder is None or stored is None:
        if shapes_only:
            return models.shapes_from_pretrained(name, param_dtype, bits=bits)
        return models.from_pretrained(name, param_dtype, mesh, bits=bits)
    finished = folder.path / "model"
    if pretrained and folder.summary() and finished.is_dir():
        if shapes_only:
            lm = models.shapes_from_pretrained(finished, param_dtype, bits=bits)
        else:
            lm = models.from_pretrained(finished, param_dtype, mesh, bits=bits)
        return lm.replace(config=lm.config.replace(compute_dtype=stored.get("compute_dtype")))
    if not pretrained:
        check_run(folder, stored := stored | ({} if base is None else {"model": str(base)}))
    best = None if shapes_only else folder.best_params()
    # A replay is exact only in the dtype of the run, which is also that of its files.
    replay = best is None and not shapes_only
    if replay and (pretrained or not folder.trajectory.exists()):
        raise UserError(f"{folder.path}: the run has no checkpoint yet. Start it again.")
    own = replay or param_dtype == "auto"
    dtype = stored.get("param_dtype", "float32") if own else param_dtype
    # Without a tuning, checkpoints hold all parameters. The hub gives no shapes without weights.
    here = pretrained or stored["model"] is None or Path(stored["model"]).exists()
    shapes_only |= best is not None and not stored.get("peft") and here
    lm, trained_bits = _begun_with(folder, stored, dtype, mesh, shapes_only)
    if best is not None:
        lm = lm.replace(params=_placed(best, lm, folder, stored))
    elif replay:
        lm = lm.replace(params=_replayed(folder, lm.params, stored["steps"]))
        if param_dtype != "auto":
            lm = lm.replace(params=jax.tree.map(lambda x: x.astype(param_dtype), lm.params))
    if bits is not None and trained_bits is None:
        lm = changed(
            lm, lambda lm: (None, lm.replace(params=quantize(lm.params, bits=bits))), mesh
        )[1]
    return lm


def changed(
    lm: LanguageModel,
    change: Callable[[LanguageModel], tuple[T, LanguageModel]],
    mesh: Mesh | None = None,
) -> tuple[T, LanguageModel]:
    """Return `change(lm)`, anything and a model, with the new model on a mesh.

    A model with shapes as parameters stays one. Without a mesh parameters stay where they are.
    """
    if not any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(lm.params)):
        extra, lm = change(lm)
        return extra, lm if mesh is None else lm.replace(params=place_params(lm.params, mesh))
    results: list[tuple[T, LanguageModel]] = []

    def run(params: Params) -> Params:
        extra, new = change(lm.replace(params=params))
        results.append((extra, new.replace(params=None)))
        return new.params

    shapes = abstract(run, mesh, lm.params)
    return results[0][0], results[0][1].replace(params=shapes)


def _begun_with(
    folder: RunFolder, stored: Mapping[str, Any], dtype: str, mesh: Mesh | None, shapes_only: bool
) -> tuple[LanguageModel, Bits | None]:
    """Return the model that a run began with, and its bits; only shapes for a pretraining run."""
    if "corpus" not in stored:
        options: dict[str, Any] = {"bits": stored["bits"], "mesh": mesh, "shapes_only": shapes_only}
        lm = _load_base(stored["model"], folder.path, param_dtype=dtype, **options)
        if not shapes_only and dtype == stored["param_dtype"]:
            folder.check_unchanged(base_digest(lm, stored["model"]))
        return changed(lm, lambda lm: (None, _with_run(lm, folder, stored)), mesh)[1], stored[
            "bits"
        ]
    try:
        sizes = DecoderSizes(**stored["model"])
        tokenizer = read_tokenizer(file_path(stored["tokenizer"], "tokenizer"))
    except (KeyError, TypeError):
        raise folder.foreign() from None
    config = sizes.build(tokenizer).replace(compute_dtype=stored.get("compute_dtype"))
    key = jax.eval_shape(lambda: jax.random.key(0))
    params = abstract(lambda key: init_params(config, key, dtype), mesh, key)
    return LanguageModel(config, params, tokenizer), None


def _load_base(name: str | Path | None, folder: Path, **options: Any) -> LanguageModel:
    """Load the model that a run or an adapter began with, by the name that its folder holds."""
    try:
        return load_model(name, **options)
    except UserError as error:
        if not str(error).startswith("model: "):
            raise
        raise UserError(
            f"base: the model that {folder} began with cannot be loaded (got {name}). Say where it "
            "is: --base=FOLDER, base=FOLDER in Python, or in the configuration in that folder."
        ) from error


def base_digest(lm: LanguageModel, name: str | None, key: str = "model") -> dict[str, Digest]:
    """Return the digest of a model that a run begins with, by the key that names it."""
    return {key: Digest(name or "the shipped model", fingerprint(lm.params))}


def _placed(
    trained: Any, lm: LanguageModel, folder: RunFolder, stored: Mapping[str, Any]
) -> Params:
    """Return the parameters of a checkpoint, placed like those of the initial model.

    The checkpoint of a run with `peft` holds only the trained parameters.
    """
    values = {leaf.path: leaf.value for leaf in paths.flatten(trained)[0]}
    like, rest = lm.params, None
    if stored.get("peft"):
        like, rest = paths.split(lm.params, _selected(lm, folder, stored))
    shapes = {leaf.path: leaf.value.shape for leaf in paths.flatten(like)[0]}
    if {path: value.shape for path, value in values.items()} != shapes:
        raise UserError(
            f"{folder.checkpoints}: its parameters are not those of the model that config.yaml "
            f"names (got {stored['model']}). Put back the model that the run began with."
        )
    params = paths.map_with_path(lambda leaf: placed_like(values[leaf.path], leaf.value), like)
    return params if rest is None else paths.merge(params, rest)


def _selected(lm: LanguageModel, folder: RunFolder, stored: Mapping[str, Any]) -> paths.Select:
    """Return the selection of the parameters that a run with a tuning trains."""
    select: str | None = stored["optimizer"].get("select")
    return tuned(_tuning(folder, stored), lm) if select is None else select


def tuned(tuning: Tuning, lm: LanguageModel) -> str:
    """Return the selection of what a tuning trains; the head of tokens, mostly new, is in it."""
    select = tuning.select(lm)
    return f"{select}|{head_selection(lm)}" if lm.config.head == "token_classifier" else select


def _tuning(folder: RunFolder, stored: Mapping[str, Any]) -> Tuning:
    try:
        return TUNINGS[stored["peft"]["name"]](**stored["peft"])
    except TypeError:  # unknown keys
        raise folder.foreign() from None


def _texts(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def check_run(folder: RunFolder, stored: Mapping[str, Any]) -> None:
    """Refuse a `config.yaml` that is not a fine-tuning run's, or whose model leads back to it."""
    task = stored.get("task")
    texts = any(isinstance(stored.get(form), dict) for form in DATA_FORMS)
    kinds: dict[str, Any] = {"steps": int, "seed": int}
    kinds |= {"model": str | None, "bits": int | None}
    kinds |= {"param_dtype": str, "peft": dict | None, "tokens": dict | None}
    if (
        not all(isinstance(stored.get(name), kind) for name, kind in kinds.items())
        or not {"model", "bits"} <= stored.keys()
        or not (texts if task is None else isinstance(task, dict))
        or not isinstance((task or {"labels": []}).get("labels"), list)
        or not _texts((stored.get("tokens") or {"labels": []}).get("labels"))
        or (stored.get("peft") or {"name": "lora"}).get("name") not in TUNINGS
    ):
        raise folder.foreign()
    seen = [folder.path.resolve()]
    model = stored["model"]
    while model is not None and (config := RunFolder(model, "model").config()) is not None:
        place = RunFolder(model).path.resolve()
        if place in seen:
            raise UserError(
                f"{folder.path / 'config.yaml'}: model leads back to {place}, a run that it began "
                "with. Give the model that the first run began with."
            )
        seen.append(place)
        model = config.get("model") if "corpus" not in config else None


def _with_run(lm: LanguageModel, folder: RunFolder, stored: Mapping[str, Any]) -> LanguageModel:
    """Add the head and the tuning of a run to the model that it began with."""
    lm = lm.replace(config=lm.config.replace(compute_dtype=stored.get("compute_dtype")))
    if stored.get("random_init"):
        lm = with_random_params(lm, seed=stored["seed"])
    if (tokens := stored.get("tokens")) is not None:
        names = matched(tuple(tokens["labels"]), lm.config)
        lm = with_token_head(lm, names, seed=stored["seed"])
    if (task := stored.get("task")) is not None:
        labels, classes = (task.get(key) for key in ("labels", "classes"))
        named = isinstance(classes, list) and len(classes) == len(labels)
        names = tuple(map(str, classes if named else labels))
        lm = with_head(lm, len(labels), seed=stored["seed"], names=names)
    if stored.get("peft") is None:
        return lm
    return _tuning(folder, stored).prepare(lm, jax.random.key(stored["seed"]))


def _replayed(folder: RunFolder, params: Params, steps: int) -> Params:
    trajectory = zo.Trajectory.open(folder.trajectory)
    settings = trajectory.header.settings
    optimizer = None
    with contextlib.suppress(KeyError, TypeError):
        optimizer = OPTIMIZERS[settings["optimizer"]["name"]](**settings["optimizer"])
    if not isinstance(optimizer, ZerothOrder) or not isinstance(settings.get("steps"), int):
        raise UserError(
            f"{folder.trajectory}: does not belong to this run. Put back what was there."
        )
    if (length := settings["steps"]) != steps:
        raise UserError(
            f"{folder.trajectory}: is of a run of {length} steps (got {steps} in config.yaml). Put "
            "back what was there."
        )
    return zo.replay(optimizer.build(length), params, trajectory)


def with_random_params(lm: LanguageModel, *, seed: int) -> LanguageModel:
    """Return the model with random parameters in place of its own, as before pretraining."""
    key = jax.random.fold_in(jax.random.key(seed), 1)
    dtype = jax.tree.leaves(lm.params)[0].dtype
    return lm.replace(params=init_params(lm.config, key, dtype))


def with_head(
    lm: LanguageModel, num_labels: int, *, seed: int, names: Sequence[str] = ()
) -> LanguageModel:
    """Return the model, with a new classifier on an encoder that has no head for the task."""
    head, labels = lm.config.head, lm.config.num_labels
    if head in ("lm", "mlm") or (head == "classifier" and labels == num_labels):
        return lm
    return add_classifier(lm, num_labels, jax.random.key(seed), names)


def with_token_head(lm: LanguageModel, names: tuple[str, ...], *, seed: int) -> LanguageModel:
    """Return the model, with a new classifier of tokens if it has none for these classes."""
    config = lm.config
    fits = config.head == "token_classifier" and config.num_labels == len(names)
    if fits and config.label_names in ((), names):
        return lm.replace(config=config.replace(label_names=names))
    return add_classifier(lm, len(names), jax.random.key(seed), names, head="token_classifier")
