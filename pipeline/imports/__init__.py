"""Datasets that others have aligned, brought into the same store: what lies in their folders, and what it means."""
