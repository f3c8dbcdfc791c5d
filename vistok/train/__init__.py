"""Training tokenizers: data, losses and one loop. Needs the `train` extra (`pip install "vistok[train]"`)."""
