"""What prompts show, as features: made once a prompt, and once for all where nothing moves them.

A frozen encoder gives an image the same features at every step, so those of the last images are
kept, and an update reads them in place of patches.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxrl_reason import processes
from jaxrl_reason.data.batching import visual_rows
from jaxrl_reason.data.vision import VisionRow
from jaxrl_reason.models import Model, Params
from jaxrl_reason.models.lora import trainable
from jaxrl_reason.sampling import Shown
from jaxrl_reason.sharding import (
    batch_multiple,
    batch_sharding,
    jit_on_mesh,
    own_rows,
    place_batch,
    replicated,
)
from jaxrl_reason.stages.encoding import Prompt
from jaxrl_reason.stages.policy_rows import Sight

_KEPT_BYTES = 2**31
"""Of features on the host."""


class _Features(NamedTuple):
    """Of one prompt."""

    merged: np.ndarray  # [M, D]
    deep: np.ndarray | None  # [K, M, D]

    @property
    def nbytes(self) -> int:
        return self.merged.nbytes + (0 if self.deep is None else self.deep.nbytes)


class Eyes:
    """Encodes images and videos of prompts.

    Args:
        model: that sees.
        mesh: where it runs.
        visual_tokens: most features of a prompt.
    """

    def __init__(self, model: Model, mesh: Mesh, visual_tokens: int):
        self._model, self._mesh, self._most = model, mesh, visual_tokens
        cut = batch_sharding(mesh)
        self.program = jit_on_mesh(model.visual_features, mesh, out_shardings=cut)
        """`(params, arrays of patches)` to features."""
        self._row = jit_on_mesh(_row, mesh, out_shardings=replicated(mesh))
        vision = jax.eval_shape(model.init, jax.random.key(0))["vision"]
        trains = trainable(model.config)
        paths = (path for path, _ in jax.tree_util.tree_leaves_with_path(vision))
        self.frozen = not any(trains(("vision", *(part.key for part in path))) for path in paths)
        """Whether a run leaves the encoder as it is."""
        self._kept: OrderedDict[bytes, _Features] = OrderedDict()
        self.encoded = 0
        """Prompts that were encoded, and not remembered."""

    @property
    def patches_per_token(self) -> int:
        """Patches that a feature is made of."""
        return self._model.config.vision.merge_unit

    def look(self, params: Params, prompts: Sequence[Prompt]) -> tuple[list[Shown], list[Sight]]:
        """What sampling and the update read of prompts; text alone shows no features."""
        features = self._features(params, [prompt.shown for prompt in prompts])
        shown = [
            Shown(
                positions=prompt.shown.positions,
                next_position=prompt.shown.next_position,
                visual_index=prompt.shown.visual_index,
                features=found.merged,
                deep_features=found.deep,
            )
            for prompt, found in zip(prompts, features, strict=True)
        ]
        if self.frozen:
            pairs = zip(prompts, features, strict=True)
            return shown, [Sight(p.shown, found.merged, found.deep) for p, found in pairs]
        return shown, [Sight(prompt.shown) for prompt in prompts]

    def _features(self, params: Params, rows: Sequence[VisionRow]) -> list[_Features]:
        names = [_name(row) for row in rows]
        new = {name: row for name, row in zip(names, rows, strict=True) if name not in self._kept}
        found = {name: self._kept[name] for name in names if name in self._kept}
        size = batch_multiple(self._mesh)
        order = list(new)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            found |= dict(zip(part, self._encode(params, [new[n] for n in part]), strict=True))
        self.encoded += len(new)
        if self.frozen:
            self._keep({name: found[name] for name in names})
        return [found[name] for name in names]

    def _encode(self, params: Params, rows: list[VisionRow]) -> list[_Features]:
        """Of as many rows as there are devices, or fewer; one shape for all."""
        size = batch_multiple(self._mesh)
        own = own_rows(self._mesh, size)
        shape = (len(own), max(len(row.visual_index) for row in rows))
        patches = self._most * self.patches_per_token
        arrays = visual_rows(
            [[rows[r]] for r in own if r < len(rows)], shape, patches, like=rows[0]
        )
        arrays = {name: x for name, x in arrays.items() if name.startswith("patch")}
        made = self.program(params, place_batch(arrays, self._mesh, rows=size))
        if processes.count() == 1:
            made = jax.device_get(made)
            row_of = lambda r: {name: x[r] for name, x in made.items()}
        else:  # every device has room for a row of another, but perhaps not for all
            row_of = lambda r: jax.device_get(self._row(made, r))
        found = []
        for r, row in enumerate(rows):
            count, features = len(row.patches) // self.patches_per_token, row_of(r)
            deep = features.get("deep_features")
            merged = features["features"][:count]
            found.append(_Features(merged, None if deep is None else deep[:, :count]))
        return found

    def _keep(self, found: dict[bytes, _Features]) -> None:
        for name, features in found.items():
            self._kept[name] = features
            self._kept.move_to_end(name)
        while sum(x.nbytes for x in self._kept.values()) > _KEPT_BYTES and len(self._kept) > 1:
            self._kept.popitem(last=False)


def _row(made: dict[str, jax.Array], number: jax.Array) -> dict[str, jax.Array]:
    """A row of arrays [R, ...]. Indexing would gather all rows first; a sum gathers this one."""

    def of(x: jax.Array) -> jax.Array:
        wanted = (jnp.arange(x.shape[0]) == number).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(wanted, x, jnp.zeros_like(x)).sum(axis=0)

    return {name: of(x) for name, x in made.items()}


def _name(row: VisionRow) -> bytes:
    """Identifies images and videos."""
    digest = hashlib.sha256()
    for array in (row.patches, row.patch_grids, row.patch_segments):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.digest()
