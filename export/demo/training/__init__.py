"""Training of the demo model: `python -m export.demo.training`, one stage after another, each taken up where it stopped."""
