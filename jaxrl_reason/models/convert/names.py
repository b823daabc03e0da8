"""Where every parameter stands in a Hugging Face checkpoint.

A checkpoint holds a matrix of every layer (and expert) as a tensor of its own, [outputs, inputs],
with heads and their channels on one axis. Ours stack layers, keep heads apart, and put inputs
first. A `Weight` says both sides for one parameter, and serves reading and writing.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

from jaxrl_reason.models.config import ModelConfig
from jaxrl_reason.models.lora import MODULES
from jaxrl_reason.models.vision_config import VisionConfig
from jaxrl_reason.models.vision_names import Place, VisionTensor, vision_tensors

TreePath = tuple[str, ...]
Sizes = tuple[int, ...]

NORMS = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
}
SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weight:
    """One parameter, and the tensors that hold it."""

    path: TreePath
    """Of the parameter, from the root of the tree."""
    name: str
    """Of its tensors, with one `{}` for each leading axis of the parameter (layers, experts)."""
    stack: Sizes
    """Sizes of those leading axes; one tensor for each of their indices."""
    shape: Sizes
    """Of a tensor in the file."""
    split: Sizes
    """Of the parameter's part of a tensor with heads taken apart: its numbers in their order."""
    order: Sizes
    """For each axis of the parameter behind the leading ones, its axis in `split`."""
    part: int = 0
    """Which of the parameters in the tensor it is."""
    parts: int = 1
    """How many parameters share the tensor, equal ones, one below the other."""

    @property
    def parameter_shape(self) -> Sizes:
        """Shape of the parameter."""
        return (*self.stack, *(self.split[axis] for axis in self.order))

    def tensors(self) -> Iterator[str]:
        """Names of all its tensors, the last leading axis fastest."""
        for index in itertools.product(*map(range, self.stack)):
            yield self.name.format(*index)

    def tensors_of(self, layer: int) -> list[str]:
        """Names of the tensors of one layer: one, or one for each expert."""
        rest = itertools.product(*map(range, self.stack[1:]))
        return [self.name.format(layer, *more) for more in rest]


def parts_of(weights: Iterable[Weight]) -> Iterator[tuple[list[Weight], int]]:
    """What is moved at once: a parameter without layers, or a layer of all that have as many."""
    groups: dict[Any, list[Weight]] = {}
    for weight in weights:
        key = (weight.path[0], weight.stack[0]) if weight.stack else weight.path
        groups.setdefault(key, []).append(weight)
    for group in groups.values():
        for layer in range(group[0].stack[0] if group[0].stack else 1):
            yield group, layer


def vector(path: TreePath, name: str, sizes: Sizes, stack: Sizes = ()) -> Weight:
    """A parameter whose axes lie as in the file, on one axis there: a scale, a bias."""
    shape = (math.prod(sizes),)
    order = tuple(range(len(sizes)))
    return Weight(path=path, name=name, stack=stack, shape=shape, split=sizes, order=order)


def table(path: TreePath, name: str, sizes: Sizes, stack: Sizes = ()) -> Weight:
    """A parameter that lies as in the file: an embedding."""
    order = tuple(range(len(sizes)))
    return Weight(path=path, name=name, stack=stack, shape=sizes, split=sizes, order=order)


