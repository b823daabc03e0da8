"""Where the compiler for TPUs is, which needs no TPU."""

import importlib.util
from pathlib import Path


def tpu_compiler() -> Path | None:
    """The library of libtpu: installed, or where `.ci/run` puts it, out of the way of jax."""
    spec = importlib.util.find_spec("libtpu")
    apart = Path(__file__).parents[2] / ".cache" / "libtpu" / "libtpu"
    library = Path(spec.submodule_search_locations[0] if spec else apart, "libtpu.so")
    return library if library.exists() else None
