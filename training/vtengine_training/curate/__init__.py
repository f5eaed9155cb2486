"""Curation: which questions the low view answers, and which need the high view, measured with the model itself."""
