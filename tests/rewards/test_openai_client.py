"""The client of OpenAI's interface against a real server on this machine."""

import asyncio
import datetime
import email.utils
import json
import socket
import threading
import time

import pytest

from jaxrl_reason.errors import InputError
from jaxrl_reason.rewards import OpenAIClient, OpenAIServer, openai_client
from jaxrl_reason.rewards.workers import Workers

from .conftest import Answer, says

KEY = "sk-very-secret"


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.01)


def ask(stub, *prompts, **options):
    client = OpenAIClient(OpenAIServer(url=stub.url, model="m", **options))
    return asyncio.run(client.replies(prompts or ["hello"]))


def in_turn(*answers):
    """These answers one after the other, the last of them from then on."""
    return lambda number, prompt: answers[min(number, len(answers) - 1)]


def test_a_request_is_that_of_a_chat(stub, monkeypatch):
    monkeypatch.setenv("KEY_OF_TESTS", f" {KEY}\n")
    assert ask(stub, api_key_env="KEY_OF_TESTS", max_tokens=7) == ["to hello"]
    assert stub.asked == [
        (
            "/v1/chat/completions",
            f"Bearer {KEY}",
            {
                "model": "m",
                "messages": [{"role": "user", "content": "hello"}],
                "max_tokens": 7,
                "temperature": 0.0,
            },
        )
    ]


def test_what_is_null_is_not_sent_and_further_entries_are(stub):
    ask(stub, max_tokens=None, temperature=None, extra_body={"reasoning_effort": "low"})
    (asked,) = stub.asked
    assert asked.authorization is None
    assert asked.body.keys() == {"model", "messages", "reasoning_effort"}


def test_replies_stand_in_the_order_of_their_prompts(stub):
    def answer(number, prompt):
        time.sleep(0.05 if prompt == "0" else 0)
        return says(prompt * 2)

    stub.answer = answer
    prompts = [str(i) for i in range(40)] + ["ü €", ""]
    assert ask(stub, *prompts) == [prompt * 2 for prompt in prompts]


def test_requests_under_way_are_bounded(stub):
    """The bound is kept, and reached: each of these waits for two others."""
    meet, lock, active, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def answer(number, prompt):
        with lock:
            active[0] += 1
            most[0] = max(most[0], active[0])
        meet.wait(timeout=60)
        time.sleep(0.02)
        with lock:
            active[0] -= 1
        return says(prompt)

    stub.answer = answer
    assert len(ask(stub, *map(str, range(12)), max_concurrency=3)) == 12
    assert most == [3]


def test_a_client_may_be_used_from_several_event_loops(stub):
    client = OpenAIClient(OpenAIServer(url=stub.url, model="m", max_concurrency=1))
    for _ in range(3):
        assert asyncio.run(client.replies(["a", "b"])) == ["to a", "to b"]


# Failures that pass


def test_retry_after_is_waited_for(stub):
    stub.answer = in_turn(Answer(429, b"slow down", {"Retry-After": "1"}), says("ok"))
    began = time.monotonic()
    assert ask(stub) == ["ok"]
    assert 1 <= time.monotonic() - began < 10
    assert len(stub.asked) == 2


@pytest.mark.parametrize(
    ("days", "least"), [(1, 0.4), (-1, 0.0)], ids=["tomorrow, which is too long", "yesterday"]
)
def test_retry_after_may_be_a_date(stub, monkeypatch, days, least):
    monkeypatch.setattr(openai_client, "_MOST_PATIENCE", 0.4)
    date = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    header = email.utils.format_datetime(date, usegmt=True)
    stub.answer = in_turn(Answer(503, b"", {"Retry-After": header}), says("ok"))
    began = time.monotonic()
    assert ask(stub) == ["ok"]
    assert least <= time.monotonic() - began < 10


@pytest.mark.parametrize("header", ["soon", "-3", "Wed, 21 Oct 2015 07:28:00"])
def test_a_strange_retry_after_is_none(stub, header):
    stub.answer = in_turn(Answer(429, b"", {"Retry-After": header}), says("ok"))
    assert ask(stub) == ["ok"]


