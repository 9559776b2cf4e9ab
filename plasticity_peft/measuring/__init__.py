"""The measurement itself: images through a criterion into a report, over all processes."""
