"""Problems and rows of data sets as tokens: what the run's chat configuration says.

Where the model sees, a placeholder in the rendered turns is replaced by as many tokens as its image
or video has features, and every example says what it shows.
"""

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrl_reason.data.batching import Example
from jaxrl_reason.data.chat import Message, Turns, as_messages, encode_begin
from jaxrl_reason.data.examples import RowEncoder, media
from jaxrl_reason.data.groups import continued
from jaxrl_reason.data.records import Record, load_records
from jaxrl_reason.data.vision import (
    VisionProcessorConfig,
    VisionRow,
    Visual,
    expand_tokens,
    process_image,
    process_video,
    read_vision_processor,
    vision_row,
)
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import ModelConfig
from jaxrl_reason.stages.data_config import FileData
from jaxrl_reason.stages.dataset_task import DatasetTask
from jaxrl_reason.stages.task_set import TaskSet
from jaxrl_reason.tasks import Problem, media_of
from jaxrl_reason.tasks.problem import Video

if TYPE_CHECKING:
    from jaxrl_reason.data.tokenizer import PreTrainedTokenizerFast
    from jaxrl_reason.stages.config import RunConfig

Row = Mapping[str, Any]

_TOKENIZING = threading.RLock()
"""Rows are made in several threads, and a tokenizer is for one at a time."""


