"""The page: choose, start, watch, stop, resume, compare and chat, in a browser on this machine."""
