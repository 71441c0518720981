"""CROMA in plain PyTorch: torch and the standard library only; no Ray, no paths, no I/O but state dicts."""
