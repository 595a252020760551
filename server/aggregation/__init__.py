"""How checked replies become one meta-gradient: one rule per file, and what a run keeps between rounds."""

from server.aggregation.aggregator import Aggregator, explain_need, sites_needed
from server.aggregation.mean import Mean

__all__ = ["Aggregator", "Mean", "explain_need", "sites_needed"]
