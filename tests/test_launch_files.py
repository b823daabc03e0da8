"""The scripts and files that start runs on other machines: what they would execute, and do.

No cloud is asked: commands of clouds are replaced by programs that write down how they were called.
"""

import os
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
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = call(shellcheck, "-x", "-S", "warning", script)
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

TEXT = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 1}


def strict(required: dict, optional: dict | None = None) -> dict:
    """An object with these fields and no other."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def listed(item: dict) -> dict:
    return {"type": "array", "items": item, "minItems": 1}


STRINGS = {"type": "object", "additionalProperties": TEXT}
TPUS = strict({"google.com/tpu": COUNT})
# Of jobset.x-k8s.io/v1alpha2 and of pods what is used, with every field's name and type.
JOBSET = strict(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": strict(
            {"name": {**TEXT, "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}},
            {"annotations": STRINGS},
        ),
        "spec": strict(
            {
                "failurePolicy": strict({"maxRestarts": COUNT}),
                "replicatedJobs": listed(
                    strict(
                        {
                            "name": TEXT,
                            "replicas": COUNT,
                            "template": strict(
                                {
                                    "spec": strict(
                                        {
                                            "parallelism": COUNT,
                                            "completions": COUNT,
                                            "backoffLimit": {"const": 0},
                                            "template": strict(
                                                {
                                                    "metadata": strict({"annotations": STRINGS}),
                                                    "spec": {"$ref": "#/$defs/pod"},
                                                }
                                            ),
                                        }
                                    )
                                }
                            ),
                        }
                    )
                ),
            }
        ),
    }
) | {
    "$defs": {
        "pod": strict(
            {
                "restartPolicy": {"const": "Never"},
                "terminationGracePeriodSeconds": COUNT,
                "nodeSelector": strict(
                    {
                        "cloud.google.com/gke-tpu-accelerator": TEXT,
                        "cloud.google.com/gke-tpu-topology": {
                            **TEXT,
                            "pattern": "^[0-9]+(x[0-9]+){1,2}$",
                        },
                    }
                ),
                "containers": listed(
                    strict(
                        {
                            "name": TEXT,
                            "image": TEXT,
                            "command": listed(TEXT),
                            "args": listed(TEXT),
                            "resources": strict({"requests": TPUS, "limits": TPUS}),
                            "volumeMounts": listed(strict({"name": TEXT, "mountPath": TEXT})),
                        }
                    )
                ),
                "volumes": listed(
                    strict(
                        {
                            "name": TEXT,
                            "csi": strict({"driver": TEXT, "volumeAttributes": STRINGS}),
                        }
                    )
                ),
            }
        )
    }
}
SKY = strict(
    {
        "name": TEXT,
        "resources": strict(
            {"infra": {"enum": ["gcp"]}, "accelerators": TEXT},
            {
                "accelerator_args": strict({"runtime_version": TEXT}),
                "use_spot": {"type": "boolean"},
                "job_recovery": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
            },
        ),
        "run": TEXT,
    },
    {
        "envs": {"type": "object", "additionalProperties": {"type": "string"}},
        "workdir": TEXT,
        "file_mounts": {
            "type": "object",
            "additionalProperties": strict({"source": TEXT, "mode": {"enum": ["MOUNT", "COPY"]}}),
        },
        "setup": TEXT,
    },
)


def test_the_jobset_is_valid_and_holds_the_command():
    made = yaml.safe_load(dry(GKE, "manifest", 'task.options={"a": "b\\c"}'))
    jsonschema.validate(made, JOBSET)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 16
    pod = job["template"]["spec"]
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


def test_skypilots_file_is_valid_and_its_commands_are_shell():
    made = yaml.safe_load((ROOT / "tpu" / "sky.yaml").read_text())
    jsonschema.validate(made, SKY)
    for part in ("setup", "run"):
        assert call("bash", "-n", "-c", made[part]).returncode == 0
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


def test_watch_asks_for_machines_again_after_a_preemption(tmp_path):
    calls = tmp_path / "calls"
    # Not there; waiting; active, and its run is lost; suspended; not there; active, and it ends.
    program(
        tmp_path,
        "gcloud",
        f"""
calls={shlex.quote(str(calls))}
echo "${{*//$'\n'/;}}" >> "$calls"
case "$*" in
    *describe*)
        echo x >> "$calls.looks"
        states=("" WAITING_FOR_RESOURCES ACTIVE SUSPENDED "" ACTIVE)
        echo "${{states[$(($(wc -l < "$calls.looks") - 1))]}}" ;;
    *entry.sh*)
        echo x >> "$calls.runs"
        [ "$(wc -l < "$calls.runs")" -gt 1 ] || exit 255 ;;
esac""",
    )
    done = call(QUEUED, "watch", "--settings", EXAMPLE, path=tmp_path, SECONDS_BETWEEN_LOOKS="0.01")
    assert done.returncode == 0, done.stderr
    kinds = ("create", "describe", "scp", "install", "entry.sh", "delete")
    seen = [next(k for k in kinds if k in line) for line in calls.read_text().splitlines() if line]
    seen = [kind for kind in seen if kind not in ("describe", "scp", "install")]
    assert seen == ["create", "entry.sh", "delete", "create", "entry.sh", "delete"]


def test_watch_ends_with_a_mistake_and_leaves_the_machines(tmp_path):
    calls = tmp_path / "calls"
    program(
        tmp_path,
        "gcloud",
        f"""
echo "$*" >> {shlex.quote(str(calls))}
case "$*" in
    *describe*) echo ACTIVE ;;
    *entry.sh*) exit 2 ;;
esac""",
    )
    done = call(QUEUED, "watch", "--settings", EXAMPLE, path=tmp_path)
    assert done.returncode == 2
    assert "the run was refused" in done.stderr
    assert "delete" not in calls.read_text()


def test_slurm_puts_an_unfinished_run_back_into_the_queue(tmp_path):
    calls = tmp_path / "calls"
    program(tmp_path, "srun", 'exit "$FAKE_CODE"')
    program(tmp_path, "scontrol", f'echo "$*" >> {shlex.quote(str(calls))}')
    batch = ROOT / "scripts" / "slurm" / "run.sbatch"
    for code, requeued in ((0, False), (2, False), (143, True), (1, True)):
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