def test_waits_grow(stub, monkeypatch):
    monkeypatch.setattr(openai_client, "_FIRST_WAIT", 0.1)
    monkeypatch.setattr(openai_client.random, "uniform", lambda low, high: high)
    stub.answer = in_turn(*[Answer(500)] * 3, says("ok"))
    began = time.monotonic()
    ask(stub)
    assert 0.1 + 0.2 + 0.4 <= time.monotonic() - began < 10


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503])
def test_a_failure_that_may_pass_is_tried_again(stub, status):
    stub.answer = in_turn(Answer(status), says("ok"))
    assert ask(stub) == ["ok"]


def test_an_answer_that_is_no_json_is_tried_again(stub):
    stub.answer = in_turn(
        Answer(body=b"<html>"), Answer(body=b"{}"), Answer(body=b"\xff"), says("ok")
    )
    assert ask(stub) == ["ok"]
    assert len(stub.asked) == 4


def test_a_reply_without_text_is_empty(stub):
    """Servers that hide thoughts send null when the tokens were spent on them."""
    stub.answer = in_turn(says(None))
    assert ask(stub) == [""]


def test_an_answer_that_does_not_come_in_time_is_tried_again(stub):
    late = threading.Event()

    def answer(number, prompt):
        if number == 0:
            late.wait(60)
        return says("ok")

    stub.answer = answer
    assert ask(stub, timeout=0.3) == ["ok"]
    late.set()
    assert len(stub.asked) == 2


# Failures that do not


def test_errors_that_stay_end_with_the_message_of_the_server(stub):
    stub.answer = in_turn(Answer(500, json.dumps({"error": {"message": "no memory"}}).encode()))
    with pytest.raises(
        InputError, match=r"completions: 500 Internal .*: no memory \(3 tries\); is"
    ):
        ask(stub, retries=2)
    assert len(stub.asked) == 3


def test_bad_json_that_stays_is_shown(stub):
    stub.answer = in_turn(Answer(body=b"<html>welcome</html>"))
    with pytest.raises(InputError, match=r"is no chat completion: '<html>welcome.*\(2 tries\)"):
        ask(stub, retries=1)


def test_a_server_that_is_too_slow_is_named(stub):
    late = threading.Event()
    stub.answer = lambda number, prompt: (late.wait(60), says("ok"))[1]
    with pytest.raises(InputError, match=r"no answer within 0.2 s \(1 try\)"):
        ask(stub, timeout=0.2, retries=0)
    late.set()


def test_no_server_is_one_clear_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    client = OpenAIClient(OpenAIServer(url=url, model="m", retries=1))
    with pytest.raises(InputError, match=r"ConnectionRefusedError: .* \(2 tries\); is the server"):
        asyncio.run(client.replies(["hello"]))
    # At the start of a run nobody waits for a server to come up.
    with pytest.raises(InputError, match=r"\(1 try\); is the server up, and is url right\?"):
        client.check()


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (400, {"error": {"message": "too long"}}, "400 Bad Request: too long; correct the judge's"),
        (401, {"error": {"message": f"bad key {KEY}"}}, r"401 .*: bad key \*\*\*; set api_key_env"),
        (404, {"object": "error", "message": "no such model"}, "no such model; correct url, which"),
        (422, {"detail": [{"loc": ["body"]}]}, r'422 .*: \[{"loc": \["body"\]}\]; correct'),
        (403, "  go\naway ", "403 Forbidden: go away; set api_key_env"),
        (405, "", "405 Method Not Allowed: no message"),
    ],
)
def test_a_refusal_is_not_tried_again_and_never_shows_the_key(
    stub, monkeypatch, status, body, message
):
    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    text = body if isinstance(body, str) else json.dumps(body)
    stub.answer = in_turn(Answer(status, text.encode()))
    with pytest.raises(InputError, match=message) as raised:
        ask(stub, api_key_env="KEY_OF_TESTS")
    assert KEY not in str(raised.value)
    assert len(stub.asked) == 1


