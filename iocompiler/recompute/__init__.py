"""What is kept for the backward and what is computed again there, under a bound on memory."""
