"""How an attention is run: by which operator, and its nodes in the graph."""
