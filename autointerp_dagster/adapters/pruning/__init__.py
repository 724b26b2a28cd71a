"""Deleting what nothing needs any more from a store, safely beside runs that write to it.

``survey.py`` says what is needed and what may go, and why; ``deleting.py`` deletes it.
"""
