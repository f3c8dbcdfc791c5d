"""A session's reports on a prompt: counts, savings, and which patches were kept."""
