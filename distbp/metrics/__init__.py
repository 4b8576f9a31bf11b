"""What a run tells about itself: records, progress, and later reports."""
