"""Several processes: how they find each other, and that their number changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrl_reason import checkpoint, launch, processes
from jaxrl_reason.errors import InputError
from jaxrl_reason.processes import ADDRESS, COUNT, NUMBER, Launch, recognise

OURS = {ADDRESS: "head:1234", COUNT: "4", NUMBER: "2"}


@pytest.mark.parametrize(
    ("environ", "tpu", "expected"),
    [
        ({}, False, None),
        ({"HOME": "/root", "SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, False, None),
        (OURS, False, Launch("environment", "head:1234", 4, 2)),
        ({**OURS, "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "1"}, False, "environment"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "1"}, False, Launch("slurm")),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9"},
            False,
            Launch("openmpi"),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", ADDRESS: "head:1"},
            False,
            Launch("openmpi", "head:1", 4, 3),
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, True, Launch("cloud tpu")),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "KUBERNETES_SERVICE_HOST": "10.0.0.1"},
            True,
            Launch("gke"),
        ),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a:8080"}, True, Launch("cloud tpu")),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            False,
            Launch("kubernetes"),
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, True, Launch("cloud tpu")),
        ({}, True, Launch("cloud tpu")),
        ({"JAX_PLATFORMS": "cpu"}, True, None),
        ({"TPU_SKIP_MDS_QUERY": "1"}, True, None),
    ],
)
def test_what_started_the_processes_is_recognised(environ, tpu, expected):
    found = recognise(environ, tpu=tpu)
    assert (found.name if isinstance(expected, str) else found) == expected


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({NUMBER: "0"}, f"{ADDRESS} is not set"),
        ({ADDRESS: "a:1", NUMBER: "0"}, f"{COUNT} is not set"),
        ({**OURS, NUMBER: "4"}, "must be at least 0 and less than"),
        ({**OURS, COUNT: "many"}, "must be a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, f"set {ADDRESS}="),
    ],
)
def test_an_environment_that_says_too_little_is_refused(environ, message):
    with pytest.raises(InputError, match=message):
        recognise(environ, tpu=False)


def test_one_process_is_the_first_and_waits_for_nobody():
    processes.wait("nobody")
    assert processes.is_first()
    assert processes.gather({"a": 1}) == [{"a": 1}]
    assert processes.from_first(lambda: 5) == 5
    with pytest.raises(InputError, match="wrong"):
        processes.together(_refuse)


def _refuse():
    raise InputError("wrong")


def test_gpus_are_shared_among_the_processes_of_a_machine(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,4,0")
    shares = launch._device_shares(2)
    assert shares == [{"CUDA_VISIBLE_DEVICES": "3,1"}, {"CUDA_VISIBLE_DEVICES": "4,0"}]
    with pytest.raises(InputError, match="must divide the 4 GPUs"):
        launch._device_shares(3)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch._device_shares(2) == [{}, {}]
    with pytest.raises(InputError, match="must be 1 or more"):
        launch.run_here(["run", "x.yaml"], 0)


@pytest.mark.parametrize(
    ("codes", "expected"),
    [([0, 0], 0), ([0, 1], 1), ([-9, 2], 2), ([1, 2], 2), ([-9, 1], 1), ([0, -9], 137)],
)
def test_the_exit_code_is_that_of_what_went_wrong(codes, expected):
    assert launch._together(codes) == expected


# Runs


STAGES = """
evaluation: {problems: 8, batch_size: 8, max_completion_length: 8, sampling: {temperature: 0}}
stages:
  sft:
    kind: sft
    steps: 1
    batch_size: 16
    gradient_accumulation_steps: 2
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 1.0e-2}
  dpo:
    kind: dpo
    parent: init
    steps: 1
    batch_size: 8
    max_length: 40
    data: {kind: stage, stage: keep, num_examples: 16}
    optimizer: {learning_rate: 1.0e-3}
  grpo:
    kind: grpo
    parent: init
    steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 8
    beta: 0.05
    dynamic_sampling: {max_batches: 2}
    rewards: &rewards
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: group}
      - {kind: format}
    optimizer: {learning_rate: 1.0e-2}
  morl:
    kind: morl
    parent: init
    steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 8
    conflict_steps: 1
    aggregator_options: {min_std: 0.01}
    rewards:
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: completion}
      - {kind: length, low: 2, high: 8}
    optimizer: {learning_rate: 1.0e-2}
