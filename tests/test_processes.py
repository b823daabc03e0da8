"""Several processes: how they find each other, and that their number changes nothing."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
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


STACKS = "Timeout (0:00:05)!\nThread 0x01 (most recent call first):\n"


@pytest.mark.parametrize(
    ("text", "codes", "told"),
    [
        ("", [-9, 1], ""),
        ("error: x\n", [2, 2], ""),
        ("error: x\n", [-9, 2], "process 1:\nerror: x\n"),
        (f"noise\n{STACKS}", [1, 1], f"process 1:\n{STACKS}"),
        (f"noise\n{STACKS}", [0, 1], f"process 1:\nnoise\n{STACKS}"),
    ],
)
def test_what_a_process_without_a_terminal_said_is_told_where_no_other_knows(text, codes, told):
    assert launch._worth_telling(1, text, codes) == told


# Runs


STAGES = """
evaluation: {problems: 8, batch_size: 8, max_completion_length: 8, sampling: {temperature: 0}}
stages:
  keep:
    kind: reject
    parent: init
    num_prompts: 8
    num_generations: 4
    max_completion_length: 8
    builder: "rewards_of_processes:pairs"
  sft:
    kind: sft
    steps: 1
    batch_size: 16
    gradient_accumulation_steps: 2
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: &optimizer {learning_rate: 1.0e-2, adam_epsilon: 1.0e-2}
  dpo:
    kind: dpo
    parent: init
    steps: 1
    batch_size: 8
    max_length: 40
    data: {kind: stage, stage: keep, num_examples: 16}
    optimizer: *optimizer
  grpo:
    kind: grpo
    parent: init
    steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 8
    beta: 0.05
    dynamic_sampling: {max_batches: 2}
    rewards:
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: group}
      - {kind: format}
    optimizer: *optimizer
  morl:
    kind: morl
    parent: init
    steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 8
    beta: 0.05
    aggregator_options: {min_std: 0.01}
    rewards:
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: completion}
      - {kind: length, low: 2, high: 8}
    optimizer: *optimizer
"""
REWARDS = '''
"""Rewards and rows for runs of processes."""

calls = []


def variety(prompts, completions, **_):
    """Differs between completions of any model."""
    calls.append(list(completions))
    return [len(set(text.split())) + len(text) / 100 for text in completions]


def pairs(groups, rng):
    """Pairs of each problem: its first completion before its second one, and so on."""
    for group in groups:
        for chosen, rejected in zip(group.completions[::2], group.completions[1::2]):
            yield {"problem": group.number, "chosen": chosen.text + " 1", "rejected": rejected.text}
'''
# Runs one after the other in the same processes, since each takes seconds to begin.
RUNS = """
import json
import sys
from pathlib import Path

from jaxrl_reason import processes

processes.start()
from jaxrl_reason.sampling import Session
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.pipeline import run

opened, following, sessions = Session.__init__, Session.__next__, []


def open_session(self, *given, **more):
    opened(self, *given, **more)
    self.tokens_of = {}
    sessions.append(self.tokens_of)


def follow(self):
    completion = following(self)
    place = f"{completion.request.id} {completion.request.index}"
    self.tokens_of[place] = completion.tokens.tolist()
    return completion


Session.__init__, Session.__next__ = open_session, follow
for words in sys.argv[1:]:
    path, *overrides = words.split()
    config = RunConfig.load(path, overrides)
    rows = run(config, say=lambda line: None)
    import rewards_of_processes

    told = {"sessions": sessions, "calls": rewards_of_processes.calls}
    file = Path(config.output_dir) / config.name / f"told_{processes.number()}.json"
    file.write_text(json.dumps(told))
    sessions.clear()
    rewards_of_processes.calls.clear()
"""
KINDS = ("sft", "dpo", "grpo", "morl")
MESHES = [
    {"data": 8},
    {"data": 2, "fsdp": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2},
    {"data": 4, "context": 2},
]
# Of two processes, parameters or a row are cut over both.
ACROSS = [{"data": 1, "fsdp": 4, "tensor": 2}, {"data": 1, "context": 8}]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CONFLICTS = "stages.morl.conflict_steps=1"
"""Only in some runs: each objective's gradient is a program of its own."""
FORMS = {"eight": (1, 8, MESHES), "two by four": (2, 4, MESHES + ACROSS)}
"""Processes, devices of each, and on which meshes."""


