"""Bridges to other people's models; each submodule is imported on demand only."""