class Prompt(NamedTuple):
    """A prompt as the model reads it."""

    tokens: list[int]
    shown: VisionRow | None = None
    """Images and videos among the tokens, and positions, for a model that sees."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """Makes tokens of prompts and completions."""

    tasks: TaskSet
    rows: RowEncoder
    system_prompt: str | None
    vision: VisionProcessorConfig | None = None
    """How images become patches, for a model that sees."""

    @classmethod
    def create(
        cls,
        config: "RunConfig",
        tasks: TaskSet,
        tokenizer: "PreTrainedTokenizerFast",
        model: ModelConfig,
    ) -> "Encoder":
        """The encoder of a run.

        Raises:
            InputError: the tokenizer has no chat template, and `chat.plain` does not say that none
                is wanted.
        """
        chat = config.chat
        if tokenizer.chat_template is None and not chat.plain:
            raise InputError(
                f"the tokenizer of {config.model.path} has no chat template; set "
                "chat.chat_template_path to a file with one, or chat.plain=true for prompts that "
                "stay as they are"
            )
        rows = RowEncoder(
            tokenizer=tokenizer, template_kwargs=chat.template_kwargs, plain=chat.plain
        )
        vision = None
        if model.vision is not None:
            from jaxrl_reason.models.convert import find_directory

            directory = find_directory(config.model.path, config.model.revision)
            vision = read_vision_processor(directory)
        return cls(tasks=tasks, rows=rows, system_prompt=chat.system_prompt, vision=vision)

    def counting(self, *, completion_only_loss: bool, assistant_only_loss: bool) -> "Encoder":
        """The same with other tokens in the loss."""
        rows = dataclasses.replace(
            self.rows,
            completion_only_loss=completion_only_loss,
            assistant_only_loss=assistant_only_loss,
        )
        return dataclasses.replace(self, rows=rows)

    def problem(self, problem: Problem) -> Prompt:
        """A problem's prompt."""
        return self._prompt(self._row(problem))

    def completed(self, problem: Problem, completion: list[int]) -> Example:
        """A problem with the tokens of one of its completions."""
        prompt = self.problem(problem)
        shown = prompt.shown and continued(prompt.shown, [len(completion)])
        return Example(prompt.tokens, completion, shown=shown)

    def demonstration(
        self, problem: Problem, completion: str, *, prompt: str | None = None
    ) -> Example:
        """A problem with one of its completions, and perhaps another prompt than its own."""
        (example,) = self.supervised(self._asked(problem, prompt) | {"completion": completion})
        return example

    def pair(
        self, problem: Problem, chosen: str, rejected: str, *, prompt: str | None = None
    ) -> tuple[Example, Example]:
        """A problem with two of its completions, the better one first."""
        sides = {"chosen": chosen, "rejected": rejected}
        return self.preference(self._asked(problem, prompt) | sides)

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's prompt."""
        return self._prompt(row).tokens

    def begin(self, prompt: str, begin: str) -> list[int]:
        """Token ids of text that the completion of a prompt is made to begin with."""
        rows, turns = self.rows, self._with_system({"prompt": prompt}, "prompt")["prompt"]
        return encode_begin(
            rows.tokenizer,
            turns,
            begin,
            template_kwargs=rows.template_kwargs,
            plain=rows.plain,
        )[1]

    def supervised(self, row: Row) -> list[Example]:
        """Examples of a row of messages, or of prompt and completion."""
        column = "messages" if "messages" in row else "prompt"
        seen = self._see(row)
        examples = []
        with _TOKENIZING:
            sequences = self.rows.supervised(self._with_system(row, column))
        for encoded in sequences:
            ids, sources, shown = self._expand(encoded.ids, seen)
            mask = [encoded.mask[i] for i in sources]
            first = mask.index(True)
            counted = None if all(mask[first:]) else mask[first:]
            examples.append(Example(ids[:first], ids[first:], counted, shown))
        return examples

    def preference(self, row: Row) -> tuple[Example, Example]:
        """The chosen and the rejected example of a row."""
        seen = self._see(row)
        if "prompt" in row:
            row = self._with_system(row, "prompt")

        def example(prompt: list[int], completion: list[int]) -> Example:
            ids, sources, shown = self._expand([*prompt, *completion], seen)
            begin = sum(i < len(prompt) for i in sources)
            return Example(ids[:begin], ids[begin:], shown=shown)

        with _TOKENIZING:
            chosen, rejected = self.rows.preference(row)
        return example(*chosen), example(*rejected)

    def _prompt(self, row: Row) -> Prompt:
        seen = self._see(row)
        with _TOKENIZING:
            prompt = self.rows.prompt(self._with_system(row, "prompt"))
        ids, _, shown = self._expand(prompt, seen)
        return Prompt(ids, shown)

    def _see(self, row: Row) -> tuple[list[Visual], list[Visual]]:
        """The images and videos of a row as patches."""
        images, videos = media(row, "image"), media(row, "video")
        if self.vision is None:
            if images or videos:
                raise InputError("the row shows images or videos, and the model reads text only")
            return [], []
        return (
            [process_image(image, self.vision) for image in images],
            [self._video(video) for video in videos],
        )

    def _video(self, video: Any) -> Visual:
        if isinstance(video, Video):
            return process_video(video.frames, self.vision, source_fps=video.fps)
        return process_video(video, self.vision)

    def _expand(
        self, ids: list[int], seen: tuple[Sequence[Visual], Sequence[Visual]]
    ) -> tuple[list[int], Sequence[int], VisionRow | None]:
        """Tokens with long placeholders, the place that each came from, and what they show."""
        if self.vision is None:
            return ids, range(len(ids)), None
        expanded = expand_tokens(ids, *seen, self.vision, self._encode_text)
        tokens = expanded.tokens.tolist()
        return tokens, expanded.sources.tolist(), vision_row(tokens, *seen, self.vision)

    @property
    def _encode_text(self) -> Callable[[str], list[int]]:
        tokenizer = self.rows.tokenizer

        def encode(text: str) -> list[int]:
            with _TOKENIZING:
                return tokenizer(text, add_special_tokens=False)["input_ids"]

        return encode

    def _row(self, problem: Problem) -> dict[str, Any]:
        """What `data.examples` reads of a problem; rows of a data set may have tools and turns."""
        task = self.tasks.of(problem)
        if isinstance(task, DatasetTask):
            return dict(task.record(*problem.columns["record"]).row)
        shown = media_of(task, problem)
        row: dict[str, Any] = {"prompt": problem.prompt}
        row |= {"images": list(shown.images)} if shown.images else {}
        return row | ({"videos": list(shown.videos)} if shown.videos else {})

    def _asked(self, problem: Problem, prompt: str | None) -> dict[str, Any]:
        row = self._row(problem)
        return row if prompt is None else {**row, "prompt": prompt}

    def _with_system(self, row: Mapping[str, Any], column: str) -> Mapping[str, Any]:
        if self.system_prompt is None or column not in row:
            return (
                row  # Without its column a row is refused by `rows`, which names what is missing.
            )
        turns: Turns = row[column]
        messages = as_messages(turns, "user")
        if messages[0]["role"] == "system":
            return row
        system: Message = {"role": "system", "content": self.system_prompt}
        return {**row, column: [system, *messages]}


def file_records(data: FileData) -> list[Record]:
    """The rows of a stage's file or data set.

    Raises:
        InputError: as `load_records`.
    """
    types = dict.fromkeys(("prompt", "completion", "chosen", "rejected"), (str, list))
    types |= {"messages": list}
    return load_records(data.path, types=types, split=data.split, columns=data.columns or None)
