"""Peers side by side, speed and quality tables: one command each."""
