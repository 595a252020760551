"""Measurements that a page of the documentation cites."""
