"""Turns SDXL checkpoints in diffusers layout into weight-free ONNX graphs and a catalogue entry."""
