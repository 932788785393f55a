"""Whole trainings, resumable: a classifier by a file of settings, and the demo's digits."""
