"""Directories in Hugging Face's format: reading into shardings, writing, what is refused, PEFT."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerFast

from jaxrl_reason.data.tokenizer import build_tokenizer
from jaxrl_reason.errors import InputError
from jaxrl_reason.models import Model, ModelConfig
from jaxrl_reason.models.convert import (
    from_pretrained,
    load_adapter,
    save_adapter,
    save_pretrained,
)
from jaxrl_reason.models.convert.files import read_headers
from jaxrl_reason.models.convert.save import check_directory
from jaxrl_reason.models.lora import LoRAConfig, without_adapter
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.sharding import MeshConfig, make_mesh, tree_shardings

TINY = ModelConfig(
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
VISION = VisionConfig(
    depth=3,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    out_hidden_size=32,
    patch_size=2,
    window_size=8,
    fullatt_block_indexes=(1,),
    tokens_per_second=2,
)
SHAPES = {
    "dense": TINY,
    "biased": dataclasses.replace(TINY, qk_norm=False, qkv_bias=True, tie_word_embeddings=True),
    "experts": dataclasses.replace(
        TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
    "qwen2.5-vl": dataclasses.replace(
        TINY, qk_norm=False, qkv_bias=True, mrope_section=(2, 2, 2), vision=VISION
    ),
    "qwen3-vl": dataclasses.replace(
        TINY,
        mrope_section=(2, 2, 2),
        mrope_interleaved=True,
        vision=dataclasses.replace(
            VISION,
            norm="layer",
            gated_mlp=False,
            patch_bias=True,
            hidden_act="gelu_tanh",
            window_size=None,
            fullatt_block_indexes=(),
            tokens_per_second=None,
            num_position_embeddings=16,
            deepstack_visual_indexes=(0, 1),
        ),
    ),
}


def make(config=TINY, seed=0):
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(seed))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 200))
    noise = lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape, x.dtype)
    return model, jax.tree.map(noise, params)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Model, parameters and directory of `TINY`."""
    model, params = make()
    path = save_pretrained(model, params, tmp_path_factory.mktemp("tiny") / "model")
    return model, params, path


@pytest.fixture
def copy(saved, tmp_path):
    """A directory of `TINY` to spoil."""
    return shutil.copytree(saved[2], tmp_path / "copy")


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def edit_tensors(directory, change):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(directory, **changes):
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# In


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_come_back_bit_for_bit_on_a_mesh_or_without(name, mesh, tmp_path):
    model, params = make(SHAPES[name])
    path = save_pretrained(model, params, tmp_path / "m", max_shard_size="20KB", check=False)
    assert len(list(path.glob("model-*-of-*.safetensors"))) > 2
    again, alone = from_pretrained(path)
    assert again == model
    assert_equal(alone, params)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(alone)} == {1}
    _, cut = from_pretrained(path, mesh=mesh)
    assert_equal(cut, params)
    assert jax.tree.map(lambda x: x.sharding, cut) == tree_shardings(mesh, model.axes(), params)


def test_a_sharded_model_is_written_as_a_whole_one(saved, mesh, tmp_path):
    model, _, path = saved
    _, cut = from_pretrained(path, mesh=mesh)
    save_pretrained(model, cut, tmp_path / "model", check=False)
    a, b = (load_file(x / "model.safetensors") for x in (path, tmp_path / "model"))
    assert_equal(a, b)


def test_dtypes(saved, tmp_path):
    model, params, _ = saved
    path = save_pretrained(model, params, tmp_path / "model", dtype="bfloat16", check=False)
    assert {x.dtype for x in read_headers(path).values()} == {"BF16"}
    assert json.loads((path / "config.json").read_text())["dtype"] == "bfloat16"
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    narrow, stored = from_pretrained(path, dtype="bfloat16", param_dtype="bfloat16")
    assert (narrow.config.dtype, narrow.config.param_dtype) == ("bfloat16", "bfloat16")
    assert_equal(stored, rounded)
    _, wide = from_pretrained(path)
    assert_equal(wide, jax.tree.map(lambda x: x.astype(jnp.float32), rounded))


def test_fields_of_the_configuration_may_differ(saved):
    model, _ = from_pretrained(saved[2], remat="none", max_position_embeddings=32)
    assert (model.config.remat, model.config.max_position_embeddings) == ("none", 32)
    with pytest.raises(InputError, match="'rematt' is no field of ModelConfig; did you mean"):
        from_pretrained(saved[2], rematt="none")


