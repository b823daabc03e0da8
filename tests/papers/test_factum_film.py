"""The model that sees films: its directory is read by a run, and a film becomes 96 tokens."""

from pathlib import Path

import numpy as np

from jaxrl_reason.config import load_yaml, validate
from jaxrl_reason.papers.factum_film import make_film_model
from jaxrl_reason.stages.config import RunConfig
from jaxrl_reason.stages.context import Context

RUN = load_yaml(Path(__file__).parents[2] / "configs/papers/factum/video.yaml")["run"]


def test_a_run_reads_films_with_it(tmp_path):
    directory = make_film_model(tmp_path / "film_model", size="0.3m")
    raw = RUN | {"model": {"path": str(directory)}, "output_dir": str(tmp_path)}
    run = validate(RunConfig, raw, "video.yaml")
    context = Context.create(run)
    vision = context.model.config.vision
    assert vision is not None
    assert (vision.merge_unit, context.model.config.mrope_section) == (4, (6, 3, 3))
    problems = [context.tasks.generate("train", i) for i in range(20)]
    for problem, prompt in zip(problems, context.prompts(problems), strict=True):
        shown = np.asarray(prompt.tokens) == context.encoder.vision.video_token_id
        assert shown.sum() == RUN["max_visual_tokens"] == 96
        assert len(prompt.tokens) <= RUN["max_prompt_length"]
        assert prompt.shown.patches.shape == (4 * 96, 3 * 2 * 4 * 4)
        text = context.task.trace(problem, "long")
        (written,) = context.decode([context.encoder.demonstration(problem, text).completion])
        assert context.task.verify(problem, written).correct
    # Six pairs of frames, a pair each two seconds: four positions of half a second apart.
    times = prompt.shown.positions[shown, 0]
    assert np.unique(np.diff(times[::16])).tolist() == [4]
