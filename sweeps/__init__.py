"""One short file a question: run it, and run it again to go on."""
