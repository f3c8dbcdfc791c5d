"""Pure functions on tensors that choose, merge or group visual tokens, independent of any model."""
