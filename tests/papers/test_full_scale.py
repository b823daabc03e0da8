"""The published recipes run: two steps of every stage, of a random model of the same architecture.

Of a recipe only sizes are changed, and the builders that look for right answers, which a random
model does not write. Data sets of the hub and files are replaced by rows with their columns.
"""

import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.data.sources import read_source
from jaxrl_reason.planner.described import load_described

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "papers").glob("*/full.yaml"))
PODS = sorted((Path(__file__).parents[2] / "configs" / "pods").glob("*.yaml"))
FAMILIES = {
    "Qwen/Qwen2.5-3B": "qwen2",
    "Qwen/Qwen2.5-VL-3B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
    "Qwen/Qwen3-VL-4B-Instruct": "qwen3_vl",
}
FAMILIES_OF_PODS = {
    "Qwen/Qwen2.5-7B": "qwen2",
    "Qwen/Qwen3-8B-Base": "qwen3",
    "Qwen/Qwen3-32B": "qwen3",
    "Qwen/Qwen3-30B-A3B-Base": "qwen3_moe",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2_5_vl",
}
ROWS = 24
LONGEST = {"factum": 1280, "warmup_kk": 1536}
"""Tokens of a row, which are bytes here; 640 where a recipe is not named."""


def picture(number: int) -> PIL.Image.Image:
    """An image of its own for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


# Columns as the data cards have them.
HUB = {
    "leonardPKU/clevr_cogen_a_train": lambda i: {
        "image": picture(i),
        "problem": "How many items are there in the image?",
        "solution": f"<answer> {i % 10} </answer>",
    },
    "WaltonFuture/Multimodal-RL-Data": lambda i: {
        "images": [picture(i)],
        "problem": f"Find x if x + {i} = 30.",
        "answer": str(30 - i),
    },
    "WaltonFuture/Multimodal-Cold-Start": lambda i: {
        "images": [picture(i)],
        "problem": f"Find x if x + {i} = 40.",
        "answer": f"Step 1: subtract. The answer is \\boxed{{{40 - i}}}.",
    },
    "agentica-org/DeepScaleR-Preview-Dataset": lambda i: {
        "problem": f"What is {i} + 6?",
        "answer": str(i + 6),
        "solution": "Add 6.",
    },
    "open-r1/OpenR1-Math-220k": lambda i: {
        "problem": f"What is {i} + 7?",
        "solution": f"Add 7, which gives \\boxed{{{i + 7}}}.",
        "answer": str(i + 7),
    },
    "hiyouga/geometry3k": lambda i: {
        "images": [picture(i)],
        "problem": f"Find x if x + {i} = 50.",
        "answer": str(50 - i),
    },
    "DigitalLearningGmbH/MATH-lighteval": lambda i: {
        "problem": f"What is {i} + 1?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": f"It is $\\boxed{{{i + 1}}}$.",
    },
    "HuggingFaceH4/MATH-500": lambda i: {
        "problem": f"What is {i} + 2?",
        "solution": f"It is $\\boxed{{{i + 2}}}$.",
        "answer": str(i + 2),
        "subject": "Algebra",
        "level": 1,
        "unique_id": f"test/algebra/{i}.json",
    },
    "TIGER-Lab/MMLU-Pro": lambda i: {
        "question_id": i,
        "question": f"Which number is {i}?",
        "options": [str(i), str(i + 1)],
        "answer": "A",
        "answer_index": 0,
        "category": "physics",
    },
}
FACTS = "<facts>\n[time] 0-2 [object] ball\n</facts>"
FILES = {
    "data/metis_specs/train.parquet": lambda i: {
        "prompt": f"What is {i} + 3?",
        "images": [picture(i)],
        "answer": str(i + 3),
    },
    "data/vision_r1/rl.parquet": lambda i: {
        "prompt": f"What is {i} + 4?",
        "images": [picture(i)],
        "answer": str(i + 4),
    },
    "data/vision_r1/cold.jsonl": lambda i: {
        "prompt": f"What is {i} + 5?",
        "images": ["picture.png"],
        "completion": f"<think> {i} + 5 </think><answer> {i + 5} </answer>",
    },
    "data/factum/facts.jsonl": lambda i: {
        "prompt": f"What happens in film {i}?",
        "videos": ["film.gif"],
        "completion": FACTS,
    },
    "data/factum/layout.jsonl": lambda i: {
        "prompt": f"When is event {i}?",
        "videos": ["film.gif"],
        "completion": f"{FACTS}<think> short </think><answer> 0 2 </answer>",
    },
    "data/factum/thinking.jsonl": lambda i: {
        "prompt": f"When is event {i}?",
        "videos": ["film.gif"],
        "completion": f"{FACTS}<think> the ball is first </think><answer> 0 2 </answer>",
    },
    "data/factum/rl.jsonl": lambda i: {
        "prompt": f"When is event {i}?",
        "videos": ["film.gif"],
        "answer": "0 2" if i % 2 else "A",
    },
}
# A random model writes nothing that these keep.
BUILDERS = {
    "jaxrl_reason.papers.metis_specs:format_pairs": "any_rows:rows_and_pairs",
    "jaxrl_reason.papers.rl_cold_start:sampled_rows": "any_rows:rows",
    "jaxrl_reason.papers.ton:reverse_thinking": "any_rows:rows",
}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A working directory with the files, and a hub with the data sets."""
    for name, row in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row(i) for i in range(ROWS)]
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    picture(0).save(tmp_path / "data/vision_r1/picture.png")
    first, *others = [picture(i) for i in range(4)]
    film = tmp_path / "data/factum/film.gif"
    first.save(film, save_all=True, append_images=others, duration=500)

    def load_dataset(name, subset=None, *, split):
        start = re.search(r"\[(\d+):", split)  # another part of the data set has other rows
        first = 0 if start is None else int(start[1])
        return datasets.Dataset.from_list([HUB[name](first + i) for i in range(ROWS)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(directories, tmp_path):
    """Copies the tiny model of a family, with room for long texts."""

    def copy(name: str) -> str:
        family = (FAMILIES | FAMILIES_OF_PODS)[name]
        folder = Path(shutil.copytree(directories[family], tmp_path / "model"))
        path = folder / "config.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        found.get("text_config", found)["max_position_embeddings"] = 4096
        path.write_text(json.dumps(found), encoding="utf-8")
        return str(folder)

    return copy


def cut(run: dict) -> None:
    """Make the sizes of a run small, in place; `--smoke` does the rest."""
    longest = LONGEST.get(run["name"], 640)
    run["max_prompt_length"] = min(run["max_prompt_length"], longest - 64)
    if "max_visual_tokens" in run:
        run["max_visual_tokens"] = 64
    run["evaluation"]["max_completion_length"] = 16
    for task in (run["task"], *run.get("tasks", {}).values()):
        if task["name"] == "dataset" and "test_source" not in task["options"]:
            task["options"]["test_fraction"] = 0.5
        if task["name"] == "knights_knaves":
            task["options"] = {"min_people": 2, "max_people": 2}
    for stage in run["stages"].values():
        for name, most in {
            "max_completion_length": 16,
            "max_length": longest,
            "batch_size": 8,
            "gradient_accumulation_steps": 1,
            "num_generations": 2,
            "max_num_seqs": 16,
            "reward_workers": 1,
        }.items():
            if name in stage:
                stage[name] = min(stage[name], most)
        stage.pop("precompile", None)
        problems = stage.get("problems", {})
        if "pool" in problems:
            problems["pool"] = min(problems["pool"], 16)
        if stage.get("builder") in BUILDERS:
            stage["builder"], stage["options"] = BUILDERS[stage["builder"]], {}


def test_every_recipe_is_tested():
    assert len(CONFIGS) == 6
    models = {yaml.safe_load(path.read_text())["run"]["model"]["path"] for path in CONFIGS}
    assert models == FAMILIES.keys()
    models = {yaml.safe_load(path.read_text())["model"]["path"] for path in PODS}
    assert models == FAMILIES_OF_PODS.keys()


def test_the_rows_are_read_as_those_of_the_recipes(data):
    (first, *_) = read_source("WaltonFuture/Multimodal-RL-Data", "train")
    assert first.row.keys() == {"images", "problem", "answer"}


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_two_steps_of_every_stage(data, model, path, capsys):
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    raw = json.loads(json.dumps(raw))  # what anchors share is cut once for each stage
    cut(raw["run"])
    raw["run"]["model"]["path"] = model(raw["run"]["model"]["path"])
    small = data / "full.yaml"
    small.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    folders = [f"--output-dir={data / 'runs'}", f"--results-dir={data / 'papers'}"]
    code = main(["reproduce", str(small), "--smoke", *folders])
    said = capsys.readouterr()
    assert code == 0, said.out[-3000:] + said.err[-3000:]
    name = raw["run"]["name"]
    results = data / "runs" / ".smoke" / "results" / name / "full.json"
    stages = json.loads(results.read_text(encoding="utf-8"))["seeds"]["0"]["stages"]
    for stage, config in raw["run"]["stages"].items():
        assert stage in stages
        if config["kind"] == "reject":
            continue
        folder = data / "runs" / ".smoke" / name / "full" / "seed_0" / stage
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        assert [row["step"] for row in metrics] == [1, 2]
        assert all(np.isfinite(row["loss"]) and row["nonfinite_steps"] == 0 for row in metrics)


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_the_file_of_a_pod_is_right_as_it_is(path):
    assert load_described(str(path), []).mesh.fsdp == -1


@pytest.mark.slow
@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_two_steps_of_every_stage_of_a_pod(data, model, path, capsys):
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    cut(run)
    run["model"]["path"] = model(run["model"]["path"])
    for axis, most in {"expert": 4, "tensor": 2}.items():  # experts and heads of the small models
        run["mesh"][axis] = min(run["mesh"].get(axis, 1), most)
    run["evaluation"] |= {"problems": 8, "batch_size": 8}
    for stage in run["stages"].values():
        stage |= {"steps": 2, "save_steps": 2}
        if stage["kind"] == "grpo":
            stage["prompts_per_step"] = 8
        if stage["kind"] == "dpo":
            # A random model writes nothing that verifiers tell apart.
            row = lambda i: {"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}
            rows = "".join(json.dumps(row(i)) + "\n" for i in range(ROWS))
            (data / "pairs.jsonl").write_text(rows, encoding="utf-8")
            stage["data"] = {"kind": "file", "path": "pairs.jsonl"}
    small = data / "pod.yaml"
    small.write_text(yaml.safe_dump(run, sort_keys=False), encoding="utf-8")
    code = main(["run", str(small), f"output_dir={data / 'runs'}"])
    said = capsys.readouterr()
    assert code == 0, said.out[-3000:] + said.err[-3000:]
    for stage in run["stages"]:
        log = data / "runs" / run["name"] / stage / "metrics.jsonl"
        metrics = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in metrics] == [1, 2]
        assert all(np.isfinite(row["loss"]) and row["nonfinite_steps"] == 0 for row in metrics)
