"""For every test: Triton kernels run under its interpreter where there is no CUDA device."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
