"""Images and features to numbers, figures and a report."""
