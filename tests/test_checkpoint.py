"""Saving, restoring, falling back, keeping and lineage of `jaxrl_reason.checkpoint`."""

import gc
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxrl_reason import checkpoint
from jaxrl_reason.checkpoint import Checkpoints, DamagedCheckpointError
from jaxrl_reason.errors import InputError

Moments = namedtuple("Moments", ["count", "mu"])


def make_params(seed: int = 0):
    bits = np.random.default_rng(seed).integers(0, 2**32, (8, 16), dtype=np.uint32)
    return {
        "blocks": {"query": jnp.asarray(bits.view(np.float32)), "scale": jnp.ones((16,))},
        "embed": jnp.asarray(bits).astype(jnp.bfloat16),
    }


def make_state(params):
    # The shape of an optax state: tuples, a named tuple, an empty node, scalars.
    moments = Moments(
        jnp.asarray(3, jnp.int32), jax.tree.map(lambda p: p * p.dtype.type(2), params)
    )
    return {"opt_state": (moments, ()), "step": jnp.asarray(7, jnp.int32)}


def shapes(tree, sharding=None):
    def shape(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, tree)


def assert_same_bits(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for got, want in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def save(directory, step, seed=None, **meta):
    params = make_params(step if seed is None else seed)
    return checkpoint.save(directory, step, params=params, state=make_state(params), meta=meta)


def damage(item: Path):
    """Cut in half every file that holds arrays or their index."""
    for file in item.rglob("d/*"):
        os.truncate(file, file.stat().st_size // 2)


def test_restore_gives_back_every_bit_and_the_meta(tmp_path):
    params = make_params()
    state = make_state(params)
    meta = {"cursor": {"epoch": 1, "row": 12}, "key": [0, 42], "parent": None, "seconds": 1.5}
    path = checkpoint.save(tmp_path, 5, params=params, state=state, meta=meta)
    assert path == tmp_path / "5"
    restored = checkpoint.restore(path, params=shapes(params), state=shapes(state))
    assert_same_bits(restored.params, params)
    assert_same_bits(restored.state, state)
    assert (restored.step, restored.path, restored.meta) == (5, path, meta)
    assert json.loads((path / "meta" / "meta.json").read_text()) == meta


def test_numpy_arrays_stay_numpy(tmp_path):
    state = {"order": np.arange(5, dtype=np.int64), "flag": np.asarray(True)}
    path = checkpoint.save(tmp_path, 1, params=make_params(), state=state, meta={})
    restored = checkpoint.restore(path, params=shapes(make_params()), state=state).state
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored))
    assert_same_bits(restored, state)


def test_a_state_without_arrays_is_allowed(tmp_path):
    params = make_params()
    path = checkpoint.save(tmp_path, 1, params=params, state={"opt": ()}, meta={})
    assert checkpoint.restore(path, params=shapes(params), state={"opt": ()}).state == {"opt": ()}


def test_a_sharded_checkpoint_restores_into_other_shardings(tmp_path, mesh8):
    def place(tree, mesh, spec):
        return jax.tree.map(
            lambda leaf: jax.device_put(
                leaf, NamedSharding(mesh, PartitionSpec(*spec[: leaf.ndim]))
            ),
            tree,
        )

    params = place(make_params(), mesh8, ("fsdp", "tensor"))
    path = checkpoint.save(tmp_path, 1, params=params, state={"step": jnp.asarray(1)}, meta={})

    two = Mesh(np.asarray(jax.devices()[2:4]), ("data",))
    for like in (
        place(make_params(9), two, (None, "data")),
        shapes(params, NamedSharding(two, PartitionSpec("data"))),
        shapes(params, NamedSharding(mesh8, PartitionSpec())),
        shapes(params, SingleDeviceSharding(jax.devices()[5])),
    ):
        restored = checkpoint.restore_params(path, like)
        assert_same_bits(restored, params)
        for got, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(like), strict=True):
            assert got.sharding == wanted.sharding
    unplaced = checkpoint.restore_params(path, shapes(params))
    assert jax.tree.leaves(unplaced)[0].sharding == SingleDeviceSharding(jax.devices()[0])


def test_one_device_reads_what_eight_wrote(tmp_path, mesh8):
    sharding = NamedSharding(mesh8, PartitionSpec(("data", "fsdp"), "tensor"))
    params = {"w": jax.device_put(make_params()["blocks"]["query"], sharding)}
    path = checkpoint.save(tmp_path, 1, params=params, state={}, meta={})
    code = (
        "import jax, sys; from jaxrl_reason import checkpoint\n"
        "assert jax.device_count() == 1\n"
        "like = {'w': jax.ShapeDtypeStruct((8, 16), 'float32')}\n"
        "sys.stdout.write(jax.device_get(checkpoint.restore_params(sys.argv[1], like)['w'])"
        ".tobytes().hex())"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert bytes.fromhex(printed) == np.asarray(params["w"]).tobytes()


def test_the_caller_may_donate_what_is_being_saved(tmp_path):
    increment = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    params = increment({"w": jnp.zeros((1000, 1000))})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, params=params, state={}, meta={})
        for _ in range(5):
            params = increment(params)
    restored = checkpoint.restore_params(tmp_path / "1", shapes(params))
    assert np.all(np.asarray(restored["w"]) == 1.0)


