"""distbp."""