def test_a_redirect_is_not_followed_with_the_key(stub, monkeypatch):
    monkeypatch.setenv("KEY_OF_TESTS", KEY)
    stub.answer = in_turn(Answer(302, b"", {"Location": f"{stub.url}/elsewhere"}))
    with pytest.raises(InputError, match=r"302 .* points to .*/elsewhere; set url to that server"):
        ask(stub, api_key_env="KEY_OF_TESTS")
    assert len(stub.asked) == 1


def test_a_failure_of_one_ends_all(stub):
    stub.answer = lambda number, prompt: Answer(400) if prompt == "5" else says(prompt)
    with pytest.raises(InputError, match="400 Bad Request"):
        ask(stub, *map(str, range(20)), max_concurrency=2)


def test_closing_does_not_wait_for_a_reply(stub):
    """Neither do programs that end: the threads are daemons."""
    asked, late = threading.Event(), threading.Event()

    def answer(number, prompt):
        asked.set()
        late.wait(60)
        return says("late")

    stub.answer = answer
    client = OpenAIClient(OpenAIServer(url=stub.url, model="m", max_concurrency=1))
    began = time.monotonic()
    with Workers(None, 0) as workers:
        waiting = workers.submit_async(client.replies(["a", "b"]))
        assert asked.wait(60)
    assert time.monotonic() - began < 30
    assert waiting.cancelled()
    late.set()


# The question at the start


def test_the_first_question_is_one_short_request(stub):
    OpenAIClient(OpenAIServer(url=f"{stub.url}/", model="m")).check()
    (asked,) = stub.asked
    assert asked.path == "/v1/chat/completions"
    assert len(asked.body["messages"][0]["content"]) < 40


def test_the_first_question_works_where_an_event_loop_runs(stub):
    async def notebook():
        OpenAIClient(OpenAIServer(url=stub.url, model="m")).check()

    asyncio.run(notebook())
    assert len(stub.asked) == 1


def test_the_first_question_is_patient_with_a_server_that_is_there(stub):
    stub.answer = in_turn(Answer(429), says("ready"))
    OpenAIClient(OpenAIServer(url=stub.url, model="m")).check()
    assert len(stub.asked) == 2


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000/v1"}, "must be an address such as http"),
        ({"url": "file:///etc/passwd"}, "must be an address"),
        ({"url": "http:///v1"}, "must be an address"),
        ({"url": "http://h/v1?key=1"}, "must be an address"),
        ({"url": "http://h:port/v1"}, "url='http://h:port/v1': Port could not be"),
        ({"url": "http://u:pw@h/v1"}, "would be saved with the configuration"),
        ({"url": "http://h/v1/chat/completions"}, "must end before /chat/completions"),
        ({"timeout": 0.0}, "timeout=0.0 must be"),
        ({"timeout": float("inf")}, "timeout=inf must be"),
        ({"retries": -1}, "retries=-1 must be at least 0"),
        ({"max_concurrency": 0}, "max_concurrency=0 must be at least 1"),
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"temperature": -0.1}, "temperature=-0.1 must be"),
        ({"extra_body": {"stream": True}}, "extra_body.stream has a place of its own or is fixed"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        OpenAIServer(**{"url": "http://h/v1", "model": "m", **options})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "no such environment variable"),
        (" ", "no such"),
        ("a b", "is no key"),
        ("ä", "no key"),
    ],
)
def test_a_key_must_be_there_and_usable(monkeypatch, value, message):
    monkeypatch.delenv("KEY_OF_TESTS", raising=False)
    if value is not None:
        monkeypatch.setenv("KEY_OF_TESTS", value)
    server = OpenAIServer(url="http://h/v1", model="m", api_key_env="KEY_OF_TESTS")
    with pytest.raises(InputError, match=f"api_key_env=KEY_OF_TESTS: .*{message}"):
        OpenAIClient(server)
