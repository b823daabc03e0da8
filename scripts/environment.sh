# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh, from the root of the repository.
# make_environment run|test: puts the package and the pinned versions into .venv, or reuses them.

# Whether a Python is 3.11 or newer and can make virtual environments.
suitable() {
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the first suitable Python. $PYTHON, when set, is the only candidate.
find_python() {
    local candidates=(python3.13 python3.12 python3.11 python3) candidate
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if suitable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "No Python 3.11 or newer with the venv module found; tried: ${candidates[*]}." >&2
    echo "Install one (Debian, Ubuntu: apt install python3 python3-venv), or name one:" >&2
    echo "    PYTHON=/path/to/python3.12 bash $0" >&2
    return 1
}

version() {
    "$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null
}

# Whether .venv is there, and of the version of $PYTHON when that is set.
reusable() {
    suitable .venv/bin/python || return
    [ -z "${PYTHON:-}" ] || [ "$(version .venv/bin/python)" = "$(version "$PYTHON")" ]
}

# What an installation depends on. The folder counts: an editable install points to it.
fingerprint() {
    { pwd; cat pyproject.toml constraints.txt; } | cksum
}

make_environment() {
    local purpose=$1 target=. stamp=.venv/installed-$1 python
    [ "$purpose" = run ] || target=".[$purpose]"
    if reusable && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ]; then
        return
    fi
    # Without pip it is what an interrupted `python -m venv` leaves behind.
    if ! { reusable && .venv/bin/python -m pip --version >/dev/null 2>&1; }; then
        python=$(find_python)
        echo "making .venv with $("$python" --version)"
        "$python" -m venv --clear .venv
    fi
    echo "installing $target with the versions of constraints.txt (minutes the first time)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --editable "$target" --constraint constraints.txt
    fingerprint >"$stamp"
    # Every installation holds what a run needs.
    [ "$purpose" = run ] || cp "$stamp" .venv/installed-run
}
