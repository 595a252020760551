"""How fast, how large and how exact: the engine against the usual loops, and a thousand sites in one process."""
