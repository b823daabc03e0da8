"""The command line: run, plan, import, export, evaluate, sample, lineage, report, reproduce, bench.

Mistakes in configurations, data or paths end with exit code 2 and one message; what a run has
finished stays, and the same command goes on where it stopped.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxrl_reason import __version__
from jaxrl_reason.errors import InputError, Preemption, StorageError

_RUN = """\
Train the stages of a configuration one after the other. Finished stages are skipped and an
interrupted one goes on where it was. Fields are set with key=value, for example

  jaxrl-reason run configs/quickstart.yaml seed=1 stages.reason.steps=20
"""
_IMPORT = """\
Make a folder of a published model that `sample`, `evaluate` and `export` read: its weights as a
checkpoint, its tokenizer and its settings. A run does this by itself. Fields are set with
key=value, for example

  jaxrl-reason import Qwen/Qwen3-0.6B runs/qwen3 max_prompt_length=512
"""
_EXPORT = """\
Write a checkpoint as a directory in Hugging Face's format, which transformers and vLLM load. What
was written is read again and compared before it gets its name.

  jaxrl-reason export runs/quickstart/reason exported
"""
_EVALUATE = """\
Accuracy of a checkpoint on held-out problems of its task. Fields of the run's evaluation are set
with key=value, for example

  jaxrl-reason evaluate runs/quickstart/reason problems=1000 sampling.temperature=0
"""
_SAMPLE = """\
Complete prompts with a checkpoint: those of a file (one prompt a line, or JSONL with a column
`prompt`), or those typed at the terminal. Fields are set with key=value, for example

  jaxrl-reason sample runs/quickstart/reason --file prompts.txt num_generations=4
"""
_LINEAGE = """\
Where a checkpoint comes from: every ancestor with its stage, steps, configuration hash and data
hash, back to the untrained model.
"""
_REPORT = """\
One HTML page about a run, or about a stage beside its parent: results, curves, and what the model
wrote for the same held-out problems before and after. A run writes it when it ends.

  jaxrl-reason report runs/quickstart --examples 24
"""
_REPRODUCE = """\
Run an experiment about a paper over several seeds, judge its claims and write its page. Seeds that
are in the results already are not run again. NAME is a folder of configs/papers/ or a YAML file;
fields of its run are set with key=value, for example

  jaxrl-reason reproduce ton --smoke
  jaxrl-reason reproduce ton --seeds 5 --jobs 2
"""

_PLAN = """\
What a run needs on some chips and how long its steps take at least, before they are paid for: every
program of every stage is compiled for them here, on a machine that has none of them. Names are
those of slices, such as v5e:8x8, v6e:4x8, v5p:2x4x4, 2*v5e:16x16 (two slices), or cpu:8. Fields are
set with key=value, for example

  jaxrl-reason plan configs/published/gsm8k.yaml mesh.fsdp=-1 mesh.data=1 --topology v5e:4x4
