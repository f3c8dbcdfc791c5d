"""Pure functions on tensors that choose, merge or group visual tokens; they know no model."""
