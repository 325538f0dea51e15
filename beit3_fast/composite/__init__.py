"""The two ops made of PyTorch's own best calls: run everywhere, differentiate, export; the fallback."""
