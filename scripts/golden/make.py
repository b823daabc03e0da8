"""Makes the golden vectors of the conformance suite from TRL and verl.

python scripts/golden/make.py            # both
python scripts/golden/make.py trl --venv /tmp/golden

Each reference is installed at a pinned version into a virtual environment of its own, its real code
is run there on small random inputs in float64, and inputs, outputs and gradients are written to
jaxrl_reason/conformance/golden/{trl,verl}.npz, whose format ``recorder.py`` describes. TRL's losses
are methods of trainers; they run on a stand-in for the trainer (``stand_in.py``) that returns given
log-probabilities. Nothing of a reference is copied or changed. The files are the same, byte for
byte, when made again on the same machine.

What is not compared, and why, stands in the ``LEFT_OUT`` of each module and in the files.

pip's own settings apply: to save gigabytes, point it to an index with CPU builds of torch. About
3 GB and 2 minutes then.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parents[1] / "jaxrl_reason" / "conformance" / "golden"
REQUIREMENTS = {
    "trl": ["numpy==2.4.6", "torch==2.13.0", "transformers==5.23.0", "trl==1.16.0"],
    "verl": [
        "codetiming==1.4.0",
        "hydra-core==1.3.8",
        "numpy==2.4.6",
        "omegaconf==2.3.1",
        "pandas==3.1.1",
        "ray==2.60.0",
        "tensordict==0.10.0",
        "torch==2.13.0",
        "transformers==5.10.4",
    ],
}
WITHOUT_DEPENDENCIES = {"trl": [], "verl": ["verl==0.9.1"]}
"""verl asks for much that its formulas never import; what they do import is in ``REQUIREMENTS``."""


def prepare(reference: str, folder: Path) -> Path:
    """The interpreter of an environment with the reference, made unless it is there."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, *REQUIREMENTS[reference]], check=True)
    if WITHOUT_DEPENDENCIES[reference]:
        subprocess.run([*install, "--no-deps", *WITHOUT_DEPENDENCIES[reference]], check=True)
    return python


def main() -> None:
    """Make the files of the references that are named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "references", nargs="*", metavar="reference", help="trl, verl; both if none"
    )
    parser.add_argument("--venv", type=Path, help="where environments are kept; a temporary folder")
    parser.add_argument("--out", type=Path, default=GOLDEN, help="where the files are written")
    arguments = parser.parse_args()
    references = arguments.references or list(REQUIREMENTS)
    if unknown := set(references) - set(REQUIREMENTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; use {' or '.join(REQUIREMENTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for reference in references:
            python = prepare(reference, (arguments.venv or Path(temporary)) / reference)
            script, target = HERE / f"vectors_{reference}.py", arguments.out / f"{reference}.npz"
            subprocess.run([python, script, target], check=True)


if __name__ == "__main__":
    main()
