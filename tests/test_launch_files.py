"""The scripts and files that start runs on other machines: what they would execute, and do.

No cloud is asked: commands of clouds are replaced by programs that write down how they were called.
"""

import contextlib
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[1]
SCRIPTS = [*sorted((ROOT / "tpu").glob("*.sh")), *sorted((ROOT / "scripts/slurm").iterdir())]
EXAMPLE = ROOT / "tpu" / "settings.example"
QUEUED, GKE, LOCAL = (ROOT / "tpu" / f"{name}.sh" for name in ("queued", "gke", "local"))
SLURM = ROOT / "scripts" / "slurm" / "submit.sh"
SHELLCHECK = Path(sys.executable).parent / "shellcheck"
SCHEMAS = yaml.safe_load((ROOT / "tests" / "launch_schemas.yaml").read_text())
ACTIONS = [
    *((QUEUED, a) for a in ("create", "install", "run", "watch", "status", "logs", "delete")),
    *((GKE, a) for a in ("build", "manifest", "submit", "xpk", "status", "logs", "delete")),
    *((SLURM, a) for a in ("submit", "status", "logs", "delete")),
    (LOCAL, "run"),
]


def call(*words, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run a script; programs in `path` come before all others."""
    environment = {**os.environ, **variables}
    if path is not None:
        environment["PATH"] = f"{path}:{os.environ['PATH']}"
    return subprocess.run(
        list(map(str, words)), env=environment, cwd=ROOT, capture_output=True, text=True
    )


def dry(script: Path, action: str, *more: str) -> str:
    done = call(script, action, "--settings", EXAMPLE, "--dry-run", *more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def words_of(line: str) -> list[str]:
    """A line of a shell as that shell splits it."""
    return call("bash", "-c", f"printf '%s\\0' {line}").stdout.split("\0")[:-1]


def program(folder: Path, name: str, text: str) -> None:
    """An executable file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / name
    file.write_text(f"#!/usr/bin/env bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_pass_shellcheck(script):
    done = call(SHELLCHECK, "-x", "-S", "warning", script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("script", "action"), ACTIONS, ids=lambda x: getattr(x, "stem", x))
def test_a_dry_run_prints_and_does_nothing(script, action, tmp_path):
    for name in ("gcloud", "kubectl", "xpk", "docker", "sbatch", "squeue", "scancel", "tail"):
        program(tmp_path, name, "echo called >&2; exit 1")
    done = call(script, action, "--settings", EXAMPLE, "--dry-run", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "called" not in done.stderr
    # What is printed can be pasted into a shell.
    assert call("bash", "-n", "-c", done.stdout).returncode == 0 or action == "manifest"


def test_fields_of_the_run_and_settings_reach_the_command():
    line = dry(QUEUED, "create")
    for word in (
        "--accelerator-type=v5litepod-64",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--zone=us-west4-a",
        "--spot",
    ):
        assert word in words_of(line)
    command = words_of(dry(QUEUED, "run", "seed=1", "task.options={a: 'b c'}"))[-1]
    words = words_of(command.partition("entry.sh ")[2].partition(" 2>&1")[0])
    given = ["seed=1", "task.options={a: 'b c'}"]
    assert words[:-1] == ["published/gsm8k.yaml", "name=qwen3-grpo", *given]
    assert words[-1].startswith("output_dir=")
    submitted = words_of(dry(SLURM, "submit", "seed=1").splitlines()[-1])
    assert submitted[-3:] == ["configs/published/gsm8k.yaml", "name=qwen3-grpo", "seed=1"]
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"} <= set(submitted)


def test_spot_is_a_setting():
    done = call(QUEUED, "create", "--settings", EXAMPLE, "--dry-run")
    assert "--spot" in done.stdout
    on_demand = "\n".join([EXAMPLE.read_text(), "SPOT=0"])
    settings = Path(os.environ.get("TMPDIR", "/tmp")) / f"on_demand.{os.getpid()}"
    settings.write_text(on_demand)
    try:
        done = call(QUEUED, "create", "--settings", settings, "--dry-run")
    finally:
        settings.unlink()
    assert done.returncode == 0
    assert "--spot" not in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([QUEUED, "create"], "set NAME PROJECT ZONE ACCELERATOR RUNTIME in the environment"),
        ([QUEUED], "say what to do: create install run"),
        ([QUEUED, "destroy"], "unknown action destroy; there are: create"),
        ([QUEUED, "create", "delete"], "one action at a time"),
        ([QUEUED, "create", "--force"], "unknown option --force"),
        ([QUEUED, "create", "--settings"], "--settings needs a file"),
        ([QUEUED, "create", "--settings", "nowhere"], "there is no file nowhere"),
        ([GKE, "submit"], "set NAME CONFIG IMAGE BUCKET"),
        ([SLURM, "submit"], "set NAME CONFIG NODES GPUS"),
        ([LOCAL, "run"], "set NAME CONFIG"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_done(words, message):
    done = call(*words)
    assert done.returncode == 2
    assert message in done.stderr


# Manifests


def test_the_jobset_is_valid_and_holds_the_command():
    made = yaml.safe_load(dry(GKE, "manifest", 'task.options={"a": "b\\c"}'))
    jsonschema.validate(made, SCHEMAS["jobset"])
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", made["metadata"]["name"])
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    pod = job["template"]["spec"]
    assert set(pod["nodeSelector"]) == {
        "cloud.google.com/gke-tpu-accelerator",
        "cloud.google.com/gke-tpu-topology",
    }
    container = pod["containers"][0]
    assert container["args"] == [
        "configs/published/gsm8k.yaml",
        "name=qwen3-grpo",
        'task.options={"a": "b\\c"}',
        "output_dir=/runs",
    ]
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    # What a container runs is in the image where the manifest says.
    image = (ROOT / "tpu" / "Containerfile").read_text()
    assert "WORKDIR /app" in image
    assert container["command"] == ["/app/tpu/entry.sh"]


def test_the_jobset_starts_again_but_not_after_a_mistake():
    spec = yaml.safe_load(dry(GKE, "manifest"))["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    # Kubernetes takes a podFailurePolicy of pods alone that are never started again themselves.
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    assert job["backoffLimit"] == 0
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    names = [container["name"] for container in job["template"]["spec"]["containers"]]
    assert rule["onExitCodes"] == {"containerName": names[0], "operator": "In", "values": [2]}
    # A job that this rule has failed has this reason; all others are started again.
    [rule] = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["failurePolicy"]["maxRestarts"] == 20


@pytest.mark.parametrize(
    "name",
    ["spec.restarts", "spec.failurePolicy.rules.0.onExitCodes", "spec.replicatedJobs.0.count"]
    + [f"spec.replicatedJobs.0.template.spec.{name}" for name in ("retries", "template.spec.host")],
)
def test_fields_that_jobset_does_not_know_are_noticed(name):
    made = yaml.safe_load(dry(GKE, "manifest"))
    *path, last = name.split(".")
    place = made
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    place[last] = 1
    with pytest.raises(jsonschema.ValidationError, match="Additional properties"):
        jsonschema.validate(made, SCHEMAS["jobset"])


def test_xpk_starts_again_what_hung_but_no_mistake_and_mounts_the_bucket():
    words = words_of(dry(GKE, "xpk"))
    # 42 and 127 to 255 it starts again of itself.
    assert words[words.index("--restart-on-exit-codes") + 1] == "1"
    assert words[words.index("--storage") + 1] == "my-bucket"
    grace = yaml.safe_load(dry(GKE, "manifest"))["spec"]["replicatedJobs"][0]["template"]["spec"]
    grace = grace["template"]["spec"]["terminationGracePeriodSeconds"]
    assert words[words.index("--termination-grace-period-seconds") + 1] == str(grace)


def test_skypilot_starts_again_after_notices_and_for_a_while_after_failures():
    recovery = yaml.safe_load((ROOT / "tpu" / "sky.yaml").read_text())["resources"]["job_recovery"]
    # What stands here is started again for ever.
    assert recovery["recover_on_exit_codes"] == [143]
    assert 1 <= recovery["max_restarts_on_errors"] <= 20


def test_skypilots_file_is_valid_and_its_commands_are_shell(tmp_path):
    made = yaml.safe_load((ROOT / "tpu" / "sky.yaml").read_text())
    jsonschema.validate(made, SCHEMAS["skypilot"])
    assert made["resources"]["infra"] == "gcp"
    for part in ("setup", "run"):
        (tmp_path / part).write_text(made[part])
        done = call(SHELLCHECK, "--shell=bash", "-S", "warning", tmp_path / part)
        assert done.returncode == 0, done.stdout
    for name in made["envs"]:
        assert f"${name}" in made["run"] or f"${{{name}}}" in str(made["file_mounts"])


def test_the_image_copies_what_there_is():
    lines = (ROOT / "tpu" / "Containerfile").read_text().splitlines()
    sources = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert sources
    for name in sources:
        assert (ROOT / name).exists(), name


# What they do


# A run that ends on a notice, and says when it can take one.
NOTICED = "trap 'echo saved; exit 0' TERM; echo begun; touch $BEGUN; while :; do sleep 0.05; done"


def test_entry_passes_a_notice_on_and_says_that_the_run_is_not_over(tmp_path):
    program(tmp_path, "run_it", NOTICED)
    variables = {"JAXRL_REASON": str(tmp_path / "run_it"), "BEGUN": str(tmp_path / "begun")}
    command = ["bash", ROOT / "tpu" / "entry.sh", "x.yaml"]
    environment = {**os.environ, **variables}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as entry:
        assert entry.stdout.readline() == "begun\n"
        entry.send_signal(signal.SIGTERM)
        assert entry.stdout.readline() == "saved\n"
        assert entry.wait(timeout=20) == 143


def pressed(command, begun: str, *, whole_group: bool = True, **variables: str):
    """Ctrl-C as soon as the command has said `begun`: to all processes, or to the first alone."""
    with subprocess.Popen(
        # Who started these tests may ignore it, which no shell below could change.
        ["env", "--default-signal=INT", *map(str, command)],
        **{"env": {**os.environ, **variables}, "cwd": ROOT, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "start_new_session": True},
    ) as started:
        try:
            assert started.stdout.readline() == begun
            if whole_group:
                os.killpg(started.pid, signal.SIGINT)
            else:
                started.send_signal(signal.SIGINT)
            out, error = started.communicate(timeout=20)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, started.returncode, begun + out, error)


@pytest.mark.parametrize("whole_group", [False, True])
def test_entry_saves_after_an_interrupt_and_says_that_the_run_is_to_end(tmp_path, whole_group):
    program(tmp_path, "run_it", NOTICED)
    done = pressed(
        ["bash", ROOT / "tpu" / "entry.sh", "x.yaml"],
        "begun\n",
        whole_group=whole_group,
        JAXRL_REASON=str(tmp_path / "run_it"),
        BEGUN=str(tmp_path / "begun"),
    )
    assert (done.stdout, done.returncode) == ("begun\nsaved\n", 130), done.stderr


def test_local_saves_and_ends_after_ctrl_c(tmp_path):
    program(tmp_path, "run_it", NOTICED)
    variables = {"JAXRL_REASON": str(tmp_path / "run_it"), "BEGUN": str(tmp_path / "begun")}
    done = pressed([LOCAL, "run"], "begun\n", NAME="n", CONFIG="c.yaml", **variables)
    assert (done.stdout, done.returncode) == ("begun\nsaved\n", 130), done.stderr
    assert "starting it again" not in done.stderr


def test_local_starts_again_after_a_notice(tmp_path):
    runs = tmp_path / "runs"
    # The parent is entry.sh, as whoever takes machines away would end it.
    program(
        tmp_path,
        "run_it",
        f"""echo x >> {runs}
[ "$(wc -l < {runs})" = 1 ] || exit 0
trap 'exit 0' TERM
kill -TERM "$PPID"
while :; do sleep 0.05; done""",
    )
    more = {"JAXRL_REASON": str(tmp_path / "run_it"), "NAME": "n", "CONFIG": "c.yaml"}
    done = call("timeout", "20", LOCAL, "run", **more)
    assert done.returncode == 0, done.stderr
    assert "the run ended with 143; starting it again" in done.stderr
    assert runs.read_text() == "x\n" * 2


@pytest.mark.parametrize("moment", ['"${JAXRL_REASON', "child=$!", '[ "$noticed" = "$passed'])
def test_entry_passes_on_a_notice_that_comes_as_the_run_begins(tmp_path, moment):
    """Before it is started, before its number is known, and before that is looked at."""
    program(tmp_path, "run_it", NOTICED)
    begun = tmp_path / "begun"
    hook = f"""case "$BASH_COMMAND" in
        'child=$!' | '[ "$noticed" = "$passed'*) until [ -e {begun} ]; do sleep 0.01; done ;;
    esac
    case "$BASH_COMMAND" in {shlex.quote(moment)}*) kill -TERM $$ ;; esac"""
    (tmp_path / "hook").write_text(f"trap {shlex.quote(hook)} DEBUG\n")
    done = call(
        *("timeout", "20", "bash", ROOT / "tpu" / "entry.sh", "x.yaml"),
        JAXRL_REASON=str(tmp_path / "run_it"),
        BASH_ENV=str(tmp_path / "hook"),
        BEGUN=str(begun),
    )
    assert (done.stdout, done.returncode) == ("begun\nsaved\n", 143)


@pytest.mark.parametrize("code", [0, 1, 2, 130])
def test_entry_keeps_other_exit_codes(tmp_path, code):
    program(tmp_path, "run_it", f'echo "$@"; exit {code}')
    words = ("x.yaml", "task.options={a: b c}")
    done = call("bash", ROOT / "tpu" / "entry.sh", *words, JAXRL_REASON=str(tmp_path / "run_it"))
    assert done.returncode == code
    assert done.stdout == "run x.yaml task.options={a: b c}\n"


ABSENT = "echo 'ERROR: (gcloud) NOT_FOUND: Resource x was not found.' >&2; exit 1"
ACTIVE = "echo ACTIVE"
KINDS = {
    "describe": "*describe*",
    "create": "*'resources create'*",
    "delete": "*'resources delete'*",
    "scp": "*' scp '*",
    "run": "*entry.sh*",
    "install": "*",
}
DELETE = "gcloud compute tpus queued-resources delete qwen3-grpo --project=my-project"


class Cloud:
    """A gcloud that answers each kind of command as told, the last answer for all that follow."""

    def __init__(self, folder: Path, **answers: list[str]):
        self.folder, self.calls = folder, folder / "calls"
        for kind, texts in answers.items():
            for number, text in enumerate(texts, 1):
                (folder / f"{kind}.{number}").write_text(text)
            (folder / f"{kind}.last").write_text(texts[-1])
        cases = "\n".join(f"{pattern}) kind={kind} ;;" for kind, pattern in KINDS.items())
        program(
            folder,
            "gcloud",
            f"""case "$*" in
{cases}
esac
echo $kind >> {self.calls}
answer={folder}/$kind.$(grep -cx $kind {self.calls})
[ -e "$answer" ] || answer={folder}/$kind.last
if [ -e "$answer" ]; then . "$answer"; fi""",
        )

    def watch(self, failures: int = 10) -> subprocess.CompletedProcess:
        settings = self.folder / "settings"
        settings.write_text(f"{EXAMPLE.read_text()}FAILURES={failures}\n")
        words = ("timeout", "30", QUEUED, "watch", "--settings", settings)
        return call(*words, path=self.folder, SECONDS_BETWEEN_LOOKS="0.01")

    def seen(self) -> list[str]:
        """What was asked for, without questions."""
        return [kind for kind in self.calls.read_text().split() if kind != "describe"]


def test_watch_asks_for_machines_again_after_a_preemption(tmp_path):
    states = [ABSENT, "echo WAITING_FOR_RESOURCES", ACTIVE, "echo SUSPENDED", ABSENT, ACTIVE]
    cloud = Cloud(tmp_path, describe=states, run=["exit 255", "true"])
    done = cloud.watch()
    assert done.returncode == 0, done.stderr
    once = ["create", "scp", "install", "run", "delete"]
    assert cloud.seen() == once * 2
    assert "cost" not in done.stderr


@pytest.mark.parametrize(
    ("answers", "seen"),
    [
        # Nobody knows whether there are machines, so that none are asked for.
        ({"describe": ["echo UNAVAILABLE >&2; exit 1", "true", ACTIVE]}, []),
        ({"describe": [ABSENT, ACTIVE], "create": ["echo ALREADY_EXISTS >&2; exit 1"]}, ["create"]),
        # Nothing is begun on machines that are not ready.
        ({"describe": [ACTIVE], "scp": ["exit 1", "true"]}, ["scp"]),
        ({"describe": [ACTIVE], "install": ["exit 1", "true"]}, ["scp", "install"]),
        ({"describe": [ACTIVE], "run": ["exit 1", "true"]}, ["scp", "install", "run"]),
        ({"describe": ["echo FAILED", ACTIVE], "delete": ["exit 1", "true"]}, ["delete"]),
    ],
    ids=["describe", "create", "scp", "install", "run", "delete"],
)
def test_watch_looks_again_after_a_failure(tmp_path, answers, seen):
    cloud = Cloud(tmp_path, **answers)
    done = cloud.watch()
    assert done.returncode == 0, done.stderr
    assert cloud.seen() == [*seen, "scp", "install", "run", "delete"]
    assert "failure 1 of 10 in a row" in done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_watch_ends_after_failures_in_a_row_and_says_how_to_give_back_the_machines(tmp_path, kind):
    first = {"create": ABSENT, "delete": "echo FAILED"}.get(kind, ACTIVE)
    cloud = Cloud(tmp_path, **{"describe": [first], kind: ["echo DENIED >&2; exit 1"]})
    done = cloud.watch(failures=3)
    assert done.returncode == 1
    assert "DENIED" in done.stderr
    assert "failure 3 of 3 in a row" in done.stderr
    assert "may still be there, and cost" in done.stderr
    assert DELETE in done.stderr
    assert cloud.calls.read_text().split().count(kind) == 3


def test_watch_counts_failures_in_a_row_alone(tmp_path):
    states = ["exit 1", "echo PROVISIONING"] * 4 + [ACTIVE]
    assert Cloud(tmp_path, describe=states).watch(failures=2).returncode == 0


def test_watch_gives_back_the_machines_of_a_complete_run_for_sure(tmp_path):
    cloud = Cloud(tmp_path, describe=[ACTIVE], delete=["exit 1", "exit 1", "true"])
    done = cloud.watch()
    assert done.returncode == 0, done.stderr
    assert cloud.seen() == ["scp", "install", "run", "delete", "delete", "delete"]
    # They were taken away before.
    gone = tmp_path / "gone"
    gone.mkdir()
    cloud = Cloud(gone, describe=[ACTIVE, ABSENT], delete=["exit 1"])
    assert cloud.watch().returncode == 0
    assert cloud.seen() == ["scp", "install", "run", "delete"]


def test_watch_ends_with_a_mistake_and_leaves_the_machines(tmp_path):
    cloud = Cloud(tmp_path, describe=[ACTIVE], run=["exit 2"])
    done = cloud.watch()
    assert done.returncode == 2
    assert "the run was refused" in done.stderr
    assert "may still be there, and cost" in done.stderr
    assert DELETE in done.stderr
    assert "delete" not in cloud.seen()


def test_watch_ends_with_ctrl_c(tmp_path):
    # gcloud takes the signal and ends well, after which a shell goes on.
    answer = "trap 'exit 1' INT; echo begun; while :; do sleep 0.05; done"
    cloud = Cloud(tmp_path, describe=[ACTIVE], run=[answer])
    more = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS_BETWEEN_LOOKS": "0.01"}
    done = pressed([QUEUED, "watch", "--settings", EXAMPLE], "begun\n", **more)
    assert done.returncode == 130
    assert DELETE in done.stderr
    assert cloud.seen() == ["scp", "install", "run"]


def test_slurm_puts_an_unfinished_run_back_into_the_queue(tmp_path):
    calls = tmp_path / "calls"
    program(tmp_path, "srun", 'exit "$FAKE_CODE"')
    program(tmp_path, "scontrol", f'echo "$*" >> {shlex.quote(str(calls))}')
    batch = ROOT / "scripts" / "slurm" / "run.sbatch"
    for code, requeued in ((0, False), (2, False), (130, False), (143, True), (1, True)):
        calls.unlink(missing_ok=True)
        more = {"FAKE_CODE": str(code), "JAXRL_HOME": str(ROOT), "SLURM_JOB_ID": "7"}
        done = call("bash", batch, "x.yaml", path=tmp_path, **more)
        assert done.returncode == code
        assert calls.exists() == requeued


def test_local_starts_the_run_again_until_it_is_over(tmp_path):
    runs = tmp_path / "runs"
    program(
        tmp_path,
        "run_it",
        f'echo "$*" >> {runs}; [ "$(wc -l < {runs})" -gt 2 ] || exit 137',
    )
    settings = tmp_path / "settings"
    settings.write_text("NAME=n\nCONFIG=c.yaml\nPROCESSES=3\n")
    done = call(LOCAL, "run", "--settings", settings, JAXRL_REASON=str(tmp_path / "run_it"))
    assert done.returncode == 0, done.stderr
    assert runs.read_text() == "run c.yaml name=n --local-processes 3\n" * 3
    assert done.stderr.count("starting it again") == 2


def test_a_printed_manifest_is_pasted_as_it_is(tmp_path):
    program(tmp_path, "kubectl", "cat")
    told = dry(GKE, "submit", r"name=a$HOME\\b`c`")
    pasted = call("bash", "-c", told, path=tmp_path)
    assert pasted.returncode == 0, pasted.stderr
    manifest = call(GKE, "manifest", "--settings", EXAMPLE, r"name=a$HOME\\b`c`").stdout
    assert r"$HOME" in manifest
    assert pasted.stdout == manifest
