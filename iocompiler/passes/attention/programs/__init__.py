"""The score program: what becomes of each score, as our template computes it."""
