"""Similarity search with learned hierarchical sparse hash codes, as scikit-learn estimators."""
