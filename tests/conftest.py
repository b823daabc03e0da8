"""Test settings: eight virtual CPU devices, strict promotion, no network."""

import gc
import os
from pathlib import Path

# XLA sizes its CPU thread pools from NPROC. With fewer threads than twice the virtual devices a
# sharded step can wait for a collective for ever, so this is set before jax is imported.
os.environ["NPROC"] = "16"
os.environ["JAX_PLATFORMS"] = "cpu"
# Most of the time goes to compiling small programs that run once; this halves it.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import jax
import pytest

from jaxrl_reason.sampling.shapes import Programs

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the time of a test is compilation, and most programs are those of the run before. Set by
# `update` and not in the environment, so that commands started by a test compile as a user's do.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Drops compiled programs before their memory maps are as many as Linux allows (65530).

    A process that compiles beyond that is killed, in whatever test it happens to be.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 16_000:
        Programs.forget_all()
        gc.collect()
        jax.clear_caches()


@pytest.fixture(scope="session")
def mesh8() -> jax.sharding.Mesh:
    """A mesh over the eight virtual devices: axes data 2, fsdp 2, tensor 2."""
    return jax.make_mesh(
        (2, 2, 2),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
    )


@pytest.fixture(scope="session")
def directories(tmp_path_factory) -> dict[str, Path]:
    """A directory of each family, in Hugging Face's format with random weights."""
    from published_models import CONFIGS, make_directory

    folder = tmp_path_factory.mktemp("published")
    return {family: make_directory(folder / family, family) for family in CONFIGS}
