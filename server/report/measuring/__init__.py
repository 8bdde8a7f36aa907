"""Taking a report's steps; the only part of serving's packages that may import the bench."""
