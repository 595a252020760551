"""What both sides agree on: the study, the contract at the wire, models and learners.

Pure: no files, no network, no clock, no global randomness.
"""
