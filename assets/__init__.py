"""What ships with the library: sample pictures and the trained default tokenizer with its recipe and log."""
