"""What masks and biases mean: their elements, said without running anything."""
