"""What was written: from a contraction back to the attention that it ends."""
