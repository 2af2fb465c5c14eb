"""Students and lessons that are made, not downloaded: the whole path works without a network."""
