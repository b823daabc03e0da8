import subprocess
import sys

HEAVY = ("flax", "optax", "orbax", "transformers", "datasets", "grain", "matplotlib")


def test_importing_losses_loads_nothing_heavy():
    names = "jaxrl_reason.losses, jaxrl_reason.advantages, jaxrl_reason.objectives"
    code = f"import sys, {names}; print(sorted(set(sys.modules) & set({HEAVY})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
