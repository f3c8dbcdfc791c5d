"""Where each host model family keeps its tower, projector, decoder layers and visual tokens."""
