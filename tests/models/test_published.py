"""Presets of published sizes: as many parameters as were published, and known to transformers."""

import jax
import pytest

from jaxrl_reason.models import Model
from jaxrl_reason.models.published import PUBLISHED, published

# What the hub says for the files, or the sum of their tensors where a tied head is in them too.
PARAMETERS = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "gemma3-1b": 999_885_952,
    "gemma3-4b": 4_300_079_472,
    "gemma3-12b": 12_187_325_040,
    "gemma3-27b": 27_432_406_640,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
    "qwen2.5-vl-72b": 73_410_777_344,
    "qwen3-vl-4b": 4_437_815_808,
    "qwen3-vl-8b": 8_767_123_696,
}
# The published Gemma 3 of 4B and more have an image encoder, which is not read: SigLIP of 27 layers
# of width 1152, and a norm and a matrix that lead from it to the decoder.
ENCODER = 416_866_032


def encoder_of(name, width):
    return ENCODER + 1152 + 1152 * width if name in ("gemma3-4b", "gemma3-12b", "gemma3-27b") else 0


def test_every_preset_has_a_published_count():
    assert PARAMETERS.keys() == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    config = published(name)
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    assert count == PARAMETERS[name] - encoder_of(name, config.hidden_size)
    assert count == config.num_parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_makes_the_same_tensors(name):
    """Names and shapes, from the configuration that is written for the preset."""
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from jaxrl_reason.models.convert.families import write_config

    config = published(name)
    kind = AutoModelForCausalLM if config.vision is None else AutoModelForImageTextToText
    with torch.device("meta"):
        reference = kind.from_config(write_config(config))
    assert sum(p.numel() for p in reference.parameters()) == config.num_parameters


def test_changes_and_unknown_names():
    config = published("qwen3-0.6b", num_hidden_layers=2, dtype="bfloat16")
    assert (config.num_hidden_layers, config.dtype, config.hidden_size) == (2, "bfloat16", 1024)
    with pytest.raises(ValueError, match=r"'qwen4' is unknown; one of qwen2\.5-0\.5b"):
        published("qwen4")
    with pytest.raises(TypeError):
        published("qwen3-0.6b", layers=2)
