"""What the dims of a tensor mean, and how views bring it to other ones."""
