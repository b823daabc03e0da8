"""Plugin of pytest: the option `--impl`, and a line of summary on the functions that were checked.

pytest loads it in every run of everyone who has the package, so it imports nothing until asked to.
"""

import sys

import pytest

ENTRY_POINT = "jaxrl_reason_conformance"
CHECKED, MISSING = "conformance", "conformance: missing"
"""Keys of a test's properties; the value is the name of a function."""


def pytest_addoption(parser, pluginmanager):
    """Declares the option."""
    # pytest refuses a plugin that comes under a second name: by `-p` and from the entry point.
    for name in (ENTRY_POINT, __name__):
        if pluginmanager.get_plugin(name) is None:
            pluginmanager.set_blocked(name)
    parser.getgroup("jaxrl-reason").addoption(
        "--impl",
        metavar="MODULE",
        help="module whose functions `--pyargs jaxrl_reason.conformance` checks",
    )


def pytest_configure(config):
    """Stops with one message when the named module cannot be checked."""
    name = config.getoption("--impl")
    if name is None:
        return
    from jaxrl_reason.conformance.cases import FUNCTIONS
    from jaxrl_reason.conformance.implementation import ImplementationError, load, prepare_devices

    here = str(config.invocation_params.dir)
    if here not in sys.path:
        sys.path.append(here)
    prepare_devices()
    try:
        load(name, FUNCTIONS)
    except ImplementationError as error:
        raise pytest.UsageError(str(error)) from error


# As the outermost wrapper it writes after the list of failures.
@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    """Tells how many functions were checked, which are missing, and which do not conform."""
    yield
    found = {CHECKED: set(), MISSING: set()}
    failed = set()
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for key, name in getattr(report, "user_properties", ()):
                if key in found:
                    found[key].add(name)
                if key == CHECKED and outcome in ("failed", "error"):
                    failed.add(name)
    checked, missing = found.values()
    if not checked and not missing:
        return
    listed = f" ({', '.join(sorted(missing))})" if missing else ""
    terminalreporter.write_line(
        f"conformance of {config.getoption('--impl') or 'jaxrl_reason'}: "
        f"{len(checked)} functions checked, {len(missing)} missing{listed}"
    )
    if failed:
        terminalreporter.write_line(f"not conforming: {', '.join(sorted(failed))}")