"""

_BENCH = """\
Time the standard workloads on this machine: W1 and W2, a step of GRPO with completions of equal and
of uneven length; W3, fine-tuning on packed documents; W4, sampling alone. Weights are random.
"""

_ROOM = "make room, and start the same command again"
_AFTER_ROOM = (
    "what was written before is kept, and the last complete checkpoint with it: make room, or let "
    "the folder be written to again, and the same command goes on from there"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    # Transformers would announce that PyTorch is missing, which is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    parser = _parser()
    # Overrides may stand on either side of an option, which argparse alone does not take.
    arguments, more = parser.parse_known_args(argv)
    strange = [word for word in more if word.startswith("-") or "=" not in word]
    if strange or (more and "overrides" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(strange or more)}")
    if more:
        arguments.overrides = [*arguments.overrides, *more]
    for name in ("arms", "stages"):  # lists of names, which take the overrides behind them too
        listed = getattr(arguments, name, [])
        taken = [word for word in listed if "=" in word]
        if taken:
            setattr(arguments, name, [word for word in listed if word not in taken])
            arguments.overrides = [*arguments.overrides, *taken]
    try:
        with _heeded() if arguments.command is _run else contextlib.nullcontext():
            code = arguments.command(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageError as error:
        goes_on = arguments.command in (_run, _reproduce)
        print(f"error: {error}; {_AFTER_ROOM if goes_on else _ROOM}", file=sys.stderr)
        return 1
    except Preemption as notice:
        print(f"SIGTERM: {notice}; the same command goes on from there")
        # An experiment is not done, which whoever started one of its seeds has to see.
        return 0 if arguments.command is _run else 143
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    return code or 0


@contextlib.contextmanager
def _heeded() -> Iterator[None]:
    """Within, SIGTERM raises `Preemption`, also while all else is being imported.

    `stages.preemption` and, in a run of several processes, JAX take it over from here.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def take(signum: int, frame: object) -> None:
        raise Preemption("nothing is lost")

    before = signal.signal(signal.SIGTERM, take)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(arguments: argparse.Namespace) -> int:
    from jaxrl_reason import launch, processes

    if arguments.local_processes is not None:
        words = ["run", arguments.config, *arguments.overrides]
        words += [] if arguments.profile is None else [f"--profile={arguments.profile}"]
        return launch.run_here(words, arguments.local_processes)
    if arguments.profile is not None:
        arguments.overrides.append(f"tracking.profile={arguments.profile}")
    processes.start()
    from rich.console import Console

    from jaxrl_reason.report import make_plots, stage_table, write_report
    from jaxrl_reason.stages.config import RunConfig
    from jaxrl_reason.stages.pareto import pareto_points
    from jaxrl_reason.stages.pipeline import run

    config = RunConfig.load(arguments.config, arguments.overrides)
    if arguments.profile is not None:
        _write_programs(Path(config.output_dir) / config.name / "programs" / processes.place())
    console = Console(soft_wrap=True, quiet=not processes.is_first())
    say = lambda line: console.print(line, highlight=False, markup=False)
    if processes.count() > 1:
        say(f"{processes.count()} processes with {processes.devices()} devices")
    rows = run(config, say=say)
    if not processes.is_first():
        return 0
    folder = Path(config.output_dir) / config.name
    if arguments.profile is not None:
        print(f"profile  {folder}/<stage>/profile and {folder}/programs")
    kinds = [(name, stage.kind) for name, stage in config.stages.items()]
    plots = make_plots(folder, kinds, pareto_points(config))
    console.print(stage_table(rows))
    print(f"summary  {folder / 'summary.json'}")
    last = [row["stage"] for row in rows if row["accuracy_ci95"] is not None][-1]
    print(f"samples  {folder / last / 'samples.jsonl'}")
    for plot in plots:
        print(f"plot     {plot}")
    print(f"report   {write_report(folder, plots=plots)}")
    return 0


def _write_programs(folder: Path) -> None:
    """Have the compiler write the optimised programs of this process; before it has any device.

    A folder of its own for each process, as they number the same programs the same way.
    """
    import jax

    flags = f"--xla_dump_to={folder.absolute()} --xla_dump_hlo_as_text"
    flags += " --xla_dump_hlo_module_re=jit_(step|sampling_.*|.*logprobs|sums|visual_features)"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    # What comes from the cache is not compiled, and so not written.
    jax.config.update("jax_enable_compilation_cache", False)


