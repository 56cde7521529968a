"""`kit watch`: a run while it trains, read from its directory. Nothing here imports torch, writes, or takes a lock."""
