"""Strategies: one algorithm, one file, both halves (what a client does, what the server does)."""
