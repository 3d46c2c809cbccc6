"""The versions of strategy cards, a folder each, and the models of their transfers that tljax has not."""
