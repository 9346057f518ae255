"""`Checkpoint` for Orbax's older API, the `CheckpointManager` of `orbax.checkpoint`; v1 needs nothing from here.

```python
from jaxcache import checkpoint_manager

manager.save(step, args=ocp.args.Composite(tables=checkpoint_manager.Save(jc.Checkpoint(store, cache))))
manager.restore(step, args=ocp.args.Composite(tables=checkpoint_manager.Restore(jc.Checkpoint(store))))
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orbax.checkpoint as ocp

from jaxcache.checkpoint import Checkpoint


class Handler(ocp.AsyncCheckpointHandler):
    """Saves a `Checkpoint`, and restores into one. Orbax makes it; what it is told is `Save` and `Restore`."""

    async def async_save(self, directory: Any, args: Save) -> list[ocp.future.Future]:
        """Takes the snapshot; what is returned writes it."""
        write = args.checkpoint.begin_save(directory)

        async def finish() -> None:
            write(directory)

        return [ocp.future.CommitFutureAwaitingContractedSignals(finish(), name="jaxcache")]

    def save(self, directory: Any, args: Save) -> None:
        """Saves at once."""
        args.checkpoint.begin_save(directory)(directory)

    def restore(self, directory: Any, args: Restore) -> Checkpoint:
        """Restores the store of the checkpoint, and returns that."""
        args.checkpoint.restore(directory)
        return args.checkpoint


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclass
class Save(ocp.args.CheckpointArgs):
    """What `CheckpointManager.save` is to save."""

    checkpoint: Checkpoint


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclass
class Restore(ocp.args.CheckpointArgs):
    """What `CheckpointManager.restore` is to restore."""

    checkpoint: Checkpoint
