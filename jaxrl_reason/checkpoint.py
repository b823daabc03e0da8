"""Checkpoints on disk, and the only door to Orbax.

    runs/<name>/<stage>/checkpoints/<step>/params   the model, which the next stage restores alone
                                          /state    optimiser state, step counter, ...
                                          /meta     meta.json: config, hashes, data cursor, parent
                                          /files.json   sizes of the files, to notice damage

A step directory gets its final name by one rename after everything in it has been written, so a
save that was killed leaves nothing that `latest` could find. Every process of a multi-host run
calls `Checkpoints` and the restoring functions; the directory must be on storage they share.

A checkpoint's `parent` is stored relative to the run's directory when it lies inside, so a run can
be moved; `read_meta` gives it back as an absolute path.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import jax
import numpy as np

from jaxrl_reason import files
from jaxrl_reason.errors import InputError, StorageError, nearest
from jaxrl_reason.processes import gather, is_first

# Orbax is imported where it is called: it adds half again to the time that importing jax takes, and
# reading `meta` or printing `--help` has no use for it.

Tree = TypeVar("Tree")

_ITEMS = ("params", "state", "meta")
_META_FILE = "meta.json"
_FILES_FILE = "files.json"
# Directories of a save and of a deletion that are not over.
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_DELETED = "*.deleted"

logger = logging.getLogger(__name__)


class DamagedCheckpointError(InputError):
    """Files of a checkpoint are missing or unreadable; an older checkpoint may still be sound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A whole checkpoint in memory."""

    step: int
    path: Path
    params: Any
    state: Any
    meta: dict[str, Any]


class Checkpoints:
    """Writes the checkpoints of one stage in the background and deletes the oldest.

    `save` copies the arrays to host memory and returns, so the caller may donate them; one save is
    written at a time. `keep` is the number of newest checkpoints that stay, None for all; whatever
    waits for storage is done `within` a context, such as that of a deadline. Raises
    `InputError` where nothing can be written in `directory`, and `StorageError` where writing fails
    later; checkpoints that are complete stay.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int | None = None,
        within: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    ):
        import orbax.checkpoint as ocp

        if keep is not None and keep < 1:
            raise InputError(f"keep={keep} would delete the newest checkpoint; use 1 or more")
        self.directory = _absolute(directory)
        self.keep = keep
        self._within = within
        _check_writable(self.directory)
        logging.getLogger("absl").addFilter(_is_not_told_again)  # the same filter counts once
        registry = ocp.handlers.create_default_handler_registry(
            params=ocp.StandardCheckpointHandler(),
            state=ocp.StandardCheckpointHandler(),
            meta=ocp.JsonCheckpointHandler(_META_FILE),
        )
        self._writer = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(handler_registry=registry),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._record_files),
        )

    def save(self, step: int, *, params: Any, state: Any, meta: Mapping[str, Any]) -> None:
        """Start writing checkpoint `step`; an error of the writing is raised by the next call.

        Args:
          step: number of the checkpoint; saving one that exists is an `InputError`.
          params: tree of arrays.
          state: tree of arrays, possibly without any.
          meta: JSON values; `parent`, if there, is the path of a step directory or None.
        """
        import orbax.checkpoint as ocp

        self.wait()
        path = self.directory / str(step)
        if path.exists():
            raise InputError(f"checkpoint {path} exists already; resume from it or remove it")
        if is_first():
            with self._told():
                for pattern in (_UNFINISHED, _DELETED):  # left behind by a run that was killed
                    for leftover in self.directory.glob(pattern):
                        shutil.rmtree(leftover)
        # Threads of Orbax would wait for minutes for folders that it was not allowed to make.
        with self._told(), tempfile.TemporaryDirectory(dir=self.directory):
            pass
        items = {"params": ocp.args.StandardSave(_nested(params, "params"))}
        if jax.tree.leaves(state):  # Orbax refuses to write an empty tree
            items["state"] = ocp.args.StandardSave(_nested(state, "state"))
        stored = ocp.args.JsonSave(_storable(meta, self.directory))
        with self._told():
            self._writer.save(path, args=ocp.args.Composite(**items, meta=stored))

    def wait(self) -> None:
        """Block until the last save is complete, then delete what `keep` does not cover."""
        with self._told():
            self._writer.wait_until_finished()
        if self.keep is None or not is_first():
            return
        with (
            self._within(),
            files.storing(f"{self.directory}, of which old checkpoints are deleted,"),
        ):
            for step in steps(self.directory)[: -self.keep]:
                # Renamed first: a deletion that is killed must not leave half a checkpoint behind.
                doomed = (self.directory / str(step)).rename(self.directory / f"{step}.deleted")
                shutil.rmtree(doomed)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Within, which may take no longer than it may, what storage refuses is a sentence."""
        try:
            with self._within():
                yield
        except jax.errors.JaxRuntimeError:
            raise  # the device's trouble
        except Exception as error:  # Orbax raises many kinds, from several threads
            *_, root = _causes(error)
            reason = str(root).splitlines()[0][:600] if str(root) else type(root).__name__
            last = latest(self.directory)
            kept = "there is none yet" if last is None else f"the last one is {last}"
            raise StorageError(
                f"a checkpoint could not be written to {self.directory}: {reason}; {kept}"
            ) from error

    def _record_files(self) -> None:
        # Orbax calls this when all processes have written, before the rename that ends the save.
        for unfinished in self.directory.glob(_UNFINISHED):
            files = [file for item in _ITEMS for file in (unfinished / item).rglob("*")]
            sizes = {
                file.relative_to(unfinished).as_posix(): file.stat().st_size
                for file in sorted(files)
                if file.is_file()
            }
            (unfinished / _FILES_FILE).write_text(json.dumps(sizes), encoding="utf-8")

    def close(self) -> None:
        """Wait for the last save and stop the background thread."""
        try:
            self.wait()
        finally:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def save(
    directory: str | Path,
    step: int,
    *,
    params: Any,
    state: Any,
    meta: Mapping[str, Any],
    keep: int | None = None,
) -> Path:
    """Write one checkpoint, wait until it is complete, and return its path; see `Checkpoints`."""
    with Checkpoints(directory, keep=keep) as checkpoints:
        checkpoints.save(step, params=params, state=state, meta=meta)
    return checkpoints.directory / str(step)


# Finding checkpoints


def steps(directory: str | Path) -> list[int]:
    """The complete checkpoints in a directory, oldest first; none where it does not exist."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def latest(directory: str | Path) -> int | None:
    """The newest complete checkpoint in a directory, or None."""
    return max(steps(directory), default=None)


