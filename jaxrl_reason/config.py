"""From YAML and `key=value` overrides to frozen, validated configurations.

A stage derives its configuration from `Config`; fields may be scalars, lists, other configs, unions
told apart by `kind`, dictionaries of configs, or frozen standard-library dataclasses, which need
nothing of pydantic: they inherit the strictness of the config that holds them. The sentence under a
field is its help. Everything a user can get wrong is one `InputError` naming the dotted key, what
was got and what is allowed.

A field whose default is a nested config keeps the rest of that default when a user sets only some
of its keys, in a file as well as in an override.
"""

import copy
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import pydantic
import yaml
from pydantic.json_schema import GenerateJsonSchema

from jaxrl_reason.errors import InputError, nearest

Schema = Mapping[str, Any]
ConfigType = TypeVar("ConfigType", bound="Config")

_MISSING = object()
_TYPE_NAMES = {"integer": "int", "number": "float", "string": "str", "boolean": "bool"}
_BOUNDS = {
    "exclusiveMinimum": ">",
    "minimum": ">=",
    "exclusiveMaximum": "<",
    "maximum": "<=",
    "multipleOf": "a multiple of",
    "minLength": "length >=",
    "minItems": "length >=",
}


class Config(pydantic.BaseModel):
    """A frozen configuration; unknown keys and wrong types are errors."""

    model_config = pydantic.ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, apply `key=value` overrides, and validate the result."""
        raw = apply_overrides(cls, cls.within(load_yaml(path)), overrides)
        source = f"{path} with {' '.join(overrides)}" if overrides else str(path)
        return validate(cls, raw, source)

    @classmethod
    def within(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The part of a file that is a configuration of this class: all of it."""
        return raw


@dataclasses.dataclass(frozen=True, kw_only=True)
class FieldLine:
    """One line of help: a key that may stand in the YAML file or in an override."""

    path: str
    """Dotted key; `<name>` and `<index>` stand for a name or number that the user chooses."""
    type: str
    """What the key accepts."""
    default: str
    """The default as YAML, `required`, or `(below)` when the nested keys carry the defaults."""
    help: str
    """The sentence under the field."""
    kind: str = ""
    """The `kind` for which the key exists, such as `sft` or, nested, `sft/file`; empty for all."""


# Reading YAML


class _Loader(yaml.SafeLoader):
    """YAML 1.2: `1e-4` is a float, `yes` and `1:30` are strings, a key is given once."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[Any]]] = {}

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Later, the keys that `<<` merges stand among the others, which may override them.
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                raise InputError(f"line {line}: a key must be a string, quote {key_node.value!r}")
            if key_node.value in lines:
                first = lines[key_node.value]
                raise InputError(
                    f"line {line}: key {key_node.value!r} was already given on line {first}"
                )
            lines[key_node.value] = line
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = node.value.replace("_", "")
        # YAML 1.1 reads 010 as octal; 1.2 and every user read ten.
        return int(text, 0) if text.lstrip("+-")[:2] in ("0x", "0o") else int(text)


_FLOAT = r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
for _tag, _pattern in (
    ("bool", r"true|True|TRUE|false|False|FALSE"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+"),
    ("float", rf"{_FLOAT}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("null", r"~|null|Null|NULL|"),
    ("merge", r"<<"),
):
    # First characters `None`: the pattern is tried on every plain scalar.
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None
    )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def _parse_yaml(text: str) -> Any:
    """Parse one YAML document; raises `InputError` with the line of the mistake."""
    try:
        return _unshared(yaml.load(text, Loader=_Loader))  # a SafeLoader: plain values only
    except RecursionError as error:
        raise InputError("not valid as a config: an anchor contains itself") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{place}not valid YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise InputError(f"not valid YAML: {error}") from error


def _unshared(value: Any) -> Any:
    """A copy in which each alias of an anchor is a value of its own, to be changed alone."""
    if isinstance(value, dict):
        return {name: _unshared(item) for name, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; raises `InputError` with the line of a mistake or a duplicate key."""
    path = Path(path)
    try:
        raw = _parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        beside = path.parent.glob("*.y*ml") if path.parent.is_dir() else ()
        hint = nearest(path.name, [other.name for other in beside])
        raise InputError(f"{path}: no such config file; in {path.parent}: {hint}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start}); re-encode it") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else _show(raw)
        raise InputError(f"{path}: got {found}; a config is a mapping of `key: value` lines")
    return raw


