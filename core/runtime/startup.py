"""Brings up what an engine needs before anything of it can run: torch, and beside it the driver of the GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
from importlib import import_module
from threading import Thread

ENGINE = "plexor.runtime.engine"


def import_engine(device: str) -> None:
    """Import the engine and torch with it, for a process that does nothing else yet.

    The import keeps Python busy, while the driver needs none of it to open a GPU: the two go on side by side. Objects
    that an import leaves behind stay for good, so no garbage is looked for among them, now or later.

    device: as in EngineConfig.
    """
    if ENGINE in sys.modules:
        return
    if device != "cpu":
        Thread(target=_open_gpu, daemon=True).start()
    gc.disable()
    try:
        import_module(ENGINE)
    finally:
        gc.freeze()
        gc.enable()


def _open_gpu() -> None:
    """Open the context of the first GPU that is visible, which torch then finds open.

    The calls are those of the CUDA driver API, under "Initialization" and "Primary Context Management". What they
    answer does not matter: where there is no GPU, or one that does not work, torch is left to say so.
    """
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    gpu, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(gpu), 0) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), gpu)
