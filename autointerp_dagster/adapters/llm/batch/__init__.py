"""Asking by file: questions out, answers in."""
