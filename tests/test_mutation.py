"""The mutation check itself; what it says of the conformance suite takes minutes and is slow."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "mutation"
KINDS = {
    *("branch", "comparison", "constant", "detach", "extremum", "operands", "scale", "sign"),
}


@pytest.fixture(scope="module")
def tools():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        names = ("mutants", "reach", "run")
        yield {name: importlib.import_module(name) for name in names}


@pytest.fixture(scope="module")
def everything(tools):
    """Every mutant of every module, with the source of its file."""
    mutants = tools["mutants"]
    return [
        (mutant, (mutants.PACKAGE / mutants.path_of(module)).read_text())
        for module in mutants.modules()
        for mutant in mutants.mutants_of(module, every=True)
    ]


@pytest.mark.parametrize(
    ("expression", "changed"),
    [
        ("a + b", {"a - b"}),
        ("a - b", {"a + b", "((b) - (a))"}),
        ("-a", {"a"}),
        ("(a + b) * c", {"(a + b) / c", "(a - b) * c"}),
        ("jnp.minimum(a, 0.5)", {"jnp.maximum(a, 0.5)", "jnp.minimum(a, 1.0)"}),
        ("jnp.clip(a, b, c)", {"jnp.clip(a, c, b)"}),
        ("np.maximum.accumulate(a)", {"np.minimum.accumulate(a)"}),
        ("a < b", {"a >= b"}),
        ("jnp.where(a, b, c)", {"jnp.where(a, c, b)"}),
        ("jax.lax.stop_gradient(a)", {"(a)"}),
        ("jax.tree.map(stop_gradient, a)", {"jax.tree.map((lambda tree: tree), a)"}),
        ("2 * a", {"3 * a", "2 / a"}),
        # No arithmetic: shapes, axes, indices, text, and what stands in for a divisor.
        ("jnp.zeros((2, 3))", set()),
        ("a.reshape(-1, 3)", set()),
        ("jnp.sum(a, axis=1)", set()),
        ("jnp.sum(a, -1)", set()),
        ("a[1:, -1]", set()),
        ("a.shape[0] + 1", set()),
        ("a == 'text'", set()),
        ("a / jnp.where(b, a, 1)", {"a * jnp.where(b, a, 1)", "a / jnp.where(b, 1, a)"}),
    ],
)
def test_edits_of_an_expression(tools, expression, changed):
    source = f"def f(a, b, c):\n    return {expression}\n"
    mutants = tools["mutants"].sites_of("m", source)
    assert {x.apply(source) for x in mutants} == {source.replace(expression, y) for y in changed}


def test_checks_and_messages_stay(tools):
    source = '''
LIMIT = 8

def f(a, *, c=0.5):
    """Adds 1 + 1."""
    check_number("c", c, at_least=0 + 1)
    if a < 0 - 1:
        raise ValueError(f"{a - 1} below {LIMIT}")
    return a

def check_f(a):
    return a + 1
'''
    (only,) = tools["mutants"].sites_of("m", source)
    assert (only.function, only.kind) == ("f", "constant")
    assert (only.before, only.after) == ("c=0.5", "c=1.0")


def test_there_are_many_mutants_and_always_the_same(tools):
    mutants = tools["mutants"]
    chosen = {module: mutants.mutants_of(module) for module in mutants.modules()}
    assert sum(map(len, chosen.values())) >= 60
    assert {mutant.kind for group in chosen.values() for mutant in group} == KINDS
    assert chosen == {module: mutants.mutants_of(module) for module in mutants.modules()}
    for module, group in chosen.items():
        admitted = {(x.function, x.kind) for x in mutants.mutants_of(module, every=True)}
        assert {(x.function, x.kind) for x in group} == admitted


def dumped(source):
    """The statements of a file, its docstring, and everything that it raises."""
    tree = ast.parse(source)
    raised = [ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return [ast.dump(node) for node in tree.body], ast.get_docstring(tree), raised


def test_a_mutant_differs_in_one_place(tools, everything):
    mutants = tools["mutants"]
    chosen = {mutant for module in mutants.modules() for mutant in mutants.mutants_of(module)}
    originals = {source: dumped(source) for source in {source for _, source in everything}}
    for mutant, source in ((x, source) for x, source in everything if x in chosen):
        changed = mutant.apply(source)
        (before, *same), (after, *still) = originals[source], dumped(changed)
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1, mutant.name
        assert same == still, mutant.name
        end = len(source.encode()) - mutant.end
        assert source.encode()[: mutant.start] == changed.encode()[: mutant.start]
        assert source.encode()[-end:] == changed.encode()[-end:]


def test_equivalent_mutants_exist_and_have_a_reason(tools, everything):
    names = {mutant.name for mutant, _ in everything}
    equivalents = tools["run"].equivalents()
    assert set(equivalents) <= names, set(equivalents) - names
    assert all(equivalents.values())


def test_who_is_asked(tools):
    reached = tools["reach"].reached
    assert {"pfab_advantages", "group_advantages"} <= reached("arrays", "masked_moments")
    assert "dpo_loss" not in reached("arrays", "masked_moments")
    assert "chunked_token_logprobs" in reached("logprobs", "_blockwise_gradients")


def test_a_sample_is_spread_over_modules(tools, everything):
    mutants, sample = [mutant for mutant, _ in everything], tools["run"].sample
    chosen = sample(mutants, 12)
    assert chosen == sample(mutants[::-1], 12)
    assert len({mutant.module for mutant in chosen}) == 12
    assert chosen == sample(mutants, 20)[:12]


@pytest.mark.slow
def test_a_sample_of_mutants_is_caught():
    command = [sys.executable, FOLDER / "run.py", "--sample", "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| all | 12 | 12 | 0 | 0 |" in done.stdout
