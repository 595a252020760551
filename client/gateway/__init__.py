"""The site's own door: what may leave, and the record of what left."""
