"""Many processes: how they are started, who they are, and how they share a model and a conversation."""