def test_only_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (2, 10, 9, 11):
            params = make_params(step)
            checkpoints.save(step, params=params, state=make_state(params), meta={})
    assert checkpoint.steps(tmp_path) == [10, 11]
    assert sorted(os.listdir(tmp_path)) == ["10", "11"]
    assert checkpoint.latest(tmp_path) == 11
    restored = checkpoint.restore_params(tmp_path / "10", shapes(make_params()))
    assert_same_bits(restored, make_params(10))


def test_nothing_saved_is_nothing_found(tmp_path):
    like = shapes(make_params())
    assert checkpoint.steps(tmp_path / "none") == []
    assert checkpoint.latest(tmp_path / "none") is None
    assert checkpoint.latest_valid(tmp_path / "none", params=like, state={}) is None


def test_saving_over_a_checkpoint_is_refused(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(InputError, match=r"1 exists already; resume from it or remove it"):
        save(tmp_path, 1, seed=2)
    restored = checkpoint.restore_params(tmp_path / "1", shapes(make_params()))
    assert_same_bits(restored, make_params(1))


def test_an_unwritable_directory_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match=r"cannot write checkpoints to .*/file/checkpoints: Not a"):
        Checkpoints(tmp_path / "file" / "checkpoints")
    assert (tmp_path / "file").read_text() == "kept"
    with pytest.raises(InputError, match="keep=0 would delete the newest checkpoint"):
        Checkpoints(tmp_path / "new", keep=0)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("leaf", "error", "expected"),
    [
        (3, TypeError, "state/a/0 is int; put plain values into meta"),
        (np.zeros((0, 2)), ValueError, r"state/a/0 is float64\[\(0, 2\)\]; a checkpoint holds non"),
    ],
)
def test_only_arrays_with_elements_can_be_saved(tmp_path, leaf, error, expected):
    with pytest.raises(error, match=expected):
        checkpoint.save(tmp_path, 1, params=make_params(), state={"a": [leaf]}, meta={})
    assert checkpoint.latest(tmp_path) is None


def test_typed_keys_are_refused_and_key_data_is_kept(tmp_path):
    key = jax.random.key(3)
    with pytest.raises(ValueError, match=r"jax\.random\.key_data"):
        checkpoint.save(tmp_path, 1, params=make_params(), state={"key": key}, meta={})
    state = {"key": jax.random.key_data(key)}
    path = checkpoint.save(tmp_path, 1, params=make_params(), state=state, meta={})
    restored = checkpoint.restore(path, params=shapes(make_params()), state=shapes(state))
    assert jax.random.wrap_key_data(restored.state["key"]) == key


def test_every_difference_is_listed_in_one_message(tmp_path):
    path = save(tmp_path, 1)
    like = {
        "blocks": {
            "query": jax.ShapeDtypeStruct((8, 32), jnp.float32),
            "gate": jax.ShapeDtypeStruct((4,), jnp.float32),
        },
        "embed": jax.ShapeDtypeStruct((8, 16), jnp.float32),
    }
    with pytest.raises(InputError) as caught:
        checkpoint.restore_params(path, like)
    assert str(caught.value).replace(str(tmp_path), "DIR").splitlines() == [
        "checkpoint DIR/1 does not fit, params differ:",
        "  - blocks/gate: not in the checkpoint",
        "  - blocks/query: float32[8, 16] in the checkpoint, float32[8, 32] wanted",
        "  - blocks/scale: in the checkpoint only",
        "  - embed: bfloat16[8, 16] in the checkpoint, float32[8, 16] wanted",
        "use the configuration that wrote it, which is in DIR/1/meta/meta.json",
    ]
    assert not isinstance(caught.value, DamagedCheckpointError)


