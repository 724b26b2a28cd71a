"""Long trials of the whole pipeline: at scale, and with everything that can go wrong.

``python -m rehearsals [NAME ...]`` runs them; ``make rehearse`` runs all.
"""
