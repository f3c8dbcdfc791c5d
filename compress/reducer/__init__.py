"""The contract of reducers: the stage they act at, what they get there, and what they return.

A method is a dataclass of its hyper-parameters under the paper's names, in one file of `methods/`, and one
function that scores or selects. Hooks, positions, masks, batches and caches are the session's work.
"""

from .base import Budget as Budget
from .base import Image as Image
from .base import Positions as Positions
from .base import Reducer as Reducer
from .base import Selection as Selection
from .base import Stage as Stage
from .base import TowerLayer as TowerLayer
from .base import budget_of as budget_of
from .base import count_of as count_of
from .base import fraction_or_count as fraction_or_count
from .base import keeps_everything as keeps_everything
from .base import token_count as token_count
from .cache import CachedPrompt as CachedPrompt
from .cache import CacheReducer as CacheReducer
from .cache import CacheStep as CacheStep
from .cache import CacheTokens as CacheTokens
from .cache import StepReducer as StepReducer
from .layers import PUBLISHED_LAYERS as PUBLISHED_LAYERS
from .layers import LayerContext as LayerContext
from .layers import LayerReducer as LayerReducer
from .layers import LayerSelection as LayerSelection
from .layers import LayerTokens as LayerTokens
from .layers import Skip as Skip
from .layers import SkipReducer as SkipReducer
from .layers import scaled_layers as scaled_layers
from .layers import share_by_layer as share_by_layer
from .tower import FeatureReducer as FeatureReducer
from .tower import Patches as Patches
from .tower import PixelReducer as PixelReducer
from .tower import ProcessorReducer as ProcessorReducer
from .tower import TowerAttention as TowerAttention
from .tower import VisionReducer as VisionReducer
