"""What a session reports of a prompt: counts, savings, and which patches were kept."""
