"""Rows of steps of two processes: each makes its own, and together they are those of one."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jaxrl_reason import launch
from jaxrl_reason.data.batching import Example, fill_rows, step_indices
from jaxrl_reason.processes import ADDRESS, COUNT, NUMBER
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.placed_rows import StepRows

SCRIPT = """
import sys

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxrl_reason import processes
from jaxrl_reason.data.batching import Example, fill_rows
from jaxrl_reason.data.loading import Examples, Maker
from jaxrl_reason.errors import InputError
from jaxrl_reason.sharding import MeshConfig, make_mesh
from jaxrl_reason.stages.placed_rows import StepRows

processes.start()
made = []


def maker(number):
    def make():
        made.append(number)
        if number in refused:
            raise InputError(f"row {number}: refused")
        return [Example([number + 1] * (1 + number % 3), [7, 8])]

    return Maker(make, f"row {number}")


makers, refused = [maker(number) for number in range(19)], ()
examples = Examples(makers, 9, option="max_length")
assert made == list(range(19))[processes.number() :: 2], made
assert [facts[0].size for facts in examples.facts] == [3 + n % 3 for n in range(19)]
print("hash", examples.hash)

examples._kept.clear()
made.clear()
rows = StepRows(make_mesh(MeshConfig(data=4)), 5, len(examples), 8, 2)
fill = lambda documents: fill_rows(documents, 8, pad_id=0)
batches = rows.read(lambda number: examples[number], fill, range(1, 4))
placed = [rows.place(next(batches)) for _ in range(3)]
print("made", sorted(set(made)))
every = process_allgather([step.batch for step in placed], tiled=True)
if processes.is_first():
    for number, arrays in enumerate(every):
        np.savez(f"{sys.argv[1]}/{number}.npz", **arrays)
print("counts", [(step.num_tokens, step.counted) for step in placed])

# A row that one process cannot make ends the step of both.
refused = (made[-1],) if processes.number() == 1 else ()
lost = made[-1]
made.clear()
batches = rows.read(lambda number: makers[number].make()[0], lambda found: found, range(100))
try:
    while True:
        next(batches)
except InputError as error:
    print("lost", error if processes.number() == 0 else str(error) == f"row {lost}: refused")

# The first mistake, not that of the first process.
refused = (3, 6)
try:
    Examples(makers, 9, option="max_length")
except InputError as error:
    print("refused", error)
"""


def told(text):
    return dict(line.split(" ", 1) for line in text.splitlines())


def test_each_process_reads_the_rows_of_its_own_devices(tmp_path):
    (tmp_path / "rows.py").write_text(SCRIPT)
    address = f"localhost:{launch._free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / "rows.py", tmp_path],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
            | {ADDRESS: address, COUNT: "2", NUMBER: str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = []
    for one in running:
        out, err = one.communicate(timeout=120)
        assert one.returncode == 0, err
        said.append(told(out))
    documents = [[Example([n + 1] * (1 + n % 3), [7, 8])] for n in range(19)]
    chosen = [step_indices(5, step, size=19, batch_size=8) for step in (1, 2, 3)]
    for number, indices in enumerate(chosen):
        expected = fill_rows([documents[i] for i in indices], 8, pad_id=0)
        with np.load(tmp_path / f"{number}.npz") as found:
            for name, array in expected.items():
                rows = found[name].swapaxes(0, 1).reshape(array.shape)
                np.testing.assert_array_equal(rows, array)
    # Two devices of four, and so half of the rows of each microbatch.
    for process, one in enumerate(said):
        own = {int(i) for indices in chosen for i in indices[4 * process : 4 * process + 4]}
        assert one["made"] == str(sorted(own))
    sizes = [[documents[i][0].size for i in indices] for indices in chosen]
    assert said[0]["counts"] == said[1]["counts"] == str([(sum(size), 16) for size in sizes])
    assert said[0]["hash"] == said[1]["hash"]
    assert said[0]["lost"].endswith(": refused")
    assert said[1]["lost"] == "True"
    assert [one["refused"] for one in said] == ["row 3: refused"] * 2


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_order_of_rows_is_that_of_the_seed_and_the_step(microbatches):

    rows = StepRows(make_mesh(MeshConfig(data=4), jax.devices()[:4]), 3, 10, 8, microbatches)
    batches = rows.read(lambda n: n, lambda n: {"n": np.asarray(n)}, range(2, 5))
    for step, batch in zip(range(2, 5), batches, strict=True):
        np.testing.assert_array_equal(batch["n"], step_indices(3, step, size=10, batch_size=8))
