from __future__ import annotations

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# How long an example takes says nothing about whether it is right.
settings.register_profile("sapo", deadline=None)
settings.load_profile("sapo")