def find(path: str | Path) -> Path:
    """The step directory that `path` means: itself, or the newest of a stage or its checkpoints."""
    path = _absolute(path)
    if path.name.isdecimal() and path.is_dir():
        return path
    for directory in (path, path / "checkpoints"):
        if (step := latest(directory)) is not None:
            return directory / str(step)
    hint = ""
    if not path.exists():
        parent = next(parent for parent in path.parents if parent.is_dir())
        name = path.relative_to(parent).parts[0]
        hint = f"; {parent} has no {name!r}, {nearest(name, os.listdir(parent))}"
    raise InputError(f"no checkpoint at {path}; give runs/<name>/<stage>/checkpoints/<step>{hint}")


def read_meta(path: str | Path) -> dict[str, Any]:
    """The `meta` of a step directory, its `parent` as an absolute path.

    Raises `DamagedCheckpointError` where it cannot be read.
    """
    path = find(path)
    try:
        meta = json.loads((path / "meta" / _META_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, "meta", error) from error
    if meta.get("parent") is not None:
        meta["parent"] = str(_absolute(_run_directory(path.parent) / meta["parent"]))
    return meta


def lineage(path: str | Path) -> list[dict[str, Any]]:
    """The metas of a checkpoint and its ancestors, newest first, each with its `path`.

    An ancestor that is gone or unreadable ends the list with its `path` and an `error`.
    """
    entries: list[dict[str, Any]] = []
    following: str | None = str(find(path))
    while following is not None:
        if any(entry["path"] == following for entry in entries):
            raise InputError(f"checkpoint {following} is its own ancestor; its `parent` is wrong")
        try:
            entries.append({"path": following, **read_meta(following)})
        except InputError as error:
            if not entries:
                raise
            entries.append({"path": following, "error": str(error)})
        following = entries[-1].get("parent")
    return entries


# Restoring


def restore_params(path: str | Path, like: Tree) -> Tree:
    """Restore the parameters alone, straight into the shardings of `like`.

    Args:
      path: what `find` takes.
      like: tree of `jax.ShapeDtypeStruct` or arrays, whose values are not used. A structure without
        a sharding goes to this process's first device, a NumPy array stays NumPy.

    Raises:
      InputError: shapes, dtypes or keys differ; the message lists all of them.
      DamagedCheckpointError: files are missing or unreadable.
    """
    path = find(path)
    _check_files(path, ("params",))
    return _restore_item(path, "params", like)


def restore(path: str | Path, *, params: Any, state: Any) -> Restored:
    """Restore a whole checkpoint into the shardings of `params` and `state`; see `restore_params`.

    What is restored has the bits, dtypes and shapes that were saved, on any number of devices.
    """
    path = find(path)
    _check_files(path, _ITEMS)
    return Restored(
        step=int(path.name),
        path=path,
        params=_restore_item(path, "params", params),
        state=_restore_item(path, "state", state),
        meta=read_meta(path),
    )


def latest_valid(directory: str | Path, *, params: Any, state: Any) -> Restored | None:
    """Restore the newest checkpoint that is not damaged; None where there is no checkpoint.

    A damaged one is reported by a warning and renamed to `<step>.damaged-<time>`, which frees its
    number; so is a first one that has none before it. Raises `InputError` where several checkpoints
    are damaged and none is sound, which no broken save explains, or where one does not fit.
    """
    directory = _absolute(directory)
    damaged: list[Path] = []
    for step in reversed(steps(directory)):
        path = directory / str(step)
        restored = None
        try:
            restored = restore(path, params=params, state=state)
        except DamagedCheckpointError as error:
            logger.warning("%s; falling back to what was there before it", error)
        if all(gather(restored is not None)):
            _put_aside(damaged)
            return restored
        damaged.append(path)
    if len(damaged) > 1:
        raise InputError(f"every checkpoint in {directory} is damaged; remove it to start afresh")
    _put_aside(damaged)
    return None


def is_sound(path: str | Path) -> bool:
    """Whether all files of a step directory are as long as they were written."""
    try:
        _check_files(find(path), _ITEMS)
        read_meta(path)
    except DamagedCheckpointError:
        return False
    return True


def put_aside(path: str | Path) -> None:
    """Free the number of a damaged checkpoint, with a warning; its files stay."""
    logger.warning("checkpoint %s is damaged; what it held is made again", path)
    _put_aside([Path(path)])


def _put_aside(damaged: Sequence[Path]) -> None:
    for path in damaged if is_first() else ():
        with files.storing(path):
            path.rename(f"{path}.damaged-{time.time_ns()}")


def _restore_item(path: Path, item: str, like: Tree) -> Tree:
    import orbax.checkpoint as ocp

    wanted = _named(like, item)
    # The annotation of Orbax is a path class of its own, of which only what pathlib has is used.
    directory: Any = path / item
    if not directory.exists():
        _check_fit(path, item, {}, wanted)
        return like
    # The handler and not a `Checkpointer`, which would make the other processes wait at a barrier
    # for one that found damage.
    with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
        try:
            saved = _named(handler.metadata(directory).tree, item)
        except Exception as error:
            raise _damaged(path, item, error) from error
        _check_fit(path, item, saved, wanted)
        target = _nested({name: _target(leaf) for name, leaf in wanted.items()}, item)
        try:
            restored = handler.restore(directory, args=ocp.args.StandardRestore(target))
        except Exception as error:  # Orbax raises the bare class for an unreadable array
            if any(isinstance(cause, jax.errors.JaxRuntimeError) for cause in _causes(error)):
                raise  # the device's trouble, such as too little memory, not the checkpoint's
            raise _damaged(path, item, error) from error
    values = _named(restored, item)
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in wanted])


