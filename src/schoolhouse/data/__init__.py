"""From a raw row to the steps that are trained: formats, turns, encoding, store, plan, loader, and how to look at it."""
