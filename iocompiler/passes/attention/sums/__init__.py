"""Sums in the way of reading: of products made one, of probabilities made several."""
