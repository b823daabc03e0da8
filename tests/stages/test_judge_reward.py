"""Judges as rewards of a run: a function, a server and a checkpoint; what is refused."""

import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml

from jaxrl_reason.cli import main
from jaxrl_reason.config import apply_overrides, to_json, validate
from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards import Rubric
from jaxrl_reason.sampling import SamplingConfig
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.judge import reward_functions
from jaxrl_reason.stages.load import load
from jaxrl_reason.stages.pipeline import import_model
from jaxrl_reason.stages.policy_config import GRPOConfig
from jaxrl_reason.stages.reward_config import CheckpointJudge
from jaxrl_reason.stages.sample import Prompt, SampleConfig, complete

STEPS = 2
JUDGES = '''
"""A judge of tests, and a reward that is the same."""

asked = []


def worth(completion):
    return 1 + min(completion.count("1"), 4)


def reply(prompts):
    asked.append(prompts)
    return [f"score: {worth(prompt.partition('RATE ')[2])}" for prompt in prompts]


async def late(prompts):
    return reply(prompts)


def same(prompts, completions, **_):
    return [(worth(text) - 1) / 4 for text in completions]


def not_a_list(prompts):
    return "score: 3"
'''
SAME = {"kind": "python", "name": "same", "function": "judges_of_tests:same", "weight": 0.5}
PYTHON = {"kind": "python", "function": "judges_of_tests:reply"}
SERVER = {"kind": "openai", "url": "http://127.0.0.1:1/v1", "model": "m"}


def judge(name: str, backend: dict, **options) -> dict:
    return {
        "kind": "judge",
        "name": name,
        "prompt": "RATE {completion}",
        "backend": backend,
    } | options