def matrix(path: TreePath, name: str, inputs: Sizes, outputs: Sizes, stack: Sizes = ()) -> Weight:
    """A parameter [*inputs, *outputs] that is [outputs, inputs] in the file: a projection."""
    count = len(outputs)
    return Weight(
        path=path,
        name=name,
        stack=stack,
        shape=(math.prod(outputs), math.prod(inputs)),
        split=(*outputs, *inputs),
        order=(*range(count, count + len(inputs)), *range(count)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """A projection of the decoder: kernel, bias where it has one, and the place of an adapter."""

    path: TreePath
    module: str
    """Hugging Face's name, without `.weight`."""
    inputs: Sizes
    outputs: Sizes
    stack: Sizes
    bias: bool = False

    def weights(self) -> list[Weight]:
        """Kernel and bias."""
        kernel, bias = (*self.path, "kernel"), (*self.path, "bias")
        found = [matrix(kernel, f"{self.module}.weight", self.inputs, self.outputs, self.stack)]
        if self.bias:
            found.append(vector(bias, f"{self.module}.bias", self.outputs, self.stack))
        return found

    def adapter(self, rank: int) -> list[Weight]:
        """The two leaves of an adapter, by PEFT's names."""
        a, b = (*self.path, "lora_a"), (*self.path, "lora_b")
        return [
            matrix(a, f"{self.module}.lora_A.weight", self.inputs, (rank,), self.stack),
            matrix(b, f"{self.module}.lora_B.weight", (rank,), self.outputs, self.stack),
        ]


def decoder_linears(config: ModelConfig, prefix: str) -> list[Linear]:
    """The projections of the decoder; `prefix` is that of its names, such as `model.`."""
    c = config
    d, h, stack = (c.hidden_size,), c.head_dim, (c.num_hidden_layers,)
    heads, kv = (c.num_attention_heads, h), (c.num_key_value_heads, h)
    layer = f"{prefix}layers.{{}}."

    def attention(name, inputs, outputs, bias):
        return Linear(
            path=("layers", "attention", name),
            module=f"{layer}self_attn.{MODULES[name]}",
            inputs=inputs,
            outputs=outputs,
            stack=stack,
            bias=bias,
        )

    def mlp(name):
        experts = c.num_experts > 0
        wide = (c.moe_intermediate_size if experts else c.intermediate_size,)
        return Linear(
            path=("layers", "moe" if experts else "mlp", name),
            module=f"{layer}mlp.{'experts.{}.' if experts else ''}{MODULES[name]}",
            inputs=wide if name == "down" else d,
            outputs=d if name == "down" else wide,
            stack=(*stack, c.num_experts) if experts else stack,
        )

    return [
        attention("q", d, heads, c.qkv_bias),
        attention("k", d, kv, c.qkv_bias),
        attention("v", d, kv, c.qkv_bias),
        attention("o", heads, d, False),
        *map(mlp, ("gate", "up", "down")),
    ]


def decoder_weights(config: ModelConfig, prefix: str, head: str) -> list[Weight]:
    """The parameters of the decoder.

    Args:
        config: of the model.
        prefix: of the decoder's names, such as `model.`.
        head: name of the output head, where it is a parameter of its own.
    """
    c = config
    stack, width = (c.num_hidden_layers,), (c.hidden_size,)
    layer = f"{prefix}layers.{{}}."
    norms = SANDWICH_NORMS if c.sandwich_norms else NORMS
    weights = [
        table(("embedding",), f"{prefix}embed_tokens.weight", (c.vocab_size, c.hidden_size)),
        vector(("final_norm", "scale"), f"{prefix}norm.weight", width),
    ]
    if not c.tie_word_embeddings:
        weights.append(table(("head",), head, (c.vocab_size, c.hidden_size)))
    for ours, theirs in norms.items():
        weights.append(vector(("layers", ours, "scale"), f"{layer}{theirs}.weight", width, stack))
    if c.qk_norm:
        for name in ("q_norm", "k_norm"):
            path = ("layers", "attention", name, "scale")
            weights.append(vector(path, f"{layer}self_attn.{name}.weight", (c.head_dim,), stack))
    if c.num_experts:
        path = ("layers", "moe", "router", "kernel")
        weights.append(matrix(path, f"{layer}mlp.gate.weight", width, (c.num_experts,), stack))
    for linear in decoder_linears(c, prefix):
        weights.extend(linear.weights())
    return weights


def vision_weights(config: VisionConfig, prefix: str) -> list[Weight]:
    """The parameters of the vision encoder; `prefix` is that of its names, such as `visual.`."""
    stacks = {"layers": (config.depth,), "deepstack": (len(config.deepstack_visual_indexes),)}
    return [
        _vision_weight(tensor, part, place, stacks.get(place.path[0], ()), prefix)
        for tensor in vision_tensors(config)
        for part, place in enumerate(tensor.places)
        if not place.index  # one `Weight` for all layers
    ]


def _vision_weight(
    tensor: VisionTensor, part: int, place: Place, stack: Sizes, prefix: str
) -> Weight:
    name = prefix + tensor.name.removeprefix("visual.")
    parts, sizes, order = len(tensor.places), place.shape, tuple(range(len(place.shape)))
    if place.path[-1] == "kernel":
        rows = tensor.shape[0] // parts
        inputs = next(i for i in range(1, len(sizes)) if math.prod(sizes[i:]) == rows)
        count = len(sizes) - inputs
        sizes = (*sizes[inputs:], *sizes[:inputs])
        order = (*range(count, count + inputs), *range(count))
    return Weight(
        path=("vision", *place.path),
        name=name.replace(".0.", ".{}.", 1) if stack else name,
        stack=stack,
        shape=tensor.shape,
        split=sizes,
        order=order,
        part=part,
        parts=parts,
    )
