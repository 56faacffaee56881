"""The operators, one folder each, and what they share."""
