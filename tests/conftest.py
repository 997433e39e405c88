"""One environment for every test: eight CPU devices, no network, annotations checked."""

import dataclasses
import gc
import importlib.util
import inspect
import os
from importlib import metadata
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # XLA writes notes on its cache to stderr
# What was compiled once, by any worker, any command started in a test, or an earlier run, is not
# compiled again: compilation is most of the time.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".jax_cache")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# Tests compile much and compute little: so it is four times faster. Where results depend on fused
# multiply-adds, or memory on what is fused, a module is marked `optimized`: compiled at level 1.
# Flags of the caller come last and prevail. XLA stops at flags that it does not know, so other
# versions of jax go without. `pytest -m default_flags` goes without as well.
os.environ.setdefault("FLAGS_OF_THE_CALLER", os.environ.get("XLA_FLAGS", ""))
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if metadata.version("jax").startswith("0.10."):
    os.environ["XLA_FLAGS"] = (
        "--xla_backend_optimization_level=1 --xla_cpu_use_fusion_emitters=false "
        f"--xla_cpu_parallel_codegen_split_count=1 {os.environ['FLAGS_OF_THE_CALLER']}"
    )

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_legacy_prng_key", "error")

jaxtyped = jaxtyping.jaxtyped


def checked(*, typechecker):
    """Decorate a function as `jaxtyping.jaxtyped` does, where that is worth its time.

    That decorator takes milliseconds, and tens of microseconds at each call, to compare the axes of
    arrays. Functions without arrays in their signatures need the type checker alone, and functions
    within functions, which are decorated each time anew, are not public.
    """

    def decorate(function):
        if isinstance(function, type):
            if dataclasses.is_dataclass(function) and "__init__" in vars(function):
                function.__init__ = decorate(function.__init__)
            return function
        if "<locals>" in function.__qualname__:
            return function
        annotations = inspect.get_annotations(function).values()
        if any(isinstance(each, str) or "jaxtyping." in repr(each) for each in annotations):
            return jaxtyped(function, typechecker=typechecker)
        return typechecker(function)

    return decorate


# Every module of jaxlm imported from here on checks its annotations at each call.
jaxtyping.jaxtyped = checked
jaxtyping.install_import_hook("jaxlm", "beartype.beartype")


# Tracing makes millions of objects that live shortly, among millions that stay: with these settings
# it takes a tenth less time.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    gc.freeze()


def pytest_configure(config):
    """Compile as users do where only the tests `default_flags` are asked for."""
    if "default_flags" in config.option.markexpr:  # before the first program, which reads the flags
        os.environ["XLA_FLAGS"] = os.environ["FLAGS_OF_THE_CALLER"]


MOST_MAPS = 2_500
"""Of memory, by a process; a program has several, and 1,300 come to about half a gigabyte."""


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """How those of a module are compiled, here and in what it starts."""
    as_users = "default_flags" in request.config.option.markexpr
    quickly = not as_users and request.node.get_closest_marker("optimized") is None
    if quickly != jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # they do not know how a program was compiled
    jax.config.update("jax_disable_most_optimizations", quickly)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))
    yield
    # The next module needs many of the same small programs. Those of all modules would take
    # gigabytes, and more memory maps than may be had.
    maps = Path("/proc/self/maps")
    count = len(maps.read_bytes().splitlines()) if maps.exists() else MOST_MAPS + 1
    if count > MOST_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random model of some thousand parameters."""
    from tests.helpers.tiny import make_model

    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run_yaml(tmp_path: Path, tiny_model: Path) -> Path:
    """A configuration of `jaxlm finetune` for that model."""
    from tests.helpers.tiny import write_run

    return write_run(tmp_path, tiny_model)


@pytest.fixture
def own_models_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the stacks that other test modules have declared, as in a new process."""
    from jaxlm.core import paths

    own = {path: {count} for path, count in paths._own_models().items()}
    monkeypatch.setattr(paths, "_AXES", own)


def pytest_report_header(config: pytest.Config) -> list[str]:
    header = [f"jax {jax.__version__}: {jax.device_count()} {jax.default_backend()} devices"]
    if config.option.markexpr == "not slow and not hostile":
        header.append("tests that take minutes are left out: pytest -m slow, pytest -m hostile")
    return header


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("torch") and importlib.util.find_spec("torch") is None:
        pytest.skip("needs PyTorch: pip install 'jaxlm[parity]'")
    if item.get_closest_marker("multidevice") and jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, found {jax.device_count()}")
    if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
        pytest.skip("needs an accelerator: JAX_PLATFORMS=cuda pytest -m gpu")
