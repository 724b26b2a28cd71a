"""One module per stage of the graph."""