def stage(*rewards: dict, **options) -> dict:
    return {
        "kind": "grpo",
        "steps": STEPS,
        "prompts_per_step": 8,
        "num_generations": 2,
        "max_completion_length": 12,
        "optimizer": {"learning_rate": 1e-3},
        "rewards": list(rewards),
    } | options


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Iterator:
    """The module with the functions above."""
    folder = tmp_path_factory.mktemp("judges")
    (folder / "judges_of_tests.py").write_text(JUDGES, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import judges_of_tests  # pyright: ignore[reportMissingImports]

        yield judges_of_tests
    sys.modules.pop("judges_of_tests")


class Served(NamedTuple):
    url: str
    prompts: list[str]
    """What was asked."""


@pytest.fixture(scope="module")
def server(judges) -> Iterator[Served]:
    """A server that judges as the function does."""
    prompts: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts.append(body["messages"][0]["content"])
            text = f"score: {judges.worth(prompts[-1].partition('RATE ')[2])}"
            content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with (
        pytest.MonkeyPatch.context() as patch,
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http,
    ):
        patch.setenv("no_proxy", "127.0.0.1")
        thread = threading.Thread(target=http.serve_forever, args=(0.02,))
        thread.start()
        yield Served(f"http://127.0.0.1:{http.server_port}/v1", prompts)
        http.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A checkpoint with random weights."""
    given = {"name": "judge", "output_dir": str(tmp_path_factory.mktemp("runs")), "seed": 3}
    config = validate(RunConfig, tiny | given | {"stages": {}}, "test")
    return import_model(config, say=lambda line: None)


class Finished(NamedTuple):
    directory: Path
    metrics: dict[str, list[dict]]
    """Of each stage, by step."""
    samples: dict[str, list[dict]]
    asked: list[str]
    """What the function was asked."""
    served: list[str]
    """What the server was asked."""


DIGITS = {"prompt": "{completion}", "pattern": r"(\d)", "scale": [0, 2]}


@pytest.fixture(scope="module")
def finished(tiny, judges, server, model, tmp_path_factory) -> Finished:
    """A run with all kinds of judges."""
    folder = tmp_path_factory.mktemp("judged")
    own = {"kind": "checkpoint", "path": str(model), "max_completion_length": 6, "batch_size": 8}
    both = [{**SAME}, judge("asked", PYTHON)]
    stages = {
        "function": stage(*both, max_completion_length=11),
        "server": stage(SAME, judge("served", SERVER | {"url": server.url}), reward_workers=1),
        "model": stage({"kind": "accuracy"}, judge("modelled", own, **DIGITS)),
    }
    evaluation = tiny["evaluation"] | {"problems": 16}
    raw = tiny | {"name": "judged", "output_dir": str(folder), "stages": stages}
    path = folder / "judged.yaml"
    path.write_text(yaml.safe_dump(raw | {"evaluation": evaluation}))
    assert main(["run", str(path)]) == 0
    directory = folder / "judged"
    lines = lambda name, file: map(json.loads, (directory / name / file).read_text().splitlines())
    return Finished(
        directory,
        {name: list(lines(name, "metrics.jsonl")) for name in stages},
        {name: list(lines(name, "samples.jsonl")) for name in ("init", *stages)},
        [prompt for call in judges.asked for prompt in call],
        list(server.prompts),
    )


@pytest.mark.parametrize(("name", "reward"), [("function", "asked"), ("server", "served")])
def test_a_judge_rewards_as_a_function_that_is_the_same(finished, name, reward):
    rows = finished.metrics[name]
    assert len(rows) == STEPS
    for row in rows:
        for statistic in ("mean", "std"):
            same = row[f"rewards/same/{statistic}"]
            assert row[f"rewards/{reward}/{statistic}"] == pytest.approx(same, abs=1e-6)
        assert row["reward"] == pytest.approx(1.5 * row["rewards/same/mean"], abs=1e-6)
    assert any(row["rewards/same/std"] > 0 for row in rows)


def test_evaluation_has_the_scores_too(finished, judges):
    for rows in finished.samples.values():
        for row in rows:
            worth = (judges.worth(row["completion"]) - 1) / 4
            assert row["rewards"]["asked"] == row["rewards"]["served"] == worth


def test_nothing_is_asked_twice(finished):
    assert len(set(finished.asked)) == len(finished.asked) > 16
    *_, ping = sorted(finished.served, key=lambda prompt: prompt.startswith("Reply with"))
    assert ping == "Reply with the word: ready"
    assert finished.served[0] == ping  # before anything else
    assert len(set(finished.served)) == len(finished.served) > 16


def replies_of(path: Path, texts: list[str], length: int) -> list[str]:
    config = SampleConfig(
        sampling=SamplingConfig(temperature=0.0), max_completion_length=length, batch_size=8
    )
    prompts = [Prompt(text, "test") for text in texts]
    return [row["completion"] for row in complete(load(path), prompts, config)]


def test_a_checkpoint_judges_with_its_most_likely_reply(finished, model):
    rubric = Rubric(**DIGITS)
    reserved = re.compile("<user>|<assistant>|<eos>|<pad>|<unk>")
    rows = [row for rows in finished.samples.values() for row in rows]
    texts = [row["completion"] for row in rows]
    plain = [text for text in texts if not reserved.search(text)]
    known = dict(zip(plain, replies_of(model, plain, 6), strict=True))
    expected = [rubric.read(known[text]) if text in known else None for text in texts]
    assert [row["rewards"]["modelled"] for row in rows] == expected
    assert len({value for value in expected if value is not None}) > 1
    assert None in expected
    for row in finished.metrics["model"]:
        assert 0 <= row["rewards/modelled/mean"] <= 1
    assert any(row["rewards/modelled/std"] > 0 for row in finished.metrics["model"])


# At the start


def configured(tiny, folder, *rewards, **options) -> RunConfig:
    raw = tiny | {"output_dir": str(folder), "stages": {"s": stage(*rewards, **options)}}
    return validate(RunConfig, raw, "test")


def functions(config: RunConfig):
    (made,) = config.stages.values()
    return reward_functions(made.rewards, max_completion_length=12)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (SERVER, r"127.0.0.1:1/v1/chat/completions: .*refused.* \(1 try\); is the server up"),
        (SERVER | {"api_key_env": "NO_KEY_OF_TESTS"}, "there is no such environment variable"),
        ({"kind": "checkpoint", "path": "no/such/run"}, "no checkpoint at .*no/such/run"),
        (PYTHON | {"function": "judges_of_tests:repl"}, "no function 'repl'; did you mean 'reply'"),
        (PYTHON | {"function": "no_module_of_tests:f"}, "ModuleNotFoundError on import"),
    ],
    ids=["url", "key", "checkpoint", "function", "module"],
)
def test_a_judge_that_cannot_be_asked_ends_the_run_before_it_trains(
    tiny, judges, tmp_path, monkeypatch, capsys, backend, message
):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    path = tmp_path / "run.yaml"
    stages = {"s": stage(judge("supports", backend))}
    path.write_text(yaml.safe_dump(tiny | {"output_dir": str(tmp_path), "stages": stages}))
    assert main(["run", str(path)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert [file.name for file in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("rate {completion}", "cannot read its prompt: the word 'rate' is not in the tokenizer's"),
        ("1 " * 20 + "{completion}", "cannot read its prompt: it has .* max_prompt_length=20 of"),
    ],
)
def test_a_template_that_a_checkpoint_cannot_read_is_refused(tiny, model, prompt, message):
    backend = {"kind": "checkpoint", "path": str(model)}
    config = configured(tiny, "runs", judge("supports", backend, prompt=prompt))
    with pytest.raises(InputError, match=message):
        functions(config)


def test_a_checkpoint_is_on_the_devices_once(tiny, model):
    from jaxrl_reason.stages.judge_model import judge_model

    config = CheckpointJudge(kind="checkpoint", path=str(model), max_completion_length=4)
    one, two = judge_model(config), judge_model(config)
    assert one is two
    assert judge_model(config.model_copy(update={"max_completion_length": 5})) is not one


def test_a_completion_that_the_checkpoint_cannot_read_has_no_reward(tiny, model):
    backend = {"kind": "checkpoint", "path": str(model), "max_completion_length": 6}
    config = configured(tiny, "runs", judge("digits", backend, **DIGITS))
    reward = functions(config)["digits"]
    # Too long, with a marker of a turn, with a word that is not in the vocabulary.
    given = ["1 + 2", "1 " * 40, "1 <assistant> 2", "1 elephant", "2"]
    (first, last) = replies_of(model, ["1 + 2", "2"], 6)
    read = Rubric(**DIGITS).read
    assert reward([""] * 5, given) == [read(first), None, None, None, read(last)]
    assert reward([""], ["1 elephant"]) == [None]


def test_a_reply_of_the_wrong_type_names_the_reward(tiny, judges):
    backend = PYTHON | {"function": "judges_of_tests:not_a_list"}
    reward = functions(configured(tiny, "runs", judge("supports", backend)))["supports"]
    with pytest.raises(InputError, match="the judge returned str: 'score: 3'; return a list"):
        reward(["p"], ["c"])


# What is refused, and what is not

CHECKPOINT = {"kind": "checkpoint", "path": "runs/judge/tuned"}
DYNAMIC = {"dynamic_sampling": {"max_batches": 2}}


@pytest.mark.parametrize(
    ("reward", "options", "message"),
    [
        (judge("j", CHECKPOINT), {"reward_workers": 1}, "reward_workers=1 cannot be beside reward"),
        (judge("j", CHECKPOINT), {"max_staleness": 1}, "with reward_workers=0 these rewards are"),
        (judge("j", CHECKPOINT), DYNAMIC, "reward 'j' has scope=batch"),
        (judge("j", PYTHON), DYNAMIC, "reward 'j' has scope=batch"),
        (judge("j", CHECKPOINT, samples=2), {}, "samples=2 cannot act with backend.kind=checkpo"),
        (judge("j", SERVER, samples=2), {}, "samples=2 cannot act with backend.temperature=0"),
        (judge("j", SERVER, samples=0), {}, "samples: got 0; needs int > 0"),
        (judge("j", SERVER, otherwise=0.0), {}, "otherwise=0 cannot act with when=all"),
        (judge("j", SERVER, scale=[5, 1]), {}, r"scale=\[5.0, 1.0\] must be two numbers, the l"),
        (judge("j", SERVER, scale=[1]), {}, "scale"),
        (judge("j", SERVER, prompt="rate it"), {}, "put {completion} into it"),
        (judge("j", SERVER, pattern="score"), {}, "has 0 groups"),
        (judge("j", SERVER, when="right"), {}, 'when: got "right"; needs "all" | "formatted"'),
        (judge("j", SERVER | {"url": "host:80"}), {}, "url='host:80' must be an address"),
        (judge("j", SERVER | {"urll": "x"}), {}, "backend.urll: unknown key; did you mean 'url'"),
        (judge("j", {"kind": "openaj"}), {}, "did you mean 'openai'"),
        (judge("j", {"kind": "openai", "model": "m"}), {}, "backend.url: required but missing"),
        (judge("accuracy", SERVER), {}, r"rewards have the names \['accuracy', 'accuracy'\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_act_or_be_is_refused(tiny, reward, options, message):
    with pytest.raises(InputError, match=message):
        configured(tiny, "runs", {"kind": "accuracy"}, reward, **options)


@pytest.mark.parametrize(
    ("reward", "options"),
    [
        (judge("j", SERVER), {"reward_workers": 2, **DYNAMIC}),
        (judge("j", SERVER), {"max_staleness": 1}),
        (judge("j", SERVER | {"temperature": 0.7}, samples=3), {}),
        (judge("j", SERVER | {"extra_body": {"top_k": 1}, "max_tokens": None}), {}),
        (judge("j", PYTHON | {"scope": "group"}, samples=2), {"max_staleness": 1}),
        (judge("j", PYTHON | {"scope": "completion"}), DYNAMIC),
        (judge("j", CHECKPOINT, when="correct", otherwise=0.0), {}),
    ],
)
def test_what_can_act_is_accepted_and_comes_back_from_json(tiny, reward, options):
    config = configured(tiny, "runs", {"kind": "accuracy"}, reward, **options)
    again = validate(RunConfig, json.loads(json.dumps(to_json(config))), "json")
    assert again == config
    made = config.stages["s"]
    assert isinstance(made, GRPOConfig)
    assert made.rewards[1].rubric.prompt == "RATE {completion}"


def test_an_option_of_a_backend_may_be_set_on_the_command_line(tiny):
    raw = tiny | {"stages": {"s": stage(judge("j", SERVER))}}
    raw = apply_overrides(RunConfig, raw, ["stages.s.rewards.0.backend.max_tokens=9"])
    (reward,) = validate(RunConfig, raw, "test").stages["s"].rewards
    assert reward.backend.max_tokens == 9
    assert reward.backend.retries == 4


@pytest.mark.parametrize("scope", ["batch", "group", "completion"])
def test_an_async_judge_is_an_async_reward(tiny, judges, scope):
    import inspect

    backend = PYTHON | {"function": "judges_of_tests:late", "scope": scope}
    reward = functions(configured(tiny, "runs", judge("supports", backend)))["supports"]
    assert inspect.iscoroutinefunction(reward)
    plain = functions(configured(tiny, "runs", judge("supports", PYTHON)))["supports"]
    assert not inspect.iscoroutinefunction(plain)
    assert plain([""] * 2, ["1 1", "1 1 1"]) == [0.5, 0.75]


def test_rewards_of_equal_judges_share_what_was_replied(tiny, judges):
    """A judge of the same backend, in another stage or with another scale."""
    before = len(judges.asked)
    one = functions(configured(tiny, "runs", judge("one", PYTHON)))["one"]
    two = functions(configured(tiny, "runs", judge("two", PYTHON, scale=[0, 10])))["two"]
    assert one([""], ["1 1 0 0 1"]) == [0.75]
    assert two([""], ["1 1 0 0 1"]) == [np.float64(0.4)]
    assert len(judges.asked) == before + 1
