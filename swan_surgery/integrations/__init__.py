"""Callbacks for training frameworks; each file needs its framework, importing this folder needs none."""

__all__: list[str] = []
