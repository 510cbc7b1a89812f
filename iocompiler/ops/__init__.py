"""The semantic operators and what every operator decomposes to."""
