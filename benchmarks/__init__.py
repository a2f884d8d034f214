"""What the platform costs beside the training itself: ``make bench``."""