"""
KEEP = """
  keep:
    kind: reject
    parent: init
    num_prompts: 16
    num_generations: 2
    max_completion_length: 8
    builder: "rewards_of_processes:pairs"
"""
REWARDS = '''
"""Rewards and rows for runs of processes."""


def variety(prompts, completions, **_):
    """Differs between completions of any model."""
    return [len(set(text.split())) + len(text) / 100 for text in completions]


def pairs(groups, rng):
    """A pair of each problem: its first completion before its second one."""
    for group in groups:
        chosen, rejected = group.completions[:2]
        yield {"problem": group.number, "chosen": chosen.text + " 1", "rejected": rejected.text}
'''
KINDS = ("sft", "dpo", "grpo", "morl")
LAYOUTS = [
    # mesh, processes, devices of each
    ({"data": 8}, 1, 8),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 1, 8),
    ({"data": 8}, 2, 4),
    ({"data": 1, "fsdp": 4, "tensor": 2}, 2, 4),
    ({"data": 1, "fsdp": 2, "context": 2, "tensor": 2}, 1, 8),
    ({"data": 1, "context": 8}, 2, 4),
]


def write_config(folder: Path) -> Path:
    """The configuration of the runs, with what it imports."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards_of_processes.py").write_text(REWARDS)
    tiny = yaml.safe_load((Path(__file__).parent / "tiny_run.yaml").read_text())
    # No dimension is too small for any of the meshes.
    tiny["model"]["changes"] |= {"num_attention_heads": 8, "num_key_value_heads": 2}
    stages = yaml.safe_load(STAGES.replace("\nstages:", f"\nstages:{KEEP.rstrip()}"))
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"name": "many", **tiny, **stages}, sort_keys=False))
    return path


def start(config: Path, out: str, mesh: dict[str, int], count: int, devices: int):
    """A run by so many processes."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(config.parent),
        "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    command = [sys.executable, "-m", "jaxrl_reason.cli", "run", str(config), f"output_dir={out}"]
    command += [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    command += ["--local-processes", str(count)] if count > 1 else []
    return subprocess.Popen(
        command,
        cwd=config.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run on one device."""
    config = write_config(tmp_path_factory.mktemp("processes"))
    run = start(config, "alone", {"data": 1}, 1, 1)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    return config


def gradients(folder: Path, kind: str) -> dict[str, np.ndarray]:
    """After one step, what Adam remembers is a tenth of the gradient."""
    import orbax.checkpoint as ocp

    state = (folder / kind / "checkpoints" / "1" / "state").resolve()
    handler = ocp.StandardCheckpointHandler()
    empty = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), handler.metadata(state).tree)
    tree = handler.restore(state, args=ocp.args.StandardRestore(empty))
    flat = {"/".join(map(str, path)): leaf for path, leaf in _leaves(tree)}
    return {path: np.asarray(leaf) for path, leaf in flat.items() if "mu" in path.split("/")}


def _leaves(tree, path=()):
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _leaves(value, (*path, name))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, (*path, number))
    elif tree is not None:
        yield path, tree


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "count", "devices"), LAYOUTS)
def test_devices_and_processes_change_nothing(alone, mesh, count, devices):
    name = "x".join(str(size) for size in (*mesh.values(), count))
    run = start(alone, name, mesh, count, devices)
    said, _ = run.communicate(timeout=600)
    assert run.returncode == 0, said
    one, many = (alone.parent / out / "many" for out in ("alone", name))
    assert len(list(many.glob("*/eval.json"))) == len(KINDS) + 1
    for kind in KINDS:
        rows = [json.loads((run / kind / "metrics.jsonl").read_text()) for run in (one, many)]
        for metric in ("loss", "grad_norm"):
            np.testing.assert_allclose(rows[1][metric], rows[0][metric], rtol=1e-5, atol=1e-7)
        expected, found = gradients(one, kind), gradients(many, kind)
        assert found.keys() == expected.keys() != set()
        largest = max(np.abs(value).max() for value in expected.values())
        assert largest > 0
        for path, value in found.items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5 * largest)
    # What the untrained model says without chance, and the rows that were kept of its samples.
    for file in ("init/samples.jsonl", "keep/pairs.jsonl"):
        assert (many / file).read_text() == (one / file).read_text()


