"""Building blocks shared by the tokenizer families."""
