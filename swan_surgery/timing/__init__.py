"""Milliseconds: one timing loop, layers at several widths, whole models in a runtime."""