SEEING = """
name: many
task: {name: shapes}
max_prompt_length: 500
max_visual_tokens: 64
evaluation: {problems: 5, batch_size: 8, max_completion_length: 4, sampling: {temperature: 0}}
stages:
  grpo:
    kind: grpo
    steps: 1
    prompts_per_step: 8
    num_generations: 2
    max_completion_length: 4
    rewards:
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: completion}
    optimizer: {learning_rate: 1.0e-2}
"""


@pytest.mark.slow
def test_what_prompts_show_is_the_same_for_several_processes(directories, tmp_path):
    config = write_config(tmp_path)
    run = {**yaml.safe_load(SEEING), "model": {"path": str(directories["qwen3_vl"])}}
    config.write_text(yaml.safe_dump(run, sort_keys=False))
    for count in (1, 2):
        running = start(
            config, f"by_{count}", {"data": 2, "fsdp": 2, "tensor": 2}, count, 8 // count
        )
        said, _ = running.communicate(timeout=600)
        assert running.returncode == 0, said
    one, two = (tmp_path / f"by_{count}" / "many" for count in (1, 2))
    expected, found = (gradients(run, "grpo") for run in (one, two))
    assert any("vision" in path for path in expected)
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in found.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5 * largest)
    assert (two / "init/samples.jsonl").read_text() == (one / "init/samples.jsonl").read_text()


SHARES = """
import sys
import numpy as np
from jaxrl_reason import processes
from jaxrl_reason.errors import InputError

processes.start()
processes._GATHERED_BYTES = 4096
made = []


def make(size):
    made.append(size)
    if size < 0:
        raise InputError(f"{size} is less than 0")
    return np.arange(size), str(size)


sizes = [3, 5000, 0, 17, 70000]
for (array, text), size in zip(processes.divided(sizes, make), sizes, strict=True):
    assert text == str(size) and np.array_equal(array, np.arange(size))
assert made == sizes[processes.number() :: 2], made
assert processes.divided([], make) == []
try:
    processes.divided([1, 2, 3, -4], make)
except InputError as error:
    assert str(error) == "-4 is less than 0"
    sys.exit(0)
sys.exit("nothing was refused")
"""


def test_each_process_makes_its_share_and_has_all(tmp_path):
    (tmp_path / "shares.py").write_text(SHARES)
    address = f"localhost:{launch._free_port()}"
    running = [
        subprocess.Popen(
            [sys.executable, tmp_path / "shares.py"],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
            | {ADDRESS: address, COUNT: "2", NUMBER: str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for one in running:
        _, said = one.communicate(timeout=120)
        assert one.returncode == 0, said


@pytest.mark.slow
def test_a_notice_ends_all_processes_after_the_same_step(tmp_path):
    config = write_config(tmp_path)
    wanted = yaml.safe_load(config.read_text())
    wanted["stages"] = {"sft": wanted["stages"]["sft"] | {"steps": 100_000}}
    config.write_text(yaml.safe_dump(wanted, sort_keys=False))
    run = start(config, "noticed", {"data": 8}, 2, 4)
    log = tmp_path / "noticed" / "many" / "sft" / "metrics.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") > 2):
        time.sleep(0.2)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "the same command goes on from there" in said
    saved = checkpoint.latest(tmp_path / "noticed" / "many" / "sft" / "checkpoints")
    assert saved == log.read_text().count("\n")


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all_with_its_message(tmp_path):
    config = write_config(tmp_path)
    wanted = yaml.safe_load(config.read_text())
    wanted["stages"] = {"grpo": wanted["stages"]["grpo"] | {"dynamic_sampling": None}}
    config.write_text(yaml.safe_dump(wanted, sort_keys=False))
    failing = "import jax\n\n\ndef variety(prompts, completions, **_):\n"
    failing += "    return [1.0] * (len(completions) - jax.process_index())\n"
    (tmp_path / "rewards_of_processes.py").write_text(failing)
    run = start(config, "wrong", {"data": 8}, 2, 4)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 2
    assert "reward 'variety'" in said
    assert "Traceback" not in said
