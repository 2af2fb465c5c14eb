"""From a raw row to what is trained: formats, turns, encoding, store, plan and loader; and how to look at it."""