# Walking the JSON schema, which treats configs, dataclasses, unions and dictionaries alike


class _SchemaWithFactories(GenerateJsonSchema):
    def get_default_value(self, schema: Any) -> Any:
        if "default_factory" in schema and not schema.get("default_factory_takes_data", False):
            return schema["default_factory"]()
        return super().get_default_value(schema)


def _schema(cls: type[Config]) -> dict[str, Any]:
    return cls.model_json_schema(schema_generator=_SchemaWithFactories)


def _options(node: Schema) -> list[Schema]:
    return [option for option in node.get("anyOf", ()) if option.get("type") != "null"]


def _follow(root: Schema, node: Schema) -> Schema:
    """Dereference, and read `X | None` as X."""
    while True:
        if "$ref" in node:
            node = root["$defs"][node["$ref"].rsplit("/", 1)[1]]
        elif len(options := _options(node)) == 1:
            node = options[0]
        else:
            return node


def _union(node: Schema) -> tuple[str, Mapping[str, Schema]]:
    """The key that tells the members of a union apart and the members; none for other nodes."""
    if "discriminator" not in node:
        return "", {}
    mapping = node["discriminator"]["mapping"]
    # pydantic sorts the mapping; `oneOf` has the order of declaration.
    ordered = sorted(mapping, key=lambda kind: node["oneOf"].index({"$ref": mapping[kind]}))
    return node["discriminator"]["propertyName"], {k: {"$ref": mapping[k]} for k in ordered}


def _choose(root: Schema, node: Schema, value: Any) -> Schema:
    """Follow `node`, into the member of a `kind` union that `value` asks for where it exists."""
    node = _follow(root, node)
    name, kinds = _union(node)
    kind = value.get(name) if isinstance(value, dict) else None
    return _follow(root, kinds[kind]) if isinstance(kind, str) and kind in kinds else node


def _child(node: Schema, key: str | int) -> Schema | None:
    """The schema below `key` of a followed node, or None where that key cannot be."""
    if "properties" in node:
        return node["properties"].get(key)
    if isinstance(node.get("additionalProperties"), Mapping):
        return node["additionalProperties"]
    if node.get("type") == "array" and str(key).isdecimal():
        fixed = node.get("prefixItems", ())
        return fixed[int(key)] if int(key) < len(fixed) else node.get("items")
    return None


# Overrides and defaults