def test_a_mismatch_is_no_damage_to_fall_back_from(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    other = {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}
    with pytest.raises(InputError, match="2 does not fit"):
        checkpoint.latest_valid(tmp_path, params=other, state=other)
    assert checkpoint.steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("how", ["deleted", "cut"])
def test_every_file_that_matters_is_missed(tmp_path, how):
    path = save(tmp_path, 1)
    params = shapes(make_params())
    state = shapes(make_state(make_params()))
    files = sorted(
        file for item in ("params", "state", "meta") for file in (path / item).rglob("*")
    )
    files = [file for file in files if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        name = file.relative_to(path).as_posix()
        half = len(content) // 2 if how == "cut" else 0
        if how == "cut":
            os.truncate(file, half)
        else:
            file.unlink()
        with pytest.raises(DamagedCheckpointError) as caught:
            checkpoint.restore(path, params=params, state=state)
        expected = f"checkpoint {path} is damaged: {name} has {half} of {len(content)} bytes"
        assert str(caught.value) == expected
        if name.startswith("params"):
            with pytest.raises(DamagedCheckpointError):
                checkpoint.restore_params(path, params)
        else:
            assert_same_bits(checkpoint.restore_params(path, params), make_params(1))
        file.write_bytes(content)
    assert_same_bits(checkpoint.restore(path, params=params, state=state).params, make_params(1))


@pytest.mark.parametrize("name", ["files.json", "meta/meta.json", "params/_METADATA"])
def test_garbage_of_the_right_size_is_damage_too(tmp_path, name):
    path = save(tmp_path, 1)
    size = (path / name).stat().st_size
    (path / name).write_bytes(b"#" * size)
    params = make_params()
    with pytest.raises(DamagedCheckpointError) as caught:
        checkpoint.restore(path, params=shapes(params), state=shapes(make_state(params)))
    message = str(caught.value)
    assert message.startswith(f"checkpoint {path} is damaged: cannot read {Path(name).parts[0]}: ")
    assert "\n" not in message


def test_a_checkpoint_without_the_lengths_of_its_files_is_read_and_said_to_be(tmp_path, caplog):
    path = save(tmp_path, 1)
    (path / "files.json").unlink()
    params = make_params()
    with caplog.at_level(logging.WARNING):
        checkpoint.restore(path, params=shapes(params), state=shapes(make_state(params)))
    assert f"checkpoint {path} has no files.json" in caplog.text


# After an unreadable array Orbax closes its event loop while TensorStore's threads still report to
# it, which Python counts as exceptions that nobody could catch.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_unreadable_arrays_of_the_right_size_are_damage_too(tmp_path):
    path = save(tmp_path, 1)
    for file in (path / "params").rglob("d/*"):
        file.write_bytes(b"#" * file.stat().st_size)
    with pytest.raises(DamagedCheckpointError, match=r"damaged: cannot read params: .*DATA_LOSS"):
        checkpoint.restore_params(path, shapes(make_params()))
    gc.collect()  # let the orphans of Orbax report here, not in the next test


def test_a_missing_state_is_a_mismatch(tmp_path):
    params = make_params()
    path = checkpoint.save(tmp_path, 1, params=params, state={}, meta={})
    with pytest.raises(InputError, match="state differ:\n  - step: not in the checkpoint"):
        checkpoint.restore(path, params=shapes(params), state=shapes({"step": params["embed"]}))


def test_falling_back_is_loud_and_frees_the_number(tmp_path, caplog):
    for step in (1, 2, 3):
        save(tmp_path, step)
    damage(tmp_path / "3" / "params")
    shutil.rmtree(tmp_path / "2" / "state")
    like, state = shapes(make_params()), shapes(make_state(make_params()))
    with caplog.at_level(logging.WARNING):
        restored = checkpoint.latest_valid(tmp_path, params=like, state=state)
    assert restored.step == 1
    assert_same_bits(restored.params, make_params(1))
    warned = [record.getMessage() for record in caplog.records if "falling" in record.msg]
    assert [text.split(" is damaged: ")[0] for text in warned] == [
        f"checkpoint {tmp_path / '3'}",
        f"checkpoint {tmp_path / '2'}",
    ]
    names = ["1", "2.damaged", "3.damaged"]
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path)) == names
    save(tmp_path, 2)
    damage(tmp_path / "2" / "params")
    assert checkpoint.latest_valid(tmp_path, params=like, state=state).step == 1
    names.insert(1, "2.damaged")
    assert sorted(name.split("-")[0] for name in os.listdir(tmp_path)) == names


def test_when_all_are_damaged_nothing_is_renamed(tmp_path):
    for step in (1, 2):
        damage(save(tmp_path, step) / "params")
    like = shapes(make_params())
    with pytest.raises(InputError, match=r"every checkpoint in .* is damaged; remove it"):
        checkpoint.latest_valid(tmp_path, params=like, state=shapes(make_state(make_params())))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_a_damaged_first_checkpoint_is_put_aside(tmp_path):
    damage(save(tmp_path, 1) / "params")
    assert not checkpoint.is_sound(tmp_path / "1")
    like = shapes(make_params())
    state = shapes(make_state(make_params()))
    assert checkpoint.latest_valid(tmp_path, params=like, state=state) is None
    assert [name.split("-")[0] for name in os.listdir(tmp_path)] == ["1.damaged"]
    assert checkpoint.is_sound(save(tmp_path, 1))