def write_config(folder: Path, **changes: int) -> Path:
    """The configuration of the runs, with what it imports.

    Args:
        folder: for both.
        changes: of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rewards_of_processes.py").write_text(REWARDS)
    tiny = yaml.safe_load((Path(__file__).parent / "tiny_run.yaml").read_text())
    # No dimension is too small for any of the meshes.
    tiny["model"]["changes"] |= {"num_attention_heads": 8, "num_key_value_heads": 2, **changes}
    path = folder / ("experts.yaml" if changes else "run.yaml")
    config = {"name": "many", **tiny, **yaml.safe_load(STAGES)}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def begin(command: list, folder: Path, devices: int, **more: str) -> subprocess.Popen:
    """A Python program that has so many devices."""
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parents[1])]),
        "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        **more,
    }
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start(config: Path, out: str, mesh: dict[str, int], count: int, devices: int):
    """A run by so many processes."""
    command = ["-m", "jaxrl_reason.cli", "run", config, f"output_dir={out}"]
    command += [f"mesh.{axis}={size}" for axis, size in mesh.items()]
    command += ["--local-processes", str(count)] if count > 1 else []
    return begin(command, config.parent, devices)


def start_all(folder: Path, runs: list[str], count: int, devices: int) -> list[subprocess.Popen]:
    """Processes that make several runs, each `<configuration> <field>=<value> ...`."""
    address = f"localhost:{launch._free_port()}"
    together = lambda k: {ADDRESS: address, COUNT: str(count), NUMBER: str(k)} if count > 1 else {}
    return [begin(["-c", RUNS, *runs], folder, devices, **together(k)) for k in range(count)]


def ended(running: list[subprocess.Popen]) -> None:
    """Wait for processes; all must end well."""
    said = [one.communicate(timeout=1200)[0] for one in running]
    assert [one.returncode for one in running] == [0] * len(running), "\n".join(said)


def name_of(mesh: dict[str, int]) -> str:
    return ",".join(f"{axis}:{size}" for axis, size in mesh.items())


def folder_of(folder: Path, mesh: dict[str, int], form: str) -> Path:
    return folder / form.replace(" ", "_") / name_of(mesh) / "many"


def words_of(mesh: dict[str, int], out: str) -> str:
    """A run on a mesh, for `start_all`."""
    config = "experts.yaml" if "expert" in mesh else "run.yaml"
    return " ".join([config, f"output_dir={out}", *(f"mesh.{k}={v}" for k, v in mesh.items())])


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory) -> Path:
    """A folder with the runs on one device, and those on each mesh in each form."""
    folder = tmp_path_factory.mktemp("processes")
    write_config(folder)
    write_config(folder, **EXPERTS)
    alone = [
        f"run.yaml mesh.data=1 output_dir=alone {CONFLICTS}",
        "experts.yaml mesh.data=1 output_dir=experts",
    ]
    for form, (count, devices, meshes) in FORMS.items():
        runs = [
            words_of(mesh, str(folder_of(folder, mesh, form).parent))
            + (f" {CONFLICTS}" if mesh in ACROSS else "")
            for mesh in meshes
        ]
        one = start_all(folder, alone, 1, 1) if count == 1 else []
        ended(start_all(folder, runs, count, devices) + one)
    return folder


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


def compare(one: Path, many: Path, kinds: Sequence[str]) -> None:
    """Losses, every array's gradient, and all tokens that were sampled, the greedy ones too."""
    for kind in kinds:
        rows = [json.loads((run / kind / "metrics.jsonl").read_text()) for run in (one, many)]
        for metric in ("loss", "grad_norm"):
            np.testing.assert_allclose(rows[1][metric], rows[0][metric], rtol=1e-5, atol=1e-7)
        for name in (name for name in rows[1] if name.startswith("objectives/")):
            np.testing.assert_allclose(rows[1][name], rows[0][name], rtol=1e-5, atol=1e-5)
        expected, found = gradients(one, kind), gradients(many, kind)
        assert found.keys() == expected.keys() != set()
        for path, value in found.items():
            largest = np.abs(expected[path]).max()
            assert largest > 0, path
            np.testing.assert_allclose(
                value, expected[path], rtol=0, atol=1e-5 * largest, err_msg=f"{kind}: {path}"
            )
    expected, found = (told(run)[0]["sessions"] for run in (one, many))
    assert found == expected
    assert len(expected) > len(kinds)  # of the untrained model, and of what each stage has made
    for file in [*one.glob("*/samples.jsonl"), *one.glob("*/pairs.jsonl")]:
        assert (many / file.relative_to(one)).read_text() == file.read_text()