def test_every_wrong_tensor_is_listed(copy):
    def spoil(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(13, np.float32)
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones(3, np.float32)
        tensors["model.norm.weight"] = np.ones(32, np.int32)

    edit_tensors(copy, spoil)
    with pytest.raises(InputError) as error:
        from_pretrained(copy)
    for part in (
        "missing: lm_head.weight, model.layers.1.mlp.up_proj.weight",
        "unexpected: model.layers.3.mlp.up_proj.weight",
        "model.layers.0.self_attn.q_norm.weight [13] where the configuration has [12]",
        "model.norm.weight I32 (supported: F32, BF16, F16)",
    ):
        assert part in str(error.value)


def test_a_tied_head_and_old_frequencies_are_passed_over(tmp_path):
    model, params = make(SHAPES["biased"])
    path = save_pretrained(model, params, tmp_path / "model", check=False)

    def add(tensors):
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)

    edit_tensors(path, add)
    assert_equal(from_pretrained(path)[1], params)


def test_gemma_3_is_read_without_its_images(tmp_path):
    """The published ones of 4B and more are decoders behind an image encoder."""
    changes = {"sandwich_norms": True, "rms_norm_offset": True, "scale_embeddings": True}
    changes |= {"hidden_act": "gelu_tanh", "tie_word_embeddings": True}
    config = dataclasses.replace(TINY, rope_local_theta=50.0, sliding_window=8, **changes)
    model, params = make(config)
    path = save_pretrained(model, params, tmp_path / "model", check=False)

    def nest(tensors):
        moved = {f"language_model.{name}": tensors.pop(name) for name in [*tensors]}
        tensors |= {**moved, "vision_tower.head.probe": np.ones(3, np.float32)}

    edit_tensors(path, nest)
    text = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    again, read = from_pretrained(path)
    assert again == model
    assert_equal(read, params)
    save_pretrained(again, read, tmp_path / "text", like=path, check=False)
    assert (
        json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "gemma3_text"
    )


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json in"),
        (lambda d: (d / "config.json").write_text("[1"), "is no JSON object"),
        (lambda d: edit_config(d, model_type="qwen3_next"), "'qwen3_next', which is not supported"),
        (lambda d: edit_config(d, num_attention_heads="four"), "transformers refuses"),
        (lambda d: edit_config(d, attention_bias=True), "attention_bias=True"),
        (lambda d: (d / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda d: (d / "model.safetensors").write_bytes(b"\0" * 40), "is no safetensors file"),
        (lambda d: cut_short(d / "model.safetensors"), "bytes and should have"),
        (lambda d: write_index(d), "lacks files that its index names: model-2.safetensors"),
    ],
)
def test_a_damaged_directory_gets_one_clear_message(copy, spoil, message):
    spoil(copy)
    with pytest.raises(InputError, match=message):
        from_pretrained(copy)


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def write_index(directory):
    names = {"a": "model.safetensors", "b": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def test_what_is_no_directory_and_no_repository(tmp_path):
    with pytest.raises(InputError, match="there is no directory"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(InputError, match="the hub did not give it"):  # tests are offline
        from_pretrained("nobody/nothing")


def test_a_repository_of_the_hub_is_a_directory_of_its_cache(saved, tmp_path, monkeypatch):
    import huggingface_hub

    model, params, path = saved
    cache = tmp_path / "models--org--tiny"
    shutil.copytree(path, cache / "snapshots" / ("0" * 40))
    for branch, commit in (("main", "f" * 40), ("wanted", "0" * 40)):
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    again, read = from_pretrained("org/tiny", revision="wanted")
    assert again == model
    assert_equal(read, params)
    with pytest.raises(InputError, match="the hub did not give it"):
        from_pretrained("org/tiny")


MEMORY = """
import sys
from pathlib import Path
import jax
from jaxrl_reason.models.convert import from_pretrained

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

from_pretrained(sys.argv[1])  # the small one: libraries, compiler and threads are there
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
before = resident("VmRSS")
_, params = from_pretrained(sys.argv[2], param_dtype="bfloat16")
jax.block_until_ready(params)
print(resident("VmHWM") - before, sum(x.nbytes for x in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_host_memory_stays_below_the_largest_file(saved, tmp_path):
    """420 MB in files of 100 MB; on CPU the parameters themselves are in host memory too."""
    config = dataclasses.replace(
        TINY,
        vocab_size=16_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        head_dim=64,
        param_dtype="bfloat16",
    )
    model = Model(config)
    zeros = jax.jit(
        lambda: jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0))
        )
    )()
    path = save_pretrained(model, zeros, tmp_path / "m", max_shard_size="100MB", check=False)
    del zeros
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert sum(sizes) > 4 * max(sizes)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(saved[2]), str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    peak, params = map(int, done.stdout.split())
    assert params > 0.98 * sum(sizes)
    assert peak - params < 1.3 * max(sizes), f"{(peak - params) / max(sizes):.2f} of a file"


def test_reading_and_writing_need_no_torch(saved, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from jaxrl_reason.models.convert import from_pretrained, save_pretrained\n"
        "model, params = from_pretrained(sys.argv[1])\n"
        "save_pretrained(model, params, sys.argv[2], like=sys.argv[1])\n"
    )
    arguments = [sys.executable, "-c", code, str(saved[2]), str(tmp_path / "model")]
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    a, b = (load_file(x / "model.safetensors") for x in (saved[2], tmp_path / "model"))
    assert_equal(a, b)


# Out


def test_what_a_directory_holds(tmp_path):
    tokenizer = build_tokenizer(["one", "two"])
    model, params = make(dataclasses.replace(TINY, vocab_size=len(tokenizer)))
    path = save_pretrained(model, params, tmp_path / "new" / "model", tokenizer=tokenizer)
    assert path == tmp_path / "new" / "model"
    assert [x.name for x in (tmp_path / "new").iterdir()] == ["model"]
    files = {x.name for x in path.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert files >= {*wanted, "tokenizer_config.json", "chat_template.jinja"}
    config = json.loads((path / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["eos_token_id"] == tokenizer.eos_token_id
    generation = json.loads((path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_token_id
    again = PreTrainedTokenizerFast.from_pretrained(path)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_the_tokenizer_says_which_tokens_stand_for_images(tmp_path):
    tokenizer = build_tokenizer(["one"])
    marks = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
    tokenizer.add_tokens(list(marks), special_tokens=True)
    config = dataclasses.replace(SHAPES["qwen3-vl"], vocab_size=len(tokenizer))
    model, params = make(config)
    path = save_pretrained(model, params, tmp_path / "model", tokenizer=tokenizer, check=False)
    written = json.loads((path / "config.json").read_text())
    names = ("vision_start", "image", "video", "vision_end")
    ids = [written[f"{name}_token_id"] for name in names]
    assert ids == tokenizer.convert_tokens_to_ids(marks)
    assert written["text_config"]["eos_token_id"] == tokenizer.eos_token_id


def test_files_are_as_large_as_asked_for(saved, tmp_path):
    model, params, whole = saved
    path = save_pretrained(model, params, tmp_path / "model", max_shard_size=20_000, check=False)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    tensors = {
        name: value for f in path.glob("*.safetensors") for name, value in load_file(f).items()
    }
    assert_equal(tensors, load_file(whole / "model.safetensors"))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(path / file)
    for file in path.glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(x.nbytes for x in held.values()) <= 20_000
    with pytest.raises(InputError, match="max_shard_size='big' is no size"):
        save_pretrained(model, params, tmp_path / "other", max_shard_size="big")


def test_settings_of_the_model_it_came_from_are_kept(copy, tmp_path):
    edit_config(copy, eos_token_id=7, attention_dropout=0.25, use_cache=False)
    (copy / "generation_config.json").write_text('{"eos_token_id": [7, 8], "top_k": 20}')
    (copy / "preprocessor_config.json").write_text('{"min_pixels": 784}')
    model, params = from_pretrained(copy)
    path = save_pretrained(model, params, tmp_path / "model", like=copy, check=False)
    config = json.loads((path / "config.json").read_text())
    kept = {name: config[name] for name in ("eos_token_id", "attention_dropout", "use_cache")}
    assert kept == {"eos_token_id": 7, "attention_dropout": 0.25, "use_cache": False}
    for name in ("generation_config.json", "preprocessor_config.json"):
        assert (path / name).read_text() == (copy / name).read_text()
    other = dataclasses.replace(model.config, qk_norm=False, qkv_bias=True)
    with pytest.raises(InputError, match=r"of family qwen2 and cannot be written like .* qwen3"):
        save_pretrained(*make(other), tmp_path / "other", like=copy)


def test_nothing_is_overwritten_and_nothing_is_left_behind(saved, tmp_path):
    model, params, path = saved
    with pytest.raises(InputError, match="exists already"):
        save_pretrained(model, params, path)
    half = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(InputError, match="logits of the model are not finite"):
        save_pretrained(model, half, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".model.unfinished").mkdir()  # of a run that was killed
    (tmp_path / ".model.unfinished" / "junk").write_text("")
    save_pretrained(model, half, tmp_path / "model", check=False)
    assert [x.name for x in tmp_path.iterdir()] == ["model"]
    assert "junk" not in {x.name for x in (tmp_path / "model").iterdir()}


def test_parameters_of_another_model_are_not_written(saved, tmp_path):
    _, params, _ = saved
    other = Model(dataclasses.replace(TINY, num_hidden_layers=2))
    with pytest.raises(InputError, match=r"layers/mlp/up/kernel: \(3, 32, 48\) \(expected: \(2"):
        save_pretrained(other, params, tmp_path / "model")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: edit_tensors(d, lambda t: t["model.norm.weight"].__setitem__(3, 9.0)),
        lambda d: edit_config(d, rope_parameters={"rope_type": "default", "rope_theta": 7.0}),
    ],
    ids=["weights", "configuration"],
)
def test_the_check_notices_another_model(saved, copy, spoil):
    model, params, _ = saved
    check_directory(model, params, copy, None)
    spoil(copy)
    with pytest.raises(RuntimeError, match="what was written is not the model"):
        check_directory(model, params, copy, None)


# Adapters

LORA = LoRAConfig(r=3, lora_alpha=8.0, target_modules=("q_proj", "o_proj", "down_proj"))


@pytest.fixture(scope="module")
def adapted():
    """A model with an adapter that does something."""
    return make(dataclasses.replace(TINY, lora=LORA), seed=3)


@jax.jit
def merged_by_hand(params):
    """Kernels with their adapters added, in the shapes of PEFT."""
    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    scale = jnp.float32(8.0 / 3)
    q, o, down = attention["q"], attention["o"], mlp["down"]
    return {
        "self_attn.q_proj": q["kernel"]
        + scale * jnp.einsum("ldr,lrnh->ldnh", q["lora_a"], q["lora_b"]),
        "self_attn.o_proj": o["kernel"]
        + scale * jnp.einsum("lnhr,lrd->lnhd", o["lora_a"], o["lora_b"]),
        "mlp.down_proj": down["kernel"]
        + scale * jnp.einsum("lfr,lrd->lfd", down["lora_a"], down["lora_b"]),
    }


def test_a_merged_export_adds_the_adapter(adapted, tmp_path):
    model, params = adapted
    path = save_pretrained(model, params, tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for name, kernel in merged_by_hand(params).items():
        for i in range(3):
            inputs = 48 if name == "self_attn.o_proj" else kernel.shape[1]
            wanted = np.asarray(kernel[i]).reshape(inputs, -1).T
            np.testing.assert_allclose(
                tensors[f"model.layers.{i}.{name}.weight"], wanted, atol=1e-5
            )
    again, _ = from_pretrained(path)
    assert again.config == TINY


def test_an_adapter_in_peft_format(adapted, tmp_path):
    """Merging by PEFT's formula, W + alpha / r B A, gives the merged export."""
    model, params = adapted
    path = save_adapter(model, params, tmp_path / "adapter", base="org/base")
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 8)
    assert config["target_modules"] == ["q_proj", "o_proj", "down_proj"]
    tensors = load_file(path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 3
    base = save_pretrained(Model(TINY), without_adapter(params), tmp_path / "base", check=False)
    merged = load_file(save_pretrained(model, params, tmp_path / "merged") / "model.safetensors")
    for name, weight in load_file(base / "model.safetensors").items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in tensors:
            a, b = (tensors[f"{module}.lora_{x}.weight"] for x in "AB")
            assert a.shape[0] == b.shape[1] == 3
            weight = weight + 8 / 3 * (b @ a)
        np.testing.assert_allclose(weight, merged[name], atol=1e-5)


def test_an_adapter_comes_back_on_a_mesh_or_without(adapted, mesh, tmp_path):
    model, params = adapted
    path = save_adapter(model, params, tmp_path / "adapter")
    base = save_pretrained(Model(TINY), without_adapter(params), tmp_path / "base", check=False)
    for where in (None, mesh):
        again, read = load_adapter(*from_pretrained(base, mesh=where), path)
        assert again == model
        assert_equal(read, params)
    places = tree_shardings(mesh, model.axes(), params)
    assert jax.tree.map(lambda x: x.sharding, read) == places


@pytest.mark.parametrize("name", ["experts", "qwen2.5-vl"])
def test_adapters_of_experts_and_beside_an_encoder(name, tmp_path):
    config = dataclasses.replace(SHAPES[name], lora=LoRAConfig(r=2, lora_alpha=2.0))
    model, params = make(config)
    path = save_adapter(model, params, tmp_path / "adapter")
    again, read = load_adapter(Model(SHAPES[name]), without_adapter(params), path)
    assert_equal(read, params)
    assert again.config.lora.r == 2
    modules = json.loads((path / "adapter_config.json").read_text())["target_modules"]
    if name == "experts":
        assert set(modules) == set(again.config.lora.target_modules)
    else:  # the encoder has a gate_proj of its own
        import re

        assert re.fullmatch(modules, "model.language_model.layers.0.mlp.gate_proj")
        assert not re.fullmatch(modules, "model.visual.blocks.0.mlp.gate_proj")


def edit_adapter(directory, **changes):
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'; only 'LORA'"),
        ({"use_dora": True, "bias": "all"}, "not supported: use_dora=True, bias='all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"r": None}, "is no configuration of a LoRA adapter"),
        ({"r": 4}, r"layers.0.self_attn.q_proj.lora_A.weight \[3, 32\] where .* \[4, 32\]"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(adapted, tmp_path, changes, message):
    model, params = adapted
    path = save_adapter(model, params, tmp_path / "adapter")
    edit_adapter(path, **changes)
    with pytest.raises(InputError, match=message):
        load_adapter(Model(TINY), without_adapter(params), path)


def test_tensors_and_scale_of_an_adapter(adapted, tmp_path):
    model, params = adapted
    path = save_adapter(model, params, tmp_path / "adapter")
    edit_adapter(path, use_rslora=True, target_modules=r".*\.(q_proj|o_proj|down_proj)")
    scaled, _ = load_adapter(Model(TINY), without_adapter(params), path)
    assert scaled.config.lora.scale == pytest.approx(8 / 3**0.5)
    tensors = load_file(path / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    tensors["base_model.model.lm_head.lora_A.weight"] = np.ones((3, 32), np.float32)
    save_file(tensors, path / "adapter_model.safetensors")
    with pytest.raises(
        InputError, match=r"missing: .*1.mlp.down_proj.lora_B.* unexpected: .*lm_head"
    ):
        load_adapter(Model(TINY), without_adapter(params), path)
    with pytest.raises(InputError, match=r"no adapter_config\.json in"):
        load_adapter(Model(TINY), params, tmp_path)
    with pytest.raises(InputError, match="the model has no adapter"):
        save_adapter(Model(TINY), params, tmp_path / "other")


@pytest.mark.filterwarnings("ignore")  # of a library that is not ours
def test_peft_and_ours_are_the_same_function(adapted, tmp_path):
    torch = pytest.importorskip("torch", reason="the reference implementation needs torch")
    peft = pytest.importorskip("peft", reason="compares with PEFT where it is installed")
    from transformers import AutoModelForCausalLM

    model, params = adapted
    base = save_pretrained(Model(TINY), without_adapter(params), tmp_path / "base", check=False)
    path = save_adapter(model, params, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    tokens = np.arange(12, dtype=np.int32)[None] * 3
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    positions = jnp.arange(12)[None]
    ids = {"positions": positions, "segment_ids": jnp.ones_like(positions)}
    got = model.unembed(params, model.forward(params, tokens, **ids))
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    again, read = load_adapter(Model(TINY), without_adapter(params), tmp_path / "theirs")
    assert again.config.lora.scale == model.config.lora.scale
    assert_equal(read, params)