KILLED = """
import os, signal, sys
import jax.numpy as jnp, numpy as np
from jaxrl_reason.checkpoint import Checkpoints

noise = np.random.default_rng(0).integers(0, 2**32, (64, 2**18), dtype=np.uint32)
checkpoints = Checkpoints(sys.argv[1], keep=1)
checkpoints.save(1, params={"w": jnp.arange(5.0)}, state={}, meta={"cursor": 1})
checkpoints.wait()
checkpoints.save(2, params={"w": jnp.asarray(noise)}, state={}, meta={"cursor": 2})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_while_saving_the_previous_checkpoint_stays(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = sorted(os.listdir(tmp_path))
    assert left[0] == "1"
    assert left[1].startswith("2.orbax-checkpoint-tmp"), "the save was over before the kill"
    assert checkpoint.latest(tmp_path) == 1
    like = {"w": jax.ShapeDtypeStruct((5,), jnp.float32)}
    restored = checkpoint.latest_valid(tmp_path, params=like, state={})
    assert_same_bits(restored.params, {"w": jnp.arange(5.0)})
    assert restored.meta == {"cursor": 1}
    # The next save of the same number succeeds and sweeps what the killed one left.
    checkpoint.save(tmp_path, 2, params=restored.params, state={}, meta={})
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def make_run(runs: Path) -> Path:
    sft = save(runs / "demo" / "sft" / "checkpoints", 20, code="a", parent=None)
    save(runs / "demo" / "grpo" / "checkpoints", 30, code="b", parent=sft)
    save(runs / "demo" / "grpo" / "checkpoints", 40, code="b", parent=str(sft))
    return save(
        runs / "other" / "morl" / "checkpoints", 5, parent=runs / "demo/grpo/checkpoints/40"
    )


def test_lineage_follows_parents_to_the_root(tmp_path):
    newest = make_run(tmp_path)
    entries = checkpoint.lineage(newest)
    assert [Path(entry["path"]).relative_to(tmp_path).as_posix() for entry in entries] == [
        "other/morl/checkpoints/5",
        "demo/grpo/checkpoints/40",
        "demo/sft/checkpoints/20",
    ]
    assert [entry.get("code") for entry in entries] == [None, "b", "a"]
    assert entries[-1]["parent"] is None


def test_a_moved_run_keeps_its_lineage(tmp_path):
    make_run(tmp_path)
    moved = tmp_path / "elsewhere"
    (tmp_path / "demo").rename(moved)
    entries = checkpoint.lineage(moved / "grpo")
    assert [entry["path"] for entry in entries] == [
        str(moved / "grpo/checkpoints/40"),
        str(moved / "sft/checkpoints/20"),
    ]
    # Saving the meta that was read changes nothing.
    meta = checkpoint.read_meta(moved / "grpo")
    again = checkpoint.save(
        moved / "grpo" / "checkpoints", 50, params=make_params(), state={}, meta=meta
    )
    assert checkpoint.read_meta(again) == meta
    assert json.loads((again / "meta/meta.json").read_text())["parent"] == "sft/checkpoints/20"


def test_lineage_ends_at_a_lost_ancestor_and_refuses_a_loop(tmp_path):
    newest = make_run(tmp_path)
    shutil.rmtree(tmp_path / "demo" / "sft")
    last = checkpoint.lineage(newest)[-1]
    assert last["path"] == str(tmp_path / "demo/sft/checkpoints/20")
    assert "no checkpoint at" in last["error"]

    directory = tmp_path / "loop" / "sft" / "checkpoints"
    save(directory, 1, parent=directory / "2")
    save(directory, 2, parent=directory / "1")
    with pytest.raises(InputError, match="checkpoints/2 is its own ancestor"):
        checkpoint.lineage(directory / "2")


def test_a_checkpoint_is_found_by_stage_directory_or_step(tmp_path):
    make_run(tmp_path)
    grpo = tmp_path / "demo" / "grpo"
    newest = grpo / "checkpoints" / "40"
    assert {checkpoint.find(path) for path in (grpo, grpo / "checkpoints", newest)} == {newest}
    assert checkpoint.find(grpo / "checkpoints" / "30").name == "30"
    with pytest.raises(InputError, match=r"no checkpoint at .*/grop; .* did you mean 'grpo'\?"):
        checkpoint.find(tmp_path / "demo" / "grop")
    with pytest.raises(InputError, match=r"checkpoints has no '31', did you mean '30'\?"):
        checkpoint.restore_params(grpo / "checkpoints" / "31", shapes(make_params()))
    with pytest.raises(InputError, match=r"no checkpoint at .*/demo; give runs/<name>/<stage>"):
        checkpoint.find(tmp_path / "demo")


def test_importing_the_module_does_not_load_orbax():
    code = "import sys, jaxrl_reason.checkpoint; sys.exit('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
