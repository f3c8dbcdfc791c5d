"""One file per question: reconstruction, FID, rate and distortion, lengths."""