def told(run: Path) -> list[dict]:
    """What each process said of itself, in their order."""
    return [json.loads(file.read_text()) for file in sorted(run.glob("told_*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "mesh"),
    [(form, mesh) for form, (_, _, meshes) in FORMS.items() for mesh in meshes],
    ids=lambda part: part if isinstance(part, str) else name_of(part),
)
def test_devices_and_processes_change_nothing(all_runs, form, mesh):
    one = all_runs / ("experts" if "expert" in mesh else "alone") / "many"
    many = folder_of(all_runs, mesh, form)
    assert len(list(many.glob("*/eval.json"))) == len(KINDS) + 1
    compare(one, many, KINDS)


def test_fine_tuning_is_the_same_on_one_device_eight_and_two_by_four(tmp_path):
    config = write_config(tmp_path)
    wanted = yaml.safe_load(config.read_text())
    wanted["stages"] = {"sft": wanted["stages"]["sft"]}
    config.write_text(yaml.safe_dump(wanted, sort_keys=False))
    mesh = {"data": 1, "fsdp": 4, "tensor": 2}
    ended(
        start_all(tmp_path, [words_of({"data": 1}, "alone")], 1, 1)
        + start_all(tmp_path, [words_of(mesh, "eight")], 1, 8)
    )
    ended(start_all(tmp_path, [words_of(mesh, "both")], 2, 4))
    for many in ("eight", "both"):
        compare(tmp_path / "alone" / "many", tmp_path / many / "many", ["sft"])
    assert_written_once(*(tmp_path / many / "many" / "sft" for many in ("eight", "both")))


def assert_written_once(one: Path, both: Path) -> None:
    """Each of two processes has written half of the pieces that one process writes, no piece twice.

    That is of arrays that are cut over both. The files that Orbax makes of them differ in size, as
    they hold older versions of their own index.
    """
    (whole, nothing), (first, second) = written(one), written(both)
    assert not nothing
    assert not first.keys() & second.keys()
    assert first.keys() | second.keys() == whole.keys() != set()
    sizes = [sum(part.values()) for part in (whole, first, second)]
    assert sizes[1] + sizes[2] == pytest.approx(sizes[0], rel=0.01)  # compressed, so not exactly
    assert min(sizes[1:]) > 0.4 * sizes[0]


def written(stage: Path) -> list[dict[str, int]]:
    """Bytes of each piece of an array that the first two processes wrote at the only step."""
    import tensorstore

    (step,) = (stage / "checkpoints").iterdir()
    found = []
    for number in range(2):
        sizes = {}
        for folder in step.glob(f"*/ocdbt.process_{number}"):
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"})
            store = store.result()
            for piece in store.list().result():
                name = f"{folder.parent.name}/{piece.decode()}"
                sizes[name] = len(store.read(piece).result().value)
        found.append(sizes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES + ACROSS, ids=name_of)
def test_a_completion_is_scored_by_one_process(all_runs, mesh):
    one = all_runs / ("experts" if "expert" in mesh else "alone") / "many"
    both = told(folder_of(all_runs, mesh, "two by four"))
    assert len(both) == 2
    # Single completions in `morl`, groups in `grpo`; evaluations, by the first process, are of 8.
    for size in (1, 4):
        alone, *shares = (
            Counter(tuple(call) for call in process["calls"] if len(call) == size)
            for process in (*told(one), *both)
        )
        assert shares[0] + shares[1] == alone
        assert abs(shares[0].total() - shares[1].total()) <= max(size % 4 * 4, 1)


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
    assert any("vision" in path for path in same_for_two(config, "grpo"))


def same_for_two(config: Path, kind: str) -> dict[str, np.ndarray]:
    """The gradients of a run, which are those of two processes; and so are evaluations."""
    for count in (1, 2):
        mesh = {"data": 2, "fsdp": 2, "tensor": 2}
        running = start(config, f"by_{count}", mesh, count, 8 // count)
        said, _ = running.communicate(timeout=600)
        assert running.returncode == 0, said
    one, two = (config.parent / f"by_{count}" / "many" for count in (1, 2))
    expected, found = (gradients(run, kind) for run in (one, two))
    largest = max(np.abs(value).max() for value in expected.values())
    for path, value in found.items():
        np.testing.assert_allclose(value, expected[path], rtol=1e-5, atol=1e-5 * largest)
    for stage in ("init", kind):
        samples = [(run / stage / "samples.jsonl").read_text() for run in (one, two)]
        assert samples[0] == samples[1]
    return expected


JUDGE = """
name: judge
stages:
  cold:
    kind: sft
    steps: 20
    batch_size: 8
    max_length: 40
    data: {kind: traces, num_examples: 64, styles: {answer: 1.0}}
    optimizer: {learning_rate: 2.0e-2}
"""
JUDGED = """
stages:
  grpo:
    kind: grpo
    steps: 1
    prompts_per_step: 8
    num_generations: 4
    max_completion_length: 8
    rewards:
      - {kind: python, name: variety, function: "rewards_of_processes:variety", scope: group}
      - kind: judge
        name: judged
        prompt: "{prompt} {given}"
        pattern: '(\\d)'
        scale: [-2, 2]
        backend: {kind: checkpoint, path: judges/judge/cold, max_completion_length: 12}
    optimizer: {learning_rate: 1.0e-2}
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory) -> Path:
    """A folder with runs of one process and of two that a checkpoint judges for."""
    config = write_config(tmp_path_factory.mktemp("judged"))
    made = yaml.safe_load(config.read_text())
    config.write_text(yaml.safe_dump({**made, **yaml.safe_load(JUDGE)}))
    ended([start(config, "judges", {"data": 8}, 1, 8)])
    config.write_text(yaml.safe_dump({**made, **yaml.safe_load(JUDGED)}))
    return config.parent


@pytest.mark.slow
def test_a_checkpoint_judges_for_several_processes(judged):
    same_for_two(judged / "run.yaml", "grpo")
    metrics = [judged / f"by_{count}" / "many" / "grpo" / "metrics.jsonl" for count in (1, 2)]
    one, two = (json.loads(path.read_text())["rewards/judged/mean"] for path in metrics)
    assert one == two > 0


@pytest.mark.slow
def test_commands_for_checkpoints_give_the_same_by_several_processes(judged):
    """What a pod has trained may be too large for one of its hosts."""
    here = "import sys; from jaxrl_reason.launch import run_here; "
    here += "sys.exit(run_here(sys.argv[2:], int(sys.argv[1])))"
    (judged / "prompts.txt").write_text("c = 0 ; e = c + 1 ; e ?\n")
    stage = "judges/judge/cold"
    told = {}
    for count in (1, 2):
        for words in (
            f"evaluate {stage} --samples samples_{count}.jsonl",
            f"sample {stage} --file prompts.txt num_generations=8",
            f"export {stage} exported_{count}",
        ):
            done = begin(["-c", here, str(count), *words.split()], judged, 8 // count)
            said, _ = done.communicate(timeout=300)
            assert done.returncode == 0, said
            told[words.split()[0], count] = said
    # Gloo, which joins processes on CPUs, writes before and between what the commands print.
    rows, same_rows = (re.findall(r"\{.*\}", told["sample", count]) for count in (1, 2))
    assert rows == same_rows
    assert len(rows) == 8
    texts = (told["evaluate", count] for count in (1, 2))
    result, same_result = (json.JSONDecoder().raw_decode(s, s.index("{"))[0] for s in texts)
    assert result == same_result
    read = lambda name: (judged / name).read_bytes()
    assert read("samples_1.jsonl") == read("samples_2.jsonl")
    weights = "model.safetensors"
    assert read(f"exported_1/{weights}") == read(f"exported_2/{weights}")
    done = begin(["-c", here, "2", "sample", stage], judged, 4)
    said, _ = done.communicate(timeout=300)
    assert done.returncode == 2
    assert "give them all the same --file" in said


SHARES = """
import sys
import numpy as np
from jaxrl_reason import processes
from jaxrl_reason.errors import InputError, StorageError

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
else:
    sys.exit("nothing was refused")


def full():
    raise StorageError("no room")


try:
    processes.from_first(full)
except StorageError as error:
    assert str(error) == "no room"
    sys.exit(0)
sys.exit("nothing was full")
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


NOTICE = """
import os, signal, time

groups = 0


def variety(prompts, completions, **_):
    global groups
    groups += len(completions) == 4  # an evaluation rewards all completions at once
    if groups == 2 * 4 + 1 and os.environ["JAXRL_PROCESS"] == "0":  # it has four of a step's eight
        groups += 1
        os.kill(os.getppid(), signal.SIGTERM)  # who tells both
        time.sleep(5)
    return [len(set(text.split())) + len(text) / 100 for text in completions]
"""


@pytest.mark.slow
def test_a_notice_ends_all_processes_after_the_same_step(tmp_path):
    config = write_config(tmp_path)
    wanted = yaml.safe_load(config.read_text())
    wanted["stages"] = {"grpo": wanted["stages"]["grpo"] | {"steps": 50, "dynamic_sampling": None}}
    config.write_text(yaml.safe_dump(wanted, sort_keys=False))
    (tmp_path / "rewards_of_processes.py").write_text(NOTICE)
    run = start(config, "noticed", {"data": 8}, 2, 4)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    stage = tmp_path / "noticed" / "many" / "grpo"
    saved = checkpoint.latest(stage / "checkpoints")
    # The step that it came in; or, where JAX was slow to agree on that, the one behind it.
    assert saved in (3, 4)
    assert f"grpo is saved after step {saved}; the same command goes on from there" in said
    rows = [json.loads(row)["step"] for row in (stage / "metrics.jsonl").read_text().splitlines()]
    assert rows == [*range(1, saved + 1)]
    assert not (stage / "eval.json").exists()


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
