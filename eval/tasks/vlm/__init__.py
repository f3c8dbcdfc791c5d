"""Accuracy and cost of a vision-language model with token reducers, beside baselines.

`run(VlmConfig(model="…"), out, device)` is the whole of `vistok eval vlm`.
"""

from ...options import VlmConfig as VlmConfig
from .evaluation import Result as Result
from .evaluation import run as run
from .model import VisionLanguageModel as VisionLanguageModel
from .model import load as load
from .record import Row as Row
from .record import VlmRecord as VlmRecord
from .settings import Setting as Setting
from .settings import plan as plan
