"""One thread for each test process: the models are tiny, and threads would only wait for one another."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