def _target(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _check_fit(path: Path, item: str, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise one `InputError` that lists every key at which two trees of arrays differ."""
    problems = []
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in saved:
            problems.append(f"{name}: not in the checkpoint")
        elif name not in wanted:
            problems.append(f"{name}: in the checkpoint only")
        elif (was := _array_text(saved[name])) != (wants := _array_text(wanted[name])):
            problems.append(f"{name}: {was} in the checkpoint, {wants} wanted")
    if problems:
        listed = "\n  - ".join(["", *problems])
        raise InputError(
            f"checkpoint {path} does not fit, {item} differ:{listed}\n"
            f"use the configuration that wrote it, which is in {path / 'meta' / _META_FILE}"
        )


def _array_text(array: Any) -> str:
    return f"{np.dtype(array.dtype).name}[{', '.join(map(str, array.shape))}]"


# Trees and names


def _named(tree: Any, item: str) -> dict[str, Any]:
    """The leaves of a tree by their path, such as `blocks/attention/query`, in the tree's order."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if "" in named or len(named) < len(leaves):
        raise ValueError(f"{item} must be a tree whose paths differ; got {sorted(named)}")
    return named


def _nested(tree: Any, item: str) -> dict[str, Any]:
    """The tree as nested dictionaries, whatever named tuples or dataclasses it is made of."""
    nested: dict[str, Any] = {}
    for name, leaf in _named(tree, item).items():
        if not isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            raise TypeError(f"{item}/{name} is {type(leaf).__name__}; put plain values into meta")
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.size:
            raise ValueError(
                f"{item}/{name} is {leaf.dtype}[{leaf.shape}]; a checkpoint holds non-empty arrays,"
                " and of a typed key `jax.random.key_data(key)`"
            )
        *folders, last = name.split("/")
        folder = nested
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[last] = leaf
    return nested


# Files


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))