def apply_overrides(
    cls: type[Config], raw: Mapping[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """Return a copy of `raw` with each `dotted.key=value` set, the value read as YAML.

    Numbers in the path index lists. Types are left to `validate`. Raises `InputError` on a
    malformed override and on a path that `cls` does not have, with the nearest keys.
    """
    root = _schema(cls)
    result = copy.deepcopy(dict(raw))
    for override in overrides:
        path, separator, text = override.partition("=")
        parts = path.strip().split(".")
        if not separator or not all(parts):
            raise InputError(f"override {override!r}: write it as dotted.key=value")
        try:
            _set(root, result, parts, _parse_yaml(text))
        except InputError as error:
            raise InputError(f"override {override!r}: {error}") from error
    return result


def _set(root: Schema, raw: dict[str, Any], parts: Sequence[str], value: Any) -> None:
    container: Any = raw
    node: Schema = root
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        node = _choose(root, node, container)
        above = ".".join(parts[:depth])
        if isinstance(container, list):
            if not part.isdecimal() or int(part) >= len(container):
                raise InputError(f"{above} has {len(container)} entries; got index {part!r}")
            key: Any = int(part)
        elif isinstance(container, dict):
            key = part
            _check_key(root, node, container, parts[: depth + 1], last=last)
        else:
            raise InputError(f"{above} is {_show(container)}, which has no keys")
        if last:
            container[key] = value
            return
        node = _child(node, part) or {}
        if isinstance(container, dict) and container.get(key) is None:
            below = _follow(root, node)
            closed = "properties" in below or "discriminator" in below  # completed by _fill
            container[key] = {} if closed else copy.deepcopy(node.get("default")) or {}
        container = container[key]


def _check_key(
    root: Schema, node: Schema, container: Mapping[str, Any], parts: Sequence[str], *, last: bool
) -> None:
    key = parts[-1]
    if "properties" in node:
        if key not in node["properties"]:
            raise InputError(f"unknown key {'.'.join(parts)}; {nearest(key, node['properties'])}")
        return
    below = _follow(root, _child(node, key) or {})
    if key not in container and not last and ("discriminator" in below or "properties" in below):
        # Setting one key of an absent entry is a misspelt name, not a wish for a new entry.
        raise InputError(f"there is no {'.'.join(parts)}; {nearest(key, container)}")


def _fill(root: Schema, node: Schema, value: Any, default: Any = None) -> Any:
    """Complete the nested configs of `value` from the default of the field that holds them."""
    node = _follow(root, node)
    if isinstance(value, list):
        return [_fill(root, _child(node, index) or {}, item) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "discriminator" in node and isinstance(default, dict):
        name = node["discriminator"]["propertyName"]
        if value.setdefault(name, default[name]) != default[name]:
            default = None
    node = _choose(root, node, value)
    # A free dictionary is replaced as a whole: its keys are the user's, not the schema's.
    inherited = default if isinstance(default, dict) and "properties" in node else {}
    filled = dict(inherited)
    for key, item in value.items():
        below = _child(node, key) or {}
        filled[key] = _fill(root, below, item, inherited.get(key, below.get("default")))
    return filled


# Validation and its messages


def validate(cls: type[ConfigType], raw: Mapping[str, Any], source: str) -> ConfigType:
    """Build `cls` from plain values; `source` (a file name) heads the message of an `InputError`.

    The message lists every problem at once, each by its dotted key.
    """
    root = _schema(cls)
    # JSON is the input for which pydantic is strict about scalars yet takes lists for tuples.
    text = json.dumps(_fill(root, root, copy.deepcopy(dict(raw))), default=str)
    try:
        return cls.model_validate_json(text)
    except pydantic.ValidationError as error:
        # One wrong value of a union is reported once for each member; one line is enough.
        problems = list(dict.fromkeys(_problem(root, item) for item in error.errors()))
    if len(problems) == 1:
        raise InputError(f"{source}: {problems[0]}")
    raise InputError("\n  - ".join([f"{source}: {len(problems)} problems", *problems]))


def _problem(root: Schema, error: Mapping[str, Any]) -> str:
    if error["loc"][-1:] == ("[key]",):
        _, mapping, path = _locate(root, error["loc"][:-2])
        key, names = error["loc"][-2], _follow(root, mapping)["propertyNames"]
        return f"{path}.{key}: unknown key; {nearest(str(key), names.get('enum', ()))}"
    parent, node, path = _locate(root, error["loc"])
    got, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            known = parent.get("properties", {})
            return f"{path}: unknown key; {nearest(str(error['loc'][-1]), known)}"
        case "missing":
            return f"{path}: required but missing; needs {_type_text(root, node)}"
        case "union_tag_not_found":
            name, kinds = _union(_follow(root, node))
            return f"{path}.{name}: required but missing; allowed: {', '.join(kinds)}"
        case "union_tag_invalid":
            name, kinds = _union(_follow(root, node))
            hint = nearest(context["tag"], kinds)
            listed = "" if hint.startswith("allowed") else f" allowed: {', '.join(kinds)}"
            return f"{path}.{name}: got {_show(got[name])}; {hint}{listed}"
        case "value_error" | "assertion_error":
            return f"{path}: {context['error']}" if path else str(context["error"])
    return f"{path}: got {_show(got)}; needs {_type_text(root, node)}"


def _locate(root: Schema, location: Sequence[str | int]) -> tuple[Schema, Schema, str]:
    """The schema above and at an error, and its dotted key without pydantic's union labels."""
    parent: Schema = {}
    node: Schema = root
    path: list[str] = []
    for index, part in enumerate(location):
        here, following = _follow(root, node), location[index + 1 : index + 2]
        if "discriminator" in here:
            node = _union(here)[1][str(part)]
        elif options := _options(here):
            members = [_follow(root, option) for option in options]
            fitting = [member for member in members if following and _child(member, *following)]
            node = fitting[0] if fitting else here
        else:
            path.append(str(part))
            parent, node = here, _child(here, part) or {}
    return parent, node, ".".join(path)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _type_text(root: Schema, node: Schema) -> str:
    """What a node accepts, such as `int > 0`, `"long" | "short"` or `list of str`."""
    if "anyOf" in node:
        return " | ".join(_type_text(root, option) for option in node["anyOf"])
    node = _follow(root, node)
    if "discriminator" in node:
        return "a mapping with {}: {}".format(_union(node)[0], " | ".join(_union(node)[1]))
    if "enum" in node or "const" in node:
        return " | ".join(_show(value) for value in node.get("enum", [node.get("const")]))
    bounds = ", ".join(f"{word} {node[key]}" for key, word in _BOUNDS.items() if key in node)
    if node.get("type") == "object":
        values = node.get("additionalProperties")
        text = f" of names to {_type_text(root, values)}" if isinstance(values, Mapping) else ""
        return f"a mapping{text}"
    if node.get("type") == "array":
        fixed = node.get("prefixItems")
        if fixed is not None:
            return f"[{', '.join(_type_text(root, item) for item in fixed)}]"
        text = f"list of {_type_text(root, node.get('items', {}))}"
        return f"{text}, {bounds}" if bounds else text
    kind = str(node.get("type", "any value"))
    name = _TYPE_NAMES.get(kind, kind)
    return f"{name} {bounds}" if bounds else name


# Help


def describe(cls: type[Config]) -> list[FieldLine]:
    """Every key that `cls` accepts, in the order of declaration, nested keys after their parent."""
    root = _schema(cls)
    return list(_describe(root, root, "", {}, "", ()))


def _describe(
    root: Schema, node: Schema, path: str, default: Any, kind: str, seen: tuple[Schema, ...]
) -> Iterator[FieldLine]:
    node = _follow(root, node)
    if node in seen:  # a config that contains itself is described once
        return
    seen = (*seen, node)
    dot = f"{path}." if path else ""
    if "properties" in node:
        inherited = default if isinstance(default, dict) else {}
        for name, field in node["properties"].items():
            value = inherited.get(name, field.get("default", _MISSING))
            # pydantic leaves out a description that is also that of the nested class.
            text = field.get("description", _follow(root, field).get("description", ""))
            nested = list(_describe(root, field, dot + name, value, kind, seen))
            yield FieldLine(
                path=dot + name,
                type=_type_text(root, field),
                default=_default_text(value, nested=bool(nested)),
                help=" ".join(text.split()),
                kind=kind,
            )
            yield from nested
    elif "discriminator" in node:
        name, kinds = _union(node)
        for member, reference in kinds.items():
            chosen = isinstance(default, dict) and default.get(name) == member
            below = f"{kind}/{member}" if kind else member
            yield from _describe(root, reference, path, default if chosen else {}, below, seen)
    elif isinstance(values := node.get("additionalProperties"), Mapping):
        yield from _describe(root, values, f"{dot}<name>", {}, kind, seen)
    elif isinstance(items := node.get("items"), Mapping):
        yield from _describe(root, items, f"{dot}<index>", {}, kind, seen)
    else:
        for option in _options(node):
            yield from _describe(root, option, path, default, kind, seen)


def _default_text(value: Any, *, nested: bool) -> str:
    if value is _MISSING:
        return "required"
    return "(below)" if nested and value else _show(value)


# Saving


def to_json(config: Config) -> dict[str, Any]:
    """The resolved config as plain JSON values; `validate` turns it back into an equal config."""
    return config.model_dump(mode="json")


def config_hash(config: Config) -> str:
    """Sixteen hexadecimal digits that depend on the resolved values only, not on their order."""
    return hash_json(to_json(config))


def hash_json(value: Any) -> str:
    """`config_hash` of plain JSON values."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
