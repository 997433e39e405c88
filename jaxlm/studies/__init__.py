"""Whole experiments that join the rooms below."""
