"""Measurements that are not about HTTP: what a training step costs beside its floor and beside a plain re-creation."""