def _run_directory(directory: Path) -> Path:
    """`runs/<name>` for `runs/<name>/<stage>/checkpoints`."""
    return directory.parent.parent


def _storable(meta: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """A copy of `meta` as JSON will give it back, with the parent relative to the run."""
    stored = dict(meta)
    if stored.get("parent") is not None:
        parent, run = _absolute(stored["parent"]), _run_directory(directory)
        inside = parent.is_relative_to(run)
        stored["parent"] = parent.relative_to(run).as_posix() if inside else str(parent)
    return json.loads(json.dumps(stored))


def _is_not_told_again(record: logging.LogRecord) -> bool:
    """False for the stacks that Orbax logs of what it then raises, and `StorageError` says."""
    return not (record.levelno >= logging.ERROR and "orbax" in record.pathname)


def _check_writable(directory: Path) -> None:
    with files.chosen(
        f"checkpoints to {directory}", "choose another output folder or make this one writable"
    ):
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass


def _check_files(path: Path, items: Sequence[str]) -> None:
    """Raise `DamagedCheckpointError` unless every file of the items is as long as it was written.

    Orbax notices as well, but only in the middle of reading, with many lines from its threads.
    """
    try:
        sizes = json.loads((path / _FILES_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:  # the arrays may be sound without it
        logger.warning(
            "checkpoint %s has no %s, so that nothing tells how long its files were",
            path,
            _FILES_FILE,
        )
        return
    except (OSError, ValueError) as error:
        raise _damaged(path, _FILES_FILE, error) from error
    broken = []
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else 0
        if name.split("/")[0] in items and found != size:
            broken.append(f"{name} has {found} of {size} bytes")
    if broken:
        more = f" and {len(broken) - 1} more files" if len(broken) > 1 else ""
        raise DamagedCheckpointError(f"checkpoint {path} is damaged: {broken[0]}{more}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _damaged(path: Path, item: str, error: Exception) -> DamagedCheckpointError:
    *_, root = _causes(error)
    reason = str(root).splitlines()[0][:600] if str(root) else type(root).__name__
    return DamagedCheckpointError(f"checkpoint {path} is damaged: cannot read {item}: {reason}")
