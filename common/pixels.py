"""What a network sees of a pixel: the one scale of every study, every site and every export."""

__all__ = ["CENTRE", "SPREAD"]

#: Pixels 0..255 become (x - CENTRE) / SPREAD, -2 to 2: about zero mean and unit deviation for most images.
CENTRE, SPREAD = 127.5, 63.75
