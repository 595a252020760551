"""A site's own images: readers, catalogue, pixel cache, episodes."""