def _plan(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    if arguments.search is not None and arguments.search < 1:
        raise InputError(
            f"--search {arguments.search} must be 1 or more: the most choices that are compiled"
        )
    from jaxrl_reason.planner.topology import open_topology

    topology = open_topology(arguments.topology)  # before the configuration asks JAX for devices
    from jaxrl_reason.planner import tables
    from jaxrl_reason.planner.described import load_described
    from jaxrl_reason.planner.plan import EVALUATION, plan_stages
    from jaxrl_reason.stages.context import Context

    config = load_described(arguments.config, arguments.overrides)
    known = (*config.stages, EVALUATION)
    unknown = [name for name in arguments.stages if name not in known]
    if unknown:
        raise InputError(f"--stages {unknown[0]}: the run has {', '.join(known)}")
    wide = None if sys.stdout.isatty() else 120
    console = Console(soft_wrap=True, stderr=arguments.json == "-", width=wide)
    say = lambda line: console.print(line, highlight=False, markup=False)
    if arguments.search is not None:
        from jaxrl_reason.planner.search import search

        trials = search(
            arguments.config,
            arguments.overrides,
            topology,
            names=arguments.stages or None,
            most=arguments.search,
            say=say,
        )
        _write_plan(arguments.json, tables.search_json(trials, topology))
        console.print(tables.search_table(trials, topology))
        best = trials[0]
        say(f"{'best' if best.fits else 'nothing fits; nearest'}: {' '.join(best.overrides)}")
        return 0 if best.fits else 1
    context = Context.describe(config, topology.devices)
    stages = plan_stages(context, topology, names=arguments.stages or None, say=say)
    _write_plan(arguments.json, tables.as_json(stages, topology))
    chips, chip = len(topology.devices), topology.chip
    mesh = " x ".join(f"{axis} {size}" for axis, size in context.mesh.shape.items() if size > 1)
    say(f"\n{config.name} on {chips} x {chip.name} ({topology.name}), mesh {mesh or 'of one'}")
    for stage in stages:
        say(tables.headline(stage, topology))
        console.print(tables.program_table(stage))
    say("Memory of a chip, at the fullest moment of each stage")
    console.print(tables.memory_table(stages))
    say(tables.bill(stages, topology, arguments.price))
    for note in tables.notes(stages):
        say(note)
    return 0 if all(stage.memory <= chip.memory for stage in stages) else 1


def _write_plan(path: str | None, plan: dict[str, Any]) -> None:
    text = json.dumps(plan, indent=2, allow_nan=False) + "\n"
    if path == "-":
        print(text, end="")
    elif path is not None:
        _write_chosen(path, text)


def _write_chosen(path: str, text: str) -> None:
    """Write a file that was named on the command line, which may be a pipe."""
    from jaxrl_reason import files

    with files.chosen(path, "choose another file"):
        Path(path).write_text(text, encoding="utf-8")


def _joined() -> bool:
    """Join the other processes of the command, if there are any; whether this one speaks."""
    from jaxrl_reason import processes

    processes.start()
    return processes.is_first()


def _import(arguments: argparse.Namespace) -> None:
    speaks = _joined()
    from jaxrl_reason.config import apply_overrides, validate
    from jaxrl_reason.stages.config import RunConfig
    from jaxrl_reason.stages.pipeline import import_model

    folder = Path(arguments.directory)
    given = {
        "name": folder.name,
        "output_dir": str(folder.parent),
        "model": {"path": arguments.model},
        "max_prompt_length": 1024,
        "evaluation": {"max_completion_length": 1024},
    }
    raw = apply_overrides(RunConfig, given, arguments.overrides)
    say = print if speaks else lambda line: None
    stage = import_model(validate(RunConfig, raw, "import"), say=say)
    say(f"for example: jaxrl-reason sample {stage}")


def _export(arguments: argparse.Namespace) -> None:
    speaks = _joined()
    from jaxrl_reason.stages.load import export

    written = export(
        arguments.checkpoint,
        arguments.directory,
        adapter=arguments.adapter,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
    )
    if speaks:
        print(written)


def _evaluate(arguments: argparse.Namespace) -> None:
    speaks = _joined()
    from jaxrl_reason.config import apply_overrides, to_json, validate
    from jaxrl_reason.stages.config import EvaluationConfig
    from jaxrl_reason.stages.evaluate import evaluate, write_samples
    from jaxrl_reason.stages.load import load

    loaded = load(arguments.checkpoint)
    given = to_json(loaded.context.config.evaluation)
    raw = apply_overrides(EvaluationConfig, given, arguments.overrides)
    config = validate(EvaluationConfig, raw, "evaluation")
    result, rows = evaluate(loaded.context, loaded.params, config)
    if not speaks:
        return
    if arguments.samples is not None:
        write_samples(arguments.samples, rows)
    print(json.dumps({"checkpoint": arguments.checkpoint, **result}, indent=2))


def _sample(arguments: argparse.Namespace) -> None:
    speaks = _joined()
    from jaxrl_reason import processes
    from jaxrl_reason.config import apply_overrides, validate
    from jaxrl_reason.stages.load import load
    from jaxrl_reason.stages.sample import Prompt, SampleConfig, complete, read_prompts

    loaded = load(arguments.checkpoint)
    default = {"max_completion_length": loaded.context.config.evaluation.max_completion_length}
    raw = apply_overrides(SampleConfig, default, arguments.overrides)
    config = validate(SampleConfig, raw, "sample")
    if arguments.file is not None:
        for row in complete(loaded, read_prompts(arguments.file), config):
            if speaks:
                print(json.dumps(row, ensure_ascii=False))
        return
    if processes.count() > 1:
        raise InputError(
            f"sample asks at one terminal, and this is one of {processes.count()} processes; give "
            "them all the same --file"
        )
    example = loaded.context.task.generate("test", 0).prompt
    print(f"Type a prompt, for example:  {example}\nAn empty line or Ctrl-D ends.")
    number = 0
    while (prompt := _ask("> ")) != "":
        try:
            growing = _print_growing if config.num_generations == 1 else None
            typed = [Prompt(prompt, "prompt")]
            for row in complete(loaded, typed, config, first=number, on_text=growing):
                mark = "\r" if growing else ""
                print(f"{mark}{row['completion']}   [{row['length']} tokens]")
            number += 1
        except InputError as error:
            print(f"error: {error}")


def _print_growing(text: str) -> None:
    """The completion so far, written over what was there before."""
    if sys.stdout.isatty() and "\n" not in text:
        print(f"\r{text}", end="", flush=True)


def _ask(mark: str) -> str:
    try:
        return input(mark).strip()
    except EOFError:
        return ""


def _lineage(arguments: argparse.Namespace) -> None:
    from jaxrl_reason.stages.load import lineage

    for meta in lineage(arguments.checkpoint):
        if arguments.json:
            print(json.dumps(meta))
            continue
        if "error" in meta:
            print(f"{meta['path']}: {meta['error']}")
            continue
        line = f"{meta['stage']:<16} {meta['kind']:<5} step {meta['step']:<6} hash {meta['hash']}"
        if "data_hash" in meta:
            line += f"  data {meta['data_hash']}"
        print(f"{line}  seed {meta['seed']}  version {meta['code_version']}")


def _report(arguments: argparse.Namespace) -> None:
    from jaxrl_reason.report import write_report

    print(write_report(arguments.folder, examples=arguments.examples, out=arguments.out))


def _reproduce(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from jaxrl_reason.reproduce import Options, reproduce

    # Behind --arms stand names, and overrides are seen by what they are.
    arms = [word for word in arguments.arms if "=" not in word]
    overrides = [*arguments.overrides, *(word for word in arguments.arms if "=" in word)]
    options = Options(
        name=arguments.name,
        scale=arguments.scale,
        seeds=arguments.seeds,
        arms=tuple(arms),
        jobs=arguments.jobs,
        smoke=arguments.smoke,
        output_dir=Path(arguments.output_dir),
        results_dir=Path(arguments.results_dir),
        discard=arguments.discard,
        only_seed=arguments.only_seed,
        overrides=tuple(overrides),
    )
    console = Console(soft_wrap=True)
    outcome = reproduce(
        options, say=lambda line: console.print(line, highlight=False, markup=False)
    )
    if arguments.only_seed is not None:
        return 0
    from jaxrl_reason.report.verdicts import verdict_table
    from jaxrl_reason.reproduce.terminal import verdict_lines

    table = verdict_table(verdict_lines(outcome.experiment, outcome.verdicts))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for path in outcome.written:
        print(f"{path.suffix.removeprefix('.'):<5}{path}")
    for failure in outcome.failures:
        print(f"seed {failure.seed} failed: {failure.message}", file=sys.stderr)
    return outcome.exit_code


def _bench(arguments: argparse.Namespace) -> None:
    from jaxrl_reason.bench.run import bench, default_shapes, serve_worker, table
    from jaxrl_reason.bench.workloads import SHAPES, WORKLOADS

    if arguments.worker:
        serve_worker()
        return
    shapes = arguments.shapes or default_shapes()
    for given, known in ((arguments.workloads, WORKLOADS), (shapes, SHAPES)):
        strange = [name for name in given if name not in known]
        if strange:
            raise InputError(f"{', '.join(strange)} is none of {', '.join(known)}")
    result = bench(
        arguments.workloads,
        shapes,
        repeats=arguments.repeats,
        changes=arguments.changes,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    if arguments.out is not None:
        _write_chosen(arguments.out, json.dumps(result, indent=1) + "\n")
    print(table(result))


def _fields(name: str) -> str:
    """The fields of a configuration with type, default and meaning, for `--help`."""
    from jaxrl_reason.config import describe
    from jaxrl_reason.stages import config, sample

    classes = {
        "run": config.RunConfig,
        "plan": config.RunConfig,
        "import": config.RunConfig,
        "evaluate": config.EvaluationConfig,
        "sample": sample.SampleConfig,
    }
    lines = ["fields (key=value), with their defaults:"]
    before = ""
    for field in describe(classes[name]):
        kind, _, nested = field.kind.partition("/")
        if kind and kind != before:
            lines.append(f"\n  of a stage of kind {kind}:")
        before = kind
        member = nested.rpartition("/")[2]
        of_other = nested and not field.path.endswith(".kind")
        only = f" if {field.path.rpartition('.')[0]}.kind is {member};" if of_other else ""
        lines.append(f"  {field.path}  ({field.type};{only} {field.default})")
        if field.help:
            lines.append(f"      {field.help}")
    return "\n".join(lines)


class _Help(argparse.Action):
    """`--help` with the fields of the command's configuration, read only when it is asked for."""

    def __init__(self, option_strings, dest, **_):
        super().__init__(option_strings, dest, nargs=0, help="show this help and all fields")

    def __call__(self, parser, namespace, values, option_string=None):
        parser.print_help()
        name = parser.prog.split()[-1]
        if name in ("run", "plan", "import", "evaluate", "sample"):
            print("\n" + _fields(name))
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxrl-reason", description="Turn base models into reasoning models, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"jaxrl-reason {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command, text: str, short: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=short,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
        )
        sub.add_argument("-h", "--help", action=_Help)
        sub.set_defaults(command=command)
        return sub

    run = add("run", _run, _RUN, "train the stages of a configuration")
    run.add_argument("config", help="YAML file")
    run.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    run.add_argument(
        "--profile", metavar="A:B", help="trace these steps of each stage, such as 10:12"
    )
    run.add_argument(
        "--local-processes", type=int, metavar="N", help="as N processes, like hosts of a pod"
    )
    plan = add("plan", _plan, _PLAN, "what a run needs, before any chip is paid for")
    plan.add_argument("config", help="YAML file")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    plan.add_argument("--topology", required=True, metavar="NAME", help="such as v5e:8x8 or cpu:8")
    plan.add_argument("--stages", nargs="+", default=[], metavar="STAGE", help="only these")
    plan.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=12,
        metavar="N",
        help="try up to N (12) choices of mesh, remat policy, microbatches and completions sampled "
        "at once, and say which are best; the rows of a step stay as they are",
    )
    plan.add_argument("--price", type=float, help="of an hour of a chip: also say what it costs")
    plan.add_argument(
        "--json",
        metavar="FILE",
        help="write the plan, or what a search has tried, here; - for standard output",
    )
    importer = add("import", _import, _IMPORT, "make a run of a published model")
    importer.add_argument("model", help="directory or hub id in Hugging Face's format")
    importer.add_argument("directory", help="folder to be made, such as runs/qwen3")
    importer.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    export = add("export", _export, _EXPORT, "write a checkpoint for transformers")
    export.add_argument("checkpoint", help="folder of a stage or of one of its checkpoints")
    export.add_argument("directory", help="to be made")
    export.add_argument("--adapter", action="store_true", help="the adapter alone, for PEFT")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the tensors")
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a file")
    evaluate = add("evaluate", _evaluate, _EVALUATE, "accuracy on held-out problems")
    evaluate.add_argument("checkpoint", help="folder of a stage or of one of its checkpoints")
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    evaluate.add_argument("--samples", metavar="FILE", help="write the completions here as JSONL")
    sample = add("sample", _sample, _SAMPLE, "complete prompts")
    sample.add_argument("checkpoint", help="folder of a stage or of one of its checkpoints")
    sample.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change")
    sample.add_argument("--file", metavar="FILE", help="prompts: lines of text, or JSONL")
    lineage = add("lineage", _lineage, _LINEAGE, "where a checkpoint comes from")
    lineage.add_argument("checkpoint", help="folder of a stage or of one of its checkpoints")
    lineage.add_argument("--json", action="store_true", help="one JSON object an ancestor")
    report = add("report", _report, _REPORT, "results and completions as a page")
    report.add_argument("folder", help="of a run, or of a stage in it")
    report.add_argument("--examples", type=int, default=12, metavar="N", help="problems to show")
    report.add_argument("--out", metavar="FILE", help="page to be written, in place of report.html")
    reproduce = add("reproduce", _reproduce, _REPRODUCE, "claims of a paper over several seeds")
    reproduce.add_argument("name", metavar="NAME", help="experiment, or YAML file")
    reproduce.add_argument("overrides", nargs="*", metavar="key=value", help="fields of its run")
    reproduce.add_argument("--scale", choices=["small", "video", "full"], help="small unless given")
    reproduce.add_argument("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N - 1")
    reproduce.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="only these")
    reproduce.add_argument("--jobs", type=int, default=1, metavar="N", help="seeds at once")
    reproduce.add_argument("--smoke", action="store_true", help="two steps a stage: does it run?")
    folders = {"--output-dir": "runs/reproduce", "--results-dir": "docs/papers"}
    for option, default in folders.items():
        reproduce.add_argument(option, default=default, metavar="FOLDER", help=default)
    reproduce.add_argument(
        "--discard", action="store_true", help="move results of another configuration away"
    )
    reproduce.add_argument("--only-seed", type=int, help=argparse.SUPPRESS)
    bench = add("bench", _bench, _BENCH, "time the standard workloads")
    standard = ["W1", "W2", "W3", "W4"]
    bench.add_argument("--workloads", nargs="+", default=standard, metavar="NAME")
    bench.add_argument("--shapes", nargs="+", metavar="NAME", help="tiny, small, 1b")
    bench.add_argument("--repeats", type=int, default=5)
    bench.add_argument("--out", metavar="FILE", help="write every repeat as JSON")
    bench.add_argument(
        "--changes", type=json.loads, default={}, metavar="JSON", help="fields of the workloads"
    )
    bench.add_argument("--worker", action="store_true", help="serve scripts/bench/compare.py")
    return parser


if __name__ == "__main__":
    sys.exit(main())
