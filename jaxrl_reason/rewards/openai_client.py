"""Asking a server that has OpenAI's interface for chat: vLLM, SGLang, llama.cpp, a hosted one.

A request is a blocking call of the standard library in a thread of its own. Waiting for a turn and
between tries belongs to the event loop.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import functools
import http.client
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from jaxrl_reason.errors import InputError

Result = TypeVar("Result")

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds before the second try, and before any
_MOST_PATIENCE = 300.0  # seconds that a server may ask for with Retry-After
_AGAIN = {408, 409, 425, 429}  # and all from 500
_OURS = ("messages", "model", "stream", "n", "max_tokens", "temperature")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpenAIServer:
    """A model behind an interface for chat."""

    kind: Literal["openai"] = "openai"
    """`openai`: a server with OpenAI's `/chat/completions`, such as vLLM's."""
    url: str
    """What stands before `/chat/completions`, such as `http://localhost:8000/v1`."""
    model: str
    """Name of the model at the server."""
    api_key_env: str | None = None
    """Environment variable with the key; no key is sent when null."""
    timeout: float = 60.0
    """Seconds without a word from the server after which a request has failed."""
    retries: int = 4
    """Further tries after no connection, no answer in time, 429 or an error of the server's."""
    max_concurrency: int = 32
    """Requests under way at once."""
    max_tokens: int | None = 512
    """Longest reply in tokens; the server's own limit when null."""
    temperature: float | None = 0.0
    """Temperature of the reply; the server's default when null."""
    extra_body: Mapping[str, Any] | None = None
    """Further entries of a request, such as `{reasoning_effort: low}`."""

    def __post_init__(self):
        _check_url(self.url)
        if not 0 < self.timeout < threading.TIMEOUT_MAX:
            raise InputError(f"timeout={self.timeout} must be a number of seconds above 0")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be 0 or more, or null")
        for name, value, least in (
            ("retries", self.retries, 0),
            ("max_concurrency", self.max_concurrency, 1),
            ("max_tokens", self.max_tokens, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name}={value} must be at least {least}")
        taken = [name for name in _OURS if name in (self.extra_body or {})]
        if taken:
            raise InputError(f"extra_body.{taken[0]} has a place of its own or is fixed; remove it")


class OpenAIClient:
    """Replies of one server, with a bound on requests under way and patience with failures.

    Args:
        server: whom to ask.

    Raises:
        InputError: the environment variable of the key is missing or has no usable key.
    """

    def __init__(self, server: OpenAIServer):
        self._server = server
        self._endpoint = f"{server.url.rstrip('/')}/chat/completions"
        self._key = None if server.api_key_env is None else _read_key(server.api_key_env)
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}

    async def replies(self, prompts: Sequence[str]) -> list[str]:
        """One reply to each prompt, all asked for at once as far as the bound allows.

        Raises:
            InputError: the server refuses a request, or fails more than `retries` times.
        """
        return list(await asyncio.gather(*(self._reply(prompt) for prompt in prompts)))

    def check(self) -> None:
        """Ask a short question, so that a wrong address, name or key shows at once.

        Raises:
            InputError: as `replies` does; a server that cannot be reached is not waited for.
        """
        # In a thread of its own: a notebook's has a loop running already.
        with concurrent.futures.ThreadPoolExecutor(max_workers=1) as thread:
            asked = self._reply("Reply with the word: ready", waits_for_server=False)
            thread.submit(asyncio.run, asked).result()

    async def _reply(self, prompt: str, *, waits_for_server: bool = True) -> str:
        loop = asyncio.get_running_loop()
        turns = self._turns.setdefault(loop, asyncio.Semaphore(self._server.max_concurrency))
        async with turns:
            tries = 0
            while True:
                tries += 1
                try:
                    return await _in_thread(functools.partial(self._request, prompt))
                except _RequestError as failure:
                    hopeless = not (waits_for_server or failure.is_answer)
                    if hopeless or tries > self._server.retries:
                        raise self._given_up(failure, tries) from failure
                    wait = min(_FIRST_WAIT * 2.0 ** (tries - 1), _LONGEST_WAIT)
                    # Requests that failed together should not come back together.
                    wait = max(wait * random.uniform(0.5, 1), failure.wait)
                await asyncio.sleep(wait)

    def _given_up(self, failure: Exception, tries: int) -> InputError:
        count = "1 try" if tries == 1 else f"{tries} tries"
        return InputError(
            f"{self._endpoint}: {failure} ({count}); is the server up, and is url right? Otherwise "
            "raise retries or timeout, or lower max_concurrency"
        )

    def _request(self, prompt: str) -> str:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        body = json.dumps(self._body(prompt)).encode()
        request = urllib.request.Request(self._endpoint, body, headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._server.timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from error
        except (OSError, http.client.HTTPException) as error:
            raise _RequestError(self._hidden(_reason(error, self._server.timeout))) from error
        return self._text(content)

    def _body(self, prompt: str) -> dict[str, Any]:
        server = self._server
        limits = {"max_tokens": server.max_tokens, "temperature": server.temperature}
        return {
            "model": server.model,
            "messages": [{"role": "user", "content": prompt}],
            **{name: value for name, value in limits.items() if value is not None},
            **(server.extra_body or {}),
        }

    def _text(self, content: bytes) -> str:
        try:
            text = json.loads(content)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            text = content
        if text is None:  # all went into thoughts that the server keeps to itself
            return ""
        if not isinstance(text, str):
            shown = self._hidden(repr(content[:200].decode("utf-8", "replace")))
            raise _RequestError(f"its answer is no chat completion: {shown}", is_answer=True)
        return text

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What follows from a status that is no success."""
        try:
            content = error.read()
        except (OSError, http.client.HTTPException):
            content = b""
        text = self._hidden(f"{error.code} {error.reason}: {_message(content)}")
        if error.code in _AGAIN or error.code >= 500:
            wait = _retry_after(error.headers.get("Retry-After"))
            return _RequestError(text, is_answer=True, wait=wait)
        hint = "correct the judge's options"
        if error.code in (401, 403):
            hint = "set api_key_env to the environment variable that has the server's key"
        elif error.code == 404:
            hint = f"correct url, which ends in /v1 as a rule, or model={self._server.model!r}"
        elif error.code < 400:
            hint = f"it points to {error.headers.get('Location')}; set url to that server"
        return InputError(f"{self._endpoint} refused the request: {text}; {hint}")

    def _hidden(self, text: str) -> str:
        """A text without the key, which some servers send back."""
        return text if self._key is None else text.replace(self._key, "***")


class _RequestError(Exception):
    """A request that may succeed later."""

    def __init__(self, text: str, *, is_answer: bool = False, wait: float = 0.0):
        super().__init__(text)
        self.is_answer = is_answer
        """A server was there and answered."""
        self.wait = wait
        """Seconds that it wants to be left alone."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Takes a redirect for an error: following it would show the key to another server."""

    def redirect_request(self, *_):
        return None


async def _in_thread(function: Callable[[], Result]) -> Result:
    """Run in a thread that keeps no program from ending, as those of `asyncio.to_thread` would.

    There may also be as many as are wanted.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if future.done():  # nobody waits any more
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, daemon=True).start()
    return await future


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
        _ = parts.port  # refuses what is no number
    except ValueError as error:
        raise InputError(f"url={url!r}: {error}") from error
    if parts.username is not None or parts.password is not None:
        raise InputError(
            "url has a user name or password in it, which would be saved with the configuration; "
            "remove it and name an environment variable in api_key_env"
        )
    if not known or parts.query or parts.fragment or not url.isascii() or " " in url:
        raise InputError(f"url={url!r} must be an address such as http://localhost:8000/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise InputError(f"url={url!r} must end before /chat/completions, which is added")


def _read_key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(
            f"api_key_env={variable}: there is no such environment variable, or it is empty; set "
            "it to the server's key"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise InputError(f"api_key_env={variable}: its value is no key; a key has no white space")
    return key


def _message(content: bytes) -> str:
    """What a server says about an error."""
    text = content.decode("utf-8", "replace")
    try:
        said = json.loads(text)
    except ValueError:
        said = text
    for name in ("error", "message", "detail"):
        if isinstance(said, dict) and said.get(name):
            said = said[name]
    said = said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)
    return " ".join(said.split())[:500] or "no message"


def _reason(error: Exception, timeout: float) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"no answer within {timeout:g} s"
    return f"{type(reason).__name__}: {reason}" if isinstance(reason, Exception) else str(reason)


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which has seconds or a date; 0 if it has neither."""
    if value is None:
        return 0.0
    try:
        if value.strip().isdecimal():
            seconds = float(value)
        else:
            date = email.utils.parsedate_to_datetime(value)
            seconds = (date - datetime.datetime.now(datetime.UTC)).total_seconds()
    except (ValueError, TypeError):  # the date has no time zone, or is none
        return 0.0
    return min(max(seconds, 0.0), _MOST_PATIENCE)
