"""Fits to what people have recorded: experts to serving logs and profiles, arrival processes to traces."""
