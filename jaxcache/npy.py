"""Weights as a `.npy` file, written some rows at a time. NumPy alone."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np


def write_weights(
    path: str | os.PathLike, what: str, shape: tuple[int, int], dtype: np.dtype, parts: Iterable[np.ndarray]
) -> int:
    """Writes the weights of consecutive rows to a `.npy` file, which takes the place of another once it is complete.

    Args:
        path: taken as it is, no `.npy` is appended.
        what: is written, for the error if there is no room.
        shape: `(rows, dim)`.
        dtype: of the weights. Bfloat16, which such files do not know, is written as float32.
        parts: the rows, `[N, dim]` at a time. What they raise leaves the file as it was.

    Returns:
        The bytes of the weights.

    Raises:
        OSError: if the disk has no room for the file, or it cannot be written.
    """
    path, dtype = Path(path), np.dtype(np.float32 if dtype == ml_dtypes.bfloat16 else dtype)
    size, free = shape[0] * shape[1] * dtype.itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{what} takes {size:,} bytes, {free:,} are free for", str(path))
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for weights in parts:
                file.write(weights.astype(dtype, copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return size
