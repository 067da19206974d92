"""Training of the demo model, stage after stage, each taken up where it stopped: `python -m export.demo.training`."""
